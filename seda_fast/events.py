"""TensorBoard: a run's losses and learning rate while it trains, and the metrics of the test part at its end."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .config import ConfigError
from .files import DataError, check_writable

_FILES = "events.out.tfevents.*"
_FLUSH_SECONDS = 10


def require_tensorboard() -> None:
    """Raises ConfigError where the package that writes the files is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tensorboard is not installed; --tensorboard needs: pip install 'seda_fast[tensorboard]'")


class EventLog:
    """The event files of one run; made by `event_log`. Without a folder it says nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._writer: Any = None
        self._step = 0

    def start(self, done: int, anew: bool = False) -> None:
        """Begin after step ``done``; what an earlier, interrupted part of the run said of later steps is void.

        ``anew``: what lies in the folder is of another run, and goes.
        """
        self._step = done
        if self._folder is not None:
            for path in self._folder.glob(_FILES) if anew else ():
                path.unlink()
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            with self._naming():
                self._writer = writer(str(self._folder), purge_step=done + 1, flush_secs=_FLUSH_SECONDS)

    def losses(self, step: int, means: Mapping[str, float], learning_rate: float) -> None:
        """Mean loss terms of the steps up to ``step`` since the last call, and the learning rate of ``step``."""
        self._step = step
        self._scalars(step, {f"loss/{name}": value for name, value in means.items()})
        self._scalars(step, {"learning_rate": learning_rate})

    def metrics(self, metrics: Mapping[str, Any]) -> None:
        """The test part's figures after the last step: those of ``metrics``, its heads, alignment and the baselines."""
        nested = ("heads", "alignment", "alignment_point", "baselines")
        own = {name: value for name, value in metrics.items() if name in nested or isinstance(value, float)}
        self._scalars(self._step, {f"test/{name}": value for name, value in _flat(own)})

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            with self._naming():
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with self._naming():
                writer.close()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"the folder {self._folder} cannot be written: {error.strerror or error}") from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, float):
            yield prefix + name, value


@contextmanager
def event_log(folder: Path | None, *, overwrite: bool, resume: bool) -> Iterator[EventLog]:
    """The log of a run that writes to ``folder`` (None: it is silent), closed when the block ends, however it ends.

    Raises:
        DataError: the folder cannot be written, or holds the events of an earlier run that is neither to be
            overwritten nor resumed.
    """
    if folder is not None:
        check_writable(folder)
        earlier = sorted(folder.glob(_FILES)) if folder.is_dir() else []
        if earlier and not (overwrite or resume):
            raise DataError(
                f"the folder {folder} holds the events of an earlier run; give --overwrite or another --out"
            )
    log = EventLog(folder)
    try:
        yield log
    finally:
        log.close()
