"""Interaction: every backend's block against the float64 definition, values and gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seda_fast import reference
from seda_fast.ops import chained_interaction_block, interaction_block, use_backend

OPERATION = "interaction_block"
NAMES = ("h", "gate", "shift", "scale", "alpha", "w_h", "b_h", "w_o", "b_o")


class Case(NamedTuple):
    """Sizes of one call; ``hidden`` is m*d."""

    batch: int
    width: int
    hidden: int
    steps: int
    sorted_steps: bool = True
    dropout: float = 0.0


CASES = [
    Case(0, 16, 32, 4),
    Case(1, 8, 16, 3, dropout=0.4),
    Case(7, 20, 40, 5, sorted_steps=False),
    Case(33, 48, 50, 6, dropout=0.25),
    Case(40, 130, 24, 9, sorted_steps=False, dropout=0.1),
    Case(70, 36, 68, 1),
    # More rows than one program of a pass has.
    Case(300, 12, 20, 7),
]


def operands(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """All floating operands and the timesteps, drawn in float64 and rounded to ``dtype``."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64, device=device) * scale).to(dtype)

    batch, width, hidden, steps = case[:4]
    tau = torch.randint(0, steps, (batch,), device=device)
    return {
        "h": draw(batch, width) + 1,
        "gate": 1 + draw(batch, hidden, scale=0.3),
        "timesteps": tau.sort().values if case.sorted_steps else tau,
        "shift": draw(steps, width, scale=0.3),
        "scale": draw(steps, width, scale=0.3),
        "alpha": draw(steps, width, scale=0.3),
        "w_h": draw(hidden, width, scale=width**-0.5),
        "b_h": draw(hidden, scale=0.1),
        "w_o": draw(width, hidden, scale=hidden**-0.5),
        "b_o": draw(width, scale=0.1),
    }


def keys(case: Case, device: str) -> dict[str, Any]:
    ids = torch.arange(case.batch, device=device) * 7 + 2**34
    return {
        "dropout": case.dropout,
        "seed": torch.tensor(77, device=device),
        "step": torch.tensor(5, device=device),
        "sample_ids": ids,
        "stream": 8,
    }


def run(
    block: Callable[..., Tensor], given: dict[str, Tensor], settings: dict[str, Any], weight: Tensor
) -> dict[str, Tensor]:
    """Value and the gradients of all floating operands, for the cotangent ``weight``."""
    leaves = {name: t.detach().requires_grad_() if name in NAMES else t for name, t in given.items()}
    value = block(**leaves, **settings)
    grads = torch.autograd.grad(value, [leaves[name] for name in NAMES], weight.to(value.dtype))
    return {"value": value.detach(), **dict(zip(NAMES, grads, strict=True))}


def double(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in given.items()}


def compare(
    case: Case, dtype: torch.dtype, device: str, check: Callable[..., None], timesteps: Tensor | None = None
) -> None:
    """Value and gradients of the case, with its own ``timesteps`` if given, against the definition."""
    given, settings = operands(case, dtype, device), keys(case, device)
    given |= {} if timesteps is None else {"timesteps": timesteps}
    weight = torch.randn(case.batch, case.width, device=device).to(dtype)
    got = run(interaction_block, given, settings, weight)
    eager = run(reference.interaction_block, given, settings, weight)
    exact = run(reference.interaction_block, double(given), settings, weight.double())
    for name, result in got.items():
        check(result, eager[name], exact[name], f"{name} in {dtype}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(lane: Any, case: Case, no_worse_than_eager: Callable[..., None]) -> None:
    for dtype in lane.dtypes():
        compare(case, dtype, lane.device, no_worse_than_eager)


def test_several_tiles_each_way_the_last_ones_not_full(
    lane: Any, no_worse_than_eager: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if lane.backend != "triton":
        pytest.skip(f"{lane}: it has no tiles")
    monkeypatch.setitem(pytest.importorskip("seda_fast.kernels.interaction").COLUMN_TILE, "BLOCK_M", 2)
    case = Case(70, 132, 300, 5, dropout=0.3)
    for dtype in lane.dtypes():
        compare(case, dtype, lane.device, no_worse_than_eager)


FALLS = {
    "sorted": [],
    "a fall between two programs' rows": [48],
    "a fall inside a program's rows": [53],
    "a fall before the last row": [99],
}


@pytest.mark.parametrize("falls", FALLS.values(), ids=FALLS)
def test_bounds_of_timesteps_come_from_many_programs(
    lane: Any, no_worse_than_eager: Callable[..., None], monkeypatch: pytest.MonkeyPatch, falls: list[int]
) -> None:
    """A batch that is sorted but for one row: whichever program sees the fall, all must know of it."""
    if lane.backend != "triton":
        pytest.skip(f"{lane}: it looks for no bounds")
    monkeypatch.setattr("seda_fast.kernels.interaction.SEGMENT_ROWS", 16)
    case = Case(100, 8, 8, 4)
    tau = torch.arange(100) * 3 // 100 + 1
    for row in falls:
        tau[row] = 0
    compare(case, torch.float32, lane.device, no_worse_than_eager, tau.to(lane.device))


@pytest.mark.parametrize("fall", [None, 259], ids=["sorted", "a fall far behind"])
def test_bounds_of_more_programs_than_one_load_reads(
    lane: Any, no_worse_than_eager: Callable[..., None], monkeypatch: pytest.MonkeyPatch, fall: int | None
) -> None:
    if lane.backend != "triton":
        pytest.skip(f"{lane}: it looks for no bounds")
    monkeypatch.setattr("seda_fast.kernels.interaction.SEGMENT_ROWS", 2)
    tau = torch.arange(261) * 2 // 261
    if fall is not None:
        tau[fall] = 0
    compare(Case(261, 4, 4, 2), torch.float32, lane.device, no_worse_than_eager, tau.to(lane.device))


@pytest.mark.parametrize("falls", FALLS.values(), ids=FALLS)
def test_each_program_tells_of_its_own_fall(lane: Any, falls: list[int]) -> None:
    """Of falls that nobody told of, the memory may say anything: in poisoned memory that there was one."""
    if lane.backend != "triton":
        pytest.skip(f"{lane}: it looks for no bounds")
    kernels: Any = pytest.importorskip("seda_fast.kernels.interaction")
    tau = torch.arange(100, device=lane.device) * 3 // 100 + 1
    tau[falls] = 0
    bounds, told = (torch.full((n,), -5, dtype=torch.int32, device=lane.device) for n in (6, 7))
    kernels.segments_kernel[(7,)](tau, bounds, told, 100, 5, BLOCK=16)
    assert told.tolist() == [int(any(row // 16 == block for row in falls)) for block in range(7)]
    if not falls:
        assert bounds.tolist() == [int((tau < step).sum()) for step in range(6)]


def test_more_rows_than_one_program_looks_through(lane: Any, no_worse_than_eager: Callable[..., None]) -> None:
    compare(Case(1100, 8, 8, 2), torch.float32, lane.device, no_worse_than_eager)


def test_the_definition_is_the_formula_of_the_paper_in_other_words() -> None:
    case = Case(9, 12, 24, 4)
    given = operands(case, torch.float64, "cpu")
    tau = given["timesteps"]
    norm = torch.nn.LayerNorm(case.width, elementwise_affine=False, dtype=torch.float64)
    z = norm(given["h"]) * (1 + given["scale"][tau]) + given["shift"][tau]
    pre = F.linear(z, given["w_h"], given["b_h"])
    residual = F.linear(pre * torch.sigmoid(pre) * given["gate"], given["w_o"], given["b_o"])
    expected = given["h"] + residual + given["alpha"][tau] * residual
    torch.testing.assert_close(interaction_block(**given), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(dropout: float) -> None:
    case = Case(5, 6, 8, 4, dropout=dropout)
    given, settings = operands(case, torch.float64, "cpu"), keys(case, "cpu")
    leaves = {name: given[name].requires_grad_() for name in NAMES}
    tau = given["timesteps"]

    def block(*values: Tensor) -> Tensor:
        return interaction_block(**dict(zip(leaves, values, strict=True)), timesteps=tau, **settings)

    assert torch.autograd.gradcheck(block, tuple(leaves.values()))


def test_dropout_mask_is_the_contract_s(lane: Any) -> None:
    case = Case(17, 24, 24, 3, dropout=0.37)
    given, settings = operands(case, torch.float32, lane.device), keys(case, lane.device)
    # With the identity as second weight and nothing else in the residual, its zeros are the dropped entries.
    given |= {"w_o": torch.eye(24, device=lane.device), "alpha": torch.zeros_like(given["alpha"])}
    given |= {"b_o": torch.zeros_like(given["b_o"]), "b_h": given["b_h"] + 3}
    h = given["h"].requires_grad_()
    residual = interaction_block(**given, **settings) - h
    keep = reference.dropout_keep(
        settings["seed"], settings["step"], settings["sample_ids"], 24, settings["stream"], 0.37
    )
    assert torch.equal(residual.detach().abs() > 1e-6, keep)


@pytest.mark.parametrize("layout", ["gate is a slice", "all transposed", "misaligned", "expanded gradient"])
def test_any_memory_layout(lane: Any, layout: str, no_worse_than_eager: Callable[..., None]) -> None:
    for dtype in lane.dtypes()[:2]:
        check_layout(layout, dtype, lane.device, no_worse_than_eager)


def check_layout(layout: str, dtype: torch.dtype, device: str, check: Callable[..., None]) -> None:
    case = Case(18, 32, 48, 4, dropout=0.2)
    given, settings = operands(case, dtype, device), keys(case, device)
    weight = torch.randn(18, 32, device=device).to(dtype)

    def misalign(t: Tensor) -> Tensor:
        return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)

    if layout == "gate is a slice":
        wide = torch.cat((given["gate"], given["gate"]), dim=1)
        given["gate"] = wide[:, 48:]
        stacked = torch.stack((given["shift"], given["scale"], given["alpha"]), dim=1)
        given |= dict(zip(("shift", "scale", "alpha"), stacked.unbind(1), strict=True))
    elif layout == "all transposed":
        given = {name: t.T.contiguous().T for name, t in given.items() if t.dim() == 2} | {
            name: t.repeat_interleave(2)[::2] for name, t in given.items() if t.dim() == 1
        }
        weight = weight.T.contiguous().T
    elif layout == "misaligned":
        given = {name: misalign(t) for name, t in given.items()}
        weight = misalign(weight)
    else:
        weight = weight[:1, :1].expand(18, 32)
    got = run(interaction_block, given, settings, weight)
    exact = run(reference.interaction_block, double(given), settings, weight.double())
    eager = run(reference.interaction_block, given, settings, weight)
    for name, result in got.items():
        check(result, eager[name], exact[name], f"{name} in {dtype}")


def test_passes_reach_beyond_2_to_the_31_elements(lane: Any, run_as_program: Callable[[int], None]) -> None:
    """The last rows of a tall operand: address space is reserved for all of it, and only their pages are touched."""
    if lane.backend != "triton" or lane.device != "cpu":
        pytest.skip(f"{lane}: Triton's interpreter runs one program of many")
    kernels: Any = pytest.importorskip("seda_fast.kernels.interaction")
    hidden, rows = 4096, 2**19 + 32
    pre, out = (torch.from_numpy(np.empty((rows, hidden), dtype=np.float16)) for _ in range(2))
    pre[-32:] = torch.randn(32, hidden)
    gate = torch.randn(hidden, dtype=torch.float16)
    key, ids = torch.tensor(0), torch.zeros(1, dtype=torch.int64)
    run_as_program(rows // 32 - 1)
    # The gate is one row for all.
    kernels.gate_kernel[(1,)](
        pre, gate, out, key, key, ids, 0, 0, 1.0, rows, hidden, 0, DROPOUT=False, BLOCK_M=32, BLOCK_N=64
    )
    expected = F.silu(pre[-32:, :64].double()) * gate[:64]
    torch.testing.assert_close(out[-32:, :64].double(), expected, rtol=1e-2, atol=1e-2)


def test_more_than_2_to_the_31_elements(lane: Any, far_apart: Callable[[Tensor], Tensor]) -> None:
    if lane.device == "cuda":
        pytest.skip("the CPU lane checks the index arithmetic; 8 GiB of GPU memory for it would be waste")
    case = Case(3, 16, 32, 3, dropout=0.2)
    given, settings = operands(case, lane.dtypes()[1], "cpu"), keys(case, "cpu")
    weight = torch.randn(3, 16).to(lane.dtypes()[1])
    near = run(interaction_block, given, settings, weight)
    for name in ("h", "gate", "shift", "scale", "alpha", "weight"):
        spread = {name: far_apart(given[name])} if name in given else {}
        cotangent = far_apart(weight) if name == "weight" else weight
        far = run(interaction_block, {**given, **spread}, settings, cotangent)
        for result in near:
            assert torch.equal(far[result], near[result]), (name, result)


def test_repeats_bit_by_bit(lane: Any) -> None:
    case = Case(64, 32, 64, 3, sorted_steps=False, dropout=0.2)
    given, settings = operands(case, torch.float32, lane.device), keys(case, lane.device)
    weight = torch.randn(64, 32, device=lane.device)
    first, second = (run(interaction_block, given, settings, weight) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_the_definition_adds_up_tables_in_a_fixed_order_on_a_gpu(
    on_a_gpu: Callable[[Tensor], Tensor], called: Any
) -> None:
    """`index_add_` does it there in the order in which threads come to it, wherever timesteps repeat."""
    given = operands(Case(40, 16, 32, 3, sorted_steps=False), torch.float32, "cpu")
    residual, pre, hidden = reference.interaction_block_forward(**given)[1:]
    operands_of = {name: value for name, value in given.items() if name not in ("b_h", "b_o")}
    kept = {"residual": residual, "pre": pre, "hidden": hidden}
    grad = torch.randn(40, 16)
    expected = reference.interaction_block_backward(grad, **operands_of, **kept)
    with called:
        found = reference.interaction_block_backward(grad, **{**operands_of, "shift": on_a_gpu(given["shift"])}, **kept)
    assert called.names.count("aten::index_put_") == 3 and "aten::index_add_" not in called.names
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.as_subclass(Tensor), other)


def test_timesteps_may_be_int32(lane: Any) -> None:
    given = operands(Case(9, 16, 32, 5), torch.float32, lane.device)
    narrow = {**given, "timesteps": given["timesteps"].int()}
    assert torch.equal(interaction_block(**narrow), interaction_block(**given))


@pytest.mark.parametrize("sorted_steps", [True, False])
def test_a_timestep_outside_the_tables_makes_its_row_nan_and_no_other(
    lane: Any, sorted_steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lane.backend != "triton":
        pytest.skip(f"{lane}: it refuses them")
    # Poisoned memory is NaN where nothing was written.
    monkeypatch.setattr(torch, "empty", torch.zeros)
    case = Case(12, 16, 32, 4)
    given, weight = operands(case, torch.float32, lane.device), torch.randn(12, 16, device=lane.device)
    plain = run(interaction_block, given, {}, weight)
    tau = given["timesteps"].clone()
    wrong = [0, 1, 11] if sorted_steps else [0, 5, 7]
    tau[wrong] = torch.tensor([-7, -1, 4] if sorted_steps else [4, -1, 2**40], device=lane.device)
    got = run(interaction_block, {**given, "timesteps": tau}, {}, weight)
    right = [row for row in range(12) if row not in wrong]
    for name in ("value", "h", "gate"):
        assert got[name][wrong].isnan().all(), name
        torch.testing.assert_close(got[name][right], plain[name][right], msg=name)
    # The tables' gradients are those of the other rows.
    assert all(got[name].isfinite().all() for name in ("shift", "scale", "alpha"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_on_a_cpu_a_timestep_outside_the_tables_is_refused(dtype: torch.dtype) -> None:
    """Also by the reference, which would take rows from the tables' ends."""
    case = Case(6, 16, 32, 4)
    given = operands(case, dtype, "cpu")
    for wrong in (-1, 4):
        tau = given["timesteps"].clone()
        tau[3] = wrong
        for backend in ("auto", "reference"):
            with (
                use_backend(backend),
                pytest.raises((ValueError, RuntimeError), match=rf"timesteps\[3\] is {wrong}, outside 0 \.\. 3"),
            ):
                interaction_block(**{**given, "timesteps": tau})


def test_a_row_of_one_large_value_is_normalised_to_nothing(lane: Any) -> None:
    """What rounding leaves of the mean would be as large as the values of other rows."""
    for width, value in ((768, 4097.3), (512, 100.3), (130, 1e5)):
        case = Case(3, width, 32, 4)
        given = operands(case, torch.float32, lane.device)
        given |= {"h": torch.full_like(given["h"], value), "shift": torch.zeros_like(given["shift"])}
        found = interaction_block(**given)
        torch.testing.assert_close(found, reference.interaction_block(**double(given)).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [-3e38, -1e37, -1e4, -88.5])
def test_a_unit_that_is_switched_off_is_off(lane: Any, value: float) -> None:
    case = Case(3, 16, 32, 4)
    given = operands(case, torch.float32, lane.device)
    given["b_h"] = torch.full_like(given["b_h"], value)
    leaves = {name: given[name].clone().requires_grad_() for name in ("gate", "b_h")}
    found = interaction_block(**{**given, **leaves})
    plain = given["h"] + (1 + given["alpha"][given["timesteps"]]) * given["b_o"]
    torch.testing.assert_close(found, plain)
    for gradient in torch.autograd.grad(found.sum(), list(leaves.values())) if value > -1e38 else ():
        assert gradient.abs().max() < 1e-30


@pytest.mark.parametrize("width", [16, 128, 300])
def test_row_statistics_pass_from_block_to_block(lane: Any, width: int) -> None:
    case = Case(11, width, 32, 4)
    given = operands(case, torch.float32, lane.device)
    h_next, left = chained_interaction_block(**given)
    torch.testing.assert_close(h_next, interaction_block(**given))
    torch.testing.assert_close(left, reference.row_statistics(h_next), rtol=1e-4, atol=1e-4)
    again = {**given, "h": h_next}
    leaf = h_next.clone().requires_grad_()
    plain = interaction_block(**{**again, "h": leaf})
    chained = chained_interaction_block(**{**again, "h": leaf}, statistics=left)[0]
    torch.testing.assert_close(chained, plain, rtol=1e-4, atol=1e-4)
    (first,), (second,) = (torch.autograd.grad(out.square().sum(), leaf) for out in (plain, chained))
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-4)


def test_opcheck(lane: Any) -> None:
    case = Case(5, 12, 24, 3, dropout=0.2)
    given, settings = operands(case, torch.float32, lane.device), keys(case, lane.device)
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in given.values()]
    torch.library.opcheck(torch.ops.seda_fast.interaction_block.default, (*leaves, *settings.values(), None, True))


def test_compiles_without_a_graph_break(lane: Any) -> None:
    case = Case(6, 16, 32, 3, dropout=0.2)
    given, settings = operands(case, torch.float32, lane.device), keys(case, lane.device)

    def block(**values: Any) -> Tensor:
        return 2 * interaction_block(**values)

    weight = torch.randn(6, 16, device=lane.device)
    plain = run(block, given, settings, weight)
    compiled = run(torch.compile(block, fullgraph=True), given, settings, weight)
    for name, result in plain.items():
        torch.testing.assert_close(compiled[name], result, msg=name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"h": torch.zeros(4)}, "h must have shape"),
        ({"gate": torch.zeros(3, 16)}, r"gate must have shape \(4, any\), not \(3, 16\)"),
        ({"timesteps": torch.zeros(4)}, "timesteps must be integer"),
        ({"shift": torch.zeros(3, 9)}, r"shift must have shape \(any, 8\)"),
        ({"alpha": torch.zeros(2, 8)}, r"alpha must have shape \(3, 8\)"),
        ({"w_h": torch.zeros(8, 16)}, r"w_h must have shape \(16, 8\)"),
        ({"b_h": torch.zeros(8)}, r"b_h must have shape \(16\)"),
        ({"w_o": torch.zeros(16, 8)}, r"w_o must have shape \(8, 16\)"),
        ({"b_o": torch.zeros(8, dtype=torch.int64)}, "b_o must be floating"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"dropout": 0.5}, "dropout needs seed, step and sample_ids"),
        ({"stream": -1}, r"stream must be in 0 \.\. 255, not -1"),
    ],
)
def test_bad_arguments_get_one_sentence(change: dict[str, Any], sentence: str) -> None:
    given = operands(Case(4, 8, 16, 3), torch.float32, "cpu")
    with pytest.raises(ValueError, match=sentence):
        interaction_block(**{**given, **change})


def test_statistics_of_another_shape_are_refused() -> None:
    given = operands(Case(4, 8, 16, 3), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"statistics must have shape \(4, 1, 2\)"):
        chained_interaction_block(**given, statistics=torch.zeros(4, 2))


def test_float16_rows_far_from_their_mean_have_whole_gradients() -> None:
    """The square of 256 is no number of float16: the norm's part of the gradient would be lost without a word."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    rows, width, hidden = 8, 64, 128
    given = [draw(rows, width, scale=300), draw(rows, hidden), *(draw(3, width, scale=0.1) for _ in range(3))]
    given += [draw(hidden, width, scale=0.1), draw(hidden), draw(width, hidden, scale=0.1), draw(width)]
    grad = draw(rows, width)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        own = [t.half().to(dtype).requires_grad_() for t in given]
        with use_backend("reference"):
            found = interaction_block(own[0], own[1], torch.arange(rows) % 3, *own[2:])
        return list(torch.autograd.grad(found, own, grad.half().to(dtype)))

    for name, found, exact in zip(
        ["h", "gate", "shift", "scale", "alpha", "w_h"], *map(gradients, (torch.float16, torch.float64)), strict=False
    ):
        error = (found.double() - exact).norm() / exact.norm()
        assert error < 0.01, f"{name}: {error}"
