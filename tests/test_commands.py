"""The commands end to end on small sets: what they write, that it is right, and how they refuse."""

import csv
import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from scipy.linalg import sqrtm
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

import seda_fast
from seda_fast import DataError, FeatureSet, SeDA, SeDAConfig, TrainConfig, evaluate, info, predict, results, train
from seda_fast.baselines import BASELINES, BATCH_SIZE, EPOCHS, FEWEST_STEPS, Baseline, enough_epochs
from seda_fast.checkpoint import Checkpoints
from seda_fast.command import run as run_command
from seda_fast.files import atomic_path
from seda_fast.loop import TrainingSet
from seda_fast.prepare import prepare

SMALL = ["--width", "32", "--blocks", "2", "--epochs", "4", "--batch-size", "64", "--diffusion-steps", "100"]
RESULTS = {"config.toml", "model.safetensors", "history.csv", "metrics.json", "outputs.safetensors", "report"}


def make_set(path: Path, **changes: Any) -> Path:
    """A small learnable set of 8 visual and 5 textual dimensions, 3 classes."""
    rng = np.random.default_rng(3)
    labels, test_labels = np.arange(90) % 3, np.arange(42) % 3
    centres, texts = rng.normal(size=(3, 8)), rng.normal(size=(3, 5))
    arrays = {
        "visual_train": (centres[labels] + rng.normal(size=(90, 8))).astype(np.float32),
        "text_train": (texts[labels] + rng.normal(size=(90, 5))).astype(np.float32),
        "label_train": labels,
        "visual_test": (centres[test_labels] + rng.normal(size=(42, 8))).astype(np.float32),
        "text_test": (texts[test_labels] + rng.normal(size=(42, 5))).astype(np.float32),
        "label_test": test_labels,
        "class_names": np.array(["ash", "beech", "cedar"]),
    }
    arrays.update(changes)
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``data.npz`` and the results of a run on it in ``run``."""
    folder = tmp_path_factory.mktemp("trained")
    make_set(folder / "data.npz")
    code = train.main(["--data", str(folder / "data.npz"), "--out", str(folder / "run"), *SMALL, "--seed", "5"])
    assert code == 0
    return folder


def metrics_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "run" / "metrics.json").read_text())
    return content


# ---------------------------------------------------------------------------------------------------- train


def test_run_writes_everything(trained: Path) -> None:
    run = trained / "run"
    assert {path.name for path in run.iterdir()} == RESULTS
    assert {path.name for path in (run / "report").iterdir()} == {"loss.png", "confusion.png", "paths.png"}
    # Else --overwrite would leave what of an earlier run has another name.
    assert {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} <= set(results.RESULTS)
    rows = list(csv.DictReader((run / "history.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert all(float(value) == float(value) for row in rows for value in row.values())
    settings = tomllib.loads((run / "config.toml").read_text())
    assert set(settings) == {"run", "model", "train"}
    assert settings["train"]["seed"] == 5
    assert settings["model"]["width"] == 32
    assert settings["model"]["visual_dim"] == 8
    assert not [path for path in trained.iterdir() if path.name.startswith(".")]


def test_metrics_have_the_promised_keys(trained: Path) -> None:
    metrics = metrics_of(trained)
    classes = {"top1", "top5", "balanced_accuracy", "ece"}
    aligned = {"frechet", "frechet_floor", "mmd", "cosine", "recall_at_1", "recall_at_5", "recall_at_10"}
    assert classes | {"alignment", "heads", "baselines", "train", "seed", "versions"} <= set(metrics)
    assert set(metrics["alignment"]) == set(metrics["alignment_point"]) == aligned
    assert set(metrics["heads"]) == {"semantic", "textual", "visual", "kernel"}
    assert metrics["kernel_head"] == {"rows": len(load_file(trained / "run" / "model.safetensors")["kernel.rows"])}
    assert {"linear", "mlp", "one_step", "one_step_mse"} == set(metrics["baselines"])
    for values in (*metrics["heads"].values(), *metrics["baselines"].values()):
        assert classes <= set(values)
    assert set(metrics["baselines"]["one_step"]["alignment"]) == aligned
    assert metrics["baselines"]["mlp"]["alignment"] is None
    assert set(metrics["train"]) == {
        "seconds", "epochs", "batch_size", "samples_per_second", "peak_memory_bytes", "engine", "precision", "ranks",
        "data", "resumed_after_step", "prepare_seconds",
    }  # fmt: skip
    assert metrics["train"]["engine"] == {
        "asked": "auto", "used": "eager", "reason": "device is a CPU", "fallbacks": [],
    }  # fmt: skip
    assert metrics["seed"] == 5
    assert {"python", "torch", "numpy"} <= set(metrics["versions"])


def frechet_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root))


def recompute(run: Path, data: Path) -> list[str]:
    """Compare every figure of ``metrics.json`` with one computed anew from the saved outputs; returns what was met.

    Frechet by the textbook formula with a matrix square root, retrieval by sorting the whole similarity matrix.
    """
    metrics = json.loads((run / "metrics.json").read_text())
    outputs = load_file(run / "outputs.safetensors")
    model = load_file(run / "model.safetensors")
    source = np.load(data, allow_pickle=False)
    labels = source["label_test"]
    np.testing.assert_array_equal(outputs["labels"], labels)
    text = ((source["text_test"] - model["text_mean"]) / model["text_scale"]).astype(np.float64)
    compared = []

    def classes(found: dict[str, Any], log_proba: np.ndarray, where: str) -> None:
        p, k = np.exp(log_proba.astype(np.float64)), log_proba.shape[1]
        predicted = log_proba.argmax(1)
        assert found["top1"] == pytest.approx(100 * np.mean(predicted == labels))
        top5 = 1.0 if k <= 5 else top_k_accuracy_score(labels, log_proba, k=5, labels=np.arange(k))
        assert found["top5"] == pytest.approx(100 * top5, abs=0.2)
        assert found["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(labels, predicted))
        confidence, right = p.max(1), predicted == labels
        bins = np.minimum((confidence * 15).astype(int), 14)
        gaps = [
            abs(right[bins == b].mean() - confidence[bins == b].mean()) * np.mean(bins == b) for b in np.unique(bins)
        ]
        assert found["ece"] == pytest.approx(100 * sum(gaps), abs=0.3)
        compared.append(where)

    def aligned(found: dict[str, float], features: np.ndarray, where: str) -> None:
        a = features.astype(np.float64)
        assert found["frechet"] == pytest.approx(frechet_by_hand(a, text), rel=1e-2, abs=1e-2)
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, text)]
        similarity = unit[0] @ unit[1].T
        own = np.diag(similarity)
        assert found["cosine"] == pytest.approx(own.mean(), abs=1e-5)
        rank = (similarity > own[:, None] + 1e-9).sum(1)
        for n in (1, 5, 10):
            assert found[f"recall_at_{n}"] == pytest.approx(100 * np.mean(rank < n), abs=0.5)
        compared.append(where)

    classes(metrics, outputs["log_proba"], "combined")
    for head in ("semantic", "textual", "visual", "kernel"):
        classes(metrics["heads"][head], outputs[f"{head}_log_proba"], head)
    aligned(metrics["alignment"], outputs["aligned"], "aligned")
    aligned(metrics["alignment_point"], outputs["aligned_point"], "point")
    for name, values in metrics["baselines"].items():
        classes(values, outputs[f"{name}.log_proba"], name)
        if values["alignment"] is not None:
            aligned(values["alignment"], outputs[f"{name}.aligned"], name)
    return compared


def test_every_figure_can_be_recomputed_from_the_saved_outputs(trained: Path) -> None:
    assert len(recompute(trained / "run", trained / "data.npz")) == 13


def test_a_run_without_kernel_head_says_so(trained: Path, tmp_path: Path) -> None:
    common = ["--data", str(trained / "data.npz"), *SMALL, "--no-baselines", "--out", str(tmp_path / "run")]
    assert train.main([*common, "--kernel-weight", "0"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics["heads"]) == {"semantic", "textual", "visual"}
    assert metrics["kernel_head"] == {"rows": 0, "reason": "its weight is 0"}
    assert "kernel_log_proba" not in load_file(tmp_path / "run" / "outputs.safetensors")


def test_same_seed_gives_the_same_file_and_another_seed_another(trained: Path, tmp_path: Path) -> None:
    common = ["--data", str(trained / "data.npz"), *SMALL, "--no-baselines"]
    assert train.main([*common, "--seed", "5", "--out", str(tmp_path / "same")]) == 0
    assert train.main([*common, "--seed", "6", "--out", str(tmp_path / "other")]) == 0
    file = "model.safetensors"
    assert (tmp_path / "same" / file).read_bytes() == (trained / "run" / file).read_bytes()
    assert (tmp_path / "other" / file).read_bytes() != (trained / "run" / file).read_bytes()


def test_text_of_the_test_part_is_never_used(trained: Path, tmp_path: Path) -> None:
    poisoned = make_set(tmp_path / "poisoned.npz", text_test=np.full((42, 5), np.nan, np.float32))
    arguments = ["--out", str(tmp_path / "run"), "--unpaired", "keep", *SMALL, "--seed", "5", "--no-baselines"]
    assert train.main(["--data", str(poisoned), *arguments]) == 0
    one, two = trained / "run", tmp_path / "run"
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    clean, blind = load_file(one / "outputs.safetensors"), load_file(two / "outputs.safetensors")
    for name in blind:
        np.testing.assert_array_equal(clean[name], blind[name])
    for data, out in ((trained / "data.npz", "clean.csv"), (poisoned, "poisoned.csv")):
        assert predict.main(["--model", str(one), "--data", str(data), "--out", str(tmp_path / out)]) == 0
    assert (tmp_path / "clean.csv").read_bytes() == (tmp_path / "poisoned.csv").read_bytes()


def test_settings_come_from_defaults_then_file_then_command_line(tmp_path: Path) -> None:
    data = make_set(tmp_path / "data.npz")
    file = tmp_path / "settings.toml"
    file.write_text("[train]\nepochs = 2\nlearning_rate = 0.01\nbatch_size = 32\n[model]\nwidth = 16\nblocks = 1\n")
    out = tmp_path / "run"
    arguments = ["--config", str(file), "--data", str(data), "--out", str(out), "--epochs", "1", "--no-baselines"]
    assert train.main(arguments) == 0
    settings = tomllib.loads((out / "config.toml").read_text())
    assert settings["train"]["epochs"] == 1  # command line over file
    assert settings["train"]["learning_rate"] == 0.01  # file over default
    assert settings["train"]["clip_norm"] == 1.0  # default
    assert settings["model"]["width"] == 16
    # A run's own settings repeat it.
    again = ["--config", str(out / "config.toml"), "--out", str(tmp_path / "again")]
    assert train.main(again) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_unlabelled_pairs_and_missing_texts_train_through_every_command(tmp_path: Path) -> None:
    labels, text = np.arange(90) % 3, np.random.default_rng(0).normal(size=(90, 5)).astype(np.float32)
    labels[30:] = -1
    text[::4] = np.nan
    test_labels = np.arange(42) % 3
    test_labels[::5] = -1
    data = make_set(tmp_path / "data.npz", label_train=labels, text_train=text, label_test=test_labels)
    run = tmp_path / "run"
    assert train.main(["--data", str(data), "--out", str(run), "--unpaired", "keep", *SMALL]) == 0
    assert evaluate.main(["--model", str(run), "--data", str(data), "--json"]) == 0
    assert predict.main(["--model", str(run), "--data", str(data), "--out", str(tmp_path / "p.csv")]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    outputs = load_file(run / "outputs.safetensors")
    known = test_labels >= 0
    right = outputs["log_proba"].argmax(1)[known] == test_labels[known]
    assert metrics["top1"] == pytest.approx(100 * right.mean())


def test_a_test_part_whose_texts_are_all_equal_has_no_alignment(tmp_path: Path) -> None:
    data = make_set(tmp_path / "data.npz", text_test=np.ones((42, 5), np.float32))
    assert train.main(["--data", str(data), "--out", str(tmp_path / "run"), *SMALL, "--no-baselines"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["alignment"] is None
    assert metrics["alignment_point"] is None


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--wings", "2"], "unrecognized arguments: --wings 2"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--epochs", "-1"], "epochs must be in 1 .. 2**31 - 1, or 0 for the rule, not -1"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--data", "nowhere.npz"], "nowhere.npz: does not exist"),
        (["--config", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (["--test-fraction", "1.5"], "test_fraction must be between 0 and 1, not 1.5"),
    ],
)
def test_bad_arguments_are_one_sentence_and_leave_nothing(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = train.main(["--out", "run", *arguments])
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    captured = capfd.readouterr()
    assert code == 2
    assert sentence in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[train]\nwings = 2\n", "unknown setting 'wings' in [train]"),
        ("[wings]\nn = 2\n", "unknown section [wings]"),
        ("train = 3\n", "train must be a section of settings"),
        ("[train\n", "not a TOML file"),
        ("[train]\nepochs = 'many'\n", "epochs must be of type int, not 'many'"),
        ("[model]\nvisual_dim = 9\n", "visual_dim is set to 9 but"),
    ],
)
def test_bad_settings_files_are_one_sentence(
    content: str, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, file = make_set(tmp_path / "data.npz"), tmp_path / "settings.toml"
    file.write_text(content)
    code = train.main(["--config", str(file), "--data", str(data), "--out", str(tmp_path / "run")])
    captured = capfd.readouterr()
    assert code == 2
    assert sentence in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"data.npz", "settings.toml"}


def test_earlier_results_are_not_overwritten_unasked(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (trained / "run" / "model.safetensors").read_bytes()
    arguments = ["--data", str(trained / "data.npz"), "--out", str(trained / "run"), *SMALL, "--no-baselines"]
    assert train.main(arguments) == 2
    assert "holds the results of an earlier run" in capfd.readouterr().err
    assert (trained / "run" / "model.safetensors").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = make_set(tmp_path / "data.npz")
    (tmp_path / "file").write_text("not a folder")
    assert train.main(["--data", str(data), "--out", str(tmp_path / "file" / "run"), *SMALL]) == 2
    assert "cannot be written" in capfd.readouterr().err


def test_a_share_that_is_not_used_is_told(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["--data", str(trained / "data.npz"), *SMALL, "--no-baselines", "--test-fraction"]
    assert train.main([*given, "0.5", "--out", str(tmp_path / "a")]) == 0
    assert "test_fraction is not used" in capfd.readouterr().err
    assert train.main([*given, "0.2", "--out", str(tmp_path / "b")]) == 0
    assert "test_fraction" not in capfd.readouterr().err
    assert train.main([*given[:-1], "--memory-share", "0", "--out", str(tmp_path / "c")]) == 0
    assert "memory_share is not used: only a folder of .npy files" in capfd.readouterr().err


def test_baselines_of_few_rows_take_as_many_steps_as_seda(trained: Path) -> None:
    data = FeatureSet.load(trained / "data.npz")
    config = SeDAConfig(visual_dim=8, text_dim=5, n_classes=3, width=32, blocks=1)
    _, rows = prepare(data, config, 0, torch.device("cpu"))
    assert isinstance(rows, TrainingSet)
    few = dataclasses.replace(rows, labels=rows.labels.masked_fill(torch.arange(90) >= 12, -1))
    for made in (rows, few):
        found = train.fit_baselines(made, config, TrainConfig())
        for name in ("mlp", "one_step", "one_step_mse"):
            assert found[name].hyperparameters["epochs"] == FEWEST_STEPS  # one batch a pass
    assert enough_epochs(1_000_000) == EPOCHS
    assert enough_epochs(3 * BATCH_SIZE) == FEWEST_STEPS // 3


@pytest.mark.parametrize("where", ["training", "measuring", "gathering"])
def test_memory_that_runs_out_in_a_baseline_costs_that_alone(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a GPU it is a RuntimeError."""

    def lacking(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB")

    if where == "measuring":
        monkeypatch.setattr(Baseline, "log_proba", lacking)
    else:
        monkeypatch.setattr(train, "fit_baseline" if where == "training" else "labelled_rows", lacking)
    data = make_set(tmp_path / "data.npz")
    assert train.main(["--data", str(data), "--out", str(tmp_path / "run"), *SMALL, "--epochs", "1"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["baselines"] == {}
    said = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    how = {"training": "trained on these rows", "measuring": "measured on the test part"}
    each = [
        f"seda_fast.train: the baseline {name} cannot be {how.get(where)} and is left out: there is not enough memory"
        for name in BASELINES
    ]
    assert said == (
        ["seda_fast.train: the baselines are left out: there is not enough memory"] if where == "gathering" else each
    )


def test_a_baseline_that_fails_otherwise_is_not_kept_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(train, "fit_baseline", wrong)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        train.main(["--data", str(make_set(tmp_path / "data.npz")), "--out", str(tmp_path / "run"), *SMALL])


def test_a_run_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_set(tmp_path / "data.npz")

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "write_report", fail)
    with pytest.raises(KeyboardInterrupt):
        train.main(["--data", str(data), "--out", str(tmp_path / "deep" / "run"), *SMALL, "--no-baselines"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run.unfinished"]
    assert not list(tmp_path.rglob("metrics.json"))


@pytest.mark.parametrize("there", [False, True])
def test_results_are_on_disk_before_the_checkpoints_go(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, on_disk, seen = tmp_path / "out", set[int](), list[bool]()
    if there:
        out.mkdir()
        (out / "other").write_text("of somebody else")

    def before_they_go(checkpoints: Checkpoints) -> None:
        new = [out / "a", out / "report", out / "report" / "a.png", out, *([] if there else [tmp_path])]
        seen.append({path.stat().st_ino for path in new} <= on_disk)

    monkeypatch.setattr(results, "flush", lambda path: on_disk.add(path.stat().st_ino))
    with results.results_folder(out, overwrite=True, resume=False, report=print) as (draft, _):
        (draft / "report").mkdir()
        (draft / "a").write_text("a")
        (draft / "report" / "a.png").write_text("b")
        monkeypatch.setattr(Checkpoints, "clear", before_they_go)
    assert seen == [True]


@pytest.mark.parametrize("command", [evaluate.main, predict.main])
def test_a_folder_without_model_is_one_sentence(
    command: Callable[[list[str]], int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = make_set(tmp_path / "data.npz")
    assert command(["--model", str(tmp_path), "--data", str(data)]) == 2
    captured = capfd.readouterr()
    assert "there is no such file" in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not captured.out


# ---------------------------------------------------------------------------------------------------- evaluate, predict


def test_peak_memory_is_this_process_alone(tmp_path: Path) -> None:
    """A large process starts a small one, whose peak must be the small one's."""
    code = (
        "import subprocess, sys\n"
        "large = bytearray(3 * 2**30)\n"
        "for i in range(0, len(large), 4096): large[i] = 1\n"
        "small = 'import torch; from seda_fast.measure import peak_memory_bytes as p; '\n"
        "small += 'print(p(torch.device(\"cpu\")))'\n"
        "print(subprocess.run([sys.executable, '-c', small], capture_output=True, text=True, check=True).stdout)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert 5e7 < int(done.stdout) < 2e9


def test_evaluate_repeats_what_training_measured(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(trained / "run"), "--data", str(trained / "data.npz")]
    assert evaluate.main([*arguments, "--json"]) == 0
    found, expected = json.loads(capsys.readouterr().out), metrics_of(trained)
    for key in ("top1", "top5", "balanced_accuracy", "ece", "heads", "alignment", "alignment_point"):
        assert found[key] == expected[key]
    assert evaluate.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "SeDA" in shown
    assert f"{expected['top1']:.1f}" in shown


def test_predict_writes_what_the_model_says(trained: Path, tmp_path: Path) -> None:
    out, features = tmp_path / "new" / "p.csv", tmp_path / "f.npz"
    run, data = str(trained / "run"), str(trained / "data.npz")
    assert predict.main(["--model", run, "--data", data, "--out", str(out), "--features", str(features)]) == 0
    rows, saved = list(csv.DictReader(out.open())), load_file(trained / "run" / "outputs.safetensors")
    assert list(rows[0]) == ["id", "label", "class_name", "probability", "top5"]
    assert [int(row["id"]) for row in rows] == list(range(42))
    assert [int(row["label"]) for row in rows] == saved["log_proba"].argmax(1).tolist()
    assert {row["class_name"] for row in rows} <= {"ash", "beech", "cedar"}
    p = np.exp(saved["log_proba"])
    for row, expected in zip(rows, p, strict=True):
        assert float(row["probability"]) == pytest.approx(expected.max(), abs=1e-6)
        pairs = [pair.split(":") for pair in row["top5"].split()]
        assert [int(label) for label, _ in pairs] == np.argsort(-expected, kind="stable").tolist()
    with np.load(features, allow_pickle=False) as found:
        for name in ("log_proba", "semantic", "aligned", "aligned_point", "ids"):
            np.testing.assert_array_equal(found[name], saved[name])


def test_predictions_alone_align_nothing_more_and_are_the_same(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--model", str(trained / "run"), "--data", str(trained / "data.npz")]
    assert predict.main([*given, "--out", str(tmp_path / "a.csv"), "--features", str(tmp_path / "f.npz")]) == 0

    def never(*given: object, **named: object) -> None:
        raise AssertionError("nobody asked for aligned features")

    monkeypatch.setattr(SeDA, "align", never)
    assert predict.main([*given, "--out", str(tmp_path / "b.csv")]) == 0
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_predict_needs_visual_features_alone(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    visual = np.load(trained / "data.npz")["visual_test"]
    np.savez(tmp_path / "only.npz", visual=visual)
    np.save(tmp_path / "only.npy", visual)
    run = str(trained / "run")
    shown = []
    for data in (trained / "data.npz", tmp_path / "only.npz", tmp_path / "only.npy"):
        assert predict.main(["--model", run, "--data", str(data)]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]


@pytest.mark.parametrize("kind", ["npz", "safetensors", "folder"])
def test_rows_that_have_names_are_called_by_them(
    kind: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    visual = np.load(trained / "data.npz")["visual_test"][:3]
    run = ["--model", str(trained / "run"), "--data", str(tmp_path / f"new.{kind}")]

    def told(names: list[str]) -> list[list[str]]:
        if kind == "safetensors":
            save_file({"visual": visual}, tmp_path / f"new.{kind}", metadata={"names": json.dumps(names)})
        elif kind == "npz":
            np.savez(tmp_path / f"new.{kind}", visual=visual, names=np.array(names))
        else:
            (tmp_path / f"new.{kind}").mkdir(exist_ok=True)
            for key, value in {"visual": visual, "names": np.array(names)}.items():
                np.save(tmp_path / f"new.{kind}" / f"{key}.npy", value)
        code = predict.main(run)
        captured = capsys.readouterr()
        return list(csv.reader(captured.out.splitlines())) if code == 0 else [[captured.err]]

    header, *lines = told(["a.png", 'b, "c".png', "a.png"])
    assert header[:3] == ["id", "name", "label"]
    assert [line[:2] for line in lines] == [["0", "a.png"], ["1", 'b, "c".png'], ["2", "a.png"]]
    assert "'names' has 2 entries but 'visual' has 3 rows" in told(["a", "b"])[0][0]
    assert "'names' entry 1 is blank or holds control characters" in told(["a", "b\x1b", "c"])[0][0]


def test_names_follow_their_rows_into_the_test_part(tmp_path: Path) -> None:
    names = np.array([f"{i}.png" for i in range(90)])
    path = make_set(tmp_path / "data.npz", visual_test=None, text_test=None, label_test=None, names_train=names)
    data = FeatureSet.load(path)
    assert data.names_test == tuple(names[data.ids_test])
    make_set(path, names_test=names[:42])
    assert FeatureSet.load(path).names_test == tuple(names[:42])
    make_set(path, names_test=names[:41])
    with pytest.raises(DataError, match="'names_test' has 41 entries but 'visual_test' has 42 rows"):
        FeatureSet.load(path)


def test_predictions_do_not_depend_on_the_file_they_come_in(trained: Path, tmp_path: Path) -> None:
    """A shorter file: the same rows get bit-identical results, whatever follows them."""
    visual = np.load(trained / "data.npz")["visual_test"]
    whole = load_file(trained / "run" / "outputs.safetensors")["log_proba"]
    for rows in (1, 17):
        np.save(tmp_path / "part.npy", visual[:rows])
        features = tmp_path / f"{rows}.safetensors"
        arguments = [
            "--data",
            str(tmp_path / "part.npy"),
            "--features",
            str(features),
            "--out",
            str(tmp_path / "p.csv"),
        ]
        assert predict.main(["--model", str(trained / "run"), *arguments]) == 0
        np.testing.assert_array_equal(load_file(features)["log_proba"], whole[:rows])


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--out", "p.txt", "must end in .csv"),
        ("--features", "f.csv", "must end in .npz or .safetensors"),
        ("--data", "missing.npy", "missing.npy"),
    ],
)
def test_predict_refuses_before_it_writes(
    trained: Path, option: str, value: str, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = {"--model": str(trained / "run"), "--data": str(trained / "data.npz"), "--out": str(tmp_path / "p.csv")}
    arguments[option] = str(tmp_path / value)
    assert predict.main([word for pair in arguments.items() for word in pair]) == 2
    assert sentence in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_predict_refuses_features_of_another_size(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((4, 9), np.float32))
    assert predict.main(["--model", str(trained / "run"), "--data", str(tmp_path / "wide.npy")]) == 2
    assert "'visual' has 9 columns but the model has 8" in capfd.readouterr().err
    np.savez(tmp_path / "wide.npz", visual_test=np.zeros((4, 9), np.float32))
    assert predict.main(["--model", str(trained / "run"), "--data", str(tmp_path / "wide.npz")]) == 2
    assert "'visual_test' has 9 columns but the model has 8" in capfd.readouterr().err


def test_evaluate_and_predict_take_settings_from_a_file(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, data, run = tmp_path / "s.toml", trained / "data.npz", trained / "run"
    file.write_text(f"[predict]\nmodel = '{run}'\ndata = '{data}'\nseed = 1\nout = '{tmp_path / 'a.csv'}'\n")
    assert predict.main(["--config", str(file)]) == 0
    assert predict.main(["--config", str(file), "--seed", "0", "--out", str(tmp_path / "b.csv")]) == 0
    assert predict.main(["--model", str(run), "--data", str(data), "--out", str(tmp_path / "c.csv")]) == 0
    one, two, three = ((tmp_path / name).read_bytes() for name in ("a.csv", "b.csv", "c.csv"))
    assert one != two
    assert two == three
    file.write_text(f"[evaluate]\nmodel = '{run}'\ndata = '{data}'\njson = true\n")
    assert evaluate.main(["--config", str(file)]) == 0
    assert json.loads(capfd.readouterr().out)["top1"] == metrics_of(trained)["top1"]
    file.write_text("[evaluate]\nwings = 2\n")
    assert evaluate.main(["--config", str(file)]) == 2
    assert "unknown setting 'wings' in [evaluate]" in capfd.readouterr().err
    assert evaluate.main(["--model", str(run)]) == 2
    assert "data is missing" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------- as programs


def run_module(*arguments: str, cwd: Path, threads: int | None = 1) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "info"])
def test_help_is_there(command: str, tmp_path: Path) -> None:
    done = run_module(f"seda_fast.{command}", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"python -m seda_fast.{command}" in done.stdout


def test_the_package_itself_names_every_command(tmp_path: Path) -> None:
    package = Path(train.__file__).parent
    commands = [p.stem for p in package.glob("[!_]*.py") if "__main__" in p.read_text(encoding="utf-8")]
    told = {}
    for arguments in ((), ("--version",), ("train",), ("--nonsense",)):
        command = [sys.executable, "-m", "seda_fast", *arguments]
        told[arguments] = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    listed = re.findall(r"^  (\w+) ", told[()].stdout, re.MULTILINE)
    assert sorted(listed) == sorted(commands)
    assert told["--version",].stdout == f"{seda_fast.__version__}\n"
    assert [found.returncode for found in told.values()] == [0, 0, 2, 2]
    assert "give python -m seda_fast.train" in told["train",].stderr
    assert "--nonsense" in told["--nonsense",].stderr


def test_training_is_quiet_without_a_terminal(tmp_path: Path) -> None:
    make_set(tmp_path / "data.npz")
    done = run_module("seda_fast.train", "--data", "data.npz", "--out", "run", "--no-baselines", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "top-1" in done.stdout
    assert SeDA.from_pretrained(tmp_path / "run").class_names == ("ash", "beech", "cedar")


def test_info_names_versions_devices_and_implementations(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    shown = capsys.readouterr().out
    for word in ("seda_fast", "torch", "cpu:", "q_sample", "interaction_block", "semantic_projection", "reverse_chain"):
        assert word in shown
    assert len(shown.splitlines()) <= 40
    assert max(len(line) for line in shown.splitlines()) <= 160


def test_info_tells_what_the_cuda_kernels_serve_where_they_were_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {"compiler": "release 13.0", "architectures": ["80", "90a"]}
    shown = {"available": False, "reason": "this PyTorch was built without CUDA", "build": built, "missing": None}
    rules = info.cuda_status()["rules"]
    assert set(rules) == {"reverse_chain"}
    for here, told in ((shown, True), (shown | {"build": {}}, False)):
        monkeypatch.setattr(info, "cuda_status", lambda here=here: here | {"rules": rules})
        text = " ".join(" ".join(info.extension_lines()).split())
        assert ("CUDA: release 13.0; sm_80, sm_90a" in text) == told
        for operation, rule in rules.items():
            assert (f"CUDA, {operation}: {rule}" in text) == told


def test_info_tells_of_a_gradient_that_another_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    real = info.choose
    monkeypatch.setattr(
        info, "choose", lambda op, *rest: ("elsewhere", None) if op == "q_sample_backward" else real(op, *rest)
    )
    lines = info.operation_lines(torch.float32)
    assert any(line.startswith("q_sample  ") for line in lines)
    assert any(line.startswith("q_sample_backward") and line.endswith("cpu: elsewhere") for line in lines)
    assert any(line.startswith("interaction_block and its gradient") for line in lines)
    told = {line.split()[0] for line in lines}
    assert {op.removesuffix("_backward") for op in info.operations()} <= told


def test_info_takes_settings_like_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.toml"
    file.write_text("[info]\njson = true\ndtype = 'float16'\n")
    assert info.main(["--config", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert any("q_sample" in line and "cpu: reference" in line for line in found["operations (float16)"])
    assert info.main(["--config", str(file), "--dtype", "float32", "--no-json"]) == 0
    assert "operations (float32)" in capsys.readouterr().out
    file.write_text("[info]\nwings = 2\n")
    assert info.main(["--config", str(file)]) == 2
    assert "unknown setting 'wings' in [info]" in capsys.readouterr().err


def test_help_names_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for flag in ("--data", "--out", "--epochs", "--seed", "--device", "--baselines", "--no-baselines", "--config"):
        assert flag in shown
    assert "(default: " in shown


# ---------------------------------------------------------------------------------------------------- real data


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_digits_with_defaults(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The whole job on the embedded set: train in under 3 minutes, then evaluate and predict its test part."""
    started = time.monotonic()
    assert run_module("seda_fast.train", "--out", "run", cwd=tmp_path, threads=None).returncode == 0
    assert time.monotonic() - started < 180
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["top1"] >= metrics["baselines"]["linear"]["top1"] - 1.5
    assert metrics["alignment"]["frechet"] < 0.5 * metrics["baselines"]["one_step"]["alignment"]["frechet"]
    run = str(tmp_path / "run")
    assert evaluate.main(["--model", run, "--data", "digits", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["top1"] == metrics["top1"]
    assert predict.main(["--model", run, "--data", "digits", "--out", str(tmp_path / "p.csv")]) == 0
    predicted = [int(row["label"]) for row in csv.DictReader((tmp_path / "p.csv").open())]
    labels = load_file(tmp_path / "run" / "outputs.safetensors")["labels"]
    assert 100 * np.mean(predicted == labels) == pytest.approx(metrics["top1"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cub10_googlenet_doc2vec", "wikipedia"])
def test_small_real_sets_train_and_can_be_recomputed(name: str, shared_data: Path, tmp_path: Path) -> None:
    data, out = shared_data / f"{name}.npz", tmp_path / "run"
    small = ["--width", "64", "--blocks", "1", "--epochs", "8"]
    assert train.main(["--data", str(data), "--out", str(out), *small]) == 0
    assert len(recompute(out, data)) == 13
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["top1"] > 1.5 * 100 / len(np.load(data)["class_names"])


@pytest.fixture(scope="module")
def fashion(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """Results of one run with all defaults on fashion_products, the data file, and the process's peak of memory."""
    data, out = shared_data / "fashion_products.npz", tmp_path_factory.mktemp("fashion") / "run"
    code = (
        "import sys, torch\n"
        "from seda_fast import train\n"
        "from seda_fast.measure import peak_memory_bytes\n"
        "assert train.main(sys.argv[1:]) == 0\n"
        "print(peak_memory_bytes(torch.device('cpu')))\n"
    )
    command = [sys.executable, "-c", code, "--data", str(data), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return out, data, int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_fashion_products_with_defaults(fashion: tuple[Path, Path, int]) -> None:
    """On real data: alignment beside the one-step mapping, time, memory, and figures that can be recomputed."""
    out, data, peak_memory = fashion
    metrics = json.loads((out / "metrics.json").read_text())
    baselines = metrics["baselines"]
    assert metrics["top1"] >= baselines["mlp"]["top1"] - 1
    assert metrics["alignment"]["frechet"] < 0.5 * baselines["one_step"]["alignment"]["frechet"]
    assert metrics["alignment"]["frechet"] <= 60
    # Of the one-step mapping trained by MSE alone.
    assert metrics["alignment_point"]["cosine"] >= 0.351
    assert metrics["alignment_point"]["recall_at_10"] >= 48.6
    assert metrics["train"]["seconds"] + metrics["train"]["prepare_seconds"] < 240
    assert peak_memory < 1.5e9
    assert len(recompute(out, data)) == 13


def test_memory_that_runs_out_is_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    def too_large() -> None:
        torch.empty(1 << 50)

    def on_a_gpu() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    def in_an_operation() -> None:
        raise RuntimeError(
            'torch_call_dispatcher( "aten::empty", "memory_format", stack.data(), 0) API call failed at ops.h'
        )

    def another() -> None:
        raise RuntimeError("a fault of ours")

    bodies = (too_large, on_a_gpu, in_an_operation)
    assert [run_command(body, "seda_fast.train") for body in bodies] == [2, 2, 2]
    host, device, inside = capfd.readouterr().err.splitlines()
    assert "can't allocate memory: you tried to allocate 4503599627370496 bytes" in host
    assert host.endswith("; give a smaller --batch-size or a smaller model, or --precision bf16 on a GPU")
    assert device.startswith("seda_fast.train: CUDA out of memory. Tried to allocate 2.00 GiB.; give a smaller")
    assert inside.startswith("seda_fast.train: memory ran out; give a smaller")
    for program, advice in (("extract", "give a smaller --batch-size"), ("predict", "fewer rows at a time need less")):
        assert run_command(on_a_gpu, f"seda_fast.{program}") == 2
        assert capfd.readouterr().err.rstrip().endswith(f"; {advice}")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run_command(another, "seda_fast.train")


# What an install without extras lacks, at least.
EXTRAS = [
    "matplotlib",
    "onnx",
    "onnxscript",
    "PIL",
    "scipy",
    "sentence_transformers",
    "sklearn",
    "tomli_w",
    "transformers",
]


def without(modules: list[str], command: str, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """``python -m seda_fast.<command>`` where the modules are not installed."""
    code = (
        "import importlib.util as u, runpy, sys\n"
        f"absent, find = set({modules!r}), u.find_spec\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in absent:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "u.find_spec = lambda name, *rest: None if name.partition('.')[0] in absent else find(name, *rest)\n"
        f"sys.argv[1:] = {arguments!r}\n"
        f"runpy.run_module('seda_fast.{command}', run_name='__main__', alter_sys=True)\n"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        *((command, "matplotlib, scipy, sklearn, tomli_w", "eval") for command in ("train", "evaluate", "report")),
        ("extract", "PIL, matplotlib, scipy, sklearn, tomli_w", "extract"),
    ],
)
def test_a_missing_extra_is_one_sentence(command: str, missing: str, extra: str, tmp_path: Path) -> None:
    done = without(EXTRAS, command, ["--help"], tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"{missing} not installed; this command needs: pip install 'seda_fast[{extra}]'\n"
    one = without(["sklearn"], command, ["--help"], tmp_path)
    assert one.stderr == f"sklearn not installed; this command needs: pip install 'seda_fast[{extra}]'\n"


def test_what_needs_no_extra_runs_without(trained: Path, tmp_path: Path) -> None:
    """README: predict, info and the Python face."""
    data = str(trained / "data.npz")
    given = ["--model", str(trained / "run"), "--data", data, "--out", "p.csv", "--features", "aligned.npz"]
    for command, arguments in (("predict", given), ("info", []), ("export", ["--help"])):
        done = without(EXTRAS, command, arguments, tmp_path)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"p.csv", "aligned.npz"}


# ---------------------------------------------------------------------------------------- what a user must not lose


TINY = ["--epochs", "1", "--width", "16", "--blocks", "1", "--diffusion-steps", "50"]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``data.npz``, which has no test part, and a model of it in ``run``."""
    folder = tmp_path_factory.mktemp("split")
    make_set(folder / "data.npz", visual_test=None, text_test=None, label_test=None)
    options = ["--data", str(folder / "data.npz"), "--out", str(folder / "run"), "--no-baselines", "--seed", "7"]
    assert train.main([*options, *TINY]) == 0
    return folder


def test_rows_that_a_model_was_trained_on_are_not_taken_for_a_test_part(
    split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--model", str(split / "run"), "--data", str(split / "data.npz")]) == 0
    SeDA.from_pretrained(split / "run").save_pretrained(tmp_path / "copy")
    assert evaluate.main(["--model", str(tmp_path / "copy"), "--data", str(split / "data.npz")]) == 2
    assert "no config.toml that tells the rows it was trained on" in capsys.readouterr().err
    with np.load(split / "data.npz") as source:
        arrays = dict(source)
    turned = {name: value[::-1] if name.endswith("_train") else value for name, value in arrays.items()}
    longer = {n: np.concatenate((v, v[:3])) if n.endswith("_train") else v for n, v in arrays.items()}
    for changed in (turned, longer):
        np.savez(tmp_path / "changed.npz", **changed)
        assert evaluate.main(["--model", str(split / "run"), "--data", str(tmp_path / "changed.npz")]) == 2
        assert "its rows are not those of the model's training" in capsys.readouterr().err
    # A model whose test part was not cut from its training rows, and one of which nothing tells from what it was.
    make_set(tmp_path / "whole.npz")
    assert train.main(["--data", str(tmp_path / "whole.npz"), "--out", str(tmp_path / "run"), *TINY]) == 0
    capsys.readouterr()
    shutil.copytree(split / "run", tmp_path / "bare", ignore=shutil.ignore_patterns("metrics.json"))
    for model in ("run", "bare"):
        assert evaluate.main(["--model", str(tmp_path / model), "--data", str(split / "data.npz")]) == 2
        assert "its rows are not those of the model's training" in capsys.readouterr().err


def test_a_prediction_that_is_no_number_is_refused_with_its_row(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.ones((9, 8), np.float32)
    rows[7, 2] = 3e30
    np.save(tmp_path / "rows.npy", rows)
    given = ["--model", str(trained / "run"), "--data", str(tmp_path / "rows.npy"), "--out", str(tmp_path / "p.csv")]
    assert predict.main(given) == 2
    assert "row 7 has features so large that its prediction is not a number" in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()


def test_weights_that_are_no_numbers_are_not_loaded(trained: Path, tmp_path: Path) -> None:
    model = SeDA.from_pretrained(trained / "run")
    with torch.no_grad():
        model.learner.head.bias[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"model.safetensors: learner.head.bias holds NaN or infinity"):
        SeDA.from_pretrained(tmp_path)


def test_a_baseline_that_the_rows_cannot_train_is_left_out_and_the_run_is_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels and texts lie on different rows: the probe on texts has nothing to learn from."""
    labels = np.arange(90) % 3
    labels[:45] = -1
    text = np.random.default_rng(1).normal(size=(90, 5)).astype(np.float32)
    text[45:] = np.nan
    make_set(tmp_path / "data.npz", label_train=labels, text_train=text)
    given = ["--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "run"), "--unpaired", "keep", *TINY]
    assert train.main(given) == 0
    assert "the baseline one_step_mse cannot be trained on these rows and is left out" in capsys.readouterr().err
    assert set(metrics_of(tmp_path)["baselines"]) == {"linear", "mlp", "one_step"}


def test_to_overwrite_is_not_repeated_unasked_and_leaves_nothing_of_the_old_model(split: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = ["--data", str(split / "data.npz"), "--out", str(out), "--no-baselines", *TINY]
    assert train.main(given) == 0
    derived = [out / name for name in ("model.pt2", "model.onnx", "report.html", "estimator.json", "trace.json")]
    for path in derived:
        path.write_text("of the old model")
    (out / "notes.txt").write_text("the user's")
    assert train.main([*given, "--overwrite"]) == 0
    assert not any(path.exists() for path in derived)
    assert (out / "notes.txt").read_text() == "the user's"
    assert tomllib.loads((out / "config.toml").read_text())["run"]["overwrite"] is False


def test_to_overwrite_costs_no_folder_of_the_user_s(tmp_path: Path) -> None:
    """Of ``report/`` the pictures are a run's, and nothing else."""
    out = tmp_path / "run"
    options: dict[str, Any] = {"overwrite": False, "resume": False, "report": print}
    pictures = out / "report"
    pictures.mkdir(parents=True)
    (pictures / "notes.txt").write_text("the user's")
    (out / "model.onnx").mkdir()
    (out / "model.onnx" / "mine").write_text("the user's")
    with results.results_folder(out, **options) as (draft, _):  # these are no results of an earlier run
        (draft / "report").mkdir()
        for path in (draft / "config.toml", draft / "report" / "loss.png", draft / "report" / "confusion.png"):
            path.write_text("old")
    with (
        pytest.raises(DataError, match=r"earlier run \(config.toml, report\); give another --out or --overwrite"),
        results.results_folder(out, **options),
    ):
        raise AssertionError
    with results.results_folder(out, **{**options, "overwrite": True}) as (draft, _):
        (draft / "report").mkdir()
        for path in (draft / "config.toml", draft / "report" / "average_precision.png"):
            path.write_text("new")
    assert {path.name for path in pictures.iterdir()} == {"notes.txt", "average_precision.png"}
    assert (out / "model.onnx" / "mine").exists()
    (pictures / "notes.txt").unlink()
    with results.results_folder(out, **{**options, "overwrite": True}) as (draft, _):
        (draft / "config.toml").write_text("newer")
    assert {path.name for path in out.iterdir()} == {"config.toml", "model.onnx"}


@pytest.mark.parametrize("name, folder", [("metrics.json", True), ("report", False), ("report/loss.png", True)])
def test_what_is_in_the_way_of_results_is_told_before_the_run(name: str, folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    if folder:
        path.mkdir()
    else:
        path.write_text("mine")
    kind, other = ("folder", "file") if folder else ("file", "folder")
    with (
        pytest.raises(DataError, match=f"^the {kind} {path} is where a run writes a {other}; "),
        results.results_folder(tmp_path / "run", overwrite=True, resume=False, report=print),
    ):
        raise AssertionError
    assert path.exists()


def test_a_file_of_the_user_s_is_not_replaced_unasked(
    split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "history.csv").write_text("mine")
    given = ["--data", str(split / "data.npz"), "--out", str(tmp_path), "--no-baselines", *TINY]
    assert train.main(given) == 2
    assert "(history.csv); give another --out or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "history.csv").read_text() == "mine"


def test_what_has_the_name_of_an_export_is_the_user_s_where_no_run_was(split: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    given = ["--data", str(split / "data.npz"), "--out", str(tmp_path), "--no-baselines", *TINY]
    assert train.main(given) == 0
    assert (tmp_path / "report.html").read_text() == "mine"


def test_an_output_does_not_replace_what_is_read(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained / "run"
    for path in (run / "model.safetensors", trained / "data.npz"):
        before = path.read_bytes()
        given = ["--model", str(run), "--data", str(trained / "data.npz"), "--features", str(path)]
        assert predict.main(given) == 2
        assert f"--features {path} is what is read" in capsys.readouterr().err
        assert path.read_bytes() == before
    before, path = (run / "outputs.safetensors").read_bytes(), run / "outputs.safetensors"
    given = ["--model", str(run), "--data", str(trained / "data.npz"), "--features", str(path)]
    assert predict.main(given) == 2
    assert f"--features {path} is of the model's training; give another name" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_names_that_are_too_long_are_one_sentence(trained: Path, tmp_path: Path) -> None:
    given = ["--model", str(trained / "run"), "--data", str(trained / "data.npz"), "--out"]
    long = "l" * 300
    for arguments in ([*given, str(tmp_path / f"{long}.csv")], ["--model", str(tmp_path / long), *given[2:], "a.csv"]):
        done = run_module("seda_fast.predict", *arguments, cwd=tmp_path)
        assert done.returncode == 2
        (sentence,) = done.stderr.splitlines()
        assert "File name too long" in sentence
    (tmp_path / "a.csv").touch()
    for name in (f"{long}.npy", f"{long}.npz"):
        done = run_module("seda_fast.predict", *given[:2], "--data", name, "--out", "a.csv", cwd=tmp_path)
        assert done.returncode == 2
        (sentence,) = done.stderr.splitlines()
        assert "File name too long" in sentence
    # The longest name that there can be.
    longest = f"{'l' * 251}.csv"
    assert run_module("seda_fast.predict", *given, longest, cwd=tmp_path).returncode == 0
    assert (tmp_path / longest).stat().st_size > 100


def test_what_a_disk_cannot_do_beside_writing_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some know no rights of single files, some flush no folder."""

    def refuse(self: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    fsync = os.fsync

    def files_alone(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr(os, "fsync", files_alone)
    with atomic_path(tmp_path / "a.csv") as draft:
        draft.write_text("x")
    assert (tmp_path / "a.csv").read_text() == "x"
    with atomic_path(tmp_path / "a.csv") as draft:  # as writers do that make files for their owner alone
        os.chmod(draft, 0o600)
        draft.write_text("y")
    assert (tmp_path / "a.csv").read_text() == "y"
    monkeypatch.setattr(os, "fsync", refuse_all)
    with (
        pytest.raises(DataError, match=r"a\.csv cannot be written: Input/output error"),
        atomic_path(tmp_path / "a.csv") as draft,
    ):
        draft.write_text("z")
    assert (tmp_path / "a.csv").read_text() == "y"


def refuse_all(handle: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_command_that_is_stopped_says_so_in_a_sentence(
    number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C was a traceback in all commands but train, and SIGTERM left what it had half written."""

    def command() -> None:
        with atomic_path(tmp_path / "table.csv") as draft:
            draft.write_text("half of a")
            os.kill(os.getpid(), number)
            time.sleep(5)

    before = signal.getsignal(number)
    assert run_command(command, "seda_fast.predict") == 128 + number
    assert capfd.readouterr().err == f"seda_fast.predict: stopped by {number.name}\n"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("nobody", ["2> >(true)", "2> /dev/full"], ids=["the reader has gone", "the disk is full"])
def test_sentences_that_nobody_can_hear_cost_no_training(tmp_path: Path, nobody: str) -> None:
    """It ended with code 0 and without results, or with code 1 and without a word."""
    labels = np.arange(60) % 3
    texts = np.where(labels[:, None] < 2, labels[:, None] + np.zeros((60, 4)), np.nan).astype(np.float32)
    make_set(tmp_path / "data.npz", visual_train=np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32),
             text_train=texts, label_train=labels, visual_test=None, text_test=None, label_test=None)  # fmt: skip
    command = [sys.executable, "-m", "seda_fast.train", "--data", "data.npz", "--unpaired", "keep", "--no-baselines"]
    command += ["--out", "run", *TINY]
    heard = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "1 of 3 classes have labelled rows but none with a text" in heard.stderr
    shutil.rmtree(tmp_path / "run")
    script = f"{shlex.join(command)} {nobody}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert (tmp_path / "run" / "metrics.json").is_file()


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment, but RANK is not set; start several ranks with"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment, which is no number of ranks"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_ranks_that_are_told_of_by_half_are_one_sentence(
    command: str, environment: dict[str, str], sentence: str, trained: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    module = {"train": train, "evaluate": evaluate, "predict": predict}[command]
    given = ["--data", str(trained / "data.npz")]
    given += ["--out", str(trained / "new")] if command == "train" else ["--model", str(trained / "run")]
    assert module.main(given) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert sentence in said


def test_settings_that_change_nothing_are_told(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", str(trained / "data.npz"), "--out", str(tmp_path / "run"), "--no-baselines", *TINY]
    assert train.main([*given, "--log-every", "3", "--memory-heads", "2", "--checkpoint-every", "1e308"]) == 0
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "seda_fast.train: log_every is not used: it is of --tensorboard",
        "seda_fast.train: memory_heads is not used: only of data with one text a class have the networks a memory",
    ]
    shares = ["--data", "digits", "--test-fraction", "0.3", "--out", str(tmp_path / "digits"), "--no-baselines", *TINY]
    assert train.main(shares) == 0
    assert "test_fraction" not in capfd.readouterr().err
    assert len(load_file(tmp_path / "digits" / "outputs.safetensors")["labels"]) == 540
    assert evaluate.main(["--model", str(tmp_path / "digits"), "--data", "digits"]) == 0


def test_a_text_that_cannot_be_measured_is_refused_before_the_training(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(trained / "data.npz") as source:
        arrays = dict(source)
    arrays["text_train"] = (1e-3 * arrays["text_train"]).astype(np.float32)
    arrays["text_test"][7, 0] = 3e38
    np.savez(tmp_path / "far.npz", **arrays)
    given = ["--data", str(tmp_path / "far.npz")]
    assert train.main([*given, "--out", str(tmp_path / "run"), *TINY]) == 2
    far = "far.npz: row 7 of 'text_test' is so far from the texts of the training that it is infinite in their units"
    assert far in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["far.npz"]
    near = {**arrays, "text_test": np.delete(arrays["text_test"], 7, 0)}
    near |= {name: np.delete(arrays[name], 7, 0) for name in ("visual_test", "label_test")}
    np.savez(tmp_path / "near.npz", **near)
    given_near = ["--data", str(tmp_path / "near.npz"), "--out", str(tmp_path / "run"), "--no-baselines", *TINY]
    assert train.main(given_near) == 0
    assert evaluate.main(["--model", str(tmp_path / "run"), *given]) == 2
    assert far in capsys.readouterr().err


@pytest.mark.parametrize("value", [3e38, 3e16])
def test_features_that_cannot_be_predicted_are_refused_before_the_training(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    with np.load(trained / "data.npz") as source:
        arrays = dict(source)
    arrays["visual_train"] = (1e-3 * arrays["visual_train"]).astype(np.float32)
    arrays["visual_test"] = (1e-3 * arrays["visual_test"]).astype(np.float32)
    arrays["visual_test"][7, 0] = value
    np.savez(tmp_path / "far.npz", **arrays)
    assert train.main(["--data", str(tmp_path / "far.npz"), "--out", str(tmp_path / "run"), *TINY]) == 2
    said = "far.npz: row 7 of 'visual_test' has features so large that its prediction is not a number"
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["far.npz"]


def test_a_signal_leaves_no_files_of_two_runs(split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    given = ["--data", str(split / "data.npz"), "--out", str(out), "--no-baselines", *TINY]
    assert train.main([*given, "--seed", "1"]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    replace, moved = Path.replace, []

    def told(self: Path, target: Path) -> Path:
        if "draft" in self.parts and not self.name.startswith("."):
            moved.append(self.name)
            if len(moved) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", told)
    assert train.main([*given, "--seed", "2", "--overwrite"]) in (0, 143)
    assert len(moved) > 4
    changed = {"config.toml", "history.csv", "metrics.json", "model.safetensors", "outputs.safetensors"}
    assert all((out / name).read_bytes() != before[name] for name in changed)


def test_streams_that_are_closed_or_speak_little_cost_no_result(trained: Path, tmp_path: Path) -> None:
    module = f"{sys.executable} -m seda_fast.predict --model {trained / 'run'} --data data.npz"
    make_set(tmp_path / "data.npz", class_names=np.array(["ash", "b\u00e4r", "cedar"]))

    def shell(command: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
        return subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment)

    assert shell(f"{module} --out a.csv 2>&-").returncode == 0
    assert (tmp_path / "a.csv").stat().st_size > 100
    closed = shell(f"{module} >&-")
    assert closed.returncode == 2
    assert closed.stderr.splitlines() == ["seda_fast.predict: standard output is closed; give --out"]
    model = SeDA.from_pretrained(trained / "run")
    model.class_names = ("ash", "b\u00e4r", "cedar")
    model.save_pretrained(tmp_path / "model")
    shown = shell(module.replace(str(trained / "run"), "model"), PYTHONIOENCODING="ascii")
    assert shown.returncode == 0
    assert "b\\xe4r" in shown.stdout


def test_shortened_options_are_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main(["--epoch", "1"])
    assert "unrecognized arguments: --epoch" in capsys.readouterr().err


def test_an_empty_name_is_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--data", "digits", "--out", ""]) == 2
    assert "out" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a disk that is full")
def test_a_table_that_cannot_be_printed_is_one_sentence(trained: Path) -> None:
    command = [sys.executable, "-m", "seda_fast.predict", "--model", str(trained / "run")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, "--data", str(trained / "data.npz")], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "seda_fast.predict: the output cannot be written: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a disk that is full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_the_list_of_commands_takes_a_full_disk_and_a_reader_that_left(unbuffered: str) -> None:
    command, environment = [sys.executable, "-m", "seda_fast"], {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stderr == "seda_fast: the output cannot be written: No space left on device\n"
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    os.close(written)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_without_a_terminal_says_how_far_it_is(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "_SECONDS_BETWEEN_LINES", 0.0)
    given = ["--data", str(split / "data.npz"), "--out", str(tmp_path / "run"), "--no-baselines", *TINY]
    assert train.main([*given, "--epochs", "2"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if ": step " in line]
    assert lines[0].startswith("seda_fast.train: step 1 of ")
    assert re.search(r": step \d+ of \d+, loss \d+\.\d+ in epoch 1$", lines[-1])
