"""The teacher of unlabelled pairs for multi-label targets: `teacher` with a yes or no of each class by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .copies import first_copies
from .multi_label import labelled_rows
from .teacher import L2_GRID, MANY_PRODUCTS, REFIT_L2, Linear, history

_FOLDS = 5
_LARGEST_LOGIT = 12.0  # a few rows can be told apart with any certainty; a factor of e**12 is enough of it


class BinaryPairTeacher(nn.Module):
    """Probabilities of carrying each class from a visual and a textual linear classifier.

    The classifiers' logits z are added, ``offset + sum trust * z`` with the ``trust`` (2, K) and ``offset`` (K,) that
    held-out rows ask for. Its buffers are not saved: prediction has no use for it.
    """

    visual_weight: Tensor
    visual_bias: Tensor
    text_weight: Tensor
    text_bias: Tensor
    trust: Tensor
    offset: Tensor

    def __init__(self, visual: Linear, text: Linear, trust: Tensor, offset: Tensor) -> None:
        super().__init__()
        for name, value in (("visual", visual), ("text", text)):
            self.register_buffer(f"{name}_weight", value.weight, persistent=False)
            self.register_buffer(f"{name}_bias", value.bias, persistent=False)
        self.register_buffer("trust", trust, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    @torch.no_grad()
    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        """Standardised ``visual`` (B, Dv) and ``text`` (B, Dt) -> probabilities of each class (B, K)."""
        v, t = F.linear(visual, self.visual_weight, self.visual_bias), F.linear(text, self.text_weight, self.text_bias)
        return _combined((v, t), self.trust, self.offset)


def fit_binary_teacher(visual: Tensor, text: Tensor, labels: Tensor, seed: int) -> BinaryPairTeacher:
    """Fit on the rows of `teacher_rows`: standardised ``visual`` (n, Dv), ``text`` (n, Dt), ``labels`` (n, K), rows of
    -1 unlabelled. Deterministic for a seed."""
    known = labelled_rows(labels)
    y = labels[known].to(visual.dtype)
    spaces = (visual, text)
    images, number = first_copies(visual[known]).unique(return_inverse=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(y.device)
    fold = (order % _FOLDS)[number]  # the rows of an image together
    found = [_held_out(x[known], y, fold) for x in spaces]
    trust, offset = _trust([logits for logits, _ in found], y)
    first = [fitted(x[known], y, l2) for x, (_, l2) in zip(spaces, found, strict=True)]
    soft = _combined([F.linear(x[~known], *c) for c, x in zip(first, spaces, strict=True)], trust, offset)
    targets = torch.cat((y, soft))
    second = [
        fitted(torch.cat((x[known], x[~known])), targets, REFIT_L2 * l2, start)
        for x, (_, l2), start in zip(spaces, found, first, strict=True)
    ]
    return BinaryPairTeacher(second[0], second[1], trust, offset)


def _combined(logits: Sequence[Tensor], trust: Tensor, offset: Tensor) -> Tensor:
    """Two of (B, K) -> probabilities (B, K)."""
    bounded = torch.stack([z.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT) for z in logits])
    return torch.sigmoid((trust[:, None] * bounded).sum(dim=0) + offset)


def _minimise(parameters: Sequence[Tensor], objective: Callable[[], Tensor]) -> None:
    optimiser = torch.optim.LBFGS(
        list(parameters), max_iter=50, line_search_fn="strong_wolfe", tolerance_grad=1e-5,
        history_size=history(parameters[0]),
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)


def fitted(features: Tensor, targets: Tensor, l2: float, start: Linear | None = None) -> Linear:
    """Minimise the mean over rows of the summed cross entropies to ``targets`` (N, K), plus ``l2 / 2 |weight|^2``."""
    if start is None:
        shape = (targets.shape[1], features.shape[1])
        start = Linear(features.new_zeros(shape), features.new_zeros(shape[0]))
    weight, bias = (value.clone().requires_grad_() for value in start)

    def objective() -> Tensor:
        entropy = F.binary_cross_entropy_with_logits(F.linear(features, weight, bias), targets, reduction="sum")
        return entropy / len(targets) + l2 / 2 * weight.square().sum()

    _minimise((weight, bias), objective)
    return Linear(weight.detach(), bias.detach())


def _held_out(features: Tensor, y: Tensor, fold: Tensor) -> tuple[Tensor, float]:
    """Logits (N, K) of rows by classifiers that did not see them, with the penalty that is best there."""
    goes_on = features.numel() * y.shape[1] >= MANY_PRODUCTS
    classifiers: dict[int, Linear] = {}
    best: tuple[float, Tensor, float] | None = None
    for l2 in L2_GRID:
        logits = torch.zeros_like(y)
        for k in range(_FOLDS):
            out = fold == k
            if out.any() and not out.all():
                classifiers[k] = fitted(features[~out], y[~out], l2, classifiers.get(k) if goes_on else None)
                logits[out] = F.linear(features[out], *classifiers[k])
        bounded = logits.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        loss = float(F.binary_cross_entropy_with_logits(bounded, y, reduction="sum"))
        if best is None or loss < best[0]:
            best = (loss, logits, l2)
        elif loss > 1.02 * best[0]:
            break  # weaker penalties overfit more
    assert best is not None
    return best[1], best[2]


def _trust(held_out: Sequence[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (2, K) >= 0 and offsets (K,) with which the held-out logits explain the labels best.

    They are drawn to 1 and 0: with few labels a classifier is not condemned by a few rows.
    """
    bounded = torch.stack([z.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT) for z in held_out]).double()
    trust = torch.ones(len(held_out), y.shape[1], dtype=torch.float64, device=y.device, requires_grad=True)
    offset = torch.zeros(y.shape[1], dtype=torch.float64, device=y.device, requires_grad=True)

    def objective() -> Tensor:
        logits = (trust[:, None] * bounded).sum(dim=0) + offset
        entropy = F.binary_cross_entropy_with_logits(logits, y.double(), reduction="sum")
        return entropy + (trust - 1).square().sum() + offset.square().sum()

    _minimise((trust, offset), objective)
    return trust.detach().clamp(min=0).to(y.dtype), offset.detach().to(y.dtype)
