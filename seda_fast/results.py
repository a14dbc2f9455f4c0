"""The folder of a run's results: its files, and that it appears whole or not at all."""

from __future__ import annotations

import csv
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from .files import DataError, check_writable
from .loop import Epoch
from .nn import WEIGHTS_FILE

CONFIG_FILE, METRICS_FILE, HISTORY_FILE = "config.toml", "metrics.json", "history.csv"
OUTPUTS_FILE = "outputs.safetensors"


@contextmanager
def results_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``out`` whose files move to ``out`` when the block ends well, and vanish otherwise.

    Raises:
        DataError: ``out`` cannot be written, or holds the results of an earlier run and ``overwrite`` is false.
    """
    check_writable(out)
    if not overwrite and any((out / name).exists() for name in (CONFIG_FILE, METRICS_FILE, WEIGHTS_FILE)):
        raise DataError(f"the folder {out} holds the results of an earlier run; give another --out or --overwrite")
    draft = out.absolute().parent / f".{out.name}.{secrets.token_hex(6)}"
    try:
        draft.mkdir(parents=True)
        yield draft
        for file in sorted(path for path in draft.rglob("*") if path.is_file()):
            target = out / file.relative_to(draft)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    except OSError as error:
        raise DataError(f"the folder {out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_settings(path: Path, sections: Mapping[str, Mapping[str, Any]]) -> None:
    """``config.toml``: every setting in force, in the sections that ``--config`` reads."""
    path.write_text(tomli_w.dumps(sections), encoding="utf-8")


def write_history(path: Path, history: Sequence[Epoch]) -> None:
    """``history.csv``: a row an epoch."""
    rows = [epoch.row() for epoch in history]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
