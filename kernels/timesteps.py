"""Stratified timesteps in one launch; in PyTorch's own operations the ten rounds of Philox alone are 160 of them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .tuning import launching_on

BLOCK = 256


@triton.jit
def timesteps_kernel(
    seed_ptr, step_ptr, sample_ids_ptr, out_ptr, rows, steps, stream, first_row, batch, BLOCK: tl.constexpr
):
    """``floor((i + u_i) * steps / batch)`` of the rows i from ``first_row`` on, exact in integers."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(sample_ids_ptr + row, mask=row < rows, other=0)
    words = philox.random_words(seed_ptr, step_ptr, ids, tl.zeros((BLOCK,), dtype=tl.int32), stream)
    place = ((first_row + row) << 25) + 2 * (words[0] >> 8).to(tl.int64) + 1  # (i + u_i) * 2**25
    stratum = tl.cast(batch, tl.int64) << 25
    tl.store(out_ptr + row, place * steps // stratum, mask=row < rows)


def stratified_timesteps(
    seed: Tensor, step: Tensor, sample_ids: Tensor, steps: int, stream: int, first_row: int, batch: int
) -> Tensor:
    """Timesteps int64 (n,) in 0 .. ``steps`` - 1 of n rows of a batch of ``batch``, those from ``first_row`` on."""
    (rows,) = sample_ids.shape
    out = torch.empty((rows,), dtype=torch.int64, device=sample_ids.device)
    if rows == 0:
        return out
    with launching_on(sample_ids):
        timesteps_kernel[(triton.cdiv(rows, BLOCK),)](
            seed, step, sample_ids.contiguous(), out, rows, steps, stream, first_row, batch, BLOCK=BLOCK
        )
    return out
