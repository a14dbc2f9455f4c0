"""The table of measured speed says what the records say, and nothing else."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def maker(repository: Path) -> Any:
    """``benchmarks/make_results.py`` as a module."""
    spec = importlib.util.spec_from_file_location("make_results", repository / "benchmarks" / "make_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_results"] = module
    spec.loader.exec_module(module)
    return module


def record(gpu: bool) -> dict[str, Any]:
    def row(competitor: str, ratio: float) -> dict[str, Any]:
        times = {"median": 700e-6 * ratio, "floor": 370e-6} if gpu else {"median": None, "floor": None}
        return {
            "workload": "training step, B = 4096", "competitor": competitor, "backend": "", "ratio": ratio,
            "spread": 0.02, "share_of_ceiling": 0.53 / ratio, "bound": "matrix", "extra": {}, **times,
        }  # fmt: skip

    start = {"first_step_over_later": 12.34, "import_over_torch": 0.3, "peak_memory_bytes": 4e8}
    return {
        "device": "A GPU" if gpu else "A CPU", "commit": "abc",
        "versions": {"torch": "2.13.0", "xformers": "not installed"},
        "repeats": 30, "copy_bytes_per_second": 4e12 if gpu else None, "matrix_flops_per_second": None,
        "rows": [row("seda_fast", 1.0), row("eager", 3.21)],
        "growth": {"training step over rows": {"sizes": [1, 10], "times": [1.0, 9.0], "slope": 0.95}},
        "starts": {"eager, caches cold": start},
        "runs": {"a whole run": {name: {"ratio": ratio, "spread": 0.03, "peak_memory_ratio": 1.1}
                                 for name, ratio in (("seda_fast", 1.0), ("eager", 1.41))}},
    }  # fmt: skip


def test_both_ceilings_are_told_with_what_was_counted(maker: Any, tmp_path: Path) -> None:
    made = record(gpu=False)
    (tmp_path / "cpu.json").write_text(json.dumps(made))
    assert "| 53% of matrix | eager |" in maker.results(tmp_path)  # a record of before has no more
    for row in made["rows"]:
        row |= {"moved": 2.5e7, "flops": 3.21e10, "other_share": 0.12}
    (tmp_path / "cpu.json").write_text(json.dumps(made))
    assert "| 53% of matrix, 12% of copy (25 MB, 32.1 GFLOP) | eager |" in maker.results(tmp_path)
    for row in made["rows"]:
        row |= {"bound": "copy", "flops": 0.0, "other_share": 0.0}
    (tmp_path / "cpu.json").write_text(json.dumps(made))
    assert "| 53% of copy (25 MB) | eager |" in maker.results(tmp_path)


def test_nothing_recorded_is_said(maker: Any, tmp_path: Path) -> None:
    text = maker.results(tmp_path)
    assert text.count("not measured") == 2 * len(maker.TARGETS)
    assert "## CPU\n\nNot measured." in text


def test_who_could_not_run_is_named_once_with_the_reason(maker: Any, tmp_path: Path) -> None:
    left_out = {
        "projection, K = 100: liger-kernel": "RuntimeError: liger-kernel needs a GPU",
        "projection, K = 1000: liger-kernel": "RuntimeError: liger-kernel needs a GPU",
        "reverse chain: diffusers": "ModuleNotFoundError: No module named 'diffusers'",
    }
    (tmp_path / "cpu.json").write_text(json.dumps({**record(gpu=False), "left_out": left_out}))
    assert (
        "\nNot compared: liger-kernel (RuntimeError: liger-kernel needs a GPU); "
        "diffusers (ModuleNotFoundError: No module named 'diffusers').\n"
    ) in maker.results(tmp_path)
    (tmp_path / "cpu.json").write_text(json.dumps(record(gpu=False)))
    assert "Not compared" not in maker.results(tmp_path)


def test_a_cpu_gives_ratios_and_leaves_the_gpu_unmeasured(maker: Any, tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text(json.dumps(record(gpu=False)))
    text = maker.results(tmp_path)
    assert "| training step, B = 4096 | - | - | - | 53% of matrix | eager | 1.30 | 3.21 | 2% | 6.06 |" in text
    to_reach = "370.0 us | 750.0 us | not measured | 3.00 x eager, 1.40 x compiled, reduce-overhead | not measured |"
    assert f"| training step | {to_reach}" in text
    assert "| training step over rows | 1, 10 | 0.95 | 0.95 |" in text
    assert "| a whole run | eager | 1.30 | 1.41 | 3% | 1.10 |" in text
    assert "| eager, caches cold | 12.3 | 0.30 | 400 MB |" in text
    assert "xformers" not in text


def test_what_is_counted_is_shown_and_nothing_else_claims_a_count(maker: Any, tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text(json.dumps(record(gpu=False)))
    old = maker.results(tmp_path)
    assert "Commit abc; torch 2.13.0.\n\n30 repeats of each:\n\n| workload |" in old
    assert "| training step over rows | 1, 10 | 0.95 | 0.95 | - | - |" in old
    assert "| a whole run | eager | 1.30 | 1.41 | 3% | 1.10 | - |" in old
    assert "| eager, caches cold | 12.3 | 0.30 | 400 MB | - | - |" in old
    new = record(gpu=False)
    (growth,) = new["growth"].values()
    growth |= {
        "counts": {"seda_fast": [20, 4], "eager": [20, 3]},
        "spreads": {"seda_fast": [0.02, 0.1], "eager": [0.03, 0.04]},
        "ratios": {"eager": [1.5, 2.5]},
    }
    new["starts"]["eager, caches cold"] |= {"count": 5, "spread": 0.07}
    for run in new["runs"]["a whole run"].values():
        run |= {"count": 3, "covers": "both sides do all of it"}
    (tmp_path / "cpu.json").write_text(json.dumps(new))
    text = maker.results(tmp_path)
    assert "| training step over rows | 1, 10 | 0.95 | 0.95 | 20, 4 | 2%, 10% |" in text
    assert "Time over ours, and in brackets its spread: training step over rows\n" in text
    assert "| eager | 1.50 (3%) | 2.50 (4%) |\n| repeats, at least | 20 | 3 |" in text
    assert "| a whole run | eager | 1.30 | 1.41 | 3% | 1.10 | 3 |" in text
    assert "| eager, caches cold | 12.3 | 0.30 | 400 MB | 5 | 7% |" in text
    assert "\nA whole run: both sides do all of it. " in text


def test_a_run_that_does_not_say_what_it_covers_is_of_the_training_alone(maker: Any, repository: Path) -> None:
    assert "without what is fitted before and predicted after" in maker.runs_of(record(gpu=False))[-1]
    published = json.loads((repository / "benchmarks/results/amd-epyc-2-threads.json").read_text(encoding="utf-8"))
    alone = not any("covers" in run for found in published["runs"].values() for run in found.values())
    readme = (repository / "README.md").read_text(encoding="utf-8")
    assert ("The run is without the classifiers that are fitted before it" in readme) == alone


def test_a_gpu_gives_times(maker: Any, tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(record(gpu=True)))
    text = maker.results(tmp_path)
    line = "| training step, B = 4096 | 370.0 us | 750.0 us | 700.0 us | 53% of matrix | eager | 3.00 | 3.21 | 2% |"
    assert line in text
    assert "## GPU" not in text


def test_each_target_is_found_by_its_workload(maker: Any) -> None:
    for name, shown in (
        ("interaction forward + backward, B = 1024 float32", "interaction block, forward and backward"),
        ("projection forward + backward, B = 1024, K = 1000 float32", "projection, forward and backward"),
        ("training step, B = 1024", "training step"),
        ("noising forward, 1024 x 768 float32", "noising"),
        ("reverse chain of 5 steps, B = 1 float32", "reverse chain of one row"),
        ("reverse chain of 5 steps, B = 1024 float32", "reverse chain of many rows"),
    ):
        assert maker.target_of(name).shown == shown
    assert maker.target_of("noising backward, 1024 x 768 float32") is None


def test_targets_that_a_record_says_nothing_of_are_named(maker: Any) -> None:
    (line,) = (line for line in maker.unmeasured(record(gpu=True)) if line)
    assert "training step against compiled, reduce-overhead" in line
    assert "training step against eager" not in line
    assert all(target.shown in line for target in maker.TARGETS)
    (line,) = (line for line in maker.unmeasured(record(gpu=False)) if line)
    assert "training step against compiled" in line


def test_parts_that_a_record_lacks_are_named(maker: Any) -> None:
    bare = {**record(gpu=True), "growth": {}, "runs": {}, "starts": {}}
    assert "Not measured here: how time grows; whole runs; starts, imports and their memory." in maker.section(bare)
    start = {"first_step_over_later": 2.0, "import_over_torch": 0.2, "peak_memory_bytes": 1e8}
    assert "Not measured here: how time grows; whole runs." in maker.section({**bare, "starts": {"eager": start}})


def test_the_file_is_what_the_records_give(repository: Path) -> None:
    command = [sys.executable, str(repository / "benchmarks" / "make_results.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
