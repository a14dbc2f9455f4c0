"""The baselines: what they learn from, what they refuse, and that they are strong enough to be worth beating."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from seda_fast.baselines import BASELINES, Baseline, LinearSettings, _holdout, fit_baseline

DATA = Path(__file__).resolve().parents[1] / "../shared/data"
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def digits() -> Arrays:
    """Standardised pixels, a noisy random projection of the one-hot digit as text, labels; 1 797 rows."""
    rng = np.random.default_rng(0)
    pixels, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    pixels, labels = pixels[order], labels[order]
    visual = (pixels - pixels.mean(0)) / np.maximum(pixels.std(0), 1e-3)
    text = rng.normal(size=(10, 24))[labels] + 0.7 * rng.normal(size=(len(labels), 24))
    text = (text - text.mean(0)) / text.std(0)
    return visual.astype(np.float32), text.astype(np.float32), labels.astype(np.int64)


def small(digits: Arrays, rows: int = 400) -> Arrays:
    visual, text, labels = digits
    return visual[:rows].copy(), text[:rows].copy(), labels[:rows].copy()


def fit(name: str, arrays: Arrays, **settings: Any) -> Baseline:
    return fit_baseline(name, *arrays, **{"n_classes": 10, "seed": 0, "epochs": 3, **settings})


def accuracy(baseline: Baseline, visual: np.ndarray, labels: np.ndarray) -> float:
    return float((baseline.log_proba(visual).argmax(axis=1) == labels).mean())


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean((x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))))


@pytest.mark.parametrize("name", BASELINES)
def test_shapes_and_sensible_accuracy_on_digits(name: str, digits: Arrays) -> None:
    visual, text, labels = digits
    baseline = fit(name, (visual[:1300], text[:1300], labels[:1300]), epochs=15)
    log_proba = baseline.log_proba(visual[1300:])
    assert log_proba.shape == (497, 10) and log_proba.dtype == np.float32
    np.testing.assert_allclose(np.exp(log_proba).sum(axis=1), 1.0, atol=1e-5)
    assert accuracy(baseline, visual[1300:], labels[1300:]) > 0.93
    assert baseline.seconds > 0.0
    mapped = baseline.aligned(visual[1300:])
    if name in ("linear", "mlp"):
        assert mapped is None
    else:
        assert mapped is not None and mapped.shape == (497, 24) and mapped.dtype == np.float32
        # The noise alone keeps a perfect mapping of the digit to about 0.8; the cross entropy pulls one_step away.
        assert cosine(mapped, text[1300:]) > (0.6 if name == "one_step_mse" else 0.4)


@pytest.mark.parametrize("name", BASELINES)
def test_one_seed_one_result_and_the_global_generator_is_left_alone(name: str, digits: Arrays) -> None:
    arrays = small(digits)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = fit(name, arrays, seed=5).log_proba(arrays[0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    np.testing.assert_array_equal(fit(name, arrays, seed=5).log_proba(arrays[0]), first)
    if name != "linear":  # another seed may choose the same penalty, and then the same probe
        assert not np.array_equal(fit(name, arrays, seed=6).log_proba(arrays[0]), first)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_unlabelled_rows_and_text_do_not_matter_to_the_visual_baselines(name: str, digits: Arrays) -> None:
    visual, text, labels = small(digits)
    hidden = labels.copy()
    hidden[300:] = -1
    expected = fit(name, (visual[:300], text[:300], labels[:300])).log_proba(visual)
    got = fit(name, (visual, np.full_like(text, np.nan), hidden)).log_proba(visual)
    np.testing.assert_array_equal(got, expected)


def test_one_step_learns_the_mapping_from_unlabelled_rows(digits: Arrays) -> None:
    visual, text, labels = digits
    few = np.where(np.arange(1300) < 60, labels[:1300], -1)
    held, truth = visual[1300:], text[1300:]
    with_pairs = fit("one_step", (visual[:1300], text[:1300], few), epochs=10).aligned(held)
    labelled_only = fit("one_step", (visual[:60], text[:60], labels[:60]), epochs=10).aligned(held)
    assert with_pairs is not None and labelled_only is not None
    assert cosine(with_pairs, truth) > cosine(labelled_only, truth) + 0.1


def test_rows_without_text_train_the_classifier_of_one_step(digits: Arrays) -> None:
    visual, text, labels = digits
    missing = text[:1300].copy()
    missing[100:] = np.nan
    baseline = fit("one_step", (visual[:1300], missing, labels[:1300]), epochs=10)
    few = fit("one_step", (visual[:100], text[:100], labels[:100]), epochs=10)
    assert accuracy(baseline, visual[1300:], labels[1300:]) > 0.9
    assert accuracy(baseline, visual[1300:], labels[1300:]) > accuracy(few, visual[1300:], labels[1300:])


def test_one_step_mse_ignores_labels_in_its_mapping(digits: Arrays) -> None:
    visual, text, labels = small(digits)
    shuffled = np.random.default_rng(1).permutation(labels)
    first = fit("one_step_mse", (visual, text, labels)).aligned(visual)
    second = fit("one_step_mse", (visual, text, shuffled)).aligned(visual)
    np.testing.assert_array_equal(first, second)


def test_one_step_mse_needs_its_text_and_not_the_rows_without(digits: Arrays) -> None:
    visual, text, labels = small(digits)
    missing = text.copy()
    missing[300:] = np.nan
    expected = fit("one_step_mse", (visual[:300], text[:300], labels[:300])).log_proba(visual)
    np.testing.assert_array_equal(fit("one_step_mse", (visual, missing, labels)).log_proba(visual), expected)


def test_linear_is_scikit_learns_with_the_penalty_chosen_on_the_holdout(digits: Arrays) -> None:
    visual, text, labels = small(digits)
    baseline = fit("linear", (visual, text, labels), l2_grid=(1.0, 0.01, 1e-6))
    held = _holdout(labels, np.arange(len(labels)), 0.2, seed=0)
    wide = visual.astype(np.float64)
    losses = {}
    for l2 in (1.0, 0.01, 1e-6):
        model = LogisticRegression(C=1 / (l2 * (~held).sum()), max_iter=2000).fit(wide[~held], labels[~held])
        losses[l2] = -model.predict_log_proba(wide[held])[np.arange(held.sum()), labels[held]].mean()
    best = min(losses, key=losses.__getitem__)
    assert baseline.hyperparameters["l2"] == best
    final = LogisticRegression(C=1 / (best * len(labels)), max_iter=1000).fit(wide, labels)
    np.testing.assert_allclose(baseline.log_proba(visual), final.predict_log_proba(wide), atol=1e-4)


def test_linear_with_two_classes_and_with_a_class_never_seen(digits: Arrays) -> None:
    visual, text, labels = small(digits)
    two = np.isin(labels, [3, 7])
    baseline = fit("linear", (visual[two], text[two], labels[two]))
    log_proba = baseline.log_proba(visual[two])
    l2 = baseline.hyperparameters["l2"]
    wide = visual[two].astype(np.float64)
    expected = LogisticRegression(C=1 / (l2 * two.sum()), max_iter=1000).fit(wide, labels[two])
    np.testing.assert_allclose(log_proba[:, [3, 7]], expected.predict_log_proba(wide), atol=1e-4)
    assert np.all(log_proba[:, [0, 1, 2, 4, 5, 6, 8, 9]] == -np.inf)


def test_holdout_is_stratified_and_leaves_every_class_a_row() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 10, 2, 1])
    own = np.arange(len(labels))
    held = _holdout(labels, own, 0.2, seed=0)
    assert [int(held[labels == c].sum()) for c in range(4)] == [20, 2, 1, 0]
    assert not np.array_equal(held, _holdout(labels, own, 0.2, seed=1))


def test_rows_of_an_image_are_held_out_together() -> None:
    """As where an image has several captions: its copies would choose the weakest penalty."""
    images = np.repeat(np.arange(0, 150, 5), 5)
    labels = np.repeat([0, 1, 2], [100, 45, 5])
    held = _holdout(labels, images, 0.2, seed=0)
    assert [int(held[labels == c].sum()) for c in range(3)] == [20, 10, 0]
    assert (held.reshape(30, 5).all(axis=1) == held.reshape(30, 5).any(axis=1)).all()
    # Every class keeps a row, also one that has but copies of others' images.
    held = _holdout(np.array([0, 1] * 10), np.repeat(np.arange(0, 20, 2), 2), 0.5, seed=0)
    assert 0 < held.sum() < 20 and set(np.arange(20)[~held] % 2) == {0, 1}

    rng = np.random.default_rng(0)
    visual, labels = rng.standard_normal((40, 200)).astype(np.float32), np.arange(40) % 2
    visual[:, 0] += labels
    chosen = []
    for copies in (1, 5):
        rows = np.repeat(np.arange(40), copies)
        for truth in (labels, np.eye(2, dtype=np.int64)[labels]):
            data = visual[rows], visual[rows], truth[rows]
            chosen.append(fit_baseline("linear", *data, n_classes=2, seed=0).hyperparameters["l2"])
    assert chosen[:2] == chosen[2:]


def test_one_row_a_class_takes_the_middle_of_the_grid() -> None:
    visual = np.eye(4, 6, dtype=np.float32)
    text = np.zeros((4, 3), np.float32)
    baseline = fit_baseline("linear", visual, text, np.arange(4), n_classes=4, seed=0)
    grid = sorted(LinearSettings().l2_grid)
    assert baseline.hyperparameters["l2"] == grid[len(grid) // 2]
    assert accuracy(baseline, visual, np.arange(4)) == 1.0


@pytest.mark.parametrize("name", BASELINES)
def test_prediction_blocks_and_no_rows(name: str, digits: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = small(digits)
    baseline = fit(name, arrays)
    whole = baseline.log_proba(arrays[0])
    monkeypatch.setattr("seda_fast.baselines.PREDICTION_ROWS", 64)
    np.testing.assert_allclose(baseline.log_proba(arrays[0]), whole, atol=1e-5)
    assert baseline.log_proba(arrays[0][:0]).shape == (0, 10)


@pytest.mark.parametrize(("name", "total"), [("linear", 8), ("mlp", 3), ("one_step", 3), ("one_step_mse", 3)])
def test_progress_ends_at_its_total(name: str, total: int, digits: Arrays) -> None:
    calls: list[tuple[int, int]] = []
    fit(name, small(digits), progress=lambda done, of: calls.append((done, of)))
    assert calls[-1] == (total, total)
    assert {of for _, of in calls} == {total}
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_hyperparameters_are_used_and_recorded(digits: Arrays) -> None:
    baseline = fit("mlp", small(digits), width=32, depth=3, dropout=0.1, lr=2e-3, batch_size=50)
    assert baseline.hyperparameters["width"] == 32 and baseline.hyperparameters["batch_size"] == 50
    shapes = [tuple(p.shape) for p in baseline.network.parameters() if p.ndim == 2]
    assert shapes == [(32, 64), (32, 32), (32, 32), (10, 32)]


def set_value(array: np.ndarray, row: int, value: float) -> np.ndarray:
    changed = array.copy()
    changed[row, 1] = value
    return changed


@pytest.mark.parametrize(
    ("name", "settings", "change", "message"),
    [
        ("ridge", {}, None, "no baseline 'ridge', expected one of linear, mlp"),
        ("mlp", {"l2_grid": (1.0,)}, None, "mlp: no hyperparameter 'l2_grid'"),
        ("linear", {"lr": 0.1}, None, "linear: no hyperparameter 'lr'"),
        ("mlp", {"dropout": 1.0}, None, "dropout: expected a number in"),
        ("mlp", {"lr": 0.0}, None, "lr: expected a positive number"),
        ("mlp", {"width": 0}, None, "width: expected 1 or more"),
        ("mlp", {"epochs": 0}, None, "epochs, batch_size: expected 1 or more"),
        ("linear", {"l2_grid": ()}, None, "l2_grid: expected positive numbers"),
        ("linear", {"holdout": 1.0}, None, "holdout: expected a number between"),
        ("mlp", {}, lambda v, t, y: (v[:-1], t, y), "visual, text, labels: expected"),
        ("mlp", {}, lambda v, t, y: (set_value(v, 4, np.inf), t, y), "visual: row 4 holds NaN"),
        ("mlp", {}, lambda v, t, y: (v, set_value(t, 9, np.nan), y), "text: row 9 holds NaN"),
        ("mlp", {}, lambda v, t, y: (v, t, y + 5), "outside"),
        ("mlp", {}, lambda v, t, y: (v, t, y.astype(float)), "labels: expected integers"),
        ("mlp", {}, lambda v, t, y: (v, t, np.full_like(y, -1)), "no labelled row, so mlp cannot"),
        ("linear", {}, lambda v, t, y: (v, t, np.full_like(y, -1)), "needs labelled rows of 2 classes, got 0"),
        ("linear", {}, lambda v, t, y: (v, t, np.zeros_like(y)), "needs labelled rows of 2 classes, got 1"),
        ("one_step", {}, lambda v, t, y: (v, np.full_like(t, np.nan), y), "no row has text, so one_step cannot"),
        ("one_step_mse", {}, lambda v, t, y: (v, t, np.full_like(y, -1)), "needs labelled rows of 2 classes"),
    ],
)
def test_what_is_refused(name: str, settings: Any, change: Any, message: str, digits: Arrays) -> None:
    arrays = small(digits, rows=60)
    with pytest.raises(ValueError, match=message):
        fit(name, change(*arrays) if change else arrays, **settings)


def test_prediction_refuses_another_width(digits: Arrays) -> None:
    arrays = small(digits)
    with pytest.raises(ValueError, match=r"visual: expected shape \(M, 64\)"):
        fit("mlp", arrays).log_proba(arrays[0][:, :10])


# Half a point to two below what was seen with seed 0 (29.4, 30.3, 29.3 and 93.3, 91.7, 92.2): one split of these
# sizes has a standard error of 1.7 and 2 points, but the features are fixed, so only the fit itself varies.
@pytest.mark.parametrize(
    ("data", "name", "least"),
    [
        ("wikipedia", "linear", 28.0),
        ("wikipedia", "mlp", 27.0),
        ("wikipedia", "one_step", 26.0),
        ("cub10_googlenet_doc2vec", "linear", 91.0),
        ("cub10_googlenet_doc2vec", "mlp", 89.0),
        ("cub10_googlenet_doc2vec", "one_step", 90.0),
    ],
)
def test_strength_on_the_shared_sets(data: str, name: str, least: float) -> None:
    path = DATA / f"{data}.npz"
    if not path.exists():
        pytest.skip(f"shared data set {data} is absent")
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    mean, std = arrays["visual_train"].mean(0), np.maximum(arrays["visual_train"].std(0), 1e-6)
    text = arrays["text_train"]
    text = (text - text.mean(0)) / np.maximum(text.std(0), 1e-6)
    visual, labels = (arrays["visual_train"] - mean) / std, arrays["label_train"]
    baseline = fit_baseline(name, visual, text, labels, n_classes=10, seed=0)
    assert 100 * accuracy(baseline, (arrays["visual_test"] - mean) / std, arrays["label_test"]) > least
