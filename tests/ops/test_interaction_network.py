"""Interaction network: every backend's whole PFIN against the float64 definition, values and gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from seda_fast import reference
from seda_fast.ops import ChainWeights, embed_condition, interaction_block, interaction_network, use_backend

OPERATION = "interaction_network"


class Case(NamedTuple):
    """Sizes of one call; ``hidden`` is m*d, ``conditions`` the widths of the condition's parts."""

    batch: int
    dim: int
    conditions: tuple[int, ...]
    width: int
    hidden: int
    blocks: int
    steps: int
    dropout: float = 0.0
    sorted_steps: bool = True


CASES = [
    Case(0, 5, (3,), 8, 8, 1, 3, dropout=0.3),
    Case(1, 5, (3, 4), 8, 16, 2, 3, dropout=0.4),
    Case(7, 12, (9, 5, 2), 20, 24, 3, 5, sorted_steps=False),
    Case(70, 20, (8,), 40, 50, 2, 9, dropout=0.2),
    Case(100, 33, (17, 6), 36, 68, 1, 2, dropout=0.1, sorted_steps=False),
]


def keys(rows: int, device: torch.device) -> dict[str, Any]:
    return {
        "seed": torch.tensor(77, device=device),
        "step": torch.tensor(5, device=device),
        "sample_ids": torch.arange(rows, device=device),
    }


def operands(case: Case, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """Floating operands, flat and in the order of the op, and the timesteps."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64, device=device) * scale).to(dtype)

    batch, dim, conditions, d, hidden, blocks, steps = case[:7]
    gates = blocks * hidden
    flat = [draw(batch, dim), *(draw(batch, c) for c in conditions), draw(steps, blocks, 3, d, scale=0.3)]
    flat += [draw(d, dim, scale=dim**-0.5), draw(d, scale=0.1), draw(d, sum(conditions), scale=0.3), draw(d, scale=0.1)]
    flat += [draw(gates, d, scale=0.3 * d**-0.5), draw(gates, scale=0.1)]
    flat += [draw(hidden, d, scale=d**-0.5) for _ in range(blocks)] + [draw(hidden, scale=0.1) for _ in range(blocks)]
    flat += [draw(d, hidden, scale=hidden**-0.5) for _ in range(blocks)] + [draw(d, scale=0.1) for _ in range(blocks)]
    flat += [draw(dim, d, scale=d**-0.5), draw(dim, scale=0.1)]
    tau = torch.randint(0, steps, (batch,), device=device)
    return flat, tau.sort().values if case.sorted_steps else tau


def parts(case: Case, flat: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor, ChainWeights]:
    left = iter(flat)
    take = lambda n: [next(left) for _ in range(n)]  # noqa: E731
    x, conditions, modulation, narrow = next(left), take(len(case.conditions)), next(left), take(6)
    return x, conditions, modulation, ChainWeights(*narrow, *(take(case.blocks) for _ in range(4)), *take(2))


def by_blocks(case: Case, flat: list[Tensor], tau: Tensor) -> Tensor:
    """The formula in other words: the network as a loop over `interaction_block`."""
    x, conditions, modulation, w = parts(case, flat)
    normed, gates = embed_condition(torch.cat(conditions, 1), w.w_c, w.b_c, w.w_g, w.b_g)
    h = torch.nn.functional.linear(x, w.w_x, w.b_x) + normed
    for i, gate in enumerate(gates.chunk(case.blocks, dim=1)):
        own = {**keys(case.batch, x.device), "stream": 8 + i, "dropout": case.dropout}
        h = interaction_block(h, gate, tau, *modulation[:, i].unbind(1), w.w_h[i], w.b_h[i], w.w_o[i], w.b_o[i], **own)
    return torch.nn.functional.linear(reference.layer_norm(h), w.w_y, w.b_y)


def by_op(case: Case, flat: list[Tensor], tau: Tensor) -> Tensor:
    x, conditions, modulation, weights = parts(case, flat)
    own = {**keys(case.batch, x.device), "stream": 8, "dropout": case.dropout}
    return interaction_network(x, conditions, tau, modulation, weights, **own)


def run(network: Callable[..., Tensor], case: Case, flat: list[Tensor], tau: Tensor, weight: Tensor) -> list[Tensor]:
    """The prediction and the gradients of all floating operands."""
    leaves = [t.detach().requires_grad_() for t in flat]
    value = network(case, leaves, tau)
    return [value.detach(), *torch.autograd.grad(value, leaves, weight.to(value.dtype))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(lane: Any, case: Case, no_worse_than_eager: Callable[..., None]) -> None:
    for dtype in lane.dtypes():
        flat, tau = operands(case, dtype, lane.device)
        weight = torch.randn(case.batch, case.dim, device=lane.device).to(dtype)
        got = run(by_op, case, flat, tau, weight)
        with use_backend("reference"):
            eager = run(by_blocks, case, flat, tau, weight)
            exact = run(by_blocks, case, [t.double() for t in flat], tau, weight.double())
        for i, result in enumerate(got):
            no_worse_than_eager(result, eager[i], exact[i], f"result {i} in {dtype}")


def test_the_reference_backward_is_the_derivative() -> None:
    case = Case(5, 4, (3, 2), 6, 8, 2, 4, dropout=0.3)
    flat, tau = operands(case, torch.float64, "cpu")
    leaves = [t.requires_grad_() for t in flat]
    assert torch.autograd.gradcheck(lambda *given: by_op(case, list(given), tau), leaves)


def test_saved_tensors_of_one_backend_serve_the_other() -> None:
    case = CASES[3]
    flat, tau = operands(case, torch.float32, "cpu")
    leaves = [t.requires_grad_() for t in flat]
    for forward, backward in (("reference", "cpp"), ("cpp", "reference")):
        with use_backend(forward):
            try:
                value = by_op(case, leaves, tau)
            except RuntimeError as reason:
                pytest.skip(f"test_saved_tensors_of_one_backend_serve_the_other: {reason}")
        with use_backend(backward):
            got = torch.autograd.grad(value.square().sum(), leaves)
        expected = torch.autograd.grad(by_op(case, leaves, tau).square().sum(), leaves)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_nobody_asks_for_are_not_made(lane: Any) -> None:
    case = CASES[2]
    flat, tau = operands(case, torch.float32, lane.device)
    leaves = [t.requires_grad_(i not in (0, 1, 3)) for i, t in enumerate(flat)]
    value = by_op(case, leaves, tau)
    value.sum().backward()
    assert [t.grad is None for t in leaves[:4]] == [True, True, False, True]
    everything = run(by_op, case, flat, tau, torch.ones_like(value))
    torch.testing.assert_close(leaves[2].grad, everything[3])
    torch.testing.assert_close(leaves[-1].grad, everything[-1])


def test_results_do_not_depend_on_the_number_of_threads(lane: Any) -> None:
    if lane.backend != "cpp":
        pytest.skip(f"{lane}: what PyTorch sums by itself may depend on it")
    # Equal up to the vendor's GEMM; the parts of our own are compared bit by bit in test_cpp.
    case = Case(700, 8, (8,), 16, 16, 2, 9, dropout=0.1, sorted_steps=False)
    flat, tau = operands(case, torch.float32, "cpu")
    weight = torch.randn(case.batch, case.dim)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append(run(by_op, case, flat, tau, weight))
    finally:
        torch.set_num_threads(before)
    for one, four in zip(*results, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-5)


def test_the_number_of_threads_changes_no_bit_beside_the_products(lane: Any) -> None:
    if lane.backend != "cpp":
        pytest.skip(f"{lane}: what PyTorch sums by itself may depend on it")
    case = Case(700, 16, (7, 9), 16, 16, 2, 9, dropout=0.1, sorted_steps=False)
    flat, tau = operands(case, torch.float32, "cpu")
    first = 2 + len(case.conditions)
    matrices = [i for i, t in enumerate(flat) if i >= first and t.ndim == 2]
    # One entry of 1 in each row and column: the vendor's GEMM has no more than two terms to add, in whatever order.
    for i in matrices:
        flat[i] = torch.eye(16).flip(0).repeat(flat[i].shape[0] // 16, 1)
    weight = torch.randn(case.batch, case.dim)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(by_op, case, flat, tau, weight))
    finally:
        torch.set_num_threads(before)
    alone, *others = results
    for i, one in enumerate(alone):
        # A weight's own gradient is a product over the rows; `run` gives the value first.
        if i - 1 not in matrices:
            assert all(torch.equal(one, other[i]) for other in others), i


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim == 2 else torch.stack((t, t), -1)[..., 0],
    "misaligned": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
    "rows of a wider matrix": lambda t: torch.cat((t, t), dim=-1)[..., : t.shape[-1]] if t.ndim > 1 else t,
    "permuted modulation": lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) if t.ndim == 4 else t,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_operands(lane: Any, layout: str) -> None:
    case, change = CASES[3], LAYOUTS[layout]
    flat, tau = operands(case, torch.float32, lane.device)
    weight = torch.randn(case.batch, case.dim, device=lane.device)
    dense = run(by_op, case, flat, tau, weight)
    strided = run(by_op, case, [change(t) for t in flat], tau, change(weight))
    for a, b in zip(dense, strided, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_more_than_2_to_the_31_elements(lane: Any, far_apart: Callable[[Tensor], Tensor]) -> None:
    if lane.device == "cuda":
        pytest.skip("the CPU lane checks the index arithmetic; 8 GiB of GPU memory for it would be waste")
    case = Case(3, 16, (8,), 16, 32, 2, 4, dropout=0.2)
    flat, tau = operands(case, torch.float32, lane.device)
    weight = torch.randn(3, 16)
    near = run(by_op, case, flat, tau, weight)
    cases = {"x": ([far_apart(flat[0]), *flat[1:]], weight), "gradient": (flat, far_apart(weight))}
    for name, (given, cotangent) in cases.items():
        for a, b in zip(near, run(by_op, case, given, tau, cotangent), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


def test_passes_reach_beyond_2_to_the_31_elements(lane: Any, run_as_program: Callable[[int], None]) -> None:
    """The last rows of a tall operand: address space is reserved for all of it, and only their pages are touched."""
    if lane.backend != "triton" or lane.device != "cpu":
        pytest.skip(f"{lane}: Triton's interpreter runs one program of many")
    kernels: Any = pytest.importorskip("seda_fast.kernels.interaction_network")
    width, rows = 4096, 2**19 + 8
    h, out = (torch.from_numpy(np.empty((rows, width), dtype=np.float16)) for _ in range(2))
    h[-8:] = torch.randn(8, width)
    run_as_program(rows // 8 - 1)
    kernels.norm_kernel[(1,)](h, out, rows, width, BLOCK_M=8, BLOCK_N=width)
    expected = torch.nn.functional.layer_norm(h[-8:].double(), (width,))
    torch.testing.assert_close(out[-8:].double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_are_as_the_compiler_is_told(lane: Any, mixed: bool) -> None:
    """Shapes, strides and dtypes; with operands of two dtypes where the backend takes them."""
    if mixed and lane.backend != "triton":
        pytest.skip(f"{lane}: operands of one dtype alone")
    case = CASES[2]
    flat, tau = operands(case, torch.float32, lane.device)
    if mixed:
        flat[:4] = [t.half() for t in flat[:4]]
    x, conditions, modulation, w = parts(case, flat)
    own = keys(case.batch, x.device)
    rest = (0.2, own["seed"], own["step"], own["sample_ids"], 6)
    op = torch.ops.seda_fast.interaction_network
    value, *saved = op(x, conditions, tau, modulation, *w[:6], *map(list, w[6:10]), *w[10:], *rest)
    weights = (w.w_x, w.w_c, w.w_g, w.b_g, *map(list, w[6:10]), w.w_y)
    for wanted in ([True] * 4, [False, True, False, True]):
        given = (torch.ones_like(value), x, conditions, tau, modulation, *weights, *rest, saved, wanted)
        backward = torch.ops.seda_fast.interaction_network_backward
        torch.library.opcheck(backward.default, given, test_utils=("test_schema", "test_faketensor"))


# Fewer rows than elsewhere, of which Triton's interpreter would make a dozen seconds.
@pytest.mark.parametrize("case", [CASES[2], CASES[3]._replace(batch=9)], ids=str)
def test_opcheck(lane: Any, case: Case) -> None:
    flat, tau = operands(case, torch.float32, lane.device)
    x, conditions, modulation, w = parts(case, [t.requires_grad_() for t in flat])
    own = keys(case.batch, x.device)
    rest = (0.2, own["seed"], own["step"], own["sample_ids"], 6)
    given = (x, conditions, tau, modulation, *w[:6], *map(list, w[6:10]), *w[10:], *rest)
    torch.library.opcheck(torch.ops.seda_fast.interaction_network.default, given)


def test_compiles_without_a_graph_break(lane: Any) -> None:
    case = CASES[1]
    flat, tau = operands(case, torch.float32, lane.device)
    weight = torch.randn(case.batch, case.dim, device=lane.device)
    whole = torch.compile(lambda given: by_op(case, given, tau), fullgraph=True)
    compiled = run(lambda case, given, tau: whole(given), case, flat, tau, weight)
    for a, b in zip(compiled, run(by_op, case, flat, tau, weight), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"conditions": []}, "conditions must hold at least one tensor"),
        ({"conditions": [torch.ones(6, 2)]}, r"conditions\[0\] must have shape \(7, any\), not \(6, 2\)"),
        ({"conditions": [torch.ones(7, 2)]}, r"w_c must have shape \(20, 2\), not \(20, 16\)"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"dropout": 0.5}, "dropout needs seed, step and sample_ids"),
        ({"stream": 254}, "stream must be in 0 .. 255, not 256"),
        ({"timesteps": torch.zeros(7)}, "timesteps must be integer, not torch.float32"),
        ({"x": torch.ones(7)}, r"x must have shape \(any, any\), not \(7,\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(change: dict[str, Any], sentence: str) -> None:
    case = CASES[2]
    flat, tau = operands(case, torch.float32, "cpu")
    x, conditions, modulation, weights = parts(case, flat)
    given = {"x": x, "conditions": conditions, "timesteps": tau, "modulation": modulation, "weights": weights} | change
    with pytest.raises(ValueError, match=sentence):
        interaction_network(**given)


def test_a_timestep_outside_the_tables_makes_its_row_nan_and_no_other(
    lane: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lane.backend != "triton":
        pytest.skip(f"{lane}: it refuses them")
    # Poisoned memory is NaN where nothing was written.
    monkeypatch.setattr(torch, "empty", torch.zeros)
    case = CASES[3]
    flat, tau = operands(case, torch.float32, lane.device)
    wrong = torch.zeros(case.batch, dtype=torch.bool, device=lane.device)
    wrong[-3:] = True
    tau[-3:] = case.steps
    weight = torch.randn(case.batch, case.dim, device=lane.device)
    value, d_x, d_condition, *_ = run(by_op, case, flat, tau, weight)
    for name, result in {"value": value, "x": d_x, "condition": d_condition}.items():
        assert result[wrong].isnan().all(), name
    inside = [flat[0][~wrong], flat[1][~wrong], *flat[2:]]
    expected = run(by_op, case._replace(batch=case.batch - 3), inside, tau[~wrong], weight[~wrong])
    for a, b in zip((value, d_x, d_condition), expected, strict=False):
        torch.testing.assert_close(a[~wrong], b, rtol=1e-4, atol=1e-4)


def test_timesteps_outside_the_tables_are_refused() -> None:
    case = CASES[2]
    flat, tau = operands(case, torch.float32, "cpu")
    with pytest.raises((RuntimeError, IndexError), match=r"timesteps\[\d\] is 9|out of range|out of bounds"):
        by_op(case, flat, torch.full_like(tau, 9))
