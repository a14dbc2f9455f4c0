"""A stage's reverse chain for any number of rows: cuBLAS multiplies, one pass over rows lies between two products.

The passes are those of a whole network (`interaction_network`), told that all rows have one timestep, and one more
that ends a step: the sampler's affine update, its noise and the result's sum together. What no step changes, the
embedded condition and the gates' product, is made once.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .interaction import by_rows, dropout_keys, grid, linear, load_tile, store_tile
from .interaction_network import launch_gates, launch_norm, launch_state, product, vectors
from .tuning import launching_on

SAMPLER_TILE = {"BLOCK_M": 8, "BLOCK_N": 256}
# Rows that go through all steps together.
CHUNK_ROWS = 65_536
# Columns of the coefficients.
_CLEAN, _STATE, _SOURCE, _NOISE, _RESULT = (tl.constexpr(i) for i in range(5))


# fmt: off
@triton.jit
def sampler_kernel(
    clean_ptr, x_ptr, source_ptr, coefficients_ptr, seed_ptr, step_ptr, ids_ptr, next_ptr, result_ptr, stream,
    rows, features, x_stride, source_stride,
    FIRST: tl.constexpr, LAST: tl.constexpr, NOISY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """``result += w * clean`` and ``next = a * clean + b * x + c * source + e * eps``; the LAST step has no next."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    clean = load_tile(clean_ptr, row, rows, column, features, features)
    result = tl.load(coefficients_ptr + _RESULT).to(tl.float32) * clean
    if not FIRST:
        result += load_tile(result_ptr, row, rows, column, features, features)
    store_tile(result_ptr, result, row, rows, column, features)
    if not LAST:
        x = tl.load(coefficients_ptr + _CLEAN).to(tl.float32) * clean
        x += tl.load(coefficients_ptr + _STATE).to(tl.float32) * load_tile(
            x_ptr, row, rows, column, features, x_stride
        )
        x += tl.load(coefficients_ptr + _SOURCE).to(tl.float32) * load_tile(
            source_ptr, row, rows, column, features, source_stride
        )
        if NOISY:
            ids = tl.load(ids_ptr + row, mask=row < rows, other=0)
            half: tl.constexpr = next_ptr.dtype.element_ty.primitive_bitwidth == 16
            deviation = tl.load(coefficients_ptr + _NOISE).to(tl.float32) + tl.zeros((BLOCK_M, 1), tl.float32)
            x += philox.row_normals(seed_ptr, step_ptr, ids[:, None], first, stream, deviation, BLOCK_N, half)
        store_tile(next_ptr, x, row, rows, column, features)


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
    w_h: Sequence[Tensor],
    b_h: Sequence[Tensor],
    w_o: Sequence[Tensor],
    b_o: Sequence[Tensor],
    w_y: Tensor,
    b_y: Tensor,
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    stream: int,
    noisy: bool,
) -> Tensor:
    """The stage's result (B, D) in initial's dtype; see `reference.reverse_chain`."""
    result = torch.empty(initial.shape, dtype=initial.dtype, device=initial.device)
    if result.numel() == 0 or len(coefficients) == 0:
        return result.zero_()
    tables = modulation if modulation.stride(-1) == 1 else modulation.contiguous()
    weights = (w_x, b_x.contiguous(), w_c, b_c, w_g, b_g, w_h, vectors(b_h), w_o, vectors(b_o), w_y, b_y)
    # Of each step's noise; the counter itself keyed the initial state.
    counters = step + torch.arange(1, len(coefficients) + 1, device=step.device)
    rows = by_rows(initial), by_rows(source), condition.to(initial.dtype), sample_ids.contiguous(), result
    with launching_on(initial):
        for initial_rows, source_rows, condition_rows, ids, out in zip(
            *(t.split(CHUNK_ROWS) for t in rows), strict=True
        ):
            keys = (seed, counters, ids, stream, noisy)
            _chunk(initial_rows, source_rows, condition_rows, coefficients.contiguous(), tables, weights, keys, out)
    return result


def _chunk(
    x: Tensor,
    source: Tensor,
    condition: Tensor,
    coefficients: Tensor,
    tables: Tensor,
    weights: tuple[Any, ...],
    keys: tuple[Any, ...],
    result: Tensor,
) -> None:
    """The chain of some rows into ``result``; ``keys`` are seed, each step's counter, sample ids, stream and noisy."""
    w_x, b_x, w_c, b_c, w_g, b_g, w_h, b_h, w_o, b_o, w_y, b_y = weights
    seed, counters, ids, stream, noisy = keys
    (rows, dim), width, hidden, blocks = x.shape, w_x.shape[0], w_h[0].shape[0], len(w_h)

    def new(columns: int) -> Tensor:
        return torch.empty((rows, columns), dtype=x.dtype, device=x.device)

    own, normed, h, z = (new(width) for _ in range(4))
    gates, pre, clean, following = new(blocks * hidden), new(hidden), new(dim), new(dim)
    own_gates, b_gs = gates.split(hidden, dim=1), vectors(b_g.chunk(blocks))
    no_dropout = dropout_keys(0.0, seed, counters, ids, stream)
    linear(condition, w_c, b_c, own)
    launch_norm(own, normed)
    product(normed, w_g, gates)
    for i in range(len(coefficients)):
        of = [tables[i, layer].unbind(0) for layer in range(blocks)]
        product(x, w_x, own)
        launch_state(own, b_x, normed, ids, None, of[0], 0, h, z, one_step=True)
        for layer in range(blocks):
            product(z, w_h[layer], pre)
            launch_gates(pre, b_h[layer], own_gates[layer], b_gs[layer], pre, no_dropout, False)
            product(pre, w_o[layer], own)
            after = of[layer + 1] if layer + 1 < blocks else None
            launch_state(own, b_o[layer], h, ids, of[layer][2], after, 0, h, z, one_step=True)
        linear(z, w_y, b_y, clean)
        sampler_kernel[grid(rows, dim, SAMPLER_TILE)](
            clean, x, source, coefficients[i], seed, counters[i], ids, following, result, stream,
            rows, dim, x.stride(0), source.stride(0),
            FIRST=i == 0, LAST=i + 1 == len(coefficients), NOISY=noisy, **SAMPLER_TILE,
        )  # fmt: skip
        x = following
