"""Deliberate small faults, put into the Triton kernels one at a time: the operations' tests must catch each.

A fault is a text in a kernel's file and what replaces it. The tests run on a copy of the checkout in a process of their
own; a fault that crashes them is caught as well.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton")


class Fault(NamedTuple):
    """``before`` occurs ``times`` times in ``kernels/<kernel>.py``; all become ``after``.

    ``seen_by`` names the tests that are asked where all would take long to come to them; all where it is empty.
    """

    name: str
    kernel: str
    before: str
    after: str
    times: int = 1
    seen_by: str = ""


FAULTS = [
    Fault("wrong stride of x0", "noising", "row[:, None] * x0_row_stride", "row[:, None] * features"),
    Fault(
        "32-bit offset",
        "noising",
        "row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS",
        "row = tl.program_id(0) * BLOCK_ROWS",
        times=2,
    ),
    Fault(
        "a row stride beyond 32 bits in units",
        "noising",
        " and stride < 2**31 else 1",
        " else 1",
        seen_by="2_to_the_31",
    ),
    Fault("gradient without its factor", "noising", "scaled = signal[:, None] * tl", "scaled = tl"),
    Fault("mask too narrow", "noising", "mask=inside)", "mask=(row < rows)[:, None] & (feature < 1)[None, :])", 2),
    Fault("first features only", "philox", "quads = first_feature // 4 + 2 *", "quads = 0 * first_feature + 2 *"),
    Fault("first row left out", "timesteps", "(first_row + row) << 25", "row << 25"),
    Fault("product in 32 bits", "timesteps", "tl.cast(batch, tl.int64) << 25", "batch << 25"),
    Fault(
        "swapped Box-Muller pair",
        "philox",
        "return radius * cosine, radius * sine",
        "return radius * sine, radius * cosine",
    ),
    Fault("uniforms without their half", "philox", "08) - 2.98023223876953125e-08", "08)"),
    Fault("the logarithm next to 1 too", "philox", "f < 0.015625", "f < 0.0"),
    Fault("the series too far from 1", "philox", "f < 0.015625", "f < 0.25"),
    Fault("stream left out", "philox", "((sample_ids >> 32) << 8) | stream", "(sample_ids >> 32) << 8"),
    Fault("high half of the sample id left out", "philox", "((sample_ids >> 32) << 8) | stream", "stream"),
    Fault("high half of the seed left out", "philox", "(seed >> 32).to", "(seed * 0).to"),
    Fault(
        "words of dropout in the wrong order",
        "philox",
        "features_of_quads(word0 >> 8, word1 >> 8,",
        "features_of_quads(word1 >> 8, word0 >> 8,",
    ),
    Fault(
        "dropout without rescaling",
        "interaction",
        "kept.to(tl.float32) * tl.cast(kept_scale, tl.float32)",
        "kept.to(tl.float32)",
    ),
    Fault("forgotten 1 + alpha", "interaction", "+ (1.0 + alpha) * residual", "+ alpha * residual"),
    Fault(
        "forgotten 1 + scale",
        "interaction",
        "rstd[:, None] * (1.0 + scale) + shift",
        "rstd[:, None] * scale + shift",
        2,
    ),
    Fault("forgotten 1 + alpha backward", "interaction", "(1.0 + alpha) * grad", "alpha * grad"),
    Fault(
        "variance of more than the features",
        "interaction",
        "away = tl.where(here[None, :], tile - mean[:, None], 0.0)",
        "away = tile - mean[:, None]",
    ),
    Fault(
        "first product without bias",
        "interaction",
        "torch.addmm(bias.to(x.dtype)",
        "torch.addmm(0 * bias.to(x.dtype)",
    ),
    Fault("what rounding leaves of a mean", "interaction", "return mean + off,", "return mean,", seen_by="large_value"),
    Fault("half of silu's derivative", "interaction", "grad *= 1.0 + pre * (1.0 - sigmoid)", "grad *= 1.0"),
    Fault("norm's projection left out", "interaction", " - normed * mean_product[:, None]", ""),
    Fault(
        "segments one row too long",
        "interaction",
        "tl.store(bounds_ptr + entry, row",
        "tl.store(bounds_ptr + entry, row + 1",
    ),
    Fault(
        "bounds trusted though unsorted",
        "interaction",
        "unsorted = falls != 0",
        "unsorted = falls < 0",
    ),
    Fault("order of timesteps trusted", "interaction", "== step\n", ">= -1\n"),
    Fault("gradient of b_h from the last rows", "interaction", "total += grad\n", "total = grad\n"),
    Fault("last sums of a bias alone", "interaction", "total += load_tile(parts_ptr", "total = load_tile(parts_ptr"),
    Fault(
        "gradient of b_o without 1 + alpha",
        "interaction",
        "(1.0 + alpha.to(tl.float32)) * grad_sum",
        "grad_sum",
    ),
    Fault(
        "dropout of the first tile for all",
        "interaction",
        "philox.kept(seed_ptr, step_ptr, ids[:, None], first,",
        "philox.kept(seed_ptr, step_ptr, ids[:, None], 0 * first,",
    ),
    Fault("a fall between programs unseen", "interaction", "mask=(row > 0) & (row <= rows)", "mask=row % BLOCK > 0"),
    Fault("one program's fall kept", "interaction", "falls_ptr + tl.program_id(0), fall", "falls_ptr, fall"),
    Fault("the first 128 programs' falls alone", "interaction", "range(0, blocks, BLOCK)", "range(0, 1, BLOCK)"),
    Fault(
        "losses of the last rows alone", "projection", "squares += tl.load(", "squares = tl.load(", seen_by="many_sums"
    ),
    Fault(
        "entropies of the last rows alone",
        "projection",
        "entropy += tl.load(",
        "entropy = tl.load(",
        seen_by="many_sums",
    ),
    Fault(
        "numbers of the last rows alone",
        "projection",
        "labelled += tl.load(",
        "labelled = tl.load(",
        seen_by="many_sums",
    ),
    Fault("last labels alone counted", "projection", "labelled += (label", "labelled = (label"),
    Fault(
        "distance in the last features alone",
        "projection",
        "squares += away * away",
        "squares = away * away",
    ),
    Fault(
        "centre loss without its mean",
        "projection",
        "/ (count * dim))\n    tl.store(entropy",
        "/ count)\n    tl.store(entropy",
    ),
    Fault("true logit of the last features alone", "projection", "products += _factor", "products = _factor"),
    Fault(
        "true logit in float32 beside TF32",
        "projection",
        "_factor(f, PRECISION).to(tl.float32) * _factor(w.to(f.dtype), PRECISION).to",
        "f.to(tl.float32) * w.to",
        seen_by="tf32",
    ),
    Fault(
        "true logit of products in half precision",
        "projection",
        "_factor(f, PRECISION).to(tl.float32) * _factor(w.to(f.dtype), PRECISION).to(tl.float32)",
        "_factor(f, PRECISION) * _factor(w.to(f.dtype), PRECISION)",
        seen_by="losses_of_half",
    ),
    Fault(
        "tensor cores left to round",
        "projection",
        "f, w = _factor(f, PRECISION), _factor(w.to(f.dtype), PRECISION)",
        "w = w.to(f.dtype)",
        seen_by="tf32",
    ),
    Fault(
        "a NaN rounded to a number",
        "projection",
        'tl.where(tile == tile, rounded, float("nan"))',
        "rounded",
        seen_by="tf32",
    ),
    Fault("true logit without its bias", "projection", "axis=1) + bias) * tl", "axis=1)) * tl"),
    Fault(
        "centres pull the wrong way",
        "projection",
        "return (f.to(tl.float32) - c.to(tl.float32))",
        "return (c.to(tl.float32) - f.to(tl.float32))",
    ),
    Fault("gradients of the first features", "projection", "feature = tl.program_id(1) * BLOCK_N +", "feature =", 2),
    Fault("centre gradient of the last rows", "projection", "pull += tl.where(", "pull = tl.where("),
    Fault("centre gradient without its factor", "projection", "axis=0) * tl.load(factors_ptr)", "axis=0)"),
    Fault(
        "32-bit offsets of passes",
        "interaction",
        "tl.program_id(0).to(tl.int64) * BLOCK_M",
        "tl.program_id(0) * BLOCK_M",
        4,
        seen_by="passes_reach",
    ),
    Fault(
        "gradient of a row outside the tables not written",
        "interaction",
        "tl.where(tau == steps, rows, 0)",
        "tl.where(tau < 0, rows, 0)",
        seen_by="outside_the_tables",
    ),
    Fault(
        "a label that is no class has a gradient",
        "projection",
        'tl.where(known, normaliser, float("nan"))',
        "normaliser",
        seen_by="no_class",
    ),
    Fault("running sum not rescaled", "projection", "exponentials * tl.exp(largest - base)", "exponentials"),
    Fault(
        "classes beyond the last one counted",
        "projection",
        'mask=column < classes, other=float("-inf"))',
        "mask=column < classes, other=0.0)",
    ),
    Fault("chunks not added up", "projection", "if not FIRST:", "if FIRST and WHOLE:", seen_by="chunks"),
    Fault("only the last rows' classes", "projection", '"ADD": part.number > 0', '"ADD": False', seen_by="chunks"),
    Fault(
        "one part's sums of the bias",
        "projection",
        "sums.bias[part.number * sums.blocks :]",
        "sums.bias",
        seen_by="chunks",
    ),
    Fault("only the last rows' bias", "projection", "bias_sums += tl.load(", "bias_sums = tl.load(", seen_by="chunks"),
    Fault("the left half of a tile twice", "projection", "feature + BLOCK_N // 2,", "feature,", 2),
    Fault("smoothing left out of the gradient", "projection", "smoothing / classes, 0.0)[None", "0.0, 0.0)[None"),
    Fault(
        "ignored rows counted",
        "projection",
        "(label != ignore_index).to(tl.float32)",
        "(label == label).to(tl.float32)",
        2,
    ),
    Fault(
        "a block's state without 1 + alpha", "interaction_network", "*= 1.0 + table_rows(alpha", "*= table_rows(alpha"
    ),
    Fault("norms without 1 + scale", "interaction_network", "*= 1.0 + table_rows(scale", "*= table_rows(scale"),
    Fault("the block's own tables for the next norm", "interaction_network", "tables.of(i + 1) if", "tables.of(i) if"),
    Fault("gates without their 1", "interaction_network", "gate += 1.0 + load", "gate += load", 2),
    Fault(
        "the first block's stream for all", "interaction_network", "sample_ids, stream + i)", "sample_ids, stream)", 2
    ),
    Fault("the last block's alpha left out", "interaction_network", "(1.0 + alpha) * grad.to", "grad.to"),
    Fault("the lower block's alpha left out", "interaction_network", "scaled = lower * stored", "scaled = stored"),
    Fault(
        "alpha's gradient without the bias",
        "interaction_network",
        "alpha_sum += load_vector(bias_ptr",
        "load_vector(bias_ptr",
    ),
    Fault("gradient of b_x from the last rows", "interaction_network", "own_sum += ", "own_sum = "),
    Fault(
        "the condition's gradient by its gates alone",
        "interaction_network",
        "grad += load_tile(added_ptr",
        "load_tile(added_ptr",
    ),
    Fault("gradient of b_c from the last rows", "interaction_network", "total += grad\n", "total = grad\n", 2),
    Fault(
        "gradient of b_y from the last rows",
        "interaction_network",
        "total += load_tile(x_ptr",
        "total = load_tile(x_ptr",
    ),
    Fault("a result of the last step alone", "reverse_chain", "if not FIRST:", "if FIRST and LAST:"),
    Fault(
        "noise of the step before",
        "reverse_chain",
        "torch.arange(1, len(coefficients) + 1",
        "torch.arange(len(coefficients)",
    ),
    Fault(
        "noise of the first features", "reverse_chain", "ids[:, None], first, stream", "ids[:, None], 0 * first, stream"
    ),
    Fault(
        "the source's coefficient for the state",
        "reverse_chain",
        "coefficients_ptr + _STATE",
        "coefficients_ptr + _SOURCE",
    ),
    Fault(
        "32-bit offsets of a network's passes",
        "interaction_network",
        "tl.program_id(0).to(tl.int64) * BLOCK_M",
        "tl.program_id(0) * BLOCK_M",
        times=4,
        seen_by="passes_reach",
    ),
    Fault(
        "32-bit offsets of a network's sums",
        "interaction_network",
        "tl.program_id(0).to(tl.int64) * ROWS + start",
        "tl.program_id(0) * ROWS + start",
        times=3,
        seen_by="2_to_the_31",
    ),
    Fault(
        "rows of the gradient taken as dense",
        "interaction_network",
        "column, columns, stride)",
        "column, columns, columns)",
        seen_by="strided",
    ),
    Fault(
        "a modulation taken as dense",
        "interaction_network",
        "self.whole.stride(0)",
        "self.whole[0].numel()",
        seen_by="strided",
    ),
    Fault(
        "32-bit offsets of the sampler",
        "reverse_chain",
        "tl.program_id(0).to(tl.int64)",
        "tl.program_id(0)",
        seen_by="2_to_the_31",
    ),
    Fault(
        "rows of the chain's state taken as dense",
        "reverse_chain",
        "x_ptr, row, rows, column, features, x_stride",
        "x_ptr, row, rows, column, features, features",
        seen_by="layout",
    ),
    Fault(
        "rows of the chain's source taken as dense",
        "reverse_chain",
        "column, features, source_stride",
        "column, features, features",
        seen_by="layout",
    ),
    Fault("temperature left out of the gradient", "projection", "/ count * tl.cast(inverse, tl.float32)", "/ count"),
]
# Which tests see a kernel's faults.
TESTS = {
    "timesteps": ["test_timesteps.py"],
    "noising": ["test_noising.py"],
    "philox": ["test_philox.py", "test_noising.py", "test_interaction.py"],
    "interaction": ["test_interaction.py"],
    "interaction_network": ["test_interaction_network.py"],
    "reverse_chain": ["test_reverse_chain.py"],
    "projection": ["test_projection.py"],
}


def copy_of(repository: Path, folder: Path) -> Path:
    """What the operations' tests need, as a checkout of its own."""
    for name in ("seda_fast", "kernels"):
        shutil.copytree(repository / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copytree(repository / "tests" / "ops", folder / "tests" / "ops")
    for name in ("pyproject.toml", "setup.py", "tests/conftest.py"):
        shutil.copy(repository / name, folder / name)
    return folder


def suite(checkout: Path, kernel: str, seen_by: str = "") -> subprocess.CompletedProcess[str]:
    """The tests of one kernel in Triton's interpreter, up to the first failure."""
    files = [f"tests/ops/{name}" for name in TESTS[kernel]]
    which = "(triton-cpu or philox) and not compiles and not opcheck and not thirty"
    only = ["-k", f"{which} and ({seen_by})" if seen_by else which]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files, *only]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(checkout)}
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def kernel_text(checkout: Path, fault: Fault) -> str:
    """The source that a fault goes into; it fails where the fault does not fit it any more."""
    text = (checkout / "kernels" / f"{fault.kernel}.py").read_text(encoding="utf-8")
    assert text.count(fault.before) == fault.times, "the kernel has changed: this fault must be written anew"
    return text


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_the_kernel(repository: Path, fault: Fault) -> None:
    """Quick, so that whoever changes a kernel learns it at once: the slow tests below take their turns."""
    assert kernel_text(repository, fault)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", TESTS)
def test_the_suite_passes_without_a_fault(repository: Path, tmp_path: Path, kernel: str) -> None:
    done = suite(copy_of(repository, tmp_path), kernel)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught(repository: Path, tmp_path: Path, fault: Fault) -> None:
    checkout = copy_of(repository, tmp_path)
    text = kernel_text(checkout, fault).replace(fault.before, fault.after)
    (checkout / "kernels" / f"{fault.kernel}.py").write_text(text, encoding="utf-8")
    done = suite(checkout, fault.kernel, fault.seen_by)
    # 1: a test failed; below 0: a signal ended the process. Anything else is a broken set-up.
    assert done.returncode == 1 or done.returncode < 0, done.stdout + done.stderr
