"""Semantic projection: centre loss and cross entropy of a class head without the (B, K) logits in memory.

Forward, a program keeps a running log-sum-exp over its share of the classes. Backward, the gradient of the logits is
there for one chunk of rows and classes at a time, at most 2**22 of them whatever B and K are, in the features' dtype
and before its scaling: numbers in [-1, 1], which half precision holds well. Products accumulate in float32. A class id
outside 0 .. K-1 makes the cross entropy NaN, and its row's gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .interaction import Splits, add_weight_gradient, by_rows, precision, put_weight_gradient, splits_for
from .tuning import launching_on

# Most logits whose gradient is there at a time: 8 MiB in half precision, and enough work for a launch (11 us of
# products at 768 features and 600 TFLOP/s). Their rows are a multiple of the step, so that tiles are full.
LOGITS, ROW_STEP = 2**22, 128
# Up to so many classes are one chunk: the features' gradient is then not added up in memory, which costs 8 bytes an
# element and chunk.
WHOLE = 1024
# Classes of a chunk where there are several. With 16 384 rows, 768 features and 21 841 classes its gradient, the
# float32 sum of the features' gradient and those of the splits are 4.7 % of the logits in float32, 1431 MB, in which a
# cross entropy takes them; of logits in half precision it is 9.4 %.
CHUNK = 512


@triton.jit
def _logits(
    features_ptr, weight_ptr, bias_ptr, row, rows, column, classes, dim, features_stride, weight_stride, inverse,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of ``(features @ weight.T + bias) * inverse``, float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, dim, BLOCK_K):
        feature = start + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (feature < dim)[None, :]
        f = tl.load(features_ptr + row[:, None] * features_stride + feature[None, :], mask=inside, other=0.0)
        inside = (feature < dim)[:, None] & (column < classes)[None, :]
        place = weight_ptr + column[None, :].to(tl.int64) * weight_stride + feature[:, None]
        w = tl.load(place, mask=inside, other=0.0)
        acc = tl.dot(f, w.to(f.dtype), acc, input_precision=PRECISION)
    bias = tl.load(bias_ptr + column, mask=column < classes, other=0.0).to(tl.float32)
    return (acc + bias[None, :]) * tl.cast(inverse, tl.float32)


# fmt: off
@triton.jit
def normaliser_kernel(
    features_ptr, labels_ptr, weight_ptr, bias_ptr, partial_ptr,
    rows, dim, classes, features_stride, weight_stride, inverse, classes_per_split,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """Of one share of the classes: largest logit, sum of exponentials relative to it, sum of logits, true logit."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    label = tl.load(labels_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    exponentials = tl.zeros((BLOCK_M,), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    true = tl.zeros((BLOCK_M,), dtype=tl.float32)
    first = tl.program_id(1) * classes_per_split
    for start in range(first, tl.minimum(first + classes_per_split, classes), BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        logits = _logits(
            features_ptr, weight_ptr, bias_ptr, row, rows, column, classes, dim, features_stride, weight_stride,
            inverse, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        here = (column < classes)[None, :]
        total += tl.sum(tl.where(here, logits, 0.0), axis=1)
        true += tl.sum(tl.where(column[None, :] == label[:, None], logits, 0.0), axis=1)
        logits = tl.where(here, logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        exponentials = exponentials * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger[:, None]), axis=1)
        largest = larger
    place = partial_ptr + (tl.program_id(1).to(tl.int64) * rows + row) * 4
    tl.store(place, largest, mask=row < rows)
    tl.store(place + 1, exponentials, mask=row < rows)
    tl.store(place + 2, total, mask=row < rows)
    tl.store(place + 3, true, mask=row < rows)


# fmt: off
@triton.jit
def row_loss_kernel(
    partial_ptr, features_ptr, labels_ptr, centres_ptr, normaliser_ptr, losses_ptr,
    rows, dim, classes, splits, features_stride, centres_stride, smoothing, ignore_index,
    CENTRES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """Join the shares of the classes; each row's cross entropy and squared distance to its centre, 0 if ignored."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.arange(0, SPLITS)
    inside = (row < rows)[:, None] & (split < splits)[None, :]
    place = partial_ptr + (split[None, :].to(tl.int64) * rows + row[:, None]) * 4
    largest = tl.load(place, mask=inside, other=float("-inf"))
    overall = tl.where(row < rows, tl.max(largest, axis=1), 0.0)
    shares = tl.load(place + 1, mask=inside, other=0.0) * tl.exp(largest - overall[:, None])
    normaliser = overall + tl.log(tl.where(row < rows, tl.sum(shares, axis=1), 1.0))
    total = tl.sum(tl.load(place + 2, mask=inside, other=0.0), axis=1)
    true = tl.sum(tl.load(place + 3, mask=inside, other=0.0), axis=1)
    tl.store(normaliser_ptr + row, normaliser, mask=row < rows)

    label = tl.load(labels_ptr + row, mask=row < rows, other=ignore_index).to(tl.int64)
    labelled = label != ignore_index
    known = (label >= 0) & (label < classes)
    smoothing = tl.cast(smoothing, tl.float32)
    entropy = normaliser - (1.0 - smoothing) * true - smoothing * total / classes
    entropy = tl.where(known, entropy, float("nan"))
    tl.store(losses_ptr + row * 2 + 1, tl.where(labelled, entropy, 0.0), mask=row < rows)
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if CENTRES:
        for start in range(0, dim, BLOCK_N):
            feature = start + tl.arange(0, BLOCK_N)
            counted = (labelled & known & (row < rows))[:, None] & (feature < dim)[None, :]
            f = tl.load(features_ptr + row[:, None] * features_stride + feature[None, :], mask=counted, other=0.0)
            c = tl.load(centres_ptr + label[:, None] * centres_stride + feature[None, :], mask=counted, other=0.0)
            away = f.to(tl.float32) - c.to(tl.float32)
            squares += tl.sum(away * away, axis=1)
    tl.store(losses_ptr + row * 2, squares, mask=row < rows)


@triton.jit
def mean_kernel(losses_ptr, labels_ptr, centre_ptr, entropy_ptr, rows, dim, ignore_index, BLOCK: tl.constexpr):
    """Both losses: means over the labelled rows, summed in a fixed order by one program."""
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    entropy = tl.zeros((BLOCK,), dtype=tl.float32)
    labelled = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        squares += tl.load(losses_ptr + row.to(tl.int64) * 2, mask=row < rows, other=0.0)
        entropy += tl.load(losses_ptr + row.to(tl.int64) * 2 + 1, mask=row < rows, other=0.0)
        label = tl.load(labels_ptr + row, mask=row < rows, other=ignore_index)
        labelled += (label != ignore_index).to(tl.float32)
    count = tl.maximum(tl.sum(labelled, axis=0), 1.0)
    tl.store(centre_ptr, tl.sum(squares, axis=0) / (count * dim))
    tl.store(entropy_ptr, tl.sum(entropy, axis=0) / count)


@triton.jit
def factors_kernel(
    grad_centre_ptr, grad_entropy_ptr, labels_ptr, factors_ptr, rows, dim, inverse, ignore_index, BLOCK: tl.constexpr
):
    """Factors of ``f - centre`` and of the logits' unscaled gradient, from the gradients of the two means."""
    labelled = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        label = tl.load(labels_ptr + row, mask=row < rows, other=ignore_index)
        labelled += (label != ignore_index).to(tl.float32)
    count = tl.maximum(tl.sum(labelled, axis=0), 1.0)
    tl.store(factors_ptr, tl.load(grad_centre_ptr).to(tl.float32) * 2.0 / (count * dim))
    tl.store(factors_ptr + 1, tl.load(grad_entropy_ptr).to(tl.float32) / count * tl.cast(inverse, tl.float32))


# fmt: off
@triton.jit
def logit_gradient_kernel(
    features_ptr, labels_ptr, weight_ptr, bias_ptr, normaliser_ptr, out_ptr,
    rows, dim, classes, first_class, chunk, features_stride, weight_stride, inverse, smoothing, ignore_index,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """``softmax - smoothed target`` for the ``chunk`` classes from ``first_class``; 0 in ignored rows.

    ``chunk`` may reach beyond the last class, so that rows stay aligned: 0 there too.
    """
    blocks = tl.cdiv(chunk, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = first_class + place
    logits = _logits(
        features_ptr, weight_ptr, bias_ptr, row, rows, column, classes, dim, features_stride, weight_stride, inverse,
        PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    normaliser = tl.load(normaliser_ptr + row, mask=row < rows, other=0.0)
    label = tl.load(labels_ptr + row, mask=row < rows, other=ignore_index).to(tl.int64)
    known = (label >= 0) & (label < classes)
    normaliser = tl.where(known, normaliser, float("nan"))
    smoothing = tl.cast(smoothing, tl.float32)
    target = tl.where(column[None, :] == label[:, None], 1.0 - smoothing, 0.0) + smoothing / classes
    grad = tl.exp(logits - normaliser[:, None]) - target
    grad = tl.where((label != ignore_index)[:, None] & (column < classes)[None, :], grad, 0.0)
    inside = (row < rows)[:, None] & (place < chunk)[None, :]
    tl.store(out_ptr + row[:, None] * chunk + place[None, :], grad.to(out_ptr.dtype.element_ty), mask=inside)


# fmt: off
@triton.jit
def feature_gradient_kernel(
    logit_grad_ptr, weight_ptr, features_ptr, labels_ptr, centres_ptr, factors_ptr, sum_ptr, out_ptr,
    rows, dim, classes, first_class, chunk, features_stride, weight_stride, centres_stride, ignore_index,
    FIRST: tl.constexpr, LAST: tl.constexpr, CENTRES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """Add one chunk's share to the features' gradient; the last one scales it and adds the pull of the centres."""
    blocks = tl.cdiv(dim, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, chunk, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (place < chunk)[None, :]
        grad = tl.load(logit_grad_ptr + row[:, None] * chunk + place[None, :], mask=inside, other=0.0)
        inside = (first_class + place < classes)[:, None] & (feature < dim)[None, :]
        w_row = weight_ptr + (first_class + place[:, None]).to(tl.int64) * weight_stride
        w = tl.load(w_row + feature[None, :], mask=inside, other=0.0)
        acc = tl.dot(grad, w.to(grad.dtype), acc, input_precision=PRECISION)
    inside = (row < rows)[:, None] & (feature < dim)[None, :]
    place = row[:, None] * dim + feature[None, :]
    if not FIRST:
        acc += tl.load(sum_ptr + place, mask=inside, other=0.0)
    if LAST:
        acc *= tl.load(factors_ptr + 1)
        if CENTRES:
            label = tl.load(labels_ptr + row, mask=row < rows, other=ignore_index).to(tl.int64)
            pulled = inside & ((label != ignore_index) & (label >= 0) & (label < classes))[:, None]
            f = tl.load(features_ptr + row[:, None] * features_stride + feature[None, :], mask=pulled, other=0.0)
            c = tl.load(centres_ptr + label[:, None] * centres_stride + feature[None, :], mask=pulled, other=0.0)
            acc += (f.to(tl.float32) - c.to(tl.float32)) * tl.load(factors_ptr)
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(sum_ptr + place, acc, mask=inside)


# fmt: off
@triton.jit
def centre_gradient_kernel(
    features_ptr, labels_ptr, order_ptr, centres_ptr, factors_ptr, out_ptr,
    rows, dim, classes, features_stride, centres_stride, ignore_index, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """A class's centre gradient, by the program whose place in the sorted labels is the first of the class."""
    first = tl.program_id(0)
    feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    label = tl.load(labels_ptr + first).to(tl.int64)
    before = tl.load(labels_ptr + first - 1, mask=first > 0, other=ignore_index).to(tl.int64)
    leads = (first == 0) | (before != label)
    if leads & (label != ignore_index) & (label >= 0) & (label < classes):
        centre = tl.load(centres_ptr + label * centres_stride + feature, mask=feature < dim, other=0.0).to(tl.float32)
        pull = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        count = BLOCK_M
        start = first
        while count == BLOCK_M:
            place = start + tl.arange(0, BLOCK_M)
            own = tl.load(labels_ptr + place, mask=place < rows, other=ignore_index).to(tl.int64) == label
            row = tl.load(order_ptr + place, mask=own, other=0)
            inside = own[:, None] & (feature < dim)[None, :]
            f = tl.load(features_ptr + row[:, None] * features_stride + feature[None, :], mask=inside, other=0.0)
            pull += tl.where(inside, centre[None, :] - f.to(tl.float32), 0.0)
            count = tl.sum(own.to(tl.int32), axis=0)
            start += BLOCK_M
        grad = tl.sum(pull, axis=0) * tl.load(factors_ptr)
        tl.store(out_ptr + label * dim + feature, grad.to(out_ptr.dtype.element_ty), mask=feature < dim)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


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
    """Centre loss (), cross entropy () and the rows' log-sum-exp (B,), all float32.

    Behind them three empty tensors: the gradients that another backend's forward leaves are made by the backward here.
    """
    assert not gradient
    none = tuple(features.new_empty(0) for _ in range(3))
    (rows, dim), classes = features.shape, weight.shape[0]
    centre_loss, entropy = (torch.empty((), dtype=torch.float32, device=features.device) for _ in range(2))
    normaliser = torch.empty((rows,), dtype=torch.float32, device=features.device)
    if rows == 0:
        return centre_loss.zero_(), entropy.zero_(), normaliser, *none
    features, weight, labels, bias = by_rows(features), by_rows(weight), labels.contiguous(), bias.contiguous()
    given = features if centres is None else by_rows(centres)
    # With 128 classes a tile it spills on sm_100 under Triton 3.6.
    tile = tuning.by_shape(tuning.candidates(features.dtype, columns=64), rows, classes)
    # Few row blocks leave multiprocessors idle, so the classes are shared out too.
    blocks, class_tiles = triton.cdiv(rows, tile.m), triton.cdiv(classes, tile.n)
    tiles_per_split = triton.cdiv(class_tiles, min(class_tiles, triton.cdiv(tuning.ENOUGH_PROGRAMS, blocks)))
    splits = triton.cdiv(class_tiles, tiles_per_split)
    partial = torch.empty((splits, rows, 4), dtype=torch.float32, device=features.device)
    losses = torch.empty((rows, 2), dtype=torch.float32, device=features.device)
    with launching_on(features):
        normaliser_kernel[blocks, splits](
            features, labels, weight, bias, partial,
            rows, dim, classes, features.stride(0), weight.stride(0), 1 / temperature, tiles_per_split * tile.n,
            PRECISION=precision(features.dtype), **tile.sizes(), **tile.options(),
        )  # fmt: skip
        row_loss_kernel[(triton.cdiv(rows, 8),)](
            partial, features, labels, given, normaliser, losses,
            rows, dim, classes, splits, features.stride(0), given.stride(0), label_smoothing, ignore_index,
            CENTRES=centres is not None, SPLITS=triton.next_power_of_2(splits), BLOCK_M=8, BLOCK_N=256,
        )  # fmt: skip
        mean_kernel[(1,)](losses, labels, centre_loss, entropy, rows, dim, ignore_index, BLOCK=1024)
    return centre_loss, entropy, normaliser, *none


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
    """Gradients of features, centres (empty unless ``centre_gradient``), weight and bias, in their dtypes."""
    (rows, dim), classes = features.shape, weight.shape[0]
    grad_features = torch.empty((rows, dim), dtype=features.dtype, device=features.device)
    grad_weight = torch.empty((classes, dim), dtype=weight.dtype, device=weight.device)
    grad_bias = torch.empty((classes,), dtype=bias.dtype, device=bias.device)
    wanted = centres if centre_gradient else None
    if rows == 0:
        grad_centres = features.new_empty(0) if wanted is None else wanted.new_zeros(wanted.shape)
        return grad_features, grad_centres, grad_weight.zero_(), grad_bias.zero_()
    features, weight, labels, bias = by_rows(features), by_rows(weight), labels.contiguous(), bias.contiguous()
    centres = None if centres is None else by_rows(centres)
    chunk, part_rows = chunks(classes)
    part_rows = min(rows, part_rows)
    logit_grad = torch.empty((part_rows * _aligned(chunk),), dtype=features.dtype, device=features.device)
    total = torch.empty((0,) if chunk == classes else (rows, dim), dtype=torch.float32, device=features.device)
    factors = torch.empty((2,), dtype=torch.float32, device=features.device)
    settings = (1 / temperature, label_smoothing, ignore_index)
    with launching_on(features):
        factors_kernel[(1,)](
            grad_centre, grad_entropy, labels, factors, rows, dim, 1 / temperature, ignore_index, BLOCK=1024
        )
        for first in range(0, classes, chunk):
            width = min(chunk, classes - first)
            splits = class_splits(features, _aligned(width), part_rows, chunk == classes)
            for top in range(0, rows, part_rows):
                part = slice(top, top + part_rows)
                f, y, out = features[part], labels[part], grad_features[part]
                _logit_gradient(f, y, weight, bias, log_normaliser[part], logit_grad, first, width, settings)
                _feature_gradient(
                    logit_grad, weight, f, y, centres, factors, total[part], out, first, width, ignore_index
                )
                # One part after the other, in float32: a fixed order.
                add_weight_gradient(logit_grad, f, splits, first=top == 0)
            own = slice(first, first + width)
            put_weight_gradient(splits, factors[1:], grad_weight[own], grad_bias[own])
            del splits  # before the next chunk's are made
        grad_centres = features.new_empty(0)
        if wanted is not None and centres is not None:
            grad_centres = _centre_gradient(features, labels, centres, factors, ignore_index)
    return grad_features, grad_centres, grad_weight, grad_bias


def chunks(classes: int) -> tuple[int, int]:
    """How many classes and how many rows there are in a chunk, for a head of ``classes``."""
    chunk = classes if classes <= WHOLE else CHUNK
    return chunk, max(1, LOGITS // (_aligned(chunk) * ROW_STEP)) * ROW_STEP


def _aligned(width: int) -> int:
    """A chunk's width in memory: 16 elements, so that its rows begin at 16 bytes in every dtype."""
    return triton.cdiv(width, 16) * 16


def _logit_gradient(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    normaliser: Tensor,
    out: Tensor,
    first: int,
    width: int,
    settings: tuple[float, float, int],
) -> None:
    rows, dim = features.shape
    # With 128 classes a tile the epilogue spills on sm_100.
    tile = tuning.by_shape(tuning.candidates(features.dtype, columns=64), rows, width)
    logit_gradient_kernel[(tile.programs(rows, width),)](
        features, labels, weight, bias, normaliser, out,
        rows, dim, weight.shape[0], first, _aligned(width), features.stride(0), weight.stride(0), *settings,
        PRECISION=precision(features.dtype), **tile.sizes(), **tile.options(),
    )  # fmt: skip


def _feature_gradient(
    logit_grad: Tensor,
    weight: Tensor,
    features: Tensor,
    labels: Tensor,
    centres: Tensor | None,
    factors: Tensor,
    total: Tensor,
    out: Tensor,
    first: int,
    width: int,
    ignore_index: int,
) -> None:
    (rows, dim), classes = features.shape, weight.shape[0]
    given = features if centres is None else centres
    tile = tuning.by_shape(tuning.candidates(features.dtype), rows, dim)
    feature_gradient_kernel[(tile.programs(rows, dim),)](
        logit_grad, weight, features, labels, given, factors, total, out,
        rows, dim, classes, first, _aligned(width), features.stride(0), weight.stride(0), given.stride(0), ignore_index,
        FIRST=first == 0, LAST=first + width == classes, CENTRES=centres is not None,
        PRECISION=precision(features.dtype), **tile.sizes(), **tile.options(),
    )  # fmt: skip


def class_splits(features: Tensor, width: int, rows: int, whole: bool) -> Splits:
    """Room for the gradients of ``width`` classes' weights over parts of ``rows`` rows.

    Where there are more classes than fit one chunk memory counts, and one program for each multiprocessor is enough.
    """
    programs = 2 * tuning.ENOUGH_PROGRAMS if whole else tuning.ENOUGH_PROGRAMS
    return splits_for(features.dtype, (width, features.shape[1]), rows, features.device, programs)


def _centre_gradient(features: Tensor, labels: Tensor, centres: Tensor, factors: Tensor, ignore_index: int) -> Tensor:
    rows, dim = features.shape
    ordered, order = torch.sort(labels, stable=True)
    out = centres.new_zeros(centres.shape)
    centre_gradient_kernel[rows, triton.cdiv(dim, 256)](
        features, ordered, order, centres, factors, out,
        rows, dim, centres.shape[0], features.stride(0), centres.stride(0), ignore_index, BLOCK_M=4, BLOCK_N=256,
    )  # fmt: skip
    return out
