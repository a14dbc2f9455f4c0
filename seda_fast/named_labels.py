"""Labels that are the classes' names, as text: made the numbers that everything else counts by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import check_class_names, check_layout, check_strings, is_unprintable
from .files import DataError

UNLABELLED_NAME = ""


def numbered(
    arrays: Mapping[str, Any], class_names: Sequence[str] | None = None, *, need_one: bool = True
) -> dict[str, Any]:
    """``arrays`` with ``label_train`` and ``label_test`` (N,) of names as int64 numbers, -1 for the empty name.

    They count the classes in the order of ``class_names``: the array of that name, else the argument, else the sorted
    names in ``label_train``; the array is added where it is missing. Arrays of numbers are passed on as they are, and
    without ``need_one`` all names may be empty where no array tells them.

    Raises:
        DataError: one of the two holds names and the other numbers, or a row holds a name that is no class.
    """
    given = [name for name in ("label_train", "label_test") if name in arrays]
    found = {name: labels for name in given if (labels := _strings(name, arrays[name])) is not None}
    if not found:
        return dict(arrays)
    named = list(found)
    if len(named) < len(given):
        (other,) = set(given) - set(named)
        if isinstance(arrays[other], np.ndarray):
            check_layout(other, arrays[other].shape, arrays[other].dtype)
        raise DataError(f"'{named[0]}' holds names of classes but '{other}' does not; give both alike")
    if "class_names" in arrays:
        names, owner = check_class_names(arrays["class_names"]), "'class_names'"
    elif class_names is not None:
        names, owner = tuple(class_names), "the model"
    else:
        names, owner = tuple(sorted(set(found[named[0]]) - {UNLABELLED_NAME})), f"'{named[0]}'"
        if not names and not need_one:
            return {**arrays, named[0]: np.full(len(found[named[0]]), -1)}
        if not names:
            raise DataError(f"'{named[0]}' has no labelled row (all names are empty)")
    numbers = {name: _numbers(name, labels, names, owner) for name, labels in found.items()}
    return {**arrays, **numbers, "class_names": list(names)}


def _strings(name: str, labels: Any) -> list[str] | None:
    """The names that ``labels`` are, None where they are something else."""
    if isinstance(labels, np.ndarray):
        return check_strings(name, labels) if labels.dtype.kind == "U" else None
    if isinstance(labels, list | tuple) and labels and all(isinstance(label, str) for label in labels):
        return list(labels)
    return None


def _numbers(name: str, labels: Sequence[str], names: Sequence[str], owner: str) -> NDArray[np.int64]:
    number = {UNLABELLED_NAME: -1, **{class_name: k for k, class_name in enumerate(names)}}
    for row, label in enumerate(labels):
        if label and is_unprintable(label):
            raise DataError(f"row {row} of '{name}' is blank or holds control characters")
        if label not in number:
            raise DataError(f"row {row} of '{name}' is '{label[:60]}', which {owner} does not name")
    return np.array([number[label] for label in labels], dtype=np.int64)
