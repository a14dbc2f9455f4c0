"""Interaction on the CPU: element-wise parts in C++ (csrc/cpu/interaction.cpp), products by `_cpp.product`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference
from .._cpp import contiguous, implement_with_cpp, product, rows, table
from ..interaction import _reference, _reference_backward


def interaction_block(
    h: Tensor,
    gate: Tensor,
    timesteps: Tensor,
    shift: Tensor,
    scale: Tensor,
    alpha: Tensor,
    w_h: Tensor,
    b_h: Tensor,
    w_o: Tensor,
    b_o: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """The op ``seda_fast::interaction_block``."""
    *dropout, _, leave_statistics = rest
    cpp = torch.ops.seda_fast_cpp
    h, gate = rows(h), rows(gate)
    z = cpp.modulated_norm(h, timesteps, table(shift), table(scale))
    pre = product(z, w_h.t(), b_h)
    hidden = cpp.gated_silu(pre, gate, *contiguous(dropout))
    residual = product(hidden, w_o.t(), b_o)
    h_next = cpp.gated_residual(h, residual, timesteps, table(alpha))
    # Statistics save a pass only where a norm reads its rows tile by tile; here they are made for who asks.
    left = reference.row_statistics(h_next) if leave_statistics else h.new_empty((0,), dtype=torch.float32)
    return h_next, residual, pre, hidden, left


def interaction_block_backward(
    grad: Tensor,
    h: Tensor,
    gate: Tensor,
    timesteps: Tensor,
    shift: Tensor,
    scale: Tensor,
    alpha: Tensor,
    w_h: Tensor,
    w_o: Tensor,
    residual: Tensor,
    pre: Tensor,
    hidden: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """The op ``seda_fast::interaction_block_backward``; the dropout's mask is drawn again, not kept."""
    *dropout, _ = rest
    cpp, dtype = torch.ops.seda_fast_cpp, h.dtype
    grad, h, gate, residual, pre = (rows(t) for t in (grad, h, gate, residual, pre))
    shift, scale, alpha = table(shift), table(scale), table(alpha)
    d_residual, d_alpha, d_b_o = cpp.gated_residual_backward(grad, residual, timesteps, alpha)
    d_pre = product(d_residual, w_o)
    d_gate, d_b_h = cpp.gated_silu_backward(d_pre, pre, gate, *contiguous(dropout))
    d_h, d_shift, d_scale = cpp.modulated_norm_backward(grad, product(d_pre, w_h), h, timesteps, scale)
    d_w_h = product(d_pre.t(), cpp.modulated_norm(h, timesteps, shift, scale))
    d_w_o = product(d_residual.t(), hidden)
    sums = (t.to(dtype) for t in (d_shift, d_scale, d_alpha))
    return d_h, d_gate, *sums, d_w_h, d_b_h.to(dtype), d_w_o, d_b_o.to(dtype)


implement_with_cpp("interaction_block", interaction_block, slice(10), _reference)
implement_with_cpp("interaction_block_backward", interaction_block_backward, slice(12), _reference_backward)
