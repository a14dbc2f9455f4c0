"""A trained model's outputs on rows of features: classes, and features carried through both stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from .arrays import release
from .arrays import rows as float_rows
from .data import EvaluationRows, VisualRows
from .files import DataError
from .nn import SeDA
from .nn.seda import BLOCK_ROWS

Float = NDArray[np.float32]
# Rows read at a time, at least, from what may be a memory map.
_CHUNK_ROWS = 1024
# The noise that evaluation and prediction use by default; training's seed is another matter.
PREDICTION_SEED = 0


@dataclass(frozen=True)
class Outputs:
    """A model's outputs on M rows, float32: log-probabilities (M, K) combined and of each head; ``semantic`` s
    (M, Dv), ``aligned`` t_ (M, Dt) sampled with the textual steps, ``aligned_point`` t_ with the classification
    steps (all standardised). A model without kernel head has None there."""

    log_proba: Float
    semantic_log_proba: Float
    textual_log_proba: Float
    visual_log_proba: Float
    semantic: Float
    aligned: Float
    aligned_point: Float
    kernel_log_proba: Float | None = None

    def arrays(self) -> dict[str, Float]:
        """The arrays by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in found.items() if array is not None}

    def heads(self) -> dict[str, Float]:
        """Each head's log-probabilities, (M, K), by the head's name."""
        suffix = "_log_proba"
        return {name.removesuffix(suffix): array for name, array in self.arrays().items() if name.endswith(suffix)}


def model_outputs(
    model: SeDA,
    rows: EvaluationRows | VisualRows,
    *,
    seed: int = PREDICTION_SEED,
    on_rows: Callable[[int], object] = lambda rows: None,
) -> Outputs:
    """Predict and align ``rows.visual`` (M, Dv). Text and labels are not looked at.

    ``on_rows`` is called with the number of rows done since the last call.
    """

    def everything(visual: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (combined, s, t, v, *kernel), *aligned = model.predict_and_align(visual, ids, seed=seed)
        return combined, s, t, v, *aligned, *kernel

    return Outputs(*_of_chunks(model, rows, everything, on_rows))


def model_log_proba(
    model: SeDA,
    rows: EvaluationRows | VisualRows,
    *,
    seed: int = PREDICTION_SEED,
    on_rows: Callable[[int], object] = lambda rows: None,
) -> Float:
    """The combined log-probabilities (M, K) alone, the same bits as those of `model_outputs`, in less of its time:
    nothing is aligned but what the heads look at."""

    def combined(visual: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = model.predict_log_proba(visual, ids, seed=seed)
        assert isinstance(found, torch.Tensor)
        return (found,)

    (found,) = _of_chunks(model, rows, combined, on_rows)
    return found


def _of_chunks(
    model: SeDA,
    rows: EvaluationRows | VisualRows,
    function: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]],
    on_rows: Callable[[int], object],
) -> list[Float]:
    """What ``function`` makes of features (m, Dv) and sample ids (m,), some rows at a time, put together."""
    device = model.centres.device
    # The model fills whole blocks.
    chunk_rows = max(_CHUNK_ROWS, BLOCK_ROWS[device.type])
    parts: list[tuple[torch.Tensor, ...]] = []
    with torch.inference_mode():
        for start in range(0, max(1, len(rows.visual)), chunk_rows):
            index = np.arange(start, min(start + chunk_rows, len(rows.visual)))
            visual = torch.from_numpy(float_rows(rows.visual, index)).to(device)
            ids = torch.from_numpy(np.asarray(rows.ids[index])).to(device)
            parts.append(tuple(part.cpu() for part in function(visual, ids)))
            release(rows.visual)
            _refuse_nan(rows, index, parts[-1])
            on_rows(len(index))
    return [torch.cat(part).numpy() for part in zip(*parts, strict=True)]


def first_nan(outputs: Sequence[torch.Tensor]) -> int | None:
    """The first row that is NaN anywhere in ``outputs``, (m, ..) each; -inf is a probability."""
    bad = torch.stack([output.isnan().any(dim=1) for output in outputs]).any(dim=0)
    return int(bad.to(torch.int8).argmax()) if bad.any() else None


def _refuse_nan(rows: EvaluationRows | VisualRows, index: NDArray[np.int64], outputs: Sequence[torch.Tensor]) -> None:
    """Raises DataError for the first row of ``index`` (m,) whose ``outputs`` (m, ..) are NaN."""
    bad = first_nan(outputs)
    if bad is not None:
        row = int(rows.ids[index[bad]])
        raise DataError(f"{rows.source}: row {row} has features so large that its prediction is not a number")
