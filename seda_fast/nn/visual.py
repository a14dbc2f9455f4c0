"""The third head: a classifier of the visual feature itself, beside the two that read the aligned features."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import SeDAConfig, TrainConfig
from ..ops import q_sample
from .linear import placeless_linear


class GaussianDropout(NamedTuple):
    """Multiplicative noise of one pass: its rates, and what keys the noise.

    Attributes:
        input_rate, hidden_rate: before and inside the visual head.
        condition_rate: on the learner's condition v and the translator's s. translator_rate: on the translator's v.
        seed, step, sample_ids: key the noise with ``stream``, the first of the four streams that it draws from.
    """

    input_rate: float
    hidden_rate: float
    condition_rate: float
    translator_rate: float
    seed: Tensor
    step: Tensor
    sample_ids: Tensor
    stream: int

    @classmethod
    def of(cls, settings: TrainConfig, seed: Tensor, step: Tensor, sample_ids: Tensor, stream: int) -> GaussianDropout:
        """With the rates of ``settings``; the translator's that of all conditions until a rule has seen the rows."""
        told = settings.condition_dropout if settings.translator_dropout == -1 else settings.translator_dropout
        rates = settings.visual_input_dropout, settings.visual_dropout, settings.condition_dropout, told
        return cls(*rates, seed, step, sample_ids, stream)

    def on(self, x: Tensor, rate: float, layer: int) -> Tensor:
        """``x * (1 + sqrt(p / (1 - p)) * eps)`` (Srivastava et al. 2014, sec. 10), (B, D) -> (B, D).

        A method with a name: of a tuple that is called itself, PyTorch 2.10's compiler wants all parts to be constants.
        Mean and variance are those of dropout with rate p. ``eps`` is the counter generator's, drawn by the noising
        operation on ones, so that every backend that has the operation has this.
        """
        return x if rate == 0 else x * self._factor(x, x.shape[1], rate, layer)

    def conditions(self, visual: Tensor) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """Factors (B, Dv) of the learner's condition v and of the translator's, s and v; the first two drawn at once.

        A network told the whole feature at every step learns the training rows by heart, whatever noise its state has.
        """
        dim = visual.shape[1]
        learner: Tensor | float = 1.0
        semantic: Tensor | float = 1.0
        if self.condition_rate > 0:
            learner, semantic = self._factor(visual, 2 * dim, self.condition_rate, 2).chunk(2, dim=1)
        translator = self._factor(visual, dim, self.translator_rate, 3) if self.translator_rate > 0 else 1.0
        return learner, semantic, translator

    def _factor(self, like: Tensor, dim: int, rate: float, layer: int) -> Tensor:
        """``1 + sqrt(p / (1 - p)) * eps``, (B, dim), with the rows, device and dtype of ``like``."""
        rows = like.shape[0]
        once = torch.zeros(rows, dtype=torch.int64, device=like.device)
        signal, deviation = like.new_ones(1), like.new_full((1,), math.sqrt(rate / (1 - rate)))
        key = {"seed": self.seed, "step": self.step, "sample_ids": self.sample_ids}
        return q_sample(like.new_ones(rows, dim), once, signal, deviation, **key, stream=self.stream + layer)


class VisualHead(nn.Module):
    """Two-layer classifier of standardised visual features; ``hidden`` (B, w) is what its last layer reads."""

    def __init__(self, config: SeDAConfig) -> None:
        super().__init__()
        self.input = nn.Linear(config.visual_dim, config.visual_width)
        self.norm = nn.LayerNorm(config.visual_width)
        self.head = nn.Linear(config.visual_width, config.n_classes)

    def hidden(self, visual: Tensor, dropout: GaussianDropout | None = None) -> Tensor:
        """(B, Dv) -> (B, w)."""
        x = visual if dropout is None else dropout.on(visual, dropout.input_rate, 0)
        # Predictions, which have no dropout, are of rows that do not see their place.
        of_input = self.input(x) if dropout else placeless_linear(x, self.input.weight, self.input.bias)
        h = F.gelu(self.norm(of_input))
        return h if dropout is None else dropout.on(h, dropout.hidden_rate, 1)

    def forward(self, visual: Tensor) -> Tensor:
        """Logits without dropout, (B, Dv) -> (B, K)."""
        return placeless_linear(self.hidden(visual), self.head.weight, self.head.bias)
