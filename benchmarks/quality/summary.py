"""From records to tables: means and deviations over seeds, and bootstrap intervals of SeDA minus the best baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .methods import ABLATIONS, BASELINES, METHODS, SEDA
from .regimes import ABOUT, REGIMES, SETS
from .runs import TEST, Record, of
from .selection import Selected, settings_of

_RESAMPLES = 10_000


def bootstrap(ours: Sequence[Record], theirs: Sequence[Record]) -> tuple[float, float, float]:
    """Mean difference in accuracy, ours minus theirs, and its paired 95 % interval over test rows, in points.

    A row's value is the difference of its share of right answers over the seeds that both have.
    """
    seeds = {r.job.seed for r in ours} & {r.job.seed for r in theirs}
    a, b = (np.mean([r.right for r in records if r.job.seed in seeds], axis=0) for records in (ours, theirs))
    difference = 100 * (a - b)
    rng = np.random.default_rng(0)
    means = [difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def summarise(records: Sequence[Record], selected: Selected) -> list[dict[str, Any]]:
    """A row for each set and regime that has records of the test part: of SeDA at its defaults, of the others with the
    settings ``selected`` for the set."""
    rows = []
    records = [r for r in records if r.job.part == TEST and _counts(r, selected)]
    for name in SETS:
        for regime in REGIMES:
            found = {m: of(records, set=name, regime=regime, method=m, part=TEST) for m in METHODS}
            found = {m: r for m, r in found.items() if r}
            if SEDA not in found:
                continue
            rows.append({"set": name, "regime": regime, "methods": {m: _statistics(r) for m, r in found.items()}})
            known = [m for m in BASELINES if m in found]
            if known:
                best = max(known, key=lambda m: rows[-1]["methods"][m]["top1"])
                mean, low, high = bootstrap(found[SEDA], found[best])
                rows[-1].update(best_baseline=best, difference=mean, interval=[low, high])
    return rows


def _counts(record: Record, selected: Selected) -> bool:
    job = record.job
    wanted = {} if job.method.startswith(SEDA) else settings_of(selected, job.method, job.set)
    return dict(job.settings) == wanted


def _statistics(records: Sequence[Record]) -> dict[str, Any]:
    top1 = [r.metrics["top1"] for r in records]
    result: dict[str, Any] = {
        "top1": float(np.mean(top1)),
        "deviation": float(np.std(top1, ddof=1)) if len(top1) > 1 else None,
        "seeds": len(top1),
        "seconds": float(np.mean([r.seconds for r in records])),
    }
    for kind in ("alignment", "alignment_point"):
        found = [getattr(r, kind) for r in records if getattr(r, kind)]
        result[kind] = {k: float(np.mean([f[k] for f in found])) for k in found[0]} if found else None
    return result


def markdown(rows: Sequence[dict[str, Any]], selected: Selected, command: str) -> str:
    """``docs/quality.md``."""
    lines = [
        "# When SeDA helps and when it does not",
        "",
        "<!-- Written by `python -m benchmarks.quality`; edit that, not this. -->",
        "",
        f"Top-1 on the test parts in percent, mean ± standard deviation over seeds; made by `{command}`, which keeps",
        "what it has and goes on where it was stopped. *Difference* is SeDA minus the row's best baseline, with its",
        "paired bootstrap 95 % interval over test rows. Baselines get the unlabelled pairs too (`one_step` by its",
        "squared error, `mlp_pseudo` by labels that a text classifier gives them).",
        "",
        *(f"- **{name}**: {about}" for name, about in ABOUT.items()),
        "",
    ]
    for name in SETS:
        of_set = [row for row in rows if row["set"] == name]
        if of_set:
            lines += [f"## {name}", "", *_accuracy_table(of_set), ""]
            lines += [f"![{name}](quality/{name}.png)", ""]
            lines += _alignment_table(of_set)
            lines += _ablation_table(of_set)
    lines += _selection_table(selected)
    return "\n".join(lines).rstrip() + "\n"


def _selection_table(selected: Selected) -> list[str]:
    if not selected:
        return ["## Settings", "", "Selection was not run: every method has its defaults.", ""]
    lines = [
        "## Settings",
        "",
        "Chosen by cross-validation of training parts, equally many tried for each (`--select`); SeDA is measured with",
        "its defaults whatever is chosen. Mean top-1 of the folds:",
        "",
        "| method and set | settings tried | defaults | best | best settings |",
        "|---|---|---|---|---|",
    ]
    for name, found in sorted(selected.items()):
        settings = ", ".join(f"{k} {v}" for k, v in found["settings"].items()) or "the defaults"
        cells = (name, found["tried"], f"{found['default_top1']:.1f}", f"{found['top1']:.1f}", settings)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    deviation = "" if found["deviation"] is None else f" ± {found['deviation']:.1f}"
    return f"{found['top1']:.1f}{deviation}"


def _accuracy_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    shown = [SEDA, *BASELINES]
    lines = ["| regime | " + " | ".join(shown) + " | difference | seeds |", "|" + "---|" * (len(shown) + 3)]
    for row in rows:
        cells = [_cell(row["methods"].get(m)) for m in shown]
        low, high = row.get("interval", (0, 0))
        gap = f"{row['difference']:+.1f} ({low:+.1f} .. {high:+.1f})" if "interval" in row else "-"
        lines.append(f"| {row['regime']} | " + " | ".join(cells) + f" | {gap} | {row['methods'][SEDA]['seeds']} |")
    return lines


def _alignment_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    keys = ("frechet", "cosine", "recall_at_1", "recall_at_10")
    lines = []
    for row in rows:
        if row["regime"] != "full":
            continue
        lines = ["Alignment with the test part's texts (full set):", "", "| | " + " | ".join(keys) + " |"]
        lines.append("|" + "---|" * (len(keys) + 1))
        for method, found in row["methods"].items():
            for kind, label in (("alignment", method), ("alignment_point", f"{method}, point estimate")):
                values = found[kind]
                if values and (kind == "alignment" or values != found["alignment"]):
                    lines.append(f"| {label} | " + " | ".join(f"{values[k]:.3g}" for k in keys) + " |")
        floor = row["methods"][SEDA]["alignment"]["frechet_floor"]
        lines += ["", f"The Frechet distance between two halves of the real texts is {floor:.3g}.", ""]
    return lines


def _ablation_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    shown = [row for row in rows if any(m in row["methods"] for m in ABLATIONS)]
    if not shown:
        return []
    names = [SEDA, *ABLATIONS]
    lines = ["Ablations:", "", "| regime | " + " | ".join(n.removeprefix("seda:") for n in names) + " |"]
    lines.append("|" + "---|" * (len(names) + 1))
    for row in shown:
        lines.append(f"| {row['regime']} | " + " | ".join(_cell(row["methods"].get(n)) for n in names) + " |")
    return [*lines, ""]


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """One picture per set: every regime's methods side by side, with their deviation over seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [SEDA, *BASELINES]
    width = 0.9 / len(shown)
    for name in SETS:
        of_set = [row for row in rows if row["set"] == name]
        if not of_set:
            continue
        figure, axis = plt.subplots(figsize=(12, 4), layout="constrained")
        for i, method in enumerate(shown):
            found = [(x, row["methods"][method]) for x, row in enumerate(of_set) if method in row["methods"]]
            places = [x + (i - len(shown) / 2) * width for x, _ in found]
            axis.bar(
                places,
                [f["top1"] for _, f in found],
                width=0.95 * width,
                yerr=[f["deviation"] or 0 for _, f in found],
                label=method,
            )
        axis.set_xticks(range(len(of_set)), [row["regime"] for row in of_set])
        axis.set_ylabel("top-1, %")
        axis.set_title(name)
        axis.legend(ncols=len(shown), fontsize="small")
        figure.savefig(folder / f"{name}.png", dpi=90, metadata={"Software": None})
        plt.close(figure)
