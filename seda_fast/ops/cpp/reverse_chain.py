"""The reverse chain on the CPU: one call of C++ (csrc/cpu/reverse_chain.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._cpp import contiguous, implement_with_cpp, rows, table
from ..reverse_chain import _reference


def reverse_chain(
    initial: Tensor,
    source: Tensor,
    condition: Tensor,
    coefficients: Tensor,
    modulation: Tensor,
    w_x: Tensor,
    b_x: Tensor,
    w_c: Tensor,
    b_c: Tensor,
    w_g: Tensor,
    b_g: Tensor,
    w_h: list[Tensor],
    b_h: list[Tensor],
    w_o: list[Tensor],
    b_o: list[Tensor],
    w_y: Tensor,
    b_y: Tensor,
    *counters: Any,
) -> Tensor:
    """The op ``seda_fast::reverse_chain``; biases, coefficients and modulation are read as float32."""
    return torch.ops.seda_fast_cpp.reverse_chain(  # type: ignore[no-any-return]
        rows(initial),
        rows(source),
        rows(condition),
        table(coefficients).contiguous(),
        table(modulation).contiguous(),
        w_x.contiguous(),
        table(b_x),
        w_c.contiguous(),
        table(b_c),
        w_g.contiguous(),
        table(b_g),
        contiguous(w_h),
        [table(bias) for bias in b_h],
        contiguous(w_o),
        [table(bias) for bias in b_o],
        w_y.contiguous(),
        table(b_y),
        *contiguous(counters),
    )


# Coefficients, which are few, and float32 whatever the model is, are read as such: they may differ.
implement_with_cpp("reverse_chain", reverse_chain, (0, 1, 2, *range(4, 17)), _reference)
