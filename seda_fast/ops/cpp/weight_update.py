"""The optimiser's step on the CPU: one pass in C++ (csrc/cpu/weight_update.cpp), float32 alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference
from .._cpp import implement_with_cpp
from ..weight_update import _reference


def gradient_norm(grads: list[Tensor]) -> Tensor:
    """The op ``seda_fast::gradient_norm``."""
    return torch.ops.seda_fast_cpp.gradient_norm([g.contiguous() for g in grads])  # type: ignore[no-any-return]


def weight_update(weights: list[Tensor], grads: list[Tensor], *rest: Any) -> None:
    """The op ``seda_fast::weight_update``; what it changes and is not contiguous goes to the reference."""
    if all(t.is_contiguous() for tensors in (weights, *rest[:3]) for t in tensors):
        torch.ops.seda_fast_cpp.weight_update(weights, [g.contiguous() for g in grads], *rest)
    else:
        _reference(weights, grads, *rest)


implement_with_cpp("gradient_norm", gradient_norm, slice(1), reference.gradient_norm, (torch.float32,))
implement_with_cpp("weight_update", weight_update, slice(7), _reference, (torch.float32,))
