"""Where the time of training steps goes: a trace, and the share of each operation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, schedule

# Steps left out at the start, where kernels are loaded and tuned, and steps looked at.
_SKIPPED, _WARM_UP, _LOOKED_AT = 3, 2, 20
_SHOWN = 15


@dataclass
class Profile:
    """What a profiled training found."""

    shares: dict[str, float]
    steps: int = 0

    def table(self) -> str:
        """The operations that take most of the time, in percent of the steps looked at."""
        shown = sorted(self.shares.items(), key=lambda item: -item[1])[:_SHOWN]
        rest = 1 - sum(share for _, share in shown)
        lines = [f"share of time in {self.steps} training steps, each operation without what it calls"]
        return "\n".join([*lines, *(f"{share:7.1%}  {name}" for name, share in [*shown, ("everything else", rest)])])


class Recorder:
    """Counts steps for the profiler."""

    def __init__(self, profiler: profile | None) -> None:
        self._profiler = profiler

    def step(self) -> None:
        """One training step is over."""
        if self._profiler is not None:
            self._profiler.step()


def shares(events: Iterable[Any], cuda: bool) -> dict[str, float]:
    """Share of the time that each operation took itself; on a GPU, of the time of its kernels and copies.

    There each kernel stands in ``events`` itself and once more in the operation of the host that launched it, and
    spans that only have a name, an optimiser's step say, cover kernels a third time: kernels alone are counted.
    """
    times: dict[str, float] = {}
    for event in events:
        on_gpu = event.device_type == DeviceType.CUDA
        if on_gpu == cuda and not event.is_user_annotation and not event.key.startswith("ProfilerStep"):
            time = float(event.self_device_time_total if cuda else event.self_cpu_time_total)
            times[event.key] = times.get(event.key, 0.0) + time
    whole = sum(times.values()) or 1.0
    return {name: time / whole for name, time in times.items()}


@contextmanager
def profiled(trace: Path | None, device: torch.device, steps: int, found: Profile) -> Iterator[Recorder]:
    """Look at some of the ``steps`` training steps in the block, `Recorder.step` after each.

    Args:
        trace: where the trace goes, for chrome://tracing or Perfetto; None looks at nothing.
        found: takes the result.
    """
    if trace is None or steps == 0:
        yield Recorder(None)
        return
    skipped = min(_SKIPPED, max(0, steps - 2))
    warm_up = min(_WARM_UP, max(0, steps - 1 - skipped))
    active = max(1, min(_LOOKED_AT, steps - skipped - warm_up))
    cuda = device.type == "cuda"

    def keep(profiler: Any) -> None:
        profiler.export_chrome_trace(str(trace))
        found.shares, found.steps = shares(profiler.key_averages(), cuda), active

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    plan = schedule(wait=skipped, warmup=warm_up, active=active, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=keep) as profiler:
        yield Recorder(profiler)
