"""Pictures: written whole, not blank, readable sizes, whatever part of the data is missing."""

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.image import imread
from scipy.sparse import csr_array

from seda_fast import figures
from seda_fast.figures import write_figures
from seda_fast.files import DataError


def inputs(rows: int = 120, classes: int = 4, dv: int = 7, dt: int = 5, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    predicted = np.where(rng.random(rows) < 0.8, labels, rng.integers(0, classes, rows))
    return {
        "history": [
            {"epoch": i, "loss": 2.0 / i, "loss_centre": 1.0 / i, "loss_off": 0.0, "lr": 1e-3} for i in range(1, 9)
        ],
        "labels": labels,
        "predicted": predicted,
        "class_names": [f"class {c}" for c in range(classes)],
        "visual": rng.normal(size=(rows, dv)).astype(np.float32),
        "semantic": rng.normal(size=(rows, dv)).astype(np.float32),
        "aligned": rng.normal(size=(rows, dt)).astype(np.float32),
        "text": rng.normal(size=(rows, dt)).astype(np.float32),
        "semantic_path": rng.normal(size=(6, 3, dv)).astype(np.float32),
        "aligned_path": rng.normal(size=(4, 3, dt)).astype(np.float32),
        "centres": rng.normal(size=(classes, dv)).astype(np.float32),
    }


def assert_drawn(path: Path) -> None:
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 400
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # colours, edges: not one flat field
    assert 0.005 < (pixels < 0.95).any(axis=2).mean() < 0.9


def test_three_pictures_are_written_and_nothing_else(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "report"
    written = write_figures(directory, **inputs())
    assert [path.name for path in written] == ["loss.png", "confusion.png", "paths.png"]
    assert sorted(directory.iterdir()) == sorted(written)
    for path in written:
        assert_drawn(path)
    assert plt.get_fignums() == []  # no global state


def test_the_same_inputs_give_the_same_bytes_and_replace_the_old(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in write_figures(tmp_path, **inputs())]
    assert [path.read_bytes() for path in write_figures(tmp_path, **inputs())] == first
    other = [path.read_bytes() for path in write_figures(tmp_path, **inputs(seed=1))]
    assert other[1] != first[1] and other[2] != first[2]


@pytest.mark.parametrize("classes", [2, 28, 41, 300])
def test_confusion_of_few_and_many_classes(tmp_path: Path, classes: int) -> None:
    arrays = inputs(rows=600, classes=classes)
    figure = figures._confusion_figure(arrays["labels"], arrays["predicted"], arrays["class_names"])
    path = figures._save(figure, tmp_path / "confusion.png")
    assert_drawn(path)
    assert max(imread(path).shape) < 2600


def test_class_names_are_shown_letter_by_letter(tmp_path: Path) -> None:
    """What stands between two $ is a formula to Matplotlib, and some are none that it can read."""
    names = ["under $10", "$10_$20", r"$a\b$", "$$"]
    arrays = {**inputs(), "class_names": names}
    for path in write_figures(tmp_path, **arrays):
        assert_drawn(path)
    labels = np.eye(4, dtype=int)[arrays["labels"]]
    log_proba = np.log(np.random.default_rng(0).random((120, 4)))
    shown = [*figures._confusion_figure(arrays["labels"], arrays["predicted"], names).axes[0].get_xticklabels(),
             *figures._average_precision_figure(labels, log_proba, names).axes[0].get_yticklabels()]  # fmt: skip
    for label in shown:
        text, is_formula = label._preprocess_math(label.get_text())  # type: ignore[attr-defined]
        assert not is_formula and text.split(" (")[0] in names


def test_letters_that_the_font_lacks_are_told_once_a_picture(tmp_path: Path) -> None:
    lacking = "shows boxes for letters of class names that its font lacks"
    with pytest.warns(UserWarning, match=lacking) as told:
        write_figures(tmp_path, **{**inputs(), "class_names": ["日本語", "木", "火", "水"]})
    assert [str(warning.message) for warning in told] == [f"confusion.png {lacking}", f"paths.png {lacking}"]


def test_the_most_confused_classes_are_chosen() -> None:
    counts = np.diag(np.full(60, 100))
    counts[3, 50], counts[7, 9], counts[20, 21], counts[9, 8] = 40, 30, 20, 10
    sparse = csr_array(counts)
    assert figures._most_confused(sparse, 4).tolist() == [3, 7, 9, 50]
    assert figures._most_confused(sparse, 24).tolist() == [3, 7, 8, 9, 20, 21, 50]


def test_the_confusion_matrix_shows_row_shares() -> None:
    labels, predicted = np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 1, 1])
    axes = figures._confusion_figure(labels, predicted, ["a", "b", "c"]).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[75, 25, 0], [0, 100, 0], [0, 0, 0]])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a (4)", "b (1)", "c (0)"]
    assert "80.0%" in axes.get_title()


def test_no_error_among_many_classes_is_still_a_picture(tmp_path: Path) -> None:
    arrays = inputs(rows=200, classes=60)
    figure = figures._confusion_figure(arrays["labels"], arrays["labels"], arrays["class_names"])
    assert_drawn(figures._save(figure, tmp_path / "confusion.png"))


def test_the_loss_curves_are_the_history(tmp_path: Path) -> None:
    axes = figures._loss_figure(inputs()["history"]).axes[0]
    lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    assert set(lines) == {"loss (weighted sum)", "centre"}  # a term that is switched off is left out
    np.testing.assert_allclose(lines["centre"], [(i, 1 / i) for i in range(1, 9)])
    assert axes.get_yscale() == "log"  # from 2 down to 1/8
    # Rows of a CSV: text, with a cell left empty.
    text = [{"epoch": "1", "loss": "2.5"}, {"epoch": "2", "loss": ""}, {"epoch": "3", "loss": "1.5"}]
    curve = figures._loss_figure(text).axes[0].get_lines()[0].get_ydata()
    np.testing.assert_array_equal(curve, [2.5, np.nan, 1.5])


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    arrays = inputs()
    none = np.full_like(arrays["labels"], -1)
    written = write_figures(tmp_path, **{**arrays, "history": [], "labels": none, "text": None})
    assert [path.name for path in written] == ["paths.png"]
    assert_drawn(written[0])


def test_missing_texts_and_unlabelled_rows(tmp_path: Path) -> None:
    arrays = inputs()
    arrays["text"][::2] = np.nan
    arrays["labels"][::3] = -1
    assert len(write_figures(tmp_path, **arrays)) == 3
    arrays["text"][:] = np.nan
    assert len(write_figures(tmp_path, **arrays)) == 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("rows", "classes", "dv", "dt"), [(1, 1, 1, 1), (1, 3, 7, 5), (2, 2, 1, 2), (5, 2, 3, 1)])
def test_tiny_inputs_warn_of_nothing(tmp_path: Path, rows: int, classes: int, dv: int, dt: int) -> None:
    assert len(write_figures(tmp_path, **inputs(rows, classes, dv, dt))) == 3


def test_no_paths_to_draw(tmp_path: Path) -> None:
    arrays = inputs()
    arrays["semantic_path"] = arrays["semantic_path"][:, :0]
    arrays["aligned_path"] = arrays["aligned_path"][:0]
    assert_drawn(write_figures(tmp_path, **arrays)[2])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels", np.zeros(3, np.int64), "labels: expected shape"),
        ("predicted", np.full(120, 4), r"predicted: expected classes in \[0, 4\)"),
        ("semantic", np.zeros((120, 6)), "semantic: expected shape"),
        ("text", np.zeros((119, 5)), "text: expected shape"),
        ("semantic_path", np.zeros((6, 3, 5)), "semantic_path: expected shape"),
        ("centres", np.zeros((3, 7)), "centres: expected shape"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, value: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_figures(tmp_path / "report", **{**inputs(), name: value})
    assert not (tmp_path / "report").exists()


def test_a_failed_write_leaves_no_half_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(figure: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    with pytest.raises(DataError, match=r"loss\.png cannot be written: No space left"):
        write_figures(tmp_path, **inputs())
    assert list(tmp_path.iterdir()) == []


def test_letters_are_not_set_by_latex(tmp_path: Path) -> None:
    """Whoever writes papers may have said so for all figures: class names and captions are none of its language."""
    with matplotlib.rc_context({"text.usetex": True}):
        written = write_figures(tmp_path / "tex", **inputs())
    write_figures(tmp_path / "plain", **inputs())
    for path in written:
        assert path.read_bytes() == (tmp_path / "plain" / path.name).read_bytes()
