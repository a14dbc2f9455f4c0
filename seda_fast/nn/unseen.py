"""Classes that no text shows: a classifier of texts that has never seen them gives them nothing, which says nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def classes_without_pairs(labels: Tensor, paired: Tensor, n_classes: int) -> Tensor | None:
    """Numbers of the classes that labelled rows have and no labelled row with text has, int64; None where none are.

    ``labels`` (N,) int64, -1 unlabelled, or (N, K) multi-label; ``paired`` (N,) bool.
    """
    if labels.ndim == 2:
        carried = labels > 0
        lone = carried.any(dim=0) & ~(carried & paired[:, None]).any(dim=0)
    else:
        known = labels >= 0
        every, told = (torch.bincount(labels[rows], minlength=n_classes) for rows in (known, known & paired))
        lone = (every > 0) & (told == 0)
    return lone.nonzero()[:, 0] if lone.any() else None


def beyond_the_seen(textual: Tensor, others: Tensor, unseen: Tensor) -> Tensor:
    """Log-probabilities (B, K) of a classifier that has not seen the classes ``unseen`` (K,) bool.

    Of these ``others`` (B, K), normalised, tell; among the rest, which have what is left to them, ``textual`` tells.
    """
    share = others.masked_fill(unseen, -math.inf).logsumexp(dim=1, keepdim=True)
    return torch.where(unseen, others, textual.masked_fill(unseen, -math.inf).log_softmax(dim=1) + share)
