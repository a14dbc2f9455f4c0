"""The optimiser's step in one pass over the weights, against PyTorch's clipping, fused AdamW and average in turn."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seda_fast import SeDA, SeDAConfig, reference
from seda_fast.ops import gradient_norm, weight_update

SIZES = {"visual_dim": 768, "text_dim": 384, "n_classes": 100}
RATE, DECAY, CLIP, MOVED, EPSILON = 1e-3, 0.01, 1.0, 0.005, 1e-8
BETAS = 0.9, 0.99


def plain(weights: list[Tensor], grads: list[Tensor], average: list[Tensor]) -> Callable[[], list[Tensor]]:
    """As a good engineer writes it."""
    optimiser = torch.optim.AdamW(weights, lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY, fused=True)

    def step() -> list[Tensor]:
        for w, g in zip(weights, grads, strict=True):
            w.grad = g
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, MOVED)
        return [*weights, *average]

    return step


def ours(weights: list[Tensor], grads: list[Tensor], average: list[Tensor]) -> Callable[[], list[Tensor]]:
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    steps = [torch.zeros(()) for _ in weights]
    numbers = {"clip_norm": CLIP, "learning_rate": RATE, "betas": BETAS, "epsilon": EPSILON}

    def step() -> list[Tensor]:
        norm = gradient_norm(grads)
        weight_update(
            *(weights, grads, first, second, average, steps), norm=norm, weight_decay=DECAY, moved=MOVED, **numbers
        )
        return [*weights, *average]

    return step


def bench_weight_update(contest: Any, device: torch.device, quick: bool, workload: Any, close: Any) -> None:
    if device.type != "cpu":
        pytest.skip("on a GPU PyTorch's fused AdamW serves, inside the step's graph")
    small = {"width": 32, "visual_width": 32} if quick else {}
    weights = list(SeDA(SeDAConfig(**SIZES, **small)).parameters())
    grads = [torch.randn_like(w) for w in weights]
    average = [torch.randn_like(w) for w in weights]
    made = {"seda_fast": ours, "eager": plain}
    competitors = {name: make(*copy.deepcopy((weights, grads, average))) for name, make in made.items()}
    usual = [t.detach() for t in plain(*copy.deepcopy((weights, grads, average)))()]

    wide = [[t.detach().double() for t in tensors] for tensors in (weights, grads, average)]
    moments = [[torch.zeros_like(t) for t in wide[0]] for _ in range(2)]
    steps = [torch.zeros(()) for _ in weights]
    norm = reference.gradient_norm(wide[1])
    reference.weight_update(
        *(wide[0], wide[1], *moments, wide[2], steps, norm, CLIP, RATE, *BETAS, EPSILON, DECAY, MOVED)
    )

    def check(name: str, result: list[Tensor]) -> None:
        for got, expected, eager in zip(result, [*wide[0], *wide[2]], usual, strict=True):
            close(got, expected, eager, name)

    size = sum(w.nbytes for w in weights)
    # The norm reads the gradients; the pass reads them, and reads and writes the weights, both moments and the average.
    title = f"weight update, {sum(w.numel() for w in weights) / 1e6:.1f} M weights"
    contest(workload(title, "weight_update", moved=10.0 * size), competitors, check)
