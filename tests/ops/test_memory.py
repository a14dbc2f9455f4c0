"""The read from a memory: value and gradient against float64, compilation, and who serves the attention."""

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seda_fast import reference, use_backend
from seda_fast.ops import attention_choice, memory, memory_read

NAMES = ("h", "keys", "values", "w_q", "b_q", "w_r", "b_r")


def operands(rows: int, classes: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(rows, width), (classes, width), (classes, width), (width, width), (width,), (width, width), (width,)]
    scales = [1, 1, 1, width**-0.5, 0.1, width**-0.5, 0.1]
    return [(s * torch.randn(shape)).to(dtype).requires_grad_() for shape, s in zip(shapes, scales, strict=True)]


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_found", {})


def test_reference_is_pytorchs_multi_head_attention() -> None:
    width, heads = 12, 3
    attention = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    given = operands(5, 4, width, torch.float64)
    h, keys, values = given[:3]
    q, k, v = attention.in_proj_weight.chunk(3)
    attention.in_proj_bias.data.normal_()
    b_q, b_k, b_v = attention.in_proj_bias.chunk(3)
    out = attention.out_proj
    normed = nn.functional.layer_norm(h, (width,))
    expected = h + attention(normed[None], keys[None], values[None], need_weights=False)[0][0]
    found = reference.memory_read(h, keys @ k.T + b_k, values @ v.T + b_v, q, b_q, out.weight, out.bias, heads)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [0, 1, 7, 130])
@pytest.mark.parametrize("classes, width, heads", [(1, 8, 1), (5, 24, 3), (33, 16, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradient_against_float64(
    rows: int, classes: int, width: int, heads: int, dtype: torch.dtype
) -> None:
    given = operands(rows, classes, width, dtype)
    wide = [x.detach().double().requires_grad_() for x in given]
    found, expected = memory_read(*given, heads=heads), reference.memory_read(*wide, heads)
    weight = torch.randn(rows, width)
    gradients = torch.autograd.grad(found, given, weight.to(dtype))
    truths = torch.autograd.grad(expected, wide, weight.to(dtype).double())
    tolerance = 2e-5 if dtype is torch.float32 else 6e-2
    for name, value, truth in zip(("h'", *NAMES), (found, *gradients), (expected, *truths), strict=True):
        assert value.dtype is dtype
        scale = float(truth.detach().abs().max()) if truth.numel() else 0.0
        torch.testing.assert_close(
            value.double(), truth, rtol=0, atol=tolerance * (1 + scale), msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradient_by_finite_differences() -> None:
    given = operands(3, 4, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: memory_read(*x, heads=2), given)


def test_a_row_does_not_see_its_neighbours() -> None:
    given = [x.detach() for x in operands(64, 9, 16)]
    whole = memory_read(*given, heads=4)
    other = [given[0].clone(), *given[1:]]
    other[0][1:] = torch.randn(63, 16)
    assert torch.equal(memory_read(*other, heads=4)[0], whole[0])


def test_the_oracle_can_be_forced() -> None:
    given = operands(5, 4, 8)
    with use_backend("reference"):
        forced = memory_read(*given, heads=2)
    assert torch.equal(forced, reference.memory_read(*given, 2))


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    given = operands(12, 5, 16)
    compiled = torch.compile(lambda *x: memory_read(*x, heads=4), fullgraph=True)
    found = compiled(*given)
    torch.testing.assert_close(found, memory_read(*given, heads=4))
    weight = torch.randn_like(found)
    for value, truth in zip(
        torch.autograd.grad(found, given, weight),
        torch.autograd.grad(memory_read(*given, heads=4), given, weight),
        strict=True,
    ):
        torch.testing.assert_close(value, truth)


@pytest.mark.parametrize(
    "changes, heads, sentence",
    [
        ({}, 3, "heads must divide the width 8, not 3"),
        ({}, 0, "heads must divide the width 8, not 0"),
        ({"keys": torch.zeros(4, 7)}, 2, "keys"),
        ({"values": torch.zeros(5, 8)}, 2, "values"),
        ({"w_q": torch.zeros(8, 7)}, 2, "w_q"),
        ({"b_r": torch.zeros(7)}, 2, "b_r"),
        ({"h": torch.zeros(3, 8, dtype=torch.int64)}, 2, "h"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Tensor], heads: int, sentence: str) -> None:
    given = {**dict(zip(NAMES, operands(3, 4, 8), strict=True)), **changes}
    with pytest.raises(ValueError, match=sentence):
        memory_read(**given, heads=heads)


# ---- xformers, by a stand-in: it has no build for CPUs ---------------------------------------------------------------

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_of_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Its layout and scale: (batch, rows, heads, size), 1 / sqrt(size)."""
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Attention], list[int]]]:
    """Installs a stand-in for ``xformers.ops``; the list that it returns grows by a number of rows at each call."""

    def install(function: Attention) -> list[int]:
        calls: list[int] = []

        def recorded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            calls.append(q.shape[1])
            return function(q, k, v)

        package, module = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
        module.memory_efficient_attention = recorded  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "xformers", package)
        monkeypatch.setitem(sys.modules, "xformers.ops", module)
        return calls

    return install


def with_times(monkeypatch: pytest.MonkeyPatch, xformers: float, torch_: float) -> None:
    monkeypatch.setattr(memory, "_times", lambda functions, operands: [xformers, torch_])


def choice(**changes: Any) -> memory.AttentionChoice:
    return attention_choice("cpu", torch.float32, **{"classes": 5, "width": 16, "heads": 4, **changes})


def test_without_xformers_pytorch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert choice() == ("torch", "xformers is not installed")


def test_xformers_serves_where_it_is_as_fast(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(attention_of_xformers)
    with_times(monkeypatch, 0.002, 0.002)
    given = operands(7, 5, 16)
    found = memory_read(*given, heads=4)
    assert calls[-1] == 7
    torch.testing.assert_close(found, reference.memory_read(*given, 4))
    assert choice().used == "xformers"
    assert choice().reason == "xformers 2.00 ms, PyTorch 2.00 ms, forward and backward of 256 rows"


def test_pytorch_serves_where_xformers_is_slower(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(attention_of_xformers)
    with_times(monkeypatch, 0.0021, 0.002)
    memory_read(*operands(7, 5, 16), heads=4)
    assert 7 not in calls
    assert choice().used == "torch"
    assert "xformers 2.10 ms, PyTorch 2.00 ms" in choice().reason


def test_the_choice_is_measured_once(stand_in: Any) -> None:
    calls = stand_in(attention_of_xformers)
    first = choice()
    measured = len(calls)
    assert measured > 20  # for times, not once for the look of it
    assert choice() == first
    assert len(calls) == measured
    choice(classes=6)  # other sizes are another measurement
    assert len(calls) > measured


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda q, k, v: 1.1 * attention_of_xformers(q, k, v), "xformers gives other values"),
        (lambda q, k, v: attention_of_xformers(q, k, v) * float("nan"), "xformers gives other values"),
        (lambda q, k, v: attention_of_xformers(q, k, v).detach(), "xformers has no kernel that serves: "),
    ],
)
def test_an_attention_that_is_wrong_does_not_serve(stand_in: Any, function: Attention, reason: str) -> None:
    stand_in(function)
    assert choice().used == "torch"
    assert choice().reason.startswith(reason)


def test_what_xformers_cannot_run_does_not_serve(stand_in: Any) -> None:
    def refuses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError("\nNo operator found for `memory_efficient_attention_forward`\n with inputs: ...")

    stand_in(refuses)
    assert choice() == (
        "torch", "xformers has no kernel that serves: No operator found for `memory_efficient_attention_forward`",
    )  # fmt: skip


def test_an_xformers_that_does_not_load_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> Any:
        raise OSError("libxformers.so: undefined symbol")

    monkeypatch.setattr(memory.importlib, "import_module", fails)
    assert choice() == ("torch", "xformers does not load: libxformers.so: undefined symbol")


# ---- many classes on a GPU, by tensors that say that they lie on one -----------------------------------------------


FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(
    "classes, width, in_order", [(64, 16, False), (65, 16, True), (64, 384, False), (32, 640, False), (33, 640, True)]
)
def test_gradients_of_many_classes_are_added_up_in_order_on_a_gpu(
    on_a_gpu: Callable[[Tensor], Tensor],
    called: Any,
    monkeypatch: pytest.MonkeyPatch,
    classes: int,
    width: int,
    in_order: bool,
) -> None:
    """The kernels' backward shares the keys out, and its programs add to the queries' gradient as they come to it."""
    given = operands(7, classes, width)
    key = ("cpu", torch.float32, classes, 2, width // 2)
    monkeypatch.setitem(memory._found, key, memory._Found(memory.AttentionChoice("torch", ""), None))
    with called:
        found = memory_read(on_a_gpu(given[0]), *given[1:], heads=2).as_subclass(Tensor)
        gradients = torch.autograd.grad(found.sum(), given)
    assert (FUSED not in called.names) == (f"{FUSED}_backward" not in called.names) == in_order
    expected = reference.memory_read(*given, 2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), given), rtol=1e-4, atol=1e-4)
    called.names.clear()
    with torch.no_grad(), called:
        memory_read(on_a_gpu(given[0]), *given[1:], heads=2)
    assert FUSED in called.names


def test_large_scores_are_finite_in_float16_where_they_are_added_up_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """An autocast region would round them, before they are scaled, to numbers up to 65504."""
    monkeypatch.setattr(memory, "_any_order", lambda *sizes: True)
    h, keys, values, *rest = operands(7, 70, 64)
    with torch.autocast("cpu", torch.float16):
        found = memory_read(h, (1e4 * keys).half(), values.half(), *rest, heads=1)
    expected = reference.memory_read(h, 1e4 * keys, values, *rest, 1)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=3e-2)


def test_xformers_does_not_train_many_classes_on_a_gpu(
    on_a_gpu: Callable[[Tensor], Tensor], stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stand_in(attention_of_xformers)
    served = memory._Found(
        memory.AttentionChoice("xformers", "as fast"), sys.modules["xformers.ops"].memory_efficient_attention
    )
    for classes in (64, 65):
        for device in ("cpu", "cuda"):
            monkeypatch.setitem(memory._found, (device, torch.float32, classes, 4, 4), served)
        given = operands(7, classes, 16)
        memory_read(on_a_gpu(given[0]), *given[1:], heads=4)
        assert len(calls) == (1 if classes == 64 else 0)
        with torch.no_grad():
            memory_read(on_a_gpu(given[0]), *given[1:], heads=4)
        assert calls.pop() == 7
        memory_read(*given, heads=4)
        assert calls.pop() == 7
        calls.clear()
    assert attention_choice("cuda", torch.float32, classes=64, width=16, heads=4) == ("xformers", "as fast")
    assert attention_choice("cpu", torch.float32, classes=65, width=16, heads=4) == ("xformers", "as fast")
    assert attention_choice("cuda", torch.float32, classes=65, width=16, heads=4) == (
        "torch",
        "with gradients of more than 64 classes step by step, in a fixed order; without, xformers: as fast",
    )


@pytest.mark.slow
def test_compiled_gradients_of_many_classes_are_added_up_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the compiler put the kernel back in the place of its steps."""
    given = operands(12, 70, 16)
    monkeypatch.setattr(memory, "_any_order", lambda *sizes: True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda *x: memory_read(*x, heads=4), fullgraph=True)
    found = compiled(*given)
    expected = reference.memory_read(*given, 4)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), given), torch.autograd.grad(expected.sum(), given), rtol=1e-4, atol=1e-4
    )
    assert not torch._dynamo.utils.counters["inductor"]["fuse_attention"]


@pytest.mark.slow
def test_a_compiled_read_is_pytorchs_whatever_was_chosen(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(attention_of_xformers)
    with_times(monkeypatch, 0.001, 0.002)
    given = operands(7, 5, 16)
    memory_read(*given, heads=4)
    before = len(calls)
    compiled = torch.compile(lambda *x: memory_read(*x, heads=4), fullgraph=True)
    torch.testing.assert_close(compiled(*given), reference.memory_read(*given, 4))
    assert len(calls) == before


def test_a_choice_is_made_in_inference_mode_too(stand_in: Any) -> None:
    stand_in(attention_of_xformers)
    given = operands(7, 5, 16)
    with torch.inference_mode():
        memory_read(*given, heads=4)
    assert memory_read(*given, heads=4).requires_grad
    assert "no kernel" not in choice().reason
