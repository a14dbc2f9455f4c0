"""``python -m seda_fast.report``: one HTML file that tells what a training run gave.

It needs no network and no other file, and can be read on a phone. Its figures are computed from what the run wrote;
alignment step by step is measured anew, from the run's data.
"""

from __future__ import annotations

from . import _eval_extra  # noqa: F401 - checks first that what measuring needs is installed

# isort: split
import json
import math
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from scipy.stats import binomtest

from . import multi_label_sections as multi_label
from .arrays import labelled_rows
from .arrays import rows as float_rows
from .command import choose_device, progress, run, settings_of
from .command import report as say
from .config import check_given, check_range, check_types, setting
from .data import FeatureSet, told_rows, told_texts
from .files import DataError, atomic_path, make_folder, output_file
from .measure import alignment, standardised_text
from .nn import SeDA
from .page import Line, bar_chart, folded, line_chart, page, paragraph, picture, section, table
from .results import CONFIG_FILE, METRICS_FILE, OUTPUTS_FILE

PROGRAM = "seda_fast.report"
_BINS = 15  # those of the calibration error
_PAIRS = 12
_CHANGED = 15


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which run is told about, and where."""

    model: str = setting("", "folder written by seda_fast.train")
    out: str = setting("", "the .html file; by default report.html in that folder")
    data: str = setting("", "the run's data, where it is no longer at the place that the run read")
    rows: int = setting(1000, "test rows that alignment is measured on step by step")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")

    def __post_init__(self) -> None:
        check_types(self)
        check_given(self, "model")
        check_range(self, "rows", self.rows >= 4, "at least 4")


# What comes of files that are not as a run has written them.
_UNREADABLE = (AttributeError, IndexError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class Run:
    """What a run's folder holds: settings by section, metrics, and the (M, ...) arrays they were computed from."""

    folder: Path
    settings: dict[str, dict[str, Any]]
    metrics: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    class_names: tuple[str, ...]

    @property
    def labelled(self) -> NDArray[np.bool_]:
        return labelled_rows(self.arrays["labels"])

    @property
    def multi_label(self) -> bool:
        return bool(self.arrays["labels"].ndim == 2)

    def right(self, method: str) -> NDArray[np.bool_]:
        """Which labelled rows ``method`` ("" is SeDA) classifies correctly."""
        log_proba = self.arrays[f"{method}.log_proba" if method else "log_proba"]
        return np.asarray((log_proba.argmax(1) == self.arrays["labels"])[self.labelled])


def read_run(folder: Path, model: SeDA) -> Run:
    """Raises DataError unless the folder holds a finished run's results."""
    for name in (CONFIG_FILE, METRICS_FILE, OUTPUTS_FILE):
        if not (folder / name).is_file():
            raise DataError(f"{folder} does not hold the results of a training run: there is no {name}")
    try:
        settings = tomllib.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        arrays = load_file(folder / OUTPUTS_FILE)
        shape = (len(arrays["labels"]), model.config.n_classes)
        for name in ("log_proba", *(f"{method}.log_proba" for method in metrics["baselines"])):
            if name not in arrays:
                raise DataError(f"{folder}: {METRICS_FILE} and {OUTPUTS_FILE} are of two runs: {name!r} is missing")
            if arrays[name].shape != shape:
                raise DataError(f"{folder / OUTPUTS_FILE}: {name!r} is not of shape {shape}, as the model is")
        found = Run(folder, settings, metrics, arrays, model.class_names)
        if metrics["baselines"] and not found.labelled.any():
            raise DataError(f"{folder / OUTPUTS_FILE}: no row is labelled")
        labels = arrays["labels"]
        if labels.ndim == 1 and len(labels) and not -1 <= labels.min() <= labels.max() < model.config.n_classes:
            raise DataError(
                f"{folder / OUTPUTS_FILE}: 'labels' are not of the model's {model.config.n_classes} classes"
            )
    except (*_UNREADABLE, OSError, SafetensorError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder}: the results cannot be read ({error!r})") from error
    return found


# ---- figures ---------------------------------------------------------------------------------------------------------


def interval(right: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share, in percent (Wilson 1927)."""
    low, high = binomtest(right, rows).proportion_ci(method="wilson")
    return 100 * float(low), 100 * float(high)


def paired_p(only_one: int, only_other: int) -> float:
    """The exact two-sided p-value of McNemar's test, from the rows that only one of two methods gets right."""
    rows = only_one + only_other
    return float(binomtest(only_one, rows).pvalue) if rows else 1.0


def reliability(log_proba: NDArray[Any], labels: NDArray[Any]) -> list[float | None]:
    """Accuracy of the labelled rows whose confidence lies in each of 15 equal parts of 0 .. 1; None where none does."""
    known = labels >= 0
    confidence = np.exp(log_proba.max(1))[known]
    right = (log_proba.argmax(1) == labels)[known]
    part = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    return [float(right[part == i].mean()) if (part == i).any() else None for i in range(_BINS)]


def confused(run: Run) -> list[tuple[int, int, int]]:
    """(true class, predicted class, rows) of the mistakes made most often, the most frequent first."""
    labels = run.arrays["labels"][run.labelled]
    predicted = run.arrays["log_proba"].argmax(1)[run.labelled]
    wrong = labels != predicted
    pairs, counts = np.unique(np.stack((labels[wrong], predicted[wrong])), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_PAIRS]
    return [(int(pairs[0, i]), int(pairs[1, i]), int(counts[i])) for i in order]


# ---- sections --------------------------------------------------------------------------------------------------------


def accuracy_section(run: Run) -> str:
    rows = int(run.labelled.sum())
    lines = []
    base = run.right("")
    for method, values in (("", run.metrics), *run.metrics["baselines"].items()):
        right = run.right(method)
        low, high = interval(int(right.sum()), rows)
        versus = ""
        if method:
            ours, theirs = int((base & ~right).sum()), int((right & ~base).sum())
            versus = f"{ours} / {theirs}, p = {paired_p(ours, theirs):.2g}"
        shown = [f"{values[key]:.1f}" for key in ("top5", "balanced_accuracy", "ece")]
        lines.append([method or "SeDA", f"{values['top1']:.1f}", f"{low:.1f} .. {high:.1f}", *shown, versus])
    heads = [
        [f"{name} head", *(f"{values[key]:.1f}" for key in ("top1", "top5", "balanced_accuracy", "ece"))]
        for name, values in run.metrics["heads"].items()
    ]
    header = ("", "top-1", "95 %", "top-5", "balanced", "ECE", "only SeDA / only it right")
    return section(
        "Accuracy",
        paragraph(f"On {rows} labelled test rows, in percent. Intervals are Wilson's; p is McNemar's, exact. Both "
                  "speak of the choice of test rows alone: another split or seed moves all figures."),
        table(header, lines),
        folded("SeDA's heads", table(("", "top-1", "top-5", "balanced", "ECE"), heads)),
    )  # fmt: skip


def calibration_section(run: Run) -> str:
    heights = reliability(run.arrays["log_proba"], run.arrays["labels"])
    return section(
        "Calibration",
        bar_chart(heights, "confidence", "accuracy"),
        paragraph(f"Bars below the dashed line: more confident than right; above it: less. Expected calibration error "
                  f"{run.metrics['ece']:.1f} points."),
    )  # fmt: skip


def confusion_section(run: Run) -> str:
    pairs = confused(run)
    if not pairs:
        return section("Confusions", paragraph("Every labelled test row is classified correctly."))
    labels = run.arrays["labels"]
    mlp = run.arrays.get("mlp.log_proba")
    lines = []
    for true, predicted, count in pairs:
        of_class = labels == true
        line = [run.class_names[true], run.class_names[predicted], count, f"{100 * count / of_class.sum():.0f} %"]
        line.append(int((mlp.argmax(1)[of_class] == predicted).sum()) if mlp is not None else "-")
        lines.append(line)
    parts = [table(("true", "predicted", "rows", "of the class", "by the MLP"), lines)]
    if (run.folder / "report" / "confusion.png").is_file():
        parts.append(picture(run.folder / "report" / "confusion.png", "confusion matrix"))
    return section("Confusions worth looking at", *parts)


def changed_section(run: Run, names: Sequence[str] | None) -> str:
    """Who is right where; rows are called by their ``names`` (M,), where the data has any, or else by their ids."""
    title = "Where prediction changed against the MLP"
    if "mlp.log_proba" not in run.arrays:
        return section(title, paragraph("The run trained no baselines."))
    ours, theirs = run.arrays["log_proba"], run.arrays["mlp.log_proba"]
    labels, ids = run.arrays["labels"], run.arrays["ids"]
    right, mlp_right = ours.argmax(1) == labels, theirs.argmax(1) == labels
    known = labels >= 0
    parts = [
        table(
            ("", "MLP right", "MLP wrong"),
            [[f"SeDA {word}", int((known & a & mlp_right).sum()), int((known & a & ~mlp_right).sum())]
             for word, a in (("right", right), ("wrong", ~right))],
        )
    ]  # fmt: skip
    for words, chosen in (("only SeDA is right", right & ~mlp_right), ("only the MLP is right", ~right & mlp_right)):
        found = np.flatnonzero(chosen & known)
        lines = []
        for row in found[:_CHANGED]:
            cells = [ids[row] if names is None else names[row], run.class_names[labels[row]]]
            for log_proba in (ours[row], theirs[row]):
                best = int(log_proba.argmax())
                cells.append(f"{run.class_names[best]} ({100 * math.exp(log_proba[best]):.0f}\u00a0%)")
            lines.append(cells)
        if lines:
            shown = f", the first {len(lines)} of them" if len(found) > len(lines) else ""
            content = table(("id" if names is None else "name", "true", "SeDA", "MLP"), lines)
            parts.append(folded(f"{len(found)} rows where {words}{shown}", content))
    return section(title, *parts)


def training_section(run: Run) -> str:
    told = run.metrics["train"]
    speed = f"{told['samples_per_second']:.0f} rows a second on {run.metrics['device']}"
    parts = [
        paragraph(f"{told['epochs']} epochs in batches of {told['batch_size']}, {told['seconds']:.1f} s, {speed}.")
    ]
    if "attention" in told:
        attention = told["attention"]
        parts.append(paragraph("Both networks attend to the class texts at every step; the attention is that of "
                               f"{attention['used']} ({attention['reason']}). Prediction goes step by step: "
                               f"{run.metrics['chain']['reason']}."))  # fmt: skip
    if (run.folder / "report" / "loss.png").is_file():
        parts.append(picture(run.folder / "report" / "loss.png", "loss terms by epoch"))
    return section("Training", *parts)


def settings_section(run: Run) -> str:
    parts = [
        folded(name, table((name, ""), [[key, value] for key, value in values.items()]))
        for name, values in (*run.settings.items(), ("versions", run.metrics["versions"]))
    ]
    return section("Settings", *parts)


def data_section(run: Run, data: FeatureSet) -> str:
    part = data.test_part
    if data.multi_label:
        counts, test = multi_label.class_counts(data.label_train), multi_label.class_counts(data.label_test)
    else:
        counts = np.bincount(data.label_train[data.labelled_train], minlength=data.n_classes)
        test = np.bincount(data.label_test[data.label_test >= 0], minlength=data.n_classes)
    rows = [
        ["rows", len(data.visual_train), len(data.visual_test)],
        ["labelled", int(data.labelled_train.sum()), int(part.labelled.sum())],
        ["with text", int(data.paired_train.sum()), int(part.paired.sum())],
        ["rows of the smallest class", int(counts.min()), int(test.min())],
        ["rows of the largest class", int(counts.max()), int(test.max())],
    ]
    if data.multi_label:
        rows += multi_label.label_lines(data.label_train, data.label_test)
    sizes = f"{data.visual_dim} visual and {data.text_dim} textual dimensions, {data.n_classes} classes, {data.source}."
    if data.text_classes is not None:
        sizes += " There is one text a class, and a row's text is its class's."
    named = zip(data.class_names, counts.tolist(), test.tolist(), strict=True)
    return section(
        "Data",
        paragraph(sizes),
        table(("", "training", "test"), rows),
        folded("classes", table(("class", "training", "test"), [list(line) for line in named])),
    )


def alignment_section(run: Run, data: FeatureSet, model: SeDA, rows: int) -> str:
    """Frechet distance and cosine of the mapped features after each textual step, and the way's picture."""
    some = np.unique(np.linspace(0, len(data.visual_test) - 1, min(rows, len(data.visual_test))).astype(np.int64))
    device = model.centres.device
    with torch.inference_mode():
        raw = torch.from_numpy(float_rows(data.visual_test, some)).to(device)
        ids = torch.from_numpy(data.ids_test[some]).to(device)
        _, path = model.alignment_path(raw, ids)
    part = data.test_part
    text = standardised_text(model, part)
    text = None if text is None or not part.paired[some].sum() >= 4 else text[some]
    measured: list[dict[str, float]] = []
    with progress(len(path), "measuring") as bar:
        for step in path.cpu().numpy():
            found = alignment(step, text)
            if found is not None:
                measured.append(found)
            bar.update()
    picture_file = run.folder / "report" / "paths.png"
    pictures = [picture(picture_file, "ways through both spaces")] if picture_file.is_file() else []
    if not measured:
        return section("Alignment", paragraph("The test part has no texts to measure alignment with."), *pictures)
    steps = [float(i) for i in range(1, len(measured) + 1)]
    floor = measured[0]["frechet_floor"]
    distance = Line("SeDA", steps, [found["frechet"] for found in measured])
    cosine = Line("SeDA", steps, [found["cosine"] for found in measured])
    level = Line("two halves of the true texts", [steps[0], steps[-1]], [floor, floor])
    own = "own text" if data.text_classes is None else "class's text"
    notes = []
    if min(distance.y) < floor:
        notes.append(paragraph("The dashed line is no floor here: half of the test rows are too few to tell the texts' "
                               "distribution. Compare runs on the same rows with each other.", note=True))  # fmt: skip
    rows = 0 if text is None else int((~np.isnan(text).all(axis=1)).sum())
    return section(
        "Alignment by step",
        paragraph(f"After each step of the textual stage, on {rows} test rows: distance of the mapped features' "
                  f"distribution from that of the true texts (lower is nearer), and cosine to a row's {own}."),
        line_chart([distance], "step", "Frechet distance", level=level),
        *notes,
        line_chart([cosine], "step", f"cosine to {own}"),
        *pictures,
    )  # fmt: skip


def from_data(config: ReportConfig, run: Run, model: SeDA) -> tuple[list[str], tuple[str, ...] | None]:
    """The sections that need the run's data, a sentence in their place where it cannot be had; and the names of the
    test rows, where it has any.

    Raises:
        DataError: ``--data`` was given and is not this run's.
    """
    section_of_run = run.settings["run"]
    try:
        data = FeatureSet.load(
            config.data or section_of_run["data"],
            unpaired="keep",
            test_fraction=section_of_run["test_fraction"],
            seed=run.settings["train"]["seed"],
        )
        other = not np.array_equal(data.label_test, run.arrays["labels"]) or data.visual_dim != model.config.visual_dim
        other |= run.metrics.get("test_rows") not in (None, told_rows(data.visual_test, data.label_test))
        other |= data.text_dim not in (0, model.config.text_dim) or tuple(data.class_names) != model.class_names
        other |= run.metrics.get("test_texts") not in (None, told_texts(data.test_part))
        if other or data.split != run.metrics.get("split", data.split):
            raise DataError(f"{data.source} is not the data of this run: its test part differs")
    except DataError as error:
        if config.data:
            raise
        say(PROGRAM, f"without alignment by step: {error}")
        missing = f"Not shown, since the run's data could not be read: {error}"
        return [section("Data and alignment", paragraph(missing))], None
    return [data_section(run, data), alignment_section(run, data, model, config.rows)], data.names_test


def class_sections(run: Run, names: Sequence[str] | None) -> list[str]:
    """Accuracy, calibration, the classes, and what the MLP says."""
    if not run.multi_label:
        return [accuracy_section(run), calibration_section(run), confusion_section(run), changed_section(run, names)]
    return [
        multi_label.accuracy_section(run.arrays, run.metrics),
        multi_label.calibration_section(run.arrays, run.metrics),
        multi_label.classes_section(run.arrays, run.class_names, run.folder),
        multi_label.changed_section(run.arrays, run.class_names, names),
    ]


def report(config: ReportConfig) -> Path:
    """Write the page; returns its path."""
    folder = Path(config.model)
    out = output_file(config.out or str(folder / "report.html"), "--out", (".html",))
    model = SeDA.from_pretrained(folder, choose_device(config.device))
    found = read_run(folder, model)
    try:
        middle, names = from_data(config, found, model)
        accuracy, *classes = class_sections(found, names)
        body = [accuracy, *middle, *classes, training_section(found), settings_section(found)]
    except _UNREADABLE as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder}: the results cannot be read ({error!r})") from error
    make_folder(out.parent)
    with atomic_path(out) as draft:
        draft.write_text(page(f"SeDA on {Path(found.metrics['data']).name}", body), encoding="utf-8")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 2 with one sentence on stderr."""
    return run(
        lambda: print(report(ReportConfig(**settings_of(PROGRAM, __doc__, {"report": ReportConfig}, argv)["report"]))),
        PROGRAM,
    )


if __name__ == "__main__":
    sys.exit(main())
