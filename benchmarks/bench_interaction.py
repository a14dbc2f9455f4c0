"""One interaction block, forward and backward, with dropout, against the module that a good engineer would write."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seda_fast import reference
from seda_fast.ops import interaction_block

WIDTH, EXPANSION, STEPS, DROPOUT = 512, 2, 1000, 0.1
ROWS = {"cuda": 16_384, "cpu": 1024}


def operands(rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    hidden = EXPANSION * WIDTH
    return {
        "h": draw(rows, WIDTH, scale=1.0),
        "gate": (1 + draw(rows, hidden, scale=0.3)).detach().requires_grad_(),
        "shift": draw(STEPS, WIDTH, scale=0.3),
        "scale": draw(STEPS, WIDTH, scale=0.3),
        "alpha": draw(STEPS, WIDTH, scale=0.3),
        "w_h": draw(hidden, WIDTH, scale=WIDTH**-0.5),
        "b_h": draw(hidden, scale=0.1),
        "w_o": draw(WIDTH, hidden, scale=hidden**-0.5),
        "b_o": draw(WIDTH, scale=0.1),
    }


def eager(
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    alpha: Tensor,
    w_h: Tensor,
    b_h: Tensor,
    w_o: Tensor,
    b_o: Tensor,
    tau: Tensor,
    dropout: float,
) -> Tensor:
    z = F.layer_norm(h, (WIDTH,)) * (1 + scale[tau]) + shift[tau]
    u = F.dropout(F.silu(F.linear(z, w_h, b_h)) * gate, dropout)
    return h + (1 + alpha[tau]) * F.linear(u, w_o, b_o)


class SwigluPeer:
    """xformers' SwiGLU of the same sizes: three products, no norm, no tables, no dropout.

    Raises whatever its import does where it is absent, or built for another PyTorch.
    """

    def __init__(self, h: Tensor, weight: Tensor) -> None:
        from xformers.ops import SwiGLU

        self.h, self.weight = h, weight
        self.module = SwiGLU(WIDTH, EXPANSION * WIDTH, WIDTH, bias=True).to(device=h.device, dtype=h.dtype)

    def __call__(self) -> tuple[Tensor, ...]:
        """Gradients of h and of the parameters, in their order."""
        return torch.autograd.grad(self.module(self.h), [self.h, *self.module.parameters()], self.weight)

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The same gradients by its formula in PyTorch: ``w3(silu(w1 h) * w2 h)``; w1 and w2 may lie in one, w12."""
        h = self.h.detach().to(dtype).requires_grad_()
        own = {name: p.detach().to(dtype).requires_grad_() for name, p in self.module.named_parameters()}
        packed = ["w12"] if "w12.weight" in own else ["w1", "w2"]
        both = torch.cat([F.linear(h, own[f"{name}.weight"], own[f"{name}.bias"]) for name in packed], dim=1)
        first, second = both.chunk(2, dim=1)
        value = F.linear(F.silu(first) * second, own["w3.weight"], own["w3.bias"])
        return torch.autograd.grad(value, [h, *own.values()], self.weight.to(dtype))


PEER = "xformers SwiGLU"


def bench_interaction(
    contest: Any, device: torch.device, quick: bool, workload: Any, compile_variants: Any, close: Any, peer: Any
) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = 64 if quick else ROWS[device.type]
    given = operands(rows, dtype, device)
    leaves = list(given.values())
    tau = torch.randint(0, STEPS, (rows,), device=device).sort().values
    weight = torch.randn(rows, WIDTH, device=device).to(dtype)
    keys: dict[str, Any] = {
        "seed": torch.tensor(1, device=device),
        "step": torch.tensor(2, device=device),
        "sample_ids": torch.arange(rows, device=device),
    }
    with_backward = lambda value: torch.autograd.grad(value, leaves, weight)  # noqa: E731
    competitors = {
        "seda_fast": lambda: with_backward(interaction_block(**given, timesteps=tau, dropout=DROPOUT, **keys)),
    }
    variants = {"eager": eager, **compile_variants(eager, device)}
    for name, variant in variants.items():
        competitors[name] = lambda variant=variant: with_backward(variant(**given, tau=tau, dropout=DROPOUT))
    competitors[PEER] = peer(lambda: SwigluPeer(given["h"], weight))
    wide = {name: value.detach().double().requires_grad_() for name, value in given.items()}

    def defined(dropout: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The definition's gradients in float64 and in the operands' dtype."""
        options: dict[str, Any] = {"timesteps": tau, "dropout": dropout, **keys}
        value = reference.interaction_block(**wide, **options)
        exact = torch.autograd.grad(value, list(wide.values()), weight.double())
        return exact, with_backward(reference.interaction_block(**given, **options))

    dropped, whole = defined(DROPOUT), defined(0.0)

    def check(name: str, result: tuple[Tensor, ...]) -> None:
        if name == PEER:
            swiglu = competitors[PEER]
            for three in zip(result, swiglu.plain(torch.float64), swiglu.plain(dtype), strict=True):
                close(*three, f"{name}, a gradient", times=8.0)
            return
        expected = dropped
        if name in variants:
            # PyTorch's masks are others: finite with dropout, compared without.
            assert all(part.isfinite().all() for part in result), name
            result, expected = with_backward(variants[name](**given, tau=tau, dropout=0.0)), whole
        for part, *three in zip(given, result, *expected, strict=True):
            close(*three, f"{name}, gradient of {part}")

    hidden = EXPANSION * WIDTH
    # Read once: h, gate, the gradient; written once: the result and the gradients of h and gate.
    moved = given["h"].element_size() * rows * (4 * WIDTH + 2 * hidden)
    title = f"interaction forward + backward, B = {rows} {str(dtype)[6:]}"
    contest(
        workload(title, "interaction_block", moved=moved, flops=6 * 2 * rows * WIDTH * hidden, dtype=dtype),
        competitors,
        check,
    )


@pytest.mark.gpu
def bench_interaction_needs_no_more_memory_than_eager(device: torch.device, benchmark: Any) -> None:
    benchmark.pedantic(lambda: None, rounds=1)
    given = operands(ROWS["cuda"], torch.bfloat16, device)
    tau = torch.randint(0, STEPS, (ROWS["cuda"],), device=device).sort().values
    peaks = []
    for block in (interaction_block, eager):
        # The gradients of the one before would count for the next.
        for tensor in given.values():
            tensor.grad = None
        torch.cuda.reset_peak_memory_stats()
        arguments = {"timesteps": tau} if block is interaction_block else {"tau": tau, "dropout": 0.0}
        block(**given, **arguments).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] <= peaks[1]
