"""All operations that have gradients: operands that lie otherwise in memory, and derivatives of derivatives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seda_fast.ops import (
    ChainWeights,
    interaction_block,
    interaction_network,
    q_sample,
    reverse_chain,
    semantic_projection,
)

OPERATION = "q_sample"
ROWS, DIM, WIDTH, HIDDEN, BLOCKS, STEPS = 6, 4, 8, 16, 2, 10


class Operation(NamedTuple):
    """``call`` maps (rows, width) to a tensor."""

    name: str
    width: int
    call: Callable[[Tensor], Tensor]


def operations(dtype: torch.dtype, device: str, rows: int = ROWS) -> list[Operation]:
    def draw(*shape: int) -> Tensor:
        return (0.5 * torch.randn(shape, dtype=torch.float64, device=device)).to(dtype)

    ids = torch.arange(rows, device=device)
    per_block = [
        [draw(*shape) for _ in range(BLOCKS)] for shape in ((HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,))
    ]
    ends = [
        draw(WIDTH, DIM),
        draw(WIDTH),
        draw(WIDTH, DIM),
        draw(WIDTH),
        draw(BLOCKS * HIDDEN, WIDTH),
        draw(BLOCKS * HIDDEN),
    ]
    weights = ChainWeights(*ends, *per_block, draw(DIM, WIDTH), draw(DIM))
    modulation, coefficients = draw(STEPS, BLOCKS, 3, WIDTH), draw(STEPS, 5).abs()
    tables, gate, condition = modulation[:, 0].unbind(1), draw(rows, HIDDEN), draw(rows, DIM)
    signal, noise = draw(STEPS).abs(), draw(STEPS).abs()
    block = (per_block[0][0], per_block[1][0], per_block[2][0], per_block[3][0])
    classes, bias, centres = draw(4, DIM), draw(4), draw(4, DIM)
    keys: dict[str, Any] = {"seed": 0, "step": 0, "sample_ids": ids}
    return [
        Operation("q_sample", DIM, lambda x: q_sample(x, ids, signal, noise, **keys)),
        Operation("interaction_block", WIDTH, lambda x: interaction_block(x, gate, ids, *tables, *block)),
        Operation("interaction_network", DIM, lambda x: interaction_network(x, [condition], ids, modulation, weights)),
        Operation("semantic_projection", DIM, lambda x: sum(semantic_projection(x, ids % 4, centres, classes, bias))),
        Operation(
            "reverse_chain",
            DIM,
            lambda x: reverse_chain(x, condition, condition, coefficients, modulation, weights, **keys, stream=4),
        ),
    ]


@pytest.mark.parametrize("place", range(5))
def test_no_rows_of_any_memory_layout_give_none(lane: Any, place: int) -> None:
    """PyTorch calls a tensor without elements contiguous, whatever its strides: those of a gradient that was expanded
    from a number, or of no rows of a matrix that lies column by column."""
    operation = operations(torch.float32, lane.device, rows=0)[place]
    by_columns = torch.randn(operation.width, ROWS, device=lane.device).T[:0]
    assert by_columns.stride(1) == ROWS
    leaf = by_columns.requires_grad_()
    result = operation.call(leaf)
    assert result.shape[:1] in ((0,), ())
    result.sum().backward()
    assert leaf.grad is not None and leaf.grad.shape == (0, operation.width)


@pytest.mark.parametrize("place", range(5))
def test_a_second_derivative_is_right_or_refused(lane: Any, place: int) -> None:
    """Never a Hessian from which the operation's part is missing."""
    operation = operations(torch.float32, lane.device)[place]
    x = torch.randn(ROWS, operation.width, device=lane.device)
    leaf = x.clone().requires_grad_()
    plain = torch.autograd.grad(operation.call(leaf).square().sum(), leaf)[0]
    (gradient,) = torch.autograd.grad(operation.call(leaf).square().sum() + leaf.pow(3).sum(), leaf, create_graph=True)
    torch.testing.assert_close(gradient.detach(), plain + 3 * x.square())
    if operation.name != "q_sample":
        with pytest.raises(RuntimeError, match=f"{operation.name} cannot be differentiated twice"):
            gradient.square().sum().backward()
        return
    (found,) = torch.autograd.grad(gradient.square().sum(), leaf)
    exact = x.double().requires_grad_()
    (slope,) = torch.autograd.grad(
        # The factor of x0, and what is added to it, are constants: read off by two calls.
        (
            (operation.call(torch.ones_like(x)) - operation.call(torch.zeros_like(x))).double() * exact
            + operation.call(torch.zeros_like(x)).double()
        )
        .square()
        .sum()
        + exact.pow(3).sum(),
        exact,
        create_graph=True,
    )
    (expected,) = torch.autograd.grad(slope.square().sum(), exact)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", range(5))
def test_a_gradient_that_has_a_graph_goes_through_a_checkpoint(lane: Any, place: int) -> None:
    """Which computes what was saved once more and lets it be read once."""
    operation = operations(torch.float32, lane.device)[place]
    leaf = torch.randn(ROWS, operation.width, device=lane.device, requires_grad=True)
    (plain,) = torch.autograd.grad(operation.call(leaf).square().sum(), leaf)
    through = checkpoint(operation.call, leaf, use_reentrant=False)
    (gradient,) = torch.autograd.grad(through.square().sum(), leaf, create_graph=True)
    torch.testing.assert_close(gradient.detach(), plain)
    if operation.name != "q_sample":
        with pytest.raises(RuntimeError, match=f"{operation.name} cannot be differentiated twice"):
            gradient.square().sum().backward()


def test_a_second_derivative_is_refused_whatever_needs_the_gradient(lane: Any) -> None:
    """A bias, too, which is not kept for the backward pass."""

    def draw(*shape: int) -> Tensor:
        return 0.5 * torch.randn(shape, device=lane.device)

    ids = torch.arange(ROWS, device=lane.device)
    tables, modulation = draw(3, STEPS, WIDTH).unbind(0), draw(STEPS, BLOCKS, 3, WIDTH)
    block = [draw(HIDDEN, WIDTH), draw(HIDDEN), draw(WIDTH, HIDDEN), draw(WIDTH)]
    blocks = [[draw(*part.shape) for _ in range(BLOCKS)] for part in block]
    ends = [draw(WIDTH, DIM), draw(WIDTH), draw(WIDTH, DIM), draw(WIDTH), draw(BLOCKS * HIDDEN, WIDTH)]
    weights = ChainWeights(*ends, draw(BLOCKS * HIDDEN), *blocks, draw(DIM, WIDTH), draw(DIM))
    h, gate, x, coefficients = draw(ROWS, WIDTH), draw(ROWS, HIDDEN), draw(ROWS, DIM), draw(STEPS, 5).abs()
    projected = [draw(4, DIM), draw(4, DIM), draw(4)]
    keys: dict[str, Any] = {"seed": 0, "step": 0, "sample_ids": ids}
    flat = [t for part in weights for t in (part if isinstance(part, list) else [part])]
    calls: list[tuple[list[Tensor], Callable[[], Tensor]]] = [
        ([gate, *tables, *block], lambda: interaction_block(h, gate, ids, *tables, *block)),
        ([x, modulation, *flat], lambda: interaction_network(x, [x], ids, modulation, weights)),
        (projected, lambda: sum(semantic_projection(x, ids % 4, *projected))),  # type: ignore[arg-type, return-value]
        (flat, lambda: reverse_chain(x, x, x, coefficients, modulation, weights, **keys, stream=4)),
    ]
    # In the interpreter a call takes seconds.
    for operands, call in calls[:1] if lane.backend == "triton" and lane.device == "cpu" else calls:
        for leaf in operands:
            leaf.requires_grad_()
            # The centres have no part in the cross entropy, and a last shift has none in a state.
            (gradient,) = torch.autograd.grad(call().sum() + leaf.sum(), leaf, create_graph=True)
            with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
                torch.autograd.grad(gradient.square().sum() + leaf.square().sum(), leaf)
            leaf.requires_grad_(False)
        # And mixed ones, of which autograd walks only to what is asked for.
        first, last = operands[0].requires_grad_(), operands[-1].requires_grad_()
        (gradient,) = torch.autograd.grad(call().sum(), first, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(gradient.square().sum() + last.sum(), last)
        first.requires_grad_(False), last.requires_grad_(False)


@pytest.mark.parametrize("place", range(5))
def test_forward_mode_is_refused(lane: Any, place: int) -> None:
    """Never a Jacobian of zeros: PyTorch drops the tangents of an operation that has no such derivative."""
    operation = operations(torch.float32, lane.device)[place]
    x = torch.randn(ROWS, operation.width, device=lane.device)
    refused = pytest.raises(RuntimeError, match=f"{operation.name} has no forward-mode derivative")
    with refused:
        torch.func.jvp(operation.call, (x,), (x,))
    with refused:
        torch.func.jacfwd(operation.call)(x)
    with torch.autograd.forward_ad.dual_level(), refused:
        operation.call(torch.autograd.forward_ad.make_dual(x, x))
    assert operation.call(x).isfinite().all()


def test_a_chain_of_no_step_has_no_gradient() -> None:
    weights = ChainWeights(
        *(torch.randn(shape) for shape in ((WIDTH, DIM), (WIDTH,), (WIDTH, DIM), (WIDTH,), (HIDDEN, WIDTH), (HIDDEN,))),
        *([torch.randn(shape)] for shape in ((HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,))),
        *(torch.randn(shape) for shape in ((DIM, WIDTH), (DIM,))),
    )
    x = torch.randn(ROWS, DIM, requires_grad=True)
    keys: dict[str, Any] = {"seed": 0, "step": 0, "sample_ids": torch.arange(ROWS)}
    result = reverse_chain(x, x, x, torch.zeros(0, 5), torch.zeros(0, 1, 3, WIDTH), weights, **keys, stream=4)
    assert (result == 0).all()
    assert torch.autograd.grad(result.sum(), x, allow_unused=True) in ((None,),)


@pytest.mark.parametrize("place", range(5))
def test_compiled_code_takes_operands_in_columns(lane: Any, place: int) -> None:
    """A fake that promises other strides than the operation leaves makes compiled code refuse or misread its result."""
    torch._dynamo.reset()  # at each of these tests the same function is compiled anew, and it is so eight times at most
    # In the interpreter a call takes seconds.
    for dtype in lane.dtypes()[: 1 if lane.backend == "triton" else None]:
        operation = operations(dtype, lane.device)[place]
        x = torch.randn(operation.width, ROWS, device=lane.device).to(dtype).t()

        def doubled(x: Tensor, operation: Operation = operation) -> Tensor:
            return 2 * operation.call(x)

        leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
        results = (doubled(leaves[0]), torch.compile(doubled, fullgraph=True, backend="aot_eager")(leaves[1]))
        assert operation.call(x).is_contiguous()
        torch.testing.assert_close(results[1], results[0])
        for result in results:
            result.float().square().sum().backward()
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
