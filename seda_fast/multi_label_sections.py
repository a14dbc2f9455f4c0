"""What the report of a run tells where a row carries any number of the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import labelled_rows
from .measure import MULTI_LABEL_COLUMNS
from .metrics import ECE_BINS, average_precisions
from .nn.multi_label import THRESHOLD
from .page import bar_chart, folded, paragraph, picture, section, table

Arrays = Mapping[str, NDArray[Any]]

_DRAWS = 200
_CLASSES = 12
_DECISIONS = 15


def resampled_map(labels: NDArray[Any], log_probas: Sequence[NDArray[Any]], seed: int = 0) -> NDArray[np.float64]:
    """Mean average precision, in percent, of each of M methods on resampled rows: (draws, M).

    A draw has the same rows for all methods (a paired bootstrap) and leaves out the classes that none of them carries;
    where it has no class at all it is left out. Rows of equal scores are ranked together, as scikit-learn ranks them.
    """
    rows, truth = len(labels), labels > 0
    weights = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=_DRAWS).astype(np.float64)
    found = np.full((_DRAWS, len(log_probas), labels.shape[1]), np.nan)
    for k in np.flatnonzero(truth.any(axis=0)):
        for m, log_proba in enumerate(log_probas):
            order = np.argsort(-log_proba[:, k], kind="stable")
            drawn = weights[:, order]
            hits = drawn * truth[order, k]
            carried = hits.sum(axis=1)
            scores = log_proba[order, k]
            last = np.searchsorted(-scores, -scores, side="right") - 1
            precision = (np.cumsum(hits, axis=1) / np.maximum(np.cumsum(drawn, axis=1), 1))[:, last]
            some = carried > 0
            found[some, m, k] = (hits * precision).sum(axis=1)[some] / carried[some]
    some_class = ~np.isnan(found).all(axis=(1, 2))
    return np.asarray(100 * np.nanmean(found[some_class], axis=2))


def _known(arrays: Arrays, methods: Sequence[str]) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """Labels, and log-probabilities of each method ("" is SeDA), of the labelled rows."""
    known = labelled_rows(arrays["labels"])
    return arrays["labels"][known], [arrays[f"{m}.log_proba" if m else "log_proba"][known] for m in methods]


def accuracy_section(arrays: Arrays, metrics: Mapping[str, Any]) -> str:
    methods = ["", *metrics["baselines"]]
    labels, log_probas = _known(arrays, methods)
    drawn = resampled_map(labels, log_probas)
    lines = []
    for i, method in enumerate(methods):
        values = metrics["baselines"][method] if method else metrics
        ends = np.percentile(drawn[:, i], (2.5, 97.5))
        line = [method or "SeDA", f"{values['map']:.1f}", f"{ends[0]:.1f} .. {ends[1]:.1f}"]
        line += [f"{values[key]:.1f}" for _, key in MULTI_LABEL_COLUMNS[1:]]
        versus = np.percentile(drawn[:, 0] - drawn[:, i], (2.5, 97.5))
        lines.append([*line, f"{versus[0]:+.1f} .. {versus[1]:+.1f}" if method else ""])
    names = [name for name, _ in MULTI_LABEL_COLUMNS]
    heads = [
        [f"{name} head", *(f"{values[key]:.1f}" for _, key in MULTI_LABEL_COLUMNS)]
        for name, values in metrics["heads"].items()
    ]
    return section(
        "Accuracy",
        paragraph(f"On {len(labels)} labelled test rows, in percent. mAP is the mean of the classes' average "
                  "precisions; "
                  "F1 and exact (the whole set of classes is right) take the classes of probability "
                  f"{THRESHOLD} or more. Intervals are of a paired bootstrap of the test rows, {_DRAWS} draws; they "
                  "speak of the choice of test rows alone: another split or seed moves all figures."),
        table(("", "mAP", "95 %", *names[1:], "mAP of SeDA less its, 95 %"), lines),
        folded("SeDA's heads", table(("", *names), heads)),
    )  # fmt: skip


def reliability(log_proba: NDArray[Any], labels: NDArray[Any]) -> list[float | None]:
    """Share of yes among the decisions whose probability lies in each of 15 equal parts of 0 .. 1; None where none."""
    known = labelled_rows(labels)
    proba, truth = np.exp(log_proba[known]).ravel(), (labels[known] > 0).ravel()
    part = np.minimum((proba * ECE_BINS).astype(int), ECE_BINS - 1)
    return [float(truth[part == i].mean()) if (part == i).any() else None for i in range(ECE_BINS)]


def calibration_section(arrays: Arrays, metrics: Mapping[str, Any]) -> str:
    return section(
        "Calibration",
        bar_chart(reliability(arrays["log_proba"], arrays["labels"]), "probability of a class", "share that carry it"),
        paragraph("Of all rows and classes. Bars below the dashed line: too high a probability; above it: too low. "
                  f"Expected calibration error {metrics['ece']:.1f} points."),
    )  # fmt: skip


def classes_section(arrays: Arrays, class_names: Sequence[str], folder: Path) -> str:
    """The classes that are found worst, and the picture of all."""
    labels, (ours,) = _known(arrays, [""])
    found, counts = 100 * average_precisions(ours, labels), (labels > 0).sum(axis=0)
    order = np.argsort(found, kind="stable")[: min(_CLASSES, int((counts > 0).sum()))]
    lines = [
        [class_names[k], int(counts[k]), f"{100 * counts[k] / len(labels):.1f}", f"{found[k]:.1f}"]
        for k in order.tolist()
    ]
    parts = [table(("class", "test rows", "chance", "average precision"), lines)]
    absent = [str(class_names[k]) for k in np.flatnonzero(counts == 0).tolist()]
    if absent:
        parts.append(paragraph(f"No test row carries {', '.join(absent)}; the means leave them out.", note=True))
    if (folder / "report" / "average_precision.png").is_file():
        parts.append(picture(folder / "report" / "average_precision.png", "average precision of the classes"))
    return section("Classes worth looking at", *parts)


def changed_section(arrays: Arrays, class_names: Sequence[str], names: Sequence[str] | None) -> str:
    """Who is right where; rows are called by their ``names`` (M,), where the data has any, or else by their ids."""
    title = "Where prediction changed against the MLP"
    if "mlp.log_proba" not in arrays:
        return section(title, paragraph("The run trained no baselines."))
    labels, log_probas = _known(arrays, ["", "mlp"])
    ours, theirs = (np.exp(p) for p in log_probas)
    right, mlp_right = ((p >= THRESHOLD) == (labels > 0) for p in (ours, theirs))
    counted = [
        [f"SeDA {word}", int((a & mlp_right).sum()), int((a & ~mlp_right).sum())]
        for word, a in (("right", right), ("wrong", ~right))
    ]
    precisions = [average_precisions(p, labels) for p in log_probas]
    gain = 100 * (precisions[0] - precisions[1])
    order = np.argsort(-np.nan_to_num(np.abs(gain)), kind="stable")[:_CLASSES]
    carried = class_counts(labels)
    lines = [[class_names[k], int(carried[k]), f"{gain[k]:+.1f}"] for k in order.tolist() if carried[k]]
    called = arrays["ids"].tolist() if names is None else names
    called = [called[row] for row in np.flatnonzero(labelled_rows(arrays["labels"])).tolist()]
    parts = [table(("", "MLP right", "MLP wrong"), counted)]
    for words, chosen in (("only SeDA is right", right & ~mlp_right), ("only the MLP is right", ~right & mlp_right)):
        found = np.argwhere(chosen)
        # Those that the two differ on most.
        found = found[np.argsort(-np.abs(ours - theirs)[chosen], kind="stable")][:_DECISIONS]
        cells = [
            [called[row], class_names[k], "yes" if labels[row, k] > 0 else "no",
             *(f"{100 * p[row, k]:.0f}\u00a0%" for p in (ours, theirs))]
            for row, k in found.tolist()
        ]  # fmt: skip
        if cells:
            shown = f", {len(cells)} of them" if chosen.sum() > len(cells) else ""
            header = ("id" if names is None else "name", "class", "true", "SeDA", "MLP")
            parts.append(folded(f"{int(chosen.sum())} decisions where {words}{shown}", table(header, cells)))
    return section(
        title,
        paragraph(f"Yes or no of each row and class, at a probability of {THRESHOLD}."),
        *parts,
        folded("classes whose average precision differs most", table(("class", "test rows", "SeDA less MLP"), lines)),
    )


def class_counts(labels: NDArray[Any]) -> NDArray[np.int64]:
    """How many rows carry each class, (K,)."""
    return np.asarray((labels > 0).sum(axis=0))


def label_lines(train: NDArray[Any], test: NDArray[Any]) -> list[list[Any]]:
    """Rows of the table of the data: how many classes a row carries, and how many rows carry none."""
    parts = [labels[labelled_rows(labels)] > 0 for labels in (train, test)]
    return [
        ["classes of a labelled row, mean", *(f"{part.sum(axis=1).mean():.2f}" for part in parts)],
        ["labelled rows without a class", *(int((~part.any(axis=1)).sum()) for part in parts)],
    ]
