"""What the tests of the operations share: lanes (a backend on a device), poisoned memory, the error bound.

A module names its registered op in ``OPERATION``; a test that takes ``lane`` then runs once for every backend
and device.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seda_fast.ops import _dispatch, use_backend

# Read by Triton when a kernel is defined: without a GPU its interpreter runs the kernels on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@dataclass(frozen=True)
class Lane:
    """One backend on one device."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    def dtypes(self) -> list[torch.dtype]:
        """Dtypes below float64 that this lane computes right: no float16 in C++ and CUDA C++, and no bfloat16 in
        Triton's interpreter, which gets it wrong."""
        if self.backend in ("cpp", "cuda"):
            return [torch.float32, torch.bfloat16]
        interpreted = self.backend == "triton" and self.device == "cpu"
        return [torch.float32, torch.float16] + ([] if interpreted else [torch.bfloat16])


LANES = [
    *(Lane(backend, "cpu") for backend in ("reference", "cpp", "triton")),
    *(Lane(backend, "cuda") for backend in ("reference", "triton", "cuda")),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give ``lane`` the lanes that the module's op has code for."""
    if "lane" in metafunc.fixturenames:
        known = _dispatch._implementations[metafunc.module.OPERATION]
        lanes = [lane for lane in LANES if lane.backend in known]
        gpu = pytest.mark.gpu
        metafunc.parametrize(
            "lane",
            [pytest.param(lane, id=str(lane), marks=[gpu] if lane.device == "cuda" else []) for lane in lanes],
            indirect=True,
        )


@pytest.fixture
def lane(request: pytest.FixtureRequest) -> Iterator[Lane]:
    """The backend forced for this test, and its device; skips where the backend is not at hand."""
    chosen: Lane = request.param
    with use_backend(chosen.backend):
        try:
            _dispatch.choose(request.module.OPERATION, chosen.device)
        except RuntimeError as reason:
            pytest.skip(f"{request.node.nodeid}: {reason}")
        yield chosen


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill memory that PyTorch hands out uninitialised with NaN, for Python and C++ alike."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class OnAGPU(Tensor):
    """A tensor that says so, and lies on the CPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


class Called(TorchDispatchMode):
    """Remembers the names of the operations that are called inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_a_gpu() -> Callable[[Tensor], Tensor]:
    """Makes a tensor say that it lies on a GPU, and with it what is computed of it."""
    return lambda tensor: tensor.as_subclass(OnAGPU)


@pytest.fixture
def called() -> Called:
    """A block whose operations' names it remembers."""
    return Called()


@pytest.fixture
def far_apart() -> Callable[..., Tensor]:
    """Makes of (3, D) values the same with rows 2**30 + 64 elements apart: the last row begins beyond 2**31.

    The row stride still fits 32 bits, its product with the row does not. With another ``gap``, of which two rows may be
    enough, the stride itself need not. Only address space is reserved (by NumPy, which does not poison it): no page
    between the rows is touched.
    """

    def spread(values: Tensor, gap: int = 2**30 + 64) -> Tensor:
        rows, columns = values.shape
        room = np.empty(((rows - 1) * gap + columns) * values.element_size(), dtype=np.uint8)
        memory = torch.from_numpy(room).view(values.dtype)
        view = memory.as_strided((rows, columns), (gap, 1))
        view.copy_(values)
        return view

    return spread


@pytest.fixture
def run_as_program(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes Triton's interpreter run a grid of one program as if it stood at the given place along the first axis."""

    def move(place: int) -> None:
        interpreter = pytest.importorskip("triton.runtime.interpreter")

        def set_grid_idx(builder: Any, x: int, y: int, z: int) -> None:
            builder.grid_idx = (x + place, y, z)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", set_grid_idx)

    return move


@pytest.fixture
def no_worse_than_eager() -> Callable[..., None]:
    """Asserts that a result errs no more than twice as much as eager PyTorch in the same dtype does, plus an
    epsilon.

    Called as ``(got, eager, exact, name="")`` with the exact result in float64. The epsilon is four units in
    the last place of the exact result's largest entry.
    """

    def check(got: Tensor, eager: Tensor, exact: Tensor, name: str = "") -> None:
        assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
        assert got.dtype == eager.dtype, f"{name}: {got.dtype}, not {eager.dtype}"
        if exact.numel() == 0:
            return
        assert torch.isfinite(got).all(), f"{name}: not finite"
        exact = exact.to(got.device)
        error = (got.double() - exact).abs().max().item()
        allowed = 2 * (eager.double().to(got.device) - exact).abs().max().item()
        allowed += 4 * torch.finfo(got.dtype).eps * exact.abs().max().item()
        assert error <= allowed, f"{name}: off by {error:.3e}, {allowed:.3e} allowed"

    return check
