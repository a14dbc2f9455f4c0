"""A training set too large for the device: batches read from its files ahead of their use, at constant host memory."""

from __future__ import annotations

import mmap
import os
import queue
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .arrays import Features
from .engine import Batch
from .files import DataError
from .ops import read_rows, reads_rows

# Batches that lie ready or are being read while another one trains.
_AHEAD = 2


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that could be had on ``device`` now; of a CPU, the memory available on the machine or in its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return min([free, *_left_in_containers(root)])


def _left_in_containers(root: Path) -> Iterator[int]:
    """Bytes that the limit of each control group (version 2) around this process leaves; files it has read, which the
    system drops when it must, count as left."""
    try:
        told = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    own = next((line.removeprefix("0::/") for line in told if line.startswith("0::/")), None)
    if own is None:
        return
    top = root / "sys/fs/cgroup"
    for group in (top / own, *(top / own).parents):
        try:
            limit, used = ((group / f"memory.{what}").read_text().strip() for what in ("max", "current"))
            files = re.findall(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), flags=re.M)
            if limit != "max":
                yield max(0, int(limit) - int(used) + sum(map(int, files)))
        except (OSError, ValueError):
            pass  # the top has no limit, and what lies outside of a container cannot be seen
        if group == top:
            return


class RowReader:
    """Rows of an (N, D) array, by number, into memory of one's own.

    Those of a memory-mapped file are read from the file: mapped pages would count as this process's memory.

    Args:
        threads: that read at a time, where the C++ half is here; without it, Python reads row after row.
    """

    def __init__(self, array: Features, threads: int = 1) -> None:
        self._array, self._threads = array, threads
        self._file: int | None = None
        base: Any = array.base
        # Only a whole map: a part of one starts elsewhere in the file than it says. A copy-on-write map may differ from
        # its file.
        changed = getattr(array, "mode", None) == "c"
        whole = isinstance(base, mmap.mmap) and array.flags.c_contiguous and not changed
        # That of a temporary file has no name any more, or one that nothing has; the map itself stays.
        if isinstance(array, np.memmap) and whole and array.filename is not None:
            with suppress(OSError):
                self._file = os.open(str(array.filename), os.O_RDONLY)

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    def into(self, target: NDArray[np.float32], index: NDArray[np.int64]) -> None:
        """Read the rows ``index`` (n,) into ``target`` (n, D), cast to float32.

        Raises:
            DataError: the file has become shorter, or it holds columns, so that each row lies in as many places as it
                has features.
        """
        turned = not self._array.flags.c_contiguous and self._array.flags.f_contiguous
        if isinstance(self._array, np.memmap) and turned:
            raise DataError(
                f"{self._array.filename} is in Fortran order and too large to be held in memory; "
                "save it once more with numpy.save(path, numpy.ascontiguousarray(array))"
            )
        if self._file is None:
            with np.errstate(over="ignore", invalid="ignore"):
                target[:] = self._array[index]
            return
        array = self._array
        same = array.dtype == np.float32
        raw = target if same else np.empty(target.shape, array.dtype)
        try:
            self._read(self._file, raw, index)
        except EOFError:
            raise DataError(f"{array.filename} became shorter while it was read") from None  # type: ignore[attr-defined]
        if not same:
            with np.errstate(over="ignore", invalid="ignore"):
                target[:] = raw

    def _read(self, file: int, raw: NDArray[Any], index: NDArray[np.int64]) -> None:
        """The bytes of rows, as they lie in the file. EOFError where it ends before."""
        row_bytes, start = raw.shape[1] * raw.dtype.itemsize, int(self._array.offset)  # type: ignore[attr-defined]
        if row_bytes and reads_rows():
            places = torch.from_numpy(raw.view(np.uint8))
            rows = torch.from_numpy(np.ascontiguousarray(index, np.int64))
            read_rows(file, start, rows, places, self._threads)
            return
        for place, row in zip(raw, index.tolist(), strict=True):
            if os.preadv(file, [place.view(np.uint8)], start + row * row_bytes) != row_bytes:
                raise EOFError


class _Slot:
    """Host memory of one batch, page-locked where a GPU copies from it."""

    def __init__(self, rows: int, widths: tuple[int, int], pinned: bool) -> None:
        self.visual, self.text = (torch.empty(rows, width, pin_memory=pinned) for width in widths)
        # From memory that is not page-locked a copy waits for all that the device was told before.
        self.index = torch.empty(rows, dtype=torch.int64, pin_memory=pinned)
        self.copied = torch.cuda.Event() if pinned else None


@dataclass(frozen=True)
class StreamedSet:
    """Training triples whose features stay in their files; otherwise as `loop.TrainingSet`.

    ``visual`` (N, Dv) and ``text`` (N, Dt), NaN where missing, are raw; the ``mean`` and ``scale`` (D,) of each, the
    labels and all else lie on the device, where rows are standardised. With ``text_classes`` (K, Dt), standardised, a
    row's text is its class's, and ``text`` is (N, 0).
    """

    visual: RowReader
    text: RowReader
    visual_mean: Tensor
    visual_scale: Tensor
    text_mean: Tensor
    text_scale: Tensor
    labels: Tensor
    paired: Tensor
    sample_ids: Tensor
    text_classes: Tensor | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def device(self) -> torch.device:
        """Where batches come to."""
        return self.labels.device

    @property
    def on_device(self) -> bool:
        """A batch is read by the host."""
        return False

    def rows(self, index: Tensor) -> Batch:
        """The rows ``index`` (B,) of every field, standardised, in the order of `SeDA.losses`."""
        (batch,) = self.batches([index.cpu()])
        return batch

    def batches(self, parts: Iterable[Tensor]) -> Iterator[Batch]:
        """`rows` of each of ``parts``, which lie on the host; a thread reads ahead into buffers that are used again.

        Raises:
            DataError: the files cannot be read any more.
        """
        todo = list(parts)
        if not todo:
            return
        widths, pinned = (self.visual.shape[1], self.text.shape[1]), self.device.type == "cuda"
        free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        ready: queue.SimpleQueue[_Slot | Exception] = queue.SimpleQueue()
        for _ in range(min(_AHEAD, len(todo))):
            free.put(_Slot(max(map(len, todo)), widths, pinned))
        reader = threading.Thread(target=self._read, args=(todo, free, ready), daemon=True)
        reader.start()
        try:
            for part in todo:
                slot = ready.get()
                if isinstance(slot, Exception):
                    raise slot
                batch = self._standardised(slot, len(part))
                if slot.copied is not None:
                    slot.copied.record(torch.cuda.current_stream(self.device))
                free.put(slot)
                yield batch
        finally:
            free.put(None)  # the loop may stop early
            reader.join()

    def _read(
        self,
        parts: list[Tensor],
        free: queue.SimpleQueue[_Slot | None],
        ready: queue.SimpleQueue[_Slot | Exception],
    ) -> None:
        try:
            for part in parts:
                slot = free.get()
                if slot is None:
                    return
                if slot.copied is not None:
                    slot.copied.synchronize()
                index: NDArray[np.int64] = part.numpy()
                self.visual.into(slot.visual.numpy()[: len(index)], index)
                self.text.into(slot.text.numpy()[: len(index)], index)
                slot.index[: len(part)] = part
                ready.put(slot)
        except OSError as error:
            ready.put(DataError(f"the training part cannot be read: {error.strerror or error}"))
        except Exception as error:  # noqa: BLE001 - raised where the batch is waited for
            ready.put(error)

    def _standardised(self, slot: _Slot, rows: int) -> Batch:
        index, visual, text = (
            own[:rows].to(self.device, non_blocking=True) for own in (slot.index, slot.visual, slot.text)
        )
        visual = (visual - self.visual_mean) / self.visual_scale
        rest: Any = (self.labels[index], self.paired[index], self.sample_ids[index])
        if self.text_classes is not None:
            return (visual, self.text_classes[rest[0].clamp(min=0)], *rest)
        text = (text - self.text_mean) / self.text_scale
        return (visual, text.nan_to_num(nan=0.0), *rest)
