"""Interaction network: a whole PFIN in training as one op, so that nothing between its blocks is copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._dispatch import as_counter, check_stream, check_tensor, define, differentiable_once
from ._triton import implement_with_triton
from .reverse_chain import ChainWeights, check_weights


def _keeps(
    gates: int, blocks: int, dropout: float, seed: Tensor, step: Tensor, sample_ids: Tensor, stream: int
) -> list[Tensor | None]:
    if dropout == 0:
        return [None] * blocks
    hidden = gates // blocks
    return [reference.dropout_keep(seed, step, sample_ids, hidden, stream + i, dropout) for i in range(blocks)]


def _reference(*args: Any) -> tuple[Tensor, ...]:
    *operands, dropout, seed, step, sample_ids, stream = args
    keeps = _keeps(operands[8].shape[0], len(operands[10]), dropout, seed, step, sample_ids, stream)
    prediction, saved = reference.interaction_network_forward(*[*operands, keeps, dropout])
    return prediction, *saved


def _reference_backward(*args: Any) -> list[Tensor]:
    *operands, dropout, seed, step, sample_ids, stream, saved, wanted = args
    keeps = _keeps(operands[7].shape[0], len(operands[9]), dropout, seed, step, sample_ids, stream)
    found = reference.interaction_network_backward(*[*operands, saved, keeps, dropout])
    places = [0, *range(len(found) - len(wanted) + 1, len(found))]
    for place, asked in zip(places, wanted, strict=True):
        # Parts of one gradient: results of an operation share no memory.
        found[place] = found[place].clone(memory_format=torch.contiguous_format) if asked else found[place].new_empty(0)
    return found


def _fake(x: Tensor, conditions: list[Tensor], timesteps: Tensor, modulation: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (rows, width), gates, blocks = (x.shape[0], rest[0].shape[0]), rest[4].shape[0], len(rest[6])
    shapes = [x.shape, (rows, width), (rows, width), (rows, gates)]
    shapes += [(blocks * rows, gates // blocks)] * 2 + [(blocks * rows, width)] + [((blocks + 1) * rows, width)] * 2
    return tuple(x.new_empty(shape) for shape in shapes)


def _fake_backward(
    grad: Tensor, x: Tensor, conditions: list[Tensor], timesteps: Tensor, modulation: Tensor, *rest: Any
) -> list[Tensor]:
    w_x, w_c, w_g, b_g, w_h, b_h, w_o, b_o, w_y = rest[:9]
    wanted = rest[-1]
    # Each in its operand's dtype, biases that the backward is not given in their weight's.
    ends = [part for w in (w_x, w_c) for part in (w.new_empty(w.shape), w.new_empty(w.shape[0]))]
    ends += [w_g.new_empty(w_g.shape), b_g.new_empty(b_g.shape), w_y.new_empty(w_y.shape), w_y.new_empty(w_y.shape[0])]
    per_block = [t.new_empty(t.shape) for group in (w_h, b_h, w_o, b_o) for t in group]
    operands = [t.new_empty(t.shape if asked else 0) for t, asked in zip((x, *conditions), wanted, strict=True)]
    return [operands[0], modulation.new_empty(modulation.shape), *ends, *per_block, *operands[1:]]


_op = define(
    "interaction_network",
    "(Tensor x, Tensor[] conditions, Tensor timesteps, Tensor modulation, Tensor w_x, Tensor b_x, Tensor w_c, "
    "Tensor b_c, Tensor w_g, Tensor b_g, Tensor[] w_h, Tensor[] b_h, Tensor[] w_o, Tensor[] b_o, Tensor w_y, "
    "Tensor b_y, float dropout, Tensor seed, Tensor step, Tensor sample_ids, int stream) "
    "-> (Tensor prediction, Tensor condition, Tensor normed, Tensor gates, Tensor pre, Tensor hidden, "
    "Tensor residual, Tensor states, Tensor modulated)",
    _reference,
    _fake,
    autocast={*range(16)} - {2},
    rows=(2, 3),
)
_backward_op = define(
    "interaction_network_backward",
    "(Tensor grad, Tensor x, Tensor[] conditions, Tensor timesteps, Tensor modulation, Tensor w_x, Tensor w_c, "
    "Tensor w_g, Tensor b_g, Tensor[] w_h, Tensor[] b_h, Tensor[] w_o, Tensor[] b_o, Tensor w_y, float dropout, "
    "Tensor seed, Tensor step, Tensor sample_ids, int stream, Tensor[] saved, bool[] wanted) -> Tensor[]",
    _reference_backward,
    _fake_backward,
)

implement_with_triton("interaction_network", "interaction_network", "interaction_network")
implement_with_triton("interaction_network_backward", "interaction_network", "interaction_network_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, conditions, timesteps, modulation, w_x, b_x, w_c, b_c, w_g, b_g, w_h, b_h, w_o, b_o, w_y, b_y = inputs[:16]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    groups = [[x], conditions, [timesteps, modulation, w_x, w_c, w_g, b_g], w_h, b_h, w_o, b_o, [w_y], output[1:]]
    # Biases that only add are kept for `differentiable_once`.
    groups += [inputs[17:20], [b_x, b_c, b_y]]
    ctx.lengths = [len(group) for group in groups]
    ctx.save_for_backward(*(t for group in groups for t in group))
    ctx.dropout, ctx.stream = inputs[16], inputs[20]


def _backward(ctx: Any, everything: tuple[Tensor, ...], grad: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        lists = {1: 1, 10: 3, 11: 4, 12: 5, 13: 6}  # place among the arguments, and among the saved groups
        return tuple([None] * ctx.lengths[lists[i]] if i in lists else None for i in range(21))
    kept = iter(everything)
    (x,), conditions, middle, w_h, b_h, w_o, b_o, (w_y,), saved, keys, _ = (
        [next(kept) for _ in range(length)] for length in ctx.lengths
    )
    asked = ctx.needs_input_grad[1]
    asked = list(asked) if isinstance(asked, (list, tuple)) else [asked] * len(conditions)
    wanted = [bool(ctx.needs_input_grad[0]), *map(bool, asked)]
    found = _backward_op(
        grad, x, conditions, *middle, w_h, b_h, w_o, b_o, w_y, ctx.dropout, *keys, ctx.stream, saved, wanted
    )
    blocks = len(w_h)
    d_x, d_modulation, d_w_x, d_b_x, d_w_c, d_b_c, d_w_g, d_b_g, d_w_y, d_b_y = found[:10]
    d_w_h, d_b_h, d_w_o, d_b_o = (found[10 + i * blocks : 10 + (i + 1) * blocks] for i in range(4))
    d_conditions = [d if yes else None for d, yes in zip(found[10 + 4 * blocks :], wanted[1:], strict=True)]
    return (
        *(d_x if wanted[0] else None, d_conditions, None, d_modulation, d_w_x, d_b_x, d_w_c, d_b_c, d_w_g, d_b_g),
        *(d_w_h, d_b_h, d_w_o, d_b_o, d_w_y, d_b_y),
        *(None,) * 5,
    )


torch.library.register_autograd(
    "seda_fast::interaction_network",
    differentiable_once("interaction_network", _backward),
    setup_context=_setup_context,
)


def interaction_network(
    x: Tensor,
    conditions: Sequence[Tensor],
    timesteps: Tensor,
    modulation: Tensor,
    weights: ChainWeights,
    *,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    step: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    stream: int = 6,
) -> Tensor:
    """``PFIN(x, c, tau)`` with L blocks (SeDA, sec. PFIN)::

        c' = linear(c, w_c, b_c)        g = 1 + linear(n(c'), w_g, b_g)
        h  = linear(x, w_x, b_x) + n(c'), then L times `interaction_block`
        PFIN = linear(n(h), w_y, b_y)

    Args:
        x: noised state times its gain, (B, D) floating.
        conditions: parts of the condition c, (B, Dc_i), which stand side by side in it. Only those that need a
            gradient get one.
        timesteps: (B,) int32 or int64, rows of the modulation; fastest when ascending.
        modulation: (T, L, 3, d): shift, scale, alpha of each timestep and block, with gradients.
        weights: the network's weights.
        dropout, seed, step, sample_ids: as in `interaction_block`.
        stream: of the first block's dropout; the others' follow.

    Returns:
        (B, D) in x's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or dropout lacks its keys.
    """
    check_tensor(x, "x", (None, None), None, "floating")
    (batch, dim), device, blocks = x.shape, x.device, len(weights.w_h)
    if not conditions:
        raise ValueError("conditions must hold at least one tensor")
    for i, part in enumerate(conditions):
        check_tensor(part, f"conditions[{i}]", (batch, None), device, "floating")
    check_weights(weights, dim, sum(part.shape[1] for part in conditions), modulation, device)
    check_tensor(timesteps, "timesteps", (batch,), device, "integer")
    check_stream(stream)
    check_stream(stream + blocks - 1)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    if dropout > 0 and (seed is None or step is None or sample_ids is None):
        raise ValueError("dropout needs seed, step and sample_ids: its mask comes from the counter generator")
    if sample_ids is None:
        sample_ids = torch.zeros(batch, dtype=torch.int64, device=device)
    check_tensor(sample_ids, "sample_ids", (batch,), device, "int64")
    return _op(  # type: ignore[no-any-return]
        *(x, list(conditions), timesteps, modulation, *weights[:6], *map(list, weights[6:10]), *weights[10:]),
        float(dropout),
        as_counter(0 if seed is None else seed, "seed", device),
        as_counter(0 if step is None else step, "step", device),
        sample_ids,
        stream,
    )[0]
