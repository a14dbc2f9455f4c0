"""The optimiser's step: clipping, AdamW and the moving average of the weights in one pass over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ._dispatch import check_tensor, choose, define, describe, forced

# The backends' files read it here, and are so registered after it.
_reference = reference.weight_update
_norm_op = define(
    "gradient_norm",
    "(Tensor[] grads) -> Tensor",
    reference.gradient_norm,
    lambda grads: grads[0].new_empty(()),
)
_op = define(
    "weight_update",
    "(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] average, "
    "Tensor(e!)[] steps, Tensor norm, float clip_norm, float learning_rate, float beta1, float beta2, float epsilon, "
    "float weight_decay, float moved) -> ()",
    _reference,
    lambda *args: None,
)


def _check_alike(tensors: Sequence[Tensor], name: str) -> None:
    """Refuse what is not at least one floating tensor, all of one dtype and device."""
    if not tensors:
        raise ValueError(f"{name} must hold at least one tensor")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name}[{i}] must be a floating tensor, not {describe(tensor)}")
        first = tensors[0]
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            here, there = (f"{t.dtype} on {t.device}" for t in (tensor, first))
            raise ValueError(f"{name}[{i}] is {here} but {name}[0] is {there}")


def _check_like(tensors: Sequence[Tensor], name: str, weights: Sequence[Tensor]) -> None:
    if len(tensors) != len(weights):
        raise ValueError(f"{name} must hold {len(weights)} tensors, not {len(tensors)}")
    for i, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (weight.shape, weight.dtype):
            wanted = f"a {weight.dtype} tensor of shape {tuple(weight.shape)}"
            raise ValueError(f"{name}[{i}] must be {wanted}, not {describe(tensor)}")
        if tensor.device != weight.device:
            raise ValueError(f"{name}[{i}] is on {tensor.device} but its weight is on {weight.device}")


def updates_in_one_pass(weights: Sequence[Tensor]) -> bool:
    """Whether compiled code serves `weight_update` here: C++, for contiguous float32 on the CPU.

    The reference goes over the weights many times; `torch.optim.AdamW` is faster than it.
    """
    fits = all(w.device.type == "cpu" and w.dtype == torch.float32 and w.is_contiguous() for w in weights)
    # Another forced backend has no code for it, or is the reference.
    return fits and forced() in ("auto", "cpp") and choose("weight_update", "cpu", torch.float32)[0] == "cpp"


def gradient_norm(grads: Sequence[Tensor]) -> Tensor:
    """Norm of all gradients together, the same bits for any number of threads.

    Args:
        grads: at least one tensor of any shape, floating, all of one dtype and device.

    Returns:
        () in their dtype.

    Raises:
        ValueError: there is none, or one is not floating or of another dtype or device than the first.
    """
    _check_alike(grads, "grads")
    return _norm_op(list(grads))  # type: ignore[no-any-return]


def weight_update(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    average: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    norm: Tensor,
    clip_norm: float,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    moved: float,
) -> None:
    """One step of AdamW in place, on clipped gradients, and of the moving average of its result.

    What `torch.nn.utils.clip_grad_norm_`, `torch.optim.AdamW` and `torch.lerp` do one after the other, except that
    the gradients keep their values. See `reference.weight_update`.

    Args:
        weights: tensors of any shape, floating, all of one dtype and device. Not recorded by autograd.
        grads, exp_avg, exp_avg_sq, average: gradients, both moments and moving averages, like the weights.
        steps: numbers of steps so far, each () float32; counted up.
        norm: () of the weights' dtype, of all gradients of the model, see `gradient_norm`.
        clip_norm: gradients are scaled down to this norm where theirs is larger.
        moved: share of the way to the new weight that the average goes; 1 makes it the weight.

    Raises:
        ValueError: an argument has the wrong length, shape, dtype or device, or a setting lies outside its range.
    """
    lists = {"grads": grads, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "average": average}
    _check_alike(weights, "weights")
    first = weights[0]
    for name, tensors in lists.items():
        _check_like(tensors, name, weights)
    if len(steps) != len(weights):
        raise ValueError(f"steps must hold {len(weights)} tensors, not {len(steps)}")
    for i, step in enumerate(steps):
        check_tensor(step, f"steps[{i}]", (), first.device, "floating")
    check_tensor(norm, "norm", (), first.device, "floating")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), not {betas}")
    if not 0 <= moved <= 1:
        raise ValueError(f"moved must be in [0, 1], not {moved}")
    numbers = (clip_norm, learning_rate, *betas, epsilon, weight_decay, moved)
    with torch.no_grad():
        _op(*map(list, (weights, grads, exp_avg, exp_avg_sq, average, steps)), norm, *map(float, numbers))
    # The registered op does not tell autograd by itself that these values changed.
    torch.autograd.graph.increment_version([*weights, *exp_avg, *exp_avg_sq, *average, *steps])
