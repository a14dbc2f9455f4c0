"""Centre loss and cross entropy, forward and backward, against separate losses and liger-kernel's fused head."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seda_fast import reference
from seda_fast.ops import semantic_projection

DIM = 768
LIGER = "liger-kernel, without centre loss"
SIZES = {"cuda": [(16_384, 1000), (16_384, 21_841)], "cpu": [(1024, 1000)]}


def eager(features: Tensor, labels: Tensor, centres: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    centre = F.mse_loss(features.float(), centres[labels])
    return centre, F.cross_entropy(F.linear(features, weight, bias), labels)


def liger_peer(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Gradients by liger-kernel's fused linear cross entropy, which has no centre loss.

    Raises:
        RuntimeError: there is no GPU; and whatever its import raises where it is absent or made for another Triton.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if not bias.is_cuda:
        raise RuntimeError("liger-kernel needs a GPU")
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: torch.autograd.grad(loss(weight, features, labels, bias), (features, weight, bias))


def peak_bytes(call: Callable[[], object]) -> float:
    """GPU memory that a call needs beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


@pytest.mark.parametrize("size", [0, 1])
def bench_projection(
    contest: Any,
    device: torch.device,
    quick: bool,
    workload: Any,
    compile_variants: Any,
    close: Any,
    peer: Any,
    size: int,
) -> None:
    sizes = [(64, 100)] if quick else SIZES[device.type]
    if size >= len(sizes):
        pytest.skip("K = 21 841 is measured on a GPU")
    rows, classes = sizes[size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    features = torch.randn(rows, DIM, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(classes, DIM, device=device) * DIM**-0.5).to(dtype).requires_grad_()
    bias = (0.1 * torch.randn(classes, device=device)).to(dtype).requires_grad_()
    labels, centres = torch.randint(0, classes, (rows,), device=device), torch.randn(classes, DIM, device=device)
    leaves = (features, weight, bias)

    def gradients(losses: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(losses[0] + losses[1], leaves)

    arguments = (features, labels, centres, weight, bias)
    competitors: dict[str, Callable[[], Any]] = {
        "seda_fast": lambda: gradients(semantic_projection(*arguments)),
        "eager": lambda: gradients(eager(*arguments)),
    }
    for name, variant in compile_variants(eager, device).items():
        competitors[name] = lambda variant=variant: gradients(variant(*arguments))
    competitors[LIGER] = peer(lambda: liger_peer(features, labels, weight, bias))
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    centre, entropy = reference.semantic_projection(wide[0], labels, centres.double(), wide[1], wide[2])
    exact, exact_entropy = torch.autograd.grad(centre + entropy, wide, retain_graph=True), ()
    usual, usual_entropy = competitors["eager"](), ()
    if bias.is_cuda:
        exact_entropy = torch.autograd.grad(entropy, wide)
        usual_entropy = torch.autograd.grad(eager(*arguments)[1], leaves)

    def check(name: str, result: tuple[Tensor, ...]) -> None:
        # liger-kernel adds up its chunks in half precision.
        wanted, plain, times = (exact_entropy, usual_entropy, 8.0) if name == LIGER else (exact, usual, 2.0)
        for part, *three in zip(("features", "weight", "bias"), result, wanted, plain, strict=True):
            close(*three, f"{name}, gradient of {part}", times=times)

    extra = {}
    if device.type == "cuda":
        outputs = features.nbytes + weight.nbytes + bias.nbytes
        extra["extra memory / bfloat16 logits"] = (peak_bytes(competitors["seda_fast"]) - outputs) / (
            2 * rows * classes
        )
    moved = 2 * (features.nbytes + weight.nbytes) + centres.nbytes * min(1, rows / classes)
    title = f"projection forward + backward, B = {rows}, K = {classes} {str(dtype)[6:]}"
    flops = 3 * 2 * rows * classes * DIM
    contest(workload(title, "semantic_projection", moved=moved, flops=flops, dtype=dtype), competitors, check, extra)
