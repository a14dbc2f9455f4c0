"""`SeDAClassifier` is a scikit-learn estimator: its checks, pipelines, searches, files, and the command's training."""

import dataclasses
import errno
import importlib.util
import json
import warnings
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
import torch
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import VotingClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import seda_fast
from seda_fast import DataError, SeDA, SeDAClassifier, SeDAConfig, TrainConfig, evaluate, predict, train
from seda_fast.config import ConfigError
from seda_fast.measure import raw_class_texts
from seda_fast.metrics import classification_metrics

SMALL: dict[str, Any] = {
    "width": 16,
    "blocks": 1,
    "expansion": 1,
    "time_embedding": 4,
    "diffusion_steps": 20,
    "semantic_steps": 2,
    "textual_steps": 2,
    "epochs": 10,
    "batch_size": 32,
    "learning_rate": 1e-2,
    "device": "cpu",
}
TREES = np.array(["ash", "beech", "cedar"])


@dataclasses.dataclass
class Sample:
    """(N, 8) features, (N, 5) texts and (N,) labels of a learnable set."""

    visual: np.ndarray
    text: np.ndarray
    labels: np.ndarray


def sample(rows: int, seed: int = 3) -> Sample:
    worlds = np.random.default_rng(1)
    centres, texts = 2 * worlds.normal(size=(3, 8)), 2 * worlds.normal(size=(3, 5))
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % 3
    return Sample(
        (centres[labels] + rng.normal(size=(rows, 8))).astype(np.float32),
        (texts[labels] + rng.normal(size=(rows, 5))).astype(np.float32),
        labels,
    )


@pytest.fixture(scope="module")
def data() -> Sample:
    return sample(90)


@pytest.fixture(scope="module")
def fitted(data: Sample) -> SeDAClassifier:
    return SeDAClassifier(**SMALL, random_state=5).fit(data.visual, TREES[data.labels], text=data.text)


# Without text, as scikit-learn's checks know of none. None is expected to fail.
@parametrize_with_checks([SeDAClassifier(**SMALL)])
def test_scikit_learn_checks(estimator: SeDAClassifier, check: Any) -> None:
    check(estimator)


def test_every_setting_is_a_parameter_with_the_default_of_config() -> None:
    given = SeDAClassifier().get_params()
    from_config = {f.name: f.default for c in (SeDAConfig, TrainConfig) for f in dataclasses.fields(c)}
    for name in ("visual_dim", "text_dim", "n_classes", "class_text", "multi_label", "seed"):
        assert name not in given
        del from_config[name]
    assert given == {**from_config, "device": "auto", "unlabelled": None, "random_state": None}
    with pytest.raises(TypeError, match="no parameter 'widht'"):
        SeDAClassifier(widht=3)
    assert clone(SeDAClassifier(width=24, random_state=2)).get_params()["width"] == 24


def test_trains_what_the_command_trains(tmp_path: Path, data: Sample, fitted: SeDAClassifier) -> None:
    parts = {"visual": data.visual, "text": data.text, "label": data.labels}
    arrays = {f"{name}_{part}": array for name, array in parts.items() for part in ("train", "test")}
    np.savez(tmp_path / "data.npz", **arrays)
    options = [word for name, value in SMALL.items() for word in ("--" + name.replace("_", "-"), str(value))]
    common = ["--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "run"), "--seed", "5", "--no-baselines"]
    assert train.main([*common, *options]) == 0
    expected = SeDA.from_pretrained(tmp_path / "run").state_dict()
    for name, value in fitted.model_.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert len(fitted.history_) == SMALL["epochs"]


def test_predicts_unseen_rows(fitted: SeDAClassifier) -> None:
    unseen = sample(60, seed=4)
    assert fitted.score(unseen.visual, TREES[unseen.labels]) > 0.9
    p = fitted.predict_proba(unseen.visual)
    assert p.shape == (60, 3)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)
    np.testing.assert_array_equal(fitted.predict(unseen.visual), TREES[p.argmax(1)])
    np.testing.assert_allclose(np.log(p), fitted.predict_log_proba(unseen.visual), rtol=1e-12)


@pytest.mark.parametrize("call", ["predict", "predict_proba", "predict_log_proba", "transform"])
def test_a_prediction_that_is_no_number_is_refused_with_its_row(fitted: SeDAClassifier, call: str) -> None:
    rows = np.ones((9, fitted.n_features_in_), np.float32)
    rows[7] = 3e38
    with pytest.raises(ValueError, match="row 7 of X has features so large that its prediction is not a number"):
        getattr(fitted, call)(rows)


def test_transform_gives_features_that_lie_near_their_texts(fitted: SeDAClassifier) -> None:
    unseen = sample(60, seed=4)
    aligned = fitted.transform(unseen.visual)
    assert aligned.shape == (60, 5)
    assert aligned.dtype == np.float32
    model = fitted.model_
    text = model.standardise_text(torch.from_numpy(unseen.text)).numpy()
    distances = ((aligned[:, None] - text[None]) ** 2).sum(2)
    same = unseen.labels[:, None] == unseen.labels[None]
    assert distances[same].mean() < 0.5 * distances[~same].mean()
    assert fitted.get_feature_names_out().tolist() == [f"sedaclassifier{i}" for i in range(5)]


def test_a_row_does_not_depend_on_its_neighbours(fitted: SeDAClassifier) -> None:
    visual = sample(150, seed=6).visual
    order = np.random.default_rng(0).permutation(150)
    for method in (fitted.predict_log_proba, fitted.transform):
        whole = method(visual)
        np.testing.assert_array_equal(method(visual[order]), whole[order])
        np.testing.assert_array_equal(method(visual[77:78]), whole[77:78])
    # Different rows see different noise: with one draw for all, samples of the text would move together.
    twice = np.repeat(visual[:1], 40, axis=0)
    shaken = twice + np.float32(1e-6) * np.random.default_rng(1).normal(size=twice.shape).astype(np.float32)
    assert np.ptp(fitted.transform(twice), axis=0).max() == 0
    assert np.ptp(fitted.transform(shaken), axis=0).max() > 1e-3


def test_a_temperature_of_held_out_rows_calibrates_and_changes_no_class(data: Sample) -> None:
    """As docs/scikit_learn.md says; the defaults of label smoothing and dropout, which make SeDA unsure."""
    model = SeDAClassifier(**SMALL, random_state=0).fit(data.visual, data.labels, text=data.text)
    held, new = sample(300, seed=5), sample(900, seed=6)
    calibrated = CalibratedClassifierCV(FrozenEstimator(model), method="temperature").fit(held.visual, held.labels)
    found = {}
    for name, estimator in (("plain", model), ("calibrated", calibrated)):
        log_proba = np.log(estimator.predict_proba(new.visual)).astype(np.float32)
        found[name] = classification_metrics(log_proba, new.labels)
    assert (calibrated.predict(new.visual) == model.predict(new.visual)).all()
    assert found["calibrated"]["ece"] < 0.5 * found["plain"]["ece"]


def test_without_text_the_textual_head_is_not_asked(data: Sample) -> None:
    alone = SeDAClassifier(**SMALL, random_state=0).fit(data.visual, data.labels)
    assert not alone.has_text_
    assert alone.model_.config.textual_weight == 0
    _, semantic, _, visual, kernel = alone.model_.predict_log_proba(torch.from_numpy(data.visual), heads=True)
    np.testing.assert_array_equal(alone.predict(data.visual), (semantic + visual + 2 * kernel).argmax(1).numpy())
    assert alone.transform(data.visual).shape == data.visual.shape
    assert alone.get_feature_names_out().shape == (8,)
    empty = np.full((90, 5), np.nan)
    again = SeDAClassifier(**SMALL, random_state=0).fit(data.visual, data.labels, text=empty)
    assert not again.has_text_
    assert again.score(data.visual, data.labels) > 0.9


def test_missing_texts_and_unlabelled_rows(data: Sample) -> None:
    text = data.text.copy()
    text[::4] = np.nan
    names = TREES[data.labels].astype(object)
    names[1::2] = "?"
    found = SeDAClassifier(**SMALL, unlabelled="?", random_state=0).fit(data.visual, names, text=text)
    assert found.classes_.tolist() == TREES.tolist()
    assert found.has_text_
    assert found.score(data.visual, TREES[data.labels]) > 0.9
    centre = found.model_.standardise_visual(torch.from_numpy(data.visual[0::6])).mean(0)
    torch.testing.assert_close(found.model_.centres[0], centre, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no labelled row"):
        SeDAClassifier(**SMALL, unlabelled=7).fit(data.visual, np.full(90, 7))


def test_random_state(data: Sample) -> None:
    few = {**SMALL, "epochs": 1}

    def weights(random_state: Any) -> torch.Tensor:
        model = SeDAClassifier(**few, random_state=random_state).fit(data.visual, data.labels, text=data.text).model_
        return model.learner.head.weight

    assert torch.equal(weights(3), weights(np.int64(3)))
    assert not torch.equal(weights(3), weights(4))
    assert torch.equal(weights(np.random.RandomState(3)), weights(np.random.RandomState(3)))
    assert not torch.equal(weights(None), weights(None))


# ---------------------------------------------------------------------------------- pipelines and searches


def test_pipeline_carries_the_text_to_fit(data: Sample) -> None:
    pipeline = make_pipeline(StandardScaler(), SeDAClassifier(**SMALL, random_state=0))
    pipeline.fit(data.visual, data.labels, sedaclassifier__text=data.text)
    assert pipeline[-1].has_text_
    assert pipeline.score(data.visual, data.labels) > 0.9
    assert pipeline.transform(data.visual).shape == (90, 5)
    assert pipeline.get_feature_names_out().shape == (5,)


class _Recording(SeDAClassifier):
    """Notes which texts each fit was given."""

    seen: list[tuple[np.ndarray, np.ndarray]] = []  # noqa: RUF012 - shared by the clones of a search on purpose

    def fit(self, X: Any, y: Any, text: Any = None) -> "_Recording":
        self.seen.append((np.asarray(X), np.asarray(text)))
        super().fit(X, y, text=text)
        return self


@pytest.mark.parametrize("routing", [False, True])
def test_grid_search_slices_the_text_with_the_rows(data: Sample, routing: bool) -> None:
    _Recording.seen.clear()
    with sklearn.config_context(enable_metadata_routing=routing):
        estimator = _Recording(**{**SMALL, "epochs": 3}, random_state=0)
        if routing:
            estimator.set_fit_request(text=True)
        search = GridSearchCV(
            estimator, {"textual_weight": np.array([0.0, 0.5]), "width": [np.int64(8)]}, cv=2, error_score="raise"
        )
        search.fit(data.visual, data.labels, text=data.text)
    assert len(_Recording.seen) == 5
    for visual, text in _Recording.seen:
        rows = [int(np.flatnonzero((data.visual == row).all(1))[0]) for row in visual]
        np.testing.assert_array_equal(text, data.text[rows])
    assert search.best_estimator_.model_.config.width == 8
    assert search.best_score_ > 0.5


@pytest.mark.parametrize("routing", [False, True])
def test_texts_of_classes_go_through_a_search_whole(data: Sample, routing: bool) -> None:
    """They have a row a class, which no fold may slice."""
    texts = np.stack([data.text[data.labels == k].mean(0) for k in range(3)])
    with sklearn.config_context(enable_metadata_routing=routing):
        last = SeDAClassifier(**{**SMALL, "blocks": 2, "epochs": 2}, memory_heads=2, random_state=0)
        if routing:
            last.set_fit_request(text_classes=True)
        pipeline = make_pipeline(StandardScaler(), last)
        grid = {"sedaclassifier__textual_weight": [0.2, 0.4]}
        search = GridSearchCV(pipeline, grid, cv=2, error_score="raise")
        search.fit(data.visual, data.labels, **{"text_classes" if routing else "sedaclassifier__text_classes": texts})
    fitted = search.best_estimator_[-1].model_
    assert fitted.config.class_text
    kept = raw_class_texts(fitted)
    assert kept is not None
    np.testing.assert_allclose(kept, texts, atol=1e-4)


def test_cross_validation_of_a_pipeline_under_metadata_routing(data: Sample) -> None:
    with sklearn.config_context(enable_metadata_routing=True):
        last = SeDAClassifier(**SMALL, random_state=0).set_fit_request(text=True)
        pipeline = make_pipeline(StandardScaler(), last)
        scores = cross_val_score(pipeline, data.visual, data.labels, cv=2, params={"text": data.text})
    assert scores.min() > 0.9


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, text, message",
    [
        ({}, np.zeros((7, 5)), "text has 7 rows but X has 90"),
        ({}, np.full((90, 5), np.inf), "'text' holds infinity in row 0"),
        ({}, np.zeros(90), "'text' has 1 dimensions, 2 needed"),
        ({}, ["a word"] * 90, "text holds strings; give their features"),
        ({}, np.array(["a word", None] * 45, dtype=object), "text holds strings; give their features"),
        ({}, csr_matrix(np.zeros((90, 5))), "text is a sparse matrix; give a dense one"),
        ({"width": 0}, None, "width must be at least 1"),
        ({"epochs": 2.5}, None, "epochs must be of type int"),
        ({"device": "tpu"}, None, "device must be one of auto, cpu, cuda"),
        ({"semantic_sampler": "euler"}, None, "semantic_sampler must be one of"),
        ({"random_state": -1}, None, "random_state must be an int of 0 or more"),
        ({"random_state": True}, None, "random_state must be an int of 0 or more"),
        ({"unlabelled": float("nan")}, None, "unlabelled is NaN, which no value equals"),
    ],
)
def test_bad_input_is_one_sentence(data: Sample, changes: dict[str, Any], text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        SeDAClassifier(**{**SMALL, **changes}).fit(data.visual, data.labels, text=text)
    assert len(str(caught.value).splitlines()) == 1
    assert isinstance(caught.value, ConfigError | DataError)


def test_whole_numbers_are_features_too(data: Sample) -> None:
    whole = np.round(4 * data.text).astype(np.int64)
    made = (SeDAClassifier(**SMALL, random_state=0) for _ in range(2))
    one = next(made).fit(data.visual, data.labels, text=whole)
    other = next(made).fit(data.visual, data.labels, text=whole.astype(np.float32))
    assert np.array_equal(one.predict_log_proba(data.visual), other.predict_log_proba(data.visual))


def test_the_package_names_scikit_learn_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install 'seda_fast\[eval\]'"):
        _ = seda_fast.SeDAClassifier
    with pytest.raises(AttributeError, match="no attribute 'SeDAClassifer'"):
        _ = seda_fast.SeDAClassifer


# ------------------------------------------------------------------------------------------------- files


def test_saving_anew_leaves_nothing_of_the_model_before(tmp_path: Path, data: Sample) -> None:
    saved = SeDAClassifier(**SMALL).fit(data.visual, data.labels)
    saved.save_pretrained(tmp_path)
    for name in ("model.pt2", "model.onnx", "report.html", "mine.txt"):
        (tmp_path / name).touch()
    saved.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "estimator.json", "mine.txt"}
    # Where no estimator was, such a file is the user's.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.onnx").touch()
    saved.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "model.onnx").exists()


def test_weights_that_cannot_be_written_cost_no_estimator(
    tmp_path: Path, data: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = SeDAClassifier(**SMALL, random_state=1).fit(data.visual, data.labels)
    first.save_pretrained(tmp_path)

    def full(*given: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("seda_fast.nn.seda.save_file", full)
    with pytest.raises(DataError, match="No space left on device"):
        SeDAClassifier(**SMALL, random_state=2).fit(data.visual, data.labels).save_pretrained(tmp_path)
    again = SeDAClassifier.from_pretrained(tmp_path)
    assert again.get_params() == first.get_params()
    np.testing.assert_array_equal(again.predict_proba(data.visual), first.predict_proba(data.visual))


def test_settings_that_no_file_can_hold_cost_no_estimator(tmp_path: Path, data: Sample) -> None:
    SeDAClassifier(**SMALL).fit(data.visual, data.labels).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    odd = SeDAClassifier(**SMALL, unlabelled=np.datetime64("1970-01-01")).fit(data.visual, data.labels)
    with pytest.raises(DataError, match="the settings cannot be saved"):
        odd.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_masked_values_are_refused(data: Sample) -> None:
    """scikit-learn takes what lies under the mask."""
    first = np.arange(len(data.labels)) == 0
    masked = np.ma.masked_array(data.visual, mask=np.repeat(first[:, None], data.visual.shape[1], axis=1))
    labels = np.ma.masked_array(data.labels, mask=first)
    model = SeDAClassifier(**SMALL).fit(np.ma.masked_array(data.visual), data.labels)
    for name, call in (
        ("X", lambda: SeDAClassifier(**SMALL).fit(masked, data.labels)),
        ("y", lambda: SeDAClassifier(**SMALL).fit(data.visual, labels)),
        ("text", lambda: SeDAClassifier(**SMALL).fit(data.visual, data.labels, text=masked)),
        ("X", lambda: model.predict(masked)),
        ("X", lambda: model.transform(masked)),
        ("y", lambda: model.score(data.visual, labels)),
    ):
        with pytest.raises(DataError, match=f"^{name} has masked values; fill them, or leave their rows out$"):
            call()


@pytest.mark.parametrize("kind", ["text", "object", "int", "bool", "float"])
def test_save_and_load(tmp_path: Path, data: Sample, kind: str) -> None:
    y = {
        "text": TREES[data.labels],
        "object": TREES[data.labels].astype(object),
        "int": data.labels * 10 - 7,
        "bool": data.labels == 1,
        "float": data.labels.astype(float),
    }[kind]
    few = {**SMALL, "epochs": 2, "textual_weight": np.float64(0.25)}
    saved = SeDAClassifier(**few, random_state=5).fit(data.visual, y, text=data.text)
    assert saved.save_pretrained(tmp_path / "kept") == tmp_path / "kept"
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"model.safetensors", "estimator.json"}
    loaded = SeDAClassifier.from_pretrained(tmp_path / "kept")
    assert loaded.get_params() == saved.get_params()
    assert loaded.classes_.dtype == saved.classes_.dtype
    np.testing.assert_array_equal(loaded.predict(data.visual), saved.predict(data.visual))
    np.testing.assert_array_equal(loaded.transform(data.visual), saved.transform(data.visual))
    with pytest.raises(ValueError, match="7 features"):
        loaded.predict(data.visual[:, :7])


def test_the_commands_and_the_estimator_read_each_other(
    tmp_path: Path, data: Sample, fitted: SeDAClassifier, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted.save_pretrained(tmp_path)
    np.save(tmp_path / "new.npy", data.visual)
    assert predict.main(["--model", str(tmp_path), "--data", str(tmp_path / "new.npy")]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert np.mean(np.array([line.split(",")[2] for line in lines]) == TREES[data.labels]) > 0.9
    (tmp_path / "estimator.json").unlink()
    plain = SeDAClassifier.from_pretrained(tmp_path)
    assert plain.get_params()["width"] == SMALL["width"]
    np.testing.assert_array_equal(TREES[plain.predict(data.visual)], fitted.predict(data.visual))


def test_damaged_files_are_refused(tmp_path: Path, fitted: SeDAClassifier) -> None:
    with pytest.raises(DataError, match=r"there is no such file"):
        SeDAClassifier.from_pretrained(tmp_path)
    fitted.save_pretrained(tmp_path)
    file = tmp_path / "estimator.json"
    good = json.loads(file.read_text())
    damaged: list[tuple[Any, str]] = [
        ({**good, "classes": ["ash"]}, "names 1 classes but the model has 3"),
        ({**good, "dtype": "<M8[s]"}, "damaged"),
        ({**good, "dtype": "nonsense"}, "damaged"),
        ({**good, "settings": {"os": 1}}, "no parameter 'os'"),
        ({"classes": []}, "the keys .* are needed"),
        ([], "the keys .* are needed"),
    ]
    for content, message in damaged:
        file.write_text(json.dumps(content))
        with pytest.raises(DataError, match=f"estimator.json: .*{message}"):
            SeDAClassifier.from_pretrained(tmp_path)
    file.write_text("{")
    with pytest.raises(DataError, match=r"estimator\.json: cannot be read"):
        SeDAClassifier.from_pretrained(tmp_path)


def test_classes_that_json_cannot_hold_are_refused_before_anything_is_written(tmp_path: Path, data: Sample) -> None:
    days = np.array(["2026-01-01", "2026-01-02", "2026-01-03"], dtype="M8[D]")
    found = SeDAClassifier(**{**SMALL, "epochs": 1}, random_state=0).fit(data.visual, data.labels)
    found.classes_ = days
    with pytest.raises(DataError, match="classes of type datetime64"):
        found.save_pretrained(tmp_path / "kept")
    found.classes_ = np.array(["a", "b\ud800", "c"])
    with pytest.raises(DataError, match=r"the class 'b\\ud800' cannot be saved: it is no text that a file can hold"):
        found.save_pretrained(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_unlabelled_rows_are_not_judged(data: Sample) -> None:
    """Each counted as an error: with three quarters of them a classifier that erred nowhere had an accuracy of 0.25."""
    few = np.where(np.arange(len(data.labels)) % 4, -1, data.labels)
    model = SeDAClassifier(**SMALL, random_state=0, unlabelled=-1).fit(data.visual, few, text=data.text)
    known = few >= 0
    expected = (model.predict(data.visual[known]) == few[known]).mean()
    assert model.score(data.visual, few) == pytest.approx(expected)
    weights = np.arange(len(few), dtype=float)
    right = model.predict(data.visual[known]) == few[known]
    assert model.score(data.visual, few, weights) == pytest.approx(np.average(right, weights=weights[known]))
    search = GridSearchCV(model, {"textual_weight": [0.25]}, cv=2).fit(data.visual, few, text=data.text)
    assert search.best_score_ > 0.6
    with pytest.raises(ValueError, match="y has no labelled row"):
        model.score(data.visual, np.full(len(few), -1))
    several = np.eye(3, dtype=int)[data.labels]
    several[1::2] = -1
    model = SeDAClassifier(**SMALL, random_state=0, unlabelled=-1).fit(data.visual, several, text=data.text)
    right = (model.predict(data.visual[::2]) == several[::2]).all(axis=1)
    assert model.score(data.visual, several) == pytest.approx(right.mean())


def test_what_marks_unlabelled_rows_may_be_of_another_type_than_the_classes(data: Sample) -> None:
    names = np.array(["ash", "beech", "cedar"], dtype=object)[data.labels]
    names[::3] = -1
    model = SeDAClassifier(**SMALL, random_state=0, unlabelled=-1).fit(data.visual, names, text=data.text)
    assert set(model.classes_) <= {"ash", "beech", "cedar"}
    with pytest.raises(ValueError, match="y holds '-1', but unlabelled is -1, which no text equals"):
        SeDAClassifier(**SMALL, unlabelled=-1).fit(data.visual, names.astype(str), text=data.text)
    with pytest.raises(ValueError, match="y holds '-1', but unlabelled is -1, which no text equals"):
        SeDAClassifier(**SMALL, unlabelled=-1).fit(data.visual, names.astype(str).astype(object), text=data.text)
    floats = np.where(data.labels == 2, "-1.0", data.labels.astype(str))
    with pytest.raises(ValueError, match=r"y holds '-1\.0', but unlabelled is -1, which no text equals"):
        SeDAClassifier(**SMALL, unlabelled=-1).fit(data.visual, floats, text=data.text)
    nearly = np.where(data.labels == 2, -1.0000001, data.labels + 0.5)
    with pytest.raises(ValueError, match="Unknown label type"):
        SeDAClassifier(**SMALL, unlabelled=-1).fit(data.visual, nearly, text=data.text)
    for marked in (np.where(data.labels == 2, -1, data.labels), np.where(data.labels == 2, -1.0, data.labels)):
        with pytest.raises(ValueError, match=r"y holds -1(\.0)?, but unlabelled is '-1', which no number equals"):
            SeDAClassifier(**SMALL, unlabelled="-1").fit(data.visual, marked, text=data.text)


def test_a_mark_that_was_numbered_as_a_class_is_told_of(data: Sample) -> None:
    """scikit-learn then passes 0, 1, 2, 3 for -1, 0, 1, 2, and the unlabelled rows train as the first class."""
    visual, labels = data.visual, data.labels
    few = np.where(np.arange(len(labels)) % 4 == 0, -1, labels)
    model = SeDAClassifier(**{**SMALL, "epochs": 1}, random_state=0, unlabelled=-1)
    words = "no row of y holds unlabelled=-1; what numbers the classes, as cross_val_predict does for probabilities"
    with pytest.warns(UserWarning, match=words):
        cross_val_predict(model, visual, few, cv=2, method="predict_proba")
    with pytest.warns(UserWarning, match=words):
        VotingClassifier([("seda", model)]).fit(visual, few)
    with pytest.warns(UserWarning, match=words) as told:
        model.fit(visual, labels)
    assert [warning.filename for warning in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(visual, few)
        # Such numbers are none that anything gave the classes: nothing is amiss.
        model.fit(visual, TREES[labels])
        model.fit(visual, labels - 2)


@pytest.mark.parametrize("mark", [None, -1, "?"])
def test_classes_that_do_not_sort_are_one_sentence(data: Sample, fitted: SeDAClassifier, mark: Any) -> None:
    """As of a table with empty cells, or with a number among its names."""
    for odd, sentence in (
        (None, r"y holds None in row 4; mark rows without a class by a value of the classes' type, such as '', and "
               "name it by unlabelled"),
        (7, r"y holds 'beech' in row 1 but 7 in row 4, which do not sort; give classes of one type"),
    ):  # fmt: skip
        names = TREES[data.labels].astype(object)
        names[0], names[4] = "beech" if mark is None else mark, odd
        if mark is None:
            sentence = sentence.replace("in row 1 but", "in row 0 but")
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            SeDAClassifier(**SMALL, unlabelled=mark).fit(data.visual, names, text=data.text)
        scoring = copy(fitted).set_params(unlabelled=mark)
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            scoring.score(data.visual, names)


def told_by(data: Sample, text: Any) -> np.ndarray:
    """Probabilities after one pass with ``text``."""
    model = SeDAClassifier(**{**SMALL, "epochs": 1}, random_state=0)
    return model.fit(data.visual, data.labels, text=text).predict_proba(data.visual)


def some_missing(data: Sample) -> np.ndarray:
    text = np.array(data.text, dtype=np.float64)
    text[::5] = np.nan
    return text


def test_text_is_taken_from_what_features_are(data: Sample) -> None:
    """Objects that are numbers, and integers; what is neither is told of in one sentence."""
    fit, text = partial(told_by, data), some_missing(data)
    expected = fit(text)
    np.testing.assert_array_equal(fit(text.astype(object)), expected)
    for name in ("text", "text_classes"):
        masked = np.ma.masked_array(text if name == "text" else text[1:4], mask=False)
        with pytest.raises(ValueError, match=f"'{name}' is a masked array; write NaN for missing text"):
            SeDAClassifier(**SMALL).fit(data.visual, data.labels, **{name: masked})
    with pytest.raises(ValueError, match="text is no array of numbers"):
        fit([None, *text.tolist()[1:]])
    np.testing.assert_array_equal(fit(np.rint(3 * data.text).astype(int)), fit(np.rint(3 * data.text)))
    with pytest.raises(ValueError, match=r"^text is no array of numbers: Complex data not supported$"):
        fit(text.astype(complex))


def test_text_may_be_a_frame(data: Sample) -> None:
    """Of several types, with the missing values that it has."""
    pandas = pytest.importorskip("pandas")
    fit, text = partial(told_by, data), some_missing(data)
    expected = fit(text)
    nullable = pandas.DataFrame(text).astype("Float64")
    assert nullable.isna().any(axis=None)
    for given in (pandas.DataFrame(text), nullable):
        np.testing.assert_array_equal(fit(given), expected)
    mixed = np.array(data.text, dtype=np.float64)
    mixed[:, 0], mixed[:, 1] = mixed[:, 0] > 0, np.rint(mixed[:, 1])
    frame = pandas.DataFrame(mixed)
    frame[0], frame[1] = frame[0].astype(bool), frame[1].astype(int)
    np.testing.assert_array_equal(fit(frame), fit(mixed))


def test_files_of_another_model_are_neither_mixed_nor_written(
    tmp_path: Path, data: Sample, fitted: SeDAClassifier
) -> None:
    fitted.save_pretrained(tmp_path / "mine")
    other = SeDAClassifier(**{**SMALL, "epochs": 1}, random_state=5).fit(data.visual, data.labels, text=data.text)
    other.model_.save_pretrained(tmp_path / "mine")
    with pytest.raises(DataError, match=r"estimator.json: is of another model than the model.safetensors beside it"):
        SeDAClassifier.from_pretrained(tmp_path / "mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds a training run \(metrics.json\)"):
        fitted.save_pretrained(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.json"]


def test_a_model_that_saw_no_text_is_evaluated_beside_texts(
    tmp_path: Path, data: Sample, fitted: SeDAClassifier, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to compare them with, and classes to measure all the same."""
    part = {"visual_test": data.visual, "label_test": data.labels}
    np.savez(tmp_path / "alone.npz", **part)
    np.savez(tmp_path / "texts.npz", **part, text_test=data.text)
    np.savez(tmp_path / "one.npz", **part, text_test=data.text[:, :1])
    bare = SeDAClassifier(**SMALL, random_state=5).fit(data.visual, data.labels)
    given = ["--model", str(bare.save_pretrained(tmp_path / "bare")), "--json", "--data"]
    assert evaluate.main([*given, str(tmp_path / "alone.npz")]) == 0
    expected, said = capsys.readouterr()
    assert "fitted without text" not in said
    for name in ("texts", "one"):
        assert evaluate.main([*given, str(tmp_path / f"{name}.npz")]) == 0
        out, said = capsys.readouterr()
        assert out.replace(name, "alone") == expected
        words = (
            f"the model was fitted without text, so text_test of {tmp_path / name}.npz is not compared with anything"
        )
        assert said == f"seda_fast.evaluate: {words}\n"
    other = ["--model", str(fitted.save_pretrained(tmp_path / "fitted")), "--data", str(tmp_path / "one.npz")]
    assert evaluate.main(other) == 2
    assert "'text_test' has 1 columns but the model has 5" in capsys.readouterr().err


def test_a_fit_that_fails_leaves_what_was_fitted_before(data: Sample) -> None:
    """Else the old model's columns would go by the new classes' names."""
    visual, labels, text = data.visual, data.labels, data.text
    model = SeDAClassifier(**SMALL, random_state=0).fit(visual, np.array(["a", "b", "c"])[labels], text=text)
    before, kept = model.predict(visual), dict(vars(model))
    with pytest.raises(ValueError, match="text"):
        model.fit(visual[:, :3], np.array(["x", "y", "z"])[labels], text=np.full_like(text, np.inf))
    assert vars(model) == kept
    assert np.array_equal(model.predict(visual), before)
    fresh = SeDAClassifier(**SMALL, random_state=0)
    with pytest.raises(ValueError, match="text"):
        fresh.fit(visual, labels, text=np.full_like(text, np.inf))
    assert not [name for name in vars(fresh) if name.endswith("_") and not name.startswith("_")]


@pytest.mark.parametrize("marked", [True, False])
def test_numbers_beside_a_mark_of_another_type_are_fitted_and_scored(data: Sample, marked: bool) -> None:
    """As a frame's column of objects: scikit-learn takes an array of them for no classes."""
    visual, labels, text = data.visual, data.labels, data.text
    y = labels.astype(object)
    if marked:
        y[::4] = "?"
    model = SeDAClassifier(**SMALL, random_state=0, unlabelled="?").fit(visual, y, text=text)
    plain = SeDAClassifier(**SMALL, random_state=0, unlabelled=-1)
    plain.fit(visual, np.where(y == "?", -1, labels), text=text)
    assert model.classes_.tolist() == [0, 1, 2]
    assert np.array_equal(model.predict(visual), plain.predict(visual))
    assert model.score(visual, y) == plain.score(visual, np.where(y == "?", -1, labels))


def test_a_mark_that_became_text_is_refused_by_score_too(data: Sample) -> None:
    visual, labels, text = data.visual, data.labels, data.text
    names = np.array(["a", "b", "c"])[labels]
    model = SeDAClassifier(**SMALL, random_state=0, unlabelled=-1).fit(visual, names, text=text)
    with pytest.raises(ValueError, match="y holds '-1', but unlabelled is -1"):
        model.score(visual[:2], ["a", -1])
