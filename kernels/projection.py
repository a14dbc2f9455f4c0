"""Semantic projection: centre loss and cross entropy of a class head without the (B, K) logits in memory.

Forward, a program keeps a running log-sum-exp over its share of the classes. Backward, the gradient of the logits is
made again for one chunk of classes and part of the rows at a time, at most 2**24 of them whatever B and K are, in the
features' dtype and before its scaling: numbers in [-1, 1], which half precision holds well. The products for the
features and for the weights read it from there. Products accumulate in float32. A class id outside 0 .. K-1 makes the
cross entropy NaN, and its row's gradient.

On compute capability 9 the products of large heads in half precision read their operands' tiles by descriptors, which
the GPU's own engine copies, elsewhere and for other operands by pointers: one kernel for both, as ``DESCRIPTORS`` says.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .interaction import by_rows, precision
from .tuning import Tile, cdiv, launching_on

# Most logits whose gradient is there at a time: 32 MiB in half precision. Their rows are a multiple of the step, so
# that tiles are full.
LOGITS, ROW_STEP = 2**24, 128
# Where there are several chunks their gradient takes the place of the features' gradient, which is written last; or
# room for so many, where that is smaller.
FEWEST = 2**20
# Most classes of a chunk; the features' gradient of several is added up in float32. With 16 384 rows and 768 features
# 2240 classes leave place for 5504 rows, which is 258 tiles of 128 x 128, two on each of 132 multiprocessors; measured
# on an H100 with 21 841 classes that is 4.9 ms against 5.3 with 1472 and 8192 rows. With the sum and the splits of the
# weight's gradient it takes 4.8 % of the logits in float32, 1431 MB, in which a cross entropy takes them.
CHUNK = 2240
# A chunk's width in memory is a multiple of this, so that the products that read it mask no step over it.
WIDTH_STEP = 64
# Rows of a program that makes losses, and sums of such programs that are added up at a time; and row blocks' sums of a
# bias's gradient.
LOSS_ROWS, LOSS_SUMS, BIAS_SUMS = 8, 1024, 128
# Programs that run at a time, for a large GPU. A constant, so that results do not depend on the device.
MULTIPROCESSORS = 132
# Tiles of the products by descriptors, the fastest of those measured on an H100. Most programs of 4 warps have half the
# registers and shared memory, so that one's product goes beside what follows another's; the normaliser's, which goes on
# with its next tile's copies meanwhile, is faster alone with a large one (686 TFLOP/s of 21 841 classes, against 567).
NORMALISER_TILE, LOGIT_TILE = Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 4, 3)
FEATURE_TILE, CLASS_TILE = Tile(128, 128, 64, 4, 3), Tile(128, 256, 64, 8, 4)


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _factor(tile, PRECISION: tl.constexpr):
    """What a product multiplies: in TF32 float32 rounded to the nearest of 11 significant bits.

    Tensor cores cut the others off instead, which makes every product smaller, by 7e-4 of it in the mean.
    """
    if PRECISION == "tf32":
        rounded = ((tile.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        # A NaN's bits, carried on into its sign, would be those of a number.
        tile = tl.where(tile == tile, rounded, float("nan"))
    return tile


@triton.jit
def _product(
    features, weight, top, rows, first, classes, dim, features_stride, weight_stride,
    DESCRIPTORS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of ``features @ weight.T`` from row ``top`` and class ``first`` on, as its left and its right half.

    What follows a product needs fewer registers half by half. Beyond the last row and class pointers read the last one
    again, so that nothing is masked where BLOCK_K divides ``dim``.
    """
    feature = tl.arange(0, BLOCK_K)
    if not DESCRIPTORS:
        column = first + tl.arange(0, BLOCK_N)
        row = tl.minimum(tl.cast(top, tl.int64) + tl.arange(0, BLOCK_M), rows - 1)
        f_place = features + row[:, None] * features_stride + feature[None, :]
        w_place = weight + tl.minimum(column, classes - 1).to(tl.int64)[None, :] * weight_stride + feature[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, dim, BLOCK_K):
        if DESCRIPTORS:
            f = features.load([top, start])
            w = weight.load([first, start]).T
        elif EVEN:
            f = tl.load(f_place + start)
            w = tl.load(w_place + start)
        else:
            f = tl.load(f_place + start, mask=(start + feature < dim)[None, :], other=0.0)
            w = tl.load(w_place + start, mask=(start + feature < dim)[:, None], other=0.0)
        f, w = _factor(f, PRECISION), _factor(w.to(f.dtype), PRECISION)
        acc = tl.dot(f, w, acc, input_precision=PRECISION)
    return _halves(acc, BLOCK_M, BLOCK_N)


@triton.jit
def _logits(product, bias_ptr, column, classes, inverse):
    """``(product + bias) * inverse``; -inf beyond the last class."""
    bias = tl.load(bias_ptr + column, mask=column < classes, other=float("-inf")).to(tl.float32)
    return (product + bias[None, :]) * tl.cast(inverse, tl.float32)


@triton.jit
def _join(
    largest, exponentials, total, product, bias_ptr, first, classes, inverse, SMOOTHED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The running largest logit, sum of exponentials relative to it, and sum, joined with those of more classes."""
    column = first + tl.arange(0, BLOCK_N)
    logits = _logits(product, bias_ptr, column, classes, inverse)
    if SMOOTHED:
        total += tl.sum(tl.where((column < classes)[None, :], logits, 0.0), axis=1)
    larger = tl.maximum(largest, tl.max(logits, axis=1))
    # Where a bias of minus infinity leaves out all classes so far, the difference of two infinities would be no number.
    base = tl.where(larger > float("-inf"), larger, 0.0)
    exponentials = exponentials * tl.exp(largest - base) + tl.sum(tl.exp(logits - base[:, None]), axis=1)
    return larger, exponentials, total


# fmt: off
@triton.jit
def normaliser_kernel(
    features, weight, bias_ptr, partial_ptr,
    rows, dim, classes, features_stride, weight_stride, inverse, classes_per_split,
    SMOOTHED: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """Of one share of the classes: largest logit, sum of exponentials relative to it, sum of logits if ``SMOOTHED``."""
    top = tl.program_id(0) * BLOCK_M
    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    exponentials = tl.zeros((BLOCK_M,), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    begin = tl.program_id(1) * classes_per_split
    for first in tl.range(begin, tl.minimum(begin + classes_per_split, classes), BLOCK_N, flatten=DESCRIPTORS):
        one, other = _product(
            features, weight, top, rows, first, classes, dim, features_stride, weight_stride,
            DESCRIPTORS, EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        largest, exponentials, total = _join(
            largest, exponentials, total, one, bias_ptr, first, classes, inverse, SMOOTHED, BLOCK_N // 2
        )
        largest, exponentials, total = _join(
            largest, exponentials, total, other, bias_ptr, first + BLOCK_N // 2, classes, inverse, SMOOTHED,
            BLOCK_N // 2,
        )  # fmt: skip
    row = tl.cast(top, tl.int64) + tl.arange(0, BLOCK_M)
    place = partial_ptr + tl.program_id(1).to(tl.int64) * 3 * rows + row
    tl.store(place, largest, mask=row < rows)
    tl.store(place + rows, exponentials, mask=row < rows)
    if SMOOTHED:
        tl.store(place + 2 * rows, total, mask=row < rows)


# fmt: off
@triton.jit
def row_loss_kernel(
    partial_ptr, features_ptr, labels_ptr, centres_ptr, weight_ptr, bias_ptr, normaliser_ptr, sums_ptr,
    rows, dim, classes, splits, features_stride, centres_stride, weight_stride, inverse, smoothing, ignore_index,
    CENTRES: tl.constexpr, SMOOTHED: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """Join the shares of the classes; BLOCK_M rows' squared distances to their centres, cross entropies, and number.

    Ignored rows count for none of the three.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.arange(0, SPLITS)
    inside = (row < rows)[:, None] & (split < splits)[None, :]
    place = partial_ptr + split[None, :].to(tl.int64) * 3 * rows + row[:, None]
    largest = tl.load(place, mask=inside, other=float("-inf"))
    overall = tl.where(row < rows, tl.max(largest, axis=1), 0.0)
    shares = tl.load(place + rows, mask=inside, other=0.0) * tl.exp(largest - overall[:, None])
    normaliser = overall + tl.log(tl.where(row < rows, tl.sum(shares, axis=1), 1.0))
    tl.store(normaliser_ptr + row, normaliser, mask=row < rows)

    label = tl.load(labels_ptr + row, mask=row < rows, other=ignore_index).to(tl.int64)
    labelled = label != ignore_index
    known = (label >= 0) & (label < classes)
    counted = labelled & known
    squares = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, dim, BLOCK_N):
        feature = start + tl.arange(0, BLOCK_N)
        here = counted[:, None] & (feature < dim)[None, :]
        f = tl.load(features_ptr + row[:, None] * features_stride + feature[None, :], mask=here, other=0.0)
        # The true logit once more, of what the normaliser's products multiply: picked out of a tile of logits it would
        # cost as much for each of them.
        w = tl.load(weight_ptr + label[:, None] * weight_stride + feature[None, :], mask=here, other=0.0)
        products += _factor(f, PRECISION).to(tl.float32) * _factor(w.to(f.dtype), PRECISION).to(tl.float32)
        if CENTRES:
            c = tl.load(centres_ptr + label[:, None] * centres_stride + feature[None, :], mask=here, other=0.0)
            away = f.to(tl.float32) - c.to(tl.float32)
            squares += away * away
    bias = tl.load(bias_ptr + label, mask=counted, other=0.0).to(tl.float32)
    true = (tl.sum(products, axis=1) + bias) * tl.cast(inverse, tl.float32)
    smoothing = tl.cast(smoothing, tl.float32)
    entropy = normaliser - (1.0 - smoothing) * true
    if SMOOTHED:
        entropy -= smoothing * tl.sum(tl.load(place + 2 * rows, mask=inside, other=0.0), axis=1) / classes
    entropy = tl.where(known, entropy, float("nan"))
    block, blocks = tl.program_id(0), tl.num_programs(0)
    tl.store(sums_ptr + block, tl.sum(tl.sum(squares, axis=1), axis=0))
    tl.store(sums_ptr + blocks + block, tl.sum(tl.where(labelled, entropy, 0.0), axis=0))
    tl.store(sums_ptr + 2 * blocks + block, tl.sum((label != ignore_index).to(tl.float32), axis=0))


@triton.jit
def mean_kernel(sums_ptr, centre_ptr, entropy_ptr, blocks, dim, BLOCK: tl.constexpr):
    """Both losses: means over the labelled rows, summed in a fixed order by one program."""
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    entropy = tl.zeros((BLOCK,), dtype=tl.float32)
    labelled = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        squares += tl.load(sums_ptr + block, mask=block < blocks, other=0.0)
        entropy += tl.load(sums_ptr + blocks + block, mask=block < blocks, other=0.0)
        labelled += tl.load(sums_ptr + 2 * blocks + block, mask=block < blocks, other=0.0)
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


@triton.jit
def _put_logit_gradient(
    product, bias_ptr, normaliser, target, labelled, out, bias_sums_ptr, block, row, rows, left, first_class, classes,
    chunk, inverse, smoothing, SMOOTHED: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``softmax - smoothed target`` from a tile of the product, and its sums over the rows."""
    column = left + tl.arange(0, BLOCK_N)
    logits = _logits(product, bias_ptr, first_class + column, classes, inverse)
    grad = tl.exp(logits - normaliser[:, None])
    if SMOOTHED:
        grad -= tl.where(first_class + column < classes, smoothing / classes, 0.0)[None, :]
    grad = tl.where(column[None, :] == target[:, None], grad - (1.0 - smoothing), grad)
    grad = tl.where(labelled[:, None], grad, 0.0)
    tl.store(bias_sums_ptr + block * chunk + column, tl.sum(grad, axis=0), mask=column < chunk)
    if DESCRIPTORS:
        out.store([block * BLOCK_M, left], grad.to(out.dtype))
    else:
        inside = (row < rows)[:, None] & (column < chunk)[None, :]
        tl.store(out + row[:, None] * chunk + column[None, :], grad.to(out.dtype.element_ty), mask=inside)


# fmt: off
@triton.jit
def logit_gradient_kernel(
    features, labels_ptr, weight, bias_ptr, normaliser_ptr, out, bias_sums_ptr,
    rows, dim, classes, first_class, chunk, features_stride, weight_stride,
    inverse, smoothing, ignore_index, SMOOTHED: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """``softmax - smoothed target`` for the ``chunk`` classes from ``first_class``, and its sums over BLOCK_M rows.

    0 in ignored rows, and where ``chunk`` reaches beyond the last class.
    """
    blocks = tl.cdiv(chunk, BLOCK_N)
    block = tl.program_id(0) // blocks
    left = (tl.program_id(0) % blocks) * BLOCK_N
    row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    label = tl.load(labels_ptr + row, mask=row < rows, other=ignore_index).to(tl.int64)
    known = (label >= 0) & (label < classes)
    normaliser = tl.load(normaliser_ptr + row, mask=row < rows, other=0.0)
    normaliser = tl.where(known, normaliser, float("nan"))
    # Compared with every column of a tile, in 32 bits.
    target = tl.where(known, label - first_class, -1).to(tl.int32)
    labelled = label != ignore_index
    smoothing = tl.cast(smoothing, tl.float32)
    one, other = _product(
        features, weight, block * BLOCK_M, rows, first_class + left, classes, dim, features_stride, weight_stride,
        DESCRIPTORS, EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    _put_logit_gradient(
        one, bias_ptr, normaliser, target, labelled, out, bias_sums_ptr, block, row, rows, left, first_class,
        classes, chunk, inverse, smoothing, SMOOTHED, DESCRIPTORS, BLOCK_M, BLOCK_N // 2,
    )  # fmt: skip
    _put_logit_gradient(
        other, bias_ptr, normaliser, target, labelled, out, bias_sums_ptr, block, row, rows, left + BLOCK_N // 2,
        first_class, classes, chunk, inverse, smoothing, SMOOTHED, DESCRIPTORS, BLOCK_M, BLOCK_N // 2,
    )  # fmt: skip


@triton.jit
def _pull(
    features_ptr, labels_ptr, centres_ptr, factors_ptr, row, rows, feature, inside, classes, features_stride,
    centres_stride, ignore_index,
):  # fmt: skip
    """The centre loss's gradient for a tile of the features, 0 for a label that is no class."""
    label = tl.load(labels_ptr + row, mask=row < rows, other=ignore_index).to(tl.int64)
    pulled = inside & ((label != ignore_index) & (label >= 0) & (label < classes))[:, None]
    f = tl.load(features_ptr + row[:, None] * features_stride + feature[None, :], mask=pulled, other=0.0)
    c = tl.load(centres_ptr + label[:, None] * centres_stride + feature[None, :], mask=pulled, other=0.0)
    return (f.to(tl.float32) - c.to(tl.float32)) * tl.load(factors_ptr)


@triton.jit
def _put_features(
    acc, features_ptr, labels_ptr, centres_ptr, factors_ptr, sum_ptr, out_ptr,
    row, rows, feature, dim, classes, features_stride, centres_stride, ignore_index,
    WHOLE: tl.constexpr, FIRST: tl.constexpr, CENTRES: tl.constexpr,
):  # fmt: skip
    """Part of a tile of the features' gradient: scaled and pulled if ``WHOLE``, else added to the other chunks'."""
    inside = (row < rows)[:, None] & (feature < dim)[None, :]
    place = row[:, None] * dim + feature[None, :]
    if WHOLE:
        acc *= tl.load(factors_ptr + 1)
        if CENTRES:
            acc += _pull(
                features_ptr, labels_ptr, centres_ptr, factors_ptr, row, rows, feature, inside, classes,
                features_stride, centres_stride, ignore_index,
            )  # fmt: skip
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        if not FIRST:
            acc += tl.load(sum_ptr + place, mask=inside, other=0.0)
        tl.store(sum_ptr + place, acc, mask=inside)


# fmt: off
@triton.jit
def feature_gradient_kernel(
    logit_grad, weight, features_ptr, labels_ptr, centres_ptr, factors_ptr, sum_ptr, out_ptr,
    rows, dim, classes, first_class, chunk, features_stride, weight_stride, centres_stride, ignore_index,
    WHOLE: tl.constexpr, FIRST: tl.constexpr, CENTRES: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """Add one chunk's share to the features' gradient; ``WHOLE``: scale it and add the pull of the centres."""
    blocks = tl.cdiv(dim, BLOCK_N)
    top = (tl.program_id(0) // blocks) * BLOCK_M
    left = (tl.program_id(0) % blocks) * BLOCK_N
    row = tl.cast(top, tl.int64) + tl.arange(0, BLOCK_M)
    feature = left + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, chunk, BLOCK_K):
        # The chunk's gradient is 0 beyond the last class, whose weights stand in.
        w_row = tl.minimum(first_class + start + column, classes - 1).to(tl.int64)[:, None] * weight_stride
        if DESCRIPTORS:
            grad = logit_grad.load([top, start])
            w = weight.load([first_class + start, left])
        else:
            grad = tl.load(logit_grad + tl.minimum(row, rows - 1)[:, None] * chunk + (start + column)[None, :])
            if EVEN:
                w = tl.load(weight + w_row + feature[None, :])
            else:
                w = tl.load(weight + w_row + feature[None, :], mask=(feature < dim)[None, :], other=0.0)
        acc = tl.dot(grad, w.to(grad.dtype), acc, input_precision=PRECISION)
    one, other = _halves(acc, BLOCK_M, BLOCK_N)
    feature = left + tl.arange(0, BLOCK_N // 2)
    _put_features(
        one, features_ptr, labels_ptr, centres_ptr, factors_ptr, sum_ptr, out_ptr, row, rows, feature, dim, classes,
        features_stride, centres_stride, ignore_index, WHOLE, FIRST, CENTRES,
    )  # fmt: skip
    _put_features(
        other, features_ptr, labels_ptr, centres_ptr, factors_ptr, sum_ptr, out_ptr, row, rows, feature + BLOCK_N // 2,
        dim, classes, features_stride, centres_stride, ignore_index, WHOLE, FIRST, CENTRES,
    )  # fmt: skip


@triton.jit
def _put_sum(acc, sums_ptr, row, columns, feature, dim, ADD: tl.constexpr):
    """Store a tile, or add it to what is there."""
    inside = (row < columns)[:, None] & (feature < dim)[None, :]
    place = sums_ptr + row.to(tl.int64)[:, None] * dim + feature[None, :]
    if ADD:
        acc += tl.load(place, mask=inside, other=0.0)
    tl.store(place, acc, mask=inside)


# fmt: off
@triton.jit
def class_gradient_kernel(
    logit_grad, features, sums_ptr, rows, dim, chunk, features_stride, rows_per_split,
    ADD: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """Over one split of the rows ``logit_grad.T @ features`` (chunk, dim), float32; ``ADD``: to what is there."""
    blocks = tl.cdiv(dim, BLOCK_N)
    top = (tl.program_id(0) // blocks) * BLOCK_M
    left = (tl.program_id(0) % blocks) * BLOCK_N
    column = top + tl.arange(0, BLOCK_M)
    feature = left + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(split * rows_per_split, tl.minimum(rows, (split + 1) * rows_per_split), BLOCK_K):
        row = start + tl.arange(0, BLOCK_K).to(tl.int64)
        if DESCRIPTORS:
            grad = logit_grad.load([start, top])
            f = features.load([start, left])
        elif EVEN:
            grad = tl.load(logit_grad + row[:, None] * chunk + column[None, :])
            f = tl.load(features + row[:, None] * features_stride + feature[None, :])
        else:
            inside = (row < rows)[:, None] & (column < chunk)[None, :]
            grad = tl.load(logit_grad + row[:, None] * chunk + column[None, :], mask=inside, other=0.0)
            inside = (row < rows)[:, None] & (feature < dim)[None, :]
            f = tl.load(features + row[:, None] * features_stride + feature[None, :], mask=inside, other=0.0)
        acc = tl.dot(tl.trans(grad), f, acc, input_precision=PRECISION)
    one, other = _halves(acc, BLOCK_M, BLOCK_N)
    sums_ptr += split.to(tl.int64) * chunk * dim
    feature = left + tl.arange(0, BLOCK_N // 2)
    _put_sum(one, sums_ptr, column, chunk, feature, dim, ADD)
    _put_sum(other, sums_ptr, column, chunk, feature + BLOCK_N // 2, dim, ADD)


@triton.jit
def class_sums_kernel(
    sums_ptr, bias_sums_ptr, factor_ptr, weight_ptr, bias_ptr, splits, blocks, chunk, width, dim,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of the first ``width`` classes: splits of the weights' and row blocks of the bias's, in their order."""
    factor = tl.load(factor_ptr)
    entries = width * tl.cast(dim, tl.int64)
    programs = tl.cdiv(entries, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    if program < programs:
        place = program * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for split in range(splits):
            own = sums_ptr + tl.cast(split, tl.int64) * chunk * dim
            total += tl.load(own + place, mask=place < entries, other=0.0)
        tl.store(weight_ptr + place, (total * factor).to(weight_ptr.dtype.element_ty), mask=place < entries)
    else:
        column = (program - programs) * BLOCK_N + tl.arange(0, BLOCK_N)
        bias_sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, blocks, BLOCK_M):
            block = start + tl.arange(0, BLOCK_M)
            inside = (block < blocks)[:, None] & (column < width)[None, :]
            bias_sums += tl.load(bias_sums_ptr + block[:, None] * chunk + column[None, :], mask=inside, other=0.0)
        grad = tl.sum(bias_sums, axis=0) * factor
        tl.store(bias_ptr + column, grad.to(bias_ptr.dtype.element_ty), mask=column < width)


# fmt: off
@triton.jit
def scale_and_pull_kernel(
    sum_ptr, features_ptr, labels_ptr, centres_ptr, factors_ptr, out_ptr,
    rows, dim, classes, features_stride, centres_stride, ignore_index,
    CENTRES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """The features' gradient from its sum over the chunks: scaled, and with the pull of the centres."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (feature < dim)[None, :]
    place = row[:, None] * dim + feature[None, :]
    grad = tl.load(sum_ptr + place, mask=inside, other=0.0) * tl.load(factors_ptr + 1)
    if CENTRES:
        grad += _pull(
            features_ptr, labels_ptr, centres_ptr, factors_ptr, row, rows, feature, inside, classes, features_stride,
            centres_stride, ignore_index,
        )  # fmt: skip
    tl.store(out_ptr + place, grad.to(out_ptr.dtype.element_ty), mask=inside)


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

# For each kind of call, its kernels as Triton compiled them.
Ready = dict[object, Any]
_ready: dict[object, Ready] = {}
# More kinds than a run has; beyond them all are looked up anew.
KINDS = 256


def ready_for(device: torch.device, tensors: tuple[Tensor | None, ...], *numbers: object) -> Ready:
    """What was compiled for calls like this one: the same device, sizes and strides, dtypes, alignments and numbers."""
    seen = [(t.dtype, t.shape, t.stride(), t.data_ptr() % 16) for t in tensors if t is not None]
    kind = (device, len(tensors), *seen, *numbers)
    if len(_ready) >= KINDS:
        _ready.clear()
    return _ready.setdefault(kind, {})


def _launch(
    ready: Ready,
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[object, ...],
    constants: dict[str, Any],
    options: dict[str, int],
    *varying: int,
) -> None:
    """Launch a kernel, after the first time as it was compiled then.

    Triton looks at every argument to find the compiled kernel, which on the host takes most of a launch's time. What it
    would find is the same in calls of one kind but for constants, options and the numbers ``varying``. In the
    interpreter it finds none.
    """
    key = (kernel, *constants.values(), *options.values(), *varying)
    found = ready.get(key)
    if found is None:
        ready[key] = kernel[grid](*arguments, **constants, **options)
    else:
        found[grid](*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :]))


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
    none = features.new_empty(0), features.new_empty(0), features.new_empty(0)
    (rows, dim), classes = features.shape, weight.shape[0]
    centre_loss, entropy = (torch.empty((), dtype=torch.float32, device=features.device) for _ in range(2))
    normaliser = torch.empty((rows,), dtype=torch.float32, device=features.device)
    if rows == 0:
        return centre_loss.zero_(), entropy.zero_(), normaliser, *none
    features, weight, labels, bias = by_rows(features), by_rows(weight), labels.contiguous(), bias.contiguous()
    given = features if centres is None else by_rows(centres)
    row_blocks = cdiv(rows, LOSS_ROWS)
    sums = torch.empty((3, row_blocks), dtype=torch.float32, device=features.device)
    smoothed, inverse = label_smoothing != 0, 1 / temperature
    strides = features.stride(0), given.stride(0), weight.stride(0)
    with launching_on(features):
        ready = ready_for(features.device, (features, labels, centres, weight, bias), ignore_index)
        partial = _normalisers(ready, features, weight, bias, inverse, smoothed)
        splits = partial.shape[0]
        _launch(
            ready, row_loss_kernel, (row_blocks, 1, 1),
            (
                partial, features, labels, given, weight, bias, normaliser, sums,
                rows, dim, classes, splits, *strides, inverse, label_smoothing, ignore_index,
            ),
            {
                "CENTRES": centres is not None, "SMOOTHED": smoothed, "SPLITS": 1 << (splits - 1).bit_length(),
                "PRECISION": precision(features.dtype), "BLOCK_M": LOSS_ROWS, "BLOCK_N": 256,
            },
            {}, splits,
        )  # fmt: skip
        arguments = (sums, centre_loss, entropy, row_blocks, dim)
        _launch(ready, mean_kernel, (1, 1, 1), arguments, {"BLOCK": LOSS_SUMS}, {}, row_blocks)
    return centre_loss, entropy, normaliser, *none


def _normalisers(
    ready: Ready, features: Tensor, weight: Tensor, bias: Tensor, inverse: float, smoothed: bool
) -> Tensor:
    """What `normaliser_kernel` finds in every share of the classes: float32 (shares, 3, B)."""
    (rows, dim), classes = features.shape, weight.shape[0]
    tiles = tiles_for(NORMALISER_TILE, features, weight)

    def launch(tile: Tile) -> Tensor:
        described = tile is NORMALISER_TILE
        # Few row blocks leave multiprocessors idle, so the classes are shared out too.
        blocks, class_tiles = cdiv(rows, tile.m), cdiv(classes, tile.n)
        tiles_per_split = cdiv(class_tiles, min(class_tiles, max(1, _programs(tile) // blocks)))
        splits, share = cdiv(class_tiles, tiles_per_split), tiles_per_split * tile.n
        partial = torch.empty((splits, 3, rows), dtype=torch.float32, device=features.device)
        arguments = (
            *_operands(described, (features, (tile.m, tile.k)), (weight, (tile.n, tile.k))), bias, partial,
            rows, dim, classes, features.stride(0), weight.stride(0), inverse, share,
        )  # fmt: skip
        constants = {
            "SMOOTHED": smoothed,
            "DESCRIPTORS": described,
            "EVEN": dim % tile.k == 0,
            "PRECISION": precision(features.dtype),
            **tile.sizes(),
        }
        _launch(ready, normaliser_kernel, (blocks, splits, 1), arguments, constants, tile.options(), share)
        return partial

    variant = f"PRECISION={precision(features.dtype)} SMOOTHED={smoothed}"
    tile = tuning.choose("normaliser_kernel", features, (rows, classes, dim), tiles, launch, variant)
    # As it stands among the tiles: one that was read from the disk is another object.
    return launch(tiles[tiles.index(tile)])


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
    factors = torch.empty((2,), dtype=torch.float32, device=features.device)
    settings = (1 / temperature, label_smoothing, ignore_index)
    normaliser = log_normaliser.contiguous()
    tensors = (grad_centre, grad_entropy, features, labels, centres, weight, bias, normaliser)
    ready = ready_for(features.device, tensors, ignore_index)
    head = Head(features, labels, centres, weight, bias, normaliser, factors, settings, ready)
    with launching_on(features):
        arguments = (grad_centre, grad_entropy, labels, factors, rows, dim, 1 / temperature, ignore_index)
        _launch(ready, factors_kernel, (1, 1, 1), arguments, {"BLOCK": 1024}, {})
        _product_gradients(head, grad_features, grad_weight, grad_bias)
        grad_centres = features.new_empty(0)
        if wanted is not None and centres is not None:
            grad_centres = _centre_gradient(features, labels, centres, factors, ignore_index)
    return grad_features, grad_centres, grad_weight, grad_bias


class Head(NamedTuple):
    """What the backward's kernels read."""

    features: Tensor
    labels: Tensor
    centres: Tensor | None
    weight: Tensor
    bias: Tensor
    normaliser: Tensor
    factors: Tensor
    # 1 / temperature, label smoothing, the label of ignored rows.
    settings: tuple[float, float, int]
    ready: Ready

    @property
    def given(self) -> Tensor:
        """The centres, or what stands in their place where no kernel reads them."""
        return self.features if self.centres is None else self.centres


class Part(NamedTuple):
    """Some of the rows; ``total`` and ``out`` are their sum of the features' gradient and the gradient itself."""

    number: int
    features: Tensor
    labels: Tensor
    normaliser: Tensor
    total: Tensor
    out: Tensor


def _product_gradients(head: Head, grad_features: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Gradients of features, weight and bias, chunk by chunk of the classes and part by part of the rows."""
    (rows, dim), classes = head.features.shape, head.weight.shape[0]
    chunk, part_rows = chunks(rows, dim, classes)
    whole, device = chunk == classes, head.features.device
    # Where there are several chunks the features' gradient is written at the end, and its place is free till then.
    room, free = part_rows * _aligned(chunk), grad_features.view(-1)
    if whole or free.numel() < room:
        free = torch.empty((room,), dtype=grad_features.dtype, device=device)
    total = torch.empty((0,) if whole else (rows, dim), dtype=torch.float32, device=device)
    parts = []
    for number, top in enumerate(range(0, rows, part_rows)):
        own = slice(top, top + part_rows)
        kept = (total, grad_features[own]) if whole else (total[own], grad_features)
        parts.append(Part(number, head.features[own], head.labels[own], head.normaliser[own], *kept))
    for first in range(0, classes, chunk):
        own = slice(first, min(first + chunk, classes))
        sums = class_sums(head.features, head.weight, own.stop - first, part_rows)
        for part in parts:
            logit_grad = free[: part.features.shape[0] * sums.chunk].view(-1, sums.chunk)
            _logit_gradient(head, part, logit_grad, sums, first)
            _feature_gradient(head, part, logit_grad, first, sums.described, whole=whole)
            # One part after the other, in float32: a fixed order.
            _class_gradient(head, part, logit_grad, sums)
        _put_class_gradients(head, sums, grad_weight[own], grad_bias[own])
        del sums  # before the next chunk's are made
    if not whole:
        _scale_and_pull(head, total, grad_features)


class ClassSums(NamedTuple):
    """Float32 sums of the classes' gradients: ``weight`` (splits, chunk, dim), ``bias`` (row blocks, chunk)."""

    weight: Tensor
    bias: Tensor
    rows_per_split: int
    # Tiles of the weight's gradient and of the logits', and whether they are read through descriptors.
    tile: Tile
    logit_tile: Tile
    described: bool
    # Row blocks of a part of the rows.
    blocks: int

    @property
    def chunk(self) -> int:
        """The chunk's width in memory."""
        return self.weight.shape[1]


def class_sums(features: Tensor, weight: Tensor, width: int, part_rows: int) -> ClassSums:
    """Room for the gradients of ``width`` classes' weights and biases over parts of ``part_rows`` rows."""
    (rows, dim), device = features.shape, features.device
    chunk = _aligned(width)
    logit_tile = tuning.by_shape(tiles_for(LOGIT_TILE, features, weight), part_rows, width)
    described = logit_tile is LOGIT_TILE
    tile = CLASS_TILE if described else _class_tile(features.dtype)
    splits = max(1, min(_programs(tile) // tile.programs(chunk, dim), part_rows // (4 * tile.k)))
    per_split = cdiv(cdiv(part_rows, splits), tile.k) * tile.k
    blocks = cdiv(part_rows, logit_tile.m)
    sums = torch.empty((cdiv(part_rows, per_split), chunk, dim), dtype=torch.float32, device=device)
    bias = torch.empty((blocks * cdiv(rows, part_rows), chunk), dtype=torch.float32, device=device)
    return ClassSums(sums, bias, per_split, tile, logit_tile, described, blocks)


def chunks(rows: int, dim: int, classes: int) -> tuple[int, int]:
    """How many classes and how many rows there are in a chunk."""
    # Chunks of one size, but for the last.
    chunk = min(classes, _aligned(cdiv(classes, cdiv(classes, CHUNK))))
    room = LOGITS if chunk == classes else min(LOGITS, max(rows * dim, FEWEST))
    most = max(1, room // (_aligned(chunk) * ROW_STEP)) * ROW_STEP
    # Parts of one size, but for the last.
    parts = cdiv(rows, most)
    return chunk, min(rows, cdiv(cdiv(rows, parts), ROW_STEP) * ROW_STEP)


def _aligned(width: int) -> int:
    """A chunk's width in memory: whole steps of the features' product, so that it masks none."""
    return cdiv(width, WIDTH_STEP) * WIDTH_STEP


def tiles_for(large: Tile, features: Tensor, weight: Tensor) -> tuple[Tile, ...]:
    """The tiles for a product of (rows, classes) logits: first the large one, where it can be read by descriptors."""
    # With 128 classes a tile it spills on sm_100.
    tiles = tuning.candidates(features.dtype, columns=64)
    return (large, *tiles) if has_descriptors(features, weight) else tiles


def has_descriptors(features: Tensor, weight: Tensor) -> bool:
    """Whether the tensors can be read by the GPU's own engine for tiles, and it gives a program what those take."""
    if features.dtype == torch.float32 or weight.dtype != features.dtype or not descriptors_on(features.device):
        return False
    return all(map(_described, (features, weight)))


def _described(matrix: Tensor) -> bool:
    """Whether a matrix in half precision has contiguous rows, at 16 bytes each, none of them twice."""
    rows, features = matrix.stride()
    return features == 1 and matrix.data_ptr() % 16 == 0 and rows % 8 == 0 and rows >= matrix.shape[1]


@functools.cache
def descriptors_on(device: torch.device) -> bool:
    """Whether ``device`` is of compute capability 9, which has them and gives a program 227 KiB of shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _operands(described: bool, *parts: tuple[Tensor, tuple[int, int]]) -> list[object]:
    """Matrices as a kernel takes them: by descriptors of their tiles, or by their first element."""
    if not described:
        return [tensor for tensor, _ in parts]
    return [TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block)) for tensor, block in parts]


def _programs(tile: Tile) -> int:
    """Programs that the multiprocessors of a large GPU run at a time: two each with 4 warps."""
    return 2 * MULTIPROCESSORS if tile.warps == 4 else MULTIPROCESSORS


def _class_tile(dtype: torch.dtype) -> Tile:
    return tuning.FLOAT_WEIGHT_TILE if dtype == torch.float32 else tuning.HALF_WEIGHT_TILE


def _logit_gradient(head: Head, part: Part, out: Tensor, sums: ClassSums, first: int) -> None:
    weight, tile, (rows, dim) = head.weight, sums.logit_tile, part.features.shape
    features, w, put = _operands(
        sums.described, (part.features, (tile.m, tile.k)), (weight, (tile.n, tile.k)), (out, (tile.m, tile.n // 2))
    )
    # A last part that is smaller has programs without a row: their sums are 0.
    grid = (sums.blocks * cdiv(sums.chunk, tile.n), 1, 1)
    arguments = (
        features, part.labels, w, head.bias, part.normaliser, put, sums.bias[part.number * sums.blocks :],
        rows, dim, weight.shape[0], first, sums.chunk, part.features.stride(0), weight.stride(0), *head.settings,
    )  # fmt: skip
    constants = {
        "SMOOTHED": head.settings[1] != 0,
        "DESCRIPTORS": sums.described,
        "EVEN": dim % tile.k == 0,
        "PRECISION": precision(part.features.dtype),
        **tile.sizes(),
    }
    _launch(head.ready, logit_gradient_kernel, grid, arguments, constants, tile.options(), rows, sums.chunk)


def _feature_gradient(
    head: Head, part: Part, logit_grad: Tensor, first: int, described: bool, *, whole: bool
) -> None:
    weight, given, chunk, (rows, dim) = head.weight, head.given, logit_grad.shape[1], part.features.shape

    def launch(tile: Tile) -> None:
        grad, w = _operands(described, (logit_grad, (tile.m, tile.k)), (weight, (tile.k, tile.n)))
        arguments = (
            grad, w, part.features, part.labels, given, head.factors, part.total, part.out,
            rows, dim, weight.shape[0], first, chunk, part.features.stride(0), weight.stride(0), given.stride(0),
            head.settings[2],
        )  # fmt: skip
        constants = {
            "WHOLE": whole,
            "FIRST": first == 0,
            "CENTRES": head.centres is not None,
            "DESCRIPTORS": described,
            "EVEN": dim % tile.n == 0,
            "PRECISION": precision(part.features.dtype),
            **tile.sizes(),
        }
        grid = (tile.programs(rows, dim), 1, 1)
        _launch(head.ready, feature_gradient_kernel, grid, arguments, constants, tile.options(), rows, chunk)

    tiles = tuning.candidates(weight.dtype)
    if described:
        launch(FEATURE_TILE)
    elif not whole:  # it adds to what is there, so that it cannot be timed
        launch(tuning.by_shape(tiles, rows, dim))
    else:
        variant = f"PRECISION={precision(part.features.dtype)} CENTRES={head.centres is not None}"
        launch(tuning.choose("feature_gradient_kernel", weight, (rows, dim, chunk), tiles, launch, variant))


def _class_gradient(head: Head, part: Part, logit_grad: Tensor, sums: ClassSums) -> None:
    tile, (rows, dim), (splits, chunk, _) = sums.tile, part.features.shape, sums.weight.shape
    grad, features = _operands(sums.described, (logit_grad, (tile.k, tile.m)), (part.features, (tile.k, tile.n)))
    arguments = grad, features, sums.weight, rows, dim, chunk, part.features.stride(0), sums.rows_per_split
    constants = {
        "ADD": part.number > 0,
        "DESCRIPTORS": sums.described,
        "EVEN": sums.described or (rows % tile.k == 0 and chunk % tile.m == 0 and dim % tile.n == 0),
        "PRECISION": precision(part.features.dtype),
        **tile.sizes(),
    }
    grid = (tile.programs(chunk, dim), splits, 1)
    varying = rows, chunk, sums.rows_per_split
    _launch(head.ready, class_gradient_kernel, grid, arguments, constants, tile.options(), *varying)


def _put_class_gradients(head: Head, sums: ClassSums, grad_weight: Tensor, grad_bias: Tensor) -> None:
    (splits, chunk, dim), width, blocks = sums.weight.shape, grad_weight.shape[0], sums.bias.shape[0]
    arguments = (
        sums.weight, sums.bias, head.factors[1:], grad_weight, grad_bias, splits, blocks, chunk, width, dim,
    )  # fmt: skip
    constants = {"BLOCK": 1024, "BLOCK_M": BIAS_SUMS, "BLOCK_N": 32}
    grid = (cdiv(width * dim, 1024) + cdiv(width, 32), 1, 1)
    _launch(head.ready, class_sums_kernel, grid, arguments, constants, {}, splits, blocks, chunk, width)


def _scale_and_pull(head: Head, total: Tensor, out: Tensor) -> None:
    features, given, (rows, dim) = head.features, head.given, head.features.shape
    arguments = (
        total, features, head.labels, given, head.factors, out,
        rows, dim, head.weight.shape[0], features.stride(0), given.stride(0), head.settings[2],
    )  # fmt: skip
    constants = {"CENTRES": head.centres is not None, "BLOCK_M": 8, "BLOCK_N": 256}
    _launch(head.ready, scale_and_pull_kernel, (cdiv(rows, 8), cdiv(dim, 256), 1), arguments, constants, {})


def _centre_gradient(features: Tensor, labels: Tensor, centres: Tensor, factors: Tensor, ignore_index: int) -> Tensor:
    rows, dim = features.shape
    ordered, order = torch.sort(labels, stable=True)
    out = centres.new_zeros(centres.shape)
    centre_gradient_kernel[rows, cdiv(dim, 256)](
        features, ordered, order, centres, factors, out,
        rows, dim, centres.shape[0], features.stride(0), centres.stride(0), ignore_index, BLOCK_M=4, BLOCK_N=256,
    )  # fmt: skip
    return out
