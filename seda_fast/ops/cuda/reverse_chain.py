"""The reverse chain on CUDA as one launch (csrc/cuda/reverse_chain.h)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._cpp import rows, table
from .._cuda import RULES, implement_with_cuda
from ..reverse_chain import _reference

RULES["reverse_chain"] = (
    "bfloat16; width and hidden multiples of 64, width to 1024 (640 below 137 KiB of shared memory); features and "
    "condition multiples of 8; to 32 blocks; else PyTorch"
)


def _fits(initial: Tensor, condition: Tensor, coefficients: Tensor, w_x: Tensor, w_h: list[Tensor]) -> bool:
    sizes = (initial.shape[1], condition.shape[1], w_x.shape[0], w_h[0].shape[0], len(w_h), coefficients.shape[0])
    return bool(torch.ops.seda_fast_cuda.chain_fits(*sizes, initial.get_device()))


def _flat(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in arguments:
        yield from value if isinstance(value, (list, tuple)) else (value,)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor without gaps and from a multiple of 16 bytes on, as the copies to shared memory need it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _pairs(tensor: Tensor) -> Tensor:
    """The tensor with each row's elements side by side, from a multiple of 4 bytes on."""
    tensor = rows(tensor)
    return tensor if tensor.data_ptr() % 4 == 0 and tensor.stride(0) % 2 == 0 else _whole(tensor)


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
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    stream: int,
    noisy: bool,
) -> Tensor:
    """The op ``seda_fast::reverse_chain``; coefficients and modulation are read as float32."""
    operands = (initial, source, condition, coefficients, modulation)
    weights = (w_x, b_x, w_c, b_c, w_g, b_g, w_h, b_h, w_o, b_o, w_y, b_y)
    keys = (seed, step, sample_ids, stream, noisy)
    alike = all(t.dtype == torch.bfloat16 for t in _flat((*operands[:3], *weights)))
    if not alike or not _fits(initial, condition, coefficients, w_x, w_h):
        return _reference(*operands, *weights, *keys)
    return torch.ops.seda_fast_cuda.reverse_chain(  # type: ignore[no-any-return]
        *map(_pairs, operands[:3]),
        table(coefficients).contiguous(),
        table(modulation).contiguous(),
        *([_whole(t) for t in w] if isinstance(w, (list, tuple)) else _whole(w) for w in weights),
        seed,
        step,
        sample_ids.contiguous(),
        stream,
        noisy,
    )


implement_with_cuda("reverse_chain", reverse_chain)
