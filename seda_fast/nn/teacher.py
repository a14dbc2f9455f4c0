"""The teacher of unlabelled pairs: what a pair's image and text together say of its class.

Where labels are few and pairs are many, a classifier of images and one of texts, each trained on the few labels, err on
different pairs. Their product labels the unlabelled pairs, each is drawn towards the labels of its nearest pairs (one
step of label propagation, Zhu & Ghahramani 2002), both are fitted again on those labels, and the product of the new
two is the teacher (co-training, Blum & Mitchell 1998, with soft labels). Each classifier sees its space widened by what
a row tells of its partner in the other space, which all pairs show, labelled or not: what both spaces share is where
the classes lie (Foster, Kakade & Zhang 2008). Where the unlabelled pairs plainly have other class shares than the
labelled ones, as where equally many rows of each class were labelled, the first product's labels are drawn towards
those shares. Text is needed here only, in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .copies import first_copies
from .multi_label import labelled_rows
from .unseen import beyond_the_seen, classes_without_pairs

# Rows of each kind that the teacher is fitted on: it is linear and needs no more, and fitting stays a matter of
# seconds and of constant memory for any number of pairs.
LABELLED_ROWS, UNLABELLED_ROWS = 4096, 16384
L2_GRID = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
# Share of the labelled rows whose classes no labelled text shows. On artificial sets of 10 and 5 classes with 8 and 20
# labels each, three draws, top-1 with a teacher and without one was 88.0 and 83.6 where it was a tenth, 85.2 and 83.6
# where it was three tenths, 79.3 and 83.7 where it was four.
MOST_UNSEEN = 0.25
_FOLDS = 5
# Rows times dimensions times classes from which a penalty's classifiers start at those of the one before: they get
# there in half of the time with 100 classes (15.7 and 7.7 seconds on one core) and in a third with 400 (101 and 32).
# Fewer of them take as long either way.
MANY_PRODUCTS = 2**25
_MOST_REMEMBERED = 2**26  # numbers, 256 MiB; 1000 classes of 2816 dimensions took 1.7 GB
# The unlabelled rows are many and their labels soft: the second fit takes a tenth of the penalty. With 4 labels per
# class it then labels 65.4 % (wikipedia) and 84.8 % (cub10) of the other training pairs rightly, with the same penalty
# 64.1 % and 84.3 % (3 seeds); a third fit loses 0.3 and 0.7 points again.
REFIT_L2 = 0.1
# Nats a pair that other class shares must explain before they are believed: that much the classifiers' own errors give.
# With 4, 8 and 16 labels per class 0.01 was seen where the shares are equal (cub10), 0.03 to 0.11 where they hardly
# differ (wikipedia), 0.41 to 0.57 where one class has a fifth of the pairs (fashion_products).
SHIFT_FLOOR = 0.2
_SHIFT_STEPS = 50
# Nearest pairs in each space that a pair's label is drawn to, and the least share that a class has among them.
NEIGHBOURS = 10
_LEAST_SHARE = 1e-3
_ROWS_TOGETHER = 1024  # whose cosines to all others are in memory at once
# Mean squared lengths of a row by which the regressions between the spaces shrink.
RIDGE_ROWS = 10.0
_EPS = 1e-6


class Linear(NamedTuple):
    """A linear classifier: weight (K, D), bias (K,)."""

    weight: Tensor
    bias: Tensor

    def log_proba(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, K)."""
        return F.log_softmax(F.linear(features, self.weight, self.bias), dim=1)


class PairTeacher(nn.Module):
    """Soft labels of pairs from a visual and a textual linear classifier, weighted by how far each can be trusted.

    Its buffers are not saved: prediction has no use for it.
    """

    visual_weight: Tensor
    visual_bias: Tensor
    text_weight: Tensor
    text_bias: Tensor
    trust: Tensor

    def __init__(self, visual: Linear, text: Linear, trust: Tensor) -> None:
        super().__init__()
        for name, value in (("visual", visual), ("text", text)):
            self.register_buffer(f"{name}_weight", value.weight, persistent=False)
            self.register_buffer(f"{name}_bias", value.bias, persistent=False)
        self.register_buffer("trust", trust, persistent=False)

    @torch.no_grad()
    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        """Standardised ``visual`` (B, Dv) and ``text`` (B, Dt) -> class probabilities (B, K)."""
        v = Linear(self.visual_weight, self.visual_bias).log_proba(visual)
        t = Linear(self.text_weight, self.text_bias).log_proba(text)
        return combined((v, t), self.trust)


def combined(log_probas: Sequence[Tensor], trust: Tensor) -> Tensor:
    """Normalised product of distributions raised to the powers ``trust`` (M,): M of (B, K) -> (B, K)."""
    floored = torch.stack([torch.log(p.exp() + _EPS) for p in log_probas])
    return torch.softmax((trust[:, None, None] * floored).sum(0), dim=1)


def shifted(proba: Tensor, shares: Tensor) -> Tensor:
    """Class probabilities (N, K) drawn towards the class shares that they show, (N, K).

    ``shares`` (K,) are those of the rows whose labels ``proba`` was learned from. The others are estimated by
    expectation and maximisation (Saerens, Latinne & Decaestecker 2002), under a prior worth one row of each class. With
    g the nats a row by which they explain the rows better, the probabilities are multiplied by the shares' ratio to the
    power max(0, 1 - `SHIFT_FLOOR` / g), and normalised.
    """
    n_classes, there = len(shares), shares > 0
    # A class without a labelled row has no share to begin with, and none to be multiplied: what weak classifiers leave
    # it would be over nothing, and all rows would become its.
    known = proba if there.all() else (proba + _EPS) * there
    known = known if known is proba else known / known.sum(1, keepdim=True)
    before = (shares + _EPS) / (shares + _EPS).sum()
    ratio = torch.ones_like(before)
    for _ in range(_SHIFT_STEPS):
        counts = ratio * (known.mT @ (1 / (known @ ratio)))
        ratio = (counts / before + n_classes) / (len(known) + n_classes)
    gain = float((known @ ratio).log().mean())
    if gain <= SHIFT_FLOOR:
        return proba
    drawn = known * ratio ** (1 - SHIFT_FLOOR / gain)
    return drawn / drawn.sum(1, keepdim=True)


def nearest(features: Tensor) -> tuple[Tensor, Tensor]:
    """The `NEIGHBOURS` rows nearest to each by cosine, itself left out: int64 (N, k), and their shares, (N, k).

    ``features`` (N, D). Shares are the cosines over their sum, negative ones and those of a row of zeros as 0.
    """
    unit, found = F.normalize(features, dim=1), []
    for start in range(0, len(unit), _ROWS_TOGETHER):
        cosines = unit[start : start + _ROWS_TOGETHER] @ unit.mT
        cosines.diagonal(start).fill_(-2)
        found.append(cosines.topk(min(NEIGHBOURS, len(unit) - 1), dim=1))
    cosines = torch.cat([f.values for f in found]).clamp(min=0)
    return torch.cat([f.indices for f in found]), cosines / cosines.sum(1, keepdim=True).clamp(min=_EPS)


def propagated(proba: Tensor, graphs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Class probabilities (N, K), multiplied by the mean of each row's neighbours, (N, K), normalised.

    ``graphs`` are the spaces' `nearest`; between spaces the mean is geometric.
    """
    logs = torch.log(proba + _EPS)
    for index, share in graphs:
        # One neighbour of all rows at a time: (N, k, K) would be gigabytes.
        mean = sum(s[:, None] * proba[i] for i, s in zip(index.mT, share.mT, strict=True))
        logs += torch.log(mean + _LEAST_SHARE) / len(graphs)
    return torch.softmax(logs, dim=1)


def shared_directions(x: Tensor, other: Tensor) -> Tensor:
    """Where the pairs ``x`` (N, D), ``other`` (N, E) tell of each other: a map (D, E).

    It leads to the ridge regression of ``other`` on ``x``, whitened: ``A L^-T`` with ``A = (x'x + a)^-1 x'other`` and
    ``L L' = other'other + b``, times a number that makes ``x @ map`` as long as ``x`` altogether. Up to a rotation
    these are the canonical variates of ``x`` (Hotelling 1936), each times its correlation. ``a`` and ``b`` are
    `RIDGE_ROWS` times a row's mean squared length: of few pairs in many dimensions canonical correlations are chance.
    """
    factors = []
    for rows in (x, other):
        gram = (rows.mT @ rows).double()
        gram.diagonal().add_(RIDGE_ROWS * (gram.trace() / len(rows)).clamp(min=_EPS))
        factors.append(torch.linalg.cholesky(gram))
    regression = torch.cholesky_solve((x.mT @ other).double(), factors[0])
    found: Tensor = torch.linalg.solve_triangular(factors[1], regression.mT, upper=False).mT.to(x.dtype)
    length = float((x @ found).norm())
    return found * (float(x.norm()) / length) if length > 0 else found


def widened(x: Tensor, directions: Tensor) -> Tensor:
    """``x`` (N, D) beside what it is along ``directions`` (D, E), both as long together as ``x`` was: (N, D + E)."""
    return torch.cat((x, x @ directions), dim=1) * math.sqrt(0.5)


def narrowed(classifier: Linear, directions: Tensor) -> Linear:
    """The classifier of rows as they are that says what ``classifier`` says of `widened` ones."""
    own, along = classifier.weight.split(list(directions.shape), dim=1)
    return Linear((own + along @ directions.mT) * math.sqrt(0.5), classifier.bias)


def teacher_rows(labels: Tensor, paired: Tensor, seed: int) -> Tensor:
    """Which rows to fit the teacher on: int64 (n,), ascending, bounded in number; empty where it has no use.

    It has one where some pairs are unlabelled and the labelled ones show at least two classes (multi-label: differ),
    and at most as many as rows are taken: a class without a row it would name for none of its pairs. The other classes
    of labelled rows, which the classifier of texts does not know, may have `MOST_UNSEEN` of these; multi-label there
    may be none, as the teacher would say no to them.
    """
    known = labelled_rows(labels)
    labelled, unlabelled = (known & paired).nonzero()[:, 0], (~known & paired).nonzero()[:, 0]
    different = len(labels[labelled].unique(dim=0))
    if not len(unlabelled) or different < 2 or (labels.ndim == 1 and different > LABELLED_ROWS):
        return labelled[:0]
    if _too_many_unseen(labels, paired):
        return labelled[:0]
    generator = torch.Generator().manual_seed(seed)
    chosen = [
        some_of_each_class(labelled, labels, LABELLED_ROWS, generator),
        unlabelled[torch.randperm(len(unlabelled), generator=generator)[:UNLABELLED_ROWS].to(labels.device)],
    ]
    return torch.cat(chosen).sort().values


def _too_many_unseen(labels: Tensor, paired: Tensor) -> bool:
    n_classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    lone = classes_without_pairs(labels, paired, n_classes)
    if lone is None or labels.ndim == 2:
        return lone is not None
    return int(torch.isin(labels, lone).sum()) > MOST_UNSEEN * int((labels >= 0).sum())


def lone_rows(labels: Tensor, paired: Tensor, seed: int) -> Tensor:
    """Labelled rows without text that the teacher's visual classifier is fitted on, too: int64 (n,), ascending, bounded
    in number; of multi-label rows none."""
    if labels.ndim == 2:
        return torch.zeros(0, dtype=torch.int64, device=labels.device)
    rows = ((labels >= 0) & ~paired).nonzero()[:, 0]
    return some_of_each_class(rows, labels, LABELLED_ROWS, torch.Generator().manual_seed(seed)).sort().values


def some_of_each_class(rows: Tensor, labels: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """``most`` of ``rows`` (n,) in random order, of each class one before any has two (multi-label: in any order)."""
    order = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
    if len(order) > most and labels.ndim == 1:
        first = order.new_full((int(labels.max()) + 1,), len(order))
        place = torch.arange(len(order), device=order.device)
        first.scatter_reduce_(0, labels[order], place, "amin")
        order = torch.cat((order[first[labels[order]] == place], order[first[labels[order]] != place]))
    return order[:most]


def fit_teacher(
    visual: Tensor,
    text: Tensor,
    labels: Tensor,
    n_classes: int,
    seed: int,
    lone: tuple[Tensor, Tensor] | None = None,
) -> PairTeacher:
    """Fit on the rows of `teacher_rows`: standardised ``visual`` (n, Dv), ``text`` (n, Dt), ``labels`` (n,) int64, -1
    unlabelled. Deterministic for a seed.

    ``lone``: visual features (m, Dv) and labels (m,) of `lone_rows`, which the classifier of images is fitted on as
    well. Of a class that only they have the classifier of texts knows nothing, and the other one alone tells.
    """
    known = labels >= 0
    y = labels[known]
    seen = (visual, text)
    shared = (shared_directions(visual, text), shared_directions(text, visual))
    spaces = [widened(x, directions) for x, directions in zip(seen, shared, strict=True)]
    penalties, trust = _tuned([x[known] for x in spaces], y, first_copies(visual[known]), n_classes, seed)
    hard = F.one_hot(y, n_classes).to(visual.dtype)
    # Beside the pairs, to the classifier of images alone: its features and labels, and none to that of texts.
    x_lone, y_lone = (visual[:0], y[:0]) if lone is None else lone
    hard_lone = F.one_hot(y_lone, n_classes).to(hard)
    more = ((widened(x_lone, shared[0]), hard_lone), (spaces[1][:0], hard[:0]))
    first = [
        fitted(torch.cat((x[known], x_more)), torch.cat((hard, y_more)), l2)
        for x, l2, (x_more, y_more) in zip(spaces, penalties, more, strict=True)
    ]
    found = [c.log_proba(x[~known]) for c, x in zip(first, spaces, strict=True)]
    unseen = (hard_lone.sum(0) > 0) & (hard.sum(0) == 0)
    if unseen.any():
        found[1] = beyond_the_seen(found[1], found[0], unseen)
    soft = combined(found, trust)
    ordered = [torch.cat((x[known], x[~known])) for x in spaces]
    targets = torch.cat((hard, shifted(soft, torch.cat((hard, hard_lone)).mean(0))))
    graphs = [nearest(torch.cat((x[known], x[~known]))) for x in seen]
    targets[len(y) :] = propagated(targets, graphs)[len(y) :]
    second = [
        fitted(torch.cat((x, x_more)), torch.cat((targets, y_more)), REFIT_L2 * l2, start)
        for x, l2, start, (x_more, y_more) in zip(ordered, penalties, first, more, strict=True)
    ]
    own = [narrowed(c, directions) for c, directions in zip(second, shared, strict=True)]
    return PairTeacher(own[0], own[1], trust)


def _tuned(
    spaces: Sequence[Tensor], labels: Tensor, first: Tensor, n_classes: int, seed: int
) -> tuple[list[float], Tensor]:
    """Each space's penalty, and the trust in its classifier, on held-out rows; those of an image (``first``, the rows'
    `first_copies`) are held out together.

    A class with a single image cannot be held out and learned; where no class has more, the middle of the grid and
    equal trust are all that can be said.
    """
    images = first == torch.arange(len(first), device=first.device)
    repeated = torch.bincount(labels[images], minlength=n_classes)[labels[first]] > 1
    if not repeated.any():
        return [L2_GRID[len(L2_GRID) // 2]] * len(spaces), spaces[0].new_ones(len(spaces))
    y = labels[repeated]
    fold = torch.empty_like(labels)
    fold[images & repeated] = _folds(labels[images & repeated], seed)
    fold = fold[first][repeated]
    found = [_held_out(x[repeated], y, n_classes, fold) for x in spaces]
    return [l2 for _, l2 in found], _trust([log_proba for log_proba, _ in found], y)


def fitted(features: Tensor, targets: Tensor, l2: float, start: Linear | None = None) -> Linear:
    """Minimise the mean cross entropy to ``targets`` (N, K) plus ``l2 / 2 |weight|^2`` by L-BFGS."""
    if start is None:
        shape = (targets.shape[1], features.shape[1])
        start = Linear(features.new_zeros(shape), features.new_zeros(shape[0]))
    weight, bias = (value.clone().requires_grad_() for value in start)
    optimiser = torch.optim.LBFGS(
        (weight, bias), max_iter=50, line_search_fn="strong_wolfe", tolerance_grad=1e-5, history_size=history(weight)
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), targets) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return Linear(weight.detach(), bias.detach())


def history(weight: Tensor) -> int:
    """How many steps L-BFGS remembers, with two copies of ``weight`` (K, D) each: all, of few or of small weights."""
    return max(10, min(100, _MOST_REMEMBERED // (2 * weight.numel())))


def _folds(labels: Tensor, seed: int) -> Tensor:
    """A fold 0 .. for each row, classes spread evenly, int64 (N,)."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    fold = torch.empty_like(labels)
    # Stable by label, the shuffled rows of a class follow one another: counting along spreads each over the folds.
    by_class = order[labels[order].argsort(stable=True)]
    fold[by_class] = torch.arange(len(labels), device=labels.device) % _FOLDS
    return fold


def _held_out(features: Tensor, labels: Tensor, n_classes: int, fold: Tensor) -> tuple[Tensor, float]:
    """Log-probabilities (N, K) of rows by classifiers that did not see them, with the penalty that is best there."""
    hard = F.one_hot(labels, n_classes).to(features.dtype)
    goes_on = features.numel() * n_classes >= MANY_PRODUCTS
    classifiers: dict[int, Linear] = {}
    best: tuple[float, Tensor, float] | None = None
    for l2 in L2_GRID:
        found = torch.zeros_like(hard)
        for k in range(_FOLDS):
            out = fold == k
            if out.all() or not out.any():
                continue
            classifiers[k] = fitted(features[~out], hard[~out], l2, classifiers.get(k) if goes_on else None)
            found[out] = classifiers[k].log_proba(features[out])
        loss = float(F.nll_loss(torch.log(found.exp() + _EPS), labels))
        if best is None or loss < best[0]:
            best = (loss, found, l2)
        elif loss > 1.02 * best[0]:
            break  # weaker penalties overfit more
    assert best is not None
    return best[1], best[2]


def _trust(held_out: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Exponents (M,) >= 0 with which the product of the held-out distributions explains the labels best.

    They start at, and are drawn to, 1: with few labels a classifier is not condemned by a few rows.
    """
    floored = torch.stack([torch.log(p.exp() + _EPS) for p in held_out]).double()
    trust = torch.ones(len(held_out), dtype=torch.float64, device=labels.device, requires_grad=True)
    optimiser = torch.optim.LBFGS((trust,), max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        logits = (trust[:, None, None] * floored).sum(0)
        loss = F.cross_entropy(logits, labels, reduction="sum") + (trust - 1).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return trust.detach().clamp(min=0).to(held_out[0].dtype)
