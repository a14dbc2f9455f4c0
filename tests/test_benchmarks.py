"""The benchmarks' harness: what is wrong is never timed, what is timed is reported as promised."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def load(file: Path) -> Any:
    name = f"seda_fast_benchmarks_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def harness(repository: Path) -> Any:
    """``benchmarks/conftest.py`` as a module."""
    return load(repository / "benchmarks" / "conftest.py")


@pytest.fixture
def contest(harness: Any) -> Any:
    return harness.Contest(torch.device("cpu"), repeats=3)


def unchecked(name: str, n: int, result: Any) -> None:
    """A check of what cannot be wrong."""


def looped(chain: Any, wrong: float) -> Callable[..., Callable[[], torch.Tensor]]:
    """A stand-in for diffusers' loop, ``wrong`` times its value."""

    def made(network: Any, latent: torch.Tensor, condition: torch.Tensor, schedule: Any) -> Callable[[], torch.Tensor]:
        sampler = schedule.sampler("ddim", chain.STEPS)
        x = latent * float(sampler.initial_noise)
        return lambda: wrong * chain.loop(network, x, condition, sampler.coefficients.tolist())

    return made


def spin(calls: list[str], name: str, count: int) -> Callable[[], int]:
    def call() -> int:
        calls.append(name)
        return sum(range(count))

    return call


def test_a_wrong_competitor_is_found_before_anything_is_timed(harness: Any, contest: Any) -> None:
    calls: list[str] = []
    competitors = {"seda_fast": spin(calls, "seda_fast", 10), "other": spin(calls, "other", 11)}

    def check(name: str, result: int) -> None:
        assert result == 45, name

    with pytest.raises(AssertionError, match="other"):
        contest(harness.Workload("sums", "q_sample", moved=1.0), competitors, check)
    assert calls == ["seda_fast", "other"]
    assert contest.rows == []


def test_competitors_are_interleaved_and_compared(harness: Any, contest: Any) -> None:
    calls: list[str] = []
    competitors = {"seda_fast": spin(calls, "a", 200_000), "slow": spin(calls, "b", 1_000_000)}
    contest(harness.Workload("sums", "q_sample", moved=1e6), competitors, lambda name, result: None)
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    # One check, one count of calls, three repeats: five turns each, one after the other.
    assert turns == ["a", "b"] * 5
    ours, slow = contest.rows
    assert ours.ratio == 1
    assert slow.ratio > 1.5
    assert ours.share_of_ceiling > slow.share_of_ceiling > 0
    assert ours.moved is not None and ours.flops is not None and ours.other_share is not None
    assert ours.share_of_ceiling >= ours.other_share
    assert ours.median is None, "a CPU's times are not kept"


def test_sizes_are_compared_with_competitors_and_one_that_fails_is_named(
    harness: Any, contest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    # This process's own time: others on the machine take turns as long as these calls.
    monkeypatch.setattr(time, "perf_counter", time.process_time)

    def broken() -> int:
        raise ValueError("no code for this size")

    sizes = (20_000, 40_000, 80_000)
    points = {size: spin(calls, "ours", size) for size in sizes}
    others = {"slow": {size: spin(calls, "slow", 4 * size) for size in sizes}, "broken": dict.fromkeys(sizes, broken)}
    harness.measure_growth(contest, "sums", points, unchecked, others)
    found = contest.growth["sums"]
    assert found["sizes"] == list(sizes)
    assert set(found["ratios"]) == {"slow"}
    assert all(2 < ratio < 8 for ratio in found["ratios"]["slow"]), found
    assert found["times"][0] == 1, "a CPU's times are not kept"
    assert found["counts"] == {"seda_fast": [3, 3, 3], "slow": [3, 3, 3]}
    assert all(0 <= spread < 10 for spreads in found["spreads"].values() for spread in spreads)
    assert contest.left_out == {"sums: broken": "ValueError: no code for this size"}


def test_a_competitor_that_is_wrong_at_one_size_is_found_before_anything_is_timed(harness: Any, contest: Any) -> None:
    points = {size: lambda size=size: size for size in (1, 2)}
    others = {1: lambda: 1, 2: lambda: 3}

    def check(name: str, n: int, result: int) -> None:
        assert result == n, f"{name} of {n}"

    with pytest.raises(AssertionError, match="other of 2"):
        harness.measure_growth(contest, "sizes", points, check, {"other": others})
    with pytest.raises(AssertionError, match="seda_fast of 2"):
        harness.measure_growth(contest, "sizes", others, check)
    assert contest.growth == {} and contest.left_out == {}


class KnownClock:
    """Takes a call's result for its seconds."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, call: Callable[[], float], calls: int = 1) -> float:
        self.calls += 1
        return call()

    def calls_of(self, seconds: float) -> int:
        return 1


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_fitted_slope_is_the_power_of_known_times(
    harness: Any, contest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, power: float
) -> None:
    contest.clock, contest.repeats = KnownClock(), 30
    sizes = (1, 10, 100, 1000)
    points, slower = (
        {size: lambda size=size, times=times: times * 0.002 * size**power for size in sizes} for times in (1, 3)
    )
    harness.measure_growth(contest, "known", points, unchecked, {"slower": slower})
    found = contest.growth["known"]
    assert found["slope"] == pytest.approx(power)
    assert found["times"] == pytest.approx([size**power for size in sizes])
    assert found["ratios"]["slower"] == pytest.approx([3, 3, 3, 3])
    # Twenty times, as the calls take no time of the budget; the long ones' first time is that of the warm-up.
    assert found["counts"]["slower"] == [20, 20, 20, 20]
    assert found["spreads"]["slower"] == pytest.approx([0, 0, 0, 0])
    assert harness.draw_growth(contest, "title", tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    line = f"known: time grows with size to the power {power:.2f} (20 to 20 repeats)"
    assert line in harness.as_growth_table(contest)
    monkeypatch.setattr(harness, "GROWTH_BUDGET", 0.0)
    harness.measure_growth(contest, "known", points, unchecked)
    assert contest.growth["known"]["counts"] == {"seda_fast": [3, 3, 3, 3]}


TOLD = """
import os, pathlib, sys
places = [pathlib.Path(os.environ[name]) for name in (
    "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "SEDA_FAST_CACHE_DIR")]
cold = not all(place.is_dir() for place in places)
for place in places:
    place.mkdir(parents=True, exist_ok=True)
print("a compiler's line")
print(6.0 if cold else 3.0, 2.0, 4.0, 1.0, 1e6 + int(os.environ["SEDA_FAST_AUTOTUNE"]))
"""


def test_a_start_is_what_new_processes_say_cold_and_with_caches(harness: Any, contest: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TOLD]
    folders = [tmp_path / str(i) for i in range(2)]
    harness.measure_start(contest, "cold", command, folders, True)
    harness.measure_start(contest, "warm", command, folders[:1], False)
    figures = {"import_over_torch": 0.25, "peak_memory_bytes": 1e6}
    assert contest.starts["warm"] == {"first_step_over_later": 1.5, **figures, "count": 1}
    assert contest.starts["cold"] == {
        **figures, "first_step_over_later": 3.0, "peak_memory_bytes": 1e6 + 1, "count": 2, "spread": 0.0
    }  # fmt: skip
    assert "start (cold): first step 3.0 later steps, import 0.25 of PyTorch's" in harness.as_growth_table(contest)
    with pytest.raises(subprocess.CalledProcessError):
        harness.measure_start(contest, "broken", [sys.executable, "-c", "raise SystemExit(1)"], folders, False)


def test_cold_starts_share_no_caches_and_warm_ones_have_those_of_the_first(repository: Path, tmp_path: Path) -> None:
    train, asked = load(repository / "benchmarks" / "bench_train.py"), dict[str, list[Path]]()

    def startup(contest: Any, name: str, command: list[str], caches: list[Path], tuned: bool) -> None:
        asked[name] = caches
        compile(command[2], "the first step", "exec")

    train.bench_start(None, False, startup, tmp_path)
    for engine, count in (("eager", 5), ("compile", 1)):
        cold, warm = (asked[f"{engine}, caches {state}"] for state in ("cold", "warm"))
        assert len(cold) == len(set(cold)) == len(warm) == count
        assert set(warm) == {cold[0]}
    assert not set(asked["eager, caches cold"]) & set(asked["compile, caches cold"])


def test_whole_runs_are_checked_and_counted(harness: Any, contest: Any) -> None:
    def command(loss: float, seconds: float) -> list[str]:
        return [sys.executable, "-c", f"print('a line'); print({loss}, {seconds}, 1e6)"]

    told = []
    commands = {"seda_fast": command(1.0, 2.0), "eager": command(1.5, 3.0)}
    harness.measure_run(contest, "a run", commands, 2, told.append, "all of it")
    assert told == [{"seda_fast": [1.0], "eager": [1.5]}] * 2
    assert contest.runs["a run"]["eager"] == {
        "ratio": 1.5, "spread": 0.0, "peak_memory_ratio": 1.0, "count": 2, "covers": "all of it",
    }  # fmt: skip
    assert "a run, eager: 1.50 of our time (spread 0%), 1.00 of our peak memory (2 repeats)" in harness.as_growth_table(
        contest
    )

    def check(figures: dict[str, list[float]]) -> None:
        assert figures["eager"] == [1.0], "eager"

    with pytest.raises(AssertionError, match="eager"):
        harness.measure_run(contest, "another", commands, 2, check, "all of it")
    assert set(contest.runs) == {"a run"}


def test_both_sides_of_a_whole_run_prepare_train_and_predict_alike(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = load(repository / "benchmarks" / "bench_run.py")
    compile(bench.RUN, "a run", "exec")
    data, model, rows = bench.prepared(112, 28, 28, 1)
    raw = torch.from_numpy(data.visual_test)
    bench.assert_same_loss(model, rows, 64)
    bench.assert_same_outputs(model, raw)
    told = {}
    for who in ("seda_fast", "eager"):
        bench.run(time.perf_counter(), who, 112, 28, 28, 2, 1)
        *told[who], seconds, peak = map(float, capsys.readouterr().out.split())
        assert seconds > 0 and peak > 1e7
    bench.check(told)
    loss, right = told["eager"]
    for wrong in ([1.2 * loss, right], [loss, right + 0.2], [float("nan"), right]):
        with pytest.raises(AssertionError, match="eager's"):
            bench.check({**told, "seda_fast": wrong})
    chain = bench.plain_chain
    bench.plain_chain = lambda *operands: 1.001 * chain(*operands)
    with pytest.raises(AssertionError):
        bench.assert_same_outputs(model, raw)


def test_each_size_of_a_chain_is_checked_and_diffusers_among_them(
    repository: Path, harness: Any, contest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = load(repository / "benchmarks" / "bench_reverse_chain.py")
    monkeypatch.setattr(chain, "diffusers_loop", looped(chain, 1.0))
    fixtures: dict[str, Any] = {
        "contest": contest, "device": torch.device("cpu"), "quick": True, "growth": harness.measure_growth,
        "close": harness.agree, "peer": harness.built, "any_size": lambda call, device: {},
    }  # fmt: skip
    chain.bench_chain_sizes(**fixtures)
    (found,) = contest.growth.values()
    assert set(found["ratios"]) == {"eager", "eager, gates once", "eager, diffusers' DDIMScheduler"}
    monkeypatch.setattr(chain, "diffusers_loop", looped(chain, 1.02))
    with pytest.raises(AssertionError, match="eager, diffusers' DDIMScheduler, 1 rows"):
        chain.bench_chain_sizes(**fixtures)
    monkeypatch.undo()
    wrong = {"any_size": lambda call, device: {"compiled": lambda *given: 1.02 * call(*given)}}
    with pytest.raises(AssertionError, match="compiled, 1 rows"):
        chain.bench_chain_sizes(**{**fixtures, **wrong})


def test_a_size_s_last_rows_are_checked_where_there_are_many(
    repository: Path, harness: Any, contest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = load(repository / "benchmarks" / "bench_reverse_chain.py")
    monkeypatch.setattr(chain, "SIZES", (3, 7))
    monkeypatch.setattr(chain, "CHECKED", 4)

    def last_row_wrong(call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda network, x, *rest: torch.cat((call(network, x, *rest)[:-1], x[-1:]))

    with pytest.raises(AssertionError, match="compiled, 3 rows"):
        chain.bench_chain_sizes(
            contest, torch.device("cpu"), True, harness.measure_growth,
            lambda call, device: {"compiled": last_row_wrong(call)}, harness.agree, harness.built,
        )  # fmt: skip


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_each_size_of_a_batch_is_checked(repository: Path, harness: Any, contest: Any, wrong: str) -> None:
    train = load(repository / "benchmarks" / "bench_train.py")

    def compiled(loss: Callable[..., torch.Tensor], device: torch.device) -> dict[str, Callable[..., torch.Tensor]]:
        def changed(*given: Any) -> torch.Tensor:
            value = loss(*given)
            return 3 * value if wrong == "loss" else value.detach() + 0.9 * (value - value.detach())

        return {"compiled": changed}

    arguments = (contest, torch.device("cpu"), True, harness.measure_growth)
    train.bench_batch_sizes(*arguments, lambda loss, device: {"compiled": loss}, harness.agree)
    (found,) = contest.growth.values()
    assert set(found["ratios"]) == {"eager", "compiled"}
    with pytest.raises(AssertionError, match=r"compiled, .*1 rows"):
        train.bench_batch_sizes(*arguments, compiled, harness.agree)


@pytest.mark.parametrize("what", ["classes, K", "training rows, N", "sampling steps, S"])
def test_each_point_of_a_growth_is_checked(
    repository: Path, harness: Any, contest: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    train = load(repository / "benchmarks" / "bench_train.py")
    sizes = [16, 32] if what == "sampling steps, S" else [32, 64]
    given = [8 * size for size in sizes] if what == "training rows, N" else sizes
    monkeypatch.setitem(train.GROWTH, what, (train.GROWTH[what][0], {"cpu": given}))
    arguments = (contest, torch.device("cpu"), True, harness.measure_growth, harness.agree, what)
    train.bench_growth(*arguments)
    (found,) = contest.growth.values()
    assert found["sizes"] == sizes
    losses, align = train.SeDA.losses, train.SeDA.align

    def wrong_losses(*given: Any, **options: Any) -> Any:
        found = losses(*given, **options)
        return found._replace(total=1.02 * found.total)

    def wrong_align(self: Any, visual: torch.Tensor, **options: Any) -> Any:
        s, t = align(self, visual, **options)
        return s, t if visual.dtype == torch.float64 else 1.02 * t

    monkeypatch.setattr(train.SeDA, "losses", wrong_losses)
    monkeypatch.setattr(train.SeDA, "align", wrong_align)
    with pytest.raises(AssertionError):
        train.bench_growth(*arguments)


def test_whoever_comes_first_after_another_size_does_not_pay_for_that(harness: Any, contest: Any) -> None:
    sizes, last = (1, 2), [0]

    def call(size: int) -> Callable[[], None]:
        def run() -> None:
            time.sleep(0.04 if last[0] != size else 0.004)
            last[0] = size

        return run

    contest.repeats = 5
    points, others = ({size: call(size) for size in sizes} for _ in range(2))
    harness.measure_growth(contest, "naps", points, unchecked, {"other": others})
    assert all(0.5 < ratio < 2 for ratio in contest.growth["naps"]["ratios"]["other"]), contest.growth


def test_the_report_names_the_machine_and_the_commit(
    harness: Any, contest: Any, repository: Path, tmp_path: Path
) -> None:
    calls: list[str] = []
    contest(harness.Workload("sums", "q_sample", 1e6), {"seda_fast": spin(calls, "a", 1000)}, lambda name, result: None)
    report = json.loads(json.dumps(harness.as_json(contest, repository)))
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert report["device"]
    assert report["commit"]
    assert report["rows"][0]["workload"] == "sums"
    assert report["copy_bytes_per_second"] is None
    table = harness.as_table(contest.rows)
    assert "sums" in table
    assert "of copy" in table
    assert harness.draw(contest.rows, "title", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_competitor_that_cannot_run_is_left_out_and_named(contest: Any, harness: Any) -> None:
    def fails() -> int:
        raise RuntimeError("no kernel image\nand more")

    work, ours = harness.Workload("sums", "q_sample", moved=1.0), spin([], "a", 1000)
    contest(work, {"seda_fast": ours, "peer": fails}, lambda name, result: None)
    assert [row.competitor for row in contest.rows] == ["seda_fast"]
    assert contest.left_out == {"sums: peer": "RuntimeError: no kernel image"}
    with pytest.raises(RuntimeError, match="no kernel image"):
        contest(work, {"seda_fast": ours, "seda_fast on cuda": fails}, lambda name, result: None)


def two_products(dtype: torch.dtype) -> list[torch.Tensor]:
    """A value and the gradients of its operands, of the same rounded numbers in any dtype."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(shape, generator=generator) for shape in ((64, 96), (128, 96), (96, 128), (64, 96))]
    x, first, second, weight = (t.bfloat16().to(dtype).requires_grad_() for t in drawn)
    value = torch.nn.functional.silu(x @ first.T / 10) @ second.T / 10
    return [value.detach(), *torch.autograd.grad(value, (x, first, second), weight.detach())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_can_fail_in_every_dtype(harness: Any, dtype: torch.dtype) -> None:
    for exact, eager in zip(two_products(torch.float64), two_products(dtype), strict=True):
        harness.agree(exact.to(dtype), exact, eager, "seda_fast")
        harness.agree(eager, exact, eager, "eager")
        wrong_row = eager.clone()
        wrong_row[7] = wrong_row[6]
        for name, wrong in {
            "nothing": torch.zeros_like(eager),
            "not finite": torch.full_like(eager, torch.nan),
            "another sign": -eager,
            "2 % too large": 1.02 * eager,
            "2 % too small": 0.98 * eager,
            "a wrong row": wrong_row,
        }.items():
            for competitor in ("seda_fast", "compiled"):
                for times in (2.0, 8.0):
                    with pytest.raises(AssertionError, match=f"{competitor}, {name}"):
                        harness.agree(wrong, exact, eager, f"{competitor}, {name}", times=times)
    with pytest.raises(AssertionError, match="of eager"):
        harness.agree(exact.to(dtype), exact, torch.zeros_like(eager), "a wrong eager")


def test_another_s_order_of_sums_is_allowed_and_ours_is_not(harness: Any) -> None:
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    roundings = torch.finfo(torch.float32).eps * torch.tensor([1.0, -1.0]).double().repeat(50)
    eager, looser = ((exact + n * roundings).float() for n in (10, 100))
    harness.agree(looser, exact, eager, "compiled")
    with pytest.raises(AssertionError, match="seda_fast, a sum"):
        harness.agree(looser, exact, eager, "seda_fast, a sum")
    # Of a vector alone: a matrix's sums are the products', which all take alike.
    with pytest.raises(AssertionError, match="compiled, a matrix"):
        harness.agree(looser[:, None], exact[:, None], eager[:, None], "compiled, a matrix")


def test_a_failure_costs_only_its_own_benchmark(repository: Path, tmp_path: Path) -> None:
    folder, results = tmp_path / "benchmarks", tmp_path / "results"
    folder.mkdir()
    (folder / "conftest.py").write_text((repository / "benchmarks" / "conftest.py").read_text())
    (folder / "bench_two.py").write_text(
        "def compete(contest, workload, name, right):\n"
        "    def check(competitor, result):\n"
        "        assert result == 1, competitor\n"
        "    contest(workload(name, '', moved=1e6), {'seda_fast': lambda: right, 'eager': lambda: 1}, check)\n"
        "def bench_wrong(contest, workload):\n"
        "    compete(contest, workload, 'wrong', 2)\n"
        "def bench_right(contest, workload):\n"
        "    compete(contest, workload, 'right', 1)\n"
    )
    options = ["--benchmark-only", "--results", str(results), "-o", "python_files=bench_*.py", "-o"]
    # A worker of pytest-xdist says so in its environment, where pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(folder), *options, "python_functions=bench_*", "--rootdir", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout
    (file,) = results.glob("*.json")
    record = json.loads(file.read_text())
    assert {row["workload"] for row in record["rows"]} == {"right"}
    assert record["left_out"] == {"benchmarks/bench_two.py::bench_wrong": "failed"}


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no peer is installed."""
    for name in ("xformers", "xformers.ops", "liger_kernel", "liger_kernel.transformers", "diffusers"):
        monkeypatch.setitem(sys.modules, name, None)


def swiglu(wrong: float) -> type[torch.nn.Module]:
    """A stand-in for xformers' SwiGLU, ``wrong`` times its value."""

    class SwiGLU(torch.nn.Module):
        def __init__(self, into: int, hidden: int, out: int, bias: bool) -> None:
            super().__init__()
            self.w12, self.w3 = torch.nn.Linear(into, 2 * hidden, bias=bias), torch.nn.Linear(hidden, out, bias=bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.w12(x).chunk(2, dim=1)
            return wrong * self.w3(torch.nn.functional.silu(first) * second)

    return SwiGLU


@pytest.mark.parametrize("wrong", [1.0, 1.02])
def test_a_peer_s_result_is_checked(
    repository: Path, harness: Any, contest: Any, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    bench = load(repository / "benchmarks" / "bench_interaction.py")
    package, module = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    module.SwiGLU = swiglu(wrong)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    arguments = (contest, torch.device("cpu"), True, harness.Workload, lambda *unused: {}, harness.agree, harness.built)
    if wrong == 1:
        bench.bench_interaction(*arguments)
        assert [row.competitor for row in contest.rows] == ["seda_fast", "eager", "xformers SwiGLU"]
    else:
        with pytest.raises(AssertionError, match="xformers SwiGLU"):
            bench.bench_interaction(*arguments)


def test_a_peer_that_does_not_load_is_named_with_the_reason(
    repository: Path, harness: Any, contest: Any, no_peers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absent, or built for another PyTorch: no row says so, the record does."""
    interaction, projection, chain = (
        load(repository / "benchmarks" / f"bench_{name}.py") for name in ("interaction", "projection", "reverse_chain")
    )
    fixtures: dict[str, Any] = {
        "contest": contest, "device": torch.device("cpu"), "quick": True, "workload": harness.Workload,
        "compile_variants": lambda *unused, **options: {}, "close": harness.agree, "peer": harness.built,
    }  # fmt: skip
    interaction.bench_interaction(**fixtures)
    projection.bench_projection(**fixtures, size=0)
    chain.bench_reverse_chain(**fixtures, challengers=lambda *unused: {}, place=0)
    assert {row.competitor for row in contest.rows} == {"seda_fast", "eager", "eager, gates once"}
    said = {place.partition(": ")[2]: reason for place, reason in contest.left_out.items()}
    assert set(said) == {"xformers SwiGLU", "liger-kernel, without centre loss", "eager, diffusers' DDIMScheduler"}
    assert all(reason.startswith("ModuleNotFoundError: ") for reason in said.values()), said
    # One that is there but needs what is not.
    package, module = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    projection.bench_projection(**fixtures, size=0)
    assert "RuntimeError: liger-kernel needs a GPU" in contest.left_out.values()
    assert json.loads(json.dumps(harness.as_json(contest, repository)))["left_out"] == contest.left_out


def test_a_later_run_keeps_what_an_earlier_one_measured_of_other_workloads(
    harness: Any, contest: Any, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "device.json"
    monkeypatch.setattr(harness, "commit", lambda root: "0123456789ab")
    for name in ("first", "second", "second"):
        contest.rows.clear()
        contest.growth = {name: {"slope": 1.0}}
        work = harness.Workload(name, "q_sample", moved=1.0)
        contest(work, {"seda_fast": spin([], "a", 1000)}, lambda name, result: None)
        found = harness.with_earlier(harness.as_json(contest, repository), file)
        file.write_text(json.dumps(found))
    assert [row["workload"] for row in found["rows"]] == ["first", "second"]
    assert list(found["growth"]) == ["first", "second"]
    for change in ({"commit": "another"}, {"device": "another"}, {"repeats": 1}):
        file.write_text(json.dumps({**found, **change}))
        assert len(harness.with_earlier(harness.as_json(contest, repository), file)["rows"]) == 1
    left = {"second: compiled": "OSError", "third: compiled": "OSError", "b.py::wrong": "failed", "b.py::new": "failed"}
    file.write_text(json.dumps({**found, "left_out": left}))
    contest.left_out = {"fourth: peer": "ImportError"}
    again = harness.with_earlier(harness.as_json(contest, repository), file, {"b.py::wrong"})["left_out"]
    assert again == {"third: compiled": "OSError", "b.py::new": "failed", "fourth: peer": "ImportError"}
    file.write_text("{")
    assert len(harness.with_earlier(harness.as_json(contest, repository), file)["rows"]) == 1
    file.write_text(json.dumps({**found, "commit": "unknown"}))
    monkeypatch.setattr(harness, "commit", lambda root: "unknown")
    assert len(harness.with_earlier(harness.as_json(contest, repository), file)["rows"]) == 1, "of whatever code"


def test_a_record_of_changed_files_says_so(harness: Any, tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    records = tmp_path / "benchmarks" / "results"
    records.mkdir(parents=True)
    for file in (tmp_path / "code.py", records / "device.json"):
        file.write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "all")
    clean = harness.commit(tmp_path)
    assert len(clean) == 12
    (records / "device.json").write_text("2")
    assert harness.commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("2")
    one = harness.commit(tmp_path)
    assert one.startswith(f"{clean}-dirty-")
    (tmp_path / "code.py").write_text("3")
    assert harness.commit(tmp_path).startswith(f"{clean}-dirty-") and harness.commit(tmp_path) != one
    assert harness.commit(tmp_path / "nowhere") == "unknown"


def test_a_step_s_products_are_counted(repository: Path) -> None:
    train = load(repository / "benchmarks" / "bench_train.py")
    config = train.SeDAConfig(**{**train.SIZES, **train.SMALL})
    model = train.SeDA(config)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "modulation" not in name)
    # No weight costs more than 2 FLOPs forward and 4 backward; the tables' are of no row.
    assert 3 * weights < train.flops_a_row(model) < 6 * weights


def test_a_chain_s_least_products_are_those_of_the_folded_one(repository: Path) -> None:
    chain = load(repository / "benchmarks" / "bench_reverse_chain.py")
    assert chain.products(1, folded=True) == chain.products(1, folded=False)
    assert chain.products(1024, folded=True) < 0.92 * chain.products(1024, folded=False)


@pytest.mark.slow(seconds=420)
def test_a_quick_run_prints_one_table_and_writes_nothing(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--quick", "--results", str(tmp_path)]
    # Not as a worker of pytest-xdist, in which pytest-benchmark measures nothing.
    not_told = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID")
    environment = {name: value for name, value in os.environ.items() if name not in not_told}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    operations = ("noising forward", "noising backward", "interaction", "projection", "reverse chain")
    for workload in (*operations, "training step", "a training step over classes, K"):
        assert workload in done.stdout
    assert done.stdout.count("share of ceiling") == 1
    assert list(tmp_path.iterdir()) == []
