"""Known answers for every metric, computed by hand or by another library."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_calibration_error

from seda_fast import metrics
from seda_fast.metrics import (
    alignment_metrics,
    classification_metrics,
    expected_calibration_error,
    frechet_distance,
    median_bandwidth,
    rbf_mmd,
    retrieval_recall,
)

DATA = Path(__file__).resolve().parents[1] / "../shared/data"


def random_log_proba(rows: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    logits = rng.normal(size=(rows, classes))
    logits[np.arange(rows), labels] += 1.5
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), labels


# --------------------------------------------------------------------------------------------- classification


def test_classification_by_hand() -> None:
    proba = np.array(
        [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]],
    )
    result = classification_metrics(np.log(proba), np.array([0, 1, 1, 2]))
    assert set(result) == {"top1", "top5", "balanced_accuracy", "ece"}
    assert result["top1"] == 75.0
    assert result["top5"] == 100.0
    assert result["balanced_accuracy"] == pytest.approx(100 * (1 + 0.5 + 1) / 3)
    # Four bins of one row: |1 - .7|, |0 - .6|, |1 - .5|, |1 - .8|.
    assert result["ece"] == pytest.approx(100 * (0.3 + 0.6 + 0.5 + 0.2) / 4)


def test_ece_bins_by_hand() -> None:
    # 0.70 and 0.72 share the bin [10/15, 11/15); 0.75 lies in the next; 1.0 in the last.
    confidence = np.array([0.70, 0.72, 0.75, 1.0])
    correct = np.array([True, False, True, True])
    assert expected_calibration_error(confidence, correct) == pytest.approx((abs(1 - 1.42) + 0.25 + 0.0) / 4)


@pytest.mark.parametrize("classes", [6, 28, 300])
def test_classification_against_other_libraries(classes: int) -> None:
    log_proba, labels = random_log_proba(2000, classes, seed=classes)
    result = classification_metrics(log_proba, labels)
    predicted = log_proba.argmax(axis=1)
    every = np.arange(classes)
    assert result["top1"] == pytest.approx(100 * accuracy_score(labels, predicted))
    assert result["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, log_proba, k=5, labels=every))
    assert result["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(labels, predicted))
    theirs = multiclass_calibration_error(
        torch.tensor(np.exp(log_proba)), torch.tensor(labels), num_classes=classes, n_bins=15
    )
    assert result["ece"] == pytest.approx(100 * float(theirs), abs=1e-3)  # theirs is float32


def test_unlabelled_rows_are_ignored_even_when_broken() -> None:
    log_proba, labels = random_log_proba(50, 7, seed=1)
    more = np.concatenate([log_proba, np.full((3, 7), np.nan)])
    assert classification_metrics(more, np.append(labels, [-1, -1, -1])) == classification_metrics(log_proba, labels)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_top5_with_few_classes_is_100(classes: int) -> None:
    assert classification_metrics(*random_log_proba(40, classes, seed=2))["top5"] == 100.0


def test_equal_probabilities_rank_by_index_as_argmax_does() -> None:
    uniform = np.full((8, 8), -np.log(8.0))
    result = classification_metrics(uniform, np.arange(8))
    assert result["top1"] == 12.5
    assert result["top5"] == 62.5
    assert result["ece"] == pytest.approx(0.0)


def test_a_class_of_probability_zero_and_one_of_certainty() -> None:
    log_proba = np.array([[0.0, -np.inf], [-np.inf, 0.0]], dtype=np.float32)
    assert classification_metrics(log_proba, np.array([0, 0]))["ece"] == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("log_proba", "labels", "message"),
    [
        (np.zeros((2, 1)), np.array([-1, -1]), "no labelled row"),
        (np.zeros((2, 1)), np.array([0, 1]), "labels: row 1 is 1, outside"),
        (np.zeros((2, 1)), np.array([-2, 0]), "labels: row 0 is -2, outside"),
        (np.zeros((2, 1)), np.array([0.0, 0.0]), "labels: expected 2 integers"),
        (np.zeros((2, 1)), np.array([0]), "labels: expected 2 integers"),
        (np.zeros(2), np.array([0, 0]), "log_proba: expected a real matrix"),
        (np.array([[0.0], [np.nan]]), np.array([0, 0]), "log_proba: row 1 holds NaN"),
        (np.array([[3.0, 1.0]]), np.array([0]), "the probabilities of row 0 sum to"),
    ],
)
def test_bad_classification_input(log_proba: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification_metrics(log_proba, labels)


# -------------------------------------------------------------------------------------------------- alignment


def test_frechet_of_shifted_and_scaled_sets_is_exact() -> None:
    # y = 3 x + m: covariances commute, so the distance is |(mean difference)|^2 + tr C (3 - 1)^2.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6))
    shift = np.arange(6.0)
    y = 3 * x + shift
    expected = np.square(y.mean(0) - x.mean(0)).sum() + np.trace(np.cov(x.T)) * 4
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_frechet_against_the_matrix_square_root() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12))
    y = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12)) + 0.5
    cx, cy = np.cov(x.T), np.cov(y.T)
    root = np.real(np.trace(sqrtm(cx @ cy)))
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cx) + np.trace(cy) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)


def test_frechet_with_fewer_rows_than_dimensions() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(10, 64))
    assert frechet_distance(x, x[::-1]) == pytest.approx(0.0, abs=1e-9)
    # Sets on orthogonal axes share nothing: the distance is the sum of both traces.
    a, b = np.zeros((5, 20)), np.zeros((7, 20))
    a[:, :10], b[:, 10:] = rng.normal(size=(5, 10)), rng.normal(size=(7, 10))
    a -= a.mean(0)
    b -= b.mean(0)
    assert frechet_distance(a, b) == pytest.approx(a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum(), rel=1e-12)


def naive_mmd(x: np.ndarray, y: np.ndarray, bandwidth: float) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-np.square(a - b).sum() / (2 * bandwidth**2)))

    n = len(x)
    terms = [
        kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i])
        for i in range(n)
        for j in range(n)
        if i != j
    ]
    return float(np.mean(terms))


def test_mmd_against_its_definition() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(15, 4)), rng.normal(loc=0.7, size=(15, 4))
    assert rbf_mmd(x, y, 1.7) == pytest.approx(naive_mmd(x, y, 1.7), rel=1e-10)
    assert rbf_mmd(x, x, 1.7) == pytest.approx(0.0, abs=1e-15)


def test_mmd_is_unbiased_for_pairs_that_depend_on_each_other() -> None:
    # y is x plus noise, halved so that both have one distribution: the mean over many draws must be near 0.
    rng = np.random.default_rng(4)
    values = []
    for _ in range(400):
        x = rng.normal(size=(20, 3))
        y = (x + rng.normal(size=(20, 3))) / np.sqrt(2)
        values.append(rbf_mmd(x, y, 1.5))
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


def test_median_bandwidth_by_hand() -> None:
    assert median_bandwidth(np.array([[0.0], [1.0], [3.0]])) == 2.0
    # Repeated rows do not pull it to zero.
    assert median_bandwidth(np.array([[0.0]] * 9 + [[4.0]])) == 4.0
    assert median_bandwidth(np.zeros((3, 2))) == 0.0


def test_recall_by_hand() -> None:
    text = np.eye(4)
    aligned = np.array(
        [
            [1.0, 0.5, 0.2, 0.1],  # own text first
            [0.9, 0.5, 0.2, 0.1],  # second
            [0.9, 0.5, 0.2, 0.1],  # third
            [0.9, 0.5, 0.2, 0.1],  # fourth
        ]
    )
    assert retrieval_recall(aligned, text, at=(1, 2, 3, 4)) == {1: 25.0, 2: 50.0, 3: 75.0, 4: 100.0}


def test_recall_of_a_constant_mapping_is_chance() -> None:
    text = np.random.default_rng(5).normal(size=(50, 8))
    assert retrieval_recall(np.zeros((50, 8)), text)[5] == pytest.approx(10.0)
    assert retrieval_recall(np.ones((50, 8)), text)[5] == pytest.approx(10.0)


def test_recall_counts_a_repeated_text_as_the_own_text() -> None:
    text = np.random.default_rng(6).normal(size=(30, 8))[np.arange(60) % 30]
    assert retrieval_recall(text, text)[1] == 100.0


@pytest.mark.parametrize("elements", [1, 37 * 5, 37 * 36])
def test_chunks_do_not_change_a_figure(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    rng = np.random.default_rng(7)
    text = rng.normal(size=(37, 9))
    aligned = text + 0.8 * rng.normal(size=text.shape)
    whole = alignment_metrics(aligned, text, seed=0)
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", elements)
    assert alignment_metrics(aligned, text, seed=0) == pytest.approx(whole, rel=1e-12)


def test_alignment_against_plain_formulas() -> None:
    rng = np.random.default_rng(8)
    text = rng.normal(size=(120, 10))
    aligned = 0.6 * text + rng.normal(size=text.shape)
    result = alignment_metrics(aligned.astype(np.float32), text.astype(np.float32), seed=3)
    assert list(result) == [
        "frechet", "frechet_floor", "mmd", "cosine", "recall_at_1", "recall_at_5", "recall_at_10"
    ]  # fmt: skip
    similarity = 1 - cdist(aligned, text, "cosine")
    rank = (similarity > np.diag(similarity)[:, None]).sum(axis=1)
    assert result["cosine"] == pytest.approx(np.diag(similarity).mean(), abs=1e-6)
    for k in (1, 5, 10):
        assert result[f"recall_at_{k}"] == pytest.approx(100 * (rank < k).mean())
    assert result["mmd"] == pytest.approx(naive_mmd(aligned, text, median_bandwidth(text)), abs=1e-6)
    assert result["frechet"] == pytest.approx(frechet_distance(aligned, text), rel=1e-5)


def test_perfect_alignment_and_the_seed() -> None:
    text = np.random.default_rng(9).normal(size=(64, 5))
    result = alignment_metrics(text, text, seed=0)
    assert result["frechet"] == pytest.approx(0.0, abs=1e-9)
    assert result["mmd"] == pytest.approx(0.0, abs=1e-12)
    assert result["cosine"] == pytest.approx(1.0)
    assert result["recall_at_1"] == 100.0
    assert result["frechet_floor"] > 0.0
    assert result == alignment_metrics(text, text, seed=0)
    assert result["frechet_floor"] != alignment_metrics(text, text, seed=1)["frechet_floor"]


def test_many_rows_use_a_seeded_subsample_for_mmd(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(10)
    text = rng.normal(size=(80, 4))
    aligned = text + rng.normal(size=text.shape)
    monkeypatch.setattr(metrics, "MMD_ROWS", 30)
    drawn = np.random.default_rng(5).permutation(80)[:30]
    expected = naive_mmd(aligned[drawn], text[drawn], median_bandwidth(text))
    assert alignment_metrics(aligned, text, seed=5)["mmd"] == pytest.approx(expected, rel=1e-9)


def test_many_rows_ask_a_seeded_part_for_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    text = rng.normal(size=(60, 3))
    mapped = text + 0.5 * rng.normal(size=text.shape)
    monkeypatch.setattr(metrics, "RECALL_ROWS", 20)
    found = metrics.alignment_metrics(mapped, text, seed=3)
    asked = np.random.default_rng(3).permutation(60)[:20]
    by_hand = [int((text[i] @ mapped[i] / np.linalg.norm(text[i])) < (text @ mapped[i] / np.linalg.norm(text, axis=1)
               - 1e-9).max()) for i in asked]  # fmt: skip
    assert found["recall_at_1"] == pytest.approx(100 * (1 - np.mean(by_hand)))
    assert found["recall_at_1"] not in (0, 100, metrics.alignment_metrics(mapped, text, seed=4)["recall_at_1"])


def test_few_different_texts_among_many_have_a_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """As texts of two classes, one of them rare: the rows drawn for the bandwidth may all be of the other."""
    monkeypatch.setattr(metrics, "BANDWIDTH_ROWS", 5)
    text = np.zeros((400, 3))
    text[7] = (3, 4, 0)
    mapped = text + np.random.default_rng(0).normal(size=text.shape)
    found = metrics.alignment_metrics(mapped, text, seed=0)
    drawn = np.random.default_rng(0).permutation(400)[: metrics.MMD_ROWS]
    assert found["mmd"] == pytest.approx(metrics.rbf_mmd(mapped[drawn], text[drawn], 5.0))


def test_rows_without_text_are_left_out() -> None:
    rng = np.random.default_rng(11)
    text = rng.normal(size=(40, 6))
    aligned = text + rng.normal(size=text.shape)
    missing = text.copy()
    missing[[3, 17]] = np.nan
    keep = np.delete(np.arange(40), [3, 17])
    assert alignment_metrics(aligned, missing, seed=0) == alignment_metrics(aligned[keep], text[keep], seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, t: (a[:5], t), "shapes differ"),
        (lambda a, t: (np.where(np.arange(20)[:, None] == 7, np.inf, a), t), "aligned: row 7 holds NaN"),
        (lambda a, t: (a, np.where((np.arange(20)[:, None] == 4) & (np.arange(3) == 1), np.nan, t)), "text: row 4"),
        (lambda a, t: (a[:3], t[:3]), "needs 4 rows with text or more, got 3"),
        (lambda a, t: (a, np.ones_like(t)), "text: all rows are equal"),
        (lambda a, t: (a, t.astype(str)), "text: expected a real matrix"),
    ],
)
def test_bad_alignment_input(change: object, message: str) -> None:
    rng = np.random.default_rng(12)
    aligned, text = change(rng.normal(size=(20, 3)), rng.normal(size=(20, 3)))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        alignment_metrics(aligned, text, seed=0)


def test_frechet_floor_of_the_fashion_titles() -> None:
    path = DATA / "fashion_products.npz"
    if not path.exists():
        pytest.skip("shared data set fashion_products is absent")
    with np.load(path, allow_pickle=False) as data:
        train, test = data["text_train"].astype(np.float64), data["text_test"].astype(np.float64)
    text = (test - train.mean(0)) / train.std(0)
    # Similar titles are neighbours in this file (mean cosine 0.55, of random pairs 0.04), so alternating rows give
    # halves that share near-copies: 18.65. Random halves gave 31.2 on average, standard deviation 1.8 over 20 draws.
    assert frechet_distance(text[::2], text[1::2]) == pytest.approx(18.65, abs=0.01)
    floor = alignment_metrics(text, text, seed=0)["frechet_floor"]
    assert 26.0 < floor < 37.0
