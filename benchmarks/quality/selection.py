"""Choosing settings by cross-validation on training parts: every method tries equally many, no test part is read."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from seda_fast.baselines import fit_baseline
from seda_fast.engine import PrecisionName

from .methods import BRIDGE, LINEAR, MLP, MLP_PSEUDO, ONE_STEP, ONE_STEP_MSE, SEDA
from .regimes import DataSet, Task, apply, fold
from .runs import CHOICE, TEST, VISUAL_WEIGHTS, Job, Runs, weight_name

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
# Its probe on texts takes the one penalty, or chooses among them by held-out likelihood as the linear probe does, which
# has nothing else to choose.
SPACES[ONE_STEP_MSE] = {name: values for name, values in SPACES[MLP].items() if name != "label_smoothing"} | {
    "l2_grid": ([1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001], [0.1], [0.01])
}
# What draws and classifies a text: all from one training, which is this peer's most expensive part.
SPACES[BRIDGE] = {
    "start": (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
    "steps": (1, 2, 5, 10, 20),
    "probe_c": (0.01, 0.1, 1.0),
}
SELECTED = (SEDA, MLP, ONE_STEP, ONE_STEP_MSE, BRIDGE, LINEAR)
FEW_LABELS = "labels-8"
_FRESH_PARTITIONS = 1000  # far above the partitions of any choice
REGIMES = ("full", FEW_LABELS)
# Folds of a partition, and partitions of a choice's last round, where nothing is said of them.
FOLDS, REPEATS = 3, 2
# Passes of a network among the baselines where no setting says how many.
DEFAULT_EPOCHS: int = inspect.signature(fit_baseline).parameters["epochs"].default

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
        Job(name, regime, method, f"{CHOICE} {k}/{of}", k, settings, precision if method == SEDA else "fp32")
        for name in sets
        for regime in REGIMES
        for method in SELECTED
        for settings in tried.get(group(method, name), [])
        for k in folds
    ]


def group(method: str, name: str) -> str:
    """What gets one setting: SeDA over all sets, a baseline on each set ("mlp on wikipedia")."""
    return method if method == SEDA else f"{method} on {name}"


def settings_of(selected: Selected, method: str, name: str, regime: str = "full") -> dict[str, Any]:
    """The settings chosen for a method on a set; its defaults where none were. With few labels a baseline may have
    more passes. The MLP that learns from a text classifier's labels is the MLP that learns from all rows."""
    found: Mapping[str, Any] = selected.get(group(MLP if method == MLP_PSEUDO else method, name), {})
    if regime.startswith("labels") and method != MLP_PSEUDO:
        found = found.get("few_labels", found)
    return dict(found.get("settings", {}))


def task_of(job: Job, data: DataSet) -> Task:
    """The part that a job names, in its regime: the whole set with its test part, or a fold of its training part."""
    if job.part == TEST:
        return apply(job.regime, data.task, job.seed)
    kind, _, number = job.part.partition(" ")
    index, folds = map(int, number.split("/"))
    partition = index // folds + (0 if kind == CHOICE else _FRESH_PARTITIONS)
    return apply(job.regime, fold(data, index % folds, folds, seed=partition), job.seed)


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
    ours: int | None = None,
    methods: Sequence[str] = SELECTED,
) -> dict[str, dict[str, Any]]:
    """Successive halving (Jamieson & Talwalkar 2016) in two rungs, the same for every method.

    All ``count`` settings (of SeDA ``ours``, if given) are tried on one fold; the default and the best quarter then on
    all folds of ``repeats`` partitions. Last, each network among the baselines is offered the time that SeDA takes (see
    `lengthened`), on the same folds: once with all labels, and then, for the regimes of few labels alone, with few.
    Only ``methods`` are chosen for (`MLP` for `MLP_PSEUDO`, which has its settings) and SeDA, whose time counts.
    ``ready`` makes the records of jobs; SeDA is trained in ``precision``, and its defaults once more in float32, which
    the others have and which their time is held against.

    Returns:
        By group: ``settings`` chosen, their mean ``top1`` in percent over all folds, sets and regimes, the same of the
        default settings, the ``standard_error`` of the difference over folds, and how many settings were ``tried``; of
        SeDA also the ``sets``, ``folds`` and ``repeats`` of the choice, `visual_weights`, ``float32`` (see
        `_float32`) and by set its ``seconds`` in float32; where there
        was time for more passes, ``longer``: the factor, the mean top-1 and ``seconds`` with them, and the best mean
        top-1 without; the same with few labels, ``few_labels``, and the better ``settings`` there.
    """
    wanted = {SEDA, *methods, *([MLP] if MLP_PSEUDO in methods else [])}
    chosen_for = [method for method in SELECTED if method in wanted]
    tried = {
        group(m, name): candidates(m, (ours or count) if m == SEDA else count) for name in sets for m in chosen_for
    }
    first = jobs(sets, tried, [0], folds, precision)
    best = ranked(ready(first), first)
    kept = {}
    for name, found in best.items():
        survivors = [settings for _, settings in found[: -(-len(found) // 4)]]
        kept[name] = survivors if {} in survivors else [{}, *survivors]
    second = jobs(sets, kept, range(folds * repeats), folds, precision)
    own = jobs(sets, {SEDA: [{}]}, range(folds), folds)
    runs = ready([*second, *own])
    best_settings = {name: found[0][1] for name, found in ranked(runs, second).items()}
    factors = lengthened(runs, second, best_settings, own, "full")
    longer = {name: _more_passes(best_settings[name], factor) for name, factor in factors.items()}
    third = jobs(sets, {name: [settings] for name, settings in longer.items()}, range(folds * repeats), folds)
    runs = ready(third)
    selected: dict[str, dict[str, Any]] = {}
    for name, found in ranked(runs, [*second, *third]).items():
        top1, settings = found[0]
        selected[name] = {
            "settings": dict(settings),
            "top1": top1,
            "default_top1": next(score for score, other in found if not other),
            "standard_error": _standard_error(runs, [*second, *third], name, settings),
            "tried": len(tried[name]),
        }
        if name in longer:
            score = next(score for score, other in found if other == longer[name])
            seconds = seconds_of(runs, third, name, longer[name])
            shorter = next(score for score, other in found if other != longer[name])
            selected[name]["longer"] = {
                "factor": factors[name], "top1": score, "seconds": seconds, "shorter_top1": shorter,
            }  # fmt: skip
    chosen = {name: found["settings"] for name, found in selected.items()}
    for name, found in _with_few_labels(ready, sets, chosen, [*second, *third], own, folds * repeats, folds).items():
        selected[name]["few_labels"] = found
    selected[SEDA].update(
        precision=precision,
        visual_weights=visual_weights(runs, second),
        float32=_float32(runs, own, precision),
        seconds={name: _seconds(runs, own, name) for name in sets},
        sets=list(sets),
        folds=folds,
        repeats=repeats,
    )
    return selected


def merged(old: Selected, found: Selected) -> dict[str, dict[str, Any]]:
    """What was found, beside what earlier selections found on other sets.

    What is known of SeDA set by set is kept; its means are of the sets that were chosen for together, ``sets``.
    """
    result = {**{name: dict(of) for name, of in old.items()}, **{name: dict(of) for name, of in found.items()}}
    if SEDA in old and SEDA in found:
        for part in ("seconds", "visual_weights"):
            result[SEDA][part] = {**old[SEDA].get(part, {}), **found[SEDA][part]}
    return result


def _with_few_labels(
    ready: Callable[[Sequence[Job]], Runs],
    sets: Sequence[str],
    chosen: Mapping[str, Mapping[str, Any]],
    known: Sequence[Job],
    own: Sequence[Job],
    parts: int,
    folds: int,
) -> dict[str, dict[str, Any]]:
    """By group, what more passes of its ``chosen`` setting give with few labels, where there was time for them.

    ``known`` are the jobs that chose, ``own`` SeDA's. Top-1 and seconds are of few labels alone.
    """
    factors = lengthened(ready([]), known, chosen, own, FEW_LABELS)
    longer = {name: _more_passes(chosen[name], factor) for name, factor in factors.items()}
    offered = jobs(sets, {name: [settings] for name, settings in longer.items()}, range(parts), folds)
    few = [job for job in [*known, *offered] if job.regime == FEW_LABELS]
    runs = ready([job for job in offered if job.regime == FEW_LABELS])
    found = {}
    for name, settings in longer.items():
        by_settings = {json.dumps(dict(tried), sort_keys=True): top1 for top1, tried in ranked(runs, few)[name]}
        more, fewer = (by_settings[json.dumps(dict(x), sort_keys=True)] for x in (settings, chosen[name]))
        found[name] = {
            "factor": factors[name], "top1": more, "seconds": seconds_of(runs, few, name, settings, FEW_LABELS),
            "shorter_top1": fewer, "settings": dict(settings if more > fewer else chosen[name]),
        }  # fmt: skip
    return found


def lengthened(
    runs: Runs, wanted: Sequence[Job], best: Mapping[str, Mapping[str, Any]], own: Sequence[Job], regime: str
) -> dict[str, int]:
    """By group, how many times the passes of its ``best`` setting fit into the time of a training of SeDA's.

    That is the largest power of two by which its seconds in ``regime``, multiplied, are at most SeDA's on the same set
    (``own``); only groups where it is 2 or more. ``wanted`` are jobs of the setting.
    """
    factors = {}
    for name, settings in best.items():
        method, _, of_set = name.partition(" on ")
        if method in (MLP, ONE_STEP, ONE_STEP_MSE):
            allowed, taken = _seconds(runs, own, of_set, regime), seconds_of(runs, wanted, name, settings, regime)
            if taken > 0 and allowed >= 2 * taken:
                factors[name] = 2 ** int(np.log2(allowed / taken))
    return factors


def seconds_of(
    runs: Runs, wanted: Sequence[Job], name: str, settings: Mapping[str, Any], regime: str = "full"
) -> float:
    """Of a training of a group's ``settings``."""
    same = [j for j in wanted if group(j.method, j.set) == name and j.settings == settings]
    return _seconds(runs, same, same[0].set, regime)


def _seconds(runs: Runs, wanted: Sequence[Job], name: str, regime: str = "full") -> float:
    """The least over those of ``wanted`` on the set ``name`` in ``regime``: what other work has held up least."""
    return min(runs.records[j.key].seconds for j in wanted if (j.set, j.regime) == (name, regime))


def _more_passes(settings: Mapping[str, Any], factor: int) -> dict[str, Any]:
    return {**settings, "epochs": factor * settings.get("epochs", DEFAULT_EPOCHS)}


def _float32(runs: Runs, own: Sequence[Job], precision: PrecisionName) -> dict[str, float]:
    """Mean top-1 of SeDA's defaults in float32 minus that in ``precision``, and its standard error over folds."""
    pairs = [(runs.records[j.key], runs.records[replace(j, precision=precision).key]) for j in own]
    gaps = [a.metrics["top1"] - b.metrics["top1"] for a, b in pairs]
    error = float(np.std(gaps, ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else 0.0
    return {"gain": float(np.mean(gaps)), "standard_error": error, "trainings": len(gaps)}


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
