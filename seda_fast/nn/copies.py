"""Rows of the same image, as where an image has several captions: what one of them is asked, another must not answer."""

from __future__ import annotations

import torch
from torch import Tensor


def first_copies(features: Tensor) -> Tensor:
    """Number of the first row that equals each, (N, D) -> int64 (N,); its own where there is none before it."""
    number = torch.unique(features, dim=0, return_inverse=True)[1]
    first = number.new_full((len(number),), len(number))
    first.scatter_reduce_(0, number, torch.arange(len(number), device=number.device), "amin")
    return first[number]
