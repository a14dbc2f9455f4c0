"""Reverse chain: every backend's stage against the float64 definition."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from seda_fast import reference
from seda_fast.ops import ChainWeights, _dispatch, reverse_chain

OPERATION = "reverse_chain"


class Case(NamedTuple):
    """Sizes: rows, features, condition, width, hidden, blocks, steps."""

    batch: int
    dim: int
    condition: int
    width: int
    hidden: int
    blocks: int
    steps: int
    noisy: bool = True


CASES = [
    Case(0, 8, 4, 8, 16, 1, 2),
    Case(1, 12, 20, 16, 32, 3, 4),
    Case(7, 5, 3, 18, 36, 2, 3, noisy=False),
    Case(33, 20, 24, 32, 64, 2, 1),
    # More features than a tile has.
    Case(3, 300, 8, 16, 32, 1, 3),
    # Sizes that the CUDA C++ kernel takes.
    Case(70, 72, 136, 64, 192, 2, 3),
]


def arguments(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64, device=device) * scale).to(dtype)

    def linear(out: int, into: int) -> tuple[Tensor, Tensor]:
        return draw(out, into, scale=into**-0.5), draw(out, scale=0.1)

    batch, dim, condition, width, hidden, blocks, steps, noisy = case
    inner = [linear(hidden, width) for _ in range(blocks)], [linear(width, hidden) for _ in range(blocks)]
    coefficients = torch.rand(steps, 5, device=device, dtype=torch.float64) * 0.6
    coefficients[:, 3] *= noisy
    weights = ChainWeights(
        *linear(width, dim),
        *linear(width, condition),
        *linear(blocks * hidden, width),
        *([layer[part] for layer in layers] for layers in inner for part in (0, 1)),
        *linear(dim, width),
    )
    return {
        "initial": draw(batch, dim),
        "source": draw(batch, dim),
        "condition": draw(batch, condition),
        "coefficients": coefficients.to(dtype),
        "modulation": draw(steps, blocks, 3, width, scale=0.2),
        "weights": weights,
        "seed": torch.tensor(9, device=device),
        "step": torch.tensor(2, device=device),
        "sample_ids": torch.arange(batch, device=device) + 2**35,
        "stream": 4,
        "noisy": noisy,
    }


def plain(weights: ChainWeights, **given: Any) -> Tensor:
    """The definition, called with the operation's arguments."""
    first = [given.pop(name) for name in ("initial", "source", "condition", "coefficients", "modulation")]
    return reference.reverse_chain(*first, *weights, **given)


def convert(given: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The same arguments with every floating tensor changed."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(v) for v in value]
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    changed = {name: one(value) for name, value in given.items() if name != "weights"}
    return changed | {"weights": ChainWeights(*map(one, given["weights"]))}


def floating(given: dict[str, Any]) -> list[Tensor]:
    first = [given[name] for name in ("initial", "source", "condition", "coefficients", "modulation")]
    return first + [t for value in given["weights"] for t in (value if isinstance(value, list) else [value])]


def dtypes(lane: Any) -> list[torch.dtype]:
    """What the lane computes in; the CUDA C++ chain knows bfloat16 alone."""
    known = _dispatch._implementations[OPERATION][lane.backend].dtypes
    return [dtype for dtype in lane.dtypes() if not known or dtype in known]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(lane: Any, case: Case, no_worse_than_eager: Callable[..., None]) -> None:
    for dtype in dtypes(lane):
        given = arguments(case, dtype, lane.device)
        exact = plain(**convert(given, Tensor.double))
        no_worse_than_eager(reverse_chain(**given), plain(**given), exact, str(dtype))


@pytest.mark.parametrize("noisy", [True, False])
def test_more_rows_than_a_block_of_them_has(lane: Any, noisy: bool, no_worse_than_eager: Callable[..., None]) -> None:
    if lane.backend != "cpp":
        pytest.skip(f"{lane}: rows do not go in blocks of many")
    given = arguments(Case(2051, 12, 8, 16, 32, 2, 3, noisy), torch.float32, lane.device)
    exact = plain(**convert(given, Tensor.double))
    no_worse_than_eager(reverse_chain(**given), plain(**given), exact, "three blocks")
    last = {name: given[name][-1:] for name in ("initial", "source", "condition", "sample_ids")}
    torch.testing.assert_close(reverse_chain(**given)[-1:], reverse_chain(**given | last), rtol=1e-4, atol=1e-4)


def test_coefficients_may_be_float32_in_any_precision(
    lane: Any, no_worse_than_eager: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model's are: bfloat16 has three digits of them. The backend that is asked computes it for all that."""
    for dtype in dtypes(lane):
        given = arguments(Case(70, 72, 136, 64, 192, 2, 3), dtype, lane.device)
        given["coefficients"] = torch.rand(3, 5, device=lane.device) * 0.6
        exact, usual = plain(**convert(given, Tensor.double)), plain(**given)
        with monkeypatch.context() as without:
            if lane.backend in ("cpp", "triton") and dtype != torch.float64:
                without.setattr(reference, "reverse_chain", None)
            no_worse_than_eager(reverse_chain(**given), usual, exact, str(dtype))


def test_rows_that_go_through_the_steps_in_parts(lane: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if lane.backend != "triton":
        pytest.skip(f"{lane}: it takes all rows at once")
    given = arguments(Case(33, 20, 24, 32, 64, 2, 2), torch.float32, lane.device)
    whole = reverse_chain(**given)
    monkeypatch.setattr(importlib.import_module("seda_fast.kernels.reverse_chain"), "CHUNK_ROWS", 10)
    torch.testing.assert_close(reverse_chain(**given), whole, rtol=1e-5, atol=1e-5)


def test_gradients(lane: Any, no_worse_than_eager: Callable[..., None]) -> None:
    case = Case(6, 10, 8, 16, 32, 2, 3)
    dtype = dtypes(lane)[0]
    given = arguments(case, dtype, lane.device)
    weight = torch.randn(6, 10, device=lane.device)
    results = []
    for chain, kind in ((reverse_chain, dtype), (plain, dtype), (plain, torch.float64)):
        leaves = convert(given, lambda t, kind=kind: t.to(kind).detach().requires_grad_())  # type: ignore[misc]
        value = chain(**leaves)
        grads = torch.autograd.grad(value, floating(leaves), weight.to(value.dtype), allow_unused=True)
        results.append([torch.zeros(()) if grad is None else grad for grad in grads])
    for i, (got, eager, exact) in enumerate(zip(*results, strict=True)):
        no_worse_than_eager(got, eager, exact.double(), f"operand {i}")


def test_gradcheck() -> None:
    given = arguments(Case(2, 3, 2, 4, 4, 1, 2), torch.float64, "cpu")
    leaves = floating(given)
    group = [1] * 6 + [given["weights"].w_h.__len__()] * 4 + [1] * 2

    def chain(*values: Tensor) -> Tensor:
        rest = iter(values[5:])
        parts: list[Any] = []
        for place, count in enumerate(group):
            taken = [next(rest) for _ in range(count)]
            parts.append(taken if 6 <= place < 10 else taken[0])
        first = dict(zip(("initial", "source", "condition", "coefficients", "modulation"), values, strict=False))
        return reverse_chain(**{**given, **first, "weights": ChainWeights(*parts)})

    assert torch.autograd.gradcheck(chain, tuple(leaf.requires_grad_() for leaf in leaves))


def test_chain_is_what_its_docstring_says() -> None:
    case = Case(4, 6, 5, 8, 16, 2, 3)
    given = arguments(case, torch.float64, "cpu")
    w = given["weights"]
    norm = torch.nn.LayerNorm(8, elementwise_affine=False, dtype=torch.float64)
    c = norm(given["condition"] @ w.w_c.T + w.b_c)
    gates = (1 + c @ w.w_g.T + w.b_g).split(16, dim=1)
    x, total = given["initial"], torch.zeros(4, 6, dtype=torch.float64)
    for i in range(3):
        h = x @ w.w_x.T + w.b_x + c
        for layer in range(2):
            shift, scale, alpha = given["modulation"][i, layer]
            u = torch.nn.functional.silu((norm(h) * (1 + scale) + shift) @ w.w_h[layer].T + w.b_h[layer])
            h = h + (1 + alpha) * ((u * gates[layer]) @ w.w_o[layer].T + w.b_o[layer])
        clean = norm(h) @ w.w_y.T + w.b_y
        a, b, c_, e, weight = given["coefficients"][i]
        total = total + weight * clean
        eps = reference.normals(given["seed"], given["step"] + 1 + i, given["sample_ids"], 6, 4)
        x = a * clean + b * x + c_ * given["source"] + e * eps
    torch.testing.assert_close(reverse_chain(**given), total)


def test_a_row_depends_on_its_sample_id_alone(lane: Any) -> None:
    given = arguments(Case(8, 12, 6, 16, 32, 2, 3), dtypes(lane)[0], lane.device)
    whole = reverse_chain(**given)
    rows = torch.tensor([5, 1, 6], device=lane.device)
    names = ("initial", "source", "condition", "sample_ids")
    part = reverse_chain(**{**given, **{name: given[name][rows] for name in names}})
    # A product of three rows may add up in another order than one of eight.
    bound = 1e-5 if whole.dtype == torch.float32 else 0.05
    torch.testing.assert_close(part, whole[rows], rtol=bound, atol=bound)


@pytest.mark.parametrize("layout", ["transposed", "misaligned", "rows of a wider matrix", "permuted modulation"])
def test_any_memory_layout(lane: Any, layout: str, no_worse_than_eager: Callable[..., None]) -> None:
    given = arguments(Case(5, 12, 8, 16, 32, 2, 2), dtypes(lane)[0], lane.device)
    change: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        "misaligned": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
        "rows of a wider matrix": lambda t: torch.cat((t, t), dim=-1)[..., : t.shape[-1]] if t.dim() > 1 else t,
        "permuted modulation": lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) if t.dim() == 4 else t,
    }
    exact = plain(**convert(given, Tensor.double))
    no_worse_than_eager(reverse_chain(**convert(given, change[layout])), plain(**given), exact)


def test_more_than_2_to_the_31_elements(lane: Any, far_apart: Callable[[Tensor], Tensor]) -> None:
    if lane.device == "cuda":
        pytest.skip("the CPU lane checks the index arithmetic; 8 GiB of GPU memory for it would be waste")
    given = arguments(Case(3, 16, 8, 16, 32, 1, 2), dtypes(lane)[0], lane.device)
    near = reverse_chain(**given)
    for name in ("initial", "source"):
        far = reverse_chain(**{**given, name: far_apart(given[name])})
        assert torch.equal(far, near), name


def test_opcheck(lane: Any) -> None:
    given = arguments(Case(3, 6, 4, 8, 16, 2, 2), dtypes(lane)[0], lane.device)
    first = [given[name].requires_grad_() for name in ("initial", "source", "condition")]
    rest = [given[name] for name in ("seed", "step", "sample_ids", "stream", "noisy")]
    tables = (given["coefficients"], given["modulation"])
    torch.library.opcheck(torch.ops.seda_fast.reverse_chain.default, (*first, *tables, *given["weights"], *rest))


def test_compiles_without_a_graph_break(lane: Any) -> None:
    given = arguments(Case(3, 6, 4, 8, 16, 2, 2), dtypes(lane)[0], lane.device)

    def double_chain(initial: Tensor) -> Tensor:
        return 2 * reverse_chain(**{**given, "initial": initial})

    expected = double_chain(given["initial"])
    torch.testing.assert_close(torch.compile(double_chain, fullgraph=True)(given["initial"]), expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"initial": torch.zeros(4)}, "initial must have shape"),
        ({"source": torch.zeros(3, 5)}, r"source must have shape \(3, 6\)"),
        ({"condition": torch.zeros(2, 4)}, r"condition must have shape \(3, any\)"),
        ({"coefficients": torch.zeros(2, 4)}, r"coefficients must have shape \(any, 5\)"),
        ({"coefficients": torch.zeros(3, 5)}, "modulation has 2 steps but coefficients has 3"),
        ({"modulation": torch.zeros(2, 1, 3, 8)}, r"modulation must have shape \(any, 2, 3, 8\)"),
        ({"sample_ids": torch.zeros(3)}, "sample_ids must be int64"),
        ({"stream": 300}, "stream must be in"),
    ],
)
def test_bad_arguments_get_one_sentence(change: dict[str, Any], sentence: str) -> None:
    given = arguments(Case(3, 6, 4, 8, 16, 2, 2), torch.float32, "cpu")
    with pytest.raises(ValueError, match=sentence):
        reverse_chain(**{**given, **change})


def test_bad_weights_are_named() -> None:
    given = arguments(Case(3, 6, 4, 8, 16, 2, 2), torch.float32, "cpu")
    weights: ChainWeights = given["weights"]
    wrong = weights._replace(w_o=[weights.w_o[0], weights.w_h[0]])
    with pytest.raises(ValueError, match=r"w_o\[1\] must have shape \(8, 16\)"):
        reverse_chain(**{**given, "weights": wrong})
    with pytest.raises(ValueError, match="one tensor for each block"):
        reverse_chain(**{**given, "weights": weights._replace(b_o=weights.b_o[:1])})
