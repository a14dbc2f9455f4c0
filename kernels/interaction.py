"""One PFIN block: three kernels forward, four for a network's first block; backward four products and four small ones.

    z  = n(h) * (1 + scale[tau]) + shift[tau]
    u  = silu(z @ w_h.T + b_h) * gate, then dropout
    h' = h + (1 + alpha[tau]) * (u @ w_o.T + b_o)

Every pointer's features are contiguous; rows lie ``*_stride`` elements apart. Products accumulate in float32. A
timestep outside the tables makes its row NaN.

``z``, and backward ``(1 + alpha) * grad``, are written once and read by the products as they are. Made on the way into
a product they would be made anew for every 128 of its columns, the tables' rows read each time: of 16 384 rows, 512
wide, in half precision the products' tiles read 2.7 GB that way and 1.9 GB this way, for 0.2 GB of passes over rows.

So the forward is not the two kernels that the algebra allows, with the norm as the first product's prologue. It is the
modulated norm and the two products, and before them a network's first block, which has no statistics from a block
before it, makes its own. Counted for those sizes: as a prologue the first product's tiles would read h, shift and scale
for each of 8 column tiles, 0.40 GB, against 0.13 GB of z; the norm's own pass reads and writes 0.07 GB, of which h and
z, 34 MB, go to memory, and is one launch more. These are counts of bytes: which of the two is faster has not been
measured on a GPU.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox, tuning
from .tuning import Tile, launching_on

NORM_EPS = tl.constexpr(1e-5)
# Columns for which one mean and one centred sum of squares stand in the row statistics.
GROUP = 128
_GROUP = tl.constexpr(GROUP)
# Rows that a program of the norm's backward holds, and its warps: with 512 features 8 values a thread for each of six
# tiles, which take 128 registers, so that 16 warps fit a multiprocessor.
NORM_ROWS, NORM_WARPS = 4, 8
# Tile of the kernels that only pass over rows: 16 values a thread.
ELEMENTWISE = {"BLOCK_M": 8, "BLOCK_N": 256}
# Rows of a program that looks for the bounds of timesteps, and entries of one that adds up splits.
SEGMENT_ROWS, SUMS = 1024, 1024


# ---------------------------------------------------------------------------------------------------------------------
# Tiles


@triton.jit
def _tile(ptr, row, rows, column, columns, stride):
    """A float32 tile of a matrix, 0 outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put(ptr, tile, row, rows, column, columns):
    """Store a tile into a contiguous matrix."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = ptr + row[:, None] * tl.cast(columns, tl.int64) + column[None, :]
    tl.store(place, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _timesteps(timesteps_ptr, row, rows, steps):
    """The rows' timesteps, int64; ``steps`` stands for one outside the tables."""
    tau = tl.load(timesteps_ptr + row, mask=row < rows, other=0).to(tl.int64)
    return tl.where((tau >= 0) & (tau < steps), tau, steps)


@triton.jit
def _modulation(ptr, tau, steps, column, columns, stride):
    """Rows ``tau`` of a table, float32; NaN for a timestep outside it."""
    inside = (column < columns)[None, :] & (tau < steps)[:, None]
    other = tl.where(tau < steps, 0.0, float("nan"))[:, None]
    values = tl.load(ptr + tau[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return values + other


@triton.jit
def _mean_rstd(statistics_ptr, row, rows, width, GROUPS: tl.constexpr):
    """Mean and reciprocal deviation of whole rows from those of their groups of columns (Chan et al. 1979)."""
    group = tl.arange(0, GROUPS)
    count = tl.minimum(tl.maximum(width - group * _GROUP, 0), _GROUP).to(tl.float32)[None, :]
    groups = (width + _GROUP - 1) // _GROUP
    inside = (row < rows)[:, None] & (group < groups)[None, :]
    place = statistics_ptr + (row[:, None] * groups + group[None, :]) * 2
    means = tl.load(place, mask=inside, other=0.0)
    squares = tl.load(place + 1, mask=inside, other=0.0)
    mean = tl.sum(means * count, axis=1) / width
    away = means - mean[:, None]
    variance = tl.sum(squares + count * away * away, axis=1) / width
    return mean, tl.rsqrt(variance + NORM_EPS)


@triton.jit
def _put_statistics(ptr, tile, row, rows, column, width):
    """Leave the statistics of a (rows, 128) tile whose columns are one group; ``tile`` as it was stored."""
    inside = (column < width)[None, :]
    count = tl.minimum(width - tl.min(column, axis=0), _GROUP).to(tl.float32)
    mean = tl.sum(tl.where(inside, tile, 0.0), axis=1) / count
    away = tl.where(inside, tile - mean[:, None], 0.0)
    place = ptr + (row * ((width + _GROUP - 1) // _GROUP) + tl.min(column, axis=0) // _GROUP) * 2
    tl.store(place, mean, mask=row < rows)
    tl.store(place + 1, tl.sum(away * away, axis=1), mask=row < rows)


@triton.jit
def _kept(seed_ptr, step_ptr, ids_ptr, row, rows, first, stream, threshold, kept_scale, WIDTH: tl.constexpr):
    """Dropout's factor for WIDTH features from ``first``: 0 or ``1 / (1 - rate)``."""
    ids = tl.load(ids_ptr + row, mask=row < rows, other=0)
    kept = philox.kept(seed_ptr, step_ptr, ids[:, None], first, stream, threshold, WIDTH)
    return kept.to(tl.float32) * tl.cast(kept_scale, tl.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@triton.jit
def statistics_kernel(h_ptr, statistics_ptr, rows, width, h_stride, BLOCK_M: tl.constexpr):
    """Row statistics of ``h``, for a block that no other block precedes."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * _GROUP + tl.arange(0, _GROUP)
    h = _tile(h_ptr, row, rows, column, width, h_stride)
    _put_statistics(statistics_ptr, h, row, rows, column, width)


# fmt: off
@triton.jit
def modulated_norm_kernel(
    h_ptr, timesteps_ptr, shift_ptr, scale_ptr, statistics_ptr, z_ptr,
    rows, width, steps, h_stride, shift_stride, scale_stride,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """``z = n(h) * (1 + scale) + shift``, what the first product reads."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tau = _timesteps(timesteps_ptr, row, rows, steps)
    mean, rstd = _mean_rstd(statistics_ptr, row, rows, width, GROUPS)
    h = _tile(h_ptr, row, rows, column, width, h_stride)
    shift = _modulation(shift_ptr, tau, steps, column, width, shift_stride)
    scale = _modulation(scale_ptr, tau, steps, column, width, scale_stride)
    _put(z_ptr, (h - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift, row, rows, column, width)


# fmt: off
@triton.jit
def gated_product_kernel(
    z_ptr, gate_ptr, w_ptr, b_ptr, pre_ptr, hidden_ptr, seed_ptr, step_ptr, ids_ptr, stream, threshold, kept_scale,
    rows, width, hidden, gate_stride, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """``pre = z @ w_h.T + b_h`` and ``hidden = dropout(silu(pre) * gate)``."""
    # Programs of one row block run side by side: z stays in the L2 cache, the weights fit it anyway.
    blocks = tl.cdiv(hidden, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) % blocks) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        feature = start + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (feature < width)[None, :]
        z = tl.load(z_ptr + row[:, None] * width + feature[None, :], mask=inside, other=0.0)
        inside = (feature < width)[:, None] & (column < hidden)[None, :]
        w = tl.load(w_ptr + column[None, :].to(tl.int64) * width + feature[:, None], mask=inside, other=0.0)
        acc = tl.dot(z, w.to(z.dtype), acc, input_precision=PRECISION)
    pre = acc + tl.load(b_ptr + column, mask=column < hidden, other=0.0).to(tl.float32)[None, :]
    _put(pre_ptr, pre, row, rows, column, hidden)
    u = pre * tl.sigmoid(pre) * _tile(gate_ptr, row, rows, column, hidden, gate_stride)
    if DROPOUT:
        u *= _kept(seed_ptr, step_ptr, ids_ptr, row, rows, first, stream, threshold, kept_scale, BLOCK_N)
    _put(hidden_ptr, u, row, rows, column, hidden)


# fmt: off
@triton.jit
def residual_product_kernel(
    hidden_ptr, h_ptr, timesteps_ptr, alpha_ptr, w_ptr, b_ptr, h_next_ptr, residual_ptr, statistics_ptr,
    rows, width, hidden, steps, h_stride, alpha_stride,
    STATISTICS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """``residual = hidden @ w_o.T + b_o``, ``h_next = h + (1 + alpha) * residual``, and h_next's row statistics."""
    blocks = tl.cdiv(width, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, hidden, BLOCK_K):
        feature = start + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (feature < hidden)[None, :]
        u = tl.load(hidden_ptr + row[:, None] * hidden + feature[None, :], mask=inside, other=0.0)
        inside = (feature < hidden)[:, None] & (column < width)[None, :]
        w = tl.load(w_ptr + column[None, :].to(tl.int64) * hidden + feature[:, None], mask=inside, other=0.0)
        acc = tl.dot(u, w.to(u.dtype), acc, input_precision=PRECISION)
    residual = acc + tl.load(b_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tau = _timesteps(timesteps_ptr, row, rows, steps)
    alpha = _modulation(alpha_ptr, tau, steps, column, width, alpha_stride)
    h_next = _tile(h_ptr, row, rows, column, width, h_stride) + (1.0 + alpha) * residual
    h_next = h_next.to(h_next_ptr.dtype.element_ty)
    _put(residual_ptr, residual, row, rows, column, width)
    _put(h_next_ptr, h_next, row, rows, column, width)
    if STATISTICS:
        _put_statistics(statistics_ptr, h_next.to(tl.float32), row, rows, column, width)


# ---------------------------------------------------------------------------------------------------------------------
# Backward


# fmt: off
@triton.jit
def operands_kernel(
    grad_ptr, h_ptr, timesteps_ptr, shift_ptr, scale_ptr, alpha_ptr, statistics_ptr, grad_residual_ptr, z_ptr,
    grad_h_ptr, rows, width, steps, grad_stride, h_stride, shift_stride, scale_stride, alpha_stride,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """What the products of the backward read: ``(1 + alpha) * grad``, and z again as the forward had it.

    Rows of a timestep outside the tables, which no program of `norm_backward_kernel` meets, get their NaN here.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tau = _timesteps(timesteps_ptr, row, rows, steps)
    grad = _tile(grad_ptr, row, rows, column, width, grad_stride)
    alpha = _modulation(alpha_ptr, tau, steps, column, width, alpha_stride)
    _put(grad_residual_ptr, (1.0 + alpha) * grad, row, rows, column, width)
    nowhere = tl.full((BLOCK_M, BLOCK_N), float("nan"), dtype=tl.float32)
    _put(grad_h_ptr, nowhere, row, tl.where(tau == steps, rows, 0), column, width)
    mean, rstd = _mean_rstd(statistics_ptr, row, rows, width, GROUPS)
    h = _tile(h_ptr, row, rows, column, width, h_stride)
    shift = _modulation(shift_ptr, tau, steps, column, width, shift_stride)
    scale = _modulation(scale_ptr, tau, steps, column, width, scale_stride)
    _put(z_ptr, (h - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift, row, rows, column, width)


# fmt: off
@triton.jit
def gate_backward_kernel(
    grad_ptr, gate_ptr, pre_ptr, w_ptr, grad_gate_ptr, grad_pre_ptr,
    seed_ptr, step_ptr, ids_ptr, stream, threshold, kept_scale,
    rows, width, hidden, gate_stride, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """Gradients of the gate and of ``pre`` from ``grad @ w_o``; silu and dropout are made again."""
    blocks = tl.cdiv(hidden, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) % blocks) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        feature = start + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (feature < width)[None, :]
        grad = tl.load(grad_ptr + row[:, None] * width + feature[None, :], mask=inside, other=0.0)
        inside = (feature < width)[:, None] & (column < hidden)[None, :]
        w = tl.load(w_ptr + feature[:, None].to(tl.int64) * hidden + column[None, :], mask=inside, other=0.0)
        acc = tl.dot(grad, w.to(grad.dtype), acc, input_precision=PRECISION)
    if DROPOUT:
        acc *= _kept(seed_ptr, step_ptr, ids_ptr, row, rows, first, stream, threshold, kept_scale, BLOCK_N)
    pre = _tile(pre_ptr, row, rows, column, hidden, tl.cast(hidden, tl.int64))
    sigmoid = tl.sigmoid(pre)
    acc *= sigmoid
    _put(grad_gate_ptr, acc * pre, row, rows, column, hidden)
    # Loaded after the store: all of it at once takes more registers.
    acc *= 1.0 + pre * (1.0 - sigmoid)
    _put(grad_pre_ptr, acc * _tile(gate_ptr, row, rows, column, hidden, gate_stride), row, rows, column, hidden)


# fmt: off
@triton.jit
def input_gradient_kernel(
    grad_ptr, w_ptr, out_ptr, rows, width, hidden, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """``out = grad @ w``, the gradient of z: (rows, hidden) @ (hidden, width)."""
    blocks = tl.cdiv(width, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, hidden, BLOCK_K):
        feature = start + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (feature < hidden)[None, :]
        grad = tl.load(grad_ptr + row[:, None] * hidden + feature[None, :], mask=inside, other=0.0)
        inside = (feature < hidden)[:, None] & (column < width)[None, :]
        w = tl.load(w_ptr + feature[:, None].to(tl.int64) * width + column[None, :], mask=inside, other=0.0)
        acc = tl.dot(grad, w.to(grad.dtype), acc, input_precision=PRECISION)
    _put(out_ptr, acc, row, rows, column, width)


@triton.jit
def segments_kernel(timesteps_ptr, bounds_ptr, falls_ptr, rows, steps, BLOCK: tl.constexpr):
    """Of a batch sorted by timestep, how many rows have one below each of 0 .. ``steps``; and where it is not sorted.

    Each row fills the entries behind the timestep before it, up to its own: one pass over the rows, side by side.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(timesteps_ptr + row - 1, mask=(row > 0) & (row <= rows), other=-1).to(tl.int64)
    # Behind the last row all further entries are left.
    own = tl.load(timesteps_ptr + row, mask=row < rows, other=0).to(tl.int64)
    own = tl.where(row < rows, own, steps)
    fall = tl.max(((before > own) & (row < rows)).to(tl.int32), axis=0)
    tl.store(falls_ptr + tl.program_id(0), fall)
    entry = tl.maximum(before, -1) + 1
    # Of a batch that is not sorted nobody reads the bounds.
    last = tl.where((row <= rows) & (fall == 0), tl.minimum(own, steps), -1)
    while tl.max(last - entry, axis=0) >= 0:
        tl.store(bounds_ptr + entry, row, mask=entry <= last)
        entry += 1


@triton.jit
def _segment(bounds_ptr, falls_ptr, step, rows, blocks, BLOCK: tl.constexpr):
    """Where the rows of timestep ``step`` begin and end; from 0 to ``rows`` where they may lie anywhere."""
    falls = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        falls |= tl.load(falls_ptr + block, mask=block < blocks, other=0)
    unsorted = tl.max(falls, axis=0) != 0
    # Bounds of an unsorted batch were never written.
    first = tl.load(bounds_ptr + step, mask=unsorted == 0, other=0)
    return first, tl.where(unsorted, rows, tl.load(bounds_ptr + step + 1, mask=unsorted == 0, other=0))


# fmt: off
@triton.jit
def norm_backward_kernel(
    grad_ptr, grad_z_ptr, h_ptr, residual_ptr, statistics_ptr, timesteps_ptr, bounds_ptr, falls_ptr, scale_ptr,
    grad_h_ptr, grad_shift_ptr, grad_scale_ptr, grad_alpha_ptr,
    rows, width, blocks, grad_stride, h_stride, scale_stride,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """The norm's backward, and the tables' gradients: a program goes through one timestep's rows in their order."""
    step = tl.program_id(0)
    column = tl.arange(0, BLOCK_N)
    here = (column < width)[None, :]
    own_scale = scale_ptr + tl.cast(step, tl.int64) * scale_stride
    scale = 1.0 + tl.load(own_scale + column, mask=column < width, other=0.0).to(tl.float32)
    shift_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    scale_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    alpha_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first, last = _segment(bounds_ptr, falls_ptr, step, rows, blocks, 128)
    for start in range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M).to(tl.int64)
        own = row < last
        own &= tl.load(timesteps_ptr + row, mask=own, other=-1).to(tl.int64) == step
        if tl.max(own.to(tl.int32), axis=0) != 0:
            # A row of another timestep counts as outside.
            row = tl.where(own, row, rows)
            mean, rstd = _mean_rstd(statistics_ptr, row, rows, width, GROUPS)
            normed = (_tile(h_ptr, row, rows, column, width, h_stride) - mean[:, None]) * rstd[:, None]
            normed = tl.where(here & own[:, None], normed, 0.0)
            grad = _tile(grad_ptr, row, rows, column, width, grad_stride)
            grad_z = _tile(grad_z_ptr, row, rows, column, width, tl.cast(width, tl.int64))
            alpha_sum += grad * _tile(residual_ptr, row, rows, column, width, tl.cast(width, tl.int64))
            shift_sum += grad_z
            scale_sum += grad_z * normed
            inner = grad_z * scale[None, :]
            mean_inner = tl.sum(inner, axis=1) / width
            mean_product = tl.sum(inner * normed, axis=1) / width
            grad += rstd[:, None] * (inner - mean_inner[:, None] - normed * mean_product[:, None])
            _put(grad_h_ptr, grad, row, rows, column, width)
    place = tl.cast(step, tl.int64) * width + column
    element = grad_shift_ptr.dtype.element_ty
    tl.store(grad_shift_ptr + place, tl.sum(shift_sum, axis=0).to(element), mask=column < width)
    tl.store(grad_scale_ptr + place, tl.sum(scale_sum, axis=0).to(element), mask=column < width)
    tl.store(grad_alpha_ptr + place, tl.sum(alpha_sum, axis=0).to(element), mask=column < width)


# fmt: off
@triton.jit
def weight_gradient_kernel(
    grad_ptr, input_ptr, weight_ptr, bias_ptr, rows, outputs, inputs, input_stride, rows_per_split,
    ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """Over one split of the rows ``grad.T @ input`` (outputs, inputs) and grad's columns, float32; ``ADD``: to what is
    there."""
    out = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    into = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    bias = tl.zeros((BLOCK_M,), dtype=tl.float32)
    end = tl.minimum(rows, (split + 1) * rows_per_split)
    for start in range(split * rows_per_split, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = (row < end)[:, None] & (out < outputs)[None, :]
        grad = tl.load(grad_ptr + row[:, None] * outputs + out[None, :], mask=inside, other=0.0)
        inside = (row < end)[:, None] & (into < inputs)[None, :]
        x = tl.load(input_ptr + row[:, None] * input_stride + into[None, :], mask=inside, other=0.0)
        bias += tl.sum(grad.to(tl.float32), axis=0)
        acc = tl.dot(tl.trans(grad), x.to(grad.dtype), acc, input_precision=PRECISION)
    inside = (out < outputs)[:, None] & (into < inputs)[None, :]
    place = weight_ptr + (split.to(tl.int64) * outputs + out[:, None]) * inputs + into[None, :]
    bias_place = bias_ptr + split * outputs + out
    if ADD:
        acc += tl.load(place, mask=inside, other=0.0)
    tl.store(place, acc, mask=inside)
    if tl.program_id(1) == 0:
        if ADD:
            bias += tl.load(bias_place, mask=out < outputs, other=0.0)
        tl.store(bias_place, bias, mask=out < outputs)


@triton.jit
def _put_sums(sums_ptr, out_ptr, first, splits, entries, count, factor, BLOCK: tl.constexpr):
    """``factor`` times the sum over the splits, one after the other, of entries ``first ..``, those below ``count``."""
    place = tl.cast(first, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(sums_ptr + tl.cast(split, tl.int64) * entries + place, mask=place < count, other=0.0)
    tl.store(out_ptr + place, (total * factor).to(out_ptr.dtype.element_ty), mask=place < count)


# fmt: off
@triton.jit
def split_sums_kernel(
    weight_sums_ptr, bias_sums_ptr, factor_ptr, weight_ptr, bias_ptr, splits, outputs, inputs, kept,
    SCALED: tl.constexpr, BLOCK: tl.constexpr,
):
    # fmt: on
    """A weight's and its bias's gradient from `weight_gradient_kernel`: the first ``kept`` of the outputs, cast."""
    factor = tl.load(factor_ptr) if SCALED else 1.0
    inputs = tl.cast(inputs, tl.int64)
    blocks = tl.cdiv(kept * inputs, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    if program < blocks:
        _put_sums(weight_sums_ptr, weight_ptr, program, splits, outputs * inputs, kept * inputs, factor, BLOCK)
    else:
        _put_sums(bias_sums_ptr, bias_ptr, program - blocks, splits, outputs, kept, factor, BLOCK)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as PyTorch's own products on a GPU are, "tf32" or "ieee"."""
    return "tf32" if dtype == torch.float32 and tf32_products() else "ieee"


def tf32_products() -> bool:
    """Whether PyTorch multiplies float32 matrices on a GPU in TF32.

    `torch.backends.cuda.matmul.fp32_precision` knows, however it was said; the older getter refuses to answer where
    that newer switch was used. It stands alone where the newer one says "none" or does not exist.
    """
    said = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    return said == "tf32" if said != "none" else torch.get_float32_matmul_precision() != "highest"


def by_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its features are contiguous and its rows do not overlap in one, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _dropout(rate: float, seed: Tensor, step: Tensor, sample_ids: Tensor, stream: int) -> tuple[object, ...]:
    threshold = math.ceil(rate * 2**24 - 0.5)
    return seed, step, sample_ids.contiguous(), stream, threshold, 1 / (1 - rate)


def _groups(width: int) -> int:
    return triton.next_power_of_2(triton.cdiv(width, GROUP))


def _elementwise(rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(rows, ELEMENTWISE["BLOCK_M"]), triton.cdiv(width, ELEMENTWISE["BLOCK_N"])


def row_statistics(h: Tensor) -> Tensor:
    """Mean and centred sum of squares of each 128 columns of each row: float32 (B, ceil(d/128), 2)."""
    rows, width = h.shape
    groups = triton.cdiv(width, GROUP)
    statistics = torch.empty((rows, groups, 2), dtype=torch.float32, device=h.device)
    statistics_kernel[triton.cdiv(rows, 32), groups](h, statistics, rows, width, h.stride(0), BLOCK_M=32)
    return statistics


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
    dropout: float,
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    stream: int,
    statistics: Tensor | None,
    leave_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The block's result, the second product, the first product, the gated activation, the result's statistics."""
    (rows, width), hidden, steps = h.shape, gate.shape[1], shift.shape[0]
    h, gate, shift, scale, alpha = map(by_rows, (h, gate, shift, scale, alpha))
    h_next, residual = (torch.empty((rows, width), dtype=h.dtype, device=h.device) for _ in range(2))
    pre, u = (torch.empty((rows, hidden), dtype=h.dtype, device=h.device) for _ in range(2))
    left_shape = (rows, triton.cdiv(width, GROUP), 2) if leave_statistics else (0,)
    left = torch.empty(left_shape, dtype=torch.float32, device=h.device)
    if rows == 0:
        return h_next, residual, pre, u, left
    timesteps, exact = timesteps.contiguous(), precision(h.dtype)
    keys = _dropout(dropout, seed, step, sample_ids, stream)
    with launching_on(h):
        statistics = row_statistics(h) if statistics is None else statistics.float().contiguous()
        z = torch.empty((rows, width), dtype=h.dtype, device=h.device)
        modulated_norm_kernel[_elementwise(rows, width)](
            h, timesteps, shift, scale, statistics, z,
            rows, width, steps, h.stride(0), shift.stride(0), scale.stride(0), GROUPS=_groups(width), **ELEMENTWISE,
        )  # fmt: skip
        _product(
            gated_product_kernel, (rows, hidden, width), tuning.candidates(h.dtype, epilogue=True), h,
            z, gate, w_h.contiguous(), b_h.contiguous(), pre, u, *keys, rows, width, hidden, gate.stride(0),
            DROPOUT=dropout > 0, PRECISION=exact,
        )  # fmt: skip
        plain = tuning.candidates(h.dtype, columns=GROUP if leave_statistics else None)
        _product(
            residual_product_kernel, (rows, width, hidden), plain, h,
            u, h, timesteps, alpha, w_o.contiguous(), b_o.contiguous(), h_next, residual, left,
            rows, width, hidden, steps, h.stride(0), alpha.stride(0),
            STATISTICS=leave_statistics, PRECISION=exact,
        )  # fmt: skip
    return h_next, residual, pre, u, left


def _product(
    kernel: object,
    shape: tuple[int, int, int],
    tiles: tuple[Tile, ...],
    like: Tensor,
    *arguments: object,
    **constants: object,
) -> None:
    """Launch a product kernel for a result of ``shape[:2]`` with the tile chosen for it."""

    def launch(tile: Tile) -> None:
        grid = (tile.programs(*shape[:2]),)
        kernel[grid](*arguments, **constants, **tile.sizes(), **tile.options())  # type: ignore[index]

    name = kernel.__name__  # type: ignore[attr-defined]
    variant = " ".join(f"{constant}={value}" for constant, value in constants.items())
    launch(tuning.choose(name, like, shape, tiles, launch, variant))


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
    dropout: float,
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    stream: int,
    statistics: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of h, gate, shift, scale, alpha, w_h, b_h, w_o, b_o, each in its argument's dtype."""
    (rows, width), columns, steps = h.shape, gate.shape[1], shift.shape[0]
    grad, h, gate, shift, scale, alpha = map(by_rows, (grad, h, gate, shift, scale, alpha))
    grad_h = torch.empty((rows, width), dtype=h.dtype, device=h.device)
    grad_gate = torch.empty((rows, columns), dtype=gate.dtype, device=h.device)
    grad_pre = torch.empty((rows, columns), dtype=h.dtype, device=h.device)
    if rows == 0:
        weights = w_h.new_zeros(w_h.shape), w_h.new_zeros(columns), w_o.new_zeros(w_o.shape), w_o.new_zeros(width)
        return grad_h, grad_gate, *(table.new_zeros(table.shape) for table in (shift, scale, alpha)), *weights
    timesteps, exact = timesteps.contiguous(), precision(h.dtype)
    keys = _dropout(dropout, seed, step, sample_ids, stream)
    weights = (
        *(torch.empty(w_h.shape, dtype=w_h.dtype, device=h.device), w_h.new_empty(columns)),
        *(torch.empty(w_o.shape, dtype=w_o.dtype, device=h.device), w_o.new_empty(width)),
    )
    with launching_on(h):
        statistics = row_statistics(h) if statistics is None else statistics.float().contiguous()
        grad_residual, z = (torch.empty((rows, width), dtype=h.dtype, device=h.device) for _ in range(2))
        operands_kernel[_elementwise(rows, width)](
            grad, h, timesteps, shift, scale, alpha, statistics, grad_residual, z, grad_h, rows, width, steps,
            grad.stride(0), h.stride(0), shift.stride(0), scale.stride(0), alpha.stride(0),
            GROUPS=_groups(width), **ELEMENTWISE,
        )  # fmt: skip
        _product(
            gate_backward_kernel, (rows, columns, width), tuning.candidates(h.dtype, epilogue=True), h,
            grad_residual, gate, pre, w_o.contiguous(), grad_gate, grad_pre, *keys,
            rows, width, columns, gate.stride(0), DROPOUT=dropout > 0, PRECISION=exact,
        )  # fmt: skip
        weight_gradient(grad_residual, hidden, *weights[2:])
        # Its place in memory is that of the gradient of z, which is made next.
        grad_z = grad_residual
        _product(
            input_gradient_kernel, (rows, width, columns), tuning.candidates(h.dtype), h,
            grad_pre, w_h.contiguous(), grad_z, rows, width, columns, PRECISION=exact,
        )  # fmt: skip
        weight_gradient(grad_pre, z, *weights[:2])
        tables = _norm_backward(grad, grad_z, h, residual, statistics, timesteps, scale, grad_h, shift.dtype)
    return grad_h, grad_gate, *tables, *weights


def _norm_backward(
    grad: Tensor,
    grad_z: Tensor,
    h: Tensor,
    residual: Tensor,
    statistics: Tensor,
    timesteps: Tensor,
    scale: Tensor,
    grad_h: Tensor,
    table_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, width), steps = h.shape, scale.shape[0]
    bounds = torch.empty((steps + 1,), dtype=torch.int32, device=h.device)
    blocks = triton.cdiv(rows + 1, SEGMENT_ROWS)
    falls = torch.empty((blocks,), dtype=torch.int32, device=h.device)
    segments_kernel[(blocks,)](timesteps, bounds, falls, rows, steps, BLOCK=SEGMENT_ROWS)
    tables = tuple(torch.empty((steps, width), dtype=table_dtype, device=h.device) for _ in range(3))
    norm_backward_kernel[(steps,)](
        grad, grad_z, h, residual, statistics, timesteps, bounds, falls, scale, grad_h, *tables,
        rows, width, blocks, grad.stride(0), h.stride(0), scale.stride(0),
        GROUPS=_groups(width), BLOCK_M=NORM_ROWS, BLOCK_N=triton.next_power_of_2(width),
        num_warps=NORM_WARPS,
    )  # fmt: skip
    return tables  # type: ignore[return-value]


class Splits(NamedTuple):
    """Float32 sums over splits of the rows: ``weight`` (splits, outputs, inputs) and ``bias`` (splits, outputs)."""

    weight: Tensor
    bias: Tensor
    tile: Tile
    rows_per_split: int


def splits_for(dtype: torch.dtype, shape: tuple[int, int], rows: int, device: torch.device, programs: int) -> Splits:
    """Room for the gradient of a weight of ``shape``, a sum over ``rows`` by about ``programs`` programs."""
    tile, splits, per_split = tuning.split_rows(dtype, shape, rows, programs)
    weight = torch.empty((splits, *shape), dtype=torch.float32, device=device)
    return Splits(weight, torch.empty((splits, shape[0]), dtype=torch.float32, device=device), tile, per_split)


def add_weight_gradient(grad: Tensor, x: Tensor, total: Splits, *, first: bool) -> None:
    """Put or add ``grad.T @ x`` and grad's columns into ``total``; ``grad`` (rows, outputs) is contiguous."""
    splits, outputs, inputs = total.weight.shape
    tile = total.tile
    weight_gradient_kernel[triton.cdiv(outputs, tile.m), triton.cdiv(inputs, tile.n), splits](
        grad, x, total.weight, total.bias, x.shape[0], outputs, inputs, x.stride(0), total.rows_per_split,
        ADD=not first, PRECISION=precision(x.dtype), **tile.sizes(), **tile.options(),
    )  # fmt: skip


def put_weight_gradient(total: Splits, factor: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    """``factor`` () times the sums into ``weight`` (kept, inputs) and ``bias`` (kept,), the first of the outputs."""
    (splits, outputs, inputs), kept = total.weight.shape, weight.shape[0]
    grid = (triton.cdiv(kept * inputs, SUMS) + triton.cdiv(kept, SUMS),)
    split_sums_kernel[grid](
        total.weight, total.bias, total.bias if factor is None else factor, weight, bias, splits, outputs, inputs, kept,
        SCALED=factor is not None, BLOCK=SUMS,
    )  # fmt: skip


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """``grad.T @ x`` into ``weight`` and grad's columns into ``bias``."""
    shape = (weight.shape[0], weight.shape[1])
    total = splits_for(x.dtype, shape, x.shape[0], x.device, 2 * tuning.ENOUGH_PROGRAMS)
    add_weight_gradient(grad, x, total, first=True)
    put_weight_gradient(total, None, weight, bias)
