"""Many measurements side by side: each in a process of its own share of the cores, written down by one."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from .methods import sharing
from .regimes import SETS, DataSet, Task, load
from .runs import Job, Record, Runs, append, measure
from .selection import task_of


def make(
    runs: Runs,
    jobs: Sequence[Job],
    folder: Path,
    workers: int,
    title: str,
    measure: Callable[[Job, Task], Record] = measure,
) -> list[tuple[Job, str]]:
    """``measure`` those of ``jobs`` that ``runs`` does not have, on the sets of ``folder``, ``workers`` at a time.

    Each is written down when it ends. Returns what refused to be trained on a set of one's own, such as a probe on
    texts of one class, and why; a refusal on one of `SETS` is raised.

    One worker is this process with all its threads; more are processes that share the cores. A training's last bits
    follow the number of its threads, so a record made anew with other ``workers`` may differ by as much as by noise.
    """
    wanted = {job.key: job for job in jobs if job.key not in runs.records}
    refused: list[tuple[Job, str]] = []

    def keep(job: Job, found: Record | str) -> None:
        if isinstance(found, str):
            refused.append((job, found))
        else:
            runs.records[job.key] = found
        bar.update()

    with tqdm(total=len(wanted), desc=title, disable=None) as bar:
        if workers == 1:
            for job in itertools.chain.from_iterable(together(wanted.values())):
                keep(job, _made(job, folder, measure, runs.path))
            return refused
        threads = max(1, (os.cpu_count() or 1) // workers)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, initializer=_begin, initargs=(threads,)) as pool:
            try:
                parts = together(wanted.values())
                submitted = {pool.submit(_all, part, folder, measure, runs.path): part for part in parts}
                for done in as_completed(submitted):
                    for job, found in zip(submitted[done], done.result(), strict=True):
                        keep(job, found)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return refused


def together(jobs: Iterable[Job]) -> list[list[Job]]:
    """In their order, but those that share a part of their training, which one process then makes once."""
    parts: dict[object, list[Job]] = {}
    for job in jobs:
        shared = sharing(job.method, job.settings)
        pairs = "full" if job.regime.startswith("labels") else job.regime  # fewer labels, the same pairs
        key = job.key if shared is None else (job.set, pairs, job.method, job.part, job.seed, repr(shared))
        parts.setdefault(key, []).append(job)
    return list(parts.values())


def _all(jobs: Sequence[Job], folder: Path, measure: Callable[[Job, Task], Record], path: Path) -> list[Record | str]:
    return [_made(job, folder, measure, path) for job in jobs]


def _begin(threads: int) -> None:
    """Take a share of the cores, and end when the command does: a pool's processes outlive a parent that is killed."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


@functools.cache
def _data(name: str, folder: Path) -> DataSet:
    return load(name, folder)


def _made(job: Job, folder: Path, measure: Callable[[Job, Task], Record], path: Path) -> Record | str:
    """The job's record, which is in the file ``path`` then, or why there is none."""
    try:
        record = measure(job, task_of(job, _data(job.set, folder)))
    except ValueError as error:
        if job.set in SETS:
            raise
        return str(error)
    append(path, record)
    return record
