"""Projection on the CPU: blocks of logits by products, the rest in C++ (csrc/cpu/projection.cpp)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._cpp import implement_with_cpp, product
from .._cpp import rows as as_rows
from ..projection import _reference, _reference_backward

# A block of logits: at most so many classes, and rows for 1 MiB of float32 (the second cache's order).
_BLOCK_CLASSES = 512
_BLOCK_LOGITS = 2**18
# A block that makes gradients too: its rows have all classes, for 4 MiB of float32. With fewer rows the weights and the
# sum over rows go through the products too often.
_GRADIENT_LOGITS, _FEWEST_ROWS = 2**20, 128


def _blocks(batch: int, classes: int) -> Iterator[tuple[slice, slice]]:
    """Slices of classes and rows that together cover all logits; rows are the inner loop."""
    wide = max(1, min(classes, _BLOCK_CLASSES))
    tall = max(1, _BLOCK_LOGITS // wide)
    for first in range(0, classes, wide):
        for row in range(0, batch, tall):
            yield slice(first, min(first + wide, classes)), slice(row, min(row + tall, batch))


def semantic_projection(
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
    """The op ``seda_fast::semantic_projection``: a block of logits lives until its sums are taken.

    With ``gradient`` it lives until its share of the gradients is, too.
    """
    cpp = torch.ops.seda_fast_cpp
    (batch, _), classes = features.shape, weight.shape[0]
    state = torch.tensor([-torch.inf, 0.0, 0.0, 0.0], dtype=torch.float32).repeat(batch, 1)
    found: tuple[Tensor, ...] = tuple(features.new_empty(0) for _ in range(3))
    if gradient:
        found = _losses_and_gradients(
            features, labels, weight, bias, temperature, label_smoothing, ignore_index, feature_gradient, state
        )
    else:
        for columns, rows in _blocks(batch, classes):
            logits = product(features[rows], weight[columns].t(), bias[columns])
            cpp.logits_block(logits, labels[rows], columns.start, classes, temperature, ignore_index, state[rows])
    losses = cpp.projection_losses(
        state,
        as_rows(features),
        labels,
        None if centres is None else as_rows(centres),
        classes,
        label_smoothing,
        ignore_index,
    )
    return *losses, *found


def _losses_and_gradients(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    feature_gradient: bool,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill ``state`` as `logits_block` does, and return the gradients of the cross entropy.

    Blocks have all classes of some rows, so that their sums are whole while the logits are there.
    """
    cpp, (batch, dim), classes, dtype = torch.ops.seda_fast_cpp, features.shape, weight.shape[0], features.dtype
    scale = 1.0 / (max(1, int((labels != ignore_index).sum())) * temperature)
    d_features = torch.empty(batch if feature_gradient else 0, dim, dtype=dtype)
    # The first block's product is not added, where the total has its dtype.
    assigned = batch > 0 and dtype == torch.float32
    d_weight = (torch.empty if assigned else torch.zeros)(weight.shape, dtype=torch.float32)
    d_bias = torch.zeros(bias.shape, dtype=torch.float32)
    tall = max(_FEWEST_ROWS, _GRADIENT_LOGITS // max(1, classes))
    for row in range(0, batch, tall):
        rows = slice(row, min(row + tall, batch))
        logits = product(features[rows], weight.t(), bias)
        cpp.logits_block(logits, labels[rows], 0, classes, temperature, ignore_index, state[rows])
        normaliser = state[rows, 0] + state[rows, 1].log()
        d_bias += cpp.logits_block_backward(
            logits, labels[rows], 0, classes, temperature, ignore_index, normaliser, scale, label_smoothing
        )
        if feature_gradient:
            product(logits, weight, out=d_features[rows])
        if row == 0 and assigned:
            product(logits.t(), features[rows], out=d_weight)
        else:
            _add_product(d_weight, logits.t(), features[rows])
    empty = features.new_empty(0)
    return d_features if feature_gradient else empty, d_weight.to(dtype), d_bias.to(dtype)


def semantic_projection_backward(
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
    """The op ``seda_fast::semantic_projection_backward``; the logits are made again, block by block."""
    cpp, (batch, dim), dtype = torch.ops.seda_fast_cpp, features.shape, features.dtype
    labelled = max(1, int((labels != ignore_index).sum()))
    scale = float(grad_entropy) / (labelled * temperature)
    d_features, d_weight, d_bias = (
        torch.zeros(shape, dtype=torch.float32) for shape in ((batch, dim), weight.shape, bias.shape)
    )
    for columns, rows in _blocks(batch, weight.shape[0]):
        logits = product(features[rows], weight[columns].t(), bias[columns])
        d_bias[columns] += cpp.logits_block_backward(
            logits,
            labels[rows],
            columns.start,
            weight.shape[0],
            temperature,
            ignore_index,
            log_normaliser[rows],
            scale,
            label_smoothing,
        )
        _add_product(d_features[rows], logits, weight[columns])
        _add_product(d_weight[columns], logits.t(), features[rows])
    d_centres = features.new_empty(0)
    if centres is not None:
        pull = 2 * float(grad_centre) / (labelled * max(dim, 1))
        d_centres = cpp.centre_backward(
            as_rows(features), as_rows(centres), labels, ignore_index, pull, centre_gradient, d_features
        ).to(dtype)
    return d_features.to(dtype), d_centres, d_weight.to(dtype), d_bias.to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in place; the total is float32 even where the factors are bfloat16."""
    if a.dtype == total.dtype:
        product(a, b, out=total, adds=True)
    else:
        total.add_(torch.mm(a, b))


implement_with_cpp("semantic_projection", semantic_projection, slice(5), _reference)
implement_with_cpp("semantic_projection_backward", semantic_projection_backward, slice(2, 7), _reference_backward)
