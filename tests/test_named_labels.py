"""Labels that are names of classes, as most tables have them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seda_fast import DataError, FeatureSet, evaluate, predict, train
from seda_fast.data import load_visual

NAMES = ("ash", "bär", "cedar")


def arrays(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    labels, test = np.array(NAMES)[np.arange(60) % 3], np.array(NAMES)[np.arange(24) % 3]
    found = {
        "visual_train": rng.normal(size=(60, 6)).astype(np.float32),
        "text_train": rng.normal(size=(60, 4)).astype(np.float32),
        "label_train": labels,
        "visual_test": rng.normal(size=(24, 6)).astype(np.float32),
        "label_test": test,
    }
    return {name: value for name, value in {**found, **changes}.items() if value is not None}


def test_names_are_numbered_in_their_order_and_the_empty_one_is_unlabelled() -> None:
    given = arrays()
    given["label_train"][4] = ""
    found = FeatureSet.from_arrays(**given)
    assert found.class_names == NAMES
    assert found.label_train[:6].tolist() == [0, 1, 2, 0, -1, 2]
    assert found.label_test[:4].tolist() == [0, 1, 2, 0]
    listed = FeatureSet.from_arrays(**{**given, "label_train": given["label_train"].tolist()})
    assert listed.label_train.tolist() == found.label_train.tolist()
    turned = FeatureSet.from_arrays(**given, class_names=[*NAMES[::-1], "fir"])
    assert turned.class_names == (*NAMES[::-1], "fir")
    assert turned.label_train[:6].tolist() == [2, 1, 0, 2, -1, 0]


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_every_command_takes_them(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str, content: dict[str, Any]) -> Path:
        if kind == "npz":
            np.savez(tmp_path / f"{name}.npz", **content)
            return tmp_path / f"{name}.npz"
        (tmp_path / name).mkdir()
        for key, value in content.items():
            np.save(tmp_path / name / f"{key}.npy", value)
        return tmp_path / name

    data = write("data", arrays())
    small = ["--width", "16", "--blocks", "1", "--epochs", "1", "--no-baselines"]
    model = str(tmp_path / "run")
    assert train.main(["--data", str(data), "--out", model, *small]) == 0
    # Of a part that holds two of the three classes: their numbers are the model's.
    some = arrays()["label_test"] != "ash"
    part = {"visual_test": arrays()["visual_test"][some], "label_test": arrays()["label_test"][some]}
    capsys.readouterr()
    assert evaluate.main(["--model", model, "--data", str(write("part", part)), "--json"]) == 0
    shown = capsys.readouterr().out
    by_number = {**part, "label_test": np.array([NAMES.index(name) for name in part["label_test"]])}
    assert evaluate.main(["--model", model, "--data", str(write("numbers", by_number)), "--json"]) == 0
    assert capsys.readouterr().out.replace("numbers", "part") == shown
    assert predict.main(["--model", model, "--data", str(tmp_path / data.name)]) == 0
    assert "bär" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"label_test": np.arange(24) % 3}, "'label_train' holds names of classes but 'label_test' does not"),
        ({"label_test": np.array(["fir"] * 24)}, "row 0 of 'label_test' is 'fir', which 'label_train' does not name"),
        ({"class_names": np.array(["ash", "cedar"])}, "row 1 of 'label_train' is 'bär', which 'class_names' does not"),
        ({"label_train": np.array([""] * 60)}, "'label_train' has no labelled row (all names are empty)"),
        ({"label_train": np.array([["ash", "cedar"]] * 60)}, "'label_train' has 2 dimensions, 1 needed"),
        ({"label_train": np.array(["ash\x01"] * 60)}, "row 0 of 'label_train' is blank or holds control characters"),
        ({"label_train": np.array(["ash", "fir"], dtype=object)[np.arange(60) % 2]}, "holds Python objects"),
    ],
)
def test_what_cannot_be_numbered_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        FeatureSet.from_arrays(**arrays(**changes))
    assert sentence in str(caught.value)


def test_a_class_that_the_model_does_not_know_is_one_sentence(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", visual_test=np.ones((2, 6)), label_test=np.array(["ash", "fir"]))
    with pytest.raises(DataError, match="row 1 of 'label_test' is 'fir', which the model does not name"):
        FeatureSet.load_test(tmp_path / "a.npz", class_names=NAMES)


def test_refusals_speak_of_a_class_by_its_name() -> None:
    given = arrays(visual_test=None, label_test=None)
    given["label_train"][given["label_train"] == "cedar"] = ""
    given["label_train"][2] = "cedar"
    for changes, words in (
        (given, r"class 2 \('cedar'\) has one labelled row, so no test part can be split off"),
        (arrays(class_names=[*NAMES, "fir"], label_test=np.array(["fir"] * 24)),
         r"'label_test' holds class 3 \('fir'\) in row 0, which 'label_train' lacks"),
        (arrays(label_train=np.array(["ash"] * 60), label_test=np.array(["ash"] * 24), class_names=list(NAMES)),
         r"'label_train' holds class 0 \('ash'\) alone; rows of two classes are needed"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            FeatureSet.from_arrays(**changes)


def test_rows_to_predict_may_all_be_unlabelled_by_name(tmp_path: Path) -> None:
    for name, labels in (("names", np.array([""] * 24)), ("numbers", np.full(24, -1))):
        np.savez(tmp_path / f"{name}.npz", visual_test=arrays()["visual_test"], label_test=labels)
    found, expected = (load_visual(tmp_path / f"{name}.npz") for name in ("names", "numbers"))
    assert found.labels is not None and expected.labels is not None
    assert found.labels.tolist() == expected.labels.tolist() == [-1] * 24
