"""One text a class: read and refused, trained on as memory, and carried through every command."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

from seda_fast import (
    DataError,
    FeatureSet,
    SeDA,
    SeDAClassifier,
    SeDAConfig,
    TrainConfig,
    evaluate,
    export,
    info,
    predict,
    report,
    train,
)
from seda_fast.config import ConfigError
from seda_fast.data import VisualRows
from seda_fast.interrupt import Interrupted
from seda_fast.loop import Trainer
from seda_fast.nn import STEPWISE
from seda_fast.outputs import model_outputs
from seda_fast.prepare import prepare

SMALL = [
    "--width", "16", "--blocks", "2", "--epochs", "12", "--batch-size", "32", "--diffusion-steps", "50",
    "--memory-heads", "4", "--learning-rate", "0.01",
]  # fmt: skip


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    """90 + 42 learnable rows of 3 classes, 8 visual dimensions, and a text of 5 dimensions for each class."""
    rng = np.random.default_rng(3)
    labels, test_labels = np.arange(90) % 3, np.arange(42) % 3
    centres, texts = 2 * rng.normal(size=(3, 8)), rng.normal(size=(3, 5))
    made = {
        "visual_train": (centres[labels] + rng.normal(size=(90, 8))).astype(np.float32),
        "text_classes": texts.astype(np.float32),
        "label_train": labels,
        "visual_test": (centres[test_labels] + rng.normal(size=(42, 8))).astype(np.float32),
        "label_test": test_labels,
        "class_names": np.array(["ash", "beech", "cedar"]),
    }
    return {name: value for name, value in {**made, **changes}.items() if value is not None}


def write(path: Path, **changes: Any) -> Path:
    np.savez(path, **arrays(**changes))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``data.npz`` and a run on it, baselines too, in ``run``."""
    folder = tmp_path_factory.mktemp("trained")
    write(folder / "data.npz")
    assert train.main(["--data", str(folder / "data.npz"), "--out", str(folder / "run"), *SMALL]) == 0
    return folder


@pytest.fixture(scope="module")
def model(trained: Path) -> SeDA:
    return SeDA.from_pretrained(trained / "run")


def metrics_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return found


# ---- data ------------------------------------------------------------------------------------------------------------


def test_a_rows_text_is_its_classes() -> None:
    given = arrays(label_train=np.where(np.arange(90) % 7, np.arange(90) % 3, -1))
    data = FeatureSet.from_arrays(**{"text_train": None, **given}, unpaired="keep")
    assert data.text_dim == 5
    assert data.text_train.shape == (90, 0)
    np.testing.assert_array_equal(data.paired_train, data.label_train >= 0)
    np.testing.assert_array_equal(data.text_test, given["text_classes"][given["label_test"]])
    config = SeDAConfig(visual_dim=8, text_dim=5, n_classes=3, width=16, blocks=1, class_text=True)
    made, rows = prepare(data, config, 0, torch.device("cpu"))
    _, text, labels, paired, _ = rows.rows(torch.arange(90))
    raw = text * made.text_scale + made.text_mean
    torch.testing.assert_close(raw[paired], torch.from_numpy(given["text_classes"])[labels[paired]])
    # Standardised with the rows' statistics, as texts of rows are: mean 0 and deviation 1 over the labelled rows.
    torch.testing.assert_close(text[paired].mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(text[paired].std(0, unbiased=False), torch.ones(5))
    assert made.text_classes is not None
    torch.testing.assert_close(made.text_classes[labels[paired]], text[paired])


@pytest.mark.parametrize("kind", ["npz", "folder", "split"])
def test_every_kind_of_source_is_read(kind: str, tmp_path: Path) -> None:
    given = arrays(**({"visual_test": None, "label_test": None} if kind == "split" else {}))
    path = tmp_path / ("data" if kind == "folder" else "data.npz")
    if kind == "folder":
        path.mkdir()
        for name, value in given.items():
            np.save(path / f"{name}.npy", value)
    else:
        np.savez(path, **given)
    data = FeatureSet.load(path)
    assert not isinstance(data.text_classes, np.memmap)
    np.testing.assert_array_equal(data.text_classes, given["text_classes"])
    np.testing.assert_array_equal(data.text_test, given["text_classes"][data.label_test])


NAN = np.zeros((3, 5), np.float32)
NAN[1, 2] = np.nan
UNLABELLED = np.where(np.arange(90) == 4, -1, np.arange(90) % 3)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"text_train": np.zeros((90, 5))}, "holds both 'text_train' and 'text_classes'; give one text of each row"),
        ({"text_classes": None}, "lacks the key 'text_train'"),
        ({"text_classes": np.zeros((4, 5))}, "'text_classes' has 4 rows but there are 3 classes in 'class_names'"),
        ({"text_classes": np.zeros((2, 5)), "class_names": None},
         "'text_classes' has 2 rows but there are 3 classes in 'label_train' (give 'class_names'"),
        ({"text_classes": NAN}, "'text_classes' holds NaN in row 1, column 2"),
        ({"text_classes": np.zeros(3)}, "'text_classes' has 1 dimensions, 2 needed"),
        ({"text_classes": np.zeros((3, 5), int)}, "'text_classes' has dtype int64"),
        ({"text_classes": np.zeros((3, 0))}, "'text_classes' has no columns"),
        ({"label_train": UNLABELLED}, "'label_train' holds -1 in 1 of 90 rows (first in row 4), which thus have no"),
        ({"text_test": np.zeros((42, 4))}, "'text_test' has 4 columns but 'text_classes' has 5"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_sentence(
    changes: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "data.npz", **changes)
    with pytest.raises(DataError, match=re.escape(sentence)):
        FeatureSet.load(path)
    assert train.main(["--data", str(path), "--out", str(tmp_path / "run"), *SMALL]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert sentence in said
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


@pytest.mark.parametrize("changes", [{}, {"visual_test": None, "label_test": None}])
def test_texts_of_classes_that_only_names_tell_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    """In the order of the names, as they sort, [dog, cat] would get each the other's text, and nobody would say so."""
    names = arrays()["class_names"]
    named = {key: names[arrays()[key]] for key in ("label_train", "label_test")}
    path = write(tmp_path / "a.npz", **{**named, "class_names": None, **changes})
    sentence = (
        "'text_classes' needs 'class_names', which say which row is of which class, where labels are names of classes"
    )
    with pytest.raises(DataError, match=re.escape(f"a.npz: {sentence}")):
        FeatureSet.load(path)
    with pytest.raises(DataError, match=re.escape(sentence)):
        FeatureSet.load_test(path)
    turned = FeatureSet.load(
        write(tmp_path / "b.npz", **{**named, "class_names": names[::-1], **changes}), test_fraction=0.2
    )
    assert turned.class_names == tuple(names[::-1])
    assert turned.test_part.text is not None and turned.text_classes is not None
    np.testing.assert_array_equal(turned.test_part.text, turned.text_classes[turned.label_test])


def test_a_test_part_whose_labels_are_names_has_the_models_texts(tmp_path: Path) -> None:
    """What its rows of class texts are of is the model's to say, which has the texts themselves."""
    names, texts = tuple(arrays()["class_names"]), arrays()["text_classes"]
    given = {**arrays(class_names=None), "label_test": np.array(names)[arrays()["label_test"]]}
    del given["visual_train"], given["label_train"]
    np.savez(tmp_path / "a.npz", **given)
    part = FeatureSet.load_test(tmp_path / "a.npz", class_names=names, text_classes=texts)
    np.testing.assert_array_equal(part.labels, arrays()["label_test"])
    with pytest.raises(DataError, match="not those that the model was trained with: row 0"):
        FeatureSet.load_test(tmp_path / "a.npz", class_names=names, text_classes=texts[::-1])
    np.savez(tmp_path / "a.npz", **{**given, "text_classes": texts[:2]})
    with pytest.raises(DataError, match="'text_classes' has 2 rows but there are 3 classes in the model"):
        FeatureSet.load_test(tmp_path / "a.npz", class_names=names, text_classes=texts)


def test_a_class_without_rows_may_have_a_text(tmp_path: Path) -> None:
    texts = np.vstack((arrays()["text_classes"], np.ones((1, 5), np.float32)))
    data = FeatureSet.load(write(tmp_path / "d.npz", text_classes=texts, class_names=np.array(list("abcd"))))
    assert data.n_classes == len(texts) == 4


def test_heads_must_divide_the_width() -> None:
    sizes: dict[str, Any] = {"visual_dim": 8, "text_dim": 5, "n_classes": 3, "width": 20, "memory_heads": 8}
    assert not SeDAConfig(**sizes).has_memory  # without class texts there is nothing to attend to
    with pytest.raises(ConfigError, match="memory_heads must be a divisor of the width 20, not 8"):
        SeDAConfig(**sizes, class_text=True)
    with pytest.raises(ConfigError, match="memory_heads must be at least 0, not -1"):
        SeDAConfig(**{**sizes, "memory_heads": -1})


# ---- model -----------------------------------------------------------------------------------------------------------


def test_both_stages_see_the_memory(model: SeDA) -> None:
    visual = torch.from_numpy(arrays()["visual_test"])
    assert model.memory is model.text_classes
    assert {"text_classes", "learner.network.memory.query.weight", "translator.network.memory.keys.bias"} <= set(
        model.state_dict()
    )
    other = SeDA(model.config)
    other.load_state_dict(model.state_dict())
    assert other.text_classes is not None
    other.text_classes.mul_(-1)
    with torch.no_grad():
        for ours, theirs in zip(model.align(visual), other.eval().align(visual), strict=True):
            assert (ours - theirs).abs().max() > 1e-3
        # A row's result is its own.
        assert torch.equal(model.align(visual)[1][:5], model.align(visual[:5])[1])


def test_a_model_without_heads_has_no_memory_but_knows_the_texts(model: SeDA) -> None:
    made = SeDA(SeDAConfig(**{**model.config.__dict__, "memory_heads": 0}))
    assert made.memory is None
    assert made.text_classes is not None
    assert not [name for name in made.state_dict() if "memory" in name]
    with pytest.raises(ValueError, match=r"class texts of shape \(2, 5\) for a model that has \(3, 5\)"):
        made.set_class_texts(torch.zeros(2, 5))
    plain = SeDA(SeDAConfig(**{**model.config.__dict__, "class_text": False}))
    assert "text_classes" not in plain.state_dict()
    with pytest.raises(ValueError, match="for a model that has None"):
        plain.set_class_texts(torch.zeros(3, 5))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_step_has_no_graph_break(precision: Any) -> None:
    """``engine="compile"`` compiles with fullgraph=True, and falls back where that fails."""
    data = FeatureSet.from_arrays(**{"text_train": None, **arrays()})
    config = SeDAConfig(visual_dim=8, text_dim=5, n_classes=3, width=16, blocks=2, class_text=True, memory_heads=4)
    settings = TrainConfig(epochs=1, batch_size=30)
    curves = []
    for engine in ("eager", "compile"):
        made, rows = prepare(data, config, 0, torch.device("cpu"))
        trainer = Trainer(made, rows, settings, engine=engine, precision=precision)  # type: ignore[arg-type]
        curves.append(trainer.run()[1][0].losses["total"])
        assert trainer.stepper.report()["used"] == engine
        assert trainer.stepper.report()["fallbacks"] == []
        assert trainer.stepper.attention is not None
    assert trainer.stepper.attention == ("torch", "the step is compiled")
    assert curves[0] == pytest.approx(curves[1], rel=1e-5 if precision == "fp32" else 2e-2)


# ---- commands --------------------------------------------------------------------------------------------------------


def test_a_run_says_what_served_and_how_it_predicts(trained: Path) -> None:
    metrics = metrics_of(trained / "run")
    assert metrics["top1"] > 70
    assert metrics["train"]["attention"]["used"] == "torch"
    assert metrics["chain"] == {"used": "step by step", "reason": STEPWISE}
    assert metrics["alignment"]["cosine"] > 0.5
    assert set(metrics["baselines"]) == {"linear", "mlp", "one_step", "one_step_mse"}
    assert metrics["baselines"]["one_step"]["alignment"]["cosine"] > 0.5


def test_alignment_is_measured_against_the_classes_texts(trained: Path, model: SeDA) -> None:
    run = trained / "run"
    outputs, labels = load_file(run / "outputs.safetensors"), arrays()["label_test"]
    assert model.text_classes is not None
    text = model.text_classes.numpy()[labels]
    cosine = (outputs["aligned"] * text).sum(1) / np.linalg.norm(outputs["aligned"], axis=1)
    cosine = (cosine / np.linalg.norm(text, axis=1)).mean()
    assert metrics_of(run)["alignment"]["cosine"] == pytest.approx(cosine, abs=1e-5)


def test_streamed_training_has_the_bits_of_training_from_memory(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, value in arrays().items():
        np.save(folder / f"{name}.npy", value)
    common = ["--data", str(folder), "--no-baselines", *SMALL, "--epochs", "2"]
    for name, share in (("memory", "0.5"), ("files", "0")):
        assert train.main([*common, "--out", str(tmp_path / name), "--memory-share", share]) == 0
    assert metrics_of(tmp_path / "files")["train"]["data"] == "in its files"
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "files")]
    assert files[0] == files[1]


def test_a_run_that_was_stopped_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.npz")
    common = ["--data", str(data), "--no-baselines", *SMALL, "--epochs", "4"]
    assert train.main([*common, "--out", str(tmp_path / "whole")]) == 0
    keep, calls = Trainer._keep, []

    def stopping(self: Trainer) -> None:
        keep(self)
        calls.append(self.stepper.done)
        if self.stepper.done == 7:
            raise Interrupted("stopped", 15)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_keep", stopping)
        assert train.main([*common, "--out", str(tmp_path / "out")]) == 128 + 15
    assert calls[-1] == 7
    changed = write(tmp_path / "changed.npz", text_classes=arrays()["text_classes"][::-1])
    other = ["--data", str(changed), *common[2:], "--out", str(tmp_path / "out"), "--resume"]
    capsys.readouterr()
    assert train.main(other) == 2
    assert "is of a run on other data" in capsys.readouterr().err
    assert train.main([*common, "--out", str(tmp_path / "out"), "--resume"]) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]


def test_prediction_needs_visual_features_alone(trained: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "visual.npy", arrays()["visual_test"])
    out, features = tmp_path / "out.csv", tmp_path / "features.npz"
    common = ["--model", str(trained / "run"), "--out", str(out), "--features", str(features)]
    assert predict.main([*common, "--data", str(tmp_path / "visual.npy")]) == 0
    alone = out.read_bytes()
    assert predict.main([*common, "--data", str(trained / "data.npz")]) == 0
    assert out.read_bytes() == alone
    with np.load(features) as found:
        expected = load_file(trained / "run" / "outputs.safetensors")
        np.testing.assert_allclose(found["aligned"], expected["aligned"], atol=1e-5)


def test_evaluation_measures_against_the_models_texts(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluated(name: str, **changes: Any) -> dict[str, Any]:
        path = write(tmp_path / f"{name}.npz", **changes)
        assert evaluate.main(["--model", str(trained / "run"), "--data", str(path), "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    expected = metrics_of(trained / "run")
    # With the texts beside the rows, and without: the model brings its own.
    for found in (evaluated("with"), evaluated("without", text_classes=None)):
        assert found["top1"] == expected["top1"]
        assert found["alignment"] == pytest.approx(expected["alignment"], abs=1e-4)
        assert found["chain"]["used"] == "step by step"
    own = evaluated("own", text_test=np.random.default_rng(0).normal(size=(42, 5)))
    assert own["alignment"]["cosine"] < expected["alignment"]["cosine"] - 0.1

    for changes, sentence in (
        ({"text_classes": arrays()["text_classes"][[0, 2, 1]]}, "not those that the model was trained with: row 1"),
        ({"text_classes": np.zeros((3, 4))}, "'text_test' has 4 columns but the model has 5"),
        ({"text_classes": np.zeros((2, 5)), "class_names": None}, "'label_test' holds 2 in row 2 but 'text_classes'"),
    ):
        path = write(tmp_path / "other.npz", **changes)
        assert evaluate.main(["--model", str(trained / "run"), "--data", str(path)]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.slow(seconds=240)
@pytest.mark.parametrize("kind", ["torch-export", "onnx"])
def test_exported_graphs_carry_the_memory(kind: Any, trained: Path, model: SeDA, tmp_path: Path) -> None:
    out = tmp_path / f"model{export.SUFFIXES[kind]}"
    common = ["--model", str(trained / "run"), "--out", str(out), "--features", "--seed", "7"]
    assert export.main([*common, "--format", kind]) == 0
    rng = np.random.default_rng(0)
    visual, ids = rng.normal(size=(70, 8)).astype(np.float32), rng.integers(0, 2**40, 70)
    if kind == "onnx":
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        found = session.run(None, {"visual": visual, "sample_ids": ids})
    else:
        program = torch.export.load(out)
        assert not [node for node in program.graph.nodes if "seda_fast" in str(node.target)]
        with torch.no_grad():
            found = [x.numpy() for x in program.module()(torch.from_numpy(visual), torch.from_numpy(ids))]
    expected = model_outputs(model, VisualRows(visual, None, None, ids, "test"), seed=7)
    truths = (expected.log_proba, expected.log_proba.argmax(1), expected.semantic, expected.aligned)
    for ours, theirs in zip(found, (*truths, expected.aligned_point), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_report_tells_of_the_memory(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert report.main(["--model", str(trained / "run"), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert "There is one text a class" in page
    assert "Both networks attend to the class texts at every step; the attention is that of torch" in page
    assert "cosine to class&#x27;s text" in page or "cosine to class's text" in page


def test_info_shows_who_attends(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    (lines,) = [lines for title, lines in json.loads(capsys.readouterr().out).items() if "class texts" in title]
    assert lines[0].startswith("attention, cpu: torch (xformers ")
    assert any(line.startswith("reverse chain: step by step") for line in lines)


# ---- scikit-learn ----------------------------------------------------------------------------------------------------


def test_the_estimator_trains_what_the_command_trains(trained: Path, model: SeDA, tmp_path: Path) -> None:
    given = arrays()
    settings = {name[2:].replace("-", "_"): value for name, value in zip(SMALL[::2], SMALL[1::2], strict=True)}
    numbers = {name: float(value) if "." in value else int(value) for name, value in settings.items()}
    names = given["class_names"]
    fitted = SeDAClassifier(**numbers, random_state=0).fit(
        given["visual_train"], names[given["label_train"]], text_classes=given["text_classes"]
    )
    for name, value in fitted.model_.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert fitted.has_text_
    assert fitted.transform(given["visual_test"]).shape == (42, 5)
    again = SeDAClassifier.from_pretrained(fitted.save_pretrained(tmp_path / "saved"))
    np.testing.assert_array_equal(again.predict_proba(given["visual_test"]), fitted.predict_proba(given["visual_test"]))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"text": np.zeros((90, 5))}, "text and text_classes are both given"),
        ({"text_classes": np.zeros((2, 5))}, "text_classes has 2 rows but y has 3 classes"),
        ({"text_classes": NAN}, "'text_classes' holds NaN in row 1, column 2"),
    ],
)
def test_the_estimator_refuses_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    given = arrays()
    texts = {"text_classes": given["text_classes"], **changes}
    with pytest.raises(ValueError, match=sentence):
        SeDAClassifier(width=16, blocks=1, epochs=1).fit(given["visual_train"], given["label_train"], **texts)
