"""``docs/exploration.md``: what `explore` measured, written for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from .regimes import SETS
from .runs import Record, earlier_recipe
from .variants import VARIANTS

PREFIX = "seda~"
DEFAULTS = PREFIX + "defaults"
SAMPLERS = {
    "ddim": "DDIM",
    "renoise": "the source, nought, noised afresh at every step; mean of the estimates",
    "afresh": "the estimate noised afresh at every step; the last",
}
REGIMES = {"full": "With all labels", "labels-8": "With 8 labels a class and all other pairs unlabelled"}
# Said of records of the recipe as it was.
_EARLIER = (
    "This page is of `--regimes full --folds 2` and of `--regimes labels-8 --folds 1`, there with `--folds 3` for what",
    "did best on the first, which therefore favours them, and `--folds 6` for the best of these. All of them",
    "had a textual head that started at random and no kernel head, and with 8 labels a class the teacher of pairs",
    "as it was before it drew each pair to its nearest ones and saw what the two spaces share. Trainings of today's",
    "recipe do not compare with them: `--runs again/exploration.jsonl --out again/exploration.md` begins anew.",
)
# By place: which records hold a set and regime's folds.
Place = Mapping[str, Mapping[str, Record]]
Value = Callable[[Record], float]


def _top1(record: Record) -> float:
    return record.metrics["top1"]


def markdown(records: Iterable[Record], predictions: Mapping[str, str], samplings: Sequence[tuple[str, int]]) -> str:
    """The page, from all records; ``predictions`` by name, in words; ``samplings`` as in `explore.SAMPLINGS`."""
    found = list(records)
    minutes = sum(r.seconds for r in found) / 60
    lines = [
        "# What else was tried of the recipe",
        "",
        "<!-- Written by `python -m benchmarks.quality.explore`; edit that, not this. -->",
        "",
        "Each line differs from the defaults by one thing. Made by `python -m benchmarks.quality.explore` on folds of",
        "the training parts (two thirds train, one third tells); no test part is read. Points of top-1, the mean over",
        "folds of the difference to the defaults on the same rows with the same seed, with its standard error over",
        "folds, whose number is in brackets: they are few and share rows, so an error is itself known roughly. Of two",
        "folds it says next to nothing: every third difference lies two errors away by chance. SeDA is trained in",
        "bf16.",
        "",
        f"So far {len(found)} trainings, whose wall times add up to {minutes:.0f} minutes, most of them two at a time",
        "on two cores. The command makes what is missing; `--folds`, `--regimes` and `--variants` say of what.",
        *(_EARLIER if earlier_recipe(r for r in found if r.job.method == DEFAULTS) else ()),
        "",
    ]
    for regime, title in REGIMES.items():
        lines += _variants(title, [r for r in found if r.job.regime == regime])
    lines += _predictions([r for r in found if r.job.regime == "full"], predictions)
    lines += _samplings([r for r in found if r.job.regime == "full"], samplings)
    return "\n".join(lines).rstrip() + "\n"


def _by_method(records: Iterable[Record], name: str) -> dict[str, dict[str, Record]]:
    """The records of one set: by method, by fold."""
    by: dict[str, dict[str, Record]] = {}
    for record in records:
        if record.job.set == name:
            by.setdefault(record.job.method, {})[record.job.part] = record
    return by


def _gaps(by: Place, method: str, ours: Value, base: Value) -> list[float]:
    """Differences to the defaults on the folds that both have."""
    reference = by.get(DEFAULTS, {})
    return [ours(r) - base(reference[part]) for part, r in by.get(method, {}).items() if part in reference]


def _shown(gaps: Sequence[float], digits: int = 1) -> str:
    """Mean with its standard error and the number of folds."""
    if not gaps:
        return "-"
    mean = f"{np.mean(gaps):+.{digits}f}"
    if len(gaps) == 1:
        return f"{mean} (1)"
    return f"{mean} ± {np.std(gaps, ddof=1) / np.sqrt(len(gaps)):.{digits}f} ({len(gaps)})"


def _over_sets(by_set: Sequence[Sequence[float]], digits: int = 1) -> str:
    """Mean over sets of the means over folds, with the standard error that follows from those of the sets."""
    if any(len(gaps) < 2 for gaps in by_set):
        return "-"
    mean = np.mean([np.mean(gaps) for gaps in by_set])
    error = np.sqrt(np.sum([np.var(gaps, ddof=1) / len(gaps) for gaps in by_set])) / len(by_set)
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


def _variants(title: str, records: Sequence[Record]) -> list[str]:
    """Top-1 of every variant, and the alignment and time of its trainings on the main set."""
    sets = {name: _by_method(records, name) for name in SETS}
    sets = {name: by for name, by in sets.items() if DEFAULTS in by}
    if not sets:
        return []
    about = ["cosine", "Frechet", "time"] if "fashion_products" in sets else []
    lines = [
        f"## {title}",
        "",
        "Cosine (of the point estimate; difference), Frechet distance and time (ratios) are those of fashion_products.",
        "",
        "| what is changed | " + " | ".join([*sets, "mean of the sets", *about]) + " |",
        "|" + "---|" * (len(sets) + 2 + len(about)),
    ]
    defaults = [f"{np.mean([_top1(r) for r in by[DEFAULTS].values()]):.1f}" for by in sets.values()]
    lines.append(f"| nothing: top-1 itself | {' | '.join(defaults)} | |" + " |" * len(about))
    for name, variant in VARIANTS.items():
        method = PREFIX + name
        if method == DEFAULTS or not any(method in by for by in sets.values()):
            continue
        gaps = [_gaps(by, method, _top1, _top1) for by in sets.values()]
        cells = [*(_shown(g) for g in gaps), _over_sets(gaps)]
        if about:
            cells += _of_main_set(sets["fashion_products"], method)
        lines.append(f"| {variant.about} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _of_main_set(by: Place, method: str) -> list[str]:
    pairs = [(r, by[DEFAULTS][part]) for part, r in by.get(method, {}).items() if part in by[DEFAULTS]]
    if not pairs:
        return ["-", "-", "-"]
    cosine = np.mean([a.alignment_point["cosine"] - b.alignment_point["cosine"] for a, b in pairs])  # type: ignore[index]
    frechet = np.mean([a.alignment["frechet"] / b.alignment["frechet"] for a, b in pairs])  # type: ignore[index]
    seconds = np.median([a.seconds / b.seconds for a, b in pairs])
    return [f"{cosine:+.3f}", f"{frechet:.2f}", f"{seconds:.1f}"]


def _predictions(records: Sequence[Record], predictions: Mapping[str, str]) -> list[str]:
    """What a model of the defaults gives when it predicts in another way."""
    sets = {name: _by_method(records, name).get(DEFAULTS, {}) for name in SETS}
    sets = {name: by for name, by in sets.items() if by}
    if not sets:
        return []
    lines = [
        "## Other ways to predict, with all labels",
        "",
        "The same trained models. After the accuracies, the expected calibration error in points, mean over folds.",
        "",
        "| what is changed | " + " | ".join([*sets, "mean of the sets", *(f"error, {name}" for name in sets)]) + " |",
        "|" + "---|" * (2 * len(sets) + 2),
    ]
    means = [f"{np.mean([_top1(r) for r in by.values()]):.1f}" for by in sets.values()]
    errors = [f"{np.mean([r.metrics['ece'] for r in by.values()]):.1f}" for by in sets.values()]
    lines.append("| nothing: top-1 itself | " + " | ".join([*means, "", *errors]) + " |")
    for name, about in predictions.items():
        key, other = f"top1_{name}", f"ece_{name}"
        gaps = [[r.metrics[key] - _top1(r) for r in by.values() if key in r.metrics] for by in sets.values()]
        measured = [[r.metrics[other] for r in by.values() if other in r.metrics] for by in sets.values()]
        errors = [f"{np.mean(found):.1f}" if found else "-" for found in measured]
        cells = [*(_shown(g) for g in gaps), _over_sets(gaps), *errors]
        lines.append(f"| {about} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _drawn(records: Sequence[Record], sampler: str, steps: int) -> str:
    """Mean measures of the texts that the textual stage drew in one way, on the folds where it was measured."""
    means = []
    for key in ("frechet", "cosine", "recall_at_10"):
        if (sampler, steps) == ("ddim", 1):
            found = [r.alignment_point[key] for r in records if r.alignment_point]
        elif (sampler, steps) == ("ddim", 10):
            found = [r.alignment[key] for r in records if r.alignment]
        else:
            found = [r.metrics[name] for r in records if (name := f"{key}_{sampler}_{steps}") in r.metrics]
        means.append(np.mean(found) if found else None)
    return "-" if None in means else f"{means[0]:.3g}, {means[1]:.3f}, {means[2]:.1f}"


def _samplings(records: Sequence[Record], samplings: Sequence[tuple[str, int]]) -> list[str]:
    """How texts that are drawn in more or fewer steps lie."""
    sets = {name: list(_by_method(records, name).get(DEFAULTS, {}).values()) for name in SETS}
    sets = {name: found for name, found in sets.items() if found}
    if not sets:
        return []
    lines = [
        "## Steps of the textual stage",
        "",
        "Frechet distance, cosine to the own text and recall@10 in percent of the texts of a fold's held-out rows.",
        "",
        "| sampler | steps | " + " | ".join(sets) + " |",
        "|" + "---|" * (len(sets) + 2),
    ]
    # What every training measures, and what those of the defaults measure besides.
    ways = sorted([("ddim", 1), ("ddim", 10), *samplings], key=lambda way: (list(SAMPLERS).index(way[0]), way[1]))
    for way in ways:
        cells = [_drawn(records, *way) for records in sets.values()]
        lines.append(f"| {SAMPLERS[way[0]]} | {way[1]} | " + " | ".join(cells) + " |")
    return [*lines, ""]
