"""The reverse chain on CUDA as one launch (csrc/cuda/reverse_chain.h)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _cpp
from .._cpp import rows, table
from .._cuda import implement_with_cuda
from .._dispatch import fallback, forced

_RULE = (
    "bfloat16; width and hidden multiples of 64, width to 1024 (640 below 122 KiB of shared memory); features and "
    "condition multiples of 8; to 32 blocks; by itself on compute capability 9.0, to 128 rows that can be split "
    "over all processors; else Triton or PyTorch"
)
# Most rows that go to a kernel by themselves.
_FEW_ROWS = 128


@functools.cache
def _fits(dim: int, condition: int, width: int, hidden: int, blocks: int, steps: int, device: int) -> bool:
    return bool(torch.ops.seda_fast_cuda.chain_fits(dim, condition, width, hidden, blocks, steps, device))


@functools.cache
def _splits(sizes: tuple[int, ...], rows: int, device: int) -> bool:
    """Whether so many rows are given to the kernel that was measured; the others read all weights through each of a few
    processors, as where rows are too wide for its shared memory or what it exchanges in many steps is too much."""
    return bool(torch.ops.seda_fast_cuda.chain_splits(*sizes, rows, device))


@functools.cache
def _measured(device: int) -> bool:
    """Whether a device is of the only kind that the kernels were measured on, and their code for it was built."""
    built = _cpp.report().get("cuda", {}).get("architectures", ())
    return torch.cuda.get_device_capability(device) == (9, 0) and "90a" in built


def _measured_here() -> bool:
    return any(_measured(device) for device in range(torch.cuda.device_count()))


def _faster(initial: Tensor, sizes: tuple[int, ...]) -> bool:
    """Whether the kernels are taken by themselves: where they were measured to be at least a tenth faster than any
    other code of ours, on any host.

    One stage of five steps on an H200 (width 512, three blocks, 768 features) as called, in ms, beside Triton's passes
    between cuBLAS's products: 0.46 and 3.0 for one row, 0.91 and 5.4 for 128, and for more, which other kernels take,
    20.8 (on an H100) and 8.6 for 65 536. Between them the host's launches are waited for, and 3.5 stands against 4.3
    to 5.7 until some 8000 rows; but a quicker host is nearer to a CUDA graph, where it is 3.0 against 0.3 to 1.1. In a
    graph few rows are fewer: 0.15 and 0.28 for one (0.13 on an H100, 0.22 for 16), 0.34 and 0.28 for 64. The bound is
    the same there all the same: what is captured must be what was run before to warm up, whose first launches load code
    and tables as a capture does not allow, and it gives the same bits.
    """
    rows, device = initial.shape[0], initial.get_device()
    return _measured(device) and rows <= _FEW_ROWS and _splits(sizes, rows, device)


def _flat(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in arguments:
        yield from value if isinstance(value, (list, tuple)) else (value,)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor without gaps and from a multiple of 16 bytes on, as 16-byte reads need it."""
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
    sizes = (initial.shape[1], condition.shape[1], w_x.shape[0], w_h[0].shape[0], len(w_h), coefficients.shape[0])
    wanted = forced() == "cuda" or _faster(initial, sizes)
    if not alike or not wanted or not _fits(*sizes, initial.get_device()):
        otherwise = fallback("reverse_chain", "cuda", ("triton",), initial.dtype)
        return otherwise(*operands, *weights, *keys)  # type: ignore[no-any-return]
    return torch.ops.seda_fast_cuda.reverse_chain(  # type: ignore[no-any-return]
        *map(_pairs, operands[:3]),
        table(coefficients).contiguous(),
        _whole(table(modulation)),
        *([_whole(t) for t in w] if isinstance(w, (list, tuple)) else _whole(w) for w in weights),
        seed,
        step,
        sample_ids.contiguous(),
        stream,
        noisy,
    )


implement_with_cuda("reverse_chain", reverse_chain, _RULE, (torch.bfloat16,), _measured_here)
