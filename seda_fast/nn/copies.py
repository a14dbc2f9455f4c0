"""Rows of the same image, as where an image has several captions: what is asked of one, no other must answer."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_TOGETHER = 512
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _mixed(bits: Tensor) -> Tensor:
    """int64 whose every bit depends on all bits given (the end of splitmix64, Steele, Lea & Flood 2014): a factor alone
    carries upwards only, and numbers that differ in their sign would share their keys."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits = (bits ^ (bits >> shift)) * factor
    return bits ^ (bits >> 31)


def first_copies(features: Tensor) -> Tensor:
    """Number of the first row that equals each, floating (N, D) -> int64 (N,); its own where there is none before it.

    Rows are told apart by 64 bits each, and compared where these agree: sorting them would copy them all.
    """
    own = torch.arange(len(features), device=features.device)
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randint(-(2**62), 2**62, features.shape[1:], generator=generator, device="cpu")
    mixed, keys = mixed.to(features.device), own.new_empty(len(features))
    for kept, block in zip(keys.split(_ROWS_TOGETHER), features.split(_ROWS_TOGETHER), strict=True):
        bits = (block + 0).contiguous().view(_BITS[features.element_size()])  # + 0: -0 and 0 are one
        kept.copy_(_mixed(bits.long() + mixed).sum(dim=1))
    number = keys.unique(return_inverse=True)[1]
    first = own.new_full((len(own),), len(own)).scatter_reduce_(0, number, own, "amin")[number]
    for rows in (first != own).nonzero()[:, 0].split(_ROWS_TOGETHER):
        equal = (features[rows] == features[first[rows]]).all(dim=1)
        first[rows] = torch.where(equal, first[rows], rows)
    return first
