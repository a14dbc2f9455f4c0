"""Semantic projection: centre loss and cross entropy in one pass over the features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._dispatch import check_tensor, define, differentiable_once, forced
from ._triton import implement_with_triton


def _reference(
    features: Tensor,
    labels: Tensor,
    centres: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    gradient: bool = False,
    feature_gradient: bool = False,
) -> tuple[Tensor, ...]:
    settings: dict[str, Any] = {
        "temperature": temperature,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
    }
    losses = reference.semantic_projection_forward(features, labels, centres, weight, bias, **settings)
    if not gradient:
        return *losses, *(features.new_empty(0) for _ in range(3))
    one, zero = losses[1].new_ones(()), losses[1].new_zeros(())
    d_features, _, d_weight, d_bias = reference.semantic_projection_backward(
        zero, one, features, labels, None, weight, bias, losses[2], **settings, centre_gradient=False
    )
    return *losses, d_features if feature_gradient else features.new_empty(0), d_weight, d_bias


def _reference_backward(
    grad_centre: Tensor,
    grad_entropy: Tensor,
    features: Tensor,
    labels: Tensor,
    centres: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    log_normaliser: Tensor,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    centre_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_features, d_centres, d_weight, d_bias = reference.semantic_projection_backward(
        grad_centre,
        grad_entropy,
        features,
        labels,
        centres,
        weight,
        bias,
        log_normaliser,
        temperature=temperature,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        centre_gradient=centre_gradient,
    )
    # A schema cannot return "maybe a tensor"; an empty one stands in.
    return d_features, features.new_empty(0) if d_centres is None else d_centres, d_weight, d_bias


def _fake(
    features: Tensor,
    labels: Tensor,
    centres: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    gradient: bool = False,  # PyTorch leaves out arguments that have their default
    feature_gradient: bool = False,
) -> tuple[Tensor, ...]:
    compute = torch.promote_types(features.dtype, torch.float32)
    return (
        features.new_empty((), dtype=compute),
        features.new_empty((), dtype=compute),
        features.new_empty(features.shape[:1], dtype=compute),
        features.new_empty(features.shape if gradient and feature_gradient else 0),
        weight.new_empty(weight.shape if gradient else 0),
        bias.new_empty(bias.shape if gradient else 0),
    )


def _fake_backward(
    grad_centre: Tensor,
    grad_entropy: Tensor,
    features: Tensor,
    labels: Tensor,
    centres: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        features.new_empty(features.shape),
        centres.new_empty(centres.shape) if centres is not None and rest[-1] else features.new_empty(0),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    )


_op = define(
    "semantic_projection",
    "(Tensor features, Tensor labels, Tensor? centres, Tensor weight, Tensor bias, float temperature, "
    "float label_smoothing, int ignore_index, bool gradient=False, bool feature_gradient=False) "
    "-> (Tensor centre_loss, Tensor cross_entropy, Tensor log_normaliser, Tensor features, Tensor weight, "
    "Tensor bias)",
    _reference,
    _fake,
    autocast={0, 2, 3, 4},
)
_backward_op = define(
    "semantic_projection_backward",
    "(Tensor grad_centre, Tensor grad_entropy, Tensor features, Tensor labels, Tensor? centres, "
    "Tensor weight, Tensor bias, Tensor log_normaliser, float temperature, float label_smoothing, "
    "int ignore_index, bool centre_gradient) "
    "-> (Tensor features, Tensor centres, Tensor weight, Tensor bias)",
    _reference_backward,
    _fake_backward,
)
implement_with_triton("semantic_projection", "projection", "semantic_projection")
implement_with_triton("semantic_projection_backward", "projection", "semantic_projection_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, labels, centres, weight, bias, *settings, gradient, feature_gradient = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.has_centres = centres is not None
    # Category centres are a buffer as a rule; their (K, D) gradient is made only for whoever asks.
    ctx.centre_gradient = ctx.has_centres and ctx.needs_input_grad[2]
    ctx.gradient, ctx.feature_gradient = gradient, feature_gradient
    kept = [weight, bias, output[2], *output[3:]]
    ctx.save_for_backward(features, labels, *([centres] if centres is not None else []), *kept)
    ctx.settings = settings


def _backward(
    ctx: Any,
    saved: tuple[Tensor, ...],
    grad_centre: Tensor | None,
    grad_entropy: Tensor | None,
    *unused: Tensor | None,
) -> tuple[Tensor | None, ...]:
    asked = grad_centre if grad_entropy is None else grad_entropy
    if asked is None:
        return (None,) * 10
    # Zeros for the loss that nobody differentiates; PyTorch itself would make some for every output.
    grad_centre = asked.new_zeros(()) if grad_centre is None else grad_centre
    grad_entropy = asked.new_zeros(()) if grad_entropy is None else grad_entropy
    features, labels, *middle, weight, bias, log_normaliser, d_features, d_weight, d_bias = saved
    centres = middle[0] if ctx.has_centres else None
    if ctx.gradient and not ctx.centre_gradient:
        scale = grad_entropy.to(features.dtype)
        found = scale * d_features if ctx.feature_gradient else None
        if found is not None and centres is not None:
            _add_centre_gradient(found, grad_centre, features, labels, centres, ctx.settings[-1])
        return found, None, None, scale * d_weight, scale * d_bias, *(None,) * 5
    d_features, d_centres, d_weight, d_bias = _backward_op(
        grad_centre,
        grad_entropy,
        features,
        labels,
        centres,
        weight,
        bias,
        log_normaliser,
        *ctx.settings,
        ctx.centre_gradient,
    )
    return d_features, None, d_centres if ctx.centre_gradient else None, d_weight, d_bias, *(None,) * 5


def _add_centre_gradient(
    total: Tensor, grad: Tensor, features: Tensor, labels: Tensor, centres: Tensor, ignore_index: int
) -> None:
    """Add to ``total`` (B, D) the gradient of the centre loss with respect to the features."""
    labelled = labels != ignore_index
    away = centres.to(features.dtype).index_select(0, labels.masked_fill(~labelled, 0).long()).sub_(features)
    away.masked_fill_(~labelled[:, None], 0)  # the class in the place of none may have a centre that is not finite
    pull = -2 * grad / (labelled.sum().clamp(min=1) * max(features.shape[1], 1))
    total.addcmul_(away, (pull * labelled)[:, None].to(features.dtype))


torch.library.register_autograd(
    "seda_fast::semantic_projection",
    differentiable_once("semantic_projection", _backward),
    setup_context=_setup_context,
)


def semantic_projection(
    features: Tensor,
    labels: Tensor,
    centres: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    cosine: bool = False,
) -> tuple[Tensor, Tensor]:
    """Centre loss (SeDA, DCSL) and class cross entropy of features in the semantic space.

    Args:
        features: f, (B, D) floating.
        labels: y, (B,) int32 or int64, in 0 .. K-1 or ``ignore_index``.
        centres: P, (K, D), category centres; None leaves the centre loss at 0.
        weight: (K, D). bias: (K,). logits = linear(f, weight, bias) / temperature.
        temperature: positive. label_smoothing: in [0, 1). ignore_index: label of rows that do not count.
        cosine: take the cosine of features and weight in place of their product; the centre loss keeps the
            features as they are.

    Returns:
        ``(centre_loss, cross_entropy)``, two scalars of at least float32: means over the labelled rows, the
        first over dimensions too; both 0 when no row is labelled.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or is out of range.
    """
    check_tensor(features, "features", (None, None), None, "floating")
    (batch, dim), device = features.shape, features.device
    check_tensor(labels, "labels", (batch,), device, "integer")
    if not torch.iinfo(labels.dtype).min <= ignore_index <= torch.iinfo(labels.dtype).max:
        raise ValueError(f"ignore_index is {ignore_index}, which no label of {labels.dtype} can be")
    check_tensor(weight, "weight", (None, dim), device, "floating")
    check_tensor(bias, "bias", (weight.shape[0],), device, "floating")
    if dim == 0 or weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one class and one feature, not shape {tuple(weight.shape)}")
    if centres is not None:
        check_tensor(centres, "centres", (weight.shape[0], dim), device, "floating")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
    settings = (float(temperature), float(label_smoothing), ignore_index)
    if cosine:
        # The rows' lengths cost one pass over each operand, little beside the product.
        unit, prototypes = reference.unit_rows(features), reference.unit_rows(weight)
        gradient = _wants_gradient(unit, prototypes, bias)
        centre_loss, cross_entropy, *_ = _op(unit, labels, None, prototypes, bias, *settings, *gradient)
        if centres is not None:
            centre_loss = reference.centre_loss(features, labels, centres, ignore_index)
        return centre_loss, cross_entropy
    gradient = _wants_gradient(features, weight, bias)
    centre_loss, cross_entropy, *_ = _op(features, labels, centres, weight, bias, *settings, *gradient)
    return centre_loss, cross_entropy


def _wants_gradient(features: Tensor, weight: Tensor, bias: Tensor) -> tuple[bool, bool]:
    """Whether the forward should leave the entropy's gradients, and the features' among them.

    A CPU makes them from a block of logits while it is there, which spares the backward a product; a GPU's kernels make
    the logits again. So does a CPU in float16, whose gradients need the loss's scale before they are rounded.
    """
    if features.is_cuda or forced() == "triton" or not torch.is_grad_enabled():
        return False, False
    half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else features.dtype
    if half == torch.float16:
        return False, False
    return features.requires_grad or weight.requires_grad or bias.requires_grad, features.requires_grad
