"""Stratified timesteps: each row of a batch draws from a stratum of its own, so that they ascend."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ._dispatch import as_counter, check_stream, check_tensor, define, describe, forced
from ._triton import implement_with_triton

# Strata of a batch are exact in integers below this.
_MOST = 2**38


def _reference(
    seed: Tensor, step: Tensor, sample_ids: Tensor, steps: int, stream: int, first_row: int, batch: int
) -> Tensor:
    return reference.stratified_timesteps(seed, step, sample_ids, steps, stream, first_row=first_row, batch=batch)


def _fake(seed: Tensor, step: Tensor, sample_ids: Tensor, *rest: Any) -> Tensor:
    return sample_ids.new_empty(sample_ids.shape)


_op = define(
    "stratified_timesteps",
    "(Tensor seed, Tensor step, Tensor sample_ids, int steps, int stream, int first_row, int batch) -> Tensor",
    _reference,
    _fake,
)
# Its operands are integers: there is no dtype to choose by.
implement_with_triton("stratified_timesteps", "timesteps", "stratified_timesteps", dtypes=())


def stratified_timesteps(
    seed: int | Tensor,
    step: int | Tensor,
    sample_ids: Tensor,
    steps: int,
    stream: int,
    *,
    first_row: int = 0,
    batch: int | None = None,
) -> Tensor:
    """Timesteps ``floor((i + u_i) * T / B)`` of the rows i of a batch of B, ascending in i.

    One draw from each of B equal strata, which lowers the variance of the loss and leaves the batch sorted.

    Args:
        seed, step: int or int64 tensor of shape (), key the uniforms u_i as in `q_sample`.
        sample_ids: (n,) int64, which name the rows.
        steps: T. Exact in integers up to ``B * T < 2**38``.
        stream: 0 .. 255; 2 and 3 for the two stages.
        first_row: the place in the batch of the first of these rows.
        batch: B, by default n.

    Returns:
        int64 (n,) in 0 .. T-1.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or is out of range.
    """
    check_tensor(sample_ids, "sample_ids", (None,), None, "int64")
    check_stream(stream)
    rows, device = sample_ids.shape[0], sample_ids.device
    if not isinstance(steps, int):
        raise ValueError(f"steps must be an int, not {describe(steps)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if batch is not None and not 0 <= first_row <= batch - rows:
        raise ValueError(f"first_row {first_row} and {rows} rows do not fit a batch of {batch}")
    if batch is None and first_row != 0:
        raise ValueError(f"first_row is {first_row}, which needs the batch's size, batch")
    total = rows if batch is None else batch
    if total * steps >= _MOST:
        raise ValueError(f"steps must be less than 2**38 over the batch's rows, {total}, not {steps}")
    given = (as_counter(seed, "seed", device), as_counter(step, "step", device), sample_ids, steps, stream)
    place = (first_row, total)
    # On a CPU it stays in the open, where a compiler makes one loop of it.
    if device.type == "cpu" and forced() != "triton":
        return _reference(*given, *place)
    return _op(*given, *place)  # type: ignore[no-any-return]
