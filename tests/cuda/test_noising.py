"""The CUDA noising kernel's own text on the host, thread by thread, against the reference."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from seda_fast import reference

HERE = Path(__file__).resolve().parent
STEPS = 10
# Rows end inside a vector; begin at odd places; have gaps; are more than the grid has threads, which go round then.
SHAPES = [(5, 12, 0), (3, 7, 0), (33, 20, 12), (2, 18, 1), (1500, 3000, 0)]


class Launch(ctypes.Structure):
    """noising.h's."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("x0", "x", "timesteps", "seed", "step", "sample_ids", "signal", "noise")
        ),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "stride", "steps", "stream")),
        *((name, ctypes.c_bool) for name in ("bfloat16", "long_timesteps")),
    ]


class Given(NamedTuple):
    """Operands of one call: x0 may have gaps between its rows."""

    x0: Tensor
    timesteps: Tensor
    signal: Tensor
    noise: Tensor
    seed: Tensor
    step: Tensor
    sample_ids: Tensor


@pytest.fixture(scope="module")
def noising(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel and its launch compiled for the host, with a function in place of the launch's angle brackets."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("tests/cuda/test_noising.py needs g++")
    folder = tmp_path_factory.mktemp("noising")
    text = (repository / "csrc/cuda/noising.cu").read_text()
    text, launches = re.subn(
        r"(noising_kernel<\w+, \w+>)<<<(\w+), (\w+), 0, stream>>>\(a\)", r"run_threads(\2, \3, [&] { \1(a); })", text
    )
    assert launches == 2
    text += '\nextern "C" const char* start(const seda::NoisingLaunch* a) { return launch_noising(*a, 0, nullptr); }\n'
    (folder / "noising.cpp").write_text(text)
    library = folder / "noising.so"
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    folders = [f"-I{HERE / 'host'}", f"-I{repository / 'csrc/cuda'}"]
    subprocess.run([compiler, *flags, *folders, str(folder / "noising.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.start.restype = ctypes.c_char_p
    return loaded


def draw(rows: int, columns: int, gap: int, dtype: torch.dtype, index: torch.dtype) -> Given:
    return Given(
        torch.randn(rows, columns + gap).to(dtype)[:, :columns],
        torch.randint(0, STEPS, (rows,)).to(index),
        torch.rand(STEPS),
        torch.rand(STEPS),
        torch.tensor(-(2**40) + 7),
        torch.tensor(2**33 + 5),
        torch.arange(rows) + 2**36,
    )


def run(noising: ctypes.CDLL, given: Given, backward: bool = False) -> Tensor:
    x0 = given.x0
    x = torch.full(x0.shape, float("nan"), dtype=x0.dtype)
    keys = ("seed", "step", "sample_ids", "noise") if not backward else ()
    launch = Launch(
        x0=x0.data_ptr(),
        x=x.data_ptr(),
        timesteps=given.timesteps.data_ptr(),
        signal=given.signal.data_ptr(),
        rows=x0.shape[0],
        columns=x0.shape[1],
        stride=x0.stride(0),
        steps=STEPS,
        stream=3,
        bfloat16=x0.dtype == torch.bfloat16,
        long_timesteps=given.timesteps.dtype == torch.int64,
        **{key: getattr(given, key).data_ptr() for key in keys},
    )
    assert noising.start(ctypes.byref(launch)) is None
    return x


@pytest.mark.parametrize(("rows", "columns", "gap"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_noise_is_the_contract_s(noising: ctypes.CDLL, rows: int, columns: int, gap: int, dtype: torch.dtype) -> None:
    given = draw(rows, columns, gap, dtype, torch.int64 if gap else torch.int32)
    keys = {"seed": given.seed, "step": given.step, "sample_ids": given.sample_ids, "stream": 3}
    exact = reference.q_sample(given.x0.double(), *given[1:4], **keys)
    got = run(noising, given)
    allowed = 5e-6 if dtype == torch.float32 else 2**-8 * exact.abs() + 5e-6
    assert ((got.double() - exact).abs() <= allowed).all()
    scaled = run(noising, given, backward=True)
    assert torch.equal(scaled, (given.signal[given.timesteps.long(), None] * given.x0.float()).to(dtype))


def test_a_timestep_outside_the_tables_makes_its_row_nan(noising: ctypes.CDLL) -> None:
    given = draw(4, 12, 0, torch.float32, torch.int64)
    given.timesteps[1], given.timesteps[2] = -1, STEPS
    got = run(noising, given)
    assert got.isnan().all(dim=1).tolist() == [False, True, True, False]
    assert torch.isfinite(got[::3]).all()
