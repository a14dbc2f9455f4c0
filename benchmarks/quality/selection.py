"""Choosing settings by cross-validation on training parts: every method tries equally many, no test part is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from seda_fast.engine import PrecisionName

from .methods import LINEAR, MLP, ONE_STEP, SEDA
from .regimes import DataSet, Task, apply, fold
from .runs import TEST, VISUAL_WEIGHTS, Job, Runs, weight_name

# The defaults come first; the others are drawn from these, the same for a seed.
SPACES: dict[str, dict[str, Sequence[Any]]] = {
    # `length` multiplies the passes of the rule for small training parts, which stays in force. The heads' weights are
    # not here: they change no training, and each record has the accuracies of several.
    SEDA: {
        "length": (0.6, 1.0, 1.5),
        "learning_rate": (5e-4, 1e-3, 2e-3),
        "weight_decay": (0.01, 0.05, 0.2),
        "ema_decay": (0.98, 0.995),
        "dropout": (0.0, 0.1, 0.3),
        "condition_dropout": (0.0, 0.3, 0.5),
        "visual_dropout": (0.3, 0.5, 0.6),
        "visual_input_dropout": (0.1, 0.2, 0.4),
        "label_smoothing": (0.05, 0.1, 0.2),
        "teacher_weight": (0.0, 0.5, 1.0, 2.0),
        "centre_weight": (0.3, 1.0, 3.0),
        "width": (256, 512),
        "blocks": (2, 3),
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
    sets: Sequence[str],
    tried: Mapping[str, Sequence[Mapping[str, Any]]],
    folds: Sequence[int],
    of: int,
    precision: PrecisionName = "fp32",
) -> list[Job]:
    """Trainings of the settings ``tried`` by group (see `group`) on some ``folds``: fold k is the k % of-th of the
    (k // of)-th partition, so that more than ``of`` of them are a repeated cross-validation."""
    return [
        Job(name, regime, method, f"cv {k}/{of}", k, settings, precision if method == SEDA else "fp32")
        for name in sets
        for regime in REGIMES
        for method in SELECTED
        for settings in tried.get(group(method, name), [])
        for k in folds
    ]


def group(method: str, name: str) -> str:
    """What gets one setting: SeDA over all sets, a baseline on each set ("mlp on wikipedia")."""
    return method if method == SEDA else f"{method} on {name}"


def settings_of(selected: Selected, method: str, name: str) -> dict[str, Any]:
    """The settings chosen for a method on a set; its defaults where none were."""
    found: Mapping[str, Any] = selected.get(group(method, name), {})
    return dict(found.get("settings", {}))


def task_of(job: Job, data: DataSet) -> Task:
    """The part that a job names, in its regime: the whole set with its test part, or a fold of its training part."""
    if job.part == TEST:
        return apply(job.regime, data.task, job.seed)
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
    sets: Sequence[str],
    count: int,
    folds: int,
    repeats: int,
    ready: Callable[[Sequence[Job]], Runs],
    precision: PrecisionName = "fp32",
) -> dict[str, dict[str, Any]]:
    """Successive halving (Jamieson & Talwalkar 2016) in two rungs, the same for every method.

    All ``count`` settings are tried on one fold; the default and the best quarter then on all folds of ``repeats``
    partitions. ``ready`` makes the records of jobs; SeDA is trained in ``precision``.

    Returns:
        By group: ``settings`` chosen, their mean ``top1`` in percent over all folds, sets and regimes, the same of the
        default settings, the ``standard_error`` of the difference over folds, and how many settings were ``tried``; of
        SeDA also `visual_weights`.
    """
    tried = {group(m, name): candidates(m, count) for name in sets for m in SELECTED}
    first = jobs(sets, tried, [0], folds, precision)
    best = ranked(ready(first), first)
    kept = {}
    for name, found in best.items():
        survivors = [settings for _, settings in found[: -(-len(found) // 4)]]
        kept[name] = survivors if {} in survivors else [{}, *survivors]
    second = jobs(sets, kept, range(folds * repeats), folds, precision)
    runs = ready(second)
    selected: dict[str, dict[str, Any]] = {
        name: {
            "settings": dict(found[0][1]),
            "top1": found[0][0],
            "default_top1": next(score for score, settings in found if not settings),
            "standard_error": _standard_error(runs, second, name, found[0][1]),
            "tried": len(tried[name]),
        }
        for name, found in ranked(runs, second).items()
    }
    selected[SEDA].update(precision=precision, visual_weights=visual_weights(runs, second))
    return selected


def _standard_error(runs: Runs, wanted: Sequence[Job], name: str, best: Mapping[str, Any]) -> float:
    """Of the mean difference to the defaults, over folds, sets and regimes; 0 for the defaults themselves."""
    by_place: dict[tuple[str, str, str], dict[bool, float]] = {}
    for job in wanted:
        if group(job.method, job.set) == name and dict(job.settings) in ({}, dict(best)):
            place = by_place.setdefault((job.set, job.regime, job.part), {})
            place[bool(job.settings)] = runs.records[job.key].metrics["top1"]
    gaps = [place.get(True, place[False]) - place[False] for place in by_place.values()]
    return float(np.std(gaps, ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else 0.0


def visual_weights(runs: Runs, wanted: Sequence[Job]) -> dict[str, dict[str, float]]:
    """By set and regime, SeDA's mean top-1 over its ``wanted`` folds at its defaults, by the visual head's weight."""
    found: dict[str, dict[str, list[float]]] = {}
    for job in wanted:
        if job.method == SEDA and not job.settings:
            for weight in VISUAL_WEIGHTS:
                scores = found.setdefault(f"{job.set} {job.regime}", {}).setdefault(f"{weight:g}", [])
                scores.append(runs.records[job.key].metrics[weight_name(weight)])
    return {place: {w: float(np.mean(scores)) for w, scores in by.items()} for place, by in found.items()}
