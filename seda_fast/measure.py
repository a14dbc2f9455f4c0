"""How good a trained model is on a test part: metrics of its outputs, and the table that shows them."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .arrays import release
from .arrays import rows as float_rows
from .data import EvaluationRows, class_text_rows
from .files import DataError
from .metrics import alignment_metrics, classification_metrics, multi_label_metrics
from .nn import STEPWISE, SeDA
from .outputs import Outputs

Float = NDArray[np.float32]

_BLOCK = 4096  # rows looked at together
# What a table shows of the class metrics: heading and key.
COLUMNS = (("top-1", "top1"), ("top-5", "top5"), ("balanced", "balanced_accuracy"), ("ECE", "ece"))
MULTI_LABEL_COLUMNS = (
    ("mAP", "map"),
    ("micro AP", "map_micro"),
    ("macro F1", "f1_macro"),
    ("micro F1", "f1_micro"),
    ("exact", "exact_match"),
    ("ECE", "ece"),
)


def class_metrics(log_proba: Float, labels: NDArray[Any]) -> dict[str, float]:
    """`classification_metrics` of class numbers (M,), `multi_label_metrics` of rows (M, K)."""
    return multi_label_metrics(log_proba, labels) if labels.ndim == 2 else classification_metrics(log_proba, labels)


def outputs_metrics(outputs: Outputs, model: SeDA, rows: EvaluationRows) -> dict[str, Any]:
    """The metrics of `Outputs`: the combined prediction's keys, ``heads`` and ``alignment`` of both settings."""
    text = standardised_text(model, rows)
    return {
        **class_metrics(outputs.log_proba, rows.labels),
        "heads": {name: class_metrics(found, rows.labels) for name, found in outputs.heads().items()},
        "alignment": alignment(outputs.aligned, text),
        "alignment_point": alignment(outputs.aligned_point, text),
        **({"chain": {"used": "step by step", "reason": STEPWISE}} if model.config.has_memory else {}),
    }


def standardised_text(model: SeDA, rows: EvaluationRows) -> Float | None:
    """The rows' text (M, Dt), standardised as the model does, NaN where it is missing; None with fewer than 4 texts.

    Where the rows bring no text at all, a model that was trained with class texts knows those of their classes.
    Raises DataError where a text is infinite in the model's units.
    """
    if rows.text is None and model.text_classes is not None and rows.labelled.sum() >= 4:
        return class_text_rows(model.text_classes.cpu().numpy(), rows.labels)
    if rows.text is None or rows.paired.sum() < 4:
        return None
    text = float_rows(rows.text, np.arange(len(rows.text)))
    with torch.inference_mode():
        found: Float = model.standardise_text(torch.from_numpy(text).to(model.centres.device)).cpu().numpy()
    beyond = np.isinf(found).any(axis=1)
    if beyond.any():
        raise DataError(
            f"{rows.source}: row {int(np.argmax(beyond))} of 'text_test' is so far from the texts of the training that "
            "it is infinite in their units"
        )
    return found


def refuse_unpredictable(model: SeDA, visual: NDArray[Any], source: str) -> None:
    """Raises DataError where a row of the test part ``visual`` (M, Dv) is so large, in the units of the training, that
    its prediction would not be a number: models square features to norm them and to compare rows."""
    for begin in range(0, len(visual), _BLOCK):
        block = float_rows(visual, np.arange(begin, min(begin + _BLOCK, len(visual))))
        with torch.inference_mode():
            rows = model.standardise_visual(torch.from_numpy(block).to(model.centres.device))
            lengths = rows.square().sum(dim=1) + (rows / model.kernel.scale).square().sum(dim=1)
        release(visual)
        beyond = (~lengths.isfinite()).cpu().numpy()
        if beyond.any():
            row = begin + int(np.argmax(beyond))
            raise DataError(
                f"{source}: row {row} of 'visual_test' has features so large that its prediction is not a number"
            )


def raw_class_texts(model: SeDA) -> Float | None:
    """The texts (K, Dt) that a model was trained with one a class, before standardisation; None for other models."""
    if model.text_classes is None:
        return None
    return (model.text_classes * model.text_scale + model.text_mean).cpu().numpy()


def alignment(aligned: Float, text: Float | None) -> dict[str, float] | None:
    """`alignment_metrics` on the rows that have a text, or None without text, or different texts, to compare with."""
    if text is None:
        return None
    paired = ~np.isnan(text).all(axis=1)
    if np.ptp(text[paired], axis=0).max() == 0:
        return None
    return alignment_metrics(aligned[paired], text[paired], seed=0)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A plain table of methods, in percent; ``rows`` maps a method to its metrics with an ``alignment`` or None."""
    columns = MULTI_LABEL_COLUMNS if any("map" in values for values in rows.values()) else COLUMNS
    aligned = (("Frechet", "frechet", 1), ("MMD", "mmd", 3), ("cosine", "cosine", 3), ("R@1", "recall_at_1", 1),
               ("R@10", "recall_at_10", 1))  # fmt: skip
    header = ["", *(name for name, _ in columns), *(name for name, _, _ in aligned)]
    lines = [header]
    for method, values in rows.items():
        line = [method, *(f"{values[key]:.1f}" for _, key in columns)]
        found = values.get("alignment")
        line += [f"{found[key]:.{digits}f}" if found else "-" for _, key, digits in aligned]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(cells) for cells in padded)


def peak_memory_bytes(device: torch.device) -> int:
    """The device's peak of allocated memory, or on a CPU this process's peak of resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage where this is there: its peak survives exec, so that a process started by a larger one has that
    # one's (2.6 GB instead of 1.1 GB was seen under pytest).
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.M) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    """Versions of this package and of what it ran on."""
    found = {"python": platform.python_version()}
    for name in ("seda_fast", "torch", "numpy", "triton", "xformers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
