"""The fourth head: a kernel classifier of the visual feature, fitted in closed form before the networks train.

It is the visual head's infinitely wide twin: kernel ridge regression on the class indicators (Saunders, Gammerman &
Vovk 1998; as a classifier Rifkin, Yeo & Poggio 2003) with the neural tangent kernel of one hidden ReLU layer (Jacot,
Gabriel & Hongler 2018). A head of some hundred optimiser steps knows the classes' outlines; this one has seen every row
to the end, and how far it believes single rows (the ridge) and itself (the sharpness) is told by leave-one-out
predictions, which a ridge regression has in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .copies import first_copies
from .linear import placeless_linear, placeless_product
from .multi_label import binary_cross_entropy, labelled_rows
from .precision import WholeBuffers

# Variance of the hidden layer's bias, where a feature's rows have a mean squared length of 1. 0, 0.1 and 1 gave the
# same within noise on features of hundreds of dimensions, 0 less on those of tens.
BIAS = 0.5
RIDGES = tuple(10 ** (k / 2) for k in range(-6, 5))  # 0.001 .. 100
SHARPNESS = tuple(1.1**k for k in range(49))  # 1 .. 97
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the labels, beside what texts say
# The fit takes time that grows with the cube of the rows, and 8 bytes for each pair of them: 8192 rows take half a
# gigabyte. With more there is no such head: of a part of the rows it is worse than the networks, which see all of them
# (fashion_products' 3 500 rows by 2048 of them: 2 points less).
MOST_ROWS = 8192
_MOST_TARGETS = 2**24  # rows times classes
NOTHING_TO_LEAVE_OUT = "it needs two classes, and one with two rows that differ"
NOTHING_TO_CARRY = "it needs a class that two rows that differ carry, and another does not"
# The ridge is found on these many of the rows, by one eigendecomposition. Of 100 artificial classes with 16 rows each a
# quarter of the rows found ridges 3 to 100 times as large as all did where they were whole classes, and 3 to 300 times
# as small where they were drawn at random; top-1 was 0.1 points above to 0.3 below, and 0.2 to 0.8 below.
RIDGE_ROWS = 2048
# Rows a class that those are to have: of 2048 rows of 1000 classes two are of one, and whatever else says something of
# a row's class, as texts do, is believed more than all the rows that a training sees would have it (docs/method.md).
_ROWS_A_CLASS = 32
_ROWS_TOGETHER = 256
_EPS = 1e-12


class _Decision(NamedTuple):
    """``entropy``: of logits and targets (n, K), (n,). ``neither``: a prediction (n, K) of which the logit is 0."""

    entropy: Callable[[Tensor, Tensor], Tensor]
    neither: float


_ONE_CLASS = _Decision(partial(F.cross_entropy, reduction="none"), 0.0)
_YES_OR_NO = _Decision(binary_cross_entropy, 0.5)


def kernel_rows(labels: Tensor, paired: Tensor, taught: bool, n_classes: int) -> tuple[Tensor, str]:
    """Which rows to fit the head on, int64 (n,), ascending; none where there is no such head, and why that is.

    ``labels`` (N,) int64, -1 unlabelled, or (N, K) multi-label. ``paired`` (N,) bool; where the model is ``taught`` by
    a teacher of pairs, unlabelled pairs count as well.
    """
    known = labelled_rows(labels)
    rows = (known | paired if taught else known).nonzero()[:, 0]
    most = min(MOST_ROWS, _MOST_TARGETS // n_classes)
    if len(rows) > most:
        return rows[:0], f"it takes at most {most} rows, and there are {len(rows)}"
    if labels.ndim == 2:
        return (rows, "") if _carried_by_others(labels[known] > 0) else (rows[:0], NOTHING_TO_CARRY)
    classes = len(labels[known].unique())
    # Where no class has two rows nothing can be left out and still be told.
    if classes < 2 or classes == len(rows):
        return rows[:0], NOTHING_TO_LEAVE_OUT
    return rows, ""


def _carried_by_others(carried: Tensor) -> bool:
    """Whether of rows that carry classes, (n, K) bool, one could be left out and still be told: a class is carried by
    two, and not by all."""
    carrying = carried.sum(dim=0)
    return bool(((carrying > 1) & (carrying < len(carried))).any())


def judged_rows(labels: Tensor, usable: Tensor, most: int, seed: int) -> Tensor:
    """``most`` labelled rows that are ``usable``, to be told by others of them: int64 (n,), ascending; or none.

    ``labels`` (N,) int64, -1 unlabelled, or (N, K) multi-label, ``usable`` (N,) bool.
    """
    rows = (labelled_rows(labels) & usable).nonzero()[:, 0]
    if labels.ndim == 2:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:most]].sort().values
        return rows if _carried_by_others(labels[rows] > 0) else rows[:0]
    rows = rows[drawn(labels[rows], most, seed)].sort().values
    # Where no class has two rows nothing can be left out and still be told.
    classes = len(labels[rows].unique())
    return rows if 1 < classes < len(rows) else rows[:0]


def drawn(classes: Tensor, most: int, seed: int) -> Tensor:
    """Places of at most ``most`` of the rows of ``classes`` (n,) int64, drawn at random, int64 (m,).

    Where that leaves fewer than `_ROWS_A_CLASS` a class, they are those of some classes, up to so many of each.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(classes), generator=generator)
    there = classes.unique().cpu()
    if len(order) > most and most < _ROWS_A_CLASS * len(there):
        of_order = torch.searchsorted(there, classes.cpu()[order])
        by_class = of_order.argsort(stable=True)
        first = torch.searchsorted(of_order[by_class], of_order[by_class])
        place = torch.empty_like(order)
        place[by_class] = torch.arange(len(order)) - first  # among those of its class
        turn = torch.randperm(len(there), generator=generator)[of_order]
        order = order[turn.where(place < _ROWS_A_CLASS, len(there)).argsort(stable=True)]
    return order[:most].to(classes.device)


def tangent_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Neural tangent kernel of a hidden ReLU layer of infinite width, both layers trained: (n, D), (m, D) -> (n, m).

    With u the cosine of the angle a between x and y, each with a coordinate `BIAS`^(1/2) more, it is
    ``|x||y| (sin a + 2 u (pi - a)) / pi`` (Jacot, Gabriel & Hongler 2018; Bietti & Mairal 2019, eq. 4).
    """
    product = placeless_product(x, y).add_(BIAS)
    lengths = (x.square().sum(1) + BIAS).sqrt()[:, None] * (y.square().sum(1) + BIAS).sqrt()
    cosine = (product / lengths).clamp_(-1, 1)
    if cosine.requires_grad:
        # Between a row and itself the kernel has a kink: 0 is one of its slopes there, what autograd gives no number.
        cosine = torch.where(cosine.abs() < 1, cosine, cosine.detach())
        sine = (1 - cosine.square()).sqrt()
        return (lengths * sine + 2 * product * (math.pi - torch.acos(cosine))) / math.pi
    # The same to the bit in four matrices of that size instead of eight, and three quarters of the time.
    sine = cosine.square().neg_().add_(1).sqrt_().mul_(lengths)
    return product.mul_(2).mul_(cosine.acos_().neg_().add_(math.pi)).add_(sine).div_(math.pi)


class KernelHead(WholeBuffers):
    """Logits of standardised visual features from their kernel with the rows that the head was fitted on.

    Buffers: ``rows`` (n, Dv), these rows over ``scale`` (); ``weight`` (K, n), ``bias`` (K,). Before `fit`, and where a
    model has no such head, n is 0. What is loaded sets n. ``absence``: why there is none, not saved.

    All in the buffers' dtype, float32 in a model of a half precision and in a region of `torch.autocast`, too: a
    kernel's rounding errors come into a logit times hundreds of weights.
    """

    whole = ("rows", "scale", "weight", "bias")

    rows: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, visual_dim: int, n_classes: int) -> None:
        super().__init__()
        self.absence = ""
        # Whether a state without any of its tensors is one of a model without such a head, not a part of one.
        self.absent_in_state = True
        self.register_buffer("rows", torch.zeros(0, visual_dim))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("weight", torch.zeros(n_classes, 0))
        self.register_buffer("bias", torch.zeros(n_classes))

    @property
    def fitted(self) -> bool:
        """Whether there is such a head."""
        return len(self.rows) > 0

    def forward(self, visual: Tensor) -> Tensor:
        """(B, Dv) -> (B, K), in the buffers' dtype."""
        visual = visual.to(self.rows.dtype)
        # Only where there is such a region, which exported programs have none of.
        within = torch.is_autocast_enabled(visual.device.type)
        with torch.autocast(visual.device.type, enabled=False) if within else nullcontext():
            return placeless_linear(tangent_kernel(visual / self.scale, self.rows), self.weight, self.bias)

    def fit(
        self,
        visual: Tensor,
        targets: Tensor,
        seed: int,
        opinions: Tensor | None = None,
        shares: tuple[float, ...] = SHARES,
    ) -> float:
        """Fit on standardised ``visual`` (n, Dv) and ``targets`` (n, K), class probabilities, in float64.

        Equal rows are kept once, and left out together. Deterministic for a seed, which chooses the rows that the ridge
        is found on. With ``opinions`` (n, K), what the rows' texts say of their classes, it is fitted on a mixture of
        both, and the share of ``targets`` in it is returned, the one of ``shares`` that `label_share` tells. Where no
        class has two rows that differ there is no such head.
        """
        if opinions is None:
            opinions, shares = targets, (1.0,)
        x, y, told, counts, scale = _distinct(visual, targets, opinions)
        if not _told_by_others(y).any():
            self.absence = NOTHING_TO_LEAVE_OUT
            return shares[0]
        ridge, share = _best_ridge(_some(seed, x, y, told, counts), shares)
        mixed = share * y + (1 - share) * told
        mean = (share * targets + (1 - share) * opinions).double().mean(0)
        weight, errors = _ridge_regression(x, mixed - mean, counts, ridge)
        sharpness, shift = _calibrated(mixed - errors, y, counts)
        self._keep(x, scale, sharpness * weight, sharpness * mean + shift)
        return share

    def fit_multi_label(self, visual: Tensor, targets: Tensor, seed: int) -> None:
        """The same on multi-label ``targets`` (n, K), the probability of carrying each class; logits are of yes or no.

        Where no class is carried by two rows that differ, and not by another, there is no such head.
        """
        x, scale = _at_unit_length(visual)
        x, y, counts = distinct(x, targets.double(), 2)
        if not _carried_by_others(y > 1 / 2):
            self.absence = NOTHING_TO_CARRY
            return
        some = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:RIDGE_ROWS].to(x.device)
        _, ridge, _ = _left_out((x[some], y[some], y[some], counts[some]), (1.0,), _YES_OR_NO)[1.0]
        mean = counts @ y / counts.sum()
        weight, errors = _ridge_regression(x, y - mean, counts, ridge)
        sharpness, shift = _calibrated(y - errors - 1 / 2, y, counts, _YES_OR_NO)
        self._keep(x, scale, sharpness * weight, sharpness * (mean - 1 / 2) + shift)

    def _keep(self, rows: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> None:
        like = self.scale
        self.rows, self.scale = rows.to(like), scale.to(like)
        self.weight, self.bias = weight.mT.contiguous().to(like), bias.to(like)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """What is loaded brings its own number of rows; a model saved without such a head has none of its tensors."""
        if self.absent_in_state and not any(prefix + name in state_dict for name in self._buffers):
            none = KernelHead(self.rows.shape[1], len(self.bias))
            state_dict = {**state_dict, **{prefix + name: value for name, value in none.state_dict().items()}}
        if prefix + "rows" in state_dict:
            n = len(state_dict[prefix + "rows"])
            self.rows = self.rows.new_zeros(n, self.rows.shape[1])
            self.weight = self.weight.new_zeros(len(self.weight), n)
        super()._load_from_state_dict(state_dict, prefix, *others)


def label_share(visual: Tensor, targets: Tensor, opinions: Tensor, seed: int) -> float:
    """How far labels are to be believed beside what the rows' texts say of their classes: one of `SHARES`.

    Standardised ``visual`` (n, Dv); ``targets`` and ``opinions`` (n, K), class probabilities. Where labels err or could
    as well have been others, a text's opinion tells a row to come more than the label does (Natarajan et al. 2013 bound
    what such labels cost; Reed et al. 2015 mix them with a model's own opinion). Found as the ridge is, by predictions
    of a kernel classifier of images that leave the row out, judged by the labels themselves. It is the largest of the
    shares whose loss is within one standard error of the least (Breiman et al. 1984): labels are left for a reason.
    """
    x, y, told, counts, _ = _distinct(visual, targets, opinions)
    return _best_ridge(_some(seed, x, y, told, counts), SHARES)[1]


def distinct(x: Tensor, targets: Tensor, n_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct of the rows ``x`` (n, D), the mean of each one's ``targets`` (n, k), one or several sets of
    ``n_classes`` probabilities, and how often it is there.

    What is left out may be told without an error, which would make the head infinitely sure: it is judged as if one row
    more had been of all classes in equal parts (Platt 1999 does so with two). Multi-label targets are each a yes or no,
    so that ``n_classes`` is 2.
    """
    x, targets, counts = _merged(x, targets)
    return x, (len(targets) * targets + 1 / n_classes) / (len(targets) + 1), counts


def left_out_losses(x: Tensor, targets: Tensor, counts: Tensor, multi_label: bool = False) -> Tensor:
    """Negative log-likelihood of rows as `distinct` gives them, (n,), by the kernel classifier that is best at telling
    those it has not seen; ``multi_label``, that of each class's yes or no, summed. The size of ``x`` does not matter.
    """
    length = (counts @ x.square().sum(1) / counts.sum()).sqrt().clamp(min=_EPS)
    decision = _YES_OR_NO if multi_label else _ONE_CLASS
    return _left_out((x / length, targets, targets, counts), (1.0,), decision)[1.0][2]


def _distinct(visual: Tensor, targets: Tensor, opinions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Distinct rows at a mean squared length of 1, their two kinds of targets, their counts, and the scale, float64."""
    (x, scale), k = _at_unit_length(visual), targets.shape[1]
    x, both, counts = distinct(x, torch.cat((targets, opinions), 1).double(), k)
    return x, both[:, :k], both[:, k:], counts, scale


def _at_unit_length(visual: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, D) over the root of their mean squared length, and that root, float64."""
    x = visual.double()
    scale = x.square().sum(1).mean().sqrt().clamp(min=_EPS)
    return x / scale, scale


def _some(seed: int, x: Tensor, targets: Tensor, *others: Tensor) -> list[Tensor]:
    """Of each of the rows, of likeliest classes as ``targets`` (n, K) tell, the same `RIDGE_ROWS` at most."""
    order = drawn(targets.argmax(dim=1), RIDGE_ROWS, seed)
    return [rows[order] for rows in (x, targets, *others)]


def _merged(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct of the rows ``x`` (n, D) in their order, their mean ``targets`` (n, K), and how often each is there.

    An image with five captions is five rows. With one of them left out the other four would tell it: ridge and
    sharpness would be those of a classifier that knows all. cub10 five times over lost 2.8 points by that, and on
    wikipedia's long tail a row's negative log-likelihood went from 2.2 to 3.6 (two folds each).
    """
    kept, number = first_copies(x).unique(return_inverse=True)
    counts = torch.bincount(number).to(x)
    sums = targets.new_zeros(len(kept), targets.shape[1]).index_add_(0, number, targets)
    return x[kept], sums / counts[:, None], counts


def _best_ridge(rows: Sequence[Tensor], shares: tuple[float, ...]) -> tuple[float, float]:
    """Of `RIDGES` and ``shares`` those whose leave-one-out predictions explain the targets best; ``rows`` as in
    `_left_out`. Of shares that are within one standard error of it, the largest.

    Shares are judged by rows whose class has another: what is left without a class's only row cannot tell it, and an
    opinion that says little of any class would be the best that there is.
    """
    found, counts = _left_out(rows, shares), rows[3]
    judged = counts * _told_by_others(rows[1])
    if not judged.any():
        return found[shares[0]][1], shares[0]
    part = judged / judged.sum()
    best = min((losses for _, _, losses in found.values()), key=lambda losses: float(part @ losses))

    def close(losses: Tensor) -> bool:
        worse = losses - best
        return bool(part @ worse <= (part.square() @ (worse - part @ worse).square()).sqrt())

    # In falling order of the shares; the best is close to itself.
    return next((ridge, share) for share, (_, ridge, losses) in found.items() if close(losses))


def _told_by_others(targets: Tensor) -> Tensor:
    """Of which rows of ``targets`` (n, K) the likeliest class is another row's, too, (n,) bool."""
    classes = targets.argmax(dim=1)
    return torch.bincount(classes, minlength=targets.shape[1])[classes] > 1


def _left_out(
    rows: Sequence[Tensor], shares: tuple[float, ...], decision: _Decision = _ONE_CLASS
) -> dict[float, tuple[float, float, Tensor]]:
    """For each of ``shares`` the least loss that leave-one-out predictions have, as sharp as is best, with its ridge
    of `RIDGES` and the losses of single rows (n,).

    ``rows``: x (n, D), targets (n, K), opinions (n, K) and counts (n,) as `_distinct` gives them. A row that is there c
    times has a c-th of the ridge: scaled by the roots of these all have the same. A prediction is linear in what it is
    fitted on, so that of a mixture is the mixture of two.
    """
    x, targets, opinions, counts = rows
    root, part = counts.sqrt(), counts / counts.sum()
    values, vectors = torch.linalg.eigh(root[:, None] * tangent_kernel(x, x) * root)
    kinds = (targets,) if shares == (1.0,) else (targets, opinions)
    along = [vectors.mT @ (root[:, None] * (kind - part @ kind)) for kind in kinds]
    found: dict[float, tuple[float, float, Tensor]] = {}
    near: dict[float, int] = {}
    for ridge in RIDGES:
        inverse = 1 / (values.clamp(min=0) + ridge)
        scale = root * (vectors.square() @ inverse)
        told = [kind - vectors @ (inverse[:, None] * a) / scale[:, None] for kind, a in zip(kinds, along, strict=True)]
        for share in shares:
            predicted = share * told[0] + (1 - share) * told[-1] - decision.neither
            place, loss = _sharpest(predicted, targets, counts, decision, near.get(share))
            # The next ridge's is a few places from it: 400 classes take 3.7 seconds instead of 7.0.
            near[share] = place
            if share not in found or loss < found[share][0]:
                found[share] = loss, ridge, decision.entropy(SHARPNESS[place] * predicted, targets)
    return found


def _ridge_regression(x: Tensor, targets: Tensor, counts: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weights (n, K) of the kernel's ridge regression of ``targets`` (n, K), and its leave-one-out errors (n, K).

    With G the kernel plus the ridge (a c-th of it for a row that is there c times) and w the weights, the prediction
    that has not seen row i errs by ``w_i / (G^-1)_ii`` (Rifkin & Lippert 2007, eq. 8).
    """
    gram = x.new_empty(len(x), len(x))
    for start in range(0, len(x), _ROWS_TOGETHER):
        gram[start : start + _ROWS_TOGETHER] = tangent_kernel(x[start : start + _ROWS_TOGETHER], x)
    gram.diagonal().add_(ridge / counts)
    # Symmetric, so that its transpose is it: in columns, as LAPACK has matrices, it is factored where it is.
    factor = torch.linalg.cholesky(gram.mT, out=gram.mT)
    half = torch.linalg.solve_triangular(factor, targets, upper=False)
    weight = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return weight, weight / _inverse_diagonal(factor)[:, None]


def _inverse_diagonal(factor: Tensor) -> Tensor:
    """Diagonal of ``(L L^T)^-1`` for a lower triangular L (n, n), (n,): squared lengths of the columns of L^-1.

    Some columns at a time, which are 0 above their diagonal, from above down. One `solve_triangular` of what is below
    and right of a column's beginning would copy that: with it, a copy each for factoring and for the weights, the run
    of fashion_products had its peak of memory here.
    """
    n, diagonal = len(factor), torch.empty_like(factor[0])
    for start in range(0, n, _ROWS_TOGETHER):
        columns = torch.eye(n - start, min(_ROWS_TOGETHER, n - start), dtype=factor.dtype, device=factor.device)
        for row in range(start, n, _ROWS_TOGETHER):
            rows = slice(row, row + _ROWS_TOGETHER)
            above, here = columns[: row - start], columns[row - start : row - start + _ROWS_TOGETHER]
            here.addmm_(factor[rows, start:row], above, alpha=-1)
            here.copy_(torch.linalg.solve_triangular(factor[rows, rows], here, upper=False))
        diagonal[start : start + _ROWS_TOGETHER] = columns.square().sum(0)
    return diagonal


def _sharpest(
    predicted: Tensor, targets: Tensor, counts: Tensor, decision: _Decision, near: int | None = None
) -> tuple[int, float]:
    """The place in `SHARPNESS` of what ``predicted`` (n, K) is to be multiplied by to explain ``targets`` best, and the
    loss. ``near``: a place that may be close to it, which spares most of the search."""
    share = counts / counts.sum()

    @cache
    def loss(k: int) -> float:
        return float(share @ decision.entropy(SHARPNESS[k] * predicted, targets))

    # The loss is convex in the factor, so that the first that is no worse than its next is the best.
    low, high = 0, len(SHARPNESS) - 1
    if near is not None:
        low = near
        while low < high and loss(low) > loss(low + 1):
            low += 1
        while low > 0 and loss(low - 1) <= loss(low):
            low -= 1
        return low, loss(low)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if loss(middle) <= loss(middle + 1) else (middle + 1, high)
    return low, loss(low)


def _calibrated(
    predicted: Tensor, targets: Tensor, counts: Tensor, decision: _Decision = _ONE_CLASS
) -> tuple[Tensor, Tensor]:
    """Sharpness () and shift (K,) with which ``predicted`` (n, K) explains ``targets`` best.

    Of one class a row, a row counts as one over the root of its class's rows, halfway between the shares that the
    classes have and equal ones: rows to come may have either. The shifts are drawn to 0 as by one row a class. Without
    them cub10 with a long tail lost 3.7 points, and with all rows counted alike 2.1.
    """
    weight = counts * (targets @ (counts @ targets).clamp(min=_EPS).rsqrt()) if decision is _ONE_CLASS else counts
    weight = weight / weight.mean()
    near = SHARPNESS[_sharpest(predicted, targets, counts, decision)[0]]
    sharpness = predicted.new_tensor(math.log(near)).requires_grad_()
    shift = predicted.new_zeros(predicted.shape[1]).requires_grad_()
    optimiser = torch.optim.LBFGS((sharpness, shift), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        entropy = decision.entropy(sharpness.exp() * predicted + shift, targets)
        loss = weight @ entropy + shift.square().sum() / 2
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return sharpness.detach().exp(), shift.detach()
