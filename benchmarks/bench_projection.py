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
SIZES = {"cuda": [(16_384, 1000), (16_384, 21_841)], "cpu": [(1024, 1000)]}


def eager(features: Tensor, labels: Tensor, centres: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    centre = F.mse_loss(features.float(), centres[labels])
    return centre, F.cross_entropy(F.linear(features, weight, bias), labels)


def liger_peer(bias: Tensor) -> Callable[..., Tensor] | None:
    """liger-kernel's fused linear cross entropy (no centre loss); None where it is absent or there is no GPU."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except Exception:  # noqa: BLE001 - made for another Triton, it raises whatever it meets first
        return None
    if not bias.is_cuda:
        return None
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda features, labels, weight: loss(weight, features, labels, bias)


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
    contest: Any, device: torch.device, quick: bool, workload: Any, compile_variants: Any, close: Any, size: int
) -> None:
    sizes = [(64, 100)] if quick else SIZES[device.type]
    if size >= len(sizes):
        pytest.skip("K = 21 841 is measured on a GPU")
    rows, classes = sizes[size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    features = torch.randn(rows, DIM, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(classes, DIM, device=device) * DIM**-0.5).to(dtype).requires_grad_()
    bias = torch.zeros(classes, device=device).to(dtype).requires_grad_()
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
    liger = liger_peer(bias)
    if liger is not None:
        competitors["liger-kernel, without centre loss"] = lambda: torch.autograd.grad(
            liger(features, labels, weight), leaves
        )
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    centre, entropy = reference.semantic_projection(wide[0], labels, centres.double(), wide[1], wide[2])
    exact = torch.autograd.grad(centre + entropy, wide)

    def check(name: str, result: tuple[Tensor, ...]) -> None:
        if "without" not in name:
            for part, got, expected in zip(("features", "weight", "bias"), result, exact, strict=True):
                close(got, expected, 256, f"{name}, gradient of {part}")

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
