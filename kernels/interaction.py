"""One PFIN block: two kernels forward, four and two small ones backward.

    z  = n(h) * (1 + scale[tau]) + shift[tau]
    u  = silu(z @ w_h.T + b_h) * gate, then dropout
    h' = h + (1 + alpha[tau]) * (u @ w_o.T + b_o)

Every pointer's features are contiguous; rows lie ``*_stride`` elements apart. Products accumulate in float32. ``z`` is
made on the way into the products that need it and never stored. A timestep outside the tables makes its row NaN.
"""

import math

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
# Rows that a program of the norm's backward holds: with 512 features 16 values a thread for each of six tiles.
NORM_ROWS = 4


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
def gated_product_kernel(
    h_ptr, gate_ptr, timesteps_ptr, shift_ptr, scale_ptr, statistics_ptr, w_ptr, b_ptr, pre_ptr, hidden_ptr,
    seed_ptr, step_ptr, ids_ptr, stream, threshold, kept_scale,
    rows, width, hidden, steps, h_stride, gate_stride, shift_stride, scale_stride,
    DROPOUT: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """``pre = z @ w_h.T + b_h`` and ``hidden = dropout(silu(pre) * gate)``; the norm is the product's prologue."""
    # Programs of one row block run side by side: h and the tables stay in the L2 cache, the weights fit it anyway.
    blocks = tl.cdiv(hidden, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) % blocks) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    tau = _timesteps(timesteps_ptr, row, rows, steps)
    mean, rstd = _mean_rstd(statistics_ptr, row, rows, width, GROUPS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        feature = start + tl.arange(0, BLOCK_K)
        h = _tile(h_ptr, row, rows, feature, width, h_stride)
        shift = _modulation(shift_ptr, tau, steps, feature, width, shift_stride)
        scale = _modulation(scale_ptr, tau, steps, feature, width, scale_stride)
        z = (h - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift
        z = tl.where((feature < width)[None, :], z, 0.0).to(h_ptr.dtype.element_ty)
        inside = (feature < width)[:, None] & (column < hidden)[None, :]
        w = tl.load(w_ptr + column[None, :].to(tl.int64) * width + feature[:, None], mask=inside, other=0.0)
        acc = tl.dot(z, w.to(z.dtype), acc, input_precision=PRECISION)
    pre = acc + tl.load(b_ptr + column, mask=column < hidden, other=0.0).to(tl.float32)[None, :]
    gate = _tile(gate_ptr, row, rows, column, hidden, gate_stride)
    u = pre * tl.sigmoid(pre) * gate
    if DROPOUT:
        u *= _kept(seed_ptr, step_ptr, ids_ptr, row, rows, first, stream, threshold, kept_scale, BLOCK_N)
    _put(pre_ptr, pre, row, rows, column, hidden)
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
def gate_backward_kernel(
    grad_ptr, gate_ptr, pre_ptr, timesteps_ptr, alpha_ptr, w_ptr, grad_gate_ptr, grad_pre_ptr,
    seed_ptr, step_ptr, ids_ptr, stream, threshold, kept_scale,
    rows, width, hidden, steps, grad_stride, gate_stride, alpha_stride,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """Gradients of the gate and of ``pre`` from ``((1 + alpha) * grad) @ w_o``; silu and dropout are made again."""
    blocks = tl.cdiv(hidden, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) % blocks) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    tau = _timesteps(timesteps_ptr, row, rows, steps)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        feature = start + tl.arange(0, BLOCK_K)
        alpha = _modulation(alpha_ptr, tau, steps, feature, width, alpha_stride)
        grad = (1.0 + alpha) * _tile(grad_ptr, row, rows, feature, width, grad_stride)
        grad = tl.where((feature < width)[None, :], grad, 0.0).to(grad_ptr.dtype.element_ty)
        inside = (feature < width)[:, None] & (column < hidden)[None, :]
        w = tl.load(w_ptr + feature[:, None].to(tl.int64) * hidden + column[None, :], mask=inside, other=0.0)
        acc = tl.dot(grad, w.to(grad.dtype), acc, input_precision=PRECISION)
    if DROPOUT:
        acc *= _kept(seed_ptr, step_ptr, ids_ptr, row, rows, first, stream, threshold, kept_scale, BLOCK_N)
    pre = _tile(pre_ptr, row, rows, column, hidden, tl.cast(hidden, tl.int64))
    gate = _tile(gate_ptr, row, rows, column, hidden, gate_stride)
    sigmoid = tl.sigmoid(pre)
    _put(grad_gate_ptr, acc * pre * sigmoid, row, rows, column, hidden)
    _put(grad_pre_ptr, acc * gate * sigmoid * (1.0 + pre * (1.0 - sigmoid)), row, rows, column, hidden)


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
def segments_kernel(timesteps_ptr, segments_ptr, rows, steps, BLOCK: tl.constexpr):
    """Where each timestep's rows begin and end in a sorted batch; from 0 to ``rows`` for all when it is not sorted."""
    unsorted = 0
    for start in range(0, rows - 1, BLOCK):
        row = start + tl.arange(0, BLOCK)
        tau = tl.load(timesteps_ptr + row, mask=row < rows - 1, other=0)
        after = tl.load(timesteps_ptr + row + 1, mask=row < rows - 1, other=0)
        unsorted = tl.maximum(unsorted, tl.max((tau > after).to(tl.int32), axis=0))
    step = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for end in tl.static_range(2):
        # The number of rows with a timestep below ``step + end``.
        low = tl.zeros((BLOCK,), dtype=tl.int32)
        high = low + rows
        while tl.max(high - low, axis=0) > 0:
            middle = (low + high) // 2
            tau = tl.load(timesteps_ptr + middle, mask=low < high, other=0)
            below = tau < step + end
            low = tl.where((low < high) & below, middle + 1, low)
            high = tl.where((low < high) & (below == 0), middle, high)
        bound = tl.where(unsorted != 0, end * rows, low)
        tl.store(segments_ptr + step * 2 + end, bound, mask=step < steps)


# fmt: off
@triton.jit
def norm_backward_kernel(
    grad_ptr, grad_z_ptr, h_ptr, residual_ptr, statistics_ptr, timesteps_ptr, segments_ptr, scale_ptr,
    grad_h_ptr, grad_shift_ptr, grad_scale_ptr, grad_alpha_ptr,
    rows, width, grad_stride, h_stride, scale_stride,
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
    last = tl.load(segments_ptr + step * 2 + 1)
    for start in range(tl.load(segments_ptr + step * 2), last, BLOCK_M):
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
def hidden_weight_kernel(
    grad_pre_ptr, h_ptr, timesteps_ptr, shift_ptr, scale_ptr, statistics_ptr, weight_ptr, bias_ptr,
    rows, width, hidden, steps, h_stride, shift_stride, scale_stride, rows_per_split,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """Partial sums over one split of the rows: ``grad_pre.T @ z`` (hidden, width) and grad_pre's columns."""
    out = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    into = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    bias = tl.zeros((BLOCK_M,), dtype=tl.float32)
    end = tl.minimum(rows, (split + 1) * rows_per_split)
    for start in range(split * rows_per_split, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K).to(tl.int64)
        tau = _timesteps(timesteps_ptr, row, rows, steps)
        mean, rstd = _mean_rstd(statistics_ptr, row, rows, width, GROUPS)
        h = _tile(h_ptr, row, rows, into, width, h_stride)
        shift = _modulation(shift_ptr, tau, steps, into, width, shift_stride)
        scale = _modulation(scale_ptr, tau, steps, into, width, scale_stride)
        z = (h - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift
        z = tl.where((row < end)[:, None], z, 0.0).to(h_ptr.dtype.element_ty)
        grad = _tile(grad_pre_ptr, row, end, out, hidden, tl.cast(hidden, tl.int64))
        bias += tl.sum(grad, axis=0)
        acc = tl.dot(tl.trans(grad.to(z.dtype)), z, acc, input_precision=PRECISION)
    _put(weight_ptr + tl.cast(split, tl.int64) * hidden * width, acc, out.to(tl.int64), hidden, into, width)
    if tl.program_id(1) == 0:
        tl.store(bias_ptr + split * hidden + out, bias, mask=out < hidden)


# fmt: off
@triton.jit
def output_weight_kernel(
    grad_ptr, hidden_ptr, timesteps_ptr, alpha_ptr, weight_ptr, bias_ptr,
    rows, width, hidden, steps, grad_stride, alpha_stride, rows_per_split, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """Partial sums over one split of the rows: ``g.T @ hidden`` (width, hidden), g's columns; g = (1 + alpha) grad."""
    out = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    into = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    bias = tl.zeros((BLOCK_M,), dtype=tl.float32)
    end = tl.minimum(rows, (split + 1) * rows_per_split)
    for start in range(split * rows_per_split, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K).to(tl.int64)
        tau = _timesteps(timesteps_ptr, row, rows, steps)
        alpha = _modulation(alpha_ptr, tau, steps, out, width, alpha_stride)
        grad = (1.0 + alpha) * _tile(grad_ptr, row, end, out, width, grad_stride)
        u = _tile(hidden_ptr, row, end, into, hidden, tl.cast(hidden, tl.int64)).to(hidden_ptr.dtype.element_ty)
        bias += tl.sum(grad, axis=0)
        acc = tl.dot(tl.trans(grad.to(u.dtype)), u, acc, input_precision=PRECISION)
    _put(weight_ptr + tl.cast(split, tl.int64) * hidden * width, acc, out.to(tl.int64), width, into, hidden)
    if tl.program_id(1) == 0:
        tl.store(bias_ptr + split * width + out, bias, mask=out < width)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as `torch.set_float32_matmul_precision` says for PyTorch's own products."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def by_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its features are contiguous and its rows do not overlap in one, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _dropout(rate: float, seed: Tensor, step: Tensor, sample_ids: Tensor, stream: int) -> tuple[object, ...]:
    threshold = math.ceil(rate * 2**24 - 0.5)
    return seed, step, sample_ids.contiguous(), stream, threshold, 1 / (1 - rate)


def _groups(width: int) -> int:
    return triton.next_power_of_2(triton.cdiv(width, GROUP))


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
        first = (h, gate, timesteps, shift, scale, statistics, w_h.contiguous(), b_h.contiguous(), pre, u, *keys)
        strides = (h.stride(0), gate.stride(0), shift.stride(0), scale.stride(0))
        _product(
            gated_product_kernel, (rows, hidden, width), tuning.candidates(h.dtype, computed=True), h,
            *first, rows, width, hidden, steps, *strides,
            DROPOUT=dropout > 0, GROUPS=_groups(width), PRECISION=exact,
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
    launch(tuning.choose(name, like, shape, tiles, launch))


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
    grad_h, grad_z = (torch.empty((rows, width), dtype=h.dtype, device=h.device) for _ in range(2))
    grad_gate = torch.empty((rows, columns), dtype=gate.dtype, device=h.device)
    grad_pre = torch.empty((rows, columns), dtype=h.dtype, device=h.device)
    if rows == 0:
        weights = w_h.new_zeros(w_h.shape), w_h.new_zeros(columns), w_o.new_zeros(w_o.shape), w_o.new_zeros(width)
        return grad_h, grad_gate, *(table.new_zeros(table.shape) for table in (shift, scale, alpha)), *weights
    timesteps, exact = timesteps.contiguous(), precision(h.dtype)
    keys = _dropout(dropout, seed, step, sample_ids, stream)
    with launching_on(h):
        statistics = row_statistics(h) if statistics is None else statistics.float().contiguous()
        _product(
            gate_backward_kernel, (rows, columns, width), tuning.candidates(h.dtype, computed=True), h,
            grad, gate, pre, timesteps, alpha, w_o.contiguous(), grad_gate, grad_pre, *keys,
            rows, width, columns, steps, grad.stride(0), gate.stride(0), alpha.stride(0),
            DROPOUT=dropout > 0, PRECISION=exact,
        )  # fmt: skip
        _product(
            input_gradient_kernel, (rows, width, columns), tuning.candidates(h.dtype), h,
            grad_pre, w_h.contiguous(), grad_z, rows, width, columns, PRECISION=exact,
        )  # fmt: skip
        tables = _norm_backward(grad, grad_z, h, residual, statistics, timesteps, scale, grad_h, shift.dtype)
        d_w_h, d_b_h = _weight_gradient(
            hidden_weight_kernel, (columns, width), rows, h,
            (grad_pre, h, timesteps, shift, scale, statistics),
            (rows, width, columns, steps, h.stride(0), shift.stride(0), scale.stride(0)),
            GROUPS=_groups(width), PRECISION=exact,
        )  # fmt: skip
        d_w_o, d_b_o = _weight_gradient(
            output_weight_kernel, (width, columns), rows, h, (grad, hidden, timesteps, alpha),
            (rows, width, columns, steps, grad.stride(0), alpha.stride(0)), PRECISION=exact,
        )  # fmt: skip
    weights = d_w_h.to(w_h.dtype), d_b_h.to(w_h.dtype), d_w_o.to(w_o.dtype), d_b_o.to(w_o.dtype)
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
    segments = torch.empty((steps, 2), dtype=torch.int32, device=h.device)
    segments_kernel[(triton.cdiv(steps, 128),)](timesteps, segments, rows, steps, BLOCK=128)
    tables = tuple(torch.empty((steps, width), dtype=table_dtype, device=h.device) for _ in range(3))
    norm_backward_kernel[(steps,)](
        grad, grad_z, h, residual, statistics, timesteps, segments, scale, grad_h, *tables,
        rows, width, grad.stride(0), h.stride(0), scale.stride(0),
        GROUPS=_groups(width), BLOCK_M=NORM_ROWS, BLOCK_N=triton.next_power_of_2(width),
    )  # fmt: skip
    return tables  # type: ignore[return-value]


def _weight_gradient(
    kernel: object,
    shape: tuple[int, int],
    rows: int,
    like: Tensor,
    pointers: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    **constants: object,
) -> tuple[Tensor, Tensor]:
    """A weight's and its bias's gradient, float32: partial sums over splits of the rows, then their sum in order."""
    tile, splits, per_split = tuning.split_rows(like.dtype, shape, rows)
    weight = torch.empty((splits, *shape), dtype=torch.float32, device=like.device)
    bias = torch.empty((splits, shape[0]), dtype=torch.float32, device=like.device)
    grid = (triton.cdiv(shape[0], tile.m), triton.cdiv(shape[1], tile.n), splits)
    kernel[grid](  # type: ignore[index]
        *pointers, weight, bias, *sizes, per_split, **constants,
        **tile.sizes(), **tile.options(),
    )  # fmt: skip
    return weight.sum(0), bias.sum(0)
