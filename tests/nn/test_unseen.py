"""Classes that no text shows: whoever adds texts loses no class."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from seda_fast import DataError, FeatureSet, SeDA, SeDAConfig, train
from seda_fast.estimator import SeDAClassifier
from seda_fast.nn.teacher import LABELLED_ROWS, lone_rows, teacher_rows
from seda_fast.nn.unseen import beyond_the_seen, classes_without_pairs
from seda_fast.prepare import prepare

K, DV, DT = 5, 10, 8


def rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Visual features, labels and texts, of classes that are the same for all seeds."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    centres, texts = 0.9 * fixed.normal(size=(K, DV)), 2 * fixed.normal(size=(K, DT))
    labels = np.arange(count) % K
    visual, text = centres[labels] + rng.normal(size=(count, DV)), texts[labels] + rng.normal(size=(count, DT))
    return visual.astype(np.float32), labels, text.astype(np.float32)


def recalls(*arrays: Any, **settings: Any) -> np.ndarray:
    small = {"width": 32, "visual_width": 32, "blocks": 1, "epochs": 20, "batch_size": 32, "random_state": 0}
    model = SeDAClassifier(**{**small, **settings}).fit(*arrays)
    visual, labels, _ = rows(1000, 9)
    return np.array([(model.predict(visual)[labels == k] == k).mean() for k in range(K)])


def test_classes_without_pairs_are_those_of_labelled_rows_without_text() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, -1])
    paired = torch.tensor([True, False, False, False, True, True])
    assert classes_without_pairs(labels, paired, 4) == torch.tensor([1]), "class 3 has no labelled row"
    assert classes_without_pairs(labels, torch.ones(6, dtype=torch.bool), 4) is None
    several = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [-1, -1, -1, -1]])
    assert classes_without_pairs(several, torch.tensor([True, False, True]), 4) == torch.tensor([1])


def test_others_tell_of_unseen_classes_and_texts_of_the_rest() -> None:
    textual, others = torch.randn(6, 4).log_softmax(1), torch.randn(6, 4).log_softmax(1)
    unseen = torch.tensor([False, True, False, False])
    found = beyond_the_seen(textual, others, unseen)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(6))
    torch.testing.assert_close(found[:, 1], others[:, 1])
    expected = textual[:, [0, 2, 3]].softmax(1) * (1 - others[:, 1].exp())[:, None]
    torch.testing.assert_close(found[:, [0, 2, 3]].exp(), expected)
    torch.testing.assert_close(beyond_the_seen(textual, others, torch.ones(4, dtype=torch.bool)), others)


def test_a_class_whose_rows_have_no_text_is_still_predicted() -> None:
    """It had no chance against the textual head, which gave it nothing (recalls of .54 and .62 instead of .8)."""
    visual, labels, text = rows(200, 1)
    none = recalls(visual, labels)
    text[labels > 2] = np.nan
    some = recalls(visual, labels, text)
    assert some[3:].min() > 0.8 * none[3:].min()
    assert some.mean() > none.mean() - 0.03


@pytest.mark.parametrize("first", [3, 4])
def test_unlabelled_pairs_lose_no_class_whose_rows_have_no_text(first: int) -> None:
    """A teacher that can name three of five classes labelled the pairs of all with these (recalls of 0)."""
    (visual, labels, text), (more, _, other) = rows(100, 1), rows(300, 2)
    text[labels >= first] = np.nan
    arrays = np.r_[visual, more], np.r_[labels, np.full(300, -1)]
    with_pairs, alone = recalls(*arrays, np.r_[text, other], unlabelled=-1), recalls(visual, labels)
    assert with_pairs[first:].min() > 0.6 * alone[first:].min()
    assert with_pairs.mean() > alone.mean() - 0.03


def test_a_class_without_text_is_not_voted_down_beside_a_teacher_of_the_others() -> None:
    """A fifth of the labelled rows are of it, so there is a teacher, which names none of its pairs: it had a recall of
    0.08 where labelled rows alone give 0.83."""
    visual, labels, text = rows(500, 1)
    text[labels == 4] = np.nan
    given = np.where((np.arange(500) >= 100) & (labels != 4), -1, labels)
    used = (labels != 4) | (np.arange(500) < 100)
    with_pairs = recalls(visual[used], given[used], text[used], unlabelled=-1)
    known = used & (given >= 0)
    alone = recalls(visual[known], given[known])
    assert with_pairs[4] > 0.6 * alone[4]
    assert with_pairs.mean() > alone.mean() - 0.03


def test_a_lone_textual_head_is_asked_of_every_class() -> None:
    config = SeDAConfig(visual_dim=DV, text_dim=DT, n_classes=K, width=16, blocks=1, multi_label=True,
                        textual_weight=1.0, visual_weight=0.0, kernel_weight=0.0)  # fmt: skip
    model, visual = SeDA(config).eval(), torch.randn(6, DV)
    torch.nn.init.normal_(model.translator.head.weight)
    with torch.no_grad():
        before = model(visual)
        model._mark_unseen(torch.tensor([4]))
        assert torch.equal(model(visual), before)


def test_a_multi_label_class_that_no_text_shows_is_still_predicted() -> None:
    visual, labels, text = rows(200, 1)
    carried = (np.stack([labels, (labels + 1) % K], 1)[:, :, None] == np.arange(K)).any(1).astype(np.int64)
    text[carried[:, 3] == 1] = np.nan
    small = {"width": 32, "visual_width": 32, "blocks": 1, "epochs": 20, "batch_size": 32, "random_state": 0}
    test, classes, _ = rows(500, 9)
    truth = (classes == 3) | (classes == 2)
    found = [SeDAClassifier(**small).fit(visual, carried, t).predict(test)[:, 3] == 1 for t in (text, None)]
    assert found[0][truth].mean() > max(0.25, 0.8 * found[1][truth].mean())
    assert found[0][~truth].mean() < found[1][~truth].mean() + 0.1


def test_what_is_unseen_is_saved_and_a_damaged_list_is_refused(tmp_path: Path) -> None:
    visual, labels, text = rows(60, 1)
    text[labels == 4] = np.nan
    given = FeatureSet.from_arrays(
        visual_train=visual, label_train=labels, text_train=text, visual_test=visual, label_test=labels, unpaired="keep"
    )
    config = SeDAConfig(visual_dim=DV, text_dim=DT, n_classes=K, width=16, visual_width=16, blocks=1)
    model, _ = prepare(given, config, 0, torch.device("cpu"))
    assert model.unseen is not None
    assert model.unseen.tolist() == [False] * 4 + [True]
    model.eval().save_pretrained(tmp_path)
    x = torch.from_numpy(visual)
    assert torch.equal(SeDA.from_pretrained(tmp_path)(x), model(x))
    # As a state, too, of a module like any other, and of one that has no such classes.
    other = SeDA(config).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    for buffer in ("unseen", "seen"):
        assert torch.equal(getattr(other, buffer), getattr(model, buffer))
    assert torch.equal(other(x), model(x))
    other.load_state_dict({name: value for name, value in other.state_dict().items() if name != "unseen"})
    assert other.unseen is None
    assert other.seen is None
    model.unseen[4] = False
    assert not torch.equal(SeDA.from_pretrained(tmp_path)(x), model(x))
    model.unseen = torch.ones(K + 1, dtype=torch.bool)
    model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="not a model of this library"):
        SeDA.from_pretrained(tmp_path)


def test_the_text_teaches_nothing_of_classes_that_it_does_not_show() -> None:
    torch.manual_seed(0)
    config = SeDAConfig(visual_dim=DV, text_dim=DT, n_classes=K, width=16, visual_width=16, blocks=1)
    model = SeDA(config)
    labels, paired = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([True, True, True, False, False])
    model.set_unseen(labels, paired)
    s, t, text = torch.randn(5, DV), torch.randn(5, DT), torch.randn(5, DT)
    weights = paired.float() / 3
    found = model._teacher(s, t, text, weights, 2.0)
    expected = torch.zeros(())
    for student in (model.learner.head(s), model.translator.head(t)):
        target = F.log_softmax(model.translator.head(text)[:, :3] / 2, 1)
        each = F.kl_div(F.log_softmax(student[:, :3] / 2, 1), target, reduction="none", log_target=True).sum(1)
        expected = expected + 2 * (each * weights).sum()
    torch.testing.assert_close(found, expected)


def test_a_run_says_which_classes_have_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    visual, labels, text = rows(60, 1)
    text[labels == 4] = np.nan
    arrays = {"visual_train": visual, "label_train": labels, "text_train": text, "visual_test": visual}
    np.savez(tmp_path / "a.npz", **arrays, label_test=labels)
    small = ["--width", "16", "--blocks", "1", "--epochs", "1", "--no-baselines", "--unpaired", "keep"]
    assert train.main(["--data", str(tmp_path / "a.npz"), "--out", str(tmp_path / "run"), *small]) == 0
    assert (
        "1 of 5 classes have labelled rows but none with a text: only images tell of these\n" in capsys.readouterr().err
    )
    arrays["label_train"] = np.where(np.arange(60) < 20, labels, -1)
    arrays["text_train"] = np.where((arrays["label_train"] > 2)[:, None], np.nan, text)
    np.savez(tmp_path / "b.npz", **arrays, label_test=labels)
    assert train.main(["--data", str(tmp_path / "b.npz"), "--out", str(tmp_path / "b"), *small]) == 0
    assert "only images tell of these, and no teacher labels the unlabelled pairs" in capsys.readouterr().err


def test_of_many_labelled_rows_each_class_keeps_one() -> None:
    labels = torch.zeros(4 * LABELLED_ROWS, dtype=torch.int64)
    labels[-30:-1] = torch.arange(1, 30)
    labels[-1] = -1
    paired = torch.ones(len(labels), dtype=torch.bool)
    chosen = teacher_rows(labels, paired, 0)
    assert len(chosen) == LABELLED_ROWS + 1
    assert set(labels[chosen].tolist()) == set(range(-1, 30))
    assert set(labels[lone_rows(labels, ~paired, 0)].tolist()) == set(range(30))
