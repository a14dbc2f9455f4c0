"""The operations inside a user's own `torch.autocast` region: half precision within, float32 gradients without."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from seda_fast import SeDA, SeDAConfig
from seda_fast.nn.interaction import PFIN
from seda_fast.ops import chained_interaction_block, interaction_block, q_sample, semantic_projection, use_backend

HALF = [torch.bfloat16, torch.float16]
KEYS = {"seed": 3, "step": 5, "sample_ids": torch.arange(6)}


def noised(x: Tensor) -> Tensor:
    table = torch.linspace(0.9, 0.1, 4)
    return q_sample(x, torch.arange(6) % 4, table, 1 - table, **KEYS)


_generator = torch.Generator().manual_seed(1)
W_H, W_O = torch.randn(16, 8, generator=_generator), torch.randn(8, 16, generator=_generator)
TABLES = [0.1 * torch.randn(4, 8, generator=_generator) for _ in range(3)]
CLASSES = torch.randn(5, 8, generator=_generator)


def block(x: Tensor) -> Tensor:
    gate, tau = torch.ones(6, 16), torch.arange(6) % 4
    return interaction_block(x, gate, tau, *TABLES, W_H, torch.zeros(16), W_O, torch.zeros(8), dropout=0.1, **KEYS)


def network(x: Tensor) -> Tensor:
    """A whole PFIN, in training on a CPU one operation."""
    torch.manual_seed(0)
    made = PFIN(8, 8, width=8, expansion=2, blocks=2, time_embedding=8, steps=4)
    return made(x, (x.detach(),), torch.arange(6) % 4)


def losses(x: Tensor) -> Tensor:
    centre, entropy = semantic_projection(x, torch.arange(6) % 5, CLASSES, CLASSES, torch.zeros(5))
    return centre + entropy


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("operation", "result"), [(noised, None), (block, None), (network, None), (losses, torch.float32)]
)
def test_an_operation_runs_in_the_region_s_dtype(
    operation: Callable[[Tensor], Tensor], result: torch.dtype | None, dtype: torch.dtype
) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (exact,) = torch.autograd.grad(operation(x).sum(), x)
    with torch.autocast("cpu", dtype):
        half = operation(x)
    assert half.dtype == (dtype if result is None else result)
    torch.testing.assert_close(half.float(), operation(x), rtol=0.03, atol=0.03)
    assert not torch.equal(half.float(), operation(x)), "nothing was cast"
    (grad,) = torch.autograd.grad(half.float().sum(), x)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, exact, rtol=0.05, atol=0.05)


def test_float64_is_left_alone() -> None:
    x = torch.randn(6, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert noised(x).dtype == torch.float64


def test_no_region_no_cast() -> None:
    x = torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert noised(x).dtype == torch.float32
        assert torch.equal(noised(x), noised(x))


def test_the_row_statistics_stay_float32() -> None:
    table, bias = torch.zeros(4, 8), torch.zeros(8)
    operands = (torch.randn(6, 8), torch.ones(6, 8), torch.arange(6) % 4, table, table, table)
    with torch.autocast("cpu", torch.bfloat16):
        h, statistics = chained_interaction_block(*operands, torch.eye(8), bias, torch.eye(8), bias)
        again, _ = chained_interaction_block(h, *operands[1:], torch.eye(8), bias, torch.eye(8), bias)
    assert (h.dtype, statistics.dtype, again.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_model_predicts_and_learns_in_a_user_s_region(backend: str) -> None:
    torch.manual_seed(0)
    model = SeDA(SeDAConfig(visual_dim=12, text_dim=8, n_classes=3, width=16, blocks=2, diffusion_steps=20))
    visual = torch.randn(9, 12)
    with use_backend(backend), torch.no_grad():
        exact = model(visual)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(visual)
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)
    assert not torch.equal(half.float(), exact)
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        total = model(visual).square().sum()
    total.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_function_keeps_the_region() -> None:
    @torch.compile(fullgraph=True)
    def compiled(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses(x) + block(noised(x)).float().mean()

    x = torch.randn(6, 8, requires_grad=True)
    found = compiled(x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = losses(x) + block(noised(x)).float().mean()
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    found.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
