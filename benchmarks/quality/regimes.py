"""Data sets, their folds, and the regimes that a training part is put through."""

from __future__ import annotations

import gzip
import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from seda_fast.data import FeatureSet
from seda_fast.files import DataError
from seda_fast.nn.copies import first_copies

Float = NDArray[np.float32]
Int = NDArray[np.int64]

SETS = {"fashion_products": "fashion_products", "wikipedia": "wikipedia", "cub10": "cub10_googlenet_doc2vec"}
# Not of those, as it needs no file: the images and sentences that `FeatureSet.load` has under this name.
EMBEDDED = "digits"
REGIMES = (
    "full",
    "labels-4",
    "labels-8",
    "labels-16",
    "samples-4",
    "samples-8",
    "samples-16",
    "noise",
    "tail",
    "half-text",
    "wrong-labels",
)
ABOUT = {
    "full": "every training row with label and text",
    "labels-N": "N labelled rows per class, all other training pairs unlabelled",
    "samples-N": "N rows per class and nothing else",
    "noise": "half a standard deviation of Gaussian noise on all visual features, test part included",
    "tail": "class sizes fall geometrically from the largest to a 50th of it",
    "half-text": "half of the texts missing",
    "wrong-labels": "30 % of the training rows, drawn at random, have the label of another class, each as likely",
}
# Of the published sets.
ABOUT_TAIL = (
    " (of cub10's 42 rows a class: to one); fashion_products, whose classes differ by 31 times as they are, keeps 5090 "
    "of its 5216 rows, wikipedia 972 of 2173, cub10 117 of 420"
)
IMBALANCE = 50
NOISE = 0.5
WRONG = 0.3


@dataclass(frozen=True)
class Rows:
    """Triples: visual (N, Dv), text (N, Dt) with NaN rows where it is missing, labels (N,) int64, -1 unlabelled."""

    visual: Float
    text: Float
    labels: Int

    def take(self, index: NDArray[np.generic]) -> Rows:
        """The rows of an index or mask."""
        return Rows(self.visual[index], self.text[index], self.labels[index])


@dataclass(frozen=True)
class Task:
    """What a method is trained on and what it is measured on."""

    train: Rows
    test: Rows
    n_classes: int


@dataclass(frozen=True)
class DataSet:
    """A set with its own test part; rows of one class and group (equal titles, or equal visual features of a set that
    is not of `SETS`) never lie on both sides of a fold."""

    name: str
    task: Task
    groups: Int


def load(name: str, folder: Path) -> DataSet:
    """One of `SETS` from ``folder``, or what `FeatureSet.load` takes from another file NAME.npz there, or `EMBEDDED`.

    Raises DataError where the regimes cannot be made of it.
    """
    if is_embedded(name, folder):
        return _own(name, Path(EMBEDDED))
    file, *titles = files_of(name, folder, folds=True).values()
    if name not in SETS:
        return _own(name, file)
    try:
        return _published(name, file, titles[0])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{file}, or the titles beside it, cannot be read: {error}") from None


def is_embedded(name: str, folder: Path) -> bool:
    """Whether a set is the one that needs no file, and ``folder`` has none of that name."""
    return name == EMBEDDED and not (folder / f"{name}.npz").is_file()


def files_of(name: str, folder: Path, folds: bool) -> dict[str, Path]:
    """What a set is read from, by what it is called in records: its features, and for ``folds`` of one of `SETS` the
    titles by which rows are kept together, if there are such."""
    found = {name: folder / f"{SETS.get(name, name)}.npz"}
    if folds and name in SETS:
        found[f"titles of {name}"] = folder / f"{SETS[name]}.texts.json.gz"
    return found


def _published(name: str, file: Path, titles: Path) -> DataSet:
    with np.load(file, allow_pickle=False) as source:
        parts = [
            Rows(source[f"visual_{p}"].astype(np.float32), source[f"text_{p}"].astype(np.float32), source[f"label_{p}"])
            for p in ("train", "test")
        ]
        n_classes = len(source["class_names"])
    groups = np.arange(len(parts[0].labels))
    if titles.is_file():
        with gzip.open(titles, "rt", encoding="utf-8") as stream:
            groups = np.unique(json.load(stream)["train"], return_inverse=True)[1]
    return DataSet(name, Task(parts[0], parts[1], n_classes), groups)


def _own(name: str, file: Path) -> DataSet:
    found = FeatureSet.load(file, unpaired="keep")
    if found.multi_label or found.text_classes is not None:
        raise DataError(f"{file}: the regimes are made of one label and one text a row")
    for part, labels in (("train", found.label_train), ("test", found.label_test)):
        if (labels < 0).any():
            row = int((labels < 0).argmax())
            raise DataError(f"{file}: row {row} of 'label_{part}' is unlabelled; the regimes hide labels themselves")
    if found.text_test is None or np.isnan(found.text_test).any():
        raise DataError(f"{file}: every test row must have its text in 'text_test', which alignment is measured with")
    train = Rows(np.asarray(found.visual_train), np.asarray(found.text_train), found.label_train)
    test = Rows(np.asarray(found.visual_test), np.asarray(found.text_test), found.label_test)
    return DataSet(name, Task(train, test, found.n_classes), first_copies(torch.from_numpy(train.visual)).numpy())


def fold(data: DataSet, index: int, folds: int, seed: int) -> Task:
    """Fold ``index`` of a stratified, grouped cross-validation of the training part; the test part is not touched."""
    rows, rng = data.task.train, np.random.default_rng(seed)
    held = np.zeros(len(rows.labels), dtype=bool)
    for label in range(data.task.n_classes):
        members = np.flatnonzero(rows.labels == label)
        order = {g: i for i, g in enumerate(rng.permutation(np.unique(data.groups[members])))}
        position = np.array([order[g] for g in data.groups[members]])
        held[members[position % folds == index]] = len(order) > 1
    return Task(rows.take(~held), rows.take(held), data.task.n_classes)


def apply(regime: str, task: Task, seed: int) -> Task:
    """The task in a regime of `REGIMES`; which rows, labels or texts are lost depends on ``seed``."""
    kind, _, number = regime.partition("-")
    rng, train = np.random.default_rng(seed), task.train
    if kind == "full":
        return task
    if kind in ("labels", "samples"):
        keep = _first(rng, train.labels, dict.fromkeys(range(task.n_classes), int(number)))
        if kind == "samples":
            return replace(task, train=train.take(keep))
        return replace(task, train=replace(train, labels=np.where(keep, train.labels, -1)))
    if kind == "tail":
        return replace(task, train=train.take(_first(rng, train.labels, _tail(rng, train.labels))))
    if kind == "noise":
        deviation = NOISE * train.visual.std(0)
        noisy = [
            replace(part, visual=part.visual + (deviation * rng.standard_normal(part.visual.shape)).astype(np.float32))
            for part in (train, task.test)
        ]
        return Task(noisy[0], noisy[1], task.n_classes)
    if regime == "half-text":
        missing = rng.permutation(len(train.labels)) < len(train.labels) // 2
        return replace(task, train=replace(train, text=np.where(missing[:, None], np.float32(np.nan), train.text)))
    if regime == "wrong-labels":
        wrong = rng.permutation(len(train.labels)) < round(WRONG * len(train.labels))
        others = (train.labels + rng.integers(1, task.n_classes, len(train.labels))) % task.n_classes
        return replace(task, train=replace(train, labels=np.where(wrong, others, train.labels)))
    raise ValueError(f"regime must be one of {', '.join(REGIMES)}, not {regime!r}")


def _first(rng: np.random.Generator, labels: Int, counts: dict[int, int]) -> NDArray[np.bool_]:
    """A mask of up to ``counts[label]`` random rows of each class."""
    keep = np.zeros(len(labels), dtype=bool)
    for label, count in counts.items():
        keep[rng.permutation(np.flatnonzero(labels == label))[:count]] = True
    return keep


def _tail(rng: np.random.Generator, labels: Int) -> dict[int, int]:
    """Class sizes from the largest class's down to a 50th of it, at least 1.

    The larger a class is, the more it keeps, in random order among equals: in an order by chance small classes would
    be asked for more rows than they have, and the sizes would fall less far.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    order = rng.permutation(len(classes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    falling = sizes.max() * IMBALANCE ** (-np.arange(len(classes)) / (len(classes) - 1))
    return {int(classes[i]): max(1, round(size)) for i, size in zip(order, falling, strict=True)}
