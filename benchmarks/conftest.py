"""The harness of all benchmarks: measures the machine, checks that competitors agree, times them interleaved, reports.

    pytest benchmarks --benchmark-only [--quick] [--max-autotune] [--results DIR] [-k NAME]

A benchmark takes the fixture ``contest`` and calls it once for each workload. Every figure of a table is from one run:
the copy rate and the matrix rate too, against which a share of the ceiling is given. Times are kept from GPUs alone; on
a CPU, whose clock and neighbours change, only ratios are.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seda_fast.ops import _dispatch, use_backend

REPEATS = 30
QUICK_REPEATS = 3
# Rounds over the points of a growth, and the seconds beyond which a point is left out of them once it was measured
# `LEAST_REPEATS` times: with fewer there is no spread.
GROWTH_REPEATS, GROWTH_BUDGET, LEAST_REPEATS = 20, 20.0, 3
# Among other sizes a call that takes fewer seconds is made once untimed before it is timed: they have taken its place
# in the caches, and the first of a round's calls would pay for that alone.
WARM_BELOW = 0.1
# A CPU timing shorter than this is noise; the call is repeated inside it.
SHORTEST = 2e-3
# Cycles that a GPU is kept waiting before an operation is timed, about five milliseconds: its launches take the host
# longer than some kernels run, and inside a captured step they cost it nothing.
HEAD_START = 8_000_000
PACKAGES = ("torch", "triton", "numpy", "xformers", "liger_kernel", "diffusers")
OURS = "seda_fast"


@dataclass(frozen=True)
class Workload:
    """What is timed, and the least that any implementation must move and multiply.

    Attributes:
        name: operation and sizes, one line of the table.
        operation: the registered op, whose backend is reported; empty where there is none.
        moved: bytes that must be read and written.
        flops: floating-point operations of the matrix products; 0 without one.
        dtype: dtype of the products.
        host: whether the host's time for launches counts, as it does where a user waits for the result.
    """

    name: str
    operation: str
    moved: float
    flops: float = 0.0
    dtype: torch.dtype = torch.float32
    host: bool = False


@dataclass(frozen=True)
class Row:
    """One competitor in one workload; times in seconds, None where only ratios count. ``moved`` and ``flops`` are the
    workload's, and ``other_share`` the share of the ceiling that does not bind; records of before have none of them."""

    workload: str
    competitor: str
    backend: str
    ratio: float
    spread: float
    median: float | None
    floor: float | None
    share_of_ceiling: float
    bound: str
    extra: dict[str, float]
    moved: float | None = None
    flops: float | None = None
    other_share: float | None = None


class Clock:
    """Times calls on one device; on a GPU with events and a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(2**28, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def __call__(self, call: Callable[[], object], calls: int = 1, *, host: bool = True) -> float:
        """Seconds of one of ``calls`` calls; on a GPU without ``host`` the host runs ahead, see `HEAD_START`."""
        if self._flush is None:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) / calls
        self._flush.zero_()
        if not host:
            torch.cuda._sleep(HEAD_START)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def calls_for(self, call: Callable[[], object]) -> int:
        """How many calls make a timing long enough."""
        return 1 if self._flush is not None else self.calls_of(self(call))

    def calls_of(self, seconds: float) -> int:
        """The same, where one call takes ``seconds``."""
        return 1 if self._flush is not None else max(1, round(SHORTEST / max(seconds, 1e-9)))


class Contest:
    """Runs workloads and keeps their rows."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats, self.rows = device, repeats, list[Row]()
        self.growth, self.starts = dict[str, dict[str, Any]](), dict[str, dict[str, float]]()
        self.runs = dict[str, dict[str, dict[str, Any]]]()
        # Competitors that cannot run here, by workload and name, and what they said.
        self.left_out = dict[str, str]()
        self.clock = Clock(device)
        self.matrix_rate = {dtype: self._matrix_rate(dtype) for dtype in self._dtypes()}
        self.copy_rate = self._copy_rate(2**31 if device.type == "cuda" else 2**27)

    def _dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.float32, torch.bfloat16) if self.device.type == "cuda" else (torch.float32,)

    def _copy_rate(self, moved: float) -> float:
        """Bytes a second, read and written, of a copy that moves ``moved`` bytes."""
        source = torch.randint(0, 256, (max(1, round(moved / 2)),), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        calls = self.clock.calls_for(lambda: target.copy_(source))
        return 2 * source.nbytes / min(self.clock(lambda: target.copy_(source), calls) for _ in range(self.repeats))

    def _matrix_rate(self, dtype: torch.dtype) -> float:
        """FLOP a second of PyTorch's own product of two large square matrices."""
        side = 8192 if self.device.type == "cuda" else 1024
        left, right = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        return 2 * side**3 / min(self.clock(lambda: left @ right) for _ in range(self.repeats))

    def __call__(
        self,
        workload: Workload,
        competitors: dict[str, Callable[[], Any]],
        check: Callable[[str, Any], None],
        extra: dict[str, float] | None = None,
    ) -> None:
        """Check and time the competitors, `OURS` among them; another one that raises is left out and named.

        Args:
            check: called with each competitor's name and result; raises where the result is wrong.
            extra: further figures of our own row.
        """
        competitors = dict(competitors)
        for name, call in list(competitors.items()):
            try:
                result = call()
            except Exception as error:  # a peer or a compiler that does not know this device or this PyTorch
                if name.startswith(OURS):
                    raise
                said = (str(error).splitlines() or [""])[0]
                self.left_out[f"{workload.name}: {name}"] = f"{type(error).__name__}: {said}"[:200]
                del competitors[name]
                continue
            check(name, result)
        # Once more beside the competitors: other work on the machine comes and goes.
        if workload.dtype in self.matrix_rate:
            self.matrix_rate[workload.dtype] = self._matrix_rate(workload.dtype)
        counts = {name: self.clock.calls_for(call) for name, call in competitors.items()}
        times: dict[str, list[float]] = {name: [] for name in competitors}
        for _ in range(self.repeats):
            for name, call in competitors.items():
                times[name].append(self.clock(call, counts[name], host=workload.host))
        if workload.dtype in self.matrix_rate:
            self.matrix_rate[workload.dtype] = max(self.matrix_rate[workload.dtype], self._matrix_rate(workload.dtype))
        (floor, bound), (other, _) = self.floors(workload)
        ours = statistics.median(times[OURS])
        backend = "torch"  # a function of PyTorch's own operations
        if workload.operation:
            backend = _dispatch.choose(workload.operation, self.device.type, workload.dtype)[0]
        for name, taken in times.items():
            median = statistics.median(taken)
            absolute = self.device.type == "cuda"
            self.rows.append(
                Row(
                    workload=workload.name,
                    competitor=name,
                    backend=backend if name == OURS else "",
                    ratio=median / ours,
                    spread=spread_of(taken),
                    median=median if absolute else None,
                    floor=floor if absolute else None,
                    share_of_ceiling=floor / median,
                    bound=bound,
                    extra=extra or {} if name == OURS else {},
                    moved=workload.moved,
                    flops=workload.flops,
                    other_share=other / median,
                )
            )

    def floors(self, workload: Workload) -> list[tuple[float, str]]:
        """Least seconds on this machine by both, "copy" and "matrix", the one that binds first."""
        # On a CPU the operands of a small workload stay in the caches, so a copy of its own size is the measure.
        rate = self.copy_rate if self.device.type == "cuda" else self._copy_rate(workload.moved)
        copy = workload.moved / rate
        matrix = workload.flops / self.matrix_rate[workload.dtype] if workload.flops else 0.0
        return sorted([(copy, "copy"), (matrix, "matrix")], reverse=True)


def spread_of(taken: list[float]) -> float:
    """Between the quarters of several times, over their median; of three it is from the least to the largest."""
    first, _, last = statistics.quantiles(taken, n=4)
    return (last - first) / statistics.median(taken)


def agree(
    got: Tensor, expected: Tensor, eager: Tensor, name: str, *, times: float = 2.0, contract: float = 0.0
) -> None:
    """Assert that ``got`` errs no more than ``times`` as much as ``eager``, PyTorch's in its dtype, plus roundings.

    A vector of another than `OURS`, by ``name``, may err 16 times as much: code that `torch.compile` makes for a CPU
    adds up a bias's gradient row after row.

    Against ``expected``, in float64, the largest error and the root mean square are compared. Neither sees a result
    that is 2 % too large in bfloat16, so the error along ``expected`` is bounded too: rounding leaves next to nothing
    of it. A wrong ``eager`` allows nothing: its own error may be 32 roundings in the root mean square.

    Args:
        contract: an absolute error that is allowed besides.
    """
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    eps, expected = torch.finfo(got.dtype).eps, expected.detach().double()
    error, usual = (x.detach().double() - expected for x in (got, eager))
    if got.ndim == 1 and not name.startswith(OURS):
        times = max(times, 16.0)
    size, spare = expected.norm(), contract * math.sqrt(max(1, expected.numel()))
    bounds = {
        "at most": (error.abs().max(), times * usual.abs().max() + 4 * eps * expected.abs().max() + contract),
        "in the root mean square": (error.norm(), times * usual.norm() + 2 * eps * size + spare),
        "in scale": ((error * expected).sum().abs(), 2 * eps * size**2 + spare * size),
        "in the root mean square of eager": (usual.norm(), 32 * eps * size + spare),
    }
    for what, (found, allowed) in bounds.items():
        # A comparison with NaN is false.
        assert found <= allowed, f"{name}: off {what} by {float(found):.2e}, {float(allowed):.2e} allowed"


def built(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """A peer's call, or one that raises what kept it from being made: a `Contest` then leaves it out and says why."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001 - built for another PyTorch or Triton it raises whatever it meets first
        reason = error

    def fails() -> Any:
        raise reason

    return fails


def compiled(call: Callable[..., Any], device: torch.device, autotune: bool) -> dict[str, Callable[..., Any]]:
    """``call`` as `torch.compile` makes it, for the one shape: by default, and with ``autotune`` on a GPU also with
    max-autotune, which takes about a minute for half a dozen products."""
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    variants = {"compiled": torch.compile(call, **options)}
    if device.type == "cuda" and autotune:
        variants["compiled, max-autotune"] = torch.compile(call, mode="max-autotune-no-cudagraphs", **options)
    return variants


# ---------------------------------------------------------------------------------------------------------------------
# Report


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of Python and the installed packages that matter."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit(root: Path) -> str:
    """The checkout's commit, marked where files differ from it; those of records do not count."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        name = git("describe", "--always", "--abbrev=12", "--exclude=*")
        changed = git("diff", "HEAD", "--", ".", ":(exclude)benchmarks/results")
    except OSError:  # no git here
        return "unknown"
    # Says which changes these are: records of different ones are not joined.
    mark = f"-dirty-{hashlib.sha256(changed.encode()).hexdigest()[:8]}" if changed else ""
    return f"{name}{mark}" if name else "unknown"


def as_json(contest: Contest, root: Path) -> dict[str, Any]:
    rates = {str(dtype).removeprefix("torch."): rate for dtype, rate in contest.matrix_rate.items()}
    absolute = contest.device.type == "cuda"
    return {
        "device": device_name(contest.device),
        "commit": commit(root),
        "versions": versions(),
        "repeats": contest.repeats,
        "copy_bytes_per_second": contest.copy_rate if absolute else None,
        "matrix_flops_per_second": rates if absolute else None,
        "rows": [dataclasses.asdict(row) for row in contest.rows],
        "growth": contest.growth,
        "starts": contest.starts,
        "runs": contest.runs,
        "left_out": contest.left_out,
    }


def with_earlier(new: dict[str, Any], file: Path, passed: Collection[str] = ()) -> dict[str, Any]:
    """``new`` and what an earlier run on the same device, of the same commit and versions, wrote of other workloads.

    So that benchmarks can be run a few at a time. ``passed`` names the benchmarks that did this time: what was left out
    of their workloads before is forgotten.
    """
    try:
        old = json.loads(file.read_text())
    except (OSError, ValueError):
        return new

    def same(record: dict[str, Any]) -> list[Any]:
        return [record.get(name) for name in ("device", "versions", "repeats", "commit")]

    if same(old) != same(new) or new["commit"] == "unknown":
        return new
    measured = {row["workload"] for row in new["rows"]}
    rows = [row for row in old["rows"] if row["workload"] not in measured]
    joined = {part: {**old.get(part, {}), **new[part]} for part in ("growth", "starts", "runs")}
    anew = {*measured, *new["growth"]}
    earlier = {
        place: said
        for place, said in old.get("left_out", {}).items()
        if place not in passed and not any(place.startswith(f"{workload}: ") for workload in anew)
    }
    return {**new, "rows": rows + new["rows"], **joined, "left_out": {**earlier, **new["left_out"]}}


def as_table(rows: list[Row]) -> str:
    """The table that a run prints: ratio = the competitor's time over ours."""
    head = ("workload", "competitor", "ratio", "spread", "time", "share of ceiling")
    cells = [head]
    for row in rows:
        taken = "" if row.median is None else f"{row.median * 1e6:.1f} us"
        name = f"{row.competitor} ({row.backend})" if row.backend else row.competitor
        share = f"{row.share_of_ceiling:.0%} of {row.bound}"
        cells.append((row.workload, name, f"{row.ratio:.2f}", f"{row.spread:.0%}", taken, share))
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


Points = dict[int, Callable[[], Any]]


def measure_growth(
    contest: Contest,
    name: str,
    points: Points,
    check: Callable[[str, int, Any], None],
    others: dict[str, Points] | None = None,
) -> None:
    """Check and time ``points``, interleaved, and fit the slope of log time over log size.

    Times are kept from GPUs; on a CPU they count in that of the first point. A point that has taken `GROWTH_BUDGET`
    seconds is not measured again, but `LEAST_REPEATS` times at least after its warm-up, which is checked.

    Args:
        check: called with each competitor's name, size and result; raises where the result is wrong.
        others: the same points of competitors, whose times over ours are kept; one that raises is left out and named.
    """
    series = {OURS: points, **(others or {})}
    lengths = _warmed(contest, name, series, check)
    clock, counts = contest.clock, {which: contest.clock.calls_of(seconds) for which, seconds in lengths.items()}
    # A call long enough not to mind what came before has been timed already.
    times = {which: [seconds] if seconds >= WARM_BELOW else [] for which, seconds in lengths.items()}
    spent = {which: sum(taken) for which, taken in times.items()}
    rounds = min(contest.repeats, GROWTH_REPEATS)
    for _ in range(rounds):
        for which, taken in times.items():
            if len(taken) < rounds and (len(taken) < LEAST_REPEATS or spent[which] < GROWTH_BUDGET):
                begin, call = time.perf_counter(), series[which[0]][which[1]]
                if lengths[which] < WARM_BELOW:
                    call()
                taken.append(clock(call, counts[which]))
                spent[which] += time.perf_counter() - begin
    unit = 1.0 if contest.device.type == "cuda" else statistics.median(times[OURS, next(iter(points))])
    contest.growth[name] = _growth_of(list(points), list(series), times, unit)


def _warmed(
    contest: Contest, name: str, series: dict[str, Points], check: Callable[[str, int, Any], None]
) -> dict[tuple[str, int], float]:
    """Seconds of a call of each competitor at each size, small sizes first, once its result is checked.

    Competitors that raise leave ``series``.
    """
    lengths: dict[tuple[str, int], float] = {}
    for n in sorted(series[OURS]):
        for competitor in list(series):
            call = series[competitor][n]
            try:
                result = warm(call, contest.device)
                lengths[competitor, n] = contest.clock(call)
            except Exception as error:  # a compiler that does not know this device or this PyTorch
                if competitor == OURS:
                    raise
                said = (str(error).splitlines() or [""])[0]
                contest.left_out[f"{name}: {competitor}"] = f"{type(error).__name__}: {said}"[:200]
                del series[competitor]
                continue
            check(competitor, n, result)
    return {(competitor, n): seconds for (competitor, n), seconds in lengths.items() if competitor in series}


def _growth_of(
    sizes: list[int], competitors: list[str], times: dict[tuple[str, int], list[float]], unit: float
) -> dict[str, Any]:
    """What a record holds of a growth: times of ours in ``unit``, others' over ours, and counts and spreads of all."""
    medians = {c: [statistics.median(times[c, n]) for n in sizes] for c in competitors}
    ours = medians.pop(OURS)
    slope, _ = statistics.linear_regression([math.log(n) for n in sizes], [math.log(t) for t in ours])
    ratios = {c: [theirs / own for theirs, own in zip(found, ours, strict=True)] for c, found in medians.items()}
    return {
        "sizes": sizes,
        "times": [t / unit for t in ours],
        "slope": slope,
        "counts": {c: [len(times[c, n]) for n in sizes] for c in competitors},
        "spreads": {c: [spread_of(times[c, n]) for n in sizes] for c in competitors},
        **({"ratios": ratios} if ratios else {}),
    }


def warm(call: Callable[[], Any], device: torch.device) -> Any:
    """Call it, on a GPU twice: a captured graph is recorded by the second call. Returns the last call's result."""
    if device.type == "cuda":
        call()
    return call()


def measure_start(contest: Contest, name: str, command: list[str], caches: Sequence[Path], tuned: bool) -> None:
    """Run ``command`` in new processes and keep the medians of what it prints, and the spread of the first step's.

    Args:
        command: prints the seconds of the first step and of a later one, those of importing PyTorch and this package,
            and its peak bytes.
        caches: the folder of the compilers' and the tuner's caches, one for each process.
    """
    found = []
    for folder in caches:
        places = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
        places |= {"SEDA_FAST_CACHE_DIR": str(folder / "tiles"), "SEDA_FAST_AUTOTUNE": str(int(tuned))}
        done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True, check=True)
        first, usual, torch_in, package_in, peak = (float(word) for word in done.stdout.split()[-5:])
        found.append((first / usual, package_in / torch_in, peak, first))
    ratio, imported, peak, seconds = (statistics.median(values) for values in zip(*found, strict=True))
    contest.starts[name] = {
        "first_step_over_later": ratio,
        "import_over_torch": imported,
        "peak_memory_bytes": peak,
        "count": len(found),
        **({"spread": spread_of([start[0] for start in found])} if len(found) > 1 else {}),
        **({"first_step_seconds": seconds} if contest.device.type == "cuda" else {}),
    }


def measure_run(
    contest: Contest,
    name: str,
    commands: dict[str, list[str]],
    repeats: int,
    check: Callable[[dict[str, list[float]]], None],
    covers: str,
) -> None:
    """Run ``commands``, one each competitor, `OURS` among them, in turns.

    Args:
        commands: each prints a line that ends with its seconds and its peak bytes.
        check: called after each turn with what stood before them on every competitor's line; raises where that is
            wrong.
        covers: what a run does from its first moment to its last, for the record.
    """
    found: dict[str, list[tuple[float, float]]] = {competitor: [] for competitor in commands}
    for _ in range(repeats):
        told: dict[str, list[float]] = {}
        for competitor, command in commands.items():
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            *told[competitor], seconds, peak = (float(word) for word in done.stdout.splitlines()[-1].split())
            found[competitor].append((seconds, peak))
        check(told)
    medians = {c: [statistics.median(values) for values in zip(*taken, strict=True)] for c, taken in found.items()}
    contest.runs[name] = {
        competitor: {
            "ratio": medians[competitor][0] / medians[OURS][0],
            "spread": (max(taken)[0] - min(taken)[0]) / medians[competitor][0],
            "peak_memory_ratio": medians[competitor][1] / medians[OURS][1],
            "count": len(taken),
            "covers": covers,
        }
        for competitor, taken in found.items()
    }


def as_growth_table(contest: Contest) -> str:
    """Slopes and starts, a line each."""
    lines = [
        f"{name}: time grows with size to the power {g['slope']:.2f} ({min(g['counts'][OURS])} to "
        f"{max(g['counts'][OURS])} repeats)"
        for name, g in contest.growth.items()
    ]
    for name, start in contest.starts.items():
        lines.append(
            f"start ({name}): first step {start['first_step_over_later']:.1f} later steps, import "
            f"{start['import_over_torch']:.2f} of PyTorch's, peak {start['peak_memory_bytes'] / 1e6:.0f} MB "
            f"({start['count']:.0f} repeats)"
        )
    for name, by_competitor in contest.runs.items():
        for competitor, run in by_competitor.items():
            lines.append(
                f"{name}, {competitor}: {run['ratio']:.2f} of our time (spread {run['spread']:.0%}), "
                f"{run['peak_memory_ratio']:.2f} of our peak memory ({run['count']} repeats)"
            )
    return "\n".join(lines)


def draw_growth(contest: Contest, title: str, file: Path) -> bool:
    """Log-log lines of `measure_growth` with their slopes, as a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, found in contest.growth.items():
        axes.loglog(found["sizes"], found["times"], marker="o", label=f"{name}: slope {found['slope']:.2f}")
    axes.set_xlabel("size")
    axes.set_ylabel("seconds" if contest.device.type == "cuda" else "time over that of the smallest")
    axes.set_title(title)
    axes.legend()
    figure.savefig(file, dpi=120)
    return True


def draw(rows: list[Row], title: str, file: Path) -> bool:
    """Bars of every competitor's time over ours, as a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row.workload}: {row.competitor}" for row in rows]
    colours = ["tab:blue" if row.competitor == OURS else "tab:grey" for row in rows]
    axes.barh(labels, [row.ratio for row in rows], color=colours)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("time relative to seda_fast (longer is slower)")
    axes.set_title(title)
    figure.savefig(file, dpi=120)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("seda_fast benchmarks")
    group.addoption(
        "--quick", action="store_true", help="few repeats of small workloads, nothing written: a check only"
    )
    group.addoption("--max-autotune", action="store_true", help="on a GPU tune whole networks, too: minutes each")
    group.addoption("--results", type=Path, default=Path(__file__).parent / "results", help="folder for JSON and PNG")


def pytest_configure(config: pytest.Config) -> None:
    # pytest-benchmark selects the benchmarks; its own table would mix absolute CPU times into the report.
    config.option.benchmark_quiet = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; the reason names it."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=f"{item.nodeid} needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether sizes should be small."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def _contest(request: pytest.FixtureRequest, device: torch.device, quick: bool) -> Contest:
    torch.manual_seed(0)
    contest = Contest(device, QUICK_REPEATS if quick else REPEATS)
    request.config.stash[_KEY] = contest
    return contest


_KEY = pytest.StashKey[Contest]()


@pytest.fixture
def contest(_contest: Contest, benchmark: Any) -> Contest:
    """The session's contest. Depending on ``benchmark`` is what --benchmark-only selects by."""
    benchmark.pedantic(lambda: None, rounds=1)
    return _contest


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table; write JSON and PNG unless the run was a quick check; what failed is named as left out."""
    contest = config.stash.get(_KEY, None)
    if contest is None or not (contest.rows or contest.growth or contest.starts or contest.runs):
        return
    for report in (*terminalreporter.stats.get("failed", ()), *terminalreporter.stats.get("error", ())):
        contest.left_out[report.nodeid] = "failed"
    terminalreporter.section(f"benchmarks on {device_name(contest.device)}")
    terminalreporter.write_line(as_table(contest.rows))
    terminalreporter.write_line(as_growth_table(contest))
    for competitor, said in contest.left_out.items():
        terminalreporter.write_line(f"left out: {competitor} ({said})")
    if contest.device.type != "cuda":
        terminalreporter.write_line("GPU workloads: not measured (no CUDA device).")
    if config.getoption("--quick"):
        terminalreporter.write_line("Nothing was written: a quick check.")
        return
    folder: Path = config.getoption("--results")
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", device_name(contest.device).lower()).strip("-")
    passed = {report.nodeid for report in terminalreporter.stats.get("passed", ())}
    result = with_earlier(as_json(contest, Path(__file__).resolve().parents[1]), folder / f"{name}.json", passed)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    title = f"{result['device']}, commit {result['commit']}"
    drawn = draw([Row(**row) for row in result["rows"]], title, folder / f"{name}.png")
    if contest.growth:
        contest.growth = result["growth"]
        draw_growth(contest, title, folder / f"{name}-growth.png")
    picture = " and .png" if drawn else "; no picture, as matplotlib is not installed"
    terminalreporter.write_line(f"Written: {folder / name}.json{picture}")


# ---------------------------------------------------------------------------------------------------------------------
# For the benchmarks' files


@pytest.fixture(scope="session")
def ours() -> str:
    """Our own competitor's name."""
    return OURS


@pytest.fixture(scope="session")
def challengers() -> Callable[[str, torch.device, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """Our call on each backend that could serve an operation on this GPU but is not its default: what decides on it."""

    def find(operation: str, device: torch.device, call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
        if device.type != "cuda":
            return {}
        chosen = _dispatch.choose(operation, "cuda")[0]
        known = [b for b in ("triton", "cuda") if b != chosen and b in _dispatch._implementations[operation]]
        able = [backend for backend in known if _dispatch.refusal(operation, backend, "cuda") is None]

        def forced(backend: str) -> Callable[[], Any]:
            def run() -> Any:
                with use_backend(backend):
                    return call()

            return run

        return {f"{OURS} on {backend}": forced(backend) for backend in able}

    return find


@pytest.fixture(scope="session")
def growth() -> Callable[..., None]:
    """See `measure_growth`."""
    return measure_growth


@pytest.fixture(scope="session")
def startup() -> Callable[..., None]:
    """See `measure_start`."""
    return measure_start


@pytest.fixture(scope="session")
def whole_run() -> Callable[..., None]:
    """See `measure_run`."""
    return measure_run


@pytest.fixture(scope="session")
def workload() -> type[Workload]:
    """The class that describes a workload."""
    return Workload


@pytest.fixture(scope="session")
def compile_variants(request: pytest.FixtureRequest) -> Callable[..., dict[str, Callable[..., Any]]]:
    """`torch.compile` with the settings that this device is measured with; a ``large`` call is tuned only on demand."""
    tune = bool(request.config.getoption("--max-autotune"))

    def variants(
        call: Callable[..., Any], device: torch.device, *, large: bool = False
    ) -> dict[str, Callable[..., Any]]:
        return compiled(call, device, tune or not large)

    return variants


@pytest.fixture(scope="session")
def any_size() -> Callable[..., dict[str, Callable[..., Any]]]:
    """`torch.compile` once for every number of rows; on a GPU also with a graph for each of them."""

    def variants(call: Callable[..., Any], device: torch.device) -> dict[str, Callable[..., Any]]:
        found = {"compiled": torch.compile(call, fullgraph=True, dynamic=True)}
        if device.type == "cuda":
            found["compiled, reduce-overhead"] = torch.compile(
                call, mode="reduce-overhead", fullgraph=True, dynamic=True
            )
        return found

    return variants


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """See `agree`."""
    return agree


@pytest.fixture(scope="session")
def peer() -> Callable[[Callable[[], Callable[[], Any]]], Callable[[], Any]]:
    """See `built`."""
    return built
