"""One PFIN block: cuBLAS multiplies, and what lies between the products is one pass over rows each.

    z  = n(h) * (1 + scale[tau]) + shift[tau]
    u  = silu(z @ w_h.T + b_h) * gate, then dropout
    h' = h + (1 + alpha[tau]) * (u @ w_o.T + b_o)

Forward three passes and two products, backward three passes, four products, and two small kernels: one finds the bounds
of the timesteps, one adds up the biases' gradients. Every pointer's features are contiguous; rows lie ``*_stride``
elements apart. Passes compute in float32. A timestep outside the tables makes its row NaN.

The passes could be the products' epilogues, which saves the reading of a product's result. In Triton, with operands by
cp.async or TMA, tiles of 64 and 128 rows by 64 to 256 columns and the epilogue in one, two or four parts, the fastest
took on an H100 for 16 384 rows in bfloat16, 512 features and 1024 inner ones, each timed alone: the gate's backward 117
us, where cuBLAS and the pass take 34 and 69; the gate 78 us against 35 and 42; the residual 65 us against 32 and 22.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .tuning import cdiv, launching_on

NORM_EPS = tl.constexpr(1e-5)
# Columns for which one mean and one centred sum of squares stand in the row statistics.
GROUP = 128
_GROUP = tl.constexpr(GROUP)
# Values of whole rows in a program, and of these in a thread. The norm's backward has two warps for two rows of 512
# features: at 128 registers a thread 8 of its programs fit a multiprocessor, and 1000 timesteps an H100 at once.
ROW_TILE, NORM_TILE, ROW_VALUES = 2048, 1024, 16
# Tiles of the passes that need no whole rows; the residual's columns are a group of the statistics.
GATE_TILE = {"BLOCK_M": 8, "BLOCK_N": 256}
RESIDUAL_TILE = {"BLOCK_M": 16, "BLOCK_N": GROUP}
# The gate's backward adds up so many rows, tile by tile, for the gradient of b_h.
GATE_BACKWARD_TILE, GATE_ROWS = {"BLOCK_M": 8, "BLOCK_N": 128}, 32
# Tile of a program that adds up columns: few columns, as there are few of them for all multiprocessors.
COLUMN_TILE = {"BLOCK_M": 128, "BLOCK_N": 8, "num_warps": 8}
# Rows of a program that looks for the bounds of timesteps.
SEGMENT_ROWS = 256


# ---------------------------------------------------------------------------------------------------------------------
# Tiles


@triton.jit
def load_tile(ptr, row, rows, column, columns, stride):
    """A float32 tile of a matrix, 0 outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, tile, row, rows, column, columns):
    """Store a tile into a contiguous matrix."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = ptr + row[:, None] * tl.cast(columns, tl.int64) + column[None, :]
    tl.store(place, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def known_timesteps(timesteps_ptr, row, rows, steps):
    """The rows' timesteps, int64; ``steps`` stands for one outside the tables."""
    tau = tl.load(timesteps_ptr + row, mask=row < rows, other=0).to(tl.int64)
    return tl.where((tau >= 0) & (tau < steps), tau, steps)


@triton.jit
def table_rows(ptr, tau, steps, column, columns, stride):
    """Rows ``tau`` of a table, float32; NaN for a timestep outside it."""
    inside = (column < columns)[None, :] & (tau < steps)[:, None]
    other = tl.where(tau < steps, 0.0, float("nan"))[:, None]
    values = tl.load(ptr + tau[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return values + other


@triton.jit
def moments(tile, here, width):
    """Mean and reciprocal deviation of whole rows; ``here`` is where the tile's columns are features."""
    mean = tl.sum(tile, axis=1) / width
    away = tl.where(here[None, :], tile - mean[:, None], 0.0)
    # How far rounding has left the mean: of a row of one large value nothing else remains.
    off = tl.sum(away, axis=1) / width
    variance = tl.maximum(tl.sum(away * away, axis=1) / width - off * off, 0.0)
    return mean + off, tl.rsqrt(variance + NORM_EPS)


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
def dropout_factor(seed_ptr, step_ptr, ids_ptr, row, rows, first, stream, threshold, kept_scale, WIDTH: tl.constexpr):
    """Dropout's factor for WIDTH features from ``first``: 0 or ``1 / (1 - rate)``."""
    ids = tl.load(ids_ptr + row, mask=row < rows, other=0)
    kept = philox.kept(seed_ptr, step_ptr, ids[:, None], first, stream, threshold, WIDTH)
    return kept.to(tl.float32) * tl.cast(kept_scale, tl.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Forward


# fmt: off
@triton.jit
def modulated_norm_kernel(
    h_ptr, timesteps_ptr, shift_ptr, scale_ptr, z_ptr,
    rows, width, steps, h_stride, shift_stride, scale_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """``z = n(h) * (1 + scale) + shift``, what the first product reads."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    tau = known_timesteps(timesteps_ptr, row, rows, steps)
    h = load_tile(h_ptr, row, rows, column, width, h_stride)
    shift = table_rows(shift_ptr, tau, steps, column, width, shift_stride)
    scale = table_rows(scale_ptr, tau, steps, column, width, scale_stride)
    mean, rstd = moments(h, column < width, width)
    store_tile(z_ptr, (h - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift, row, rows, column, width)


# fmt: off
@triton.jit
def gate_kernel(
    pre_ptr, gate_ptr, hidden_ptr, seed_ptr, step_ptr, ids_ptr, stream, threshold, kept_scale,
    rows, hidden, gate_stride, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """``hidden = dropout(silu(pre) * gate)``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    pre = load_tile(pre_ptr, row, rows, column, hidden, hidden)
    u = pre * tl.sigmoid(pre) * load_tile(gate_ptr, row, rows, column, hidden, gate_stride)
    if DROPOUT:
        u *= dropout_factor(seed_ptr, step_ptr, ids_ptr, row, rows, first, stream, threshold, kept_scale, BLOCK_N)
    store_tile(hidden_ptr, u, row, rows, column, hidden)


# fmt: off
@triton.jit
def residual_kernel(
    residual_ptr, h_ptr, timesteps_ptr, alpha_ptr, h_next_ptr, statistics_ptr,
    rows, width, steps, h_stride, alpha_stride,
    STATISTICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """``h_next = h + (1 + alpha) * residual``, and h_next's row statistics."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tau = known_timesteps(timesteps_ptr, row, rows, steps)
    residual = load_tile(residual_ptr, row, rows, column, width, width)
    alpha = table_rows(alpha_ptr, tau, steps, column, width, alpha_stride)
    h_next = load_tile(h_ptr, row, rows, column, width, h_stride) + (1.0 + alpha) * residual
    h_next = h_next.to(h_next_ptr.dtype.element_ty)
    store_tile(h_next_ptr, h_next, row, rows, column, width)
    if STATISTICS:
        _put_statistics(statistics_ptr, h_next.to(tl.float32), row, rows, column, width)


# ---------------------------------------------------------------------------------------------------------------------
# Backward


# fmt: off
@triton.jit
def operands_kernel(
    grad_ptr, h_ptr, timesteps_ptr, shift_ptr, scale_ptr, alpha_ptr, grad_residual_ptr, z_ptr,
    grad_h_ptr, rows, width, steps, grad_stride, h_stride, shift_stride, scale_stride, alpha_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """What the products of the backward read: ``(1 + alpha) * grad``, and z again as the forward had it.

    Rows of a timestep outside the tables, which no program of `norm_backward_kernel` meets, get their NaN here.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    tau = known_timesteps(timesteps_ptr, row, rows, steps)
    grad = load_tile(grad_ptr, row, rows, column, width, grad_stride)
    h = load_tile(h_ptr, row, rows, column, width, h_stride)
    alpha = table_rows(alpha_ptr, tau, steps, column, width, alpha_stride)
    store_tile(grad_residual_ptr, (1.0 + alpha) * grad, row, rows, column, width)
    nowhere = tl.full((BLOCK_M, BLOCK_N), float("nan"), dtype=tl.float32)
    store_tile(grad_h_ptr, nowhere, row, tl.where(tau == steps, rows, 0), column, width)
    shift = table_rows(shift_ptr, tau, steps, column, width, shift_stride)
    scale = table_rows(scale_ptr, tau, steps, column, width, scale_stride)
    mean, rstd = moments(h, column < width, width)
    store_tile(z_ptr, (h - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift, row, rows, column, width)


# fmt: off
@triton.jit
def gate_backward_kernel(
    grad_ptr, gate_ptr, pre_ptr, grad_gate_ptr, sums_ptr,
    seed_ptr, step_ptr, ids_ptr, stream, threshold, kept_scale,
    rows, hidden, gate_stride,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """Gradients of the gate and of ``pre`` from that of ``hidden``; silu and dropout are made again.

    The gradient of ``pre`` takes the place of the one that comes in; the sum of its ROWS rows is left for b_h.
    """
    first = tl.program_id(1) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        row = tl.program_id(0).to(tl.int64) * ROWS + start + tl.arange(0, BLOCK_M)
        grad = load_tile(grad_ptr, row, rows, column, hidden, hidden)
        pre = load_tile(pre_ptr, row, rows, column, hidden, hidden)
        gate = load_tile(gate_ptr, row, rows, column, hidden, gate_stride)
        if DROPOUT:
            grad *= dropout_factor(
                seed_ptr, step_ptr, ids_ptr, row, rows, first, stream, threshold, kept_scale, BLOCK_N
            )
        sigmoid = tl.sigmoid(pre)
        grad *= sigmoid
        store_tile(grad_gate_ptr, grad * pre, row, rows, column, hidden)
        grad *= 1.0 + pre * (1.0 - sigmoid)
        grad *= gate
        store_tile(grad_ptr, grad, row, rows, column, hidden)
        total += grad
    place = sums_ptr + tl.program_id(0).to(tl.int64) * hidden + column
    tl.store(place, tl.sum(total, axis=0), mask=column < hidden)


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
def segment(bounds_ptr, falls_ptr, step, rows, blocks, BLOCK: tl.constexpr):
    """Where the rows of timestep ``step`` begin and end, and whether they may lie anywhere: then from 0 to ``rows``."""
    # Bounds of an unsorted batch were never written: what is read is not used.
    first, last = tl.load(bounds_ptr + step), tl.load(bounds_ptr + step + 1)
    # A number, not a tile: behind a loop over a tile Triton no longer knows that rows are aligned, and loads values
    # singly.
    falls = 0
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        falls |= tl.max(tl.load(falls_ptr + block, mask=block < blocks, other=0), axis=0)
    unsorted = falls != 0
    return tl.where(unsorted, 0, first), tl.where(unsorted, rows, last), unsorted


# fmt: off
@triton.jit
def norm_backward_kernel(
    grad_ptr, grad_z_ptr, h_ptr, residual_ptr, timesteps_ptr, bounds_ptr, falls_ptr, scale_ptr, alpha_ptr,
    grad_h_ptr, grad_shift_ptr, grad_scale_ptr, grad_alpha_ptr, sums_ptr,
    rows, width, blocks, grad_stride, h_stride, scale_stride, alpha_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """The norm's backward, and the tables' gradients: a program goes through one timestep's rows in their order.

    ``(1 + alpha) * grad`` of these rows is summed for b_o.
    """
    step = tl.program_id(0)
    column = tl.arange(0, BLOCK_N)
    here = (column < width)[None, :]
    own_scale = scale_ptr + tl.cast(step, tl.int64) * scale_stride
    scale = 1.0 + tl.load(own_scale + column[None, :], mask=here, other=0.0).to(tl.float32)
    own_alpha = alpha_ptr + tl.cast(step, tl.int64) * alpha_stride
    alpha = tl.load(own_alpha + column, mask=column < width, other=0.0)
    shift_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    scale_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    alpha_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    grad_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first, last, unsorted = segment(bounds_ptr, falls_ptr, step, rows, blocks, 128)
    for start in range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M).to(tl.int64)
        own = row < last
        # In a sorted batch all rows between the bounds are the timestep's.
        own &= tl.load(timesteps_ptr + row, mask=own & unsorted, other=step).to(tl.int64) == step
        count = 1
        if unsorted:
            count = tl.max(own.to(tl.int32), axis=0)
        if count != 0:
            inside = own[:, None] & here
            h = tl.load(h_ptr + row[:, None] * h_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
            # Again, not left by `operands_kernel`: one value that all threads of a row hold is stored by way of shared
            # memory, where each of them writes it to one place.
            mean, rstd = moments(h, column < width, width)
            place = row[:, None] * width + column[None, :]
            grad_z = tl.load(grad_z_ptr + place, mask=inside, other=0.0).to(tl.float32)
            residual = tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=inside, other=0.0)
            grad = grad.to(tl.float32)
            normed = tl.where(inside, (h - mean[:, None]) * rstd[:, None], 0.0)
            grad_sum += tl.sum(grad, axis=0)
            alpha_sum += tl.sum(grad * residual, axis=0)
            shift_sum += tl.sum(grad_z, axis=0)
            scale_sum += tl.sum(grad_z * normed, axis=0)
            inner = grad_z * scale
            mean_inner = tl.sum(inner, axis=1) / width
            mean_product = tl.sum(inner * normed, axis=1) / width
            grad += rstd[:, None] * (inner - mean_inner[:, None] - normed * mean_product[:, None])
            tl.store(grad_h_ptr + place, grad.to(grad_h_ptr.dtype.element_ty), mask=inside)
    place = tl.cast(step, tl.int64) * width + column
    element = grad_shift_ptr.dtype.element_ty
    tl.store(grad_shift_ptr + place, shift_sum.to(element), mask=column < width)
    tl.store(grad_scale_ptr + place, scale_sum.to(element), mask=column < width)
    tl.store(grad_alpha_ptr + place, alpha_sum.to(element), mask=column < width)
    tl.store(sums_ptr + place, (1.0 + alpha.to(tl.float32)) * grad_sum, mask=column < width)


@triton.jit
def _sum_columns(parts_ptr, out_ptr, block, parts, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums of ``parts`` rows, in one fixed order, of the columns of one block."""
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, parts, BLOCK_M):
        total += load_tile(parts_ptr, start + tl.arange(0, BLOCK_M).to(tl.int64), parts, column, columns, columns)
    tl.store(out_ptr + column, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=column < columns)


# fmt: off
@triton.jit
def bias_gradients_kernel(
    hidden_sums_ptr, width_sums_ptr, b_h_ptr, b_o_ptr, hidden_parts, width_parts, hidden, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """Gradients of both biases from the sums that `gate_backward_kernel` and `norm_backward_kernel` left."""
    blocks = tl.cdiv(hidden, BLOCK_N)
    program = tl.program_id(0)
    if program < blocks:
        _sum_columns(hidden_sums_ptr, b_h_ptr, program, hidden_parts, hidden, BLOCK_M, BLOCK_N)
    else:
        _sum_columns(width_sums_ptr, b_o_ptr, program - blocks, width_parts, width, BLOCK_M, BLOCK_N)


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
    """The tensor itself if each row's features are contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def dropout_keys(rate: float, seed: Tensor, step: Tensor, sample_ids: Tensor, stream: int) -> tuple[object, ...]:
    threshold = math.ceil(rate * 2**24 - 0.5)
    return seed, step, sample_ids.contiguous(), stream, threshold, 1 / (1 - rate)


def whole_rows(width: int, values: int) -> dict[str, int]:
    """Tile and warps of a program that holds about ``values`` values of whole rows."""
    columns = max(16, 1 << (width - 1).bit_length())
    rows = max(1, min(16, values // columns))
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": max(1, min(16, rows * columns // (32 * ROW_VALUES)))}


def grid(rows: int, columns: int, tile: dict[str, int]) -> tuple[int, int]:
    return cdiv(rows, tile["BLOCK_M"]), cdiv(columns, tile["BLOCK_N"])


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
    """The block's result, the second product, the first product, the gated activation, the result's statistics.

    The given statistics are for backends that read h tile by tile; here the norm sees whole rows anyway.
    """
    (rows, width), hidden, steps = h.shape, gate.shape[1], shift.shape[0]
    h, gate, shift, scale, alpha = map(by_rows, (h, gate, shift, scale, alpha))
    h_next, residual = (torch.empty((rows, width), dtype=h.dtype, device=h.device) for _ in range(2))
    pre, u = (torch.empty((rows, hidden), dtype=h.dtype, device=h.device) for _ in range(2))
    left_shape = (rows, cdiv(width, GROUP), 2) if leave_statistics else (0,)
    left = torch.empty(left_shape, dtype=torch.float32, device=h.device)
    if rows == 0:
        return h_next, residual, pre, u, left
    timesteps = timesteps.contiguous()
    keys = dropout_keys(dropout, seed, step, sample_ids, stream)
    with launching_on(h):
        # In the place of the result, which is made after it was read.
        z, whole = h_next, whole_rows(width, ROW_TILE)
        modulated_norm_kernel[(cdiv(rows, whole["BLOCK_M"]),)](
            h, timesteps, shift, scale, z, rows, width, steps, h.stride(0), shift.stride(0), scale.stride(0), **whole
        )
        linear(z, w_h, b_h, pre)
        gate_kernel[grid(rows, hidden, GATE_TILE)](
            pre, gate, u, *keys, rows, hidden, gate.stride(0), DROPOUT=dropout > 0, **GATE_TILE
        )
        linear(u, w_o, b_o, residual)
        residual_kernel[grid(rows, width, RESIDUAL_TILE)](
            residual, h, timesteps, alpha, h_next, left, rows, width, steps, h.stride(0), alpha.stride(0),
            STATISTICS=leave_statistics, **RESIDUAL_TILE,
        )  # fmt: skip
    return h_next, residual, pre, u, left


# Products are given their results: an autocast region, in which a backward may run, casts the operands of others.
def linear(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    torch.addmm(bias.to(x.dtype), x, weight.to(x.dtype).t(), out=out)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``grad.T @ x``, like ``weight``."""
    out = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
    return torch.mm(grad.t(), x, out=out).to(weight.dtype)


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
    if rows == 0:
        weights = w_h.new_zeros(w_h.shape), w_h.new_zeros(columns), w_o.new_zeros(w_o.shape), w_o.new_zeros(width)
        return grad_h, grad_gate, *(table.new_zeros(table.shape) for table in (shift, scale, alpha)), *weights
    timesteps = timesteps.contiguous()
    keys = dropout_keys(dropout, seed, step, sample_ids, stream)
    with launching_on(h):
        grad_residual, z = (torch.empty((rows, width), dtype=h.dtype, device=h.device) for _ in range(2))
        whole = whole_rows(width, ROW_TILE)
        operands_kernel[(cdiv(rows, whole["BLOCK_M"]),)](
            grad, h, timesteps, shift, scale, alpha, grad_residual, z, grad_h, rows, width, steps,
            grad.stride(0), h.stride(0), shift.stride(0), scale.stride(0), alpha.stride(0), **whole,
        )  # fmt: skip
        grad_w_o = weight_gradient(grad_residual, hidden, w_o)
        # First the gradient of hidden; that of pre takes its place.
        grad_pre = torch.empty((rows, columns), dtype=h.dtype, device=h.device)
        torch.mm(grad_residual, w_o.to(h.dtype), out=grad_pre)
        hidden_sums = torch.empty((cdiv(rows, GATE_ROWS), columns), dtype=torch.float32, device=h.device)
        tiles = (hidden_sums.shape[0], cdiv(columns, GATE_BACKWARD_TILE["BLOCK_N"]))
        gate_backward_kernel[tiles](
            grad_pre, gate, pre, grad_gate, hidden_sums, *keys, rows, columns, gate.stride(0),
            DROPOUT=dropout > 0, ROWS=GATE_ROWS, **GATE_BACKWARD_TILE,
        )  # fmt: skip
        grad_w_h = weight_gradient(grad_pre, z, w_h)
        # The gradient of z, in the place of another that was read.
        torch.mm(grad_pre, w_h.to(h.dtype), out=grad_residual)
        tables, width_sums = _norm_backward(
            grad, grad_residual, h, residual, timesteps, scale, alpha, grad_h, shift.dtype
        )
        grad_b_h, grad_b_o = w_h.new_empty(columns), w_o.new_empty(width)
        blocks = sum(cdiv(n, COLUMN_TILE["BLOCK_N"]) for n in (columns, width))
        bias_gradients_kernel[(blocks,)](
            hidden_sums, width_sums, grad_b_h, grad_b_o, hidden_sums.shape[0], steps, columns, width, **COLUMN_TILE
        )
    return grad_h, grad_gate, *tables, grad_w_h, grad_b_h, grad_w_o, grad_b_o


def _norm_backward(
    grad: Tensor,
    grad_z: Tensor,
    h: Tensor,
    residual: Tensor,
    timesteps: Tensor,
    scale: Tensor,
    alpha: Tensor,
    grad_h: Tensor,
    table_dtype: torch.dtype,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Fills ``grad_h``; the tables' gradients, and each timestep's share of that of b_o, float32."""
    (rows, width), steps = h.shape, scale.shape[0]
    bounds = torch.empty((steps + 1,), dtype=torch.int32, device=h.device)
    blocks = cdiv(rows + 1, SEGMENT_ROWS)
    falls = torch.empty((blocks,), dtype=torch.int32, device=h.device)
    segments_kernel[(blocks,)](timesteps, bounds, falls, rows, steps, BLOCK=SEGMENT_ROWS)
    tables = tuple(torch.empty((steps, width), dtype=table_dtype, device=h.device) for _ in range(3))
    sums = torch.empty((steps, width), dtype=torch.float32, device=h.device)
    norm_backward_kernel[(steps,)](
        grad, grad_z, h, residual, timesteps, bounds, falls, scale, alpha, grad_h, *tables, sums,
        rows, width, blocks, grad.stride(0), h.stride(0), scale.stride(0), alpha.stride(0),
        **whole_rows(width, NORM_TILE),
    )  # fmt: skip
    return tables, sums
