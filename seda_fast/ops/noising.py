"""Noising: ``x = signal[tau] * x0 + noise[tau] * eps`` eps from the counter generator and never in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._dispatch import as_counter, check_stream, check_tensor, define
from ._triton import implement_with_triton


def _reference(
    x0: Tensor,
    timesteps: Tensor,
    signal: Tensor,
    noise: Tensor,
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    stream: int,
) -> Tensor:
    keys: dict[str, Any] = {"seed": seed, "step": step, "sample_ids": sample_ids, "stream": stream}
    return reference.q_sample(x0, timesteps, signal, noise, **keys).contiguous()


def _reference_backward(grad: Tensor, timesteps: Tensor, signal: Tensor) -> Tensor:
    return reference.q_sample_backward(grad, timesteps, signal).contiguous()


def _fake(x0: Tensor, *rest: Any) -> Tensor:
    return x0.new_empty(x0.shape)


def _fake_backward(grad: Tensor, timesteps: Tensor, signal: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


_op = define(
    "q_sample",
    "(Tensor x0, Tensor timesteps, Tensor signal, Tensor noise, Tensor seed, Tensor step, Tensor sample_ids, "
    "int stream) -> Tensor",
    _reference,
    _fake,
    autocast={0},
    rows=(1, 2),
)
_backward_op = define(
    "q_sample_backward",
    "(Tensor grad, Tensor timesteps, Tensor signal) -> Tensor",
    _reference_backward,
    _fake_backward,
)
implement_with_triton("q_sample", "noising", "q_sample")
implement_with_triton("q_sample_backward", "noising", "q_sample_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    timesteps, signal = ctx.saved_tensors
    return _backward_op(grad, timesteps, signal), *(None,) * 7


def _setup_context_of_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward_of_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Each element of a gradient is scaled, and so is that of its own gradient.
    return _backward_op(grad, *ctx.saved_tensors), None, None


torch.library.register_autograd("seda_fast::q_sample", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "seda_fast::q_sample_backward", _backward_of_backward, setup_context=_setup_context_of_backward
)


def q_sample(
    x0: Tensor,
    timesteps: Tensor,
    signal: Tensor,
    noise: Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    sample_ids: Tensor,
    stream: int = 0,
) -> Tensor:
    """Forward diffusion of clean features in one pass (Ho et al. 2020, eq. 4).

    Args:
        x0: clean features, (B, D), float32, float64, bfloat16 or float16.
        timesteps: (B,), int32 or int64, in 0 .. T-1.
        signal: (T,) floating, factor of x0 by timestep. No gradient flows to the tables.
        noise: (T,) floating, factor of the standard normal eps by timestep.
        seed: key of the counter generator, int or int64 tensor of shape ().
        step: counter word 2, int or int64 tensor of shape ().
        sample_ids: (B,) int64, non-negative: row i's noise depends on ``(seed, step, sample_ids[i], stream)``
            alone.
        stream: 0 .. 255; 0 visual noise, 1 textual noise, 4 and 5 the reverse chains' initial noise.

    Returns:
        (B, D) in x0's dtype, contiguous.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or a table requires a gradient.
    """
    check_tensor(x0, "x0", (None, None), None, "floating")
    check_tensor(timesteps, "timesteps", (x0.shape[0],), x0.device, "integer")
    check_tensor(signal, "signal", (None,), x0.device, "floating")
    check_tensor(noise, "noise", (signal.shape[0],), x0.device, "floating")
    check_tensor(sample_ids, "sample_ids", (x0.shape[0],), x0.device, "int64")
    check_stream(stream)
    if signal.requires_grad or noise.requires_grad:
        raise ValueError("signal and noise must not require a gradient: the schedule is not learned")
    return _op(  # type: ignore[no-any-return]
        x0,
        timesteps,
        signal,
        noise,
        as_counter(seed, "seed", x0.device),
        as_counter(step, "step", x0.device),
        sample_ids,
        stream,
    )
