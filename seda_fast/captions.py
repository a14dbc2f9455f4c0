"""The table that names images and says what belongs to them: columns image, text, label and optionally split.

And the table of one text a class, label and text, which may stand in place of the column text.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from .arrays import check_class_names, is_unprintable
from .files import DataError, naming, show

COLUMNS = ("image", "text", "label")
CLASS_COLUMNS = ("label", "text")
PARTS = ("train", "test")


@dataclass(frozen=True)
class Captions:
    """N rows: ``images`` paths relative to the images' folder, of which one may stand in several rows, always in the
    same part and with one label; ``texts``, "" where there is none; ``labels`` (N,) int64, numbers of ``class_names``,
    or (N, K) int8 of 0 and 1 where a row may carry several, -1 where there is none; ``train`` (N,) bool, or None
    without a column split."""

    images: tuple[str, ...]
    texts: tuple[str, ...]
    labels: NDArray[np.int64] | NDArray[np.int8]
    train: NDArray[np.bool_] | None
    class_names: tuple[str, ...]


def read_captions(path: Path, separator: str = "", *, by_class: bool = False) -> Captions:
    """Read and check a UTF-8 CSV file with a header line.

    An empty text is a missing one, an empty label an unlabelled row. Classes are sorted, as numbers where all are.
    With a ``separator`` a label names any number of classes; the separator alone is a row that carries none. With
    ``by_class`` texts are given by class elsewhere: the column text may be missing, and must be empty.

    Raises:
        DataError: one sentence that names the file and the line.
    """
    with naming(path):
        table = _captions(path, tuple(name for name in COLUMNS if name != "text" or not by_class))
        rows = [row for _, row in table]
        labels = [_carried(row["label"], separator) for row in rows]
        for (line, _), label in zip(table, labels, strict=True):
            bad = next((name for name in label or () if is_unprintable(name)), None)
            if bad is not None:
                raise DataError(f"line {line}: the class {show(bad)} holds control characters")
        _check_images(table, labels, separator)
        named = {name for label in labels for name in label or ()}
        names = sorted(named, key=_order(named))
        if not names:
            raise DataError("gives no row a label")
        texts = tuple(row.get("text", "").strip() for row in rows)
        if not by_class and not any(texts):
            raise DataError("gives no row a text")
        if by_class and any(texts):
            raise DataError("gives rows a text, and there is one of each class; give the one or the other, not both")
        numbers = {name: number for number, name in enumerate(check_class_names(names))}
        train = None
        if "split" in rows[0]:
            train = np.array([row["split"] == "train" for row in rows])
            _check_split(labels, train)
        return Captions(
            tuple(row["image"] for row in rows),
            texts,
            _several(labels, numbers) if separator else _single(labels, numbers),
            train,
            tuple(names),
        )


def read_class_texts(path: Path, class_names: Sequence[str]) -> dict[str, str]:
    """The text of each class of a UTF-8 CSV file with the columns label and text, ``class_names`` all among them.

    Raises:
        DataError: one sentence that names the file; a class without a text, or with two, is one of the reasons.
    """
    with naming(path):
        texts: dict[str, str] = {}
        for line, row in _table(path, CLASS_COLUMNS):
            name, text = row["label"].strip(), row["text"].strip()
            if not name:
                raise DataError(f"line {line} names no class")
            if is_unprintable(name):
                raise DataError(f"line {line}: the class {show(name)} holds control characters")
            if not text:
                raise DataError(f"line {line}: the class {show(name)} has no text")
            if name in texts:
                raise DataError(f"line {line}: the class {show(name)} has a text already")
            texts[name] = text
        without = [name for name in class_names if name not in texts]
        if without:
            raise DataError(f"gives the class {show(without[0])} no text")
        return texts


def _carried(label: str, separator: str) -> list[str] | None:
    """The classes that a label names; None where there is no label."""
    if not label.strip() and not (separator and separator in label):
        return None
    # A separator that ends in a blank may have lost it at the label's end.
    names = f" {label} ".split(separator) if separator else [label]
    return [name.strip() for name in names if name.strip()]


def _single(labels: list[list[str] | None], numbers: dict[str, int]) -> NDArray[np.int64]:
    return np.array([-1 if label is None else numbers[label[0]] for label in labels], dtype=np.int64)


def _several(labels: list[list[str] | None], numbers: dict[str, int]) -> NDArray[np.int8]:
    found = np.zeros((len(labels), len(numbers)), dtype=np.int8)
    for row, label in zip(found, labels, strict=True):
        row[[numbers[name] for name in label or ()]] = 1
        if label is None:
            row[:] = -1
    return found


def _order(names: set[str]) -> type[int] | None:
    try:
        different = {int(name) for name in names}
    except ValueError:
        return None
    return int if len(different) == len(names) else None


def _table(path: Path, columns: Sequence[str], also: str = "") -> list[tuple[int, dict[str, str]]]:
    """The rows of a file below its header, each with the number of its last line; at least one."""
    may = f" and may name {also}" if also else ""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(_rows(file, columns, f"its header must name {', '.join(columns)}{may}"))
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot be read as a UTF-8 table ({cause})") from error
    if not rows:
        raise DataError("holds no row below its header")
    return rows


def _rows(file: Iterator[str], columns: Sequence[str], rule: str) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(file, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(header, columns, rule)
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(f"line {reader.line_num} has {len(fields)} fields where the header has {len(header)}")
            yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"cannot be read as a UTF-8 table (line {reader.line_num}: {error})") from error


def _check_header(header: Sequence[str], columns: Sequence[str], rule: str) -> None:
    missing = [name for name in columns if name not in header]
    if missing:
        # What a spreadsheet writes where the comma is a decimal sign.
        other = next((sign for sign in ";\t|" if len(header) == 1 and sign in header[0]), None)
        if other is not None:
            raise DataError(
                f"has one column, parted by {other!r}; a table whose columns are parted by commas is needed"
            )
        raise DataError(f"lacks the column {missing[0]}; {rule}")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise DataError(f"has the column {show(twice[0])} twice")


def _captions(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    rows = []
    for line, row in _table(path, columns, "split"):
        image = PurePosixPath(row["image"])
        if not row["image"].strip() or image.is_absolute() or ".." in image.parts:
            raise DataError(f"line {line}: {show(row['image'])} is no path below the images' folder")
        given = {**row, "image": str(image)}  # one spelling: a/b.png for ./a//b.png
        if "split" in row:
            given["split"] = row["split"].strip()
            if given["split"] not in PARTS:
                raise DataError(f"line {line}: the split {show(row['split'])} is neither train nor test")
        rows.append((line, given))
    return rows


def _check_images(table: list[tuple[int, dict[str, str]]], labels: list[list[str] | None], separator: str) -> None:
    """An image in several rows lies in one part, or the test part would hold what training saw, and has one label."""
    part: dict[str, tuple[int, str]] = {}
    label_of: dict[str, tuple[int, set[str]]] = {}
    for (line, row), label in zip(table, labels, strict=True):
        first, split = part.setdefault(row["image"], (line, row.get("split", "")))
        if row.get("split", "") != split:
            raise DataError(f"line {line}: the image {show(row['image'])} is in the other part in line {first}")
        if label is None:
            continue
        first, named = label_of.setdefault(row["image"], (line, set(label)))
        if set(label) != named:
            hint = "" if separator else "; several classes of one image go into one label, with --label-separator"
            raise DataError(f"line {line}: the image {show(row['image'])} has another label in line {first}{hint}")


def _check_split(labels: list[list[str] | None], train: NDArray[np.bool_]) -> None:
    if not train.any():
        raise DataError("has no row whose split is train")
    known = {name for label, is_train in zip(labels, train, strict=True) if is_train for name in label or ()}
    for label, is_train in zip(labels, train, strict=True):
        unknown = [name for name in label or () if name not in known and not is_train]
        if unknown:
            raise DataError(f"the class {show(unknown[0])} is in the test part but not in the training part")
