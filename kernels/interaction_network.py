"""A whole PFIN in training: cuBLAS multiplies, and what lies between two products is one pass over rows.

    c' = c @ w_c.T + b_c,   g_l = 1 + n(c') @ w_g[l].T + b_g[l],   h_0 = x @ w_x.T + b_x + n(c')
    z_l = n(h_l) * (1 + scale_l[tau]) + shift_l[tau]
    u_l = silu(z_l @ w_h[l].T + b_h[l]) * g_l, then dropout
    h_{l+1} = h_l + (1 + alpha_l[tau]) * (u_l @ w_o[l].T + b_o[l])
    y  = n(h_L) @ w_y.T + b_y

The pass that ends a block makes the next one's modulated norm too, so that a block is two products and two passes
forward, four products and two passes backward. Gates and their gradients stay one matrix for all blocks, the tables'
gradients are written where they belong, and every bias's gradient is summed by the pass that has its rows at hand.

Every pointer's features are contiguous; rows lie ``*_stride`` elements apart. Passes compute in float32. A timestep
outside the tables makes its row NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interaction import (
    COLUMN_TILE,
    GATE_BACKWARD_TILE,
    GATE_ROWS,
    GATE_TILE,
    NORM_TILE,
    ROW_TILE,
    SEGMENT_ROWS,
    bias_gradients_kernel,
    by_rows,
    dropout_factor,
    dropout_keys,
    grid,
    known_timesteps,
    linear,
    load_tile,
    moments,
    segment,
    segments_kernel,
    store_tile,
    table_rows,
    weight_gradient,
    whole_rows,
)
from .tuning import cdiv, launching_on

# Rows that a program adds up, tile by tile, for the gradient of b_c; and rows and columns for those of b_g and b_y.
CONDITION_ROWS = 8
SUM_TILE = {"BLOCK_M": 16, "BLOCK_N": 128}
SUM_ROWS = 64


@triton.jit
def load_vector(ptr, column, columns):
    """Entries of a vector, float32, 0 outside."""
    return tl.load(ptr + column, mask=column < columns, other=0.0).to(tl.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@triton.jit
def norm_kernel(h_ptr, normed_ptr, rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``n(h)`` of contiguous rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    h = load_tile(h_ptr, row, rows, column, width, width)
    mean, rstd = moments(h, column < width, width)
    store_tile(normed_ptr, (h - mean[:, None]) * rstd[:, None], row, rows, column, width)


# fmt: off
@triton.jit
def state_kernel(
    product_ptr, bias_ptr, base_ptr, timesteps_ptr, alpha_ptr, shift_ptr, scale_ptr, state_ptr, normed_ptr,
    rows, width, steps, table_stride,
    SCALED: tl.constexpr, MODULATED: tl.constexpr, ONE_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """The next state, ``base + (1 + alpha) * (product + bias)``, and its modulated norm, which the next product reads.

    Not SCALED: without ``alpha``. Not MODULATED: the plain norm. ONE_STEP: all rows have the tables' first timestep.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    value = load_tile(product_ptr, row, rows, column, width, width) + load_vector(bias_ptr, column, width)[None, :]
    if not ONE_STEP:
        tau = known_timesteps(timesteps_ptr, row, rows, steps)
    if SCALED:
        if ONE_STEP:
            value *= 1.0 + load_vector(alpha_ptr, column, width)[None, :]
        else:
            value *= 1.0 + table_rows(alpha_ptr, tau, steps, column, width, table_stride)
    state = (load_tile(base_ptr, row, rows, column, width, width) + value).to(state_ptr.dtype.element_ty)
    store_tile(state_ptr, state, row, rows, column, width)
    h = state.to(tl.float32)
    mean, rstd = moments(h, column < width, width)
    normed = (h - mean[:, None]) * rstd[:, None]
    if MODULATED:
        if ONE_STEP:
            normed *= 1.0 + load_vector(scale_ptr, column, width)[None, :]
            normed += load_vector(shift_ptr, column, width)[None, :]
        else:
            normed *= 1.0 + table_rows(scale_ptr, tau, steps, column, width, table_stride)
            normed += table_rows(shift_ptr, tau, steps, column, width, table_stride)
    store_tile(normed_ptr, normed, row, rows, column, width)


# fmt: off
@triton.jit
def gates_kernel(
    pre_ptr, b_h_ptr, gates_ptr, b_g_ptr, hidden_ptr, seed_ptr, step_ptr, ids_ptr, stream, threshold, kept_scale,
    rows, hidden, gates_stride, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """``hidden = dropout(silu(pre + b_h) * (1 + gates + b_g))``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    pre = load_tile(pre_ptr, row, rows, column, hidden, hidden) + load_vector(b_h_ptr, column, hidden)[None, :]
    gate = load_tile(gates_ptr, row, rows, column, hidden, gates_stride)
    gate += 1.0 + load_vector(b_g_ptr, column, hidden)[None, :]
    u = pre * tl.sigmoid(pre) * gate
    if DROPOUT:
        u *= dropout_factor(seed_ptr, step_ptr, ids_ptr, row, rows, first, stream, threshold, kept_scale, BLOCK_N)
    store_tile(hidden_ptr, u, row, rows, column, hidden)


# ---------------------------------------------------------------------------------------------------------------------
# Backward


# fmt: off
@triton.jit
def last_norm_backward_kernel(
    grad_ptr, h_ptr, timesteps_ptr, alpha_ptr, grad_h_ptr, scaled_ptr,
    rows, width, steps, table_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """The plain norm's backward, and ``(1 + alpha) * grad_h``, what the last block's products read.

    A row of a timestep outside the tables, whose state is NaN, is NaN in both from here on: no program of
    `state_backward_kernel` meets it.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    tau = known_timesteps(timesteps_ptr, row, rows, steps)
    grad = _through_norm(
        load_tile(grad_ptr, row, rows, column, width, width), load_tile(h_ptr, row, rows, column, width, width),
        column < width, width,
    )  # fmt: skip
    alpha = table_rows(alpha_ptr, tau, steps, column, width, table_stride)
    grad = grad.to(grad_h_ptr.dtype.element_ty)
    store_tile(grad_h_ptr, grad, row, rows, column, width)
    store_tile(scaled_ptr, (1.0 + alpha) * grad.to(tl.float32), row, rows, column, width)


@triton.jit
def _through_norm(grad, h, here, width):
    """Gradient of whole rows ``h`` from that of ``n(h)``."""
    mean, rstd = moments(h, here, width)
    normed = tl.where(here[None, :], (h - mean[:, None]) * rstd[:, None], 0.0)
    mean_product = tl.sum(grad * normed, axis=1) / width
    return rstd[:, None] * (grad - (tl.sum(grad, axis=1) / width)[:, None] - normed * mean_product[:, None])


# fmt: off
@triton.jit
def condition_backward_kernel(
    grad_ptr, added_ptr, condition_ptr, out_ptr, sums_ptr, rows, width,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """The condition's gradient from those of its norm, ``grad + added``; the sum of ROWS rows of it is left for b_c."""
    column = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        row = tl.program_id(0).to(tl.int64) * ROWS + start + tl.arange(0, BLOCK_M)
        grad = load_tile(grad_ptr, row, rows, column, width, width)
        grad += load_tile(added_ptr, row, rows, column, width, width)
        grad = _through_norm(
            grad, load_tile(condition_ptr, row, rows, column, width, width), column < width, width
        )
        store_tile(out_ptr, grad, row, rows, column, width)
        # Beyond the last row of 0 there is a gradient of 0 through the norm of 0.
        total += grad
    place = sums_ptr + tl.program_id(0).to(tl.int64) * width + column
    tl.store(place, tl.sum(total, axis=0), mask=column < width)


# fmt: off
@triton.jit
def gates_backward_kernel(
    grad_ptr, pre_ptr, b_h_ptr, gates_ptr, b_g_ptr, grad_gates_ptr, sums_ptr,
    seed_ptr, step_ptr, ids_ptr, stream, threshold, kept_scale,
    rows, hidden, gates_stride, sums_stride,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """Gradients of the gates' product and of ``pre`` from that of ``hidden``; silu and dropout are made again.

    The gradient of ``pre`` takes the place of the one that comes in; the sum of its ROWS rows is left for b_h. A second
    sum, for b_g, would take 80 registers a thread in place of 56, and 25 us in place of 15 on an H200 (4096 rows).
    """
    first = tl.program_id(1) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        row = tl.program_id(0).to(tl.int64) * ROWS + start + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & (column < hidden)[None, :]
        grad = load_tile(grad_ptr, row, rows, column, hidden, hidden)
        # Biases are read again for each tile: held, they would take 16 registers.
        pre = load_tile(pre_ptr, row, rows, column, hidden, hidden) + load_vector(b_h_ptr, column, hidden)[None, :]
        gate = load_tile(gates_ptr, row, rows, column, hidden, gates_stride)
        gate += 1.0 + load_vector(b_g_ptr, column, hidden)[None, :]
        if DROPOUT:
            grad *= dropout_factor(
                seed_ptr, step_ptr, ids_ptr, row, rows, first, stream, threshold, kept_scale, BLOCK_N
            )
        sigmoid = tl.sigmoid(pre)
        grad *= sigmoid
        grad_gate = grad * pre
        place = grad_gates_ptr + row[:, None] * gates_stride + column[None, :]
        tl.store(place, grad_gate.to(grad_gates_ptr.dtype.element_ty), mask=inside)
        grad *= 1.0 + pre * (1.0 - sigmoid)
        grad *= gate
        store_tile(grad_ptr, grad, row, rows, column, hidden)
        total += grad
    place = tl.program_id(0).to(tl.int64) * sums_stride + column
    tl.store(sums_ptr + place, tl.sum(total, axis=0), mask=column < hidden)


# fmt: off
@triton.jit
def state_backward_kernel(
    grad_ptr, grad_z_ptr, h_ptr, product_ptr, bias_ptr, timesteps_ptr, bounds_ptr, falls_ptr,
    scale_ptr, alpha_ptr, lower_alpha_ptr, scaled_ptr, grad_shift_ptr, grad_scale_ptr, grad_alpha_ptr,
    b_o_sums_ptr, b_x_sums_ptr, rows, width, blocks, table_stride, grad_table_stride, sums_stride,
    LOWEST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """A block's norm backward and residual, and its tables' gradients: a program goes through one timestep's rows in
    their order.

    The gradient of h takes the place of that of the next state; beside it is left what the block below reads,
    ``(1 + lower alpha) * grad_h``. Sums of the timestep's rows are left for b_o and, by the LOWEST block, for b_x.
    """
    step = tl.program_id(0)
    column = tl.arange(0, BLOCK_N)
    here = (column < width)[None, :]
    table = tl.cast(step, tl.int64) * table_stride
    scale = 1.0 + load_vector(scale_ptr + table, column, width)[None, :]
    shift_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    scale_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    alpha_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    grad_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    own_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
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
            place = row[:, None] * width + column[None, :]
            h = tl.load(h_ptr + place, mask=inside, other=0.0).to(tl.float32)
            mean, rstd = moments(h, column < width, width)
            grad_z = tl.load(grad_z_ptr + place, mask=inside, other=0.0).to(tl.float32)
            product = tl.load(product_ptr + place, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
            normed = tl.where(inside, (h - mean[:, None]) * rstd[:, None], 0.0)
            grad_sum += tl.sum(grad, axis=0)
            alpha_sum += tl.sum(grad * product, axis=0)
            shift_sum += tl.sum(grad_z, axis=0)
            scale_sum += tl.sum(grad_z * normed, axis=0)
            inner = grad_z * scale
            mean_inner = tl.sum(inner, axis=1) / width
            mean_product = tl.sum(inner * normed, axis=1) / width
            grad += rstd[:, None] * (inner - mean_inner[:, None] - normed * mean_product[:, None])
            stored = grad.to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + place, stored, mask=inside)
            if LOWEST:
                own_sum += tl.sum(tl.where(inside, stored.to(tl.float32), 0.0), axis=0)
            else:
                # Read again for each tile: held, the entries would take registers that two more programs need.
                lower = 1.0 + load_vector(lower_alpha_ptr + table, column, width)[None, :]
                scaled = lower * stored.to(tl.float32)
                tl.store(scaled_ptr + place, scaled.to(scaled_ptr.dtype.element_ty), mask=inside)
    place = tl.cast(step, tl.int64) * grad_table_stride + column
    element = grad_shift_ptr.dtype.element_ty
    tl.store(grad_shift_ptr + place, shift_sum.to(element), mask=column < width)
    tl.store(grad_scale_ptr + place, scale_sum.to(element), mask=column < width)
    alpha_sum += load_vector(bias_ptr, column, width) * grad_sum
    tl.store(grad_alpha_ptr + place, alpha_sum.to(element), mask=column < width)
    alpha = 1.0 + load_vector(alpha_ptr + table, column, width)
    sums = tl.cast(step, tl.int64) * sums_stride + column
    tl.store(b_o_sums_ptr + sums, alpha * grad_sum, mask=column < width)
    if LOWEST:
        tl.store(b_x_sums_ptr + sums, own_sum, mask=column < width)


# fmt: off
@triton.jit
def row_sums_kernel(
    x_ptr, sums_ptr, rows, columns, stride, sums_stride,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """The sums of ROWS rows each of a matrix, for a bias that only adds."""
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        row = tl.program_id(0).to(tl.int64) * ROWS + start + tl.arange(0, BLOCK_M)
        total += load_tile(x_ptr, row, rows, column, columns, stride)
    place = sums_ptr + tl.program_id(0).to(tl.int64) * sums_stride + column
    tl.store(place, tl.sum(total, axis=0), mask=column < columns)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """``x @ weight.T`` into ``out``; given its result, so that an autocast region casts nothing."""
    torch.mm(x, weight.to(x.dtype).t(), out=out)


def side_by_side(conditions: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The condition's parts as one matrix; a single part is not copied."""
    return torch.cat([part.to(dtype) for part in conditions], dim=1) if len(conditions) > 1 else conditions[0].to(dtype)


def condition_rows(width: int) -> int:
    """See `CONDITION_ROWS`; whole tiles."""
    return max(CONDITION_ROWS, whole_rows(width, ROW_TILE)["BLOCK_M"])


class Tables:
    """Views of each block's shift, scale and alpha in a modulation (T, L, 3, d) whose features are contiguous."""

    def __init__(self, modulation: Tensor) -> None:
        self.whole = modulation if modulation.stride(-1) == 1 else modulation.contiguous()
        self.steps, self.stride = modulation.shape[0], self.whole.stride(0)

    def of(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Shift, scale, alpha, (T, d) each."""
        shift, scale, alpha = self.whole[:, layer].unbind(1)
        return shift, scale, alpha


def launch_norm(h: Tensor, normed: Tensor) -> None:
    """``n(h)`` (B, d) into ``normed``."""
    tile = whole_rows(h.shape[1], ROW_TILE)
    norm_kernel[(cdiv(h.shape[0], tile["BLOCK_M"]),)](h, normed, *h.shape, **tile)


def launch_state(
    entering: Tensor,
    bias: Tensor,
    base: Tensor,
    timesteps: Tensor,
    alpha: Tensor | None,
    following: tuple[Tensor, Tensor, Tensor] | None,
    stride: int,
    state: Tensor,
    normed: Tensor,
    *,
    one_step: bool = False,
) -> None:
    """The state that a product (B, d) leads to, and its norm, modulated by the tables of the ``following`` block."""
    rows, width = entering.shape
    tile = whole_rows(width, ROW_TILE)
    # Of tables that are not read any tensor will do.
    shift, scale = (bias, bias) if following is None else following[:2]
    steps = 1 if following is None else following[0].shape[0]
    steps = steps if alpha is None else alpha.shape[0]
    state_kernel[(cdiv(rows, tile["BLOCK_M"]),)](
        entering, bias, base, timesteps, bias if alpha is None else alpha, shift, scale, state, normed,
        rows, width, steps, stride,
        SCALED=alpha is not None, MODULATED=following is not None, ONE_STEP=one_step, **tile,
    )  # fmt: skip


def launch_gates(
    pre: Tensor, b_h: Tensor, gates: Tensor, b_g: Tensor, hidden: Tensor, keys: tuple[object, ...], dropout: bool
) -> None:
    """The gated activation (B, m*d) into ``hidden``; ``gates`` are this block's columns of all."""
    gates_kernel[grid(*pre.shape, GATE_TILE)](
        pre, b_h, gates, b_g, hidden, *keys, *pre.shape, gates.stride(0), DROPOUT=dropout, **GATE_TILE
    )


def vectors(biases: Sequence[Tensor]) -> list[Tensor]:
    """Biases without gaps."""
    return [bias.contiguous() for bias in biases]


def interaction_network(
    x: Tensor,
    conditions: Sequence[Tensor],
    timesteps: Tensor,
    modulation: Tensor,
    w_x: Tensor,
    b_x: Tensor,
    w_c: Tensor,
    b_c: Tensor,
    w_g: Tensor,
    b_g: Tensor,
    w_h: Sequence[Tensor],
    b_h: Sequence[Tensor],
    w_o: Sequence[Tensor],
    b_o: Sequence[Tensor],
    w_y: Tensor,
    b_y: Tensor,
    dropout: float,
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    stream: int,
) -> tuple[Tensor, ...]:
    """The prediction and what the backward needs, as `reference.interaction_network_forward` orders it."""
    rows, width, hidden, blocks = x.shape[0], w_x.shape[0], w_h[0].shape[0], len(w_h)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=x.dtype, device=x.device)

    prediction, gates = new(rows, w_y.shape[0]), new(rows, blocks * hidden)
    condition, normed = new(rows, width), new(rows, width)
    pre, u, residual = new(blocks * rows, hidden), new(blocks * rows, hidden), new(blocks * rows, width)
    states, modulated = new((blocks + 1) * rows, width), new((blocks + 1) * rows, width)
    results = prediction, condition, normed, gates, pre, u, residual, states, modulated
    if rows == 0:
        return results
    timesteps, tables, slices = timesteps.contiguous(), Tables(modulation), b_g.chunk(blocks)
    pres, us, residuals = (t.split(rows) for t in (pre, u, residual))
    hs, zs, own_gates = states.split(rows), modulated.split(rows), gates.split(hidden, dim=1)
    (b_x,), b_h, b_o, b_gs = vectors([b_x]), vectors(b_h), vectors(b_o), vectors(slices)
    with launching_on(x):
        linear(side_by_side(conditions, x.dtype), w_c, b_c, condition)
        launch_norm(condition, normed)
        product(normed, w_g, gates)
        # In a place that the last block fills later.
        product(x, w_x, residuals[-1])
        launch_state(residuals[-1], b_x, normed, timesteps, None, tables.of(0), tables.stride, hs[0], zs[0])
        for i in range(blocks):
            product(zs[i], w_h[i], pres[i])
            keys = dropout_keys(dropout, seed, step, sample_ids, stream + i)
            launch_gates(pres[i], b_h[i], own_gates[i], b_gs[i], us[i], keys, dropout > 0)
            product(us[i], w_o[i], residuals[i])
            following = tables.of(i + 1) if i + 1 < blocks else None
            launch_state(
                residuals[i], b_o[i], hs[i], timesteps, tables.of(i)[2], following, tables.stride, hs[i + 1], zs[i + 1]
            )
        linear(zs[-1], w_y, b_y, prediction)
    return results


class _Saved(NamedTuple):
    """What the forward left, a tensor a block where there are several."""

    condition: Tensor
    normed: Tensor
    gates: Tensor
    pre: Sequence[Tensor]
    hidden: Sequence[Tensor]
    residual: Sequence[Tensor]
    states: Sequence[Tensor]
    modulated: Sequence[Tensor]

    @classmethod
    def of(cls, saved: Sequence[Tensor], rows: int) -> "_Saved":
        condition, normed, gates, *stacked = saved
        return cls(condition, normed, gates, *(t.split(rows) for t in stacked))


class _Gradients(NamedTuple):
    """Where gradients of rows lie: of the state (B, d), of it times ``1 + alpha`` of the block in turn, of a modulated
    norm, of a hidden activation (B, m*d), of all gates' product (B, L*m*d)."""

    h: Tensor
    scaled: Tensor
    z: Tensor
    pre: Tensor
    gates: Tensor

    @classmethod
    def like(cls, x: Tensor, width: int, hidden: int, blocks: int) -> "_Gradients":
        columns = (width, width, width, hidden, blocks * hidden)
        return cls(*(torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device) for n in columns))


def interaction_network_backward(
    grad: Tensor,
    x: Tensor,
    conditions: Sequence[Tensor],
    timesteps: Tensor,
    modulation: Tensor,
    w_x: Tensor,
    w_c: Tensor,
    w_g: Tensor,
    b_g: Tensor,
    w_h: Sequence[Tensor],
    b_h: Sequence[Tensor],
    w_o: Sequence[Tensor],
    b_o: Sequence[Tensor],
    w_y: Tensor,
    dropout: float,
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    stream: int,
    saved: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients in the order of `reference.interaction_network_backward`; of x and conditions those ``wanted``."""
    rows, width, hidden, blocks = x.shape[0], w_x.shape[0], w_h[0].shape[0], len(w_h)
    if rows == 0:
        return _nothing(x, conditions, modulation, (w_x, w_c, w_g, w_y), (w_h, b_h, w_o, b_o), wanted)
    kept, tables, room = _Saved.of(saved, rows), Tables(modulation), _Gradients.like(x, width, hidden, blocks)
    sums = _Sums(rows, width, hidden, blocks, w_y.shape[0], tables.steps, x.device)
    d_modulation = torch.empty(modulation.shape, dtype=modulation.dtype, device=x.device)
    grad, timesteps = by_rows(grad), timesteps.contiguous()
    with launching_on(x):
        torch.mm(grad, w_y.to(x.dtype), out=room.z)
        tile, alpha = whole_rows(width, ROW_TILE), tables.of(blocks - 1)[2]
        last_norm_backward_kernel[(cdiv(rows, tile["BLOCK_M"]),)](
            room.z, kept.states[-1], timesteps, alpha, room.h, room.scaled,
            rows, width, tables.steps, tables.stride, **tile,
        )  # fmt: skip
        keys = [dropout_keys(dropout, seed, step, sample_ids, stream + i) for i in range(blocks)]
        weights = w_h, vectors(b_h), w_o, vectors(b_o), vectors(b_g.chunk(blocks))
        d_w_h, d_w_o = _blocks_backward(room, kept, timesteps, tables, weights, keys, dropout > 0, d_modulation, sums)
        torch.mm(room.gates, w_g.to(x.dtype), out=room.z)
        # In the place of what no block reads any more.
        d_condition = room.scaled
        condition_backward_kernel[(sums.condition.shape[0],)](
            room.z, room.h, kept.condition, d_condition, sums.condition, rows, width,
            ROWS=condition_rows(width), **tile,
        )
        sums.add_rows(room.gates, grad)
        d_b_x, d_b_c, d_b_g, d_b_y, d_b_h, d_b_o = sums.biases(w_x, w_c, b_g, w_y, b_h, b_o)
        ends = [weight_gradient(room.h, x, w_x), d_b_x]
        ends += [weight_gradient(d_condition, side_by_side(conditions, x.dtype), w_c), d_b_c]
        ends += [weight_gradient(room.gates, kept.normed, w_g), d_b_g]
        ends += [weight_gradient(grad, kept.modulated[-1], w_y), d_b_y]
        d_x = _operand_gradient(room.h, w_x, x) if wanted[0] else x.new_empty(0)
        columns = w_c.split([part.shape[1] for part in conditions], dim=1)
        d_conditions = [
            _operand_gradient(d_condition, weight, part) if asked else part.new_empty(0)
            for weight, part, asked in zip(columns, conditions, wanted[1:], strict=True)
        ]
    return [d_x, d_modulation, *ends, *d_w_h, *d_b_h, *d_w_o, *d_b_o, *d_conditions]


def _blocks_backward(
    room: _Gradients,
    kept: _Saved,
    timesteps: Tensor,
    tables: Tables,
    weights: tuple[Sequence[Tensor], ...],
    keys: Sequence[tuple[object, ...]],
    dropout: bool,
    d_modulation: Tensor,
    sums: "_Sums",
) -> tuple[list[Tensor], list[Tensor]]:
    """From the last block's result to the first one's h; ``weights`` are each block's w_h, b_h, w_o, b_o and b_g.

    Fills ``d_modulation`` and the biases' ``sums``, and returns the gradients of w_h and of w_o.
    """
    w_h, b_h, w_o, b_o, b_g = weights
    (rows, width), hidden = room.h.shape, room.pre.shape[1]
    gates, d_gates = kept.gates.split(hidden, dim=1), room.gates.split(hidden, dim=1)
    d_w_h, d_w_o = list[Tensor](), list[Tensor]()
    bounds, falls = _segments(timesteps, tables.steps)
    for i in reversed(range(len(w_h))):
        d_w_o.insert(0, weight_gradient(room.scaled, kept.hidden[i], w_o[i]))
        torch.mm(room.scaled, w_o[i].to(room.h.dtype), out=room.pre)
        gates_backward_kernel[(sums.gates.shape[0], cdiv(hidden, GATE_BACKWARD_TILE["BLOCK_N"]))](
            room.pre, kept.pre[i], b_h[i], gates[i], b_g[i], d_gates[i], sums.b_h(i), *keys[i],
            rows, hidden, gates[i].stride(0), sums.gates.stride(0),
            DROPOUT=dropout, ROWS=GATE_ROWS, **GATE_BACKWARD_TILE,
        )  # fmt: skip
        d_w_h.insert(0, weight_gradient(room.pre, kept.modulated[i], w_h[i]))
        torch.mm(room.pre, w_h[i].to(room.h.dtype), out=room.z)
        (_, scale, alpha), lower = tables.of(i), tables.of(max(i - 1, 0))[2]
        state_backward_kernel[(tables.steps,)](
            room.h, room.z, kept.states[i], kept.residual[i], b_o[i], timesteps, bounds, falls, scale, alpha, lower,
            room.scaled, *d_modulation[:, i].unbind(1), sums.b_o(i), sums.b_x(),
            rows, width, falls.shape[0], tables.stride, d_modulation.stride(0), sums.states.stride(0),
            LOWEST=i == 0, **whole_rows(width, NORM_TILE),
        )  # fmt: skip
    return d_w_h, d_w_o


class _Sums:
    """Sums of rows that passes leave, float32, and the biases' gradients that they add up to.

    ``gates`` (parts, L*m*d) for each b_h; ``states`` (T, (L+1)*d) for each b_o, then b_x; ``condition`` (parts, d) for
    b_c; ``rows`` (parts, L*m*d + D) for b_g, then b_y.
    """

    def __init__(
        self, rows: int, width: int, hidden: int, blocks: int, dim: int, steps: int, device: torch.device
    ) -> None:
        self._width, self._hidden, self._blocks = width, hidden, blocks
        shapes = [(cdiv(rows, GATE_ROWS), blocks * hidden), (steps, (blocks + 1) * width)]
        shapes += [(cdiv(rows, condition_rows(width)), width), (cdiv(rows, SUM_ROWS), blocks * hidden + dim)]
        self.gates, self.states, self.condition, self.rows = (
            torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes
        )

    def b_h(self, layer: int) -> Tensor:
        return self.gates[:, layer * self._hidden :]

    def b_o(self, layer: int) -> Tensor:
        return self.states[:, layer * self._width :]

    def b_x(self) -> Tensor:
        return self.states[:, self._blocks * self._width :]

    def add_rows(self, d_gates: Tensor, grad: Tensor) -> None:
        """Sums of the rows of gradients that only add: of the gates' product and of the prediction."""
        for matrix, out in ((d_gates, self.rows), (grad, self.rows[:, d_gates.shape[1] :])):
            row_sums_kernel[(len(out), cdiv(matrix.shape[1], SUM_TILE["BLOCK_N"]))](
                matrix, out, *matrix.shape, matrix.stride(0), out.stride(0), ROWS=SUM_ROWS, **SUM_TILE
            )

    def biases(
        self, w_x: Tensor, w_c: Tensor, b_g: Tensor, w_y: Tensor, b_h: Sequence[Tensor], b_o: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Gradients of b_x, b_c, b_g, b_y, and of each b_h and b_o, in the dtypes of their weights."""
        pairs = (self.gates, self.states), (self.condition, self.rows)
        added = [torch.empty(t.shape[1], dtype=torch.float32, device=t.device) for pair in pairs for t in pair]
        for (first, second), out in zip(pairs, (added[:2], added[2:]), strict=True):
            blocks = sum(cdiv(t.shape[1], COLUMN_TILE["BLOCK_N"]) for t in (first, second))
            bias_gradients_kernel[(blocks,)](
                first, second, *out, first.shape[0], second.shape[0], first.shape[1], second.shape[1], **COLUMN_TILE
            )
        gates, states, condition, rest = added
        views = [*gates.chunk(self._blocks), *states.chunk(self._blocks + 1), *rest.split([len(b_g), len(w_y)])]
        # Tensors of their own: results of an operation share no memory.
        like = [*b_h, *b_o, w_x, b_g, w_y]
        own = [torch.empty(view.shape, dtype=t.dtype, device=view.device) for view, t in zip(views, like, strict=True)]
        torch._foreach_copy_(own, views)
        d_b_h, d_b_o, (d_b_x, d_b_g, d_b_y) = own[: self._blocks], own[self._blocks : -3], own[-3:]
        return d_b_x, condition.to(w_c.dtype), d_b_g, d_b_y, d_b_h, d_b_o


def _segments(timesteps: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """See `segments_kernel`."""
    rows = len(timesteps)
    bounds = torch.empty((steps + 1,), dtype=torch.int32, device=timesteps.device)
    falls = torch.empty((cdiv(rows + 1, SEGMENT_ROWS),), dtype=torch.int32, device=timesteps.device)
    segments_kernel[(len(falls),)](timesteps, bounds, falls, rows, steps, BLOCK=SEGMENT_ROWS)
    return bounds, falls


def _operand_gradient(grad: Tensor, weight: Tensor, operand: Tensor) -> Tensor:
    """``grad @ weight``, like ``operand``."""
    out = torch.empty(operand.shape, dtype=grad.dtype, device=grad.device)
    return torch.mm(grad, weight.to(grad.dtype), out=out).to(operand.dtype)


def _nothing(
    x: Tensor,
    conditions: Sequence[Tensor],
    modulation: Tensor,
    matrices: Sequence[Tensor],
    per_block: Sequence[Sequence[Tensor]],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradients of no rows."""
    ends = [part for w in matrices for part in (w.new_zeros(w.shape), w.new_zeros(w.shape[0]))]
    lists = [t.new_zeros(t.shape) for group in per_block for t in group]
    operands = [t.new_empty(t.shape if asked else 0) for t, asked in zip((x, *conditions), wanted, strict=True)]
    zeros = torch.zeros(modulation.shape, dtype=modulation.dtype, device=modulation.device)
    return [operands[0], zeros, *ends, *lists, *operands[1:]]
