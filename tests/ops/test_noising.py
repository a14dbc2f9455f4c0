"""Noising: every backend's q_sample against the float64 definition, values and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seda_fast import reference
from seda_fast.ops import q_sample

OPERATION = "q_sample"
STEPS = 20
SHAPES = [(0, 16), (1, 1), (7, 5), (3, 768), (33, 100), (5, 1030), (9, 40)]
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def arguments(shape: tuple[int, int], dtype: torch.dtype, device: str) -> dict[str, Any]:
    batch, dim = shape
    angle = torch.linspace(0.1, 1.5, STEPS, device=device)
    return {
        "x0": torch.randn(batch, dim, device=device, dtype=torch.float64).to(dtype),
        "timesteps": torch.randint(0, STEPS, (batch,), device=device),
        "signal": angle.cos(),
        "noise": angle.sin(),
        "seed": torch.tensor(0x1234_5678_9ABC, device=device),
        "step": torch.tensor(3, device=device),
        "sample_ids": torch.randperm(2 * batch + 1, device=device)[:batch] + 2**33,
    }


def exact(given: dict[str, Any], stream: int = 0) -> Tensor:
    wide = {**given, "x0": given["x0"].double(), "signal": given["signal"].double()}
    return reference.q_sample(**wide, stream=stream)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    error = (got.double() - expected).abs()
    # 2e-6 is what the contract allows the normals; the rest is one rounding to the result's dtype.
    assert (error <= 2e-6 + ROUNDING[got.dtype] / 2 * expected.abs()).all(), f"off by {error.max():.3e}"


@pytest.mark.parametrize("shape", SHAPES)
def test_values(lane: Any, shape: tuple[int, int]) -> None:
    for dtype in lane.dtypes():
        given = arguments(shape, dtype, lane.device)
        got = q_sample(**given, stream=1)
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert_close(got, exact(given, stream=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(lane: Any, shape: tuple[int, int]) -> None:
    for dtype in lane.dtypes():
        given = arguments(shape, dtype, lane.device)
        given["x0"].requires_grad_()
        weight = torch.randn(shape, device=lane.device).to(dtype)
        (got,) = torch.autograd.grad(q_sample(**given), given["x0"], weight)
        assert got.dtype == dtype
        assert_close(got, given["signal"].double()[given["timesteps"], None] * weight.double())


def test_gradcheck() -> None:
    given = arguments((4, 6), torch.float64, "cpu")
    assert torch.autograd.gradcheck(lambda x0: q_sample(**{**given, "x0": x0}), given["x0"].requires_grad_())


@pytest.mark.parametrize("layout", ["every second column", "transposed", "misaligned", "expanded", "row step"])
def test_any_memory_layout(lane: Any, layout: str) -> None:
    for dtype in lane.dtypes()[:2]:
        check_layout(layout, dtype, lane.device)


def check_layout(layout: str, dtype: torch.dtype, device: str) -> None:
    given = arguments((6, 24), dtype, device)
    x0 = given["x0"]
    given["x0"] = {
        "every second column": torch.stack((x0, x0 + 1), dim=2).flatten(1)[:, ::2],
        "transposed": x0.T.contiguous().T,
        "misaligned": torch.cat((x0.new_zeros(1), x0.flatten()))[1:].view(6, 24),
        "expanded": x0[:1].expand(6, 24),
        "row step": torch.cat((x0, x0), dim=1)[:, 3:27],
    }[layout].detach()
    given["timesteps"] = given["timesteps"].repeat_interleave(2)[::2]
    given["sample_ids"] = torch.stack((given["sample_ids"], given["sample_ids"]), dim=1)[:, 0]
    assert_close(q_sample(**given), exact(given))
    x0 = given["x0"].requires_grad_()
    weight = torch.randn(24, 6, device=device).to(dtype).T
    (got,) = torch.autograd.grad(q_sample(**given), x0, weight)
    assert_close(got, given["signal"].double()[given["timesteps"], None] * weight.double())


@pytest.mark.parametrize(
    ("shape", "gap"), [((3, 20), 2**30 + 64), ((2, 24), 2**31 + 64)], ids=["a product beyond", "a stride beyond"]
)
def test_more_than_2_to_the_31_elements(
    lane: Any, far_apart: Callable[..., Tensor], shape: tuple[int, int], gap: int
) -> None:
    """24 features of two bytes are Triton's to read 16 bytes at a time, in units of which a stride is counted."""
    if lane.device == "cuda":
        pytest.skip("the CPU lane checks the index arithmetic; 4 GiB of GPU memory for it would be waste")
    given = arguments(shape, lane.dtypes()[1], "cpu")
    assert torch.equal(q_sample(**{**given, "x0": far_apart(given["x0"], gap)}), q_sample(**given))
    leaf = given["x0"].requires_grad_()
    weight = torch.randn(shape).to(lane.dtypes()[1])
    (near,) = torch.autograd.grad(q_sample(**given), leaf, weight)
    (far,) = torch.autograd.grad(q_sample(**given), leaf, far_apart(weight, gap))
    assert torch.equal(far, near)


def test_a_timestep_outside_the_tables_makes_its_row_nan_and_no_other(lane: Any) -> None:
    if lane.backend != "triton":
        pytest.skip(f"{lane}: it refuses them")
    given = arguments((9, 20), torch.float32, lane.device)
    plain, wrong = q_sample(**given), [0, 4, 8]
    tau = given["timesteps"].clone()
    tau[wrong] = torch.tensor([-1, STEPS, 2**40], device=lane.device)
    x0 = given["x0"].clone().requires_grad_()
    got = q_sample(**{**given, "x0": x0, "timesteps": tau})
    (grad,) = torch.autograd.grad(got, x0, torch.ones_like(got))
    right = [row for row in range(9) if row not in wrong]
    assert got[wrong].isnan().all()
    assert grad[wrong].isnan().all()
    assert torch.equal(got[right], plain[right])
    assert torch.equal(grad[right], given["signal"][tau[right], None].expand(-1, 20))


def test_int32_timesteps_and_half_tables(lane: Any) -> None:
    given = arguments((5, 12), torch.float32, lane.device)
    narrow = {**given, "timesteps": given["timesteps"].int()}
    assert torch.equal(q_sample(**narrow), q_sample(**given))
    coarse = {**given, "signal": given["signal"].half(), "noise": given["noise"].half()}
    assert_close(q_sample(**coarse), exact({**coarse, "signal": coarse["signal"].double()}))


def test_a_row_depends_on_its_sample_id_alone(lane: Any) -> None:
    given = arguments((9, 30), torch.float32, lane.device)
    whole = q_sample(**given)
    order = torch.randperm(9, device=lane.device)
    for rows in (order, order[:4], order[7:8]):
        part = {**given, **{name: given[name][rows] for name in ("x0", "timesteps", "sample_ids")}}
        assert torch.equal(q_sample(**part), whole[rows])


def test_seed_step_stream_and_sample_each_change_the_noise(lane: Any) -> None:
    given = arguments((1, 8), torch.float32, lane.device)
    changes = [
        {},
        {"seed": 1},
        {"seed": 1 + 2**32},
        {"step": 4},
        {"stream": 1},
        {"sample_ids": given["sample_ids"] + 1},
        {"sample_ids": given["sample_ids"] + 2**32},
    ]
    drawn = [q_sample(**{**given, **change}) for change in changes]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert not torch.isclose(first, second).any()


def test_opcheck(lane: Any) -> None:
    given = arguments((5, 12), torch.float32, lane.device)
    given["x0"].requires_grad_()
    torch.library.opcheck(torch.ops.seda_fast.q_sample.default, (*given.values(), 0))
    backward = (given["x0"].detach(), given["timesteps"], given["signal"])
    torch.library.opcheck(torch.ops.seda_fast.q_sample_backward.default, backward)


def test_compiles_without_a_graph_break(lane: Any) -> None:
    given = arguments((5, 12), torch.float32, lane.device)

    def loss(x0: Tensor) -> Tensor:
        return q_sample(**{**given, "x0": 2 * x0}).square().sum()

    leaves = [given["x0"].clone().requires_grad_() for _ in range(2)]
    results = [
        function(leaf) for function, leaf in zip((loss, torch.compile(loss, fullgraph=True)), leaves, strict=True)
    ]
    for result in results:
        result.backward()
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x0": torch.zeros(4)}, r"x0 must have shape \(any, any\), not \(4,\)"),
        ({"x0": torch.zeros(4, 6, dtype=torch.int64)}, "x0 must be floating, not torch.int64"),
        ({"x0": [1.0]}, "x0 must be a tensor, not list"),
        ({"timesteps": torch.zeros(3, dtype=torch.int64)}, r"timesteps must have shape \(4\), not \(3,\)"),
        ({"timesteps": torch.zeros(4)}, "timesteps must be integer, not torch.float32"),
        ({"signal": torch.zeros(2, 2)}, "signal must have shape"),
        ({"noise": torch.zeros(3)}, "noise must have shape"),
        ({"signal": torch.ones(STEPS, requires_grad=True)}, "must not require a gradient"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, "seed must be an int or an int64 tensor of shape"),
        ({"step": 1.5}, "step must be an int or an int64 tensor of shape"),
        ({"sample_ids": torch.zeros(4, dtype=torch.int32)}, "sample_ids must be int64, not torch.int32"),
        ({"stream": 256}, r"stream must be in 0 \.\. 255, not 256"),
        ({"noise": torch.zeros(STEPS, device="meta")}, "noise is on meta but the operands are on cpu"),
    ],
)
def test_bad_arguments_get_one_sentence(change: dict[str, Any], sentence: str) -> None:
    given = arguments((4, 6), torch.float32, "cpu")
    with pytest.raises(ValueError, match=sentence):
        q_sample(**{**given, **change})
