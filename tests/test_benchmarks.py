"""The benchmarks' harness: what is wrong is never timed, what is timed is reported as promised."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def harness(repository: Path) -> Any:
    """``benchmarks/conftest.py`` as a module."""
    name = "seda_fast_benchmark_harness"
    spec = importlib.util.spec_from_file_location(name, repository / "benchmarks" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def contest(harness: Any) -> Any:
    return harness.Contest(torch.device("cpu"), repeats=3)


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
    assert ours.median is None, "a CPU's times are not kept"


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


def test_a_later_run_keeps_what_an_earlier_one_measured_of_other_workloads(
    harness: Any, contest: Any, repository: Path, tmp_path: Path
) -> None:
    file = tmp_path / "device.json"
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
    file.write_text("{")
    assert len(harness.with_earlier(harness.as_json(contest, repository), file)["rows"]) == 1


@pytest.mark.slow
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
