"""Where the time of training steps goes: a trace, and the share of each operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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


@contextmanager
def profiled(trace: Path | None, device: torch.device, steps: int, found: Profile) -> Iterator[Recorder]:
    """Look at some of the ``steps`` training steps in the block, `Recorder.step` after each.

    Args:
        trace: where the trace goes, for chrome://tracing or Perfetto; None looks at nothing.
        found: takes the result.
    """
    if trace is None:
        yield Recorder(None)
        return
    skipped = min(_SKIPPED, max(0, steps - 2))
    warm_up = min(_WARM_UP, max(0, steps - 1 - skipped))
    active = max(1, min(_LOOKED_AT, steps - skipped - warm_up))
    cuda = device.type == "cuda"

    def keep(profiler: Any) -> None:
        profiler.export_chrome_trace(str(trace))
        times = {
            event.key: float(event.self_device_time_total if cuda else event.self_cpu_time_total)
            for event in profiler.key_averages()
            if not event.key.startswith("ProfilerStep")
        }
        whole = sum(times.values()) or 1.0
        found.shares, found.steps = {name: time / whole for name, time in times.items()}, active

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    plan = schedule(wait=skipped, warmup=warm_up, active=active, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=keep) as profiler:
        yield Recorder(profiler)
