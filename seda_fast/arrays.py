"""Arrays of features and labels: the checks of one array, float32 rows of it, its mean and deviation.

Every check raises DataError with one sentence that names the array and, where one is at fault, the first row.
Large arrays, memory maps among them, are walked in blocks of rows and never copied or cast whole.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from typing import Any, Literal
from unicodedata import category

import numpy as np
from numpy.typing import NDArray

from .files import STRINGS, DataError

Unpaired = Literal["refuse", "keep"]
Features = NDArray[Any]  # (N, D) float32, or a memory map of float16, float32 or float64
Labels = NDArray[Any]  # (N,) int64; multi-label (N, K) int8
Mask = NDArray[np.bool_]
Moments = NDArray[np.float64]
Index = slice | NDArray[np.integer[Any]] | NDArray[np.bool_]

_FLOATS = tuple(np.dtype(name) for name in ("float16", "float32", "float64"))
_BLOCK = 2**20  # elements looked at together: 4 MiB of float32


def rows(array: Features, index: Index) -> NDArray[np.float32]:
    """The rows `index` of an (N, D) array as a fresh, contiguous, writable float32 array.

    This is where memory maps of another dtype are cast. What overflows becomes infinite; checks refuse it.
    """
    found = array[index]
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.asarray(found, dtype=np.float32, order="C")
    # Rows that are picked one by one are a copy already; another one of a large set might be one too many.
    return cast.copy() if np.may_share_memory(cast, array) else cast


def mean_and_deviation(array: Features, rows: Index | None = None) -> tuple[Moments, Moments]:
    """Mean and population standard deviation per dimension, (D,) float64 each, in one pass over blocks.

    rows: those to use, all by default. Rows with a NaN (missing text) are left out. Raises DataError when no row is
    left.
    """
    chosen = np.arange(len(array))[slice(None) if rows is None else rows]
    count, origin = 0, None
    mean = spread = np.zeros(array.shape[1])
    step = max(1, _BLOCK // max(1, array.shape[1]))
    for start in range(0, len(chosen), step):
        take = slice(start, start + step) if rows is None else chosen[start : start + step]
        # Of the values that are standardised: in a file of float64 those may be two where its own vary by less.
        with np.errstate(over="ignore", invalid="ignore"):
            block = np.asarray(array[take], dtype=np.float32).astype(np.float64)
        release(array)
        block = block[~np.isnan(block).any(axis=1)]
        if not len(block):
            continue
        # Distances from the first row: a constant dimension is exactly 0, a large offset costs no digits.
        origin = block[0].copy() if origin is None else origin
        block = block - origin
        total, block_mean = count + len(block), block.mean(axis=0)
        shift = block_mean - mean
        spread = spread + ((block - block_mean) ** 2).sum(axis=0) + shift**2 * (count * len(block) / total)
        mean = mean + shift * (len(block) / total)  # merging of moments, Chan, Golub & LeVeque 1983
        count = total
    if origin is None:
        raise DataError("there is no row to take a mean of")
    return origin + mean, np.sqrt(spread / count)


def release(array: Features) -> None:
    """Give back the memory of a memory-mapped file's pages; the next access reads them anew. Nothing for other arrays,
    nor for a copy-on-write map (``mmap_mode="c"``), whose changes lie in memory alone."""
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and base.mode == "c":
            return
        array, base = base, base.base
    if isinstance(array, np.memmap) and isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def _blocks(array: Features) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(first row, rows as float32), a bounded number of rows at a time."""
    step = max(1, _BLOCK // array.shape[1])
    for start in range(0, len(array), step):
        with np.errstate(over="ignore", invalid="ignore"):
            block = np.asarray(array[start : start + step], dtype=np.float32)
        yield start, block
        release(array)


def has_text(text: Features) -> Mask:
    """A row is all NaN or has none, so its first column tells."""
    found = np.zeros(len(text), dtype=bool)
    # Of a memory map each element brings its page into memory, and those around it that the system has at hand: 0.3 GB
    # and more of a file of 2 GB, were they all kept.
    step = max(1, _BLOCK // max(1, text.shape[1]))
    for start in range(0, len(text) if text.shape[1] else 0, step):
        found[start : start + step] = ~np.isnan(text[start : start + step, 0])
        release(text)
    return found


def check_layout(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raises DataError unless rank, dtype and size suit the array called `name`."""
    if dtype.hasobject:
        raise DataError(f"'{name}' holds Python objects, which are never used")
    if name in STRINGS:
        ranks, fits, needed = "1", dtype.kind == "U" and dtype.itemsize > 0, "strings are"
    elif name.startswith("label") and dtype.kind == "U":
        ranks, fits, needed = "1", dtype.itemsize > 0, "names of classes or integers are"
    elif name.startswith("label"):
        ranks, fits, needed = "1 or 2", dtype.kind in "iu", "integers or names of classes are"
    else:
        ranks, fits, needed = "2", dtype.newbyteorder("=") in _FLOATS, "float16, float32 or float64 is"
    if str(len(shape)) not in ranks.split(" or "):
        raise DataError(f"'{name}' has {len(shape)} dimensions, {ranks} needed")
    if not fits:
        raise DataError(f"'{name}' has dtype {dtype}, {needed} needed")
    if shape[0] == 0:
        raise DataError(f"'{name}' is empty")
    if len(shape) == 2 and shape[1] == 0:
        raise DataError(f"'{name}' has no columns")


def _as_array(name: str, value: Any) -> NDArray[Any]:
    if isinstance(value, np.ma.MaskedArray):
        raise DataError(f"'{name}' is a masked array; write NaN for missing text, or leave the rows out")
    try:
        array = value if isinstance(value, np.memmap) else np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"'{name}' is no array: {error}") from error
    check_layout(name, array.shape, array.dtype)
    return array


def _features(name: str, value: Any, learnt: bool) -> Features:
    array = _as_array(name, value)
    if learnt:  # two equal rows to predict or to measure are what they are
        refuse_what_float32_loses(name, array)
    if isinstance(array, np.memmap):
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32)


def refuse_what_float32_loses(name: str, array: NDArray[Any]) -> None:
    """Raises DataError where the rows of a float64 array (N, D) differ, but in every dimension by so little beside its
    offset that float32, which everything is computed in, would tell chance from chance."""
    if array.dtype.itemsize < 8 or array.ndim != 2 or not array.size:
        return
    low, high = np.full(array.shape[1], np.inf), np.full(array.shape[1], -np.inf)
    step = max(1, _BLOCK // array.shape[1])
    for start in range(0, len(array), step):
        block = np.asarray(array[start : start + step], dtype=np.float64)
        low, high = np.fmin(low, np.fmin.reduce(block)), np.fmax(high, np.fmax.reduce(block))
        release(array)
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.fmax(np.abs(low), np.abs(high))
        # Between neighbours of float32 at that size; what varies by the last bits of float64 is constant.
        single = np.finfo(np.float32)
        spacing = np.maximum(largest * single.eps, single.tiny)
        varies = high - low > 4 * largest * np.finfo(np.float64).eps
        # What goes no further than two neighbours has three values left at most.
        lost = varies & (high - low < 2 * spacing)
    if lost.any() and lost.sum() == varies.sum():
        column = int(np.argmax(lost))
        advice = "subtract the columns' means first" if largest[column] >= single.tiny else "multiply them first"
        raise DataError(
            f"'{name}' holds rows that float32 cannot tell apart: column {column} goes from {low[column]:.10g} "
            f"to {high[column]:.10g}; {advice}"
        )


def check_visual(name: str, value: Any, *, learnt: bool = False) -> Features:
    """Checked visual features: every entry finite in float32, and where they are ``learnt`` from, rows that float32
    tells apart."""
    array = _features(name, value, learnt)
    for start, block in _blocks(array):
        bad = ~np.isfinite(block)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise DataError(f"'{name}' {_bad_entry(_as_array(name, value), start + row, column)}")
    return array


def _bad_entry(array: NDArray[Any], row: int, column: int) -> str:
    """What the entry is, in the dtype it came in: a finite float64 may be infinite in float32."""
    entry = float(array[row, column])
    what = "NaN" if np.isnan(entry) else "infinity" if np.isinf(entry) else f"{entry:.3g}, beyond float32,"
    return f"holds {what} in row {row}, column {column}"


def check_text(name: str, value: Any, unpaired: Unpaired, *, learnt: bool = False) -> tuple[Features, Mask]:
    """Checked textual features and the (N,) mask of rows that have any; ``learnt`` as in `check_visual`.

    A row is finite or all NaN; a row of the second kind has no text, and with unpaired="refuse" is refused.
    """
    array = _features(name, value, learnt)
    paired = np.ones(len(array), dtype=bool)
    for start, block in _blocks(array):
        finite = np.isfinite(block)
        paired[start : start + len(block)] = present = ~np.isnan(block).all(axis=1)
        bad = present & ~finite.all(axis=1)
        if bad.any():
            row = int(np.argmax(bad))
            place = _bad_entry(_as_array(name, value), start + row, int(np.argmin(finite[row])))
            raise DataError(f"'{name}' {place}; only a row of nothing but NaN means that text is missing")
    missing = len(array) - int(paired.sum())
    if missing and unpaired == "refuse":
        raise DataError(
            f"'{name}' lacks the text of {missing} of {len(array)} rows (all NaN, first in row "
            f"{int(np.argmin(paired))}); unpaired='keep' (--unpaired keep) admits them"
        )
    return array, paired


def check_labels(name: str, value: Any, *, need_one: bool = True) -> Labels:
    """Checked labels, copied to memory: -1 or a class number; with need_one, not all of them -1.

    Multi-label (N, K): 1 where a row carries a class and 0 where not, a row of -1 unlabelled; with need_one, at least
    one 1. A labelled row may carry no class.
    """
    array = _as_array(name, value)
    if array.ndim == 2:
        return _check_indicators(name, array, need_one)
    bad = array < -1 if array.dtype.kind == "i" else array > np.iinfo(np.int64).max
    if bad.any():
        row = int(np.argmax(bad))
        needed = "a class from 0 up, or -1 for unlabelled, is needed"
        raise DataError(f"'{name}' holds {array[row]} in row {row}; {needed}")
    labels = np.array(array, dtype=np.int64)
    if need_one and (labels < 0).all():
        raise DataError(f"'{name}' has no labelled row (all are -1)")
    return labels


def _check_indicators(name: str, array: NDArray[Any], need_one: bool) -> Labels:
    bad = (array != 0) & (array != 1)
    if array.dtype.kind == "i":
        bad &= array != -1
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise DataError(
            f"'{name}' holds {array[row, column]} in row {row}, column {column}; labels of 2 dimensions are "
            "multi-label: 1 where a row carries a class and 0 where not, or a row of -1 for unlabelled"
        )
    labels = np.array(array, dtype=np.int8)
    unknown = labels < 0
    mixed = unknown.any(axis=1) & ~unknown.all(axis=1)
    if mixed.any():
        row = int(np.argmax(mixed))
        raise DataError(f"'{name}' holds -1 beside other values in row {row}; an unlabelled row is -1 throughout")
    if need_one and unknown.all():
        raise DataError(f"'{name}' has no labelled row (all are -1)")
    if need_one and not (labels > 0).any():
        raise DataError(f"'{name}' has no row that carries a class (no entry is 1)")
    return labels


def labelled_rows(labels: Labels) -> Mask:
    """Which rows are labelled, (N,) bool."""
    return np.asarray((labels if labels.ndim == 1 else labels[:, 0]) >= 0)


def check_class_names(value: Any) -> tuple[str, ...]:
    """Checked names: at least one, different, not blank, without control characters."""
    names = check_names("class_names", value)
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if name in first:
            raise DataError(f"'class_names' gives entries {first[name]} and {i} the same name")
        first[name] = i
    return names


def check_strings(key: str, value: NDArray[Any]) -> list[str]:
    """The strings of an array of them."""
    check_layout(key, value.shape, value.dtype)
    codes = np.ascontiguousarray(value).view(np.dtype("u4").newbyteorder(value.dtype.byteorder))
    if codes.max() > sys.maxunicode:
        raise DataError(f"'{key}' holds characters that are not Unicode")
    found: list[str] = value.tolist()
    return found


def is_unprintable(name: str) -> bool:
    """Whether a string is blank or holds control characters."""
    return not name.strip() or any(category(character) in ("Cc", "Cs") for character in name)


def check_names(key: str, value: Any) -> tuple[str, ...]:
    """Checked strings: at least one, none blank or with control characters."""
    if isinstance(value, np.ndarray):
        value = check_strings(key, value)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) for name in value):
        raise DataError(f"'{key}' is not a list of strings")
    for i, name in enumerate(value):
        if is_unprintable(name):
            raise DataError(f"'{key}' entry {i} is blank or holds control characters")
    return tuple(str(name) for name in value)
