"""Projection on the CPU: blocks of logits by the vendor's GEMM, the rest in C++ (csrc/cpu/projection.cpp)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._cpp import implement_with_cpp
from .._cpp import rows as as_rows
from ..projection import _reference, _reference_backward

# A block of logits: at most so many classes, and rows for 1 MiB of float32 (the second cache's order).
_BLOCK_CLASSES = 512
_BLOCK_LOGITS = 2**18


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``seda_fast::semantic_projection``: a block of logits lives until its sums are taken."""
    cpp = torch.ops.seda_fast_cpp
    (batch, _), classes = features.shape, weight.shape[0]
    state = torch.tensor([-torch.inf, 0.0, 0.0, 0.0]).repeat(batch, 1)
    for columns, rows in _blocks(batch, classes):
        logits = torch.addmm(bias[columns], features[rows], weight[columns].t())
        cpp.logits_block(logits, labels[rows], columns.start, classes, temperature, ignore_index, state[rows])
    return cpp.projection_losses(  # type: ignore[no-any-return]
        state,
        as_rows(features),
        labels,
        None if centres is None else as_rows(centres),
        classes,
        label_smoothing,
        ignore_index,
    )


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
    d_features = torch.zeros(batch, dim)
    d_weight, d_bias = torch.zeros(weight.shape), torch.zeros(bias.shape)
    for columns, rows in _blocks(batch, weight.shape[0]):
        logits = torch.addmm(bias[columns], features[rows], weight[columns].t())
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
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b))


implement_with_cpp("semantic_projection", semantic_projection, slice(5), _reference)
implement_with_cpp("semantic_projection_backward", semantic_projection_backward, slice(2, 7), _reference_backward)
