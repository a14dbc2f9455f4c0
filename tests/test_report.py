"""The report is one page that loads nothing, says what the run's files say, and fits a phone."""

import html
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from seda_fast import report, train
from seda_fast.page import Line, bar_chart, line_chart, table, ticks
from seda_fast.page import page as made_page

EVIL = "<script>alert('x')</script> & \"co\""
SMALL = ["--width", "16", "--blocks", "1", "--epochs", "3", "--batch-size", "64", "--textual-steps", "4", "--seed", "5"]


def make_set(path: Path) -> Path:
    rng = np.random.default_rng(3)
    labels, test_labels = np.arange(120) % 4, np.arange(80) % 4
    centres, texts = rng.normal(size=(4, 8)), rng.normal(size=(4, 5))
    arrays = {
        "visual_train": (centres[labels] + rng.normal(size=(120, 8))).astype(np.float32),
        "text_train": (texts[labels] + rng.normal(size=(120, 5))).astype(np.float32),
        "label_train": labels,
        "visual_test": (centres[test_labels] + rng.normal(size=(80, 8))).astype(np.float32),
        "text_test": (texts[test_labels] + rng.normal(size=(80, 5))).astype(np.float32),
        "label_test": test_labels,
        "names_test": np.array([f"{i:03}_a picture.png" for i in range(80)]),
        "class_names": np.array(["ash", "beech", "cedar", EVIL]),
    }
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``data.npz``, a run on it in ``run``, and its report."""
    folder = tmp_path_factory.mktemp("report")
    make_set(folder / "data.npz")
    assert train.main(["--data", str(folder / "data.npz"), "--out", str(folder / "run"), *SMALL]) == 0
    assert report.main(["--model", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


@pytest.fixture(scope="module")
def page(trained: Path) -> str:
    return (trained / "run" / "report.html").read_text(encoding="utf-8")


def text_of(page: str, title: str) -> str:
    """A section's text, tags taken out."""
    found = re.search(rf"<h2>{re.escape(title)}</h2>(.*?)</section>", page, flags=re.S)
    assert found is not None, title
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", found[1])))


class Reader(HTMLParser):
    """Collects what a page refers to, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "data", "action", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.references
    assert all(reference.startswith("data:image/png;base64,") for reference in reader.references)
    assert not reader.tags & {"script", "link", "iframe", "object", "base", "form"}
    assert "default-src 'none'" in page
    assert "url(" not in page
    assert html.escape(EVIL) in page
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Accuracy", "Data", "Alignment by step", "Calibration", "Confusions worth looking at",
        "Where prediction changed against the MLP", "Training", "Settings",
    ]  # fmt: skip
    assert page.count("<img ") == 3


def test_accuracy_is_what_the_outputs_say(trained: Path, page: str) -> None:
    arrays = load_file(trained / "run" / "outputs.safetensors")
    labels = arrays["labels"]
    ours = arrays["log_proba"].argmax(1) == labels
    told = text_of(page, "Accuracy")
    z, n, p = 1.959964, len(labels), ours.mean()
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (100 * (middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    assert f"SeDA {100 * p:.1f} {low:.1f} .. {high:.1f}" in told
    for name in ("linear", "mlp", "one_step", "one_step_mse"):
        theirs = arrays[f"{name}.log_proba"].argmax(1) == labels
        won, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost)
        assert f"{won} / {lost}, p = {min(1.0, 2 * tail):.2g}" in told


def test_changes_and_confusions_are_counted(trained: Path, page: str) -> None:
    arrays = load_file(trained / "run" / "outputs.safetensors")
    labels = arrays["labels"]
    ours, theirs = arrays["log_proba"].argmax(1), arrays["mlp.log_proba"].argmax(1)
    a, b = ours == labels, theirs == labels
    told = text_of(page, "Where prediction changed against the MLP")
    assert f"SeDA right {(a & b).sum()} {(a & ~b).sum()}" in told
    assert f"SeDA wrong {(~a & b).sum()} {(~a & ~b).sum()}" in told
    (first, *_) = np.flatnonzero(a & ~b)
    true = ["ash", "beech", "cedar", EVIL][labels[first]]
    assert f"only SeDA is right name true SeDA MLP {first:03}_a picture.png {true} " in told
    wrong = list(zip(labels[~a].tolist(), ours[~a].tolist(), strict=True))
    most = max(wrong.count(pair) for pair in wrong)
    names = ["ash", "beech", "cedar", EVIL]
    true, predicted = next(pair for pair in sorted(set(wrong)) if wrong.count(pair) == most)
    by_mlp = ((labels == true) & (theirs == predicted)).sum()
    told = text_of(page, "Confusions worth looking at")
    assert f"{names[true]} {names[predicted]} {most} {100 * most / 20:.0f} % {by_mlp}" in told


def test_alignment_ends_at_what_training_measured(trained: Path, page: str) -> None:
    """The last step's estimate is the sample that the run measured on the same rows."""
    section = page[page.index("Alignment by step") : page.index("Calibration")]
    marks = [[float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', chart)]
             for chart in re.findall(r"<svg.*?</svg>", section, flags=re.S)]  # fmt: skip
    assert [len(chart) for chart in marks] == [4, 4]
    metrics = json.loads((trained / "run" / "metrics.json").read_text())
    labels = [(float(y) - 4, float(text)) for y, text in
              re.findall(r'y="([\d.]+)" text-anchor="end">([\d.e+-]+)</text>', section)]  # fmt: skip
    (low_y, low), (high_y, high) = labels[:2]
    shown = low + (marks[0][-1] - low_y) / (high_y - low_y) * (high - low)
    assert shown == pytest.approx(metrics["alignment"]["frechet"], rel=0.02)


def test_reliability_is_the_expected_calibration_error(trained: Path) -> None:
    arrays = load_file(trained / "run" / "outputs.safetensors")
    metrics = json.loads((trained / "run" / "metrics.json").read_text())
    heights = report.reliability(arrays["log_proba"], arrays["labels"])
    confidence = np.exp(arrays["log_proba"].max(1))
    ece = 0.0
    for i, height in enumerate(heights):
        chosen = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        assert (height is None) == (not chosen.any())
        if height is not None:
            ece += abs(height - confidence[chosen].mean()) * chosen.mean()
    assert 100 * ece == pytest.approx(metrics["ece"], abs=1e-3)


def test_without_baselines_or_data_the_page_says_so(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = make_set(tmp_path / "data.npz"), tmp_path / "run"
    assert train.main(["--data", str(data), "--out", str(out), *SMALL, "--no-baselines"]) == 0
    data.rename(tmp_path / "moved.npz")
    assert report.main(["--model", str(out)]) == 0
    assert "without alignment by step" in capsys.readouterr().err
    # A sentence that nobody hears, here as nothing is open for it, costs no page and goes nowhere else.
    (out / "report.html").unlink()
    command = f"{shlex.quote(sys.executable)} -m seda_fast.report --model {shlex.quote(str(out))} 2>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(out / "report.html")]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "does not exist" in text_of(page, "Data and alignment")
    assert "The run trained no baselines" in text_of(page, "Where prediction changed against the MLP")
    assert "picture.png" not in page
    assert report.main(["--model", str(out), "--data", str(tmp_path / "moved.npz")]) == 0
    assert "Alignment by step" in (out / "report.html").read_text(encoding="utf-8")
    assert report.main(["--model", str(out), "--data", "digits"]) == 2
    assert "digits is not the data of this run" in capsys.readouterr().err


def test_other_features_with_the_same_labels_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_set(tmp_path / "other.npz")
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "visual_test": arrays["visual_test"] + 1})
    assert report.main(["--model", str(run), "--data", str(path)]) == 2
    assert "is not the data of this run: its test part differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("config.toml", "[run]", "[other]"),
        ("config.toml", "test_fraction", "fraction"),
        ("metrics.json", '"ece"', '"other"'),
        ("metrics.json", '"heads": {', '"heads": 3, "others": {'),
    ],
)
def test_results_that_were_edited_are_one_sentence(
    run: Path, name: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (run / name).read_text(encoding="utf-8")
    assert old in text
    (run / name).write_text(text.replace(old, new), encoding="utf-8")
    assert report.main(["--model", str(run)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{run}: the results cannot be read" in error


@pytest.mark.parametrize("change", ["no ids", "labels"])
def test_outputs_that_were_edited_are_one_sentence(run: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = load_file(run / "outputs.safetensors")
    if change == "labels":
        arrays["labels"] = arrays["labels"] + 9
    else:
        del arrays["ids"]
    save_file(arrays, run / "outputs.safetensors")
    assert report.main(["--model", str(run)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "'labels' are not of the model's 4 classes" in error if change == "labels" else "cannot be read" in error


@pytest.mark.parametrize("missing", ["model.safetensors", "config.toml", "metrics.json", "outputs.safetensors"])
def test_a_folder_that_is_no_run_is_refused(run: Path, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    (run / missing).unlink()
    assert report.main(["--model", str(run)]) == 2
    error = capsys.readouterr().err
    assert missing in error
    assert len(error.splitlines()) == 1
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["config.toml", "metrics.json", "outputs.safetensors"])
def test_damaged_results_are_refused(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / name).write_bytes(b"\x00 damaged")
    assert report.main(["--model", str(run)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_results_of_two_runs_in_one_folder_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "outputs.safetensors"
    arrays = {name: values for name, values in load_file(path).items() if name != "mlp.log_proba"}
    save_file(arrays, path)
    assert report.main(["--model", str(run)]) == 2
    error = capsys.readouterr().err
    assert "metrics.json and outputs.safetensors are of two runs: 'mlp.log_proba' is missing" in error
    assert len(error.splitlines()) == 1


def test_other_names_and_bad_options(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--model", str(run), "--out", str(tmp_path / "new" / "a.html"), "--rows", "10"]) == 0
    assert (tmp_path / "new" / "a.html").is_file()
    capsys.readouterr()
    for arguments, sentence in {
        ("--out", "a.pdf"): "the name must end in .html",
        ("--rows", "3"): "rows must be at least 4",
    }.items():
        assert report.main(["--model", str(run), *arguments]) == 2
        assert sentence in capsys.readouterr().err


def test_pieces_escape_and_survive_flat_data() -> None:
    assert "&lt;b&gt;" in table(["<b>"], [["<i>"]])
    assert "<i>" not in table(["<b>"], [["<i>"]])
    chart = line_chart([Line("<b>", [1.0], [2.0])], "x", "y")
    assert "nan" not in chart
    assert "&lt;b&gt;" in chart
    assert bar_chart([None, 0.5], "x", "y").count("<rect") == 1
    assert report.paired_p(0, 0) == 1.0
    assert report.paired_p(0, 2000) == 0.0 or report.paired_p(0, 2000) < 1e-300
    assert report.interval(0, 10)[0] == 0.0


@pytest.mark.slow
def test_a_phone_shows_it_whole(trained: Path, page: str, phone: Any) -> None:
    """Nothing sticks out sideways, folded or not, nothing is asked for, and no stretch of it is blank."""
    shown = phone(trained / "run" / "report.html")
    assert shown.titles == [html.unescape(title) for title in re.findall(r"<h2>(.*?)</h2>", page)]
    assert len(shown.titles) == 8
    assert shown.width <= 390
    assert shown.requests == []
    assert len(shown.dark) > 2
    assert all(0.01 < share < 0.5 for share in shown.dark[:-1])


@pytest.mark.slow
def test_the_phone_sees_what_sticks_out_and_what_is_asked_for(tmp_path: Path, phone: Any) -> None:
    wide = "<h2>wide</h2><div style='width:700px'>x</div><h2 hidden>away</h2>"
    asking = "<img src='http://127.0.0.1:9/extra.png'>"
    (tmp_path / "page.html").write_text(made_page("a page", [wide, asking]))
    shown = phone(tmp_path / "page.html")
    assert shown.titles == ["wide"]
    assert shown.width > 700
    assert [Path(name).name for name in shown.requests] == ["extra.png"]


@pytest.mark.parametrize(
    "low, high, texts",
    [
        (0, 1, "0.0 0.2 0.4 0.6 0.8 1.0"),
        (-0.0214, -0.00472, "-0.020 -0.015 -0.010 -0.005"),
        (0.9992, 0.9998, "0.9992 0.9994 0.9996 0.9998"),
        (0, 0.201, "0.00 0.05 0.10 0.15 0.20"),
        (0, 1e-6, "0 2e-07 4e-07 6e-07 8e-07 1e-06"),
        (1e6, 1.0001e6, "1000000 1000020 1000040 1000060 1000080 1000100"),
    ],
)
def test_ticks_are_round_and_differ(low: float, high: float, texts: str) -> None:
    assert [text for _, text in ticks(low, high)] == texts.split()


def test_ticks_of_any_range(rng: np.random.Generator) -> None:
    for size, width in zip(10 ** rng.uniform(-8, 8, 400), 10 ** rng.uniform(-5, 0, 400), strict=True):
        low = float(size * rng.choice([-1, 1]))
        high = low + float(width * size)
        found = ticks(low, high)
        assert 2 <= len(found) <= 6
        assert len({text for _, text in found}) == len(found)
        for value, text in found:
            assert low - 1e-6 * (high - low) <= value <= high + 1e-6 * (high - low)
            assert abs(float(text) - value) <= 0.01 * (high - low)
