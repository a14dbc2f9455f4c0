"""The optimiser's step in one pass: every backend against the float64 definition and PyTorch's own optimiser."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from seda_fast import reference
from seda_fast.ops import _cpp, _dispatch, gradient_norm, updates_in_one_pass, use_backend, weight_update

OPERATION = "weight_update"
# A piece of the walk has 8192 elements: around one, and several, and tensors without any.
SHAPES = [(0,), (1,), (7,), (3, 5), (64, 128), (8191,), (8193,), (3, 8192), (513, 77), (4, 0)]
LISTS = ("weights", "grads", "exp_avg", "exp_avg_sq", "average", "steps")
SETTINGS = {
    "clip_norm": 1.0,
    "learning_rate": 1e-2,
    "betas": (0.9, 0.99),
    "epsilon": 1e-8,
    "weight_decay": 0.05,
    "moved": 0.1,
}


def arguments(
    dtype: torch.dtype, done: int = 3, shapes: list[tuple[int, ...]] = SHAPES, device: str = "cpu"
) -> dict[str, list[Tensor]]:
    draw = [[torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes] for _ in range(5)]
    draw[3] = [v.square() for v in draw[3]]
    given = {name: [t.to(dtype) for t in row] for name, row in zip(LISTS, draw, strict=False)}
    return {**given, "steps": [torch.tensor(float(done), device=device) for _ in shapes]}


def updated(given: dict[str, list[Tensor]], **changes: Any) -> dict[str, list[Tensor]]:
    """The lists after one step; ``given`` stays."""
    given = copy.deepcopy(given)
    norm = changes.pop("norm", gradient_norm(given["grads"]))
    weight_update(*given.values(), norm=norm, **{**SETTINGS, **changes})
    return given


def exact(given: dict[str, list[Tensor]], **changes: Any) -> dict[str, list[Tensor]]:
    """The definition in float64."""
    wide = {name: [t.double() for t in tensors] for name, tensors in copy.deepcopy(given).items()}
    norm = changes.pop("norm", reference.gradient_norm(wide["grads"])).double()
    numbers = {**SETTINGS, **changes}
    betas = dict(zip(("beta1", "beta2"), numbers.pop("betas"), strict=True))
    reference.weight_update(*wide.values(), norm=norm, **numbers, **betas)
    return wide


def assert_close(got: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], bound: float = 2e-6) -> None:
    for name in LISTS:
        for i, (a, b) in enumerate(zip(got[name], expected[name], strict=True)):
            error = (a.double() - b).abs()
            assert torch.isfinite(a).all(), f"{name}[{i}]"
            assert (error <= bound * b.abs().clamp(min=1.0)).all(), f"{name}[{i}] is off by {error.max():.3e}"


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("done", [0, 1, 1000, 10**7])
@pytest.mark.parametrize("moved", [0.0, 0.005, 0.49, 0.5, 1.0])
def test_values(lane: Any, done: int, moved: float) -> None:
    given = arguments(torch.float32, done, device=lane.device)
    got = updated(given, moved=moved)
    assert_close(got, exact(given, moved=moved))
    assert [float(n) for n in got["steps"]] == [done + 1] * len(SHAPES)
    for a, b in zip(got["grads"], given["grads"], strict=True):
        assert torch.equal(a, b)
    if moved == 1.0:
        for a, b in zip(got["average"], got["weights"], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.3, 0.5)])
def test_small_betas_lose_no_gradient(lane: Any, betas: tuple[float, float]) -> None:
    """A moment that hardly remembers takes a gradient of 1e-5 after one of 1000 as PyTorch's own does."""
    own = torch.nn.Parameter(torch.ones(37, device=lane.device))
    optimiser = torch.optim.AdamW([own], lr=1e-2, betas=betas, eps=1e-8, weight_decay=0.05)
    given = arguments(torch.float32, 0, [(37,)], lane.device)
    for name, value in (("weights", 1.0), ("exp_avg", 0.0), ("exp_avg_sq", 0.0)):
        given[name][0].fill_(value)
    for gradient in (1e3, 1e-5):
        own.grad = torch.full_like(own, gradient)
        optimiser.step()
        given["grads"][0].fill_(gradient)
        given = updated(given, betas=betas, clip_norm=1e9)
    torch.testing.assert_close(given["weights"][0], own.detach())


def test_norm(lane: Any) -> None:
    for scale in (1.0, 1e-12, 1e15):
        grads = [scale * g for g in arguments(torch.float32, device=lane.device)["grads"]]
        expected = reference.gradient_norm([g.double() for g in grads])
        got = gradient_norm(grads)
        assert got.shape == ()
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    assert gradient_norm([torch.zeros(n, device=lane.device) for n in (5, 0)]) == 0


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 1.5, 1e20])
def test_clipping_only_shrinks(lane: Any, norm: float) -> None:
    given, total = arguments(torch.float32, device=lane.device), torch.tensor(norm, device=lane.device)
    assert_close(updated(given, norm=total), exact(given, norm=total))


def test_many_steps_follow_pytorchs_own_optimiser(lane: Any) -> None:
    """Twenty steps of both in float32, each no further from float64 than twice the other, and a little."""
    start = arguments(torch.float32, 0, device=lane.device)
    zeros = {name: [torch.zeros_like(t) for t in start["weights"]] for name in ("exp_avg", "exp_avg_sq")}
    ours = copy.deepcopy({**start, **zeros})
    definition = {name: [t.double() for t in tensors] for name, tensors in copy.deepcopy(ours).items()}
    theirs = [torch.nn.Parameter(w.clone()) for w in start["weights"]]
    average = [e.clone() for e in start["average"]]
    numbers = {"lr": SETTINGS["learning_rate"], "betas": SETTINGS["betas"], "weight_decay": SETTINGS["weight_decay"]}
    optimiser = torch.optim.AdamW(theirs, **numbers, fused=True)
    for _ in range(20):
        grads = [torch.randn(w.shape, device=w.device) for w in theirs]
        ours["grads"] = grads
        ours = updated(ours)
        definition["grads"] = [g.double() for g in grads]
        definition = exact(definition)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(theirs, SETTINGS["clip_norm"])
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, theirs, SETTINGS["moved"])
    found = {"weights": theirs, "average": average}
    for key in ("exp_avg", "exp_avg_sq"):
        found[key] = [optimiser.state[p][key] if p in optimiser.state else torch.zeros_like(p) for p in theirs]
    for name, tensors in found.items():
        for a, b, c in zip(ours[name], tensors, definition[name], strict=True):
            mine, other = ((t.double() - c).abs().max() if c.numel() else torch.zeros(()) for t in (a, b))
            assert mine <= 2 * other + 2e-6, f"{name}: off by {mine:.3e}, PyTorch by {other:.3e}"


def test_the_number_of_threads_changes_no_bit(lane: Any, threads: Callable[[int], None]) -> None:
    if lane.backend == "reference":
        pytest.skip("PyTorch's own reductions depend on the number of threads")
    given = arguments(torch.float32, shapes=[(700, 411), (5,), (9000,), (64, 1024)], device=lane.device)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append((gradient_norm(given["grads"]), updated(given)))
    for norm, lists in results[1:]:
        assert torch.equal(norm, results[0][0])
        for name in LISTS:
            assert all(map(torch.equal, lists[name], results[0][1][name])), name


@pytest.mark.parametrize("layout", ["transposed", "every second", "misaligned"])
@pytest.mark.parametrize("which", LISTS[:5])
def test_any_memory_layout(lane: Any, layout: str, which: str) -> None:
    given = arguments(torch.float32, shapes=[(6, 24), (5, 9)], device=lane.device)
    expected = exact(given)

    def laid(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.T.contiguous().T
        if layout == "every second":
            return torch.stack((t, t + 1), dim=2).flatten(1)[:, ::2]
        return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)

    given[which] = [laid(t) for t in given[which]]
    weight_update(*given.values(), norm=gradient_norm(given["grads"]), **SETTINGS)
    assert_close(given, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_reaches_every_weight(lane: Any, bad: float) -> None:
    """As it does with PyTorch's clipping, so that the loss of the step after it says so; inf / inf in its own place."""
    given = arguments(torch.float32, shapes=[(40,), (3, 7)], device=lane.device)
    given["grads"][1][2, 3] = bad
    got, expected = updated(given), exact(given)
    for name in LISTS:
        for a, b in zip(got[name], expected[name], strict=True):
            assert torch.equal(a.isnan(), b.isnan()), name
    assert got["weights"][1][2, 3].isnan()
    assert got["weights"][0].isnan().all() == (bad != float("inf"))


def test_float64_and_mixed_dtypes_go_to_the_reference() -> None:
    given = arguments(torch.float64)
    assert_close(updated(given), exact(given), bound=1e-12)
    assert not updates_in_one_pass(given["weights"])
    with use_backend("reference"):
        assert not updates_in_one_pass(arguments(torch.float32)["weights"])


@pytest.mark.skipif(_cpp.unavailable("cpu") is not None, reason="the C++ half was not built")
def test_cpp_serves_float32_on_the_cpu() -> None:
    assert updates_in_one_pass(arguments(torch.float32)["weights"])
    assert not updates_in_one_pass([torch.ones(3, 4).T])
    for operation in ("gradient_norm", "weight_update"):
        assert _dispatch.choose(operation, "cpu", torch.float32)[0] == "cpp"


def test_opcheck(lane: Any) -> None:
    given = arguments(torch.float32, shapes=[(3, 5), (7,)], device=lane.device)
    norm = gradient_norm(given["grads"])
    torch.library.opcheck(torch.ops.seda_fast.gradient_norm.default, (given["grads"],))
    numbers = (1.0, 1e-2, 0.9, 0.99, 1e-8, 0.05, 0.1)
    torch.library.opcheck(torch.ops.seda_fast.weight_update.default, (*given.values(), norm, *numbers))


def test_compiles_without_a_graph_break(lane: Any) -> None:
    given = arguments(torch.float32, shapes=[(3, 5), (7,)], device=lane.device)
    numbers = (1.0, 1e-2, 0.9, 0.99, 1e-8, 0.05, 0.1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(lists: list[list[Tensor]]) -> list[Tensor]:
        norm = torch.ops.seda_fast.gradient_norm(lists[1])
        torch.ops.seda_fast.weight_update(*lists, norm, *numbers)
        return [w + e for w, e in zip(lists[0], lists[4], strict=True)]

    lists = copy.deepcopy(list(given.values()))
    sums, expected = step(lists), exact(given)
    for a, w, e in zip(sums, expected["weights"], expected["average"], strict=True):
        torch.testing.assert_close(a.double(), w + e, rtol=0, atol=1e-5)
    assert_close(dict(zip(LISTS, lists, strict=True)), expected)


def test_autograd_sees_that_the_weights_changed(lane: Any) -> None:
    given = arguments(torch.float32, shapes=[(3, 5)], device=lane.device)
    weight = given["weights"][0].requires_grad_()
    loss = weight.square().sum()
    weight_update(*given.values(), norm=gradient_norm(given["grads"]), **SETTINGS)
    assert weight.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weights": []}, "weights must hold at least one tensor"),
        ({"grads": [torch.ones(2)]}, "grads must hold 2 tensors, not 1"),
        ({"exp_avg": [torch.ones(2), torch.ones(4)]}, r"exp_avg\[1\] must be a torch.float32 tensor of shape \(3,\)"),
        ({"average": [torch.ones(2), None]}, r"average\[1\] must be .* not NoneType"),
        ({"exp_avg_sq": [torch.ones(2).double(), torch.ones(3)]}, r"exp_avg_sq\[0\] must be a torch.float32"),
        ({"grads": [torch.ones(2), torch.ones(3, device="meta")]}, r"grads\[1\] is on meta"),
        ({"steps": [torch.ones(1), torch.ones(())]}, r"steps\[0\] must have shape \(\), not \(1,\)"),
        ({"weights": [torch.ones(2), torch.ones(3).long()]}, r"weights\[1\] must be a floating tensor"),
        ({"norm": torch.ones(1)}, r"norm must have shape \(\)"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"moved": 1.5}, r"moved must be in \[0, 1\]"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], sentence: str) -> None:
    given = {**arguments(torch.float32, shapes=[(2,), (3,)]), "norm": torch.ones(()), **SETTINGS, **change}
    with pytest.raises(ValueError, match=sentence):
        weight_update(**given)
