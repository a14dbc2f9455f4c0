"""How good the classes are, and how well mapped features lie on the textual distribution.

Everything is computed in float64. Features arrive standardised with the training set's mean and deviation:
Frechet distance and RBF-MMD depend on the scale, so their values compare within one data set only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import qr, svdvals
from scipy.spatial.distance import pdist
from sklearn.metrics import average_precision_score, recall_score
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.preprocessing import normalize

from .nn.multi_label import THRESHOLD

__all__ = [
    "alignment_metrics",
    "average_precisions",
    "classification_metrics",
    "expected_calibration_error",
    "frechet_distance",
    "median_bandwidth",
    "multi_label_metrics",
    "rbf_mmd",
    "retrieval_recall",
]

Array = NDArray[np.float64]

UNLABELLED = -1
ECE_BINS = 15
RECALL_AT = (1, 5, 10)
MMD_ROWS = 5000  # a quadratic cost: more rows are drawn down to this many
RECALL_ROWS = 5000  # that look for their text among all: 100 000 rows took minutes
BANDWIDTH_ROWS = 2000  # 2 million distances, 16 MB
CHUNK_ELEMENTS = 2**22  # of a similarity matrix held at once: 32 MB
TIE = 1e-9  # cosines nearer than this are equal: a product rounds differently in different columns


def _matrix(name: str, values: NDArray[np.generic]) -> Array:
    array = np.asarray(values)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise ValueError(f"{name}: expected a real matrix, got shape {array.shape} of {array.dtype}")
    return array.astype(np.float64, copy=False)


def _finite(name: str, array: Array) -> Array:
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise ValueError(f"{name}: row {int(bad.argmax())} holds NaN or infinity")
    return array


# --------------------------------------------------------------------------------------------- classification


def _check_log_proba(log_proba: Array) -> None:
    if np.isnan(log_proba).any():
        row = int(np.isnan(log_proba).any(axis=1).argmax())
        raise ValueError(f"log_proba: row {row} holds NaN")
    with np.errstate(over="ignore"):
        total = np.exp(log_proba).sum(axis=1)
    wrong = np.abs(total - 1.0) > 1e-3
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"log_proba: the probabilities of row {row} sum to {total[row]:.6g}, not to 1")


def classification_metrics(log_proba: NDArray[np.floating], labels: NDArray[np.integer]) -> dict[str, float]:
    """Accuracy and calibration of class log-probabilities, all in percent.

    Args:
        log_proba: (N, K) natural log-probabilities, each row normalised (to 1e-3); minus infinity is allowed.
        labels: (N,) integers in [-1, K); rows labelled -1 are unlabelled and ignored.

    Returns:
        `top1`, `top5`; `balanced_accuracy`, the mean recall over the classes that occur in `labels`; `ece`,
        see `expected_calibration_error`. Equal probabilities are ranked by class index, lowest first, as
        `argmax` does. With K <= 5, `top5` is 100.

    Raises:
        ValueError: shapes that do not fit, a label out of range, NaN, rows that are not normalised, no
            labelled row.
    """
    proba = _matrix("log_proba", log_proba)
    labels = np.asarray(labels)
    n_rows, n_classes = proba.shape
    if labels.shape != (n_rows,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels: expected {n_rows} integers, one for each row of log_proba, "
            f"got shape {labels.shape} of {labels.dtype}"
        )
    out_of_range = (labels < UNLABELLED) | (labels >= n_classes)
    if out_of_range.any():
        row = int(out_of_range.argmax())
        raise ValueError(f"labels: row {row} is {labels[row]}, outside [-1, {n_classes})")
    labelled = labels != UNLABELLED
    if not labelled.any():
        raise ValueError("labels: no labelled row, so accuracy cannot be computed")
    proba, truth = proba[labelled], labels[labelled].astype(np.int64)
    _check_log_proba(proba)

    rank = _rank_of_label(proba, truth)
    predicted = proba.argmax(axis=1)
    recall = recall_score(truth, predicted, labels=np.unique(truth), average="macro")
    confidence = np.exp(proba.max(axis=1))
    return {
        "top1": 100.0 * float(np.mean(rank < 1)),
        "top5": 100.0 * float(np.mean(rank < 5)),
        "balanced_accuracy": 100.0 * float(recall),
        "ece": 100.0 * expected_calibration_error(confidence, predicted == truth),
    }


def _rank_of_label(log_proba: Array, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    own = np.take_along_axis(log_proba, labels[:, None], axis=1)
    ahead = np.count_nonzero(log_proba > own, axis=1)
    earlier = np.arange(log_proba.shape[1]) < labels[:, None]
    rank: NDArray[np.int64] = ahead + np.count_nonzero((log_proba == own) & earlier, axis=1)
    return rank


def expected_calibration_error(
    confidence: NDArray[np.floating], correct: NDArray[np.bool_], bins: int = ECE_BINS
) -> float:
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017), a fraction in [0, 1].

    `confidence` (N,) is the probability of the predicted class, `correct` (N,) whether it is right.
    Equal-width bins [i / bins, (i + 1) / bins), the last one closed. torchmetrics agrees but for a confidence
    of exactly 1, which it puts into a bin of its own, and works in float32.
    """
    confidence = np.clip(np.asarray(confidence, dtype=np.float64), 0.0, 1.0)
    index = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gap = np.bincount(index, weights=np.asarray(correct, dtype=np.float64) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


# ------------------------------------------------------------------------------------------------ multi-label


def average_precisions(log_proba: NDArray[np.floating], labels: NDArray[np.integer]) -> Array:
    """Average precision of each class, (K,) fractions: mean precision at the ranks of the rows that carry it.

    Args:
        log_proba: (N, K), ranks the rows of each class. labels: (N, K), 1 or 0.

    NaN for a class that no row carries. Rows of equal probability are taken together, as scikit-learn's
    `average_precision_score` does.
    """
    found, log_proba = np.full(labels.shape[1], np.nan), _rankable(log_proba)
    for k in np.flatnonzero((labels > 0).any(axis=0)):
        found[k] = average_precision_score(labels[:, k], log_proba[:, k])
    return found


def _rankable(log_proba: NDArray[np.floating]) -> Array:
    """scikit-learn refuses infinity, which a probability of 0 is here."""
    return np.maximum(np.asarray(log_proba, dtype=np.float64), np.finfo(np.float64).min)


def multi_label_metrics(
    log_proba: NDArray[np.floating], labels: NDArray[np.integer], threshold: float = THRESHOLD
) -> dict[str, float]:
    """Ranking, decisions and calibration of the log-probabilities of carrying each class, all in percent.

    Args:
        log_proba: (N, K) natural log-probabilities, none above 0 (to 1e-3); minus infinity is allowed.
        labels: (N, K) integers, 1 where a row carries a class and 0 where not; rows of -1 are unlabelled and ignored.
        threshold: a row is taken to carry the classes of at least this probability.

    Returns:
        `map`: mean of the classes' average precisions (macro), over the classes that some row carries; `map_micro`:
        average precision of all decisions ranked together. `f1_micro`, of all decisions together; `f1_macro`, mean
        over the classes that some row carries, 0 for one that is never predicted. `exact_match`: rows whose set of
        classes is right as a whole. `ece`: expected calibration error of all decisions, bins of the probability
        of carrying the class, see `expected_calibration_error`.

    Raises:
        ValueError: shapes that do not fit, an entry that is no label, NaN, log-probabilities above 0, no row that
            carries a class.
    """
    found = _matrix("log_proba", log_proba)
    labels = np.asarray(labels)
    if labels.shape != found.shape or labels.dtype.kind not in "iu":
        expected = f"expected integers of shape {found.shape}"
        raise ValueError(f"labels: {expected}, got shape {labels.shape} of {labels.dtype}")
    unlabelled = (labels == UNLABELLED).all(axis=1)
    bad = (labels != 0) & (labels != 1) & ~unlabelled[:, None]
    if bad.any():
        raise ValueError(f"labels: row {int(bad.any(axis=1).argmax())} is neither of 0 and 1 nor -1 throughout")
    found, truth = found[~unlabelled], labels[~unlabelled] > 0
    if not truth.any():
        raise ValueError("labels: no row carries a class, so average precision cannot be computed")
    wrong = ~(found <= 1e-3)
    if wrong.any():
        row = int(np.flatnonzero(~unlabelled)[wrong.any(axis=1).argmax()])
        raise ValueError(f"log_proba: row {row} holds NaN or a log-probability above 0")
    proba = np.exp(np.minimum(found, 0.0))
    predicted, carried = proba >= threshold, truth.any(axis=0)
    # scikit-learn takes a single column for two classes, and would count the nos as well.
    right, told = (truth & predicted).sum(axis=0), truth.sum(axis=0) + predicted.sum(axis=0)
    return {
        "map": 100.0 * float(np.nanmean(average_precisions(found, truth.astype(np.int8)))),
        "map_micro": 100.0 * float(average_precision_score(truth.ravel(), _rankable(found).ravel())),
        "f1_micro": 100.0 * float(2 * right.sum() / told.sum()),
        "f1_macro": 100.0 * float(np.mean(2 * right[carried] / told[carried])),
        "exact_match": 100.0 * float((predicted == truth).all(axis=1).mean()),
        "ece": 100.0 * expected_calibration_error(proba.ravel(), truth.ravel()),
    }


# -------------------------------------------------------------------------------------------------- alignment


def frechet_distance(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Squared Frechet (2-Wasserstein) distance of Gaussians fitted to x (N, D) and y (M, D), the FID formula.

        |mean_x - mean_y|^2 + tr(C_x) + tr(C_y) - 2 tr((C_x C_y)^(1/2))      covariances with N - 1 and M - 1

    (Dowson & Landau 1982; Heusel et al. 2017). With centred, scaled data A and B, so that C_x = A'A and C_y =
    B'B, the last trace is the nuclear norm of A B'. QR first makes that (min(N, D), min(M, D)). No covariance
    is squared and no matrix square root of a nearly singular product is taken, so fewer rows than dimensions
    are no trouble.

    Raises:
        ValueError: fewer than 2 rows, unlike dimensions, NaN or infinity.
    """
    x, y = _finite("x", _matrix("x", x)), _finite("y", _matrix("y", y))
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x, y: expected 2 rows or more of equal width, got {x.shape} and {y.shape}")
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    (a,) = qr((x - mean_x) / np.sqrt(len(x) - 1), mode="r")
    (b,) = qr((y - mean_y) / np.sqrt(len(y) - 1), mode="r")
    cross = svdvals(a[: x.shape[1]] @ b[: y.shape[1]].T).sum()  # the rows below are zeros
    distance = np.square(mean_x - mean_y).sum() + np.square(a).sum() + np.square(b).sum() - 2.0 * cross
    return max(0.0, float(distance))  # equal sets leave a rounding error of either sign


def median_bandwidth(x: NDArray[np.floating]) -> float:
    """Median heuristic: median Euclidean distance between unequal rows of x (N, D); 0 where all are equal.

    Pairs of equal rows (repeated texts) are left out: in a set with a text for each class they could be the
    majority.
    """
    distances = pdist(_matrix("x", x))
    apart = distances[distances > 0.0]
    return float(np.median(apart)) if apart.size else 0.0


def rbf_mmd(x: NDArray[np.floating], y: NDArray[np.floating], bandwidth: float) -> float:
    """Unbiased estimate of the squared MMD of paired samples x, y (M, D), kernel exp(-d^2 / (2 bandwidth^2)).

    Mean over i != j of k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i) (Gretton et al. 2012, equation
    4). Leaving i = j out of the cross terms as well keeps it unbiased though x_i and y_i belong together. It
    can be below zero and is 0 for x = y. Memory: chunks of rows, never (M, M).
    """
    x, y = _finite("x", _matrix("x", x)), _finite("y", _matrix("y", y))
    if x.shape != y.shape or len(x) < 2 or not bandwidth > 0.0:
        raise ValueError(
            "x, y, bandwidth: expected equal shapes, 2 rows or more and a positive bandwidth, "
            f"got {x.shape}, {y.shape} and {bandwidth}"
        )
    total = 0.0
    for rows in _chunks(len(x)):
        h = _rbf(x[rows], x, bandwidth) + _rbf(y[rows], y, bandwidth)
        h -= _rbf(x[rows], y, bandwidth) + _rbf(y[rows], x, bandwidth)
        h[np.arange(len(h)), np.arange(rows.start, rows.stop)] = 0.0
        total += float(h.sum())
    return total / (len(x) * (len(x) - 1))


def _rbf(x: Array, y: Array, bandwidth: float) -> Array:
    exponent: Array = euclidean_distances(x, y, squared=True)
    exponent *= -0.5 / bandwidth**2
    return np.exp(exponent, out=exponent)


def _chunks(n_rows: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // n_rows)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def retrieval_recall(
    aligned: NDArray[np.floating],
    text: NDArray[np.floating],
    at: tuple[int, ...] = RECALL_AT,
    asked: NDArray[np.integer] | None = None,
) -> dict[int, float]:
    """Percent of rows of `aligned` (M, D) whose own row of `text` (M, D) is among the k most similar.

    Of all rows, or of those numbered `asked` (m,), among all texts: the time grows with m M.


    Similarity is the cosine; a row of zeros has cosine 0 with everything. Rows with an identical text (a
    repeated title) are the own text. Among other texts of equal similarity any order is as good as another,
    so a row counts with its probability of being in the first k under a random order: g texts ahead and e
    equal (its own included) give clip((k - g) / e, 0, 1). A mapping to zeros thus scores chance, not 100.
    Memory: chunks of rows, never (M, M).
    """
    if np.shape(aligned) != np.shape(text) or len(text) == 0:
        raise ValueError(
            f"aligned, text: expected equal shapes and a row, got {np.shape(aligned)} and {np.shape(text)}"
        )
    a, t = normalize(_matrix("aligned", aligned)), normalize(_matrix("text", text))
    _, group, group_size = np.unique(text, axis=0, return_inverse=True, return_counts=True)
    copies = group_size[group.reshape(-1)] - 1
    hits = dict.fromkeys(at, 0.0)
    queries = np.arange(len(t)) if asked is None else asked
    together = max(1, CHUNK_ELEMENTS // len(t))
    for start in range(0, len(queries), together):
        rows = queries[start : start + together]
        similarity = a[rows] @ t.T
        own = similarity[np.arange(len(rows)), rows][:, None]
        ahead = np.count_nonzero(similarity > own + TIE, axis=1)
        equal = np.count_nonzero(similarity >= own - TIE, axis=1) - ahead - copies[rows]
        for k in at:
            hits[k] += float(np.clip((k - ahead) / equal, 0.0, 1.0).sum())
    return {k: 100.0 * hit / len(queries) for k, hit in hits.items()}


def alignment_metrics(aligned: NDArray[np.floating], text: NDArray[np.floating], *, seed: int) -> dict[str, float]:
    """How well mapped features lie on the textual distribution and near their own text.

    Args:
        aligned: (M, Dt) features mapped from the visual side, in the standardised textual space.
        text: (M, Dt) the true text of the same samples, standardised. Rows that are NaN throughout have no
            text and are left out of everything.
        seed: draws the halves of `frechet_floor` and, above 5 000 rows, the rows that `mmd` uses and those whose
            recall is asked for.

    Returns:
        `frechet`: squared Frechet distance of {aligned} and {text}, see `frechet_distance`.
        `frechet_floor`: that of two random halves of {text}: what finite samples of one distribution show.
        `mmd`: unbiased squared RBF-MMD, see `rbf_mmd`, on at most 5 000 rows; bandwidth by the median
            heuristic on at most 2 000 rows of the real text, which are different texts where drawn ones are all equal.
        `cosine`: mean cosine over true pairs, in [-1, 1].
        `recall_at_1`, `recall_at_5`, `recall_at_10`: percent, see `retrieval_recall`, of at most 5 000 rows among
            all texts.

    Raises:
        ValueError: shapes that differ, NaN or infinity, fewer than 4 rows with text, text whose rows are all
            equal.
    """
    aligned, text = _matrix("aligned", aligned), _matrix("text", text)
    if aligned.shape != text.shape:
        raise ValueError(f"aligned, text: shapes differ, {aligned.shape} and {text.shape}")
    present = np.any(~np.isnan(text), axis=1, keepdims=True)[:, 0]
    _finite("aligned", aligned)
    _finite("text", np.where(present[:, None], text, 0.0))
    aligned, text = aligned[present], text[present]
    if len(text) < 4:
        raise ValueError(f"text: alignment needs 4 rows with text or more, got {len(text)}")

    order = np.random.default_rng(seed).permutation(len(text))
    half = len(text) // 2
    drawn = order[:MMD_ROWS]
    bandwidth = median_bandwidth(text[order[:BANDWIDTH_ROWS]])
    if bandwidth == 0.0:  # as where all but a few rows have one text
        bandwidth = median_bandwidth(np.unique(text, axis=0)[:BANDWIDTH_ROWS])
    if bandwidth == 0.0:
        raise ValueError("text: all rows are equal, so there is no distribution to align with")
    recall = retrieval_recall(aligned, text, asked=np.sort(order[:RECALL_ROWS]))
    return {
        "frechet": frechet_distance(aligned, text),
        "frechet_floor": frechet_distance(text[order[:half]], text[order[half:]]),
        "mmd": rbf_mmd(aligned[drawn], text[drawn], bandwidth),
        "cosine": float(np.clip(np.mean(np.sum(normalize(aligned) * normalize(text), axis=1)), -1.0, 1.0)),
        **{f"recall_at_{k}": recall[k] for k in RECALL_AT},
    }
