"""From records to figures: means and deviations over seeds, bootstrap intervals of SeDA minus the best baseline, and
whether they reach what was asked of the method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .methods import ABLATIONS, BASELINES, BRIDGE, METHODS, SEDA, TEXT_FREE
from .regimes import REGIMES, SETS
from .runs import CHOICE, FRESH, TEST, Record, of, weight_name
from .selection import Selected, settings_of

_RESAMPLES = 10_000
# What the heads say without others; the trained three are all that a record has which names no kernel head.
_SINGLE = {"visual_head": weight_name(1.0), "kernel_head": weight_name(1.0, "kernel")}
_THREE_HEADS = weight_name(0.0, "kernel")
FEW = ("labels-4", "labels-8", "labels-16")
# Shown beside top-1, None where a record lacks them.
_OTHER_METRICS = ("top5", "balanced_accuracy", "ece")


def _gap(ours: Sequence[Record], theirs: Sequence[Record]) -> NDArray[np.float64]:
    """For each test row the difference of its share of right answers over the seeds that both have, in points."""
    seeds = {r.job.seed for r in ours} & {r.job.seed for r in theirs}
    a, b = (np.mean([r.right for r in records if r.job.seed in seeds], axis=0) for records in (ours, theirs))
    gap: NDArray[np.float64] = 100 * (a - b)
    return gap


def _resampled(gap: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over test rows drawn with replacement."""
    rng = np.random.default_rng(0)
    return np.array([gap[rng.integers(len(gap), size=len(gap))].mean() for _ in range(_RESAMPLES)])


def bootstrap(ours: Sequence[Record], theirs: Sequence[Record]) -> tuple[float, float, float]:
    """Mean difference in accuracy, ours minus theirs, and its paired 95 % interval over test rows, in points."""
    gap = _gap(ours, theirs)
    low, high = np.percentile(_resampled(gap), [2.5, 97.5])
    return float(gap.mean()), float(low), float(high)


def summarise(records: Sequence[Record], selected: Selected) -> list[dict[str, Any]]:
    """A row for each set and regime that has records of the test part: of SeDA at its defaults, of the others with the
    settings ``selected`` for the set."""
    rows, few = [], dict[str, list[NDArray[np.float64]]]()
    midway = [r for r in records if r.job.part == TEST and r.job.method == BRIDGE and not r.job.settings]
    records = [r for r in records if r.job.part == TEST and _counts(r, selected)]
    for name in dict.fromkeys([*SETS, *(r.job.set for r in records)]):
        for regime in REGIMES:
            found = {m: of(records, set=name, regime=regime, method=m, part=TEST) for m in METHODS}
            found = {m: r for m, r in found.items() if r}
            if SEDA not in found:
                continue
            # A seed draws the labels and rows of a regime: means over different seeds do not compare.
            seeds = {r.job.seed for r in found[SEDA]}
            found = {m: [r for r in records if r.job.seed in seeds] for m, records in found.items()}
            found = {m: r for m, r in found.items() if r}
            rows.append({"set": name, "regime": regime, "methods": {m: _statistics(r) for m, r in found.items()}})
            ablated = {r.job.seed for m in ABLATIONS for r in found.get(m, [])}
            same = [r for r in found[SEDA] if r.job.seed in ablated]
            if same:
                # What the ablations are read against: they may have fewer seeds.
                rows[-1]["seda_of_ablations"] = _statistics(same)
            known = [m for m in BASELINES if m in found]
            if known:
                best = max(known, key=lambda m: rows[-1]["methods"][m]["top1"])
                mean, low, high = bootstrap(found[SEDA], found[best])
                rows[-1].update(best_baseline=best, difference=mean, interval=[low, high])
                if regime in FEW:
                    few.setdefault(name, []).append(_gap(found[SEDA], found[best]))
            without = [m for m in TEXT_FREE if m in found]
            if without:
                best = max(without, key=lambda m: rows[-1]["methods"][m]["top1"])
                mean, low, high = bootstrap(found[SEDA], found[best])
                rows[-1]["text_gain"] = {"baseline": best, "difference": mean, "interval": [low, high]}
            plain = of(midway, set=name, regime=regime)
            if BRIDGE in found and plain and settings_of(selected, BRIDGE, name):
                rows[-1]["bridge_midway"] = _statistics(plain)
    # Sets are drawn from apart; a set's regimes have its rows in common.
    drawn = [_resampled(np.mean(gaps, axis=0)) for gaps in few.values()]
    if drawn:
        low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
        for row in rows:
            if row["regime"] in FEW:
                row["few_labels_interval"] = [float(low), float(high)]
    return rows


def cross_validated(records: Iterable[Record], selected: Selected) -> list[dict[str, Any]]:
    """What `summarise` gives for test parts, in short, for folds of training parts that no setting was chosen on.

    A row for each set, regime and size of a fold, which is one ``of`` so many: by method the mean ``top1`` in percent
    over the folds that all its methods have, how many ``folds`` these are, the ``best_baseline`` by that mean, SeDA's
    ``difference`` to it in points and the ``standard_error`` of that over folds.
    """
    found: dict[tuple[str, str, int], dict[str, dict[str, float]]] = {}
    for r in records:
        if r.job.part.startswith(FRESH) and _counts(r, selected):
            of_partition = int(r.job.part.rpartition("/")[2])
            methods = found.setdefault((r.job.set, r.job.regime, of_partition), {})
            methods.setdefault(r.job.method, {})[r.job.part] = r.metrics["top1"]
    rows = []
    for (name, regime, of_partition), methods in sorted(found.items(), key=lambda x: (x[0][2], *_place(*x[0][:2]))):
        shared = sorted(set.intersection(*(set(of_method) for of_method in methods.values())))
        top1 = {m: np.array([of_method[part] for part in shared]) for m, of_method in methods.items()}
        others = [m for m in BASELINES if m in top1]
        if SEDA not in top1 or not others or len(shared) < 2:
            continue
        best = max(others, key=lambda m: float(top1[m].mean()))
        gaps = top1[SEDA] - top1[best]
        rows.append({
            "set": name, "regime": regime, "folds": len(shared), "of": of_partition,
            "top1": {m: float(x.mean()) for m, x in top1.items()},
            "best_baseline": best, "difference": float(gaps.mean()),
            "standard_error": float(gaps.std(ddof=1) / np.sqrt(len(gaps))),
        })  # fmt: skip
    return rows


def _place(name: str, regime: str) -> tuple[int, str, int]:
    """Sets and regimes in their usual order, sets of one's own last."""
    return (list(SETS).index(name) if name in SETS else len(SETS)), name, REGIMES.index(regime)


def _counts(record: Record, selected: Selected) -> bool:
    job = record.job
    wanted = {} if job.method.startswith(SEDA) else settings_of(selected, job.method, job.set, job.regime)
    return dict(job.settings) == wanted


def _statistics(records: Sequence[Record]) -> dict[str, Any]:
    top1 = [r.metrics["top1"] for r in records]
    result: dict[str, Any] = {
        "top1": float(np.mean(top1)),
        "deviation": _deviation(top1),
        "seeds": len(top1),
        # Some trainings waited for other work: the median is what one takes beside others, the least what it takes.
        "median_seconds": float(np.median([r.seconds for r in records])),
        "least_seconds": float(min(r.seconds for r in records)),
        "most_seconds": float(max(r.seconds for r in records)),
    }
    for name in _OTHER_METRICS:
        known = name in records[0].metrics
        result[name] = float(np.mean([r.metrics[name] for r in records])) if known else None
    three = [r.metrics.get(_THREE_HEADS, r.metrics["top1"]) for r in records]
    result["three_heads"] = {"top1": float(np.mean(three)), "deviation": _deviation(three)}
    for name, metric in _SINGLE.items():
        if all(metric in r.metrics for r in records):
            result[name] = {"top1": float(np.mean([r.metrics[metric] for r in records])), "deviation": None}
    for kind in ("alignment", "alignment_point"):
        found = [getattr(r, kind) for r in records if getattr(r, kind)]
        result[kind] = {k: float(np.mean([f[k] for f in found])) for k in found[0]} if found else None
    return result


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def cost_of_selection(records: Iterable[Record]) -> tuple[int, float]:
    """How many trainings chose settings, and the minutes that they took."""
    seconds = [r.seconds for r in records if r.job.part.startswith(CHOICE)]
    return len(seconds), sum(seconds) / 60


@dataclass(frozen=True)
class Target:
    """Something asked of the method: what was asked in words, what was found in words, and whether it was reached."""

    asked: str
    found: str
    reached: bool


def targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """What the method was built to show, as far as ``rows`` of `summarise` can tell."""
    gaps = {(row["set"], row["regime"]): row["difference"] for row in rows if "difference" in row}
    full = {name: gap for (name, regime), gap in gaps.items() if regime == "full"}
    few = [gap for (_, regime), gap in gaps.items() if regime.startswith("labels")]
    others = {key: gap for key, gap in gaps.items() if key[1] != "full" and not key[1].startswith("labels")}
    found = []
    if full:
        mean = float(np.mean(list(full.values())))
        each = ", ".join(f"{name} {gap:+.1f}" for name, gap in full.items())
        found.append(Target("full sets: mean at least +0.5", f"{mean:+.1f}", mean >= 0.5))
        found.append(Target("full sets: none below -0.3", each, min(full.values()) >= -0.3))
    if few:
        mean = float(np.mean(few))
        low, high = next((row["few_labels_interval"] for row in rows if "few_labels_interval" in row), (mean, mean))
        said = f"{mean:+.2f} ({low:+.1f} .. {high:+.1f} over test rows)"
        found.append(Target("few labels, many pairs: mean at least +3", said, mean >= 3))
    if others:
        below = [f"{name} {regime} {gap:+.2f}" for (name, regime), gap in others.items() if gap < -0.5]
        found.append(Target("all other regimes: none below -0.5", ", ".join(below) or "none is", not below))
    return [*found, *_fashion_targets(rows)]


def _fashion_targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """Time and alignment on the main set."""
    methods = next((r["methods"] for r in rows if (r["set"], r["regime"]) == ("fashion_products", "full")), {})
    if not {SEDA, "one_step_mse"} <= set(methods):
        return []
    point, mapping = methods[SEDA]["alignment_point"], methods["one_step_mse"]["alignment"]
    frechet, count = methods[SEDA]["alignment"]["frechet"], methods[SEDA]["seeds"]
    least, median, most = (methods[SEDA][f"{which}_seconds"] for which in ("least", "median", "most"))
    took = f"{median:.0f}, the median of {count} trainings ({least:.0f} to {most:.0f})"
    took += " made two at a time beside other work"
    found = [Target("fashion_products: a training under 240 seconds", took, median < 240)]
    found += [Target("fashion_products: Frechet distance at most 60", f"{frechet:.1f}", frechet <= 60)]
    for key, name, form in (("cosine", "cosine", ".3f"), ("recall_at_10", "recall@10", ".1f")):
        text = f"{point[key]:{form}} against {mapping[key]:{form}}"
        asked = f"fashion_products, point estimate: {name} at least that of one_step_mse"
        found.append(Target(asked, text, point[key] >= mapping[key]))
    return found
