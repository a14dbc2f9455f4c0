"""Reverse chain: one stage of the bi-stage diffusion at prediction, all S steps in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ._dispatch import as_counter, check_stream, check_tensor, define, differentiable_once
from ._triton import implement_with_triton


class ChainWeights(NamedTuple):
    """A PFIN's weights as the chain takes them; ``linear(x, W, b) = x @ W.T + b`` throughout.

    ``w_x`` (d, D) input, ``w_c`` (d, Dc) condition, ``w_g`` (L*m*d, d) gates, ``w_h`` L times (m*d, d),
    ``w_o`` L times (d, m*d), ``w_y`` (D, d) output; biases in the size of the first dimension.
    """

    w_x: Tensor
    b_x: Tensor
    w_c: Tensor
    b_c: Tensor
    w_g: Tensor
    b_g: Tensor
    w_h: Sequence[Tensor]
    b_h: Sequence[Tensor]
    w_o: Sequence[Tensor]
    b_o: Sequence[Tensor]
    w_y: Tensor
    b_y: Tensor


_SCHEMA = (
    "(Tensor initial, Tensor source, Tensor condition, Tensor coefficients, Tensor modulation, "
    "Tensor w_x, Tensor b_x, Tensor w_c, Tensor b_c, Tensor w_g, Tensor b_g, "
    "Tensor[] w_h, Tensor[] b_h, Tensor[] w_o, Tensor[] b_o, Tensor w_y, Tensor b_y, "
    "Tensor seed, Tensor step, Tensor sample_ids, int stream, bool noisy)"
)
# The arguments before ``seed``: all of them carry gradients.
_DIFFERENTIABLE = 17


def _reference(*args: Any) -> Tensor:
    *operands, seed, step, sample_ids, stream, noisy = args
    # The chain's own autograd formula is below; drawing a graph here would only cost memory.
    with torch.no_grad():
        result = reference.reverse_chain(
            *operands, seed=seed, step=step, sample_ids=sample_ids, stream=stream, noisy=noisy
        )
    return result.contiguous()


def _fake(initial: Tensor, *rest: Any) -> Tensor:
    return initial.new_empty(initial.shape)


# All operands but the coefficients.
_op = define("reverse_chain", _SCHEMA + " -> Tensor", _reference, _fake, autocast={*range(17)} - {3})
implement_with_triton("reverse_chain", "reverse_chain", "reverse_chain")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    flat: list[Tensor] = []
    lengths: list[int | None] = []
    for value in inputs[:-2]:
        lengths.append(len(value) if isinstance(value, (list, tuple)) else None)
        flat.extend(value if isinstance(value, (list, tuple)) else [value])
    ctx.save_for_backward(*flat)
    ctx.lengths, (ctx.stream, ctx.noisy) = lengths, inputs[-2:]


def _backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Any, ...]:
    # The chain is a prediction op: its activations are not kept but computed once more, from the definition.
    kept = iter(saved)
    nested: list[Any] = [next(kept) if n is None else [next(kept) for _ in range(n)] for n in ctx.lengths]
    operands, (seed, step, sample_ids) = nested[:_DIFFERENTIABLE], nested[_DIFFERENTIABLE:]
    with torch.enable_grad():
        leaves: list[Any] = [
            [t.detach().requires_grad_() for t in value] if isinstance(value, list) else value.detach().requires_grad_()
            for value in operands
        ]
        result = reference.reverse_chain(
            *leaves, seed=seed, step=step, sample_ids=sample_ids, stream=ctx.stream, noisy=ctx.noisy
        )
    flat = [t for value in leaves for t in (value if isinstance(value, list) else [value])]
    # A chain of no step is of nothing.
    found = torch.autograd.grad(result, flat, grad, allow_unused=True) if result.requires_grad else [None] * len(flat)
    gradients = iter(found)
    shaped = [[next(gradients) for _ in value] if isinstance(value, list) else next(gradients) for value in leaves]
    return *shaped, *(None,) * 5


torch.library.register_autograd(
    "seda_fast::reverse_chain", differentiable_once("reverse_chain", _backward), setup_context=_setup_context
)


def check_weights(
    weights: ChainWeights, dim: int, condition_dim: int, modulation: Tensor, device: torch.device
) -> None:
    """Refuse weights of a network, or a modulation (n, L, 3, d), of the wrong shape, dtype or device.

    Raises:
        ValueError: one sentence that names the argument.
    """
    check_tensor(weights.w_x, "w_x", (None, dim), device, "floating")
    width, blocks = weights.w_x.shape[0], len(weights.w_h)
    check_tensor(modulation, "modulation", (None, blocks, 3, width), device, "floating")
    check_tensor(weights.w_c, "w_c", (width, condition_dim), device, "floating")
    if blocks == 0 or not len(weights.b_h) == len(weights.w_o) == len(weights.b_o) == blocks:
        raise ValueError("w_h, b_h, w_o and b_o must hold one tensor for each block, and at least one")
    check_tensor(weights.w_h[0], "w_h[0]", (None, width), device, "floating")
    hidden = weights.w_h[0].shape[0]
    shapes: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("b_x", weights.b_x, (width,)),
        ("b_c", weights.b_c, (width,)),
        ("w_g", weights.w_g, (blocks * hidden, width)),
        ("b_g", weights.b_g, (blocks * hidden,)),
        ("w_y", weights.w_y, (dim, width)),
        ("b_y", weights.b_y, (dim,)),
    ]
    for i in range(blocks):
        shapes += [
            (f"w_h[{i}]", weights.w_h[i], (hidden, width)),
            (f"b_h[{i}]", weights.b_h[i], (hidden,)),
            (f"w_o[{i}]", weights.w_o[i], (width, hidden)),
            (f"b_o[{i}]", weights.b_o[i], (width,)),
        ]
    for name, tensor, shape in shapes:
        check_tensor(tensor, name, shape, device, "floating")


def reverse_chain(
    initial: Tensor,
    source: Tensor,
    condition: Tensor,
    coefficients: Tensor,
    modulation: Tensor,
    weights: ChainWeights,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    sample_ids: Tensor,
    stream: int,
    noisy: bool = True,
) -> Tensor:
    """Reverse diffusion of one stage with clean-target prediction; one affine update serves every sampler::

        x0_hat  = PFIN(x, condition, tau_i)
        x      <- a_i * x0_hat + b_i * x + c_i * source + e_i * eps_i    # (a, b, c, e, w)_i = coefficients[i]
        result += w_i * x0_hat

    DDIM (Song et al. 2021, eq. 12, eta = 0) and re-noising the source are tables; see
    `NoiseSchedule.sampler`.

    Args:
        initial: state at the first timestep, times that timestep's input gain, (B, D) floating.
        source: what the sampler may re-noise, (B, D).
        condition: (B, Dc).
        coefficients: (S, 5), the input gain sqrt(alpha_bar) absorbed.
        modulation: (S, L, 3, d): shift, scale, alpha of each step and block.
        weights: the network's weights.
        seed, sample_ids, stream: key eps_i as in `q_sample`, at counter step ``step + 1 + i``.
        noisy: False promises that all e are 0, and draws no normals.

    Returns:
        The stage's result, (B, D).

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    check_tensor(initial, "initial", (None, None), None, "floating")
    (batch, dim), device = initial.shape, initial.device
    check_tensor(source, "source", (batch, dim), device, "floating")
    check_tensor(condition, "condition", (batch, None), device, "floating")
    check_tensor(coefficients, "coefficients", (None, 5), device, "floating")
    check_tensor(sample_ids, "sample_ids", (batch,), device, "int64")
    check_stream(stream)
    check_weights(weights, dim, condition.shape[1], modulation, device)
    if modulation.shape[0] != coefficients.shape[0]:
        raise ValueError(f"modulation has {modulation.shape[0]} steps but coefficients has {coefficients.shape[0]}")
    return _op(  # type: ignore[no-any-return]
        initial,
        source,
        condition,
        coefficients,
        modulation,
        *weights[:6],
        *(list(group) for group in weights[6:10]),
        *weights[10:],
        as_counter(seed, "seed", device),
        as_counter(step, "step", device),
        sample_ids,
        stream,
        noisy,
    )
