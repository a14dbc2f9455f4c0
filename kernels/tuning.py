"""Launches: on the tensor's device, with tiles chosen by shape rules, or measured once and remembered on disk.

Measured, with SEDA_FAST_AUTOTUNE=1, are two products of the projection: that of its forward, which has no logits in
memory, and that of the features' gradient of a head whose classes are one chunk. The others, whose tiles decide how
much memory their sums take, go by the shape rules always; the interaction's products are cuBLAS's.
"""

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.testing
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up. `triton.cdiv` is made for kernels too, and takes microseconds a call of the host's time."""
    return -(-a // b)


class Tile(NamedTuple):
    """Sizes of one program's tile of a matrix product, and how it runs: BLOCK_M, BLOCK_N, BLOCK_K, warps, stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def sizes(self) -> dict[str, int]:
        """The kernel's tile constants."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}

    def options(self) -> dict[str, int]:
        """The launch's options."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    def programs(self, rows: int, columns: int) -> int:
        """How many tiles cover a (rows, columns) result."""
        return cdiv(rows, self.m) * cdiv(columns, self.n)


# Largest first; each fits the 99 KiB of shared memory that every GPU from compute capability 8.0 on gives a program,
# and none spills registers (`benchmarks/machine_code.py`).
HALF_TILES = (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4), Tile(32, 64, 64, 4, 4))
# Products in full float32 precision run without tensor cores, and their registers are the limit.
FLOAT_TILES = (Tile(64, 64, 16, 8, 3), Tile(32, 64, 16, 4, 3))
# For weight gradients, whose rows are split instead.
HALF_WEIGHT_TILE, FLOAT_WEIGHT_TILE = Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)
# Enough programs to give every multiprocessor of the larger GPUs one. A constant, so that results do not depend on
# the device.
ENOUGH_PROGRAMS = 128


def launching_on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device the current one, as Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def candidates(dtype: torch.dtype, *, columns: int | None = None) -> tuple[Tile, ...]:
    """Tiles for products in ``dtype``; ``columns`` fixes BLOCK_N."""
    tiles = FLOAT_TILES if dtype == torch.float32 else HALF_TILES
    if columns is None:
        return tiles
    # Wider than its own BLOCK_N a tile needs twice the threads for its registers.
    wider = (tile._replace(n=columns, warps=8 if tile.n < columns else tile.warps) for tile in tiles)
    return tuple(dict.fromkeys(wider))


def by_shape(tiles: tuple[Tile, ...], rows: int, columns: int) -> Tile:
    """The first tile that cuts a (rows, columns) result into enough programs, else the last."""
    for tile in tiles:
        if tile.programs(rows, columns) >= ENOUGH_PROGRAMS:
            return tile
    return tiles[-1]


def choose(
    name: str,
    like: Tensor,
    shape: tuple[int, int, int],
    tiles: tuple[Tile, ...],
    launch: Callable[[Tile], object],
    variant: str = "",
) -> Tile:
    """The tile for a product of ``shape`` (rows, columns, depth) on ``like``'s device.

    ``variant`` tells launches apart that differ in constants: a time measured for one says nothing of another.

    With SEDA_FAST_AUTOTUNE=1 on a GPU the tiles are timed by ``launch``, which must only overwrite its results, and
    the fastest is kept for every later process. Nothing is timed while a graph is captured: the shape rule serves.
    """
    rule = by_shape(tiles, *shape[:2])
    if os.environ.get("SEDA_FAST_AUTOTUNE") != "1" or not like.is_cuda:
        return rule
    # Batches of similar size share an entry; features and classes do not change within a run.
    size = f"{triton.next_power_of_2(shape[0])}x{shape[1]}x{shape[2]}"
    offered = ",".join("x".join(map(str, tile)) for tile in tiles)
    key = f"{name} {variant} {like.dtype} {size} of {offered}"
    file = cache_file(torch.cuda.get_device_name(like.device))
    known = read(file)
    if key in known:
        return known[key] if known[key] in tiles else rule
    if torch.cuda.is_current_stream_capturing():
        return rule
    return remember(file, key, fastest(tiles, launch))


def fastest(
    tiles: tuple[Tile, ...],
    launch: Callable[[Tile], object],
    measure: Callable[[Callable[[], object]], float] = triton.testing.do_bench,
) -> Tile:
    """The tile with the least time; one that does not fit the device's shared memory is passed over. Where none fits it
    is the first, whose launch says so."""
    times = {}
    for tile in tiles:
        with contextlib.suppress(triton.runtime.errors.OutOfResources):
            times[tile] = measure(functools.partial(launch, tile))
    return min(times, key=lambda tile: times[tile], default=tiles[0])


def cache_file(device_name: str) -> Path:
    """Where the measured tiles of a device lie: beside Triton's own cache, by device and Triton version."""
    folder = Path(os.environ.get("SEDA_FAST_CACHE_DIR") or Path.home() / ".cache" / "seda_fast")
    return folder / f"tiles {device_name} triton {triton.__version__}.json"


_known: dict[Path, dict[str, Tile]] = {}


def read(file: Path) -> dict[str, Tile]:
    """The tiles in ``file`` by key, read once in a process; a file that is absent or damaged counts as empty."""
    if file not in _known:
        _known[file] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            _known[file] = {key: Tile(*map(int, tile)) for key, tile in json.loads(file.read_text()).items()}
    return _known[file]


def remember(file: Path, key: str, tile: Tile) -> Tile:
    """Add an entry to ``file``, which another process may be reading or writing."""
    _known.pop(file, None)
    entries = {**read(file), key: tile}
    _known[file] = entries
    with contextlib.suppress(OSError), _replacing(file) as scratch:
        scratch.write_text(json.dumps(entries, indent=0))
    return tile


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent)
    os.close(handle)
    try:
        yield Path(name)
        Path(name).replace(file)
    finally:
        Path(name).unlink(missing_ok=True)
