"""The start of the textual head: a classifier of the training texts."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from seda_fast import FeatureSet, SeDAConfig, TrainConfig
from seda_fast.loop import train
from seda_fast.nn import textual_head
from seda_fast.nn.textual_head import L2, fitted_textual_head, textual_head_rows
from seda_fast.prepare import prepare

K, DT = 4, 7


def texts(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised texts of few dimensions (rows, DT), whose classes (rows,) a linear classifier tells apart."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % K
    text = np.eye(K, DT)[labels] + 0.2 * rng.standard_normal((rows, DT))
    text = (text - text.mean(0)) / text.std(0)
    return torch.from_numpy(text.astype(np.float32)), torch.from_numpy(labels)


def feature_set(missing: bool = False) -> FeatureSet:
    text, labels = texts(160)
    visual = np.random.default_rng(1).standard_normal((160, 9)).astype(np.float32)
    text_train = text.numpy().copy()
    if missing:
        text_train[::3] = np.nan
    y = labels.numpy()
    return FeatureSet.from_arrays(visual, text_train, y, visual[:8], y[:8], unpaired="keep")


def test_it_is_the_penalised_logistic_regression() -> None:
    text, labels = texts(200)
    found = fitted_textual_head(text, labels, K)
    expected = LogisticRegression(C=1 / (L2 * len(text)), max_iter=1000, tol=1e-8).fit(text.numpy(), labels.numpy())
    torch.testing.assert_close(found.weight, torch.from_numpy(expected.coef_).float(), atol=5e-3, rtol=5e-2)


def test_several_classes_a_row_have_a_yes_or_no_each() -> None:
    text, labels = texts(200)
    several = torch.stack([(labels == k) | (labels == (k + 1) % K) for k in range(K)], dim=1).to(torch.int8)
    found = fitted_textual_head(text, several, K)
    assert (((text @ found.weight.T + found.bias) > 0) == several.bool()).float().mean() > 0.97


@pytest.mark.parametrize("missing", [False, True], ids=["all texts", "a third missing"])
def test_a_model_begins_and_stays_with_a_head_that_knows_its_texts(missing: bool) -> None:
    data = feature_set(missing)
    text, labels = texts(160)
    sizes = {"visual_dim": data.visual_dim, "text_dim": data.text_dim, "n_classes": data.n_classes}
    model, rows = prepare(data, SeDAConfig(**sizes, width=32, blocks=1), 0, torch.device("cpu"))
    before = float((model.translator.head(text).argmax(1) == labels).float().mean())
    trained, _ = train(model, rows, TrainConfig(epochs=4))
    after = float((trained.translator.head(text).argmax(1) == labels).float().mean())
    assert min(before, after) > 0.97


def test_no_text_no_label_or_one_class_leave_it_as_drawn() -> None:
    labels, paired = torch.arange(20) % K, torch.ones(20, dtype=torch.bool)
    assert textual_head_rows(labels, paired, DT, K, 0).tolist() == list(range(20))
    assert not len(textual_head_rows(labels, ~paired, DT, K, 0))
    assert not len(textual_head_rows(torch.full((20,), -1), paired, DT, K, 0))
    assert not len(textual_head_rows(torch.where(labels == 1, 1, -1), paired, DT, K, 0))


def test_many_rows_are_drawn_from_and_too_many_classes_are_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, paired = torch.arange(300) % K, torch.ones(300, dtype=torch.bool)
    monkeypatch.setattr(textual_head, "LABELLED_ROWS", 50)
    found = textual_head_rows(labels, paired, DT, K, 3)
    assert len(found) == 50 == len(found.unique())
    assert found.equal(textual_head_rows(labels, paired, DT, K, 3))
    assert not found.equal(textual_head_rows(labels, paired, DT, K, 4))
    rare = torch.where(torch.arange(300) == 299, K, labels)
    for seed in range(3):
        assert 299 in textual_head_rows(rare, paired, DT, K + 1, seed), "of each class one row before any has two"
    monkeypatch.setattr(textual_head, "_LARGEST_FIT", 7 * DT * K)
    assert not len(textual_head_rows(labels, paired, DT, K, 3))
    assert len(textual_head_rows(labels[:7], paired[:7], DT, K, 3)) == 7
