"""The third head: a classifier of the visual feature itself, beside the two that read the aligned features."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import SeDAConfig
from ..ops import q_sample


class GaussianDropout(NamedTuple):
    """Multiplicative noise of one pass: its rates, and what keys the noise.

    Attributes:
        input_rate, hidden_rate: before and inside the visual head.
        condition_rate: on what the networks are conditioned on.
        seed, step, sample_ids: key the noise with ``stream``, the first of the five streams that it draws from.
    """

    input_rate: float
    hidden_rate: float
    condition_rate: float
    seed: Tensor
    step: Tensor
    sample_ids: Tensor
    stream: int

    def __call__(self, x: Tensor, rate: float, layer: int) -> Tensor:
        """``x * (1 + sqrt(p / (1 - p)) * eps)`` (Srivastava et al. 2014, sec. 10), (B, D) -> (B, D).

        Mean and variance are those of dropout with rate p. ``eps`` is the counter generator's, drawn by the noising
        operation on ones, so that every backend that has the operation has this.
        """
        if rate == 0:
            return x
        once = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        signal, deviation = x.new_ones(1), x.new_full((1,), math.sqrt(rate / (1 - rate)))
        key = {"seed": self.seed, "step": self.step, "sample_ids": self.sample_ids}
        return x * q_sample(torch.ones_like(x), once, signal, deviation, **key, stream=self.stream + layer)

    def condition(self, *parts: Tensor, layer: int) -> tuple[Tensor, ...]:
        """Each part (B, D) of a condition with noise of its own, the first with that of ``layer``.

        A network told the whole feature at every step learns the training rows by heart, whatever noise its state has.
        """
        return tuple(self(part, self.condition_rate, layer + i) for i, part in enumerate(parts))


class VisualHead(nn.Module):
    """Two-layer classifier of standardised visual features; ``hidden`` (B, w) is what its last layer reads."""

    def __init__(self, config: SeDAConfig) -> None:
        super().__init__()
        self.input = nn.Linear(config.visual_dim, config.visual_width)
        self.norm = nn.LayerNorm(config.visual_width)
        self.head = nn.Linear(config.visual_width, config.n_classes)

    def hidden(self, visual: Tensor, dropout: GaussianDropout | None = None) -> Tensor:
        """(B, Dv) -> (B, w)."""
        x = visual if dropout is None else dropout(visual, dropout.input_rate, 0)
        h = F.gelu(self.norm(self.input(x)))
        return h if dropout is None else dropout(h, dropout.hidden_rate, 1)

    def forward(self, visual: Tensor) -> Tensor:
        """Logits without dropout, (B, Dv) -> (B, K)."""
        logits: Tensor = self.head(self.hidden(visual))
        return logits
