"""Paired features: read, check, split, standardise.

A set is a `.npz` or `.safetensors` file or a folder of `.npy` files with the arrays of `KEYS`, or "digits",
the embedded set. Everything is checked on reading; what cannot be used raises DataError with one sentence.
Labels are class numbers (N,), or multi-label (N, K): 1 where a row carries a class, 0 where not, or a row of -1.

Features are float16, float32 or float64 (bfloat16 in safetensors). Those read into memory are cast to float32
on reading; the arrays of a folder stay read-only memory maps in their own dtype, never loaded whole, and
`rows` casts what it takes from them. Labels are integers of any width, -1 meaning unlabelled; floating labels
are refused even when they hold whole numbers, since that is where a wrong column shows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import digits
from .arrays import (
    Features,
    Labels,
    Mask,
    Unpaired,
    check_class_names,
    check_labels,
    check_layout,
    check_names,
    check_text,
    check_visual,
    has_text,
    labelled_rows,
    mean_and_deviation,
    rows,
)
from .files import DataError, naming, read_arrays, read_npy, refuse_too_large
from .named_labels import numbered
from .nn.copies import first_copies
from .stratify import held_out_rows

__all__ = [
    "KEYS",
    "DataError",
    "EvaluationRows",
    "FeatureSet",
    "VisualRows",
    "load_visual",
    "mean_and_deviation",
    "rows",
    "split_rows",
]

KEYS = (
    "visual_train", "text_train", "label_train", "visual_test", "label_test", "text_test", "class_names",
    "text_classes",
)  # fmt: skip


# Names of the rows (images, say) of visual, visual_train and visual_test: optional, shown beside what is said of a row.
ROW_NAMES = ("names", "names_train", "names_test")
# Rows of a source whose features tell it from others.
_TOLD_BY = 64


@dataclass(frozen=True, eq=False)
class EvaluationRows:
    """Rows to measure a model on.

    visual (M, Dv); labels (M,) int64, -1 = unlabelled, or (M, K) int8; text (M, Dt) or None, a row all NaN
    where text is missing; class_names or None where the source names none; ids (M,) int64. Where the source has
    class texts and no text of rows, text is each row's class's, and text_classes (K, Dt) are they. ``split`` tells the
    rows that the part was cut from, None where the source has it as it is.
    """

    visual: Features
    labels: Labels
    text: Features | None
    class_names: tuple[str, ...] | None
    ids: Labels
    source: str
    text_classes: Features | None = None
    split: str | None = None

    @property
    def labelled(self) -> Mask:
        """(M,) bool, true where the label is known."""
        return labelled_rows(self.labels)

    @cached_property
    def paired(self) -> Mask:
        """(M,) bool, true where there is text."""
        return np.zeros(len(self.visual), dtype=bool) if self.text is None else has_text(self.text)


@dataclass(frozen=True, eq=False)
class VisualRows:
    """Rows to predict.

    visual (M, Dv), from the array ``key``; ids (M,) int64; where the source has them, labels as in `EvaluationRows`,
    class_names, and names (M,) of the rows.
    """

    visual: Features
    labels: Labels | None
    class_names: tuple[str, ...] | None
    ids: Labels
    source: str
    names: tuple[str, ...] | None = None
    key: str = "visual"


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """A checked training and test part; make it with `load` or `from_arrays`.

    visual_train (N, Dv) and text_train (N, Dt): a text row is all NaN where text is missing, which happens
    only with unpaired="keep"; Dt = 0 where there is no text at all, only with need_text=False. label_train
    (N,) int64, -1 = unlabelled; multi-label (N, K) int8. visual_test (M, Dv), label_test (M,) or (M, K),
    text_test (M, Dt) or None; the text of the test part is there to measure alignment. ids_train (N,) and
    ids_test (M,) int64: the row number within the part, or within the whole set where it was split here.
    text_classes (K, Dt): one text a class instead of one a row; text_train is then (N, 0), and every labelled
    row has its class's text. names_test (M,): names of the test rows, where the source has any. split: as in
    `EvaluationRows`.
    """

    visual_train: Features
    text_train: Features
    label_train: Labels
    visual_test: Features
    label_test: Labels
    text_test: Features | None
    class_names: tuple[str, ...]
    ids_train: Labels
    ids_test: Labels
    source: str
    text_classes: Features | None = None
    names_test: tuple[str, ...] | None = None
    split: str | None = None

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    @property
    def visual_dim(self) -> int:
        return int(self.visual_train.shape[1])

    @property
    def text_dim(self) -> int:
        return int((self.text_train if self.text_classes is None else self.text_classes).shape[1])

    @cached_property
    def paired_train(self) -> Mask:
        """(N,) bool, true where there is text."""
        return has_text(self.text_train) if self.text_classes is None else self.labelled_train

    @property
    def labelled_train(self) -> Mask:
        """(N,) bool, true where the label is known."""
        return labelled_rows(self.label_train)

    @property
    def multi_label(self) -> bool:
        """Whether a row carries any number of the classes."""
        return self.label_train.ndim == 2

    @property
    def test_part(self) -> EvaluationRows:
        """The test part as `load_test` gives it."""
        return EvaluationRows(
            self.visual_test, self.label_test, self.text_test, self.class_names, self.ids_test, self.source,
            self.text_classes, self.split,
        )  # fmt: skip

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        unpaired: Unpaired = "refuse",
        test_fraction: float = 0.2,
        seed: int = 0,
        need_text: bool = True,
    ) -> FeatureSet:
        """Reads a set with a training part from `path`, or the embedded one for "digits". Raises DataError.

        unpaired: "refuse" rows whose text is missing (all NaN), or "keep" them.
        test_fraction, seed: where the source has no test part, this share of the labelled rows becomes one,
            stratified by class (multi-label: iteratively, see `stratify`); unlabelled rows stay in training. Rows of
            equal features, as of an image with several captions, go into one part: into training where one of them
            is unlabelled. Both parts are then float32 in memory.
        need_text: False lets `text_train` be absent.
        """
        if str(path) == "digits":
            return _load_digits(test_fraction, seed)
        known = (*KEYS, *ROW_NAMES[1:])
        arrays = read_arrays(Path(path), wanted=known, known=known, layout=check_layout)
        with naming(path):
            return _build(arrays, str(path), unpaired, test_fraction, seed, need_text)

    @classmethod
    def from_arrays(
        cls,
        visual_train: Any,
        text_train: Any,
        label_train: Any,
        visual_test: Any = None,
        label_test: Any = None,
        text_test: Any = None,
        class_names: Sequence[str] | None = None,
        *,
        unpaired: Unpaired = "refuse",
        test_fraction: float = 0.2,
        seed: int = 0,
        need_text: bool = True,
        source: str = "arrays",
        text_classes: Any = None,
    ) -> FeatureSet:
        """Makes a set from anything that numpy takes as an array, with the checks and options of `load`.

        float32 arrays are kept without a copy, memory maps as they are. text_train may be None with
        need_text=False or with text_classes (K, Dt), one text a class, beside labels that are names in the order of
        class_names. Raises DataError.
        """
        given = (visual_train, text_train, label_train, visual_test, label_test, text_test, class_names, text_classes)
        arrays = {key: value for key, value in zip(KEYS, given, strict=True) if value is not None}
        with naming(source):
            return _build(arrays, source, unpaired, test_fraction, seed, need_text)

    @staticmethod
    def load_test(
        path: str | Path,
        *,
        visual_dim: int | None = None,
        text_dim: int | None = None,
        class_names: Sequence[str] | None = None,
        text_classes: Features | None = None,
        multi_label: bool | None = None,
        unpaired: Unpaired = "refuse",
        test_fraction: float | None = 0.2,
        seed: int = 0,
    ) -> EvaluationRows:
        """Reads the test part alone: `visual_test` and `label_test`, and `text_test` or `text_classes` where there.

        visual_dim, text_dim, class_names, text_classes, multi_label: the model's, where known; what does not fit is
            refused.
        A source with a training part only is split as `load` splits it, so the same fraction and seed give
        the rows that training did not see; with test_fraction None, where they are not known, it is refused. At least
        one row must be labelled. Raises DataError.
        """
        if str(path) == "digits":
            part = _load_digits(_known_fraction(test_fraction, path), seed).test_part
        else:
            part = _load_test_file(path, unpaired, test_fraction, seed, class_names)
        with naming(path):
            _check_width("visual_test", part.visual, visual_dim, "the model")
            if part.text is not None:
                _check_width("text_test", part.text, text_dim, "the model")
            if multi_label is not None:
                _check_kind("label_test", part.labels, multi_label, "the model")
            _check_against_model(part.labels, part.class_names, class_names)
            if part.text_classes is not None and text_classes is not None:
                _check_same_texts(part.text_classes, text_classes)
        return part


def load_visual(
    path: str | Path, *, visual_dim: int | None = None, test_fraction: float = 0.2, seed: int = 0
) -> VisualRows:
    """Reads rows to predict: the array `visual`, or else `visual_test`, or one single `.npy` array.

    Text is not read. `label_test`, `class_names` and `names` (or `names_test`) are taken along where they are there.
    "digits" gives the test part of that split. visual_dim: the model's, where known. Raises DataError.
    """
    if str(path) == "digits":
        part = _load_digits(test_fraction, seed).test_part
        found = VisualRows(part.visual, part.labels, part.class_names, part.ids, part.source)
    elif Path(path).suffix.lower() == ".npy" and not os.path.isdir(path):
        arrays: dict[str, Any] = {"visual": read_npy(Path(path), "visual", check_layout)}
        with naming(path):
            found = _visual_rows(arrays, str(path))
    else:
        wanted = ("visual", "visual_test", "label_test", "class_names", "names", "names_test")
        arrays = read_arrays(Path(path), wanted=wanted, known=("visual", *KEYS, *ROW_NAMES), layout=check_layout)
        with naming(path):
            found = _visual_rows(arrays, str(path))
    with naming(path):
        _check_width(found.key, found.visual, visual_dim, "the model")
    return found


def _require(arrays: Mapping[str, Any], *names: str) -> None:
    missing = [f"'{name}'" for name in names if name not in arrays]
    if missing:
        raise DataError(f"lacks the key{'s' * (len(missing) > 1)} {', '.join(missing)}")


def _check_length(name: str, array: NDArray[Any], other: str, length: int) -> None:
    if len(array) != length:
        raise DataError(f"'{name}' has {len(array)} rows but '{other}' has {length}")


def _check_width(name: str, array: NDArray[Any], width: int | None, other: str) -> None:
    if width is not None and array.shape[1] != width:
        raise DataError(f"'{name}' has {array.shape[1]} columns but {other} has {width}")


def _check_named(name: str, labels: Labels, class_names: Sized, owner: str = "'class_names'") -> None:
    if labels.ndim == 2:
        if labels.shape[1] != len(class_names):
            raise DataError(f"'{name}' has {labels.shape[1]} columns but {owner} has {len(class_names)} entries")
        return
    row = int(np.argmax(labels))
    if labels[row] >= len(class_names):
        raise DataError(f"'{name}' holds {labels[row]} in row {row} but {owner} has {len(class_names)} entries")


def _check_kind(name: str, labels: Labels, multi_label: bool, owner: str) -> None:
    if (labels.ndim == 2) != multi_label:
        kinds = ("class numbers, of 1 dimension", "multi-label rows, of 2 dimensions")
        found, needed = kinds[labels.ndim == 2], kinds[multi_label]
        raise DataError(f"'{name}' holds {found}, but {owner} has {needed}")


def _named(labels: Labels, class_names: Any) -> tuple[str, ...]:
    """The class names: those given, else the numbers of the classes, which must then run without a gap."""
    if class_names is not None:
        names = check_class_names(class_names)
        _check_named("label_train", labels, names)
        return names
    if labels.ndim == 2:
        return tuple(str(column) for column in range(labels.shape[1]))
    present = np.unique(labels[labels >= 0])
    gap = np.flatnonzero(present != np.arange(len(present)))
    if len(gap):
        raise DataError(
            f"'label_train' holds class {present[-1]} but no class {gap[0]}; number the classes without gaps "
            "or give 'class_names'"
        )
    return tuple(str(label) for label in present)


def _check_options(unpaired: str, test_fraction: float, seed: int) -> None:
    if unpaired not in ("refuse", "keep"):
        raise DataError(f"unpaired is {unpaired!r}; 'refuse' or 'keep' is needed")
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction is {test_fraction}; a number between 0 and 1 is needed")
    if seed < 0:
        raise DataError(f"the seed is {seed}; 0 or more is needed")


def _numbered(arrays: Mapping[str, Any], class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """`numbered`, where that leaves no doubt which row of ``text_classes`` is of which class: whoever writes them down
    as [dog, cat] does not think of the order in which names sort."""
    found = numbered(arrays, class_names)
    if "text_classes" in arrays and class_names is None and "class_names" in found and "class_names" not in arrays:
        raise DataError(
            "'text_classes' needs 'class_names', which say which row is of which class, where labels are names of "
            "classes"
        )
    return found


def _build(
    arrays: Mapping[str, Any],
    source: str,
    unpaired: Unpaired,
    test_fraction: float,
    seed: int,
    need_text: bool,
) -> FeatureSet:
    _check_options(unpaired, test_fraction, seed)
    arrays = _numbered(arrays)
    if "text_train" in arrays and "text_classes" in arrays:
        raise DataError(
            "holds both 'text_train' and 'text_classes'; give one text of each row or one text of each class, not both"
        )
    by_class = "text_classes" in arrays
    _require(arrays, "visual_train", "label_train", *(["text_train"] if need_text and not by_class else []))
    visual = check_visual("visual_train", arrays["visual_train"], learnt=True)
    labels = check_labels("label_train", arrays["label_train"])
    _check_length("label_train", labels, "visual_train", len(visual))
    if "text_train" in arrays:
        text, paired = check_text("text_train", arrays["text_train"], unpaired, learnt=True)
        _check_length("text_train", text, "visual_train", len(visual))
    else:
        text, paired = np.zeros((len(visual), 0), dtype=np.float32), np.zeros(len(visual), dtype=bool)
    names = _named(labels, arrays.get("class_names"))
    _refuse_one_class(labels, names)
    classes = None
    if by_class:
        _refuse_multi_label("label_train", labels)
        unnamed = "'label_train' (give 'class_names' where some have no row)"
        owner = "'class_names'" if "class_names" in arrays else unnamed
        classes, paired = _class_texts(arrays["text_classes"], names, owner, learnt=True), labels >= 0
        if unpaired == "refuse":
            _refuse_unlabelled(labels)
    if need_text and not paired.any():
        raise DataError("'text_train' has no row with text (all are NaN)")
    ids = np.arange(len(visual), dtype=np.int64)
    row_names = _row_names(arrays, "visual_train", len(visual))
    if any(key in arrays for key in ("visual_test", "label_test", "text_test", "names_test")):
        given = names if "class_names" in arrays else None
        test = _evaluation_rows(arrays, source, unpaired, given, labels.ndim == 2)
        if labels.ndim == 2:
            _check_width("label_test", test.labels, labels.shape[1], "'label_train'")
        _check_width("visual_test", test.visual, visual.shape[1], "'visual_train'")
        if test.text is not None and text.shape[1]:
            _check_width("text_test", test.text, text.shape[1], "'text_train'")
        _check_known_classes(labels, test.labels, names)
        made = FeatureSet(
            visual, text, labels, test.visual, test.labels, test.text, names, ids, test.ids, source, classes,
            _row_names(arrays, "visual_test", len(test.visual)),
        )  # fmt: skip
    else:
        refuse_too_large(4 * (visual.size + text.size))
        images = first_copies(torch.from_numpy(rows(visual, ids))).numpy()
        train, held_out = split_rows(labels, test_fraction, seed, images, names)
        made = FeatureSet(
            rows(visual, train), rows(text, train), labels[train],
            rows(visual, held_out), labels[held_out],
            class_text_rows(classes, labels[held_out]) if classes is not None
            else rows(text, held_out) if text.shape[1] else None,
            names, train, held_out, source, classes,
            None if row_names is None else tuple(row_names[i] for i in held_out.tolist()), told_rows(visual, labels),
        )  # fmt: skip
        paired = paired[train]
        if need_text and not paired.any():
            raise DataError("no row with text is left in the training part of the split")
    vars(made)["paired_train"] = paired  # known already: saves a pass over a memory map
    return made


def told_rows(visual: Features, labels: Labels) -> str:
    """What tells these rows in their order from others: their labels, and the features of some."""
    some = rows(visual, np.linspace(0, len(visual) - 1, min(_TOLD_BY, len(visual))).astype(np.int64))
    told = hashlib.sha256(np.ascontiguousarray(labels).tobytes() + np.ascontiguousarray(some).tobytes())
    return told.hexdigest()


def told_texts(part: EvaluationRows) -> str | None:
    """The same of the rows' texts; None without any."""
    return None if part.text is None else told_rows(part.text, part.labels)


def _evaluation_rows(
    arrays: Mapping[str, Any],
    source: str,
    unpaired: Unpaired,
    names: tuple[str, ...] | None,
    multi_label: bool | None = None,
    *,
    owner: str = "'class_names'",
) -> EvaluationRows:
    _require(arrays, "visual_test", "label_test")
    visual = check_visual("visual_test", arrays["visual_test"])
    labels = check_labels("label_test", arrays["label_test"])
    _check_length("label_test", labels, "visual_test", len(visual))
    text = None
    if "text_test" in arrays:
        text = check_text("text_test", arrays["text_test"], unpaired)[0]
        _check_length("text_test", text, "visual_test", len(visual))
    if multi_label is not None:
        _check_kind("label_test", labels, multi_label, "'label_train'")
    if names is not None:
        _check_named("label_test", labels, names, owner)
    classes = None
    if "text_classes" in arrays:
        _refuse_multi_label("label_test", labels)
        classes = _class_texts(arrays["text_classes"], names, owner)
        if text is not None:
            _check_width("text_test", text, classes.shape[1], "'text_classes'")
        else:
            _check_named("label_test", labels, classes, "'text_classes'")
            text = class_text_rows(classes, labels)
    return EvaluationRows(visual, labels, text, names, np.arange(len(visual), dtype=np.int64), source, classes)


def _refuse_multi_label(name: str, labels: Labels) -> None:
    if labels.ndim == 2:
        raise DataError(f"'{name}' holds multi-label rows, but class texts ('text_classes') need one class a row")


def _class_texts(value: Any, names: Sequence[str] | None, owner: str, *, learnt: bool = False) -> Features:
    """Checked class texts (K, Dt) float32 in memory, a row for each of ``names``, which are the ``owner``'s."""
    texts = check_visual("text_classes", value, learnt=learnt)
    if names is not None and len(texts) != len(names):
        raise DataError(f"'text_classes' has {len(texts)} rows but there are {len(names)} classes in {owner}")
    return rows(texts, slice(None))


def class_text_rows(classes: Features, labels: Labels) -> Features:
    """The text (M, Dt) float32 of each row's class, NaN where a row is unlabelled."""
    text = rows(classes, np.maximum(labels, 0))
    text[labels < 0] = np.nan
    return text


def _shown_class(label: int, names: Sequence[str] | None) -> str:
    """A class as its user knows it: by name where names were given, which numbers only stand for."""
    name = str(label) if names is None else names[label]
    return f"class {label}" if name == str(label) else f"class {label} ('{name[:60]}')"


def _refuse_one_class(labels: Labels, names: Sequence[str]) -> None:
    """Of one class there is nothing to learn: every row would be called it, rightly as it seems."""
    if labels.ndim == 1 and len(present := np.unique(labels[labels >= 0])) == 1:
        raise DataError(f"'label_train' holds {_shown_class(present[0], names)} alone; rows of two classes are needed")


def _refuse_unlabelled(labels: Labels) -> None:
    """A row without a label has no class's text, and would train nothing."""
    unlabelled = labels < 0
    if unlabelled.any():
        raise DataError(
            f"'label_train' holds -1 in {unlabelled.sum()} of {len(labels)} rows (first in row "
            f"{int(np.argmax(unlabelled))}), which thus have no class's text; unpaired='keep' (--unpaired keep) "
            "admits them"
        )


def _check_same_texts(found: Features, model: Features) -> None:
    if found.shape != model.shape:
        raise DataError(f"'text_classes' has shape {found.shape} but the model's class texts have {model.shape}")
    spread = np.maximum(model.std(axis=0), np.abs(model).max() * 1e-3)
    other = (np.abs(found - model) > 1e-3 * spread).any(axis=1)
    if other.any():
        raise DataError(
            f"'text_classes' are not those that the model was trained with: row {int(np.argmax(other))} is another"
        )


def _check_known_classes(train: Labels, test: Labels, names: Sequence[str]) -> None:
    if train.ndim == 2:
        return  # that no training row carries a class is something to learn too
    unknown = (test >= 0) & ~np.isin(test, train)
    if unknown.any():
        row = int(np.argmax(unknown))
        shown = _shown_class(test[row], names) if test[row] < len(names) else f"class {test[row]}"
        raise DataError(f"'label_test' holds {shown} in row {row}, which 'label_train' lacks")


def _known_fraction(test_fraction: float | None, path: str | Path) -> float:
    if test_fraction is None:
        raise DataError(
            f"{path} has no test part of its own, and the model's folder has no config.toml that tells the rows it was "
            "trained on; give data with visual_test and label_test"
        )
    return test_fraction


def _load_test_file(
    path: str | Path, unpaired: Unpaired, test_fraction: float | None, seed: int, class_names: Sequence[str] | None
) -> EvaluationRows:
    wanted = ("visual_test", "label_test", "text_test", "class_names", "text_classes")
    known = (*KEYS, *ROW_NAMES[1:])
    arrays = read_arrays(Path(path), wanted=wanted, known=known, layout=check_layout)
    if not set(arrays) - {"class_names", "text_classes"}:
        whole = read_arrays(Path(path), wanted=known, known=known, layout=check_layout)
        with naming(path):
            if "visual_train" not in whole:
                _require(arrays, "visual_test", "label_test")
            fraction = _known_fraction(test_fraction, path)
            return _build(whole, str(path), unpaired, fraction, seed, need_text=False).test_part
    with naming(path):
        _check_options(unpaired, 0.5 if test_fraction is None else test_fraction, seed)
        owner = "'class_names'" if "class_names" in arrays else "the model"
        arrays = _numbered(arrays, class_names)
        names = check_class_names(arrays["class_names"]) if "class_names" in arrays else None
        return _evaluation_rows(arrays, str(path), unpaired, names, owner=owner)


def _check_against_model(labels: Labels, found: Sequence[str] | None, model: Sequence[str] | None) -> None:
    if model is None:
        return
    _check_named("label_test", labels, model, "the model")
    if found is not None and tuple(found) != tuple(model):
        raise DataError(f"'class_names' are not the model's: {_difference(found, model)}")


def _difference(found: Sequence[str], model: Sequence[str]) -> str:
    for i, (one, other) in enumerate(zip(found, model, strict=False)):
        if one != other:
            return f"entry {i} is '{one[:60]}' here and '{other[:60]}' there"
    return f"{len(found)} here and {len(model)} there"


def _visual_rows(arrays: Mapping[str, Any], source: str) -> VisualRows:
    if "visual" in arrays and "visual_test" in arrays:
        raise DataError("holds both 'visual' and 'visual_test'; one is needed")
    name = "visual" if "visual" in arrays else "visual_test"
    if name not in arrays:
        raise DataError("lacks the key 'visual' or 'visual_test'")
    visual = check_visual(name, arrays[name])
    arrays = numbered(arrays, need_one=False)
    labels = names = None
    if "label_test" in arrays:
        labels = check_labels("label_test", arrays["label_test"], need_one=False)
        _check_length("label_test", labels, name, len(visual))
    if "class_names" in arrays:
        names = check_class_names(arrays["class_names"])
        if labels is not None:
            _check_named("label_test", labels, names)
    ids = np.arange(len(visual), dtype=np.int64)
    return VisualRows(visual, labels, names, ids, source, _row_names(arrays, name, len(visual)), name)


def _row_names(arrays: Mapping[str, Any], of: str, length: int) -> tuple[str, ...] | None:
    """The names of the rows of the array ``of``, where there are any."""
    key = of.replace("visual", "names")
    if key not in arrays:
        return None
    names = check_names(key, arrays[key])
    if len(names) != length:
        raise DataError(f"'{key}' has {len(names)} entries but '{of}' has {length} rows")
    return names


def split_rows(
    labels: Labels,
    test_fraction: float,
    seed: int,
    images: Labels | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[Labels, Labels]:
    """Ascending row numbers of the training and of the test part: stratified, unlabelled rows in training.

    ``images`` (N,) are the rows' `first_copies`: rows of an image go into one part, into training where one of them is
    unlabelled. None: each row is an image of its own. ``class_names`` are for refusals.

    Raises:
        DataError: no row is labelled, or there are too few rows of some class.
    """
    every, known = np.arange(len(labels)), labelled_rows(labels)
    if not known.any():
        raise DataError("no row is labelled, so no test part can be split off")
    images = every if images is None else images
    # One row an image is drawn, and the others follow.
    drawn_from = np.flatnonzero(known & (images == every) & ~np.isin(images, images[~known]))
    if labels.ndim == 1:
        drawn_from = _a_class_each(labels, images, drawn_from)
    if labels.ndim == 2:
        drawn = drawn_from[held_out_rows(_carried(labels, images, drawn_from), test_fraction, seed)]
    else:
        drawn = _drawn_rows(labels, drawn_from, test_fraction, seed, class_names)
    held_out = np.isin(images, images[drawn])
    if labels.ndim == 1 and len(np.unique(labels[known & ~held_out])) < len(np.unique(labels[known])):
        raise DataError(_too_few(labels, drawn_from, test_fraction))
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _a_class_each(labels: Labels, images: Labels, first: Labels) -> Labels:
    """A row of each image whose first rows are ``first`` (n,): that, and where its rows are of several classes, one of
    that class which has the fewest images so far, so that none is left without because its rows always come second."""
    differ = np.unique(images[labels != labels[images]])
    several = np.flatnonzero(np.isin(images, np.intersect1d(differ, first)))
    by_image = several[np.argsort(images[several], kind="stable")]
    chosen = np.setdiff1d(first, differ)
    have = np.bincount(labels[chosen], minlength=labels.max() + 1)
    instead = []
    for of_image in np.split(by_image, np.flatnonzero(np.diff(images[by_image])) + 1):
        classes, one_each = np.unique(labels[of_image], return_index=True)
        if len(classes):
            rarest = int(np.argmin(have[classes]))
            have[classes[rarest]] += 1
            instead.append(int(of_image[one_each[rarest]]))
    return np.sort(np.concatenate((chosen, np.array(instead, dtype=np.int64))))


def _carried(labels: Labels, images: Labels, first: Labels) -> Labels:
    """What the rows of each image carry together, (n, K), its first rows ``first`` (n,) ascending: they go together."""
    own = np.flatnonzero(np.isin(images, first))
    carried = np.zeros((len(first), labels.shape[1]), dtype=labels.dtype)
    np.maximum.at(carried, np.searchsorted(first, images[own]), labels[own])
    return carried


def _too_few(labels: Labels, rows: Labels, test_fraction: float) -> str:
    return (
        f"a test_fraction of {test_fraction} of {len(rows)} labelled rows leaves too few rows in a part "
        f"for {len(np.unique(labels[rows]))} classes"
    )


def _drawn_rows(
    labels: Labels, labelled: Labels, test_fraction: float, seed: int, class_names: Sequence[str] | None
) -> Labels:
    """A stratified share of the rows ``labelled``, one of each image."""
    classes, of_rows = np.unique(labels[labels >= 0], return_counts=True)
    of_images = np.bincount(labels[labelled], minlength=classes[-1] + 1)[classes]
    if of_images.min() < 2:
        worst = int(np.argmin(of_images))
        if of_rows[worst] == 1:
            has = "one labelled row"
        elif of_images[worst]:
            has = "labelled rows of one image only (their features are equal)"
        else:  # an image with unlabelled rows stays in training
            has = "no image (rows of equal features) that has no unlabelled rows and no other class's"
        raise DataError(
            f"{_shown_class(classes[worst], class_names)} has {has}, so no test part can be split off; "
            "give 'visual_test' and 'label_test', or leave the class out"
        )
    state = int(np.random.SeedSequence(seed).generate_state(1)[0])  # scikit-learn takes 32 bits only
    split = digits.scikit_learn("model_selection").train_test_split
    try:
        return np.asarray(
            split(labelled, test_size=test_fraction, stratify=labels[labelled], random_state=state)[1], dtype=np.int64
        )
    except ValueError as error:
        raise DataError(_too_few(labels, labelled, test_fraction)) from error


def _load_digits(test_fraction: float, seed: int) -> FeatureSet:
    with naming("digits"):
        _check_options("refuse", test_fraction, seed)
        visual, labels = digits.pixels()
        train, test = split_rows(labels, test_fraction, seed)
        texts = digits.compose_texts(labels)
        text_train, text_test = digits.text_features([texts[i] for i in train], [texts[i] for i in test])
        return FeatureSet(
            visual[train], text_train, labels[train], visual[test], labels[test], text_test,
            digits.CLASS_NAMES, train, test, "digits", split=told_rows(visual, labels),
        )  # fmt: skip
