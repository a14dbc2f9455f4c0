"""Projection: every backend's losses and their gradients against the float64 definition."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from seda_fast import reference
from seda_fast.ops import _dispatch, semantic_projection

OPERATION = "semantic_projection"
NAMES = ("features", "centres", "weight", "bias")


class Case(NamedTuple):
    """Sizes and settings of one call; ``ignored`` is the share of rows without a label."""

    batch: int
    dim: int
    classes: int
    temperature: float = 1.0
    smoothing: float = 0.0
    ignored: float = 0.0
    has_centres: bool = True


CASES = [
    Case(0, 8, 3),
    Case(1, 5, 2, smoothing=0.1),
    Case(7, 20, 13, temperature=0.5, ignored=0.5),
    Case(33, 48, 100, temperature=2.0, smoothing=0.2, ignored=0.3),
    Case(70, 16, 300, has_centres=False),
    Case(9, 40, 5, ignored=1.0),
    Case(5, 12, 1100, smoothing=0.1, ignored=0.2),
    # Enough rows for several splits of the weight's gradient.
    Case(300, 12, 13, ignored=0.3),
    # More rows than the labels are counted of at a time, more features than a row's distance to its centre.
    Case(1100, 8, 3, ignored=0.3),
    Case(20, 300, 3, smoothing=0.1, ignored=0.2),
]


def operands(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64, device=device) * scale).to(dtype)

    labels = torch.randint(0, case.classes, (case.batch,), device=device)
    labels[: round(case.ignored * case.batch)] = -100
    return {
        "features": draw(case.batch, case.dim),
        "labels": labels[torch.randperm(case.batch, device=device)],
        "centres": draw(case.classes, case.dim) if case.has_centres else None,
        "weight": draw(case.classes, case.dim, scale=case.dim**-0.5),
        "bias": draw(case.classes, scale=0.1),
    }


def settings(case: Case) -> dict[str, float]:
    return {"temperature": case.temperature, "label_smoothing": case.smoothing}


def run(
    projection: Callable[..., tuple[Tensor, Tensor]], given: dict[str, Any], options: dict[str, Any]
) -> dict[str, Tensor]:
    """Both losses and the gradients of ``0.7 * centre loss + 1.3 * cross entropy``."""
    names = [name for name in NAMES if given[name] is not None]
    leaves = {**given, **{name: given[name].detach().requires_grad_() for name in names}}
    centre, entropy = projection(**leaves, **options)
    grads = torch.autograd.grad(0.7 * centre + 1.3 * entropy, [leaves[name] for name in names])
    return {
        "centre loss": centre.detach(),
        "cross entropy": entropy.detach(),
        **dict(zip(names, grads, strict=True)),
    }


def double(given: dict[str, Any]) -> dict[str, Any]:
    return {name: t.double() if t is not None and t.is_floating_point() else t for name, t in given.items()}


def compare(given: dict[str, Any], options: dict[str, Any], check: Callable[..., None], name: str = "") -> None:
    got = run(semantic_projection, given, options)
    eager = run(reference.semantic_projection, given, options)
    exact = run(reference.semantic_projection, double(given), options)
    for part, result in got.items():
        check(result, eager[part], exact[part], f"{part} {name}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(lane: Any, case: Case, no_worse_than_eager: Callable[..., None]) -> None:
    for dtype in lane.dtypes():
        compare(operands(case, dtype, lane.device), settings(case), no_worse_than_eager, f"in {dtype}")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_of_half_precision_are_made_in_float32(lane: Any, smoothing: float) -> None:
    """What was rounded to half precision is multiplied and added up in float32, the true class's term too: of rows that
    are rather sure the losses are small beside the logits, of which a rounding error would be a large part of them."""
    if lane.backend != "triton":
        pytest.skip(f"{lane}: its logits are of the operands' dtype")
    case = Case(6, 320, 40, temperature=0.2, smoothing=smoothing)
    for dtype in lane.dtypes()[1:]:
        given = operands(case, dtype, lane.device)
        given["labels"] = (given["features"].double() @ given["weight"].double().T).argmax(1)
        losses = semantic_projection(**given, **settings(case))
        for loss, exact in zip(losses, reference.semantic_projection(**double(given), **settings(case)), strict=True):
            torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_of_rows_that_are_nearly_certain(
    lane: Any, no_worse_than_eager: Callable[..., None], monkeypatch: pytest.MonkeyPatch, recomputed: bool
) -> None:
    """A class of probability 0.9987 leaves p - 1 = -0.0013: stored in half precision, p would be 1 or 0.996."""
    if recomputed:
        monkeypatch.setattr("seda_fast.ops.projection._wants_gradient", lambda *operands: (False, False))
    for dtype in lane.dtypes():
        eye = torch.eye(8, device=lane.device, dtype=dtype)
        given = {
            "features": eye.repeat(8, 1),
            "labels": torch.arange(64, device=lane.device) % 8,
            "centres": None,
            "weight": 8.625 * eye,
            "bias": torch.zeros(8, device=lane.device, dtype=dtype),
        }
        for smoothing in (0.0, 0.001):
            compare(given, {"label_smoothing": smoothing}, no_worse_than_eager, f"in {dtype}")


def test_large_tiles_compute_the_same(
    lane: Any, no_worse_than_eager: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if lane.backend != "triton":
        pytest.skip(f"{lane}: it has no tiles")
    monkeypatch.setattr("seda_fast.kernels.tuning.ENOUGH_PROGRAMS", 1)
    case = Case(140, 132, 150, temperature=0.7, smoothing=0.1, ignored=0.2)
    for dtype in lane.dtypes():
        compare(operands(case, dtype, lane.device), settings(case), no_worse_than_eager, f"in {dtype}")


def tiles_by_descriptors(lane: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[bool]]:
    """The kernels' module, told to read large tiles as GPUs of compute capability 9 do, in the interpreter small ones;
    and a list of whether the operands of each launch were read so. Skips other lanes and GPUs."""
    if lane.backend != "triton":
        pytest.skip(f"{lane}: it has no descriptors")
    kernels: Any = pytest.importorskip("seda_fast.kernels.projection")
    if lane.device == "cpu":
        monkeypatch.setattr(kernels, "descriptors_on", lambda device: True)
        for name in ("NORMALISER_TILE", "LOGIT_TILE", "FEATURE_TILE", "CLASS_TILE"):
            monkeypatch.setattr(kernels, name, kernels.Tile(32, 32, 16, 4, 3))
    elif not kernels.descriptors_on(torch.device("cuda")):
        pytest.skip(f"{lane}: this GPU reads tiles by pointers")
    monkeypatch.setattr("seda_fast.kernels.tuning.ENOUGH_PROGRAMS", 1)
    # Several programs, each with several tiles.
    monkeypatch.setattr(kernels, "MULTIPROCESSORS", 8)
    described, make = list[bool](), kernels._operands
    monkeypatch.setattr(kernels, "_operands", lambda by, *parts: described.append(by) or make(by, *parts))
    return kernels, described


@pytest.mark.parametrize(
    "case", [Case(70, 24, 150, temperature=0.7, smoothing=0.1, ignored=0.2), Case(140, 40, 300)], ids=str
)
def test_tiles_read_through_descriptors_compute_the_same(
    lane: Any, no_worse_than_eager: Callable[..., None], monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    kernels, described = tiles_by_descriptors(lane, monkeypatch)
    if case.classes > 200:
        # Three parts of the rows and three chunks of the classes.
        for name, number in (("CHUNK", 128), ("LOGITS", 2**13), ("ROW_STEP", 32)):
            monkeypatch.setattr(kernels, name, number)
    for dtype in lane.dtypes()[1:]:
        compare(operands(case, dtype, lane.device), settings(case), no_worse_than_eager, f"in {dtype}")
    assert described
    assert all(described)


def test_one_program_goes_through_many_classes(
    lane: Any, no_worse_than_eager: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Triton shares the classes out when there are few rows, and then its running sum meets one tile only.
    if lane.backend == "triton":
        monkeypatch.setattr("seda_fast.kernels.projection.MULTIPROCESSORS", 1)
    case = Case(7, 12, 500, temperature=0.2, smoothing=0.1, ignored=0.2)
    compare(operands(case, torch.float32, lane.device), settings(case), no_worse_than_eager)


def tensor_cores(kernels: Any, lane: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks for TF32; in the interpreter, products then leave out the 13 bits that tensor cores do."""
    monkeypatch.setattr(kernels, "precision", lambda dtype: "tf32")
    if lane.device != "cpu":
        return
    interpreter: Any = pytest.importorskip("triton.runtime.interpreter")
    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        cut = [interpreter.TensorHandle((part.data.view("i4") & -0x2000).view("f4"), part.dtype) for part in (a, b)]
        return multiply(builder, *cut, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def rounded_to_tf32(values: Tensor) -> Tensor:
    """To 11 significant bits, by float64's arithmetic."""
    mantissa, exponent = torch.frexp(values.double())
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


@pytest.mark.parametrize("classes", [12, 300])
def test_sure_rows_have_no_negative_loss_in_tf32(lane: Any, monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    """The true class's logit and the normaliser are of the same products, or what rounding takes from the one alone, a
    share of 7e-4 of a logit, is the loss."""
    if lane.backend != "triton":
        pytest.skip(f"{lane}: it does not choose how float32 is multiplied")
    kernels: Any = pytest.importorskip("seda_fast.kernels.projection")
    tensor_cores(kernels, lane, monkeypatch)
    weight = torch.randn(classes, 320, device=lane.device)
    weight /= weight.norm(dim=1, keepdim=True)
    labels = torch.arange(20, device=lane.device) % classes
    given = {"labels": labels, "weight": weight, "bias": torch.zeros(classes, device=lane.device), "centres": None}
    given["features"] = 20 * weight[labels]
    rounded = {**double(given), **{name: rounded_to_tf32(given[name]) for name in ("features", "weight")}}
    loss, exact_loss = semantic_projection(**given)[1], reference.semantic_projection(**rounded)[1]
    assert loss > -1e-5
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-4, atol=1e-5)
    found, exact = (
        run(projection, values, {"label_smoothing": 0.1})
        for projection, values in ((semantic_projection, given), (reference.semantic_projection, rounded))
    )
    for name in ("features", "weight", "bias"):
        largest = float(exact[name].abs().max())
        torch.testing.assert_close(found[name].double(), exact[name], rtol=0, atol=4e-3 * largest)


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0x7F800001, 0xFFC00000, 0x7F800000, 0xFF800000], ids=hex)
def test_what_is_no_number_is_none_in_tf32_either(lane: Any, monkeypatch: pytest.MonkeyPatch, pattern: int) -> None:
    """The bits of a NaN, taken for a number's and rounded, may be 0."""
    if lane.backend != "triton":
        pytest.skip(f"{lane}: it does not choose how float32 is multiplied")
    kernels: Any = pytest.importorskip("seda_fast.kernels.projection")
    tensor_cores(kernels, lane, monkeypatch)
    for name in ("features", "weight"):
        given = operands(Case(5, 20, 3, has_centres=False), torch.float32, lane.device)
        given[name].view(torch.int32)[1, 3] = pattern - 2**32 if pattern >= 2**31 else pattern
        given["labels"][:] = 1
        assert not semantic_projection(**given)[1].isfinite(), name


def test_many_sums_of_losses(
    lane: Any, no_worse_than_eager: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than are added up at a time, as of more than 8192 rows."""
    if lane.backend == "triton":
        monkeypatch.setattr("seda_fast.kernels.projection.LOSS_SUMS", 4)
    case = Case(70, 12, 7, smoothing=0.1, ignored=0.3)
    compare(operands(case, torch.float32, lane.device), settings(case), no_worse_than_eager)


def test_a_later_launch_is_of_the_same_code(lane: Any) -> None:
    """As compiled for the first: with the constants behind the arguments, and for none that differ."""
    if lane.backend != "triton":
        pytest.skip(f"{lane}: it launches nothing")
    kernels: Any = pytest.importorskip("seda_fast.kernels.projection")
    called: list[Any] = []

    class Compiled(dict[Any, Any]):
        def __missing__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments: called.append((grid, arguments))

    class Kernel(dict[Any, Any]):
        arg_names = ("first", "ADD", "BLOCK")

        def __missing__(self, grid: Any) -> Callable[..., Compiled]:
            return lambda *arguments, **options: called.append((grid, arguments, options)) or Compiled()

        def __hash__(self) -> int:  # type: ignore[override]
            return 0

    kernel, ready = Kernel(), {}
    for first, width in ((0, 5), (1, 5), (2, 6)):
        kernels._launch(ready, kernel, (1, 2, 3), (first,), {"BLOCK": 16, "ADD": True}, {"num_warps": 4}, width)
    options = {"ADD": True, "BLOCK": 16, "num_warps": 4}
    assert called == [((1, 2, 3), (0,), options), ((1, 2, 3), (1, True, 16)), ((1, 2, 3), (2,), options)]


def test_calls_of_one_kind_share_their_kernels_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: Any = pytest.importorskip("seda_fast.kernels.projection")
    monkeypatch.setattr(kernels, "_ready", {})
    monkeypatch.setattr(kernels, "KINDS", 6)
    device, base = torch.device("cpu"), torch.zeros(65)
    first = kernels.ready_for(device, (base[:64], None), 1)
    assert kernels.ready_for(device, (base[:64], None), 1) is first
    others = [((base[:63], None), 1), ((base[1:], None), 1), ((base[:64].double(), None), 1)]
    others += [((base[:64], base), 1), ((base[:64], None), 2)]
    for tensors, number in others:
        assert kernels.ready_for(device, tensors, number) is not first
    assert len(kernels._ready) == 6
    # One kind too many: all are forgotten.
    assert kernels.ready_for(device, (base[::2], None), 1) is not first
    assert len(kernels._ready) == 1


def test_thirty_thousand_classes(lane: Any, no_worse_than_eager: Callable[..., None]) -> None:
    case = Case(6, 16, 30_011, ignored=0.2, smoothing=0.1)
    compare(operands(case, torch.float32, lane.device), settings(case), no_worse_than_eager)


@pytest.mark.slow
def test_thirty_thousand_classes_in_half_precision(lane: Any, no_worse_than_eager: Callable[..., None]) -> None:
    case = Case(2, 16, 30_011, smoothing=0.1)
    half = lane.dtypes()[1]
    compare(operands(case, half, lane.device), settings(case), no_worse_than_eager, f"in {half}")


@pytest.mark.parametrize("classes", [13, 1100])
def test_rows_come_in_chunks_too(
    lane: Any, no_worse_than_eager: Callable[..., None], monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    if lane.backend == "triton":
        monkeypatch.setattr("seda_fast.kernels.projection.CHUNK", 512)
        monkeypatch.setattr("seda_fast.kernels.projection.BIAS_SUMS", 2)
        monkeypatch.setattr("seda_fast.kernels.projection.LOGITS", 16)
        monkeypatch.setattr("seda_fast.kernels.projection.ROW_STEP", 16)
    case = Case(41, 12, classes, temperature=0.7, smoothing=0.1, ignored=0.3)
    compare(operands(case, torch.float32, lane.device), settings(case), no_worse_than_eager)


def test_the_definition_agrees_with_pytorch_s_losses() -> None:
    case = Case(23, 12, 7, ignored=0.3)
    given = operands(case, torch.float64, "cpu")
    for temperature, smoothing in ((1.0, 0.0), (0.3, 0.0), (1.0, 0.15), (4.0, 0.15)):
        options = {"temperature": temperature, "label_smoothing": smoothing}
        centre, entropy = semantic_projection(**given, **options)
        logits = F.linear(given["features"], given["weight"], given["bias"]) / temperature
        torch.testing.assert_close(entropy, F.cross_entropy(logits, given["labels"], label_smoothing=smoothing))
        rows = given["labels"] != -100
        target = given["centres"][given["labels"][rows]]
        torch.testing.assert_close(centre, F.mse_loss(given["features"][rows], target))


def test_gradcheck() -> None:
    case = Case(6, 5, 4, temperature=0.7, smoothing=0.1, ignored=0.3)
    given = operands(case, torch.float64, "cpu")
    leaves = tuple(given[name].requires_grad_() for name in NAMES)

    def losses(features: Tensor, centres: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return semantic_projection(features, given["labels"], centres, weight, bias, **settings(case))

    assert torch.autograd.gradcheck(losses, leaves)


def test_large_logits_neither_overflow_nor_lose_the_loss(lane: Any) -> None:
    features = torch.full((4, 8), 30.0, device=lane.device).requires_grad_()
    weight = torch.zeros(5, 8, device=lane.device)
    weight[0], weight[1] = 10.0, -10.0
    labels = torch.tensor([0, 1, 2, 0], device=lane.device)
    bias = torch.zeros(5, device=lane.device)
    _, entropy = semantic_projection(features, labels, None, weight, bias)
    assert entropy.item() == pytest.approx((0 + 4800 + 2400 + 0) / 4, rel=1e-6)
    (grad,) = torch.autograd.grad(entropy, features)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("case", [Case(9, 20, 7, temperature=0.1, ignored=0.2), Case(6, 8, 3, has_centres=False)])
def test_cosine_logits(lane: Any, case: Case, no_worse_than_eager: Callable[..., None]) -> None:
    given = operands(case, torch.float32, lane.device)
    compare(given, {**settings(case), "cosine": True}, no_worse_than_eager)


@pytest.mark.parametrize(("classes", "left_out"), [(40, 35), (1200, 600), (1200, 1190)])
def test_classes_that_a_bias_leaves_out(lane: Any, classes: int, left_out: int) -> None:
    """Minus infinity for the first of the classes, whole tiles of them, leaves the others' losses and gradients."""
    given = operands(Case(6, 8, classes), torch.float32, lane.device)
    given["bias"][:left_out] = -math.inf
    given["labels"] = left_out + given["labels"] % (classes - left_out)
    features, weight = (given[name].clone().requires_grad_() for name in ("features", "weight"))
    expected = F.cross_entropy(F.linear(features, weight, given["bias"]), given["labels"])
    grads = torch.autograd.grad(expected, [features, weight])
    _, found = semantic_projection(**{**given, "features": features, "weight": weight})
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, [features, weight]), grads)
    # Without gradients the logits may go in blocks of classes, of which the first is left out as a whole.
    torch.testing.assert_close(semantic_projection(**given)[1], expected.detach())


@pytest.mark.parametrize("descriptors", [False, True], ids=["by pointers", "by descriptors"])
def test_classes_left_out_in_half_precision(
    lane: Any, no_worse_than_eager: Callable[..., None], monkeypatch: pytest.MonkeyPatch, descriptors: bool
) -> None:
    """Large tiles, of which the first have no other class."""
    described = tiles_by_descriptors(lane, monkeypatch)[1] if descriptors else [True]
    for dtype in lane.dtypes()[1:]:
        given = operands(Case(70, 24, 300), dtype, lane.device)
        given["bias"][:200] = -math.inf
        given["labels"] = 200 + given["labels"] % 100
        compare(given, {}, no_worse_than_eager, f"in {dtype}")
    assert described
    assert all(described)


def test_rows_of_one_feature_far_apart_are_read_without_descriptors(
    lane: Any, no_worse_than_eager: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one column no stride counts, but a descriptor's last one must be 1."""
    _, described = tiles_by_descriptors(lane, monkeypatch)
    for dtype in lane.dtypes()[1:]:
        given = operands(Case(64, 8, 300), dtype, lane.device)
        given |= {"features": given["features"][:, ::8], "weight": given["weight"][:, ::8], "centres": None}
        assert given["features"].stride() == (8, 8)
        compare(given, {}, no_worse_than_eager, f"in {dtype}")
    assert described
    assert not any(described)


def test_a_matrix_of_one_element_may_have_any_strides(lane: Any) -> None:
    one = torch.randn(4, 3, device=lane.device)[::4, 1::2][:, :1]
    assert one.shape == (1, 1) and 1 not in one.stride()
    label = torch.zeros(1, dtype=torch.int64, device=lane.device)
    weight = torch.randn(1026, 2, device=lane.device)[::2, ::2]
    for w in (weight, weight[:1]):
        bias = torch.zeros(len(w), device=lane.device)
        _, entropy = semantic_projection(one, label, None, w, bias)
        torch.testing.assert_close(entropy, F.cross_entropy(one @ w.T, label))


def test_cosine_ignores_lengths() -> None:
    given = operands(Case(9, 20, 7), torch.float64, "cpu")
    _, entropy = semantic_projection(**given, cosine=True)
    longer = {**given, "features": 3 * given["features"], "weight": 5 * given["weight"]}
    torch.testing.assert_close(semantic_projection(**longer, cosine=True)[1], entropy)
    logits = F.cosine_similarity(given["features"][:, None], given["weight"][None], dim=2) + given["bias"]
    torch.testing.assert_close(entropy, F.cross_entropy(logits, given["labels"]))


@pytest.mark.parametrize("definition", [False, True])
def test_cosines_in_float16_have_room_for_any_length(lane: Any, definition: bool) -> None:
    """A row's length may be 0, for which float16 has nothing as small as 1e-12, or above float16's largest number."""
    if torch.float16 not in lane.dtypes():
        pytest.skip(f"{lane}: it has no float16")
    projection = reference.semantic_projection if definition else semantic_projection
    given = operands(Case(9, 64, 7), torch.float16, lane.device)
    given["features"][2:4], given["features"][5:7] = 0.0, 3e4 * given["features"][5:7].sign()
    given["weight"][3] = 6e4
    given["labels"] = torch.tensor([0, 1, -100, 2, 3, 4, 5, 6, -100], device=lane.device)
    found = run(projection, given, {"cosine": True})
    for name, value in found.items():
        assert value.isfinite().all(), name
    exact = run(reference.semantic_projection, double(given), {"cosine": True})
    torch.testing.assert_close(found["cross entropy"].double(), exact["cross entropy"], rtol=2e-3, atol=0)
    for name in ("weight", "bias"):
        torch.testing.assert_close(found[name].double(), exact[name], rtol=0, atol=5e-3)


def test_another_ignore_index(lane: Any) -> None:
    given = operands(Case(8, 6, 4), torch.float32, lane.device)
    given["labels"][2:5] = -1
    kept = given["labels"] != -1
    part = {**given, "features": given["features"][kept], "labels": given["labels"][kept]}
    got = semantic_projection(**given, ignore_index=-1)
    torch.testing.assert_close(got, semantic_projection(**part))


@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_a_label_that_is_no_class_makes_the_loss_and_its_row_s_gradient_nan(lane: Any, wrong: int) -> None:
    if lane.backend != "triton":
        pytest.skip(f"{lane}: it refuses them")
    given = operands(Case(9, 12, 4, ignored=0.2), torch.float32, lane.device)
    row = int((given["labels"] != -100).nonzero()[0])
    labels = given["labels"].clone()
    labels[row] = wrong
    got = run(semantic_projection, {**given, "labels": labels}, {})
    assert got["cross entropy"].isnan()
    assert got["features"][row].isnan().all()
    assert torch.cat((got["features"][:row], got["features"][row + 1 :])).isfinite().all()
    # A centre of its own it has none, so the centre loss is that of the other rows.
    assert got["centre loss"].isfinite()
    assert got["centres"].isfinite().all()


def test_without_a_label_both_losses_and_all_gradients_are_0(lane: Any) -> None:
    given = operands(Case(5, 6, 4, ignored=1.0), torch.float32, lane.device)
    for name, result in run(semantic_projection, given, {}).items():
        assert not result.any(), name


@pytest.mark.parametrize("layout", ["transposed", "misaligned", "row step"])
def test_any_memory_layout(lane: Any, layout: str, no_worse_than_eager: Callable[..., None]) -> None:
    case = Case(18, 32, 24, smoothing=0.1, ignored=0.2)
    change: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda t: t.T.contiguous().T if t.dim() == 2 else t.repeat_interleave(2)[::2],
        "misaligned": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
        "row step": lambda t: torch.stack((t, t), dim=1)[:, 1],
    }
    for dtype in lane.dtypes()[:2]:
        given = operands(case, dtype, lane.device)
        laid = {name: change[layout](t) for name, t in given.items()}
        compare(laid, settings(case), no_worse_than_eager, f"in {dtype}")


def test_more_than_2_to_the_31_elements(lane: Any, far_apart: Callable[[Tensor], Tensor]) -> None:
    if lane.device == "cuda":
        pytest.skip("the CPU lane checks the index arithmetic; 8 GiB of GPU memory for it would be waste")
    case = Case(3, 16, 3)
    given = operands(case, lane.dtypes()[1], "cpu")
    near = run(semantic_projection, given, {})
    for name in ("features", "centres", "weight"):
        far = run(semantic_projection, {**given, name: far_apart(given[name])}, {})
        for result in near:
            assert torch.equal(far[result], near[result]), (name, result)


def test_repeats_bit_by_bit(lane: Any) -> None:
    given = operands(Case(64, 32, 11, ignored=0.1), torch.float32, lane.device)
    first, second = (run(semantic_projection, given, {}) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_the_definition_adds_up_centres_in_a_fixed_order_on_a_gpu(
    on_a_gpu: Callable[[Tensor], Tensor], called: Any
) -> None:
    given = operands(Case(40, 6, 4, ignored=0.2), torch.float32, "cpu")
    features, *rest = given.values()
    one = torch.ones(())
    options = {"temperature": 1.0, "label_smoothing": 0.0, "ignore_index": -100}
    expected = reference.semantic_projection_backward(one, one, features, *rest, torch.zeros(40), **options)[1]
    with called:
        found = reference.semantic_projection_backward(one, one, on_a_gpu(features), *rest, torch.zeros(40), **options)[
            1
        ]
    assert "aten::index_put_" in called.names and "aten::index_add_" not in called.names
    torch.testing.assert_close(found.as_subclass(Tensor), expected)


def test_centres_without_a_gradient_get_none(lane: Any) -> None:
    given = operands(Case(8, 6, 4), torch.float32, lane.device)
    features = given["features"].requires_grad_()
    centre, entropy = semantic_projection(**given)
    (centre + entropy).backward()
    assert features.grad is not None
    assert given["centres"].grad is None


class LargestTensor(TorchDispatchMode):
    """Remembers the most bytes of any tensor that an operation inside it made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("case", [Case(96, 16, 1500), Case(2000, 8, 100)], ids=["many classes", "many rows"])
def test_the_logits_are_never_in_memory(lane: Any, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    if lane.backend == "reference":
        pytest.skip("the reference is the definition and writes them")
    if lane.backend == "triton":
        # What bounds the chunk, scaled down as the case is.
        monkeypatch.setattr("seda_fast.kernels.projection.LOGITS", 2**16)
        monkeypatch.setattr("seda_fast.kernels.projection.ROW_STEP", 16)
    if lane.backend == "cpp":
        for bound, number in (("_BLOCK_LOGITS", 2**14), ("_GRADIENT_LOGITS", 2**15), ("_FEWEST_ROWS", 4)):
            monkeypatch.setattr(f"seda_fast.ops.cpp.projection.{bound}", number)
    features, labels, _, weight, bias = operands(case._replace(has_centres=False), torch.float32, lane.device).values()
    options = (1.0, 0.0, -100)
    one = features.new_ones(())
    forward = _dispatch.choose("semantic_projection", lane.device)[1].function
    backward = _dispatch.choose("semantic_projection_backward", lane.device)[1].function
    with LargestTensor() as largest:
        lse = forward(features, labels, None, weight, bias, *options)[2]
        backward(one, one, features, labels, None, weight, bias, lse, *options, False)
        if lane.backend == "cpp":  # whose forward makes the gradients where they are asked for
            forward(features, labels, None, weight, bias, *options, True, True)
    # At least the weight's gradient was seen; half the logits would already be too much.
    assert 4 * case.classes * case.dim <= largest.bytes < 4 * case.batch * case.classes / 2


class MostAlive(TorchDispatchMode):
    """Remembers the most bytes at a time of what operations inside it made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.made = {place: kept for place, kept in self.made.items() if not kept[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.made.values()))
        return out


def test_a_large_head_on_a_gpu_needs_less_than_a_twentieth_of_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on tensors without data; `test_gpu` measures it."""
    kernels: Any = pytest.importorskip("seda_fast.kernels.projection")
    monkeypatch.setattr(type(kernels.normaliser_kernel), "run", lambda *unused, **options: None)
    rows, dim, classes = 16_384, 768, 21_841
    half: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    features, weight, bias = (torch.empty(shape, **half) for shape in ((rows, dim), (classes, dim), (classes,)))
    labels, one = torch.empty(rows, dtype=torch.int64, device="meta"), torch.empty((), device="meta")
    options = (1.0, 0.0, -100)
    with MostAlive() as most:
        lse = kernels.semantic_projection(features, labels, None, weight, bias, *options)[2]
        kernels.semantic_projection_backward(one, one, features, labels, None, weight, bias, lse, *options, False)
    gradients = features.nbytes + weight.nbytes + bias.nbytes
    # PyTorch's allocator may hand out up to 1 MiB more than it was asked for, for each of a few large ones.
    assert gradients < most.bytes
    assert most.bytes - gradients + 3 * 2**20 < 4 * rows * classes / 20


def test_opcheck(lane: Any) -> None:
    given = operands(Case(5, 12, 4, ignored=0.2), torch.float32, lane.device)
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in given.values()]
    torch.library.opcheck(torch.ops.seda_fast.semantic_projection.default, (*leaves, 0.5, 0.1, -100))


def test_compiles_without_a_graph_break(lane: Any) -> None:
    given = operands(Case(6, 16, 5, ignored=0.2), torch.float32, lane.device)

    def losses(**values: Any) -> tuple[Tensor, Tensor]:
        centre, entropy = semantic_projection(**values)
        return 2 * centre, entropy

    plain = run(losses, given, {})
    compiled = run(torch.compile(losses, fullgraph=True), given, {})
    for name, result in plain.items():
        torch.testing.assert_close(compiled[name], result, msg=name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"features": torch.zeros(4)}, "features must have shape"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels must have shape \(4\)"),
        ({"labels": torch.zeros(4)}, "labels must be integer"),
        ({"centres": torch.zeros(3, 7)}, r"centres must have shape \(3, 6\)"),
        ({"weight": torch.zeros(3, 7)}, r"weight must have shape \(any, 6\)"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(3\)"),
        ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
        ({"temperature": math.nan}, "temperature must be positive, not nan"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), not 1.0"),
        ({"weight": torch.zeros(0, 6), "bias": torch.zeros(0), "centres": None}, "weight must have at least one class"),
        ({"features": torch.zeros(4, 0), "weight": torch.zeros(3, 0), "centres": None}, "at least one class and one"),
    ],
)
def test_bad_arguments_get_one_sentence(change: dict[str, Any], sentence: str) -> None:
    given = operands(Case(4, 6, 3), torch.float32, "cpu")
    with pytest.raises(ValueError, match=sentence):
        semantic_projection(**{**given, **change})


def test_gradients_in_float16_are_scaled_before_they_are_rounded() -> None:
    """A loss of rows that are nearly all right has gradients below float16's least number, and GradScaler's factor is
    what saves them; a factor of 65536 must not overflow either."""
    torch.manual_seed(0)
    features, weight, bias = 4 * torch.randn(512, 16), torch.randn(6, 16), torch.zeros(6)
    labels = (features @ weight.T).argmax(1)
    for scale in (1.0, 1024.0, 65536.0):
        leaves = [t.clone().requires_grad_() for t in (features, weight, bias)]
        with torch.autocast("cpu", torch.float16):
            _, loss = semantic_projection(leaves[0], labels, None, *leaves[1:], temperature=0.5)
        got = torch.autograd.grad(loss * scale, leaves)
        with torch.autocast("cpu", torch.float16):
            plain = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*leaves) / 0.5, labels)
        eager = torch.autograd.grad(plain * scale, leaves)
        double = [t.double().requires_grad_() for t in (features, weight, bias)]
        exact = torch.autograd.grad(
            torch.nn.functional.cross_entropy(torch.nn.functional.linear(*double) / 0.5, labels) * scale, double
        )
        for one, other, true in zip(got, eager, exact, strict=True):
            largest = true.abs().max()
            allowed = 2 * (other.double() - true).abs().max() + 1e-3 * largest
            assert (one.double() - true).abs().max() <= allowed


def test_a_centre_of_nothing_does_not_reach_rows_without_a_label() -> None:
    """A mean of no rows is NaN; ignored rows have class 0 in the place of none."""
    features = torch.randn(4, 3, requires_grad=True)
    centres = torch.randn(2, 3)
    centres[0] = float("nan")
    losses = semantic_projection(features, torch.tensor([1, -100, 1, 1]), centres, torch.randn(2, 3), torch.zeros(2))
    sum(losses).backward()  # type: ignore[union-attr]
    assert features.grad is not None and features.grad.isfinite().all()


def test_a_class_that_is_left_out_has_no_gradient_at_all() -> None:
    """Not a denormal one, which slows down the products that follow."""
    classes = 600
    bias = torch.zeros(classes)
    bias[:300] = -torch.inf
    bias.requires_grad_()
    features, weight = torch.randn(40, 8, requires_grad=True), torch.randn(classes, 8, requires_grad=True)
    labels = 300 + torch.arange(40)
    sum(semantic_projection(features, labels, torch.randn(classes, 8), weight, bias)).backward()  # type: ignore[union-attr]
    assert bias.grad is not None and weight.grad is not None
    assert (bias.grad[:300] == 0).all() and (weight.grad[:300] == 0).all()
    assert (bias.grad[300:] != 0).all()
