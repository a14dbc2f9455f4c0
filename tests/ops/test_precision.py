"""How float32 matrices are multiplied: as PyTorch's switches say, the older one and the newer ones."""

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from seda_fast.engine import matrix_precision

pytest.importorskip("triton")
kernels: Any = pytest.importorskip("seda_fast.kernels.interaction")
newer = pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this PyTorch has the older switch alone"
)


@pytest.fixture(autouse=True)
def _switches() -> Iterator[None]:
    yield
    # The older switch sets the newer one too.
    torch.set_float32_matmul_precision("highest")
    for module in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        if hasattr(module, "fp32_precision"):
            module.fp32_precision = "none"


@pytest.mark.parametrize(("said", "used"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_the_older_switch(said: str, used: str) -> None:
    torch.set_float32_matmul_precision(said)
    assert kernels.precision(torch.float32) == used
    assert kernels.precision(torch.bfloat16) == "ieee"


@newer
@pytest.mark.parametrize("module", [torch.backends, torch.backends.cuda.matmul], ids=["all", "products"])
@pytest.mark.parametrize("said", ["tf32", "ieee"])
def test_the_newer_switches(module: Any, said: str) -> None:
    module.fp32_precision = said
    assert kernels.precision(torch.float32) == said


@pytest.mark.parametrize(("said", "used"), [("highest", "ieee"), ("high", "tf32")])
def test_without_the_newer_switch_the_older_one_is_asked(monkeypatch: pytest.MonkeyPatch, said: str, used: str) -> None:
    torch.set_float32_matmul_precision(said)
    monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace())
    assert kernels.precision(torch.float32) == used
    with matrix_precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == said


@newer
@pytest.mark.parametrize("before", ["tf32", "ieee", "none"])
@pytest.mark.parametrize("module", [torch.backends, torch.backends.cuda.matmul], ids=["all", "products"])
def test_a_run_sets_its_precision_and_puts_the_switches_back(module: Any, before: str) -> None:
    module.fp32_precision = before
    stood = torch.backends.cuda.matmul.fp32_precision, kernels.tf32_products()
    for asked in ("tf32", "fp32", "bf16"):
        with matrix_precision(asked):  # type: ignore[arg-type]
            assert kernels.tf32_products() == (asked == "tf32" or before == "tf32")
        assert (torch.backends.cuda.matmul.fp32_precision, kernels.tf32_products()) == stood
