"""The processes that train or predict together, as ``torchrun`` starts them; alone, all of this costs nothing."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from .config import ConfigError

# Seconds.
_LETTING_GO = 0.2
_ASKING = 0.02
# The name of a start of all ranks stands there in their store.
_ATTEMPT = "attempt"


class RankLost(RuntimeError):
    """Another rank has ended, so nothing can be exchanged any more; the message is one sentence."""


@dataclass(frozen=True)
class Ranks:
    """This process's ``rank`` among ``world`` of them. All ranks must call what is not `part` or `own`."""

    rank: int = 0
    world: int = 1

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self.world == 1

    @property
    def on_host(self) -> int:
        """How many of the ranks share this machine, and with it the memory of its CPUs."""
        return 1 if self.alone else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def part(self, rows: int, rank: int | None = None) -> slice:
        """The contiguous share of ``rows`` rows of a rank, by default this one; sizes differ by one at most."""
        at = self.rank if rank is None else rank
        size, more = divmod(rows, self.world)
        start = at * size + min(at, more)
        return slice(start, start + size + (at < more))

    def own(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """This rank's `part` of each of ``batches`` (B,)."""
        return (rows[self.part(len(rows))] for rows in batches)

    def add(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of all ranks' values, place by place; goes over the host, so no device is waited for."""
        if self.alone:
            return list(values)
        found = torch.tensor(list(values), dtype=torch.int64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return [int(value) for value in found.tolist()]

    def spread(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` with that of the first rank."""
        if not self.alone and tensor.numel():
            dist.broadcast(tensor, src=0)

    def spread_text(self, text: str) -> str:
        """The first rank's text."""
        if self.alone:
            return text
        content = text.encode() if self.first else b""
        (size,) = self.largest([len(content)])
        buffer = torch.zeros(size, dtype=torch.uint8)
        if self.first and size:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self.spread(buffer)
        return bytes(buffer.numpy()).decode()

    def join(self, own: NDArray[Any], rows: int) -> NDArray[Any]:
        """All ``rows`` rows in their order, from each rank's `part` of them; numeric arrays."""
        if self.alone:
            return own
        sizes = [len(range(rows)[self.part(rows, rank)]) for rank in range(self.world)]
        padded = torch.zeros((max(sizes), *own.shape[1:]), dtype=torch.from_numpy(own[:0]).dtype)
        padded[: len(own)] = torch.from_numpy(np.ascontiguousarray(own))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return np.concatenate([part[:size].numpy() for part, size in zip(parts, sizes, strict=True)])


ALONE = Ranks()


def job() -> str | None:
    """Names the job that these processes are of, the same after a restart of them; None without ``torchrun``.

    What ``torchrun`` calls it is "none" for every job that is not given a name; what tells one from another is the
    process that starts the ranks, by its host, number and time of start.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name is None else f"{name} {socket.gethostname()} {os.getppid()} {_began(os.getppid())}"


def _began(process: int) -> str:
    """When a process began, in clock ticks since the host did; empty where the system does not say."""
    try:
        # Its name, in brackets, may hold blanks and brackets.
        after = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        return ""
    return after.split()[19]


def restarted(ranks: Ranks) -> bool:
    """Whether ``torchrun`` started these processes anew after one of them died; all ranks must ask.

    On several hosts only that where it died counts it.
    """
    return bool(ranks.largest([int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))])[0])


def _announced(more: Sequence[str] = ()) -> int:
    """How many ranks the environment tells of, which then has to hold ``more`` beside the usual variables."""
    told = os.environ.get("WORLD_SIZE", "1")
    if not told.isdecimal() or int(told) < 1:
        raise ConfigError(f"WORLD_SIZE is {told!r} in the environment, which is no number of ranks")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", *more) if name not in os.environ]
    if int(told) > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE is {told} in the environment, but {missing[0]} is not set; start several ranks with "
            "torchrun, or unset WORLD_SIZE"
        )
    rank, port = os.environ.get("RANK", "0"), os.environ.get("MASTER_PORT", "1")
    if int(told) > 1 and not (rank.isdecimal() and int(rank) < int(told)):
        raise ConfigError(f"RANK is {rank!r} in the environment, which is none of 0 .. {int(told) - 1}")
    if int(told) > 1 and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(f"MASTER_PORT is {port!r} in the environment, which is no port")
    return int(told)


def _own_gpu() -> int:
    """The GPU of this rank: nccl refuses two ranks on one, late and in its own words.

    One of several that sees one GPU alone, as its first, may have been given it (torchrun's ``--virtual-local-rank``).
    """
    rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    ranks = max(rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    given = rank == 0 and gpus == 1 and "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",")
    if ranks > gpus and not given:
        raise ConfigError(f"{ranks} ranks on this host need a GPU each, and it has {gpus}; start fewer, or use the CPU")
    return rank


def _tells_of_a_lost_rank(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors. This package's own may have any word in them, as of a folder's name."""
    if isinstance(error, dist.DistError):
        return True
    names = ("gloo", "nccl", "connection closed", "connection reset")
    return type(error) is RuntimeError and any(name in str(error).lower() for name in names)


def _met() -> tuple[Any, int, int]:
    """The ranks' common store, this one's number and how many there are."""
    try:
        found: tuple[Any, int, int] = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    except (ValueError, dist.DistError) as error:
        said = (str(error).splitlines() or [""])[0]
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(f"the ranks cannot meet at {place} (MASTER_ADDR, MASTER_PORT): {said}") from error
    return found


def _attempt(store: Any, rank: int, world: int) -> str:
    """A name of this start of all ranks, which they share and no earlier one had.

    torchrun's store may outlive a restart, and with it what processes wrote that are no more; and how often torchrun
    restarted is each host's own count, which lacks those that are for a host that comes or goes. So the first rank
    makes up a name, and the others, who may read that of a rank before it, take one when it has been confirmed to them.
    """
    own = secrets.token_hex(8)
    if rank == 0:
        store.set(_ATTEMPT, own)
        for other in range(1, world):
            met = store.get(f"{own} {other}").decode()  # waits for it
            store.set(f"{own} {other} {met}", "")
        return own
    until = time.monotonic() + store.timeout.total_seconds()
    while time.monotonic() < until:
        name = str(store.get(_ATTEMPT).decode())
        store.set(f"{name} {rank}", own)
        while time.monotonic() < until and store.get(_ATTEMPT).decode() == name:
            if store.check([f"{name} {rank} {own}"]):
                return name
            time.sleep(_ASKING)
    raise dist.DistStoreError("the first rank did not come")


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Joins the ranks that ``torchrun`` announces in the environment; without it this process is alone.

    gloo carries what lies on the host, nccl what lies on a GPU; each rank of a host takes one GPU.

    Raises:
        ConfigError: there are more ranks than GPUs on this host, the environment tells of ranks by half, or they do
            not meet where it says.
        RankLost: another rank ended while this one waited for it.
    """
    world = _announced(("LOCAL_RANK",) if device.type == "cuda" else ())
    if world == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(_own_gpu())
    store, rank, world = _met()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store = dist.PrefixStore(_attempt(store, rank, world), store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        yield Ranks(rank, world)
    except RuntimeError as error:
        if not _tells_of_a_lost_rank(error):
            raise
        raise RankLost("another rank has ended, so this one cannot go on") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # gloo's threads live on, and let go of the last tensors only after we have their values, for which they need
        # Python's lock: at its exit, that ends the process (3 of 48 processes without this pause).
        time.sleep(_LETTING_GO)
