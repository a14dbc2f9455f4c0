"""Interaction: one block of the Progressive Feature Interaction Network (PFIN), forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._dispatch import as_counter, check_stream, check_tensor, define, differentiable_once
from ._triton import implement_with_triton


def _keep(gate: Tensor, dropout: float, seed: Tensor, step: Tensor, sample_ids: Tensor, stream: int) -> Tensor | None:
    if dropout == 0:
        return None
    return reference.dropout_keep(seed, step, sample_ids, gate.shape[1], stream, dropout)


def _reference(
    h: Tensor,
    gate: Tensor,
    timesteps: Tensor,
    shift: Tensor,
    scale: Tensor,
    alpha: Tensor,
    w_h: Tensor,
    b_h: Tensor,
    w_o: Tensor,
    b_o: Tensor,
    dropout: float,
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    stream: int,
    statistics: Tensor | None,
    leave_statistics: bool,
) -> tuple[Tensor, ...]:
    # The given statistics are for backends that read h tile by tile; here the norm sees whole rows anyway.
    keep = _keep(gate, dropout, seed, step, sample_ids, stream)
    results = reference.interaction_block_forward(
        h, gate, timesteps, shift, scale, alpha, w_h, b_h, w_o, b_o, keep, dropout
    )
    left = reference.row_statistics(results[0]) if leave_statistics else h.new_empty((0,), dtype=torch.float32)
    return _contiguous((*results, left))


def _reference_backward(
    grad: Tensor,
    h: Tensor,
    gate: Tensor,
    timesteps: Tensor,
    shift: Tensor,
    scale: Tensor,
    alpha: Tensor,
    w_h: Tensor,
    w_o: Tensor,
    residual: Tensor,
    pre: Tensor,
    hidden: Tensor,
    dropout: float,
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    stream: int,
    statistics: Tensor | None,
) -> tuple[Tensor, ...]:
    keep = _keep(gate, dropout, seed, step, sample_ids, stream)
    results = reference.interaction_block_backward(
        grad, h, gate, timesteps, shift, scale, alpha, w_h, w_o, residual, pre, hidden, keep, dropout
    )
    return _contiguous(results)


def _contiguous(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As all backends leave them and as the fakes say; PyTorch's own keep the strides of what they are given."""
    return tuple(result.contiguous() for result in results)


def _fake(h: Tensor, gate: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    leave_statistics = rest[-1]
    groups = -(-h.shape[1] // reference.STATISTICS_GROUP)
    return (
        h.new_empty(h.shape),
        h.new_empty(h.shape),
        h.new_empty(gate.shape),
        h.new_empty(gate.shape),
        h.new_empty((h.shape[0], groups, 2) if leave_statistics else (0,), dtype=torch.float32),
    )


def _fake_backward(
    grad: Tensor,
    h: Tensor,
    gate: Tensor,
    timesteps: Tensor,
    shift: Tensor,
    scale: Tensor,
    alpha: Tensor,
    w_h: Tensor,
    w_o: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    like = (h, gate, shift, scale, alpha, w_h)
    return (
        *(tensor.new_empty(tensor.shape) for tensor in like),
        w_h.new_empty(w_h.shape[:1]),
        w_o.new_empty(w_o.shape),
        w_o.new_empty(w_o.shape[:1]),
    )


_op = define(
    "interaction_block",
    "(Tensor h, Tensor gate, Tensor timesteps, Tensor shift, Tensor scale, Tensor alpha, Tensor w_h, "
    "Tensor b_h, Tensor w_o, Tensor b_o, float dropout, Tensor seed, Tensor step, Tensor sample_ids, "
    "int stream, Tensor? statistics, bool leave_statistics) "
    "-> (Tensor h_next, Tensor residual, Tensor pre, Tensor hidden, Tensor statistics_next)",
    _reference,
    _fake,
    autocast={*range(10)} - {2},
    rows=(2, 3),
)
_backward_op = define(
    "interaction_block_backward",
    "(Tensor grad, Tensor h, Tensor gate, Tensor timesteps, Tensor shift, Tensor scale, Tensor alpha, "
    "Tensor w_h, Tensor w_o, Tensor residual, Tensor pre, Tensor hidden, float dropout, Tensor seed, "
    "Tensor step, Tensor sample_ids, int stream, Tensor? statistics) "
    "-> (Tensor h, Tensor gate, Tensor shift, Tensor scale, Tensor alpha, Tensor w_h, Tensor b_h, "
    "Tensor w_o, Tensor b_o)",
    _reference_backward,
    _fake_backward,
)
implement_with_triton("interaction_block", "interaction", "interaction_block")
implement_with_triton("interaction_block_backward", "interaction", "interaction_block_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        h,
        gate,
        timesteps,
        shift,
        scale,
        alpha,
        w_h,
        b_h,
        w_o,
        b_o,
        dropout,
        seed,
        step,
        sample_ids,
        stream,
        statistics,
    ) = inputs[:16]
    _, residual, pre, hidden, statistics_next = output
    # Residual, pre and hidden leave the op only for its backward. The row statistics are a function of h_next
    # that the next block's backward differentiates itself, through its h.
    ctx.mark_non_differentiable(residual, pre, hidden, statistics_next)
    ctx.set_materialize_grads(False)
    saved = [h, gate, timesteps, shift, scale, alpha, w_h, w_o, residual, pre, hidden, seed, step, sample_ids]
    # Biases only add; they are kept for `differentiable_once`.
    ctx.save_for_backward(*saved, b_h, b_o, *([] if statistics is None else [statistics]))
    ctx.dropout, ctx.stream = dropout, stream


def _backward(
    ctx: Any, saved: tuple[Tensor, ...], grad: Tensor | None, *unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 17
    operands, (seed, step, sample_ids), statistics = (
        saved[:11],
        saved[11:14],
        saved[16] if saved[16:] else None,
    )
    d_h, d_gate, d_shift, d_scale, d_alpha, d_w_h, d_b_h, d_w_o, d_b_o = _backward_op(
        grad, *operands, ctx.dropout, seed, step, sample_ids, ctx.stream, statistics
    )
    return d_h, d_gate, None, d_shift, d_scale, d_alpha, d_w_h, d_b_h, d_w_o, d_b_o, *(None,) * 7


torch.library.register_autograd(
    "seda_fast::interaction_block", differentiable_once("interaction_block", _backward), setup_context=_setup_context
)


def interaction_block(
    h: Tensor,
    gate: Tensor,
    timesteps: Tensor,
    shift: Tensor,
    scale: Tensor,
    alpha: Tensor,
    w_h: Tensor,
    b_h: Tensor,
    w_o: Tensor,
    b_o: Tensor,
    *,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    step: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    stream: int = 6,
) -> Tensor:
    """One PFIN block: modulated norm, gated cross-feature interaction, gated residual (SeDA, sec. PFIN)::

        z  = n(h) * (1 + scale[tau]) + shift[tau]
        u  = silu(linear(z, w_h, b_h)) * gate,  then dropout
        h' = h + (1 + alpha[tau]) * linear(u, w_o, b_o)

    Args:
        h: state, (B, d) floating.
        gate: interaction with the condition, (B, m*d), the ``g`` of the formula.
        timesteps: (B,) int32 or int64, rows of the tables; fastest when ascending.
        shift, scale, alpha: (T, d) modulation tables, with gradients.
        w_h, b_h: (m*d, d) and (m*d,). w_o, b_o: (d, m*d) and (d,).
        dropout: rate in [0, 1) on ``u``; 0 draws nothing.
        seed, step, sample_ids, stream: key the dropout as in `q_sample`; required when ``dropout > 0``.

    Returns:
        (B, d) in h's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or dropout lacks its keys.
    """
    keys = (seed, step, sample_ids, stream)
    return _checked(h, gate, timesteps, shift, scale, alpha, w_h, b_h, w_o, b_o, dropout, keys, None, False)[0]


def chained_interaction_block(
    h: Tensor,
    gate: Tensor,
    timesteps: Tensor,
    shift: Tensor,
    scale: Tensor,
    alpha: Tensor,
    w_h: Tensor,
    b_h: Tensor,
    w_o: Tensor,
    b_o: Tensor,
    *,
    statistics: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    step: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    stream: int = 6,
) -> tuple[Tensor, Tensor]:
    """`interaction_block` for a block that another one follows: the row statistics of its result come with
    it.

    They are for kernels that read the next state in tiles of columns, which then need not read it once more to find
    them; today's read whole rows and do without. Gradients are those of `interaction_block`; none flows through the
    statistics, which are a function of the state.

    Args:
        statistics: of ``h``, as the block before left them, (B, ceil(d/128), 2) float32; None for the first
            block.

    Returns:
        ``(h_next, statistics)``: the mean and the centred sum of squares of each 128 columns of each row of
        h_next.

    Raises:
        ValueError: as `interaction_block`, or the statistics have the wrong shape.
    """
    keys = (seed, step, sample_ids, stream)
    return _checked(h, gate, timesteps, shift, scale, alpha, w_h, b_h, w_o, b_o, dropout, keys, statistics, True)


def _checked(
    h: Tensor,
    gate: Tensor,
    timesteps: Tensor,
    shift: Tensor,
    scale: Tensor,
    alpha: Tensor,
    w_h: Tensor,
    b_h: Tensor,
    w_o: Tensor,
    b_o: Tensor,
    dropout: float,
    keys: tuple[int | Tensor | None, int | Tensor | None, Tensor | None, int],
    statistics: Tensor | None,
    leave_statistics: bool,
) -> tuple[Tensor, Tensor]:
    check_tensor(h, "h", (None, None), None, "floating")
    (batch, width), device = h.shape, h.device
    check_tensor(gate, "gate", (batch, None), device, "floating")
    hidden = gate.shape[1]
    check_tensor(timesteps, "timesteps", (batch,), device, "integer")
    check_tensor(shift, "shift", (None, width), device, "floating")
    for name, table in (("scale", scale), ("alpha", alpha)):
        check_tensor(table, name, (shift.shape[0], width), device, "floating")
    check_tensor(w_h, "w_h", (hidden, width), device, "floating")
    check_tensor(b_h, "b_h", (hidden,), device, "floating")
    check_tensor(w_o, "w_o", (width, hidden), device, "floating")
    check_tensor(b_o, "b_o", (width,), device, "floating")
    seed, step, sample_ids, stream = keys
    check_stream(stream)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    if dropout > 0 and (seed is None or step is None or sample_ids is None):
        raise ValueError("dropout needs seed, step and sample_ids: its mask comes from the counter generator")
    if sample_ids is None:
        sample_ids = torch.zeros(batch, dtype=torch.int64, device=device)
    check_tensor(sample_ids, "sample_ids", (batch,), device, "int64")
    if statistics is not None:
        groups = -(-width // reference.STATISTICS_GROUP)
        check_tensor(statistics, "statistics", (batch, groups, 2), device, "floating")
    h_next, _, _, _, statistics_next = _op(
        h,
        gate,
        timesteps,
        shift,
        scale,
        alpha,
        w_h,
        b_h,
        w_o,
        b_o,
        float(dropout),
        as_counter(0 if seed is None else seed, "seed", device),
        as_counter(0 if step is None else step, "step", device),
        sample_ids,
        stream,
        statistics,
        leave_statistics,
    )
    return h_next, statistics_next
