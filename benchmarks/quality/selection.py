"""Choosing settings by cross-validation on training parts: every method tries equally many, no test part is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .methods import LINEAR, MLP, ONE_STEP, SEDA
from .regimes import DataSet, apply, fold
from .runs import Job, Runs

# The defaults come first; the others are drawn from these, the same for a seed.
SPACES: dict[str, dict[str, Sequence[Any]]] = {
    SEDA: {
        "epochs": (12, 20, 30),
        "batch_size": (128, 256),
        "learning_rate": (5e-4, 1e-3, 2e-3),
        "weight_decay": (0.01, 0.05, 0.2),
        "dropout": (0.0, 0.1, 0.3),
        "visual_dropout": (0.3, 0.5, 0.6),
        "visual_input_dropout": (0.1, 0.2, 0.3),
        "label_smoothing": (0.05, 0.1, 0.2),
        "teacher_weight": (0.0, 0.5, 1.0, 2.0),
        "width": (256, 512),
        "textual_weight": (0.1, 0.25),
        "visual_weight": (0.4, 0.5, 0.6),
    },
    MLP: {
        "epochs": (20, 40, 80),
        "batch_size": (64, 128, 256),
        "lr": (3e-4, 1e-3, 3e-3),
        "weight_decay": (0.01, 0.05, 0.2),
        "dropout": (0.3, 0.5, 0.6),
        "input_dropout": (0.0, 0.2, 0.4),
        "width": (256, 512, 1024),
        "depth": (1, 2),
        "label_smoothing": (0.0, 0.1, 0.2),
    },
}
SPACES[ONE_STEP] = {**SPACES[MLP], "ce_weight": (0.3, 1.0, 3.0)}
# The linear probe chooses its penalty itself, by held-out likelihood.
SELECTED = (SEDA, MLP, ONE_STEP, LINEAR)
REGIMES = ("full", "labels-8")


def candidates(method: str, count: int) -> list[dict[str, Any]]:
    """``count`` settings, the defaults (no setting) first."""
    if method not in SPACES:
        return [{}]
    rng = np.random.default_rng(0)
    drawn: list[dict[str, Any]] = [{}]
    while len(drawn) < count:
        choice = {name: values[rng.integers(len(values))] for name, values in SPACES[method].items()}
        if choice not in drawn:
            drawn.append(choice)
    return drawn


def jobs(data: Sequence[DataSet], methods: Sequence[str], count: int, folds: int) -> list[Job]:
    """Every training that selection needs."""
    return [
        Job(d.name, regime, method, f"cv {k}/{folds}", k, settings)
        for d in data
        for regime in REGIMES
        for method in methods
        for settings in candidates(method, count)
        for k in range(folds)
    ]


def task_of(job: Job, data: DataSet) -> Any:
    """The fold that a job names, in its regime."""
    index, folds = map(int, job.part.removeprefix("cv ").split("/"))
    return apply(job.regime, fold(data, index, folds, seed=0), job.seed)


def choose(runs: Runs, wanted: Sequence[Job]) -> dict[str, Mapping[str, Any]]:
    """The best settings: of SeDA one for all sets and regimes, of a baseline one for each set ("mlp on wikipedia")."""
    totals: dict[str, dict[str, tuple[float, Mapping[str, Any]]]] = {}
    for job in wanted:
        record = runs.records.get(job.key)
        if record is None:
            continue
        group = job.method if job.method == SEDA else f"{job.method} on {job.set}"
        name = repr(sorted(job.settings.items()))
        so_far = totals.setdefault(group, {}).get(name, (0.0, job.settings))[0]
        totals[group][name] = (so_far + record.metrics["top1"], job.settings)
    return {group: max(found.values(), key=lambda pair: pair[0])[1] for group, found in totals.items()}
