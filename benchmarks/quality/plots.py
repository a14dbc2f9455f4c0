"""One picture a regime: the methods' accuracies side by side, set by set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .methods import BASELINES, SEDA
from .regimes import REGIMES


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """A PNG of each regime that ``rows`` of `summary.summarise` have; bars show the deviation over seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [SEDA, *BASELINES]
    width = 0.9 / len(shown)
    for regime in REGIMES:
        of_regime = [row for row in rows if row["regime"] == regime]
        if not of_regime:
            continue
        figure, axis = plt.subplots(figsize=(8, 3.5), layout="constrained")
        for i, method in enumerate(shown):
            found = [(x, row["methods"][method]) for x, row in enumerate(of_regime) if method in row["methods"]]
            places = [x + (i - (len(shown) - 1) / 2) * width for x, _ in found]
            axis.bar(
                places,
                [f["top1"] for _, f in found],
                width=0.95 * width,
                yerr=[f["deviation"] or 0 for _, f in found],
                label=method if found else None,
                color=f"C{i}",
            )
        axis.set_xticks(range(len(of_regime)), [row["set"] for row in of_regime])
        axis.set_ylabel("top-1, %")
        axis.set_title(regime)
        figure.legend(loc="outside lower center", ncols=len(shown), fontsize="small")
        figure.savefig(folder / f"{regime}.png", dpi=90, metadata={"Software": None})
        plt.close(figure)
