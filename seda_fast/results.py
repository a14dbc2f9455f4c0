"""The folder of a run's results: its files, that it appears whole or not at all, and where an unfinished run lives.

While a run is unfinished, ``OUT.unfinished`` beside its results holds the lock, the checkpoints and the draft of the
results; it goes when the results are there. Where ``OUT`` is a mounted volume, ``OUT/.unfinished`` does: what lies
beside it is on another file system, from which nothing can be moved, and which a container loses.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from .checkpoint import Checkpoints
from .files import DataError, atomic_path, check_writable, flush
from .loop import Epoch
from .nn import WEIGHTS_FILE

CONFIG_FILE, METRICS_FILE, HISTORY_FILE = "config.toml", "metrics.json", "history.csv"
OUTPUTS_FILE, ESTIMATOR_FILE = "outputs.safetensors", "estimator.json"
TRACE_FILE, REPORT_FOLDER = "trace.json", "report"
_PICTURES = ("loss.png", "confusion.png", "average_precision.png", "paths.png")
# What a run may write to its folder, and what the other commands and the estimator make of its model there. Files
# alone: a folder of such a name may hold the user's own.
RESULTS = (
    CONFIG_FILE, METRICS_FILE, WEIGHTS_FILE, HISTORY_FILE, OUTPUTS_FILE, TRACE_FILE,
    *(f"{REPORT_FOLDER}/{name}" for name in _PICTURES),
)  # fmt: skip
DERIVED = ("model.pt2", "model.onnx", "report.html", ESTIMATOR_FILE)
_LOCK_FILE, _DRAFT_FOLDER = "lock", "draft"


def unfinished_folder(out: Path) -> Path:
    """Where a run whose results go to ``out`` keeps what it needs until it is finished.

    Beside the folder itself where ``out`` is a link to it: two runs by two names of a folder meet there.
    """
    place = Path(os.path.realpath(out))
    if os.path.ismount(place):
        return place / ".unfinished"
    return place.parent / f"{place.name}.unfinished"


@contextmanager
def results_folder(
    out: Path,
    *,
    overwrite: bool,
    resume: bool,
    report: Callable[[str], None],
    undisturbed: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[tuple[Path, Checkpoints]]:
    """A draft folder whose files move to ``out`` when the block ends well and vanish otherwise, and the checkpoints.

    The checkpoints stay when the block ends otherwise, for ``resume``; a finished run has none. Those that a run finds
    and does not resume are its own to remove when it begins to train (`Checkpoints.start_anew`): until then it may turn
    out that its data cannot be used.

    Args:
        overwrite: replace the results that are there; an unfinished run that is there may be dropped.
        resume: the checkpoints that are there are this run's.
        report: called with a sentence on what was found and put right (a stale lock, a damaged checkpoint).
        undisturbed: made around the move to ``out``, which a signal would leave with files of two runs.

    Raises:
        DataError: ``out`` cannot be written; it holds the results of an earlier run, or an unfinished one, or a folder
            where a result goes; or another process works on it.
    """
    check_writable(out)
    _refuse_what_is_in_the_way(out)
    place = unfinished_folder(out)
    with _locked(place, out, report):
        checkpoints = Checkpoints(place, report)
        unfinished = bool(checkpoints.steps())
        finished = list(dict.fromkeys(Path(name).parts[0] for name in RESULTS if (out / name).exists()))
        # A run that was killed while its results moved has both.
        if finished and not overwrite and not (resume and unfinished):
            raise DataError(
                f"the folder {out} holds the results of an earlier run ({', '.join(finished)}); "
                "give another --out or --overwrite"
            )
        if unfinished and not overwrite and not resume:
            raise DataError(f"an unfinished run to {out} is there; --resume continues it, --overwrite drops it")
        draft = place / _DRAFT_FOLDER
        try:
            with _writing(out):
                shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
                draft.mkdir()
            yield draft, checkpoints
            with undisturbed(), _writing(out):
                if finished:  # else what has the names of what is made of a model is the user's own
                    _remove_stale(draft, out)
                _move(draft, out)
                checkpoints.clear()
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"the folder {out} cannot be written: {error.strerror or error}") from error


def _remove_stale(draft: Path, out: Path) -> None:
    """What an earlier run left in ``out`` and the new one in ``draft`` does not replace: it is of another model."""
    for name in (*RESULTS, *DERIVED):
        path = out / name
        if not (draft / name).exists() and not _is_folder(path):
            path.unlink(missing_ok=True)
    with suppress(OSError):  # it stays where something else is in it
        (out / REPORT_FOLDER).rmdir()


def _is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder itself, which no file replaces; it replaces a link to one."""
    return path.is_dir() and not path.is_symlink()


def _refuse_what_is_in_the_way(out: Path) -> None:
    """Raises DataError where the move of the results would stop halfway, with files of two runs."""
    report = out / REPORT_FOLDER
    if os.path.lexists(report) and not report.is_dir():
        raise DataError(f"the file {report} is where a run writes a folder; give another --out or another name to it")
    for path in (out / name for name in RESULTS):
        if _is_folder(path):
            raise DataError(f"the folder {path} is where a run writes a file; give another --out or another name to it")


def _move(draft: Path, out: Path) -> None:
    """All files of ``draft`` to ``out``, by one rename where nothing is there yet; they are on disk when it returns.

    An empty folder that is there is the user's, with its rights, and may be where their shell is: it stays.
    """
    files = sorted(path for path in draft.rglob("*") if path.is_file())
    for path in [*files, *{file.parent for file in files}]:
        flush(path)
    renamed = False
    with suppress(OSError):  # the folder above may not be there yet
        if not os.path.lexists(out):
            draft.rename(out)
            renamed = True
    if renamed:
        flush(out.parent)
        return
    for file in files:
        target = out / file.relative_to(draft)
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(file, target)
    for folder in {(out / file.relative_to(draft)).parent for file in files}:
        flush(folder)


def _replace(file: Path, target: Path) -> None:
    """``target`` is ``file`` then; of another mount, which may be one of the same file system, by a copy."""
    try:
        file.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with atomic_path(target) as copy:
            shutil.copyfile(file, copy)


@contextmanager
def _locked(place: Path, out: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock file of ``place``, whose folder is made, and removed where nothing else was left in it.

    The system's lock on the file goes with its process, however that ends, so a file that nobody holds is stale.
    Host and process id stand in it for people, and because some shared file systems lock within one host only.
    """
    try:
        file = _acquire(place, out, report)
    except OSError as error:
        raise DataError(f"the folder {place} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            (place / _LOCK_FILE).unlink()
        file.close()  # before the folder goes: NFS keeps an open file's content in it
        with suppress(OSError):  # the folder stays where checkpoints are in it
            place.rmdir()


def _acquire(place: Path, out: Path, report: Callable[[str], None]) -> IO[str]:
    path = place / _LOCK_FILE
    while True:
        place.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:
            continue  # a run that ended just now took the folder with it
        file.seek(0)
        host, pid = _owner(file.read())
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise DataError(f"another run works on {out}: process {pid} on {host} (lock {path})") from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its owner removed it between our opening and locking it
    # Read again: its owner may have written and died since.
    file.seek(0)
    host, pid = _owner(file.read())
    if pid is not None and host != socket.gethostname():
        file.close()
        raise DataError(f"process {pid} on {host} works, or worked, on {out}; if it is no more, delete {path}")
    if pid is not None:
        report(f"the lock of process {pid}, which is no more, is taken over ({path})")
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
    file.flush()
    return file


def _owner(text: str) -> tuple[str, int | None]:
    """Host and process id of a lock file; a file that was cut short names nobody."""
    try:
        found = json.loads(text)
        return str(found["host"]), int(found["pid"])
    except (ValueError, KeyError, TypeError):
        return "an unknown host", None


def write_settings(path: Path, sections: Mapping[str, Mapping[str, Any]]) -> None:
    """``config.toml``: every setting in force, in the sections that ``--config`` reads."""
    import tomli_w  # of the extra "eval": whoever predicts writes no settings

    path.write_text(tomli_w.dumps(sections), encoding="utf-8")


def write_history(path: Path, history: Sequence[Epoch]) -> None:
    """``history.csv``: a row an epoch."""
    rows = [epoch.row() for epoch in history]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
