"""What a run tells TensorBoard, read back from its event files."""

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from seda_fast import TrainConfig, events, train
from seda_fast.engine import TERMS, learning_rate_factor
from seda_fast.files import DataError

# 90 rows are 6 steps an epoch, the last of 10 rows; intervals of 4 steps end within, at the end of and across epochs.
SMALL = [
    "--width", "16", "--blocks", "1", "--epochs", "4", "--batch-size", "16", "--diffusion-steps", "50",
    "--log-every", "4",
]  # fmt: skip
STEPS = [4, 8, 12, 16, 20, 24]
ROWS = [64, 58, 58, 64, 58, 58]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(3)
    labels, file = np.arange(90) % 3, tmp_path_factory.mktemp("data") / "data.npz"
    visual, text = rng.normal(size=(90, 8)).astype(np.float32), rng.normal(size=(90, 5)).astype(np.float32)
    np.savez(file, visual_train=visual, text_train=text, label_train=labels,
             visual_test=visual, text_test=text, label_test=labels)  # fmt: skip
    return file


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run in ``run``, its events in ``events/run``, and the same run without events in ``silent``."""
    folder = tmp_path_factory.mktemp("trained")
    common = ["--data", str(data), *SMALL]
    assert train.main([*common, "--out", str(folder / "run"), "--tensorboard", str(folder / "events")]) == 0
    assert train.main([*common, "--out", str(folder / "silent"), "--no-baselines"]) == 0
    return folder


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def history(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "history.csv").open()))


def test_losses_of_the_intervals_make_up_those_of_the_epochs(trained: Path) -> None:
    found, rows = scalars(trained / "events" / "run"), history(trained / "run")
    assert {tag for tag in found if tag.startswith("loss/")} == {f"loss/{term}" for term in TERMS}
    for term in TERMS:
        steps, values = zip(*found[f"loss/{term}"], strict=True)
        assert list(steps) == STEPS
        column = "loss" if term == "total" else f"loss_{term}"
        expected = np.array([float(row[column]) for row in rows])
        # Steps 1 .. 12 are two epochs, 13 .. 24 the other two.
        for first in (0, 3):
            part = slice(first, first + 3)
            epochs = slice(0, 2) if first == 0 else slice(2, 4)
            assert np.average(values[part], weights=ROWS[part]) == pytest.approx(expected[epochs].mean(), rel=1e-4)
    assert len({value for _, value in found["loss/total"]}) == len(STEPS)


def test_the_learning_rate_is_that_of_the_step(trained: Path) -> None:
    settings = TrainConfig()
    expected = [settings.learning_rate * learning_rate_factor(step - 1, 24, settings.warmup) for step in STEPS]
    found = scalars(trained / "events" / "run")["learning_rate"]
    assert [step for step, _ in found] == STEPS
    assert [value for _, value in found] == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_metrics_of_the_test_part_come_at_the_end(trained: Path) -> None:
    found = scalars(trained / "events" / "run")
    metrics = json.loads((trained / "run" / "metrics.json").read_text())
    for tag, value in {
        "test/top1": metrics["top1"],
        "test/ece": metrics["ece"],
        "test/heads/textual/top1": metrics["heads"]["textual"]["top1"],
        "test/alignment/frechet": metrics["alignment"]["frechet"],
        "test/baselines/mlp/balanced_accuracy": metrics["baselines"]["mlp"]["balanced_accuracy"],
        "test/baselines/one_step/alignment/cosine": metrics["baselines"]["one_step"]["alignment"]["cosine"],
    }.items():
        ((step, told),) = found[tag]
        assert (step, told) == (24, pytest.approx(value, rel=1e-5)), tag


def test_telling_changes_nothing_in_the_run(trained: Path) -> None:
    weights = [(trained / name / "model.safetensors").read_bytes() for name in ("run", "silent")]
    assert weights[0] == weights[1]
    losses = [[row["loss"] for row in history(trained / name)] for name in ("run", "silent")]
    assert losses[0] == losses[1]


def test_a_resumed_run_voids_what_it_said_after_its_checkpoint(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in step 8, with a checkpoint of step 6: what it said of step 8 is told anew."""
    common = ["--data", str(data), *SMALL, "--no-baselines", "--out", str(tmp_path / "run"), "--tensorboard"]
    folder, losses = tmp_path / "events", events.EventLog.losses

    def failing(self: events.EventLog, step: int, means: Any, rate: float) -> None:
        losses(self, step, dict.fromkeys(means, -1.0) if step > 6 else means, rate)
        if step == 8:
            raise DataError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(events.EventLog, "losses", failing)
        assert train.main([*common, str(folder)]) == 2
    assert scalars(folder / "run")["loss/total"][-1] == (8, -1.0)
    assert train.main([*common, str(folder), "--resume"]) == 0
    assert len(list((folder / "run").iterdir())) == 2
    found, whole = scalars(folder / "run"), scalars(trained / "events" / "run")
    assert [step for step, _ in found["loss/total"]] == STEPS
    # The first interval after the resumption begins at step 7 instead of 5; the others are the same.
    assert found["loss/total"][2:] == whole["loss/total"][2:]
    assert found["loss/total"][0] == whole["loss/total"][0]
    assert found["learning_rate"] == whole["learning_rate"]


def test_events_of_an_earlier_run_are_not_mixed_with_new_ones(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "events" / "run"
    folder.mkdir(parents=True)
    earlier, foreign = folder / "events.out.tfevents.1.host.1.0", folder / "notes.txt"
    for path in (earlier, foreign):
        path.write_text("")
    common = ["--data", str(data), *SMALL, "--no-baselines", "--out", str(tmp_path / "run")]
    options = [*common, "--tensorboard", str(tmp_path / "events")]
    assert train.main(options) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "holds the events of an earlier run; give --overwrite or another --out" in said
    assert earlier.exists()
    assert not (tmp_path / "run").exists()
    assert train.main([*options, "--overwrite"]) == 0
    assert not earlier.exists()
    assert foreign.exists()
    assert [step for step, _ in scalars(folder)["loss/total"]] == STEPS


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--log-every", "0"], "log_every must be at least 1, not 0"),
        (["--tensorboard", "file"], "file/run cannot be written: "),
    ],
)
def test_refusals_are_one_sentence(
    options: list[str], sentence: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert train.main(["--data", str(data), *SMALL, "--out", "run", *options]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert sentence in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_the_package_nothing_is_begun(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name))
    given = ["--data", str(data), *SMALL, "--out", str(tmp_path / "run"), "--tensorboard", str(tmp_path / "events")]
    assert train.main(given) == 2
    assert capsys.readouterr().err == (
        "seda_fast.train: tensorboard is not installed; --tensorboard needs: pip install 'seda_fast[tensorboard]'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_epochs_and_batches_may_be_left_to_the_rule(data: Path, tmp_path: Path) -> None:
    common = ["--data", str(data), "--width", "16", "--blocks", "1", "--diffusion-steps", "50", "--no-baselines"]
    given = [
        *common,
        "--out",
        str(tmp_path / "run"),
        "--tensorboard",
        str(tmp_path),
        "--log-every",
        "1000",
        "--overwrite",
    ]
    assert train.main(given) == 0
    found = scalars(tmp_path / "run")
    assert found["test/top1"][0][0] == found["loss/total"][-1][0] >= 240
