"""Prediction shared among ranks: each predicts a contiguous part, all get the whole in its order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from .data import EvaluationRows, VisualRows
from .nn import SeDA
from .outputs import PREDICTION_SEED, Float, Outputs, model_log_proba, model_outputs
from .ranks import Ranks


def sharded_outputs(
    model: SeDA,
    rows: EvaluationRows | VisualRows,
    ranks: Ranks,
    *,
    seed: int = PREDICTION_SEED,
    on_rows: Callable[[int], object] = lambda rows: None,
) -> Outputs:
    """`model_outputs` of all rows, on every rank; the same bits however many there are, as rows do not see each other.

    ``on_rows`` is called with the number of rows that this rank has done since the last call.
    """
    found = model_outputs(model, _own(rows, ranks), seed=seed, on_rows=on_rows)
    return Outputs(**{name: ranks.join(array, len(rows.visual)) for name, array in found.arrays().items()})


def sharded_log_proba(
    model: SeDA,
    rows: EvaluationRows | VisualRows,
    ranks: Ranks,
    *,
    seed: int = PREDICTION_SEED,
    on_rows: Callable[[int], object] = lambda rows: None,
) -> Float:
    """`model_log_proba` of all rows (M, K), as `sharded_outputs`."""
    return ranks.join(model_log_proba(model, _own(rows, ranks), seed=seed, on_rows=on_rows), len(rows.visual))


def _own(rows: EvaluationRows | VisualRows, ranks: Ranks) -> EvaluationRows | VisualRows:
    part = ranks.part(len(rows.visual))
    labels = None if rows.labels is None else rows.labels[part]
    return dataclasses.replace(rows, visual=rows.visual[part], ids=rows.ids[part], labels=labels)  # type: ignore[arg-type]
