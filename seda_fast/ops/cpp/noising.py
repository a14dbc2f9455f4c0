"""Noising on the CPU in C++ (csrc/cpu/noising.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import reference
from .._cpp import implement_with_cpp, rows, table
from ..noising import _reference


def q_sample(
    x0: Tensor,
    timesteps: Tensor,
    signal: Tensor,
    noise: Tensor,
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    stream: int,
) -> Tensor:
    """The op ``seda_fast::q_sample``; tables are read as float32."""
    return torch.ops.seda_fast_cpp.q_sample(  # type: ignore[no-any-return]
        rows(x0), timesteps, table(signal), table(noise), seed, step, sample_ids.contiguous(), stream
    )


def q_sample_backward(grad: Tensor, timesteps: Tensor, signal: Tensor) -> Tensor:
    """The op ``seda_fast::q_sample_backward``."""
    return torch.ops.seda_fast_cpp.q_sample_backward(  # type: ignore[no-any-return]
        rows(grad), timesteps, table(signal)
    )


implement_with_cpp("q_sample", q_sample, slice(1), _reference)
implement_with_cpp("q_sample_backward", q_sample_backward, slice(1), reference.q_sample_backward)
