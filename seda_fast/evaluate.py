"""``python -m seda_fast.evaluate``: measure a saved model on the test part of a data set."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from . import _eval_extra  # noqa: F401 - checks first that what measuring needs is installed
from .command import choose_device, progress, report, run, settings_of, split_settings
from .config import check_given, check_range, check_types, setting
from .data import EvaluationRows, FeatureSet
from .files import DataError
from .measure import outputs_metrics, raw_class_texts, table
from .nn import SeDA
from .outputs import PREDICTION_SEED
from .ranks import Ranks, joined
from .results import ESTIMATOR_FILE, METRICS_FILE
from .sharded import sharded_outputs

PROGRAM = "seda_fast.evaluate"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured on what."""

    model: str = setting("", "folder written by seda_fast.train")
    data: str = setting("", "as for seda_fast.train; its test part is used")
    json: bool = setting(False, "print the metrics as JSON instead of a table")
    seed: int = setting(PREDICTION_SEED, "seed of the prediction's noise")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")

    def __post_init__(self) -> None:
        check_types(self)
        check_given(self, "model", "data")
        check_range(self, "seed", 0 <= self.seed < 2**63, "in 0 .. 2**63 - 1")


def measure(config: EvaluateConfig, ranks: Ranks) -> dict[str, Any] | None:
    """The metrics of a saved model on a test part, whose rows the ranks share; None on all but the first."""
    folder = Path(config.model)
    model = SeDA.from_pretrained(folder, choose_device(config.device))
    fraction, split_seed = split_settings(folder) or (None, 0)
    without_text = _is_without_text(folder, model)
    part = FeatureSet.load_test(
        config.data,
        visual_dim=model.config.visual_dim,
        text_dim=None if without_text else model.config.text_dim,
        class_names=model.class_names,
        text_classes=raw_class_texts(model),
        multi_label=model.config.multi_label,
        unpaired="keep",
        test_fraction=fraction,
        seed=split_seed,
    )
    _check_split(folder, part)
    if without_text and part.text is not None:
        if ranks.first:
            report(
                PROGRAM,
                f"the model was fitted without text, so text_test of {part.source} is not compared with anything",
            )
        part = replace(part, text=None)
    with progress(len(part.visual), "predicting") as bar:
        outputs = sharded_outputs(model, part, ranks, seed=config.seed, on_rows=bar.update)
    if not ranks.first:
        return None
    return {**outputs_metrics(outputs, model, part), "data": part.source}


def _is_without_text(folder: Path, model: SeDA) -> bool:
    """Whether ``model`` is of an estimator that was fitted without text, which has a single column in its place."""
    path = folder / ESTIMATOR_FILE
    if model.config.text_dim != 1 or not path.exists():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8"))["has_text"] is False
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not what an estimator writes ({error})") from error


def _check_split(folder: Path, part: EvaluationRows) -> None:
    """Raises DataError where ``part`` was cut from other rows than those that the model's own test part was: some of it
    would be rows that the model was trained on."""
    path = folder / METRICS_FILE
    if part.split is None:
        return
    try:
        recorded = json.loads(path.read_text(encoding="utf-8")).get("split") if path.exists() else None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise DataError(f"{path}: not the metrics of a training run ({error})") from error
    # None: the model's own test part was not cut from its training rows, or nothing tells from which it was.
    if recorded != part.split:
        raise DataError(
            f"{part.source}: its rows are not those of the model's training, so the test part cannot be found again; "
            "give data with visual_test and label_test"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 2 with one sentence on stderr."""

    def body() -> None:
        config = EvaluateConfig(**settings_of(PROGRAM, __doc__, {"evaluate": EvaluateConfig}, argv)["evaluate"])
        with joined(choose_device(config.device)) as ranks:
            metrics = measure(config, ranks)
        if metrics is None:
            return
        if config.json:
            print(json.dumps(metrics, indent=1, allow_nan=False))
            return
        heads = {f"  {name} head": values for name, values in metrics["heads"].items()}
        point = {**metrics, "alignment": metrics["alignment_point"]}
        print(table({"SeDA": metrics, **heads, "SeDA, point estimate": point}))

    return run(body, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
