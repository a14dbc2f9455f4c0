"""Noising in CUDA C++ (csrc/cuda/noising.cu), where it is forced.

Triton's kernel serves otherwise: 65536 x 768 in bfloat16 took it 93 us on an H100, and this one 149 us.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._cpp import rows, table
from .._cuda import implement_with_cuda


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
    return torch.ops.seda_fast_cuda.q_sample(  # type: ignore[no-any-return]
        rows(x0),
        timesteps.contiguous(),
        table(signal).contiguous(),
        table(noise).contiguous(),
        seed,
        step,
        sample_ids.contiguous(),
        stream,
    )


def q_sample_backward(grad: Tensor, timesteps: Tensor, signal: Tensor) -> Tensor:
    """The op ``seda_fast::q_sample_backward``."""
    return torch.ops.seda_fast_cuda.q_sample_backward(  # type: ignore[no-any-return]
        rows(grad), timesteps.contiguous(), table(signal).contiguous()
    )


implement_with_cuda("q_sample", q_sample)
implement_with_cuda("q_sample_backward", q_sample_backward)
