"""Checkpoints of an unfinished run: each whole or not there, checked when read, the last two kept.

A checkpoint is two files, ``step-000000120.safetensors`` and, written after it, ``step-000000120.json`` with the
checksum of the first. Both are written under a temporary name, flushed to disk and renamed, so a process that dies
at any moment leaves at most a temporary file or tensors without their JSON, which nobody reads.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import DataError, atomic_path, checksum

KEPT = 2
_FORMAT = 1
_TENSORS, _STATE = ".safetensors", ".json"
_JOB = "job"


@dataclass(frozen=True)
class Checkpoint:
    """What `Checkpoints.save` was given: tensors by name (on the CPU), and a state that JSON can hold."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints in one folder, which belongs to one run (see `results.results_folder`).

    Args:
        folder: where they lie; made when the first is written.
        report: called with a sentence about each damaged checkpoint that is met.
    """

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        self.folder, self._report = folder, report
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        # Steps whose checkpoints were found damaged: they do not count as kept.
        self._damaged: set[int] = set()

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Copy the tensors and begin to write the checkpoint of ``step``; returns the path that it will have.

        A thread writes it and then removes all but the `KEPT` newest, so that training goes on meanwhile: with the
        default model that is 96 MB, which take 0.2 to 0.5 s, half as long as an epoch of the embedded set.

        Raises:
            DataError: the one before could not be written, see `finish`.
        """
        self.finish()
        still = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        path = self._path(step)
        # A daemon: a process that is told to end does not wait for it, and what it leaves is no checkpoint.
        self._writer = threading.Thread(
            target=self._write, args=(path, step, still, deepcopy(dict(state))), daemon=True
        )
        self._writer.start()
        return path

    def raise_failure(self) -> None:
        """Raise what `finish` would, if it is known already; does not wait."""
        if self._failure is not None:
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that was begun last is there.

        Raises:
            DataError: it cannot be written (the disk is full, say); the older ones are untouched.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(self, path: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        try:
            self._write_files(path, step, tensors, state)
            self._prune(step)
        except BaseException as failure:  # noqa: BLE001 - `finish` raises it where somebody listens
            self._failure = failure

    def _write_files(self, path: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as draft:
                save_file(tensors, draft)
                digest, size = checksum(draft), draft.stat().st_size
            about = {"format": _FORMAT, "step": step, "sha256": digest, "bytes": size, "state": state}
            text = json.dumps({**about, "about_sha256": _digest(about)}, allow_nan=False)
            try:
                with atomic_path(path.with_suffix(_STATE)) as draft:
                    draft.write_text(text + "\n", encoding="utf-8")
            except BaseException:
                path.unlink(missing_ok=True)  # nobody reads tensors without JSON, and the disk may be full
                raise
        except (SafetensorError, OSError) as error:
            raise DataError(f"the checkpoint {path} cannot be written: {_reason(error)}") from error

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, None where there is none at all; each damaged one is reported.

        Raises:
            DataError: there are checkpoints and none of them is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self._path(step)
            try:
                found = _read(path, step)
            except DataError as error:
                self._report(f"the checkpoint {path} is damaged ({error}); looking for the one before it")
                self._damaged.add(step)
                continue
            return found
        if steps:
            raise DataError(
                f"none of the {len(steps)} checkpoints in {self.folder} can be used; --overwrite drops them"
            )
        return None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were finished, ascending, whether or not they can still be read."""
        names = [path.stem.removeprefix("step-") for path in self.folder.glob(f"step-*{_STATE}")]
        return sorted(int(name) for name in names if name.isdecimal())

    def clear(self) -> None:
        """Remove all checkpoints and what interrupted writes left behind."""
        (self.folder / _JOB).unlink(missing_ok=True)
        for step in self.steps():
            self._path(step).with_suffix(_STATE).unlink(missing_ok=True)
        for pattern in (f"step-*{_TENSORS}", ".step-*"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def start_anew(self, job: str | None) -> None:
        """Remove what an earlier run left, before the first checkpoint of this one.

        ``job`` names the job of which the run is a part, where one may have to begin once more (see `begun_by`).

        Raises:
            DataError: the folder cannot be written.
        """
        try:
            self.clear()
            if job is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                with atomic_path(self.folder / _JOB) as draft:
                    draft.write_text(job, encoding="utf-8")
        except OSError as error:
            raise DataError(f"the folder {self.folder} cannot be written: {_reason(error)}") from error

    def begun_by(self, job: str | None) -> bool:
        """Whether what is here, be it only a beginning without any checkpoint, is of ``job``."""
        try:
            return job is not None and (self.folder / _JOB).read_text(encoding="utf-8") == job
        except (OSError, UnicodeDecodeError):
            return False

    def newest_path(self) -> Path | None:
        """Where the newest finished checkpoint lies; None where there is none."""
        steps = self.steps()
        return self._path(steps[-1]) if steps else None

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}{_TENSORS}"

    def _prune(self, newest: int) -> None:
        """Keep ``newest`` and the whole ones before it, `KEPT` in all; a later one is of another way."""
        self._damaged.discard(newest)  # it was written anew
        keep = [step for step in self.steps() if step <= newest and step not in self._damaged][-KEPT:]
        kept = {self._path(step).with_suffix(suffix) for step in keep for suffix in (_TENSORS, _STATE)}
        # The JSON goes first: tensors alone are no checkpoint. Temporary files are of writes that were killed.
        found = [*self.folder.glob(f"step-*{_STATE}"), *self.folder.glob(f"step-*{_TENSORS}")]
        for path in [*found, *self.folder.glob(".step-*")]:
            if path not in kept:
                # A file that cannot be removed costs space, not the run.
                with suppress(OSError):
                    path.unlink()


def _read(path: Path, step: int) -> Checkpoint:
    """Raises DataError, which says what is wrong, unless both files are what `Checkpoints.save` wrote."""
    try:
        about = json.loads(path.with_suffix(_STATE).read_text(encoding="utf-8"))
        claimed = about.pop("about_sha256")
        if claimed != _digest(about) or about["step"] != step:
            raise DataError("the checksum of its JSON is wrong")
        if about["format"] != _FORMAT:
            raise DataError(f"its format is {about['format']}, this version of the package reads {_FORMAT}")
        size = path.stat().st_size
        if size != about["bytes"]:
            raise DataError(f"it has {size} bytes where {about['bytes']} were written")
        if checksum(path) != about["sha256"]:
            raise DataError("its checksum is wrong")
        return Checkpoint(path, step, load_file(path), about["state"])
    except OSError as error:
        raise DataError(_reason(error)) from error
    except SafetensorError as error:
        raise DataError(f"not a whole safetensors file: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError("its JSON cannot be read") from error


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
