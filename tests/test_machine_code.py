"""The Triton kernels' machine code for three GPU generations, compiled here without a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

PRODUCTS = {
    "normaliser_kernel",
    "logit_gradient_kernel",
    "feature_gradient_kernel",
    "class_gradient_kernel",
}
OTHERS = {
    "noising_kernel",
    "scaling_kernel",
    "timesteps_kernel",
    "modulated_norm_kernel",
    "gate_kernel",
    "residual_kernel",
    "operands_kernel",
    "gate_backward_kernel",
    "segments_kernel",
    "norm_backward_kernel",
    "bias_gradients_kernel",
    "norm_kernel",
    "state_kernel",
    "gates_kernel",
    "last_norm_backward_kernel",
    "gates_backward_kernel",
    "state_backward_kernel",
    "condition_backward_kernel",
    "row_sums_kernel",
    "sampler_kernel",
    "row_loss_kernel",
    "mean_kernel",
    "factors_kernel",
    "class_sums_kernel",
    "scale_and_pull_kernel",
    "centre_gradient_kernel",
}
# What every GPU of compute capability 8.0 and above gives one program, and what 9.0 does.
SHARED_MEMORY, LARGER_SHARED_MEMORY = 99 * 1024, 227 * 1024
INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


def read(repository: Path, folder: Path, *options: str) -> list[dict[str, Any]]:
    """Reports of ``benchmarks/machine_code.py``, in a process where Triton compiles rather than interprets."""
    out = folder / "reports.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/machine_code.py", "--json", str(out), *options]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reports: list[dict[str, Any]] = json.loads(out.read_text())
    return reports


def too_much(report: dict[str, Any]) -> bool:
    """Whether it spills or needs more shared memory than where it runs: by descriptors, on 9.0 alone."""
    room = LARGER_SHARED_MEMORY if report["descriptors"] else SHARED_MEMORY
    return bool(report["spilled_bytes"]) or report["shared_bytes"] > room


def describe(reports: list[dict[str, Any]]) -> str:
    keys = ("kernel", "dtype", "target", "tile", "registers", "spilled_bytes", "shared_bytes", "tensor_core")
    return "\n".join(" ".join(f"{key}={report[key]}" for key in keys) for report in reports)


@pytest.fixture(scope="module", params=["80", "90", "100"])
def reports(
    request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Each kernel as the default model launches it in bfloat16, for one target."""
    return read(repository, tmp_path_factory.mktemp("code"), "--targets", request.param, "--dtypes", "bfloat16")


def test_every_kernel_is_read(reports: list[dict[str, Any]]) -> None:
    assert {report["kernel"] for report in reports} == PRODUCTS | OTHERS


def test_products_run_on_tensor_cores(reports: list[dict[str, Any]]) -> None:
    wrong = [
        report
        for report in reports
        if report["kernel"] in PRODUCTS and INSTRUCTION[report["target"]] not in report["tensor_core"]
    ]
    assert not wrong, describe(wrong)


def assert_16_bytes(report: dict[str, Any]) -> None:
    # A program's tile, 16 bytes for each access of each thread.
    rows, features = map(int, report["tile"].split("x"))
    accesses = rows * features * {"bf16": 2, "fp32": 4}[report["dtype"]] // (16 * 32 * report["warps"])
    assert report["loads_16_bytes"] == accesses, describe([report])
    assert report["stores_16_bytes"] == accesses, describe([report])


def test_noising_reads_and_writes_16_bytes_at_a_time(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        if report["kernel"] in ("noising_kernel", "scaling_kernel"):
            assert_16_bytes(report)


def test_noising_alone_is_read_in_the_dtypes_that_it_knows(repository: Path, tmp_path: Path) -> None:
    found = read(repository, tmp_path, "--targets", "90", "--features", "300")
    assert {(report["kernel"], report["dtype"]) for report in found} == {
        (kernel, dtype) for kernel in ("noising_kernel", "scaling_kernel") for dtype in ("bf16", "fp32")
    }


@pytest.mark.parametrize(("dtype", "features"), [("bfloat16", 1000), ("float32", 300)])
def test_rows_of_whole_16_bytes_are_enough_for_that(
    repository: Path, tmp_path: Path, dtype: str, features: int
) -> None:
    """16 need not divide the features; Triton tells the compiler of nothing smaller."""
    found = read(repository, tmp_path, "--targets", "90", "--dtypes", dtype, "--features", str(features))
    assert {report["kernel"] for report in found} == {"noising_kernel", "scaling_kernel"}
    for report in found:
        assert_16_bytes(report)
        assert report["registers"] <= 56, describe([report])


def test_no_kernel_adds_up_atomically(reports: list[dict[str, Any]]) -> None:
    """The order of such sums, and with it a result's last bits, would change from run to run."""
    wrong = [report for report in reports if report["atomics"]]
    assert not wrong, describe(wrong)


def test_nothing_spills_and_all_fits(reports: list[dict[str, Any]]) -> None:
    wrong = [report for report in reports if too_much(report)]
    assert not wrong, describe(wrong)


def test_descriptors_are_read_where_compute_capability_9_has_them(reports: list[dict[str, Any]]) -> None:
    described = {report["kernel"] for report in reports if report["descriptors"]}
    products = {"normaliser_kernel", "logit_gradient_kernel", "feature_gradient_kernel", "class_gradient_kernel"}
    assert described == (products if reports[0]["target"] == "sm_90" else set())


def test_noising_needs_few_instructions(reports: list[dict[str, Any]]) -> None:
    """Box-Muller is what bounds noising; with 60 instructions an element it would be slower than eager's two passes."""
    (report,) = (report for report in reports if report["kernel"] == "noising_kernel")
    assert 20 < report["instructions_per_element"] < 60


@pytest.fixture(scope="module")
def tf32(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The float32 products as a run in TF32 launches them, with every tile that they may get."""
    return read(repository, tmp_path_factory.mktemp("tf32"), "--every-tile", "--dtypes", "tf32")


@pytest.mark.slow
def test_float32_products_run_on_tensor_cores_in_tf32_and_do_not_spill(tf32: list[dict[str, Any]]) -> None:
    products = [report for report in tf32 if report["dtype"] == "tf32"]
    # The last one multiplies what tensor cores do, without them.
    assert {report["kernel"] for report in products} == PRODUCTS | {"row_loss_kernel"}
    wrong = [r for r in products if too_much(r) or bool(r["tensor_core"]) != (r["kernel"] in PRODUCTS)]
    assert not wrong, describe(wrong)


def test_an_integer_1_is_a_constant_and_a_float_is_none(repository: Path) -> None:
    """As Triton specialises; what is compiled otherwise is not what runs."""
    code = """
import runpy
tool = runpy.run_path("benchmarks/machine_code.py")
made = [*tool["projection_launches"](tool["torch"].float32), *tool["noising_launches"](tool["torch"].float32)]
kinds = {launch.kernel.__name__: launch.signature for launch in made}
assert kinds["normaliser_kernel"]["inverse"] == "fp32", kinds
assert kinds["scaling_kernel"]["grad_feature_stride"] == "constexpr", kinds
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_recorded_table_is_of_these_kernels(repository: Path) -> None:
    """Written by ``python benchmarks/machine_code.py --table benchmarks/results/machine_code.md``."""
    code = "import runpy; print(runpy.run_path('benchmarks/machine_code.py')['heading']())"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    table = (repository / "benchmarks" / "results" / "machine_code.md").read_text(encoding="utf-8")
    (now,) = done.stdout.splitlines()
    # Another Triton makes other code of the same kernels.
    assert table.splitlines()[0].partition(", ")[2] == now.partition(", ")[2], "write the table anew"


@pytest.mark.slow(seconds=90)
def test_every_kernel_compiles_where_sizes_are_1(repository: Path, tmp_path: Path) -> None:
    """A size of 1 is a constant in a kernel, which only a compiler sees: the interpreter has numbers there."""
    found = read(repository, tmp_path, "--ones", "--targets", "90", "--dtypes", "bfloat16", "float32")
    assert {report["kernel"] for report in found} == PRODUCTS | OTHERS


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", [False, True])
def test_scalars_are_float32_also_where_they_come_as_doubles(repository: Path, tmp_path: Path, forgotten: bool) -> None:
    """`torch.compile` passes them so; a GPU multiplies doubles at a fraction of its rate. A forgotten cast is seen."""
    for part in ("benchmarks", "kernels", "seda_fast"):
        shutil.copytree(repository / part, tmp_path / part, ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copy(repository / "setup.py", tmp_path)  # by which a checkout is known
    options = ("--doubles", "--targets", "90", "--dtypes", "bfloat16")
    if forgotten:
        file, cast = tmp_path / "kernels" / "projection.py", "bias[None, :]) * tl.cast(inverse, tl.float32)"
        text = file.read_text()
        assert cast in text, "the kernel has changed: this fault must be written anew"
        file.write_text(text.replace(cast, "bias[None, :]) * inverse"))
        # What a loop carries would change from float32 to float64, which Triton refuses.
        with pytest.raises(AssertionError, match="fp64"):
            read(tmp_path, tmp_path, *options)
        return
    reports = read(tmp_path, tmp_path, *options)
    assert {report["kernel"] for report in reports} >= {"gate_kernel", "row_loss_kernel"}
    assert not any(report["double_precision"] for report in reports), describe(reports)


@pytest.mark.slow(seconds=420)
@pytest.mark.timeout(1200)
def test_every_tile_in_every_dtype_neither_spills_nor_overflows(repository: Path, tmp_path: Path) -> None:
    reports = read(repository, tmp_path, "--every-tile", "--dtypes", "bfloat16", "float16", "float32")
    assert len({report["tile"] for report in reports if report["kernel"] == "feature_gradient_kernel"}) >= 4
    wrong = [report for report in reports if too_much(report)]
    assert not wrong, describe(wrong)
