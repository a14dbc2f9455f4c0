"""``python -m seda_fast.predict``: classes and aligned features of visual features, without any text."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from safetensors.numpy import save_file

from .command import choose_device, progress, run, settings_of, split_settings
from .config import ConfigError, check_given, check_range, check_types, setting
from .data import VisualRows, load_visual
from .files import DataError, atomic_path, make_folder, output_file, save_npz
from .nn import WEIGHTS_FILE, SeDA
from .nn.multi_label import THRESHOLD
from .outputs import PREDICTION_SEED, Float, Outputs
from .ranks import Ranks, joined
from .results import RESULTS
from .sharded import sharded_log_proba, sharded_outputs

PROGRAM = "seda_fast.predict"
HEADER = ("label", "class_name", "probability", "top5")
MULTI_LABEL_HEADER = ("labels", "class_names")


def samples(rows: VisualRows) -> list[tuple[Any, ...]]:
    """What each sample is called, below the first of these: its id, and its name where the data names its rows."""
    if rows.names is None:
        return [("id",), *((i,) for i in rows.ids.tolist())]
    return [("id", "name"), *zip(rows.ids.tolist(), rows.names, strict=True)]


def write_csv(file: IO[str], log_proba: Float, rows: VisualRows, class_names: Sequence[str]) -> None:
    """A row per sample of ``log_proba`` (M, K): its id (and name), predicted label, its name and probability, and
    ``label:probability`` of the best five."""
    writer = csv.writer(file)
    header, *called = samples(rows)
    writer.writerow((*header, *HEADER))
    # A stable sort, so that equal probabilities rank as arg max does.
    ranks = np.argsort(-log_proba, axis=1, kind="stable")[:, :5]
    for sample, row, best in zip(called, log_proba, ranks, strict=True):
        p = np.exp(row[best])
        top = " ".join(f"{label}:{value:.6f}" for label, value in zip(best.tolist(), p.tolist(), strict=True))
        writer.writerow((*sample, int(best[0]), class_names[best[0]], f"{p[0]:.6f}", top))


def write_multi_label_csv(
    file: IO[str], log_proba: Float, rows: VisualRows, class_names: Sequence[str], threshold: float
) -> None:
    """A row per sample of ``log_proba`` (M, K): its id (and name), the numbers of the classes whose probability reaches
    ``threshold``, separated by spaces, their names, separated by "; ", and the probability of each class."""
    writer = csv.writer(file)
    header, *called = samples(rows)
    writer.writerow((*header, *MULTI_LABEL_HEADER, *(f"probability:{name}" for name in class_names)))
    for sample, p in zip(called, np.exp(log_proba), strict=True):
        carried = np.flatnonzero(p >= threshold).tolist()
        names = "; ".join(class_names[k] for k in carried)
        writer.writerow((*sample, " ".join(map(str, carried)), names, *(f"{value:.6f}" for value in p.tolist())))


def write_features(path: Path, outputs: Outputs, ids: np.ndarray) -> None:
    """``semantic`` s (M, Dv), ``aligned`` t_ (M, Dt), ``aligned_point``, the log-probabilities and ``ids``."""
    arrays = {**outputs.arrays(), "ids": ids}
    with atomic_path(path) as draft:
        if path.suffix == ".safetensors":
            save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, draft)
        else:
            save_npz(draft, arrays)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What is predicted and where the results go."""

    model: str = setting("", "folder written by seda_fast.train")
    data: str = setting("", "a .npz, .safetensors or folder with the key visual (or visual_test), or a .npy")
    out: str = setting("", "a .csv file for the table, which is printed otherwise")
    features: str = setting("", "a .npz or .safetensors file for s, t_ and the log-probabilities")
    threshold: float = setting(THRESHOLD, "of a multi-label model: probability from which a row carries a class")
    seed: int = setting(PREDICTION_SEED, "seed of the prediction's noise")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")

    def __post_init__(self) -> None:
        check_types(self)
        check_given(self, "model", "data")
        check_range(self, "threshold", 0 < self.threshold <= 1, "in 0 .. 1, 0 excluded")
        check_range(self, "seed", 0 <= self.seed < 2**63, "in 0 .. 2**63 - 1")


def write(config: PredictConfig, ranks: Ranks) -> None:
    """Predict, each rank its part, and write or print on the first; nothing before the last prediction is there."""
    out = output_file(config.out, "--out", (".csv",)) if config.out else None
    features = output_file(config.features, "--features", (".npz", ".safetensors")) if config.features else None
    folder = Path(config.model)
    _refuse_own_files(folder, config.data, {"--out": out, "--features": features})
    model = SeDA.from_pretrained(folder, choose_device(config.device))
    if config.threshold != THRESHOLD and not model.config.multi_label:
        raise ConfigError("threshold is for multi-label models; this one gives each row one class")
    fraction, split_seed = split_settings(folder) or (0.2, 0)
    rows = load_visual(config.data, visual_dim=model.config.visual_dim, test_fraction=fraction, seed=split_seed)
    outputs = None
    with progress(len(rows.visual), "predicting") as bar:
        if features is None:
            log_proba = sharded_log_proba(model, rows, ranks, seed=config.seed, on_rows=bar.update)
        else:
            outputs = sharded_outputs(model, rows, ranks, seed=config.seed, on_rows=bar.update)
            log_proba = outputs.log_proba
    if not ranks.first:
        return
    for path in (out, features):
        if path is not None:
            make_folder(path.parent)
    if features is not None and outputs is not None:
        write_features(features, outputs, rows.ids)

    def write_table(file: IO[str]) -> None:
        if model.config.multi_label:
            write_multi_label_csv(file, log_proba, rows, model.class_names, config.threshold)
        else:
            write_csv(file, log_proba, rows, model.class_names)

    if out is None:
        if sys.stdout is None:
            raise DataError("standard output is closed; give --out")
        write_table(sys.stdout)
        return
    with atomic_path(out) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        write_table(file)


def _refuse_own_files(folder: Path, data: str, written: Mapping[str, Path | None]) -> None:
    """Raises DataError where a file to be written is one that is read, or that the training of the model wrote."""
    for option, path in written.items():
        if path is None or not path.exists():
            continue
        for read in (folder / WEIGHTS_FILE, Path(data)):
            if _same_file(path, read):
                raise DataError(f"{option} {path} is what is read")
        for name in RESULTS:
            if _same_file(path, folder / name):
                raise DataError(f"{option} {path} is of the model's training; give another name")


def _same_file(path: Path, other: Path) -> bool:
    """No where ``other`` is not there or may not be looked at: reading it says that by its name."""
    try:
        return path.samefile(other)
    except OSError:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 2 with one sentence on stderr."""

    def body() -> None:
        config = PredictConfig(**settings_of(PROGRAM, __doc__, {"predict": PredictConfig}, argv)["predict"])
        with joined(choose_device(config.device)) as ranks:
            write(config, ranks)

    return run(body, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
