"""Single measurements: made once, written down at once, found again when the command is repeated."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seda_fast.engine import PrecisionName
from seda_fast.metrics import alignment_metrics, classification_metrics

from . import methods
from .regimes import Task, files_of

TEST = "test"
# Folds of partitions that no setting was chosen on, and of those that were.
FRESH, CHOICE = "fresh", "cv"
# Weights that SeDA's heads are also combined with, which needs no training of its own: of the visual head among the
# three that are trained, the other two sharing the rest, and of the kernel head beside these three.
VISUAL_WEIGHTS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
KERNEL_WEIGHTS = (0.0, 0.15, 0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class Job:
    """One training: on which part ("test", or "cv 0/3" for the first of three folds), in which regime, with what.

    ``precision`` is that of SeDA's training.
    """

    set: str
    regime: str
    method: str
    part: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    precision: PrecisionName = "fp32"

    @property
    def key(self) -> str:
        """Names the job among the records."""
        names: list[Any] = [self.set, self.regime, self.method, self.part, self.seed, dict(self.settings)]
        text = json.dumps(names if self.precision == "fp32" else [*names, self.precision], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Record:
    """What a job gave: accuracies in percent, ``right`` (M,) which test rows were right, seconds of training."""

    job: Job
    metrics: dict[str, float]
    alignment: dict[str, float] | None
    alignment_point: dict[str, float] | None
    right: NDArray[np.bool_]
    seconds: float

    def line(self) -> str:
        """One line of JSON; the bits of ``right`` as hexadecimal digits."""
        values = {
            **{k: getattr(self.job, k) for k in ("set", "regime", "method", "part", "seed")},
            "settings": dict(self.job.settings),
            "precision": self.job.precision,
            "metrics": self.metrics,
            "alignment": self.alignment,
            "alignment_point": self.alignment_point,
            "rows": len(self.right),
            "right": np.packbits(self.right).tobytes().hex(),
            "seconds": round(self.seconds, 2),
        }
        return json.dumps(values)

    @classmethod
    def read(cls, line: str) -> Record:
        """From `line`."""
        v = json.loads(line)
        precision = v.get("precision", "fp32")
        job = Job(v["set"], v["regime"], v["method"], v["part"], v["seed"], v["settings"], precision)
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(v["right"]), np.uint8))[: v["rows"]].astype(bool)
        return cls(job, v["metrics"], v["alignment"], v["alignment_point"], bits, v["seconds"])


class Runs:
    """The records of a file of JSON lines, appended to as jobs end: a killed command goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            # A kill may have cut a line short; its job is made again.
            with contextlib.suppress(json.JSONDecodeError):
                record = Record.read(line)
                self.records[record.job.key] = record

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records.values())

    def get(self, job: Job, task: Task) -> Record:
        """The record of ``job``, made on ``task`` (already folded and in its regime) if there is none."""
        if job.key not in self.records:
            self.add(measure(job, task))
        return self.records[job.key]

    def add(self, record: Record) -> None:
        """Write a record down; it is on disk when this returns."""
        append(self.path, record)
        self.records[record.job.key] = record


def append(path: Path, record: Record) -> None:
    """Write a record at the end of a file of them; it is on disk when this returns. Several processes may do so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        whole = file.read(1) in (b"", b"\n")
        # In one call: what others append meanwhile lies before or behind it.
        file.write((b"" if whole else b"\n") + record.line().encode() + b"\n")
        os.fsync(file.fileno())


def other_file(runs: Runs, sets: Sequence[str], folder: Path, folds: bool) -> str:
    """Why records of ``sets`` are not of the files in ``folder``, in one sentence; where they are, these are noted.

    Records are found by a set's name, and a table of two files would lie. ``folds``: whether groups of rows count.
    """
    place = runs.path.with_suffix(".files.json")
    known = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    found, measured = dict(known), {record.job.set for record in runs}
    for name in sets:
        for what, file in files_of(name, folder, folds).items():
            if file.is_file():
                with file.open("rb") as stream:
                    found[what] = hashlib.file_digest(stream, "sha256").hexdigest()
            else:
                found[what] = "none"
            if name in measured and known.get(what, found[what]) != found[what]:
                return f"{runs.path} has records of another {file.name} than {file}; name another file by --runs"
    if found != known:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return ""


def earlier_recipe(records: Iterable[Record]) -> bool:
    """Whether trainings of SeDA among ``records`` are of a recipe without kernel head: new ones do not compare."""
    return any(r.job.method.startswith(methods.SEDA) and weight_name(0.0, "kernel") not in r.metrics for r in records)


def measure(job: Job, task: Task) -> Record:
    """Train and predict once."""
    torch.manual_seed(job.seed)
    return recorded(job, task, methods.fit(job.method, task, job.seed, job.settings, job.precision))


def recorded(job: Job, task: Task, fitted: methods.Fitted) -> Record:
    """How good a job's predictions on ``task.test`` are."""
    labels = task.test.labels
    text = methods.standardised(task, job.seed).test.text
    log_proba = np.nan_to_num(fitted.log_proba, neginf=-1e4)
    known = ("top1", "top5", "balanced_accuracy", "ece")
    found = classification_metrics(log_proba - np.logaddexp.reduce(log_proba, axis=1, keepdims=True), labels)
    alignments = [
        None if mapped is None else {k: round(v, 4) for k, v in alignment_metrics(mapped, text, seed=0).items()}
        for mapped in (fitted.aligned, fitted.point)
    ]
    right = fitted.log_proba.argmax(1) == labels
    metrics = {k: round(found[k], 4) for k in known}
    combined = {weight_name(weight): fitted.weighted(weight) for weight in VISUAL_WEIGHTS}
    combined |= {weight_name(weight, "kernel"): fitted.with_kernel(weight) for weight in KERNEL_WEIGHTS}
    for name, product in combined.items():
        if product is not None:
            metrics[name] = round(100 * float(np.mean(product.argmax(1) == labels)), 4)
    return Record(job, metrics, *alignments, right, fitted.seconds)


def weight_name(weight: float, head: str = "visual") -> str:
    """Name of the metric "top-1 with this weight of that head"."""
    return f"top1_{head}_{weight:g}"


def of(records: Iterable[Record], **wanted: object) -> list[Record]:
    """The records whose job has these values, by seed."""
    found = [r for r in records if all(getattr(r.job, k) == v for k, v in wanted.items())]
    return sorted(found, key=lambda r: r.job.seed)
