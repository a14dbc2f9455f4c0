"""Choosing settings by cross-validation on training parts: every method tries equally many, no test part is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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

# By group (see `group`), what `select` returns.
Selected = Mapping[str, Mapping[str, Any]]


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


def jobs(
    data: Sequence[DataSet], tried: Mapping[str, Sequence[Mapping[str, Any]]], folds: Sequence[int], of: int
) -> list[Job]:
    """Trainings of the settings ``tried`` by group (see `group`) on some ``folds``: fold k is the k % of-th of the
    (k // of)-th partition, so that more than ``of`` of them are a repeated cross-validation."""
    return [
        Job(d.name, regime, method, f"cv {k}/{of}", k, settings)
        for d in data
        for regime in REGIMES
        for method in SELECTED
        for settings in tried.get(group(method, d.name), [])
        for k in folds
    ]


def group(method: str, name: str) -> str:
    """What gets one setting: SeDA over all sets, a baseline on each set ("mlp on wikipedia")."""
    return method if method == SEDA else f"{method} on {name}"


def settings_of(selected: Selected, method: str, name: str) -> dict[str, Any]:
    """The settings chosen for a method on a set; its defaults where none were."""
    found: Mapping[str, Any] = selected.get(group(method, name), {})
    return dict(found.get("settings", {}))


def task_of(job: Job, data: DataSet) -> Any:
    """The fold that a job names, in its regime."""
    index, folds = map(int, job.part.removeprefix("cv ").split("/"))
    return apply(job.regime, fold(data, index % folds, folds, seed=index // folds), job.seed)


def ranked(runs: Runs, wanted: Sequence[Job]) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    """Each group's settings by their mean top-1 over ``wanted``, all of which must be recorded, best first."""
    found: dict[str, dict[str, tuple[list[float], Mapping[str, Any]]]] = {}
    for job in wanted:
        name = json.dumps(dict(job.settings), sort_keys=True)
        scores, _ = found.setdefault(group(job.method, job.set), {}).setdefault(name, ([], job.settings))
        scores.append(runs.records[job.key].metrics["top1"])
    return {
        of: sorted(((float(np.mean(scores)), settings) for scores, settings in by.values()), key=lambda x: -x[0])
        for of, by in found.items()
    }


def select(
    data: Sequence[DataSet], count: int, folds: int, repeats: int, ready: Callable[[Sequence[Job]], Runs]
) -> dict[str, dict[str, Any]]:
    """Successive halving (Jamieson & Talwalkar 2016) in two rungs, the same for every method.

    All ``count`` settings are tried on one fold; the default and the best quarter then on all folds of ``repeats``
    partitions. ``ready`` makes the records of jobs.

    Returns:
        By group: ``settings`` chosen, their mean ``top1`` in percent over all folds, sets and regimes, the same of the
        default settings, and how many settings were ``tried``.
    """
    tried = {group(m, d.name): candidates(m, count) for d in data for m in SELECTED}
    first = jobs(data, tried, [0], folds)
    best = ranked(ready(first), first)
    kept = {}
    for name, found in best.items():
        survivors = [settings for _, settings in found[: -(-len(found) // 4)]]
        kept[name] = survivors if {} in survivors else [{}, *survivors]
    second = jobs(data, kept, range(folds * repeats), folds)
    return {
        name: {
            "settings": dict(found[0][1]),
            "top1": found[0][0],
            "default_top1": next(score for score, settings in found if not settings),
            "tried": len(tried[name]),
        }
        for name, found in ranked(ready(second), second).items()
    }
