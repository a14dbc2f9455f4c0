"""A stratified part of multi-label rows: each class in the share that the whole has it.

Iterative stratification (Sechidis, Tsoumakas & Vlahavas 2011): the rarest class is dealt out first, since there is the
least room for its rows. All rows of a class are dealt together, with the count that its demand asks for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .files import DataError


def held_out_rows(labels: NDArray[np.int8], fraction: float, seed: int) -> NDArray[np.int64]:
    """Ascending numbers of the rows to hold out.

    Args:
        labels: (N, K), 1 where a row carries a class and 0 where not.
        fraction: the share to hold out. seed: draws the rows, and which way a fractional count is rounded.

    Raises:
        DataError: a part would be left without a row, or training without a class that some row carries.
    """
    carried = labels > 0
    generator = np.random.default_rng(seed)
    counts = carried.sum(axis=0)
    left, demand, remaining = np.ones(len(labels), dtype=bool), fraction * counts, counts.copy()
    held = np.zeros(len(labels), dtype=bool)

    def deal(rows: NDArray[np.int64], wanted: float, most: int) -> None:
        number = int(np.clip(np.floor(wanted + generator.random()), 0, most))
        chosen = generator.permutation(rows)[:number]
        held[chosen] = True
        left[rows] = False
        remaining[:] -= carried[rows].sum(axis=0)
        demand[:] -= carried[chosen].sum(axis=0)

    while remaining.any():
        rarest = int(np.argmin(np.where(remaining > 0, remaining, len(labels) + 1)))
        rows = np.flatnonzero(left & carried[:, rarest])
        kept = int((carried[:, rarest] & ~left & ~held).sum())
        deal(rows, demand[rarest], len(rows) if kept else len(rows) - 1)
    # What carries no class makes up the number of rows.
    rest = np.flatnonzero(left)
    deal(rest, fraction * len(labels) - held.sum(), len(rest))
    missing = (counts > 0) & ~carried[~held].any(axis=0)
    if not held.any() or held.all() or not carried[held].any() or missing.any():
        raise DataError(
            f"a test_fraction of {fraction} of {len(labels)} labelled rows leaves too few rows in a part "
            f"for {len(counts)} classes; give 'visual_test' and 'label_test'"
        )
    return np.flatnonzero(held)
