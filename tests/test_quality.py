"""The quality harness: its regimes, its folds, its statistics, and that a stopped command goes on."""

import gzip
import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from benchmarks.quality import __main__ as command
from benchmarks.quality import methods, page, selection, summary, workers
from benchmarks.quality.regimes import REGIMES, SETS, DataSet, Rows, Task, apply, fold, load
from benchmarks.quality.runs import VISUAL_WEIGHTS, Job, Record, Runs, measure, weight_name
from seda_fast import SeDA, SeDAConfig
from seda_fast.baselines import fit_baseline
from seda_fast.data import FeatureSet

K, DV, DT = 3, 6, 4
ALIGNMENT = ("frechet", "frechet_floor", "mmd", "cosine", "recall_at_1", "recall_at_5", "recall_at_10")


def made_rows(rng: np.random.Generator, rows: int) -> Rows:
    labels = np.arange(rows) % K
    means = np.random.default_rng(0)
    visual, text = (3 * means.standard_normal((K, d))[labels] + rng.standard_normal((rows, d)) for d in (DV, DT))
    return Rows(visual.astype(np.float32), text.astype(np.float32), labels)


@pytest.fixture
def task(rng: np.random.Generator) -> Task:
    return Task(made_rows(rng, 90), made_rows(rng, 30), K)


@pytest.fixture
def folder(rng: np.random.Generator, tmp_path: Path) -> Path:
    """A folder that holds one of the sets."""
    train, test = made_rows(rng, 60), made_rows(rng, 30)
    np.savez(
        tmp_path / f"{SETS['cub10']}.npz",
        visual_train=train.visual, text_train=train.text, label_train=train.labels,
        visual_test=test.visual, text_test=test.text, label_test=test.labels, class_names=np.array(["a", "b", "c"]),
    )  # fmt: skip
    return tmp_path


def test_regimes_change_what_they_name_and_nothing_else(task: Task) -> None:
    whole = task.train
    for regime in REGIMES:
        made = apply(regime, task, seed=1)
        assert np.array_equal(made.test.labels, task.test.labels)
        if regime != "noise":
            assert made.test is task.test
        assert np.array_equal(np.nan_to_num(made.train.text), np.nan_to_num(apply(regime, task, seed=1).train.text)), (
            regime
        )
    assert apply("full", task, 0) is task
    few = apply("labels-4", task, 1).train
    assert np.bincount(few.labels[few.labels >= 0]).tolist() == [4] * K
    assert np.array_equal(few.visual, whole.visual)
    assert np.array_equal(few.labels[few.labels >= 0], whole.labels[few.labels >= 0])
    assert np.bincount(apply("samples-8", task, 1).train.labels).tolist() == [8] * K
    half = apply("half-text", task, 1).train
    assert np.isnan(half.text).all(1).sum() == 45
    wrong = apply("wrong-labels", task, 1).train
    assert wrong.visual is whole.visual and wrong.text is whole.text
    moved = (wrong.labels - whole.labels) % K
    assert (moved == 0).sum() == 63 and np.bincount(moved)[1:].min() >= 8
    noisy = apply("noise", task, 1)
    for part, clean in ((noisy.train, whole), (noisy.test, task.test)):
        assert np.std((part.visual - clean.visual) / whole.visual.std(0)) == pytest.approx(0.5, abs=0.1)
    assert np.sort(np.bincount(apply("tail", task, 1).train.labels)).tolist() == [1, 4, 30]
    assert not np.array_equal(apply("labels-4", task, 2).train.labels, few.labels)


def test_a_tail_is_as_long_as_it_is_called(task: Task) -> None:
    """Also where the classes differ in size: none is asked for more rows than it has."""
    labels = np.repeat([0, 1, 2, 3], [40, 400, 60, 200])
    rows = Rows(np.zeros((700, DV), np.float32), np.zeros((700, DT), np.float32), labels)
    for seed in range(3):
        made = apply("tail", Task(rows, task.test, 4), seed).train
        assert np.bincount(made.labels).tolist() == [8, 400, 29, 109]


def test_folds_keep_groups_together_and_classes_everywhere(task: Task, rng: np.random.Generator) -> None:
    groups = np.arange(90) // 6
    data = DataSet("x", task, groups)
    held = []
    for index in range(3):
        part = fold(data, index, 3, seed=0)
        assert len(part.train.labels) + len(part.test.labels) == 90
        assert set(part.train.labels) == set(range(K))
        inside = [np.flatnonzero((task.train.visual == row).all(1))[0] for row in part.test.visual]
        by_class = {(g, y) for g, y in zip(groups[inside], task.train.labels[inside], strict=True)}
        outside = np.setdiff1d(np.arange(90), inside)
        assert not by_class & set(zip(groups[outside], task.train.labels[outside], strict=True))
        held += inside
    assert sorted(held) == list(range(90))


@pytest.mark.parametrize("method", [m for m in methods.METHODS if m != "bridge"])
def test_every_method_learns_easy_data(task: Task, method: str) -> None:
    small = {"epochs": 40, "width": 32} if method.startswith("seda") else {}
    settings = {**small, "batch_size": 16, "learning_rate": 3e-3} if small else {"epochs": 150, "lr": 1e-2}
    settings = {} if method == "linear" else settings
    fitted = methods.fit(method, apply("labels-8", task, 0), seed=0, settings=settings)
    assert fitted.log_proba.shape == (30, K)
    assert np.mean(fitted.log_proba.argmax(1) == task.test.labels) > 0.75
    np.testing.assert_allclose(np.exp(fitted.log_proba.astype(np.float64)).sum(1), 1, rtol=1e-4)


def test_the_bridge_samples_texts(task: Task) -> None:
    fitted = methods.fit("bridge", task, seed=0, settings={"width": 32, "blocks": 1})
    assert fitted.aligned is not None
    assert fitted.point is not None
    assert fitted.aligned.shape == fitted.point.shape == (30, DT)
    assert not np.array_equal(fitted.aligned, fitted.point)
    assert np.mean(fitted.log_proba.argmax(1) == task.test.labels) > 0.6


def test_the_bridge_draws_and_classifies_by_its_settings_from_one_training(task: Task) -> None:
    methods._bridge_networks.cache_clear()
    small = {"width": 32, "blocks": 1, "epochs": 2}
    others: list[dict[str, float]] = [{}, {"start": 0.1}, {"steps": 2}, {"probe_c": 0.01}]
    found = [methods.fit("bridge", task, 0, {**small, **other}).log_proba for other in others]
    methods.fit("bridge", apply("labels-8", task, 0), 0, small)
    assert methods._bridge_networks.cache_info().misses == 1
    assert all(not np.array_equal(found[0], other) for other in found[1:])
    methods.fit("bridge", apply("half-text", task, 0), 0, small)
    methods.fit("bridge", task, 1, small)
    methods.fit("bridge", task, 0, {**small, "epochs": 3})
    assert methods._bridge_networks.cache_info().misses == 4


@pytest.mark.parametrize("regime", ["full", "labels-8", "half-text"])
def test_a_mapping_that_regimes_share_is_that_of_the_library(task: Task, regime: str) -> None:
    """Bit for bit, with each of the probe's settings."""
    made = methods.standardised(apply(regime, task, 0), 0)
    rows = made.train
    for other in ({}, {"l2_grid": [0.01]}, {"epochs": 3}):
        expected = fit_baseline("one_step_mse", rows.visual, rows.text, rows.labels, n_classes=K, seed=0, **other)  # type: ignore[arg-type]
        found = methods.fit("one_step_mse", apply(regime, task, 0), 0, other)
        np.testing.assert_array_equal(found.log_proba, expected.log_proba(made.test.visual))
        np.testing.assert_array_equal(found.aligned, expected.aligned(made.test.visual))


@pytest.mark.parametrize("regime", ["full", "labels-8", "half-text"])
def test_baselines_are_given_what_the_model_makes_of_the_rows(rng: np.random.Generator, regime: str) -> None:
    """With sorted components, most of them noise, which both divide by less than their deviation."""
    labels, of = np.arange(150) % K, np.random.default_rng(0)
    fall = np.array([8.0, 6.0, 4.0, *0.5 ** np.arange(37)])
    parts = []
    for _ in range(2):
        visual, text = (rng.standard_normal((150, 40)) * fall for _ in range(2))
        for values in (visual, text):
            values[:, :3] += 12 * of.permutation(np.eye(3))[labels]
            values[:, -1] = 7 + len(parts) * rng.standard_normal(150)  # never changes in training
        parts.append(Rows(visual.astype(np.float32), text.astype(np.float32), labels))
    changed = apply(regime, Task(*parts, K), 1)
    found = methods.standardised(changed, 1)
    model, _ = methods.prepare(
        methods._feature_set(changed), SeDAConfig(visual_dim=40, text_dim=40, n_classes=K), 1, torch.device("cpu")
    )
    assert min(model.scaling) < 1
    visual, text = torch.from_numpy(changed.test.visual), torch.from_numpy(changed.test.text)
    np.testing.assert_allclose(found.test.visual, model.standardise_visual(visual), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.test.text, model.standardise_text(text), rtol=1e-6, atol=1e-6)


def pseudo_labels(given: Task, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The labels that `mlp_pseudo` trains its MLP with."""
    seen: list[np.ndarray] = []

    def baseline(name: str, task: Task, *rest: object) -> None:
        assert name == "mlp"
        seen.append(task.train.labels)

    monkeypatch.setattr(methods, "_baseline", baseline)
    methods.fit("mlp_pseudo", given, 0, {})
    return seen[0]


def test_pseudo_labels_are_what_the_texts_say(
    task: Task, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = apply("labels-4", task, 0)
    alone = (given.train.labels < 0) & (np.arange(90) < 9)
    given = replace(given, train=replace(given.train, text=np.where(alone[:, None], np.nan, given.train.text)))
    told, unknown = pseudo_labels(given, monkeypatch), (given.train.labels < 0) & ~alone
    assert alone.any() and (told[alone] == -1).all()
    assert unknown.sum() > 60 and (told[unknown] >= 0).all()
    assert np.mean(told[unknown] == task.train.labels[unknown]) > 0.9
    known = given.train.labels >= 0
    assert np.array_equal(told[known], task.train.labels[known])
    other = rng.permutation(90)
    visual = replace(given, train=replace(given.train, visual=given.train.visual[other]))
    assert np.array_equal(pseudo_labels(visual, monkeypatch), told)
    text = replace(given, train=replace(given.train, text=given.train.text[other]))
    assert not np.array_equal(pseudo_labels(text, monkeypatch), told)


def test_what_shares_a_training_is_made_together() -> None:
    def job(method: str, regime: str, **settings: object) -> Job:
        return Job("cub10", regime, method, "test", 0, settings)

    given = [
        *(job("one_step_mse", "full"), job("mlp", "full"), job("one_step_mse", "labels-4")),
        *(job("one_step_mse", "full", epochs=3), job("bridge", "full"), job("mlp", "labels-4")),
        *(job("one_step_mse", "noise"), job("one_step_mse", "full", l2_grid=[0.1])),
        *(job("bridge", "labels-4", steps=2), job("bridge", "full", blocks=1)),
    ]
    order = [[given.index(j) for j in part] for part in workers.together(given)]
    assert order == [[0, 2, 7], [1], [3], [4, 8], [5], [6], [9]]


def test_ablations_are_other_models(task: Task) -> None:
    small = {"epochs": 3, "width": 16, "batch_size": 16}
    found = {m: methods.fit(m, task, 0, small).log_proba for m in (methods.SEDA, *methods.ABLATIONS)}
    for name, log_proba in found.items():
        for other, theirs in found.items():
            assert name == other or not np.array_equal(log_proba, theirs), (name, other)


@pytest.mark.parametrize("regime", ["full", "labels-8"])
def test_the_semantic_stage_alone_looks_at_no_text(task: Task, rng: np.random.Generator, regime: str) -> None:
    small, given = {"epochs": 3, "width": 16, "batch_size": 16}, apply(regime, task, 0)
    mixed = replace(given, train=replace(given.train, text=given.train.text[rng.permutation(90)]))
    one, two = (methods.fit(methods.DCSL_ONLY, t, 0, small).log_proba for t in (given, mixed))
    np.testing.assert_array_equal(one, two)


def test_ablations_lack_what_they_are_named_after(task: Task) -> None:
    def trained(ablation: str, regime: str) -> SeDA:
        small = {"epochs": 3, "width": 16, "batch_size": 16}
        return methods.train_ablated(apply(regime, task, 0), 0, small, ablation, "fp32")[0]

    whole, without = trained("", "labels-8"), trained("no_interaction", "labels-8")
    for model, is_there in ((whole, True), (without, False)):
        for stage in (model.learner, model.translator):
            gates = stage.network.gates
            assert bool(gates.weight.any()) is is_there and bool(gates.bias.any()) is is_there
    assert whole.teacher is not None and whole.config.condition == "both"
    without = trained("no_teacher", "labels-8")
    assert without.teacher is None and without.opinion is None
    assert trained("no_semantic_space", "full").config.condition == "visual"


def test_labels_that_err_have_no_opinion_of_texts_without_the_teacher(task: Task) -> None:
    small = {"epochs": 3, "width": 16, "batch_size": 16}
    given = apply("wrong-labels", replace(task, train=made_rows(np.random.default_rng(3), 300)), 0)
    found = {a: methods.train_ablated(given, 0, small, a, "fp32")[0].opinion for a in ("", "no_teacher", "dcsl_only")}
    assert [opinion is None for opinion in found.values()] == [False, True, True]


def test_no_method_sees_the_test_text_or_labels(task: Task) -> None:
    blind = Task(task.train, Rows(task.test.visual, np.full_like(task.test.text, np.nan), -task.test.labels), K)
    for method in ("seda", "one_step", "bridge"):
        small = {"epochs": 2, "width": 16}
        one, two = (methods.fit(method, t, 0, small).log_proba for t in (task, blind))
        np.testing.assert_array_equal(one, two)


def test_bootstrap_is_paired() -> None:
    job = Job("cub10", "full", "seda", "test", 0)
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.5
    better = base.copy()
    better[np.flatnonzero(~base)[:20]] = True

    def record(right: np.ndarray) -> Record:
        return Record(job, {"top1": 0.0}, None, None, right, 0.0)

    mean, low, high = summary.bootstrap([record(better)], [record(base)])
    assert mean == pytest.approx(5)
    assert 2 < low < 5 < high < 8  # unpaired it would be about +- 7
    mean, low, high = summary.bootstrap([record(base)], [record(base)])
    assert (mean, low, high) == (0, 0, 0)


def test_seda_with_other_weights_of_its_heads_is_recorded(task: Task) -> None:
    job = Job("cub10", "full", "seda", "test", 0, {"epochs": 3, "width": 16})
    found = measure(job, task).metrics
    assert found[weight_name(0.5, "kernel")] == found["top1"]  # its default
    without = measure(replace(job, settings={**job.settings, "kernel_weight": 0.0}), task).metrics
    assert without["top1"] == found[weight_name(0.0, "kernel")] == found[weight_name(0.5)]
    assert not any("kernel" in name for name in without)
    visual = {"visual_weight": 1.0, "textual_weight": 0.0, "kernel_weight": 0.0}
    heavy = measure(replace(job, settings={**job.settings, **visual}), task).metrics
    assert heavy["top1"] == found[weight_name(1.0)]


def test_length_multiplies_the_passes_of_the_rule() -> None:
    rule = methods._train_config(90, {}, 0).for_rows(90)
    longer = methods._train_config(90, {"length": 1.5}, 0).for_rows(90)
    assert (longer.epochs, longer.batch_size) == (round(1.5 * rule.epochs), rule.batch_size)


def test_a_precision_makes_another_record_and_float32_keeps_its_name(task: Task) -> None:
    job = Job("cub10", "full", "seda", "test", 0, {"epochs": 2, "width": 16})
    half = replace(job, precision="bf16")
    assert job.key == "a9510ffdbaa60362"  # as recorded before there were precisions
    records = [measure(j, task) for j in (job, half)]
    assert Record.read(records[1].line()).job == half
    assert records[0].job.key != records[1].job.key
    assert records[0].alignment != records[1].alignment


def test_workers_make_what_one_process_makes(folder: Path) -> None:
    wanted = [Job("cub10", "full", m, p, 0, s) for m, s in (("linear", {}), ("mlp", {"epochs": 2}))
              for p in ("test", "cv 1/3")]  # fmt: skip
    one, two = Runs(folder / "one.jsonl"), Runs(folder / "two.jsonl")
    workers.make(one, wanted, folder, 1, "one")
    two.get(wanted[0], selection.task_of(wanted[0], load("cub10", folder)))
    workers.make(two, wanted, folder, 2, "two")
    assert set(two.records) == set(one.records) == set(Runs(folder / "two.jsonl").records) == {j.key for j in wanted}
    for key, record in one.records.items():
        assert np.mean(record.right == two.records[key].right) > 0.9
    with pytest.raises(ValueError, match="no baseline"):
        workers.make(two, [Job("cub10", "full", "nothing", "test", 0), *wanted], folder, 2, "bad")


def test_records_survive_a_kill(folder: Path, task: Task) -> None:
    file = folder / "runs.jsonl"
    job = Job("cub10", "full", "linear", "test", 0)
    record = Runs(file).get(job, task)
    assert record.metrics["top1"] == pytest.approx(100 * record.right.mean(), abs=1e-3)
    with file.open("a") as stream:
        stream.write(record.line()[:40])  # a kill while a line was written
    again = Runs(file)
    assert np.array_equal(again.get(job, task).right, record.right)
    assert len(again.records) == 1
    other = Job("cub10", "full", "linear", "test", 1)
    again.get(other, task)
    assert {job.key, other.key} == set(Runs(file).records)


def test_selection_tries_equally_many_settings_and_reads_no_test_part(folder: Path) -> None:
    data = load("cub10", folder)
    counts = {m: len(selection.candidates(m, 7)) for m in selection.SPACES}
    assert set(counts.values()) == {7}
    assert selection.candidates("mlp", 7)[0] == {}
    poisoned = DataSet("cub10", Task(data.task.train, Rows(*(np.full((1, 1), np.nan),) * 3), K), data.groups)  # type: ignore[arg-type]
    runs, made = Runs(folder / "runs.jsonl"), []

    def ready(wanted: Sequence[Job]) -> Runs:
        for job in wanted:
            score = int(job.key, 16) % 997 / 10  # in the place of a training: any number that the job fixes
            task = selection.task_of(job, poisoned)
            right = np.zeros(len(task.test.labels), dtype=bool)
            weights = {weight_name(w): score + w for w in VISUAL_WEIGHTS}
            seconds = {"seda": 9.0, "one_step": 5.0}.get(job.method, 1.0)
            runs.records[job.key] = Record(job, {"top1": score, **weights}, None, None, right, seconds)
            made.append(job)
        return runs

    found = selection.select(["cub10"], 7, 2, 2, ready, "bf16")
    assert {name: f["tried"] for name, f in found.items()} == {
        "seda": 7, "linear on cub10": 1, "mlp on cub10": 7, "one_step on cub10": 7, "one_step_mse on cub10": 7,
        "bridge on cub10": 7,
    }  # fmt: skip
    # Last of all, with few labels alone, the chosen setting with the passes that SeDA's time allows there.
    few = [j for j in made if j.method == "mlp"][-4:]
    assert {(j.regime, json.dumps(dict(j.settings), sort_keys=True)) for j in few} == {
        ("labels-8", json.dumps(dict(few[0].settings), sort_keys=True))
    }
    mlp = [j for j in made if j.method == "mlp"][:-4]
    longer = mlp[-1].settings
    first = [j for j in mlp if j.part == "cv 0/2" and j.settings != longer]
    assert len({json.dumps(dict(j.settings), sort_keys=True) for j in first}) == 7
    last = [j for j in mlp if j.part == "cv 3/2"]
    totals: dict[str, list[float]] = {}
    for k in range(4):
        for j in last:
            same = Job(j.set, j.regime, "mlp", f"cv {k}/2", k, j.settings)
            name = json.dumps(dict(j.settings), sort_keys=True)
            totals.setdefault(name, []).append(runs.records[same.key].metrics["top1"])
    assert 3 <= len(totals) <= 4  # the best two, the defaults, and the best with the passes that SeDA's time allows
    assert "{}" in totals
    shorter = {n: np.mean(scores) for n, scores in totals.items() if json.loads(n) != longer}
    chosen = json.loads(max(shorter, key=lambda n: shorter[n]))
    assert longer == {**chosen, "epochs": 8 * chosen.get("epochs", 40)}
    offered = np.mean(totals[json.dumps(longer, sort_keys=True)])
    assert found["mlp on cub10"]["longer"] == {
        "factor": 8, "top1": pytest.approx(offered), "seconds": 1.0,
        "shorter_top1": pytest.approx(max(shorter.values())),
    }  # fmt: skip
    tuned = found["mlp on cub10"]["settings"]
    assert few[0].settings == {**tuned, "epochs": 8 * tuned.get("epochs", 40)}

    def with_few(settings: Any) -> float:
        same = [Job("cub10", "labels-8", "mlp", f"cv {k}/2", k, settings) for k in range(4)]
        return float(np.mean([runs.records[j.key].metrics["top1"] for j in same]))

    more, fewer = with_few(few[0].settings), with_few(tuned)
    assert found["mlp on cub10"]["few_labels"] == {
        "factor": 8, "top1": pytest.approx(more), "seconds": 1.0, "shorter_top1": pytest.approx(fewer),
        "settings": few[0].settings if more > fewer else tuned,
    }  # fmt: skip
    assert "few_labels" not in found["one_step on cub10"]
    assert found["seda"]["seconds"] == {"cub10": 9.0}
    assert not {"longer"} & {*found["one_step on cub10"], *found["linear on cub10"], *found["seda"]}
    best = max(totals, key=lambda n: np.mean(totals[n]))
    assert json.loads(best) == found["mlp on cub10"]["settings"]
    assert found["mlp on cub10"]["default_top1"] == pytest.approx(np.mean(totals["{}"]))
    seda = [j for j in made if j.method == "seda" and not j.settings]
    ours = {j.part: runs.records[j.key].metrics["top1"] for j in seda}
    weights = found["seda"]["visual_weights"]
    assert set(weights) == {"cub10 full", "cub10 labels-8"}
    assert np.mean([by["0.7"] - 0.7 for by in weights.values()]) == pytest.approx(found["seda"]["default_top1"])
    assert len(ours) == 4
    assert found["linear on cub10"]["standard_error"] == 0
    assert {j.precision for j in made if j.method != "seda"} == {"fp32"}
    assert {j.precision for j in made if j.method == "seda" and j.settings} == {"bf16"}
    # Settings of the methods named, SeDA's for its time, and the MLP's for the MLP that learns from given labels.
    made.clear()
    some = selection.select(["cub10"], 2, 2, 1, ready, methods=["linear", "mlp_pseudo"])
    assert {j.method for j in made} == {"seda", "linear", "mlp"}
    assert set(some) == {"seda", "linear on cub10", "mlp on cub10"}
    in_float32 = [runs.records[j.key].metrics["top1"] for j in seda if j.precision == "fp32"]
    same = [runs.records[replace(j, precision="bf16").key].metrics["top1"] for j in seda if j.precision == "fp32"]
    gaps = np.subtract(in_float32, same)
    assert found["seda"]["float32"] == {
        "gain": pytest.approx(gaps.mean()), "standard_error": pytest.approx(gaps.std(ddof=1) / 2), "trainings": 4
    }  # fmt: skip


def test_repeated_folds_are_different_partitions(folder: Path) -> None:
    data = load("cub10", folder)
    parts = [selection.task_of(Job("cub10", "full", "mlp", f"cv {k}/2", k), data).test.visual for k in range(4)]
    assert not np.array_equal(parts[0], parts[2])
    assert len(parts[0]) + len(parts[1]) == len(parts[2]) + len(parts[3]) == len(data.task.train.labels)


def test_more_passes_with_few_labels_are_of_those_regimes_alone() -> None:
    selected = {"mlp on cub10": {"settings": {"epochs": 3}, "few_labels": {"settings": {"epochs": 24}}}}
    regimes = ("full", "samples-8", "labels-4", "labels-16")
    found = [selection.settings_of(selected, "mlp", "cub10", regime)["epochs"] for regime in regimes]
    assert found == [3, 3, 24, 24]
    # It learns from all rows, with the text classifier's labels.
    assert selection.settings_of(selected, "mlp_pseudo", "cub10", "labels-4") == {"epochs": 3}
    assert selection.settings_of(selected, "linear", "cub10", "labels-4") == {}


def test_selected_settings_are_used_by_baselines_and_not_by_seda(folder: Path) -> None:
    selected = {"mlp on cub10": {"settings": {"epochs": 3}}, "seda": {"settings": {"epochs": 3}}}
    chosen = command.arguments(["--sets", "cub10", "--regimes", "full", "labels-4", "--seeds", "1"])
    settings = {job.method: dict(job.settings) for job in command.jobs(chosen, selected)}
    assert settings["mlp"] == settings["mlp_pseudo"] == {"epochs": 3}
    assert settings["seda"] == settings["linear"] == {}
    record = Record(Job("cub10", "full", "seda", "test", 0), {"top1": 50.0}, None, None, np.ones(4, bool), 1.0)
    mlps = [replace(record, job=Job("cub10", "full", "mlp", "test", 0, s)) for s in ({}, {"epochs": 3})]
    row = summary.summarise([record, replace(mlps[0], metrics={"top1": 90.0}), mlps[1]], selected)[0]
    assert row["methods"]["mlp"]["top1"] == 50


def test_folds_that_nothing_was_chosen_on_are_measured_and_shown(folder: Path) -> None:
    chosen = command.arguments(["--sets", "cub10", "--regimes", "full", "--cross-validate", "4", "--folds", "2"])
    wanted = command.jobs(chosen, {"mlp on cub10": {"settings": {"epochs": 3}}})
    assert {(job.part, job.seed) for job in wanted} == {(f"fresh {k}/2", k) for k in range(4)}
    data = load("cub10", folder)
    # Folds of one partition are each other's rest, and neither partition is one that settings were chosen on.
    held = [
        {row.tobytes() for row in selection.task_of(job, data).test.visual} for job in wanted if job.method == "mlp"
    ]
    assert not held[0] & held[1] and held[0] | held[1] == held[2] | held[3] and held[0] not in held[2:]
    choice = [fold(data, k, 2, seed=s).test.visual for s in range(6) for k in range(2)]
    assert not any({row.tobytes() for row in rows} in held for rows in choice)

    def record(method: str, part: str, top1: float, settings: Any = None) -> Record:
        job = Job("cub10", "full", method, part, 0, settings or {})
        return Record(job, {"top1": top1}, None, None, np.ones(4, bool), 60.0)

    records = [record("seda", f"fresh {k}/2", top1) for k, top1 in enumerate((80.0, 84.0, 90.0))]
    records += [record("mlp", f"fresh {k}/2", top1) for k, top1 in enumerate((79.0, 81.0))]
    records += [record("linear", f"fresh {k}/2", top1) for k, top1 in enumerate((70.0, 81.0, 99.0))]
    records += [record("mlp", "fresh 2/2", 99.0, {"epochs": 3}), record("mlp", "cv 2/2", 99.0)]
    (found,) = summary.cross_validated(records, {})
    assert found == {
        "set": "cub10", "regime": "full", "folds": 2, "of": 2, "top1": {"seda": 82.0, "mlp": 80.0, "linear": 75.5},
        "best_baseline": "mlp", "difference": 2.0, "standard_error": pytest.approx(1.0),
    }  # fmt: skip
    assert summary.cost_of_selection(records) == (1, 1.0)
    assert summary.summarise(records, {}) == []
    text = page.markdown([], {}, "make it", (0, 0.0), [found])
    assert "(`make it --cross-validate 2 --folds 2 --regimes full`)" in text
    assert "| cub10 full | 82.0 | 75.5 | 80.0 | - | - | - | - | +2.0 ± 1.0 | 2 |" in text
    # Folds of another size train on another share of the rows, and are no part of the same mean.
    thirds = [record(m, f"fresh {k}/3", 50.0 + k) for m in ("seda", "linear") for k in range(3)]
    both = summary.cross_validated([*records, *thirds], {})
    assert [(row["of"], row["folds"], row["top1"]["seda"]) for row in both] == [(2, 2, 82.0), (3, 3, 51.0)]
    text = page.markdown([], {}, "make it", (0, 0.0), both)
    assert "--cross-validate 2 --folds 2 --regimes full`, `make it --cross-validate 3 --regimes full`" in text
    assert "| 2, of 1/2 each |" in text


def test_command_writes_tables_and_pictures_and_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    paths = ["--runs", str(out / "runs.jsonl"), "--out", str(out / "quality.json"), "--docs", str(out / "docs")]
    paths += ["--selected", str(out / "selected.json")]
    chosen = ["--data", str(folder), "--sets", "cub10", "--regimes", "full", "--seeds", "2", *paths]
    assert command.main([*chosen, "--methods", "seda", "linear"]) == 0
    lines = (out / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert command.main([*chosen, "--methods", "seda", "linear", "mlp"]) == 0
    assert (out / "runs.jsonl").read_text().splitlines()[:4] == lines
    rows = json.loads((out / "quality.json").read_text())["rows"]
    assert rows[0]["methods"]["seda"]["seeds"] == 2
    assert {"difference", "interval", "best_baseline"} <= set(rows[0])
    text = (out / "docs" / "quality.md").read_text()
    assert "| full |" in text
    assert (out / "docs" / "quality" / "full.png").stat().st_size > 1000
    assert command.main(["--data", str(folder / "none"), *paths]) == 2
    assert "give --data" in capsys.readouterr().err


def test_records_are_not_continued_with_another_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor folds with other titles, by which rows are kept together."""
    out, titles = folder / "out", folder / f"{SETS['cub10']}.texts.json.gz"
    paths = ["--runs", str(out / "runs.jsonl"), "--out", str(out / "quality.json"), "--docs", str(out)]
    chosen = ["--data", str(folder), "--sets", "cub10", "--regimes", "full", "--methods", "linear", *paths]
    with gzip.open(titles, "wt") as stream:
        json.dump({"train": [str(i) for i in range(60)]}, stream)
    assert command.main([*chosen, "--seeds", "1", "--cross-validate", "2"]) == 0
    titles.unlink()
    assert command.main([*chosen, "--seeds", "1"]) == 0  # of a test part no title is asked
    before = (out / "runs.jsonl").read_bytes()
    capsys.readouterr()
    assert command.main([*chosen, "--cross-validate", "4"]) == 2
    assert f"another {titles.name}" in capsys.readouterr().err
    file = folder / f"{SETS['cub10']}.npz"
    with np.load(file) as source:
        arrays = {**source}
    np.savez(file, **{**arrays, "visual_train": arrays["visual_train"] + 1})
    assert command.main([*chosen, "--seeds", "2"]) == 2
    said = capsys.readouterr().err
    assert f"has records of another {file.name}" in said and said.count("\n") == 1
    assert (out / "runs.jsonl").read_bytes() == before
    np.savez(file, a=np.ones(1))
    assert command.main([*chosen, "--seeds", "1"]) == 2
    said = capsys.readouterr().err
    assert str(file) in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--folds", "1"], "--folds must be at least 2, not 1"),
        (["--cross-validate", "2", "--folds", "0"], "--folds must be at least 2, not 0"),
        (["--select", "3", "--repeats", "0"], "--repeats must be at least 1, not 0"),
        (["--seeds", "0"], "--seeds must be at least 1, not 0"),
        (["--cross-validate", "-1"], "--cross-validate must be at least 0, not -1"),
        (["--workers", "0"], "--workers must be at least 1, not 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_counts_that_measure_nothing_are_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        command.arguments(options)
    assert left.value.code == 2 and said in capsys.readouterr().err


def test_what_is_given_beside_quick_counts(folder: Path) -> None:
    given = ["--quick", "--sets", "cub10", "--methods", "mlp", "--seeds", "3"]
    found = command.arguments(given)
    assert (found.sets, found.methods, found.seeds) == (["cub10"], ["mlp"], 3)
    assert found.regimes == command.QUICK["regimes"]
    assert found.selected == command.ROOT / command.PUBLISHED["selected"]
    # Settings that are chosen quickly do not take the place of the published ones.
    assert command.arguments([*given, "--select", "2"]).selected == command.ROOT / "runs/quality_quick/selected.json"


def test_a_choice_for_one_set_keeps_what_others_took(folder: Path) -> None:
    def choice(name: str, seconds: float) -> dict[str, dict[str, Any]]:
        of_seda = {"seconds": {name: seconds}, "visual_weights": {f"{name} full": {"1": seconds}}, "sets": [name]}
        shown = {"settings": {}, "tried": 2, "default_top1": 1.0, "top1": 1.0, "standard_error": 0.0}
        of_seda |= {"precision": "fp32", "float32": {"gain": 0.0, "standard_error": 0.0, "trainings": 3}}
        return {"seda": {**shown, **of_seda}, f"mlp on {name}": shown}

    found = selection.merged(selection.merged({}, choice("a", 1.0)), choice("b", 2.0))
    assert set(found) == {"seda", "mlp on a", "mlp on b"}
    assert found["seda"]["seconds"] == {"a": 1.0, "b": 2.0}
    assert set(found["seda"]["visual_weights"]) == {"a full", "b full"}
    assert "| seda, on b | 2 |" in page.markdown([], found, "make it", (0, 0.0))


def own_set(folder: Path, rng: np.random.Generator, **others: object) -> None:
    """A set as users have it, ``folder``/mine.npz, without a test part."""
    rows = made_rows(rng, 120)
    arrays = {"visual_train": rows.visual, "text_train": rows.text, "label_train": rows.labels}
    np.savez(folder / "mine.npz", **{**arrays, **others})


def test_a_set_of_one_s_own_is_measured_for_itself(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SeDA's training, which takes long, is stood in for by a linear probe's."""
    aligned = dict.fromkeys(ALIGNMENT, 1.0)
    own_set(tmp_path, rng)
    monkeypatch.setattr(command, "ROOT", tmp_path / "root")

    def make(runs: Runs, wanted: Sequence[Job], folder: Path, *rest: object) -> list[object]:
        for job in wanted:
            probe = replace(job, method="linear")
            found = measure(probe, selection.task_of(probe, load(job.set, folder)))
            runs.add(replace(found, job=job, alignment=aligned, alignment_point=aligned))
        return []

    monkeypatch.setattr(workers, "make", make)
    chosen = ["--data", str(tmp_path), "--sets", "mine", "--regimes", "full", "tail", "--methods", "seda", "linear"]
    assert command.main([*chosen, "--seeds", "1"]) == 0
    assert [path.name for path in (tmp_path / "root").rglob("*") if path.is_file()] and all(
        path.is_relative_to(tmp_path / "root" / "runs" / "quality_own") for path in (tmp_path / "root").rglob("*.*")
    )
    page = (tmp_path / "root" / "runs" / "quality_own" / "quality.md").read_text()
    assert "## mine" in page
    assert f"python -m benchmarks.quality --data {tmp_path} --sets mine --regimes tail" in page
    assert "What was asked of it" not in page
    assert "fashion_products" not in page

    # Its records are found by its name: those of another file would make one table of two.
    assert command.main([*chosen, "--seeds", "2"]) == 0
    capsys.readouterr()
    records = tmp_path / "root" / "runs" / "quality_own" / "runs.jsonl"
    before = records.read_text()
    own_set(tmp_path, rng)
    assert command.main([*chosen, "--seeds", "3"]) == 2
    refused = capsys.readouterr().err
    assert "has records of another mine.npz" in refused and refused.count("\n") == 1
    assert records.read_text() == before
    assert command.main([*chosen, "--seeds", "1", "--runs", str(tmp_path / "other.jsonl")]) == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_set_of_one_s_own_has_too_little_text_for_is_left_out_and_named(
    tmp_path: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    processes: int,
) -> None:
    """A probe on texts of one class cannot be, and what follows is measured for all that."""
    rows = made_rows(rng, 120)
    text = np.where((rows.labels == 0)[:, None], rows.text, np.float32(np.nan))
    tests = {"visual_test": rows.visual[:30], "text_test": rows.text[:30], "label_test": rows.labels[:30]}
    own_set(tmp_path, rng, text_train=text, **tests)
    monkeypatch.setattr(command, "ROOT", tmp_path / "root")
    chosen = ["--data", str(tmp_path), "--sets", "mine", "--regimes", "full", "--seeds", "1"]
    chosen += ["--workers", str(processes)]
    assert command.main([*chosen, "--methods", "one_step_mse", "linear"]) == 0
    said = capsys.readouterr().err
    assert "left out: one_step_mse on mine in the regime full, seed 0: labels: a linear probe needs" in said
    measured = {r.job.method for r in Runs(tmp_path / "root/runs/quality_own/runs.jsonl")}
    assert measured == {"linear"}
    assert command.main([*chosen, "--methods", "one_step_mse", "--select", "2"]) == 2
    assert "no settings can be chosen: one_step_mse on mine" in capsys.readouterr().err


def test_no_text_at_all_has_the_units_it_comes_in(task: Task) -> None:
    without = replace(task, train=replace(task.train, text=np.full_like(task.train.text, np.nan)))
    found = methods.standardised(without, 0)
    assert np.array_equal(found.test.text, task.test.text)
    assert measure(Job("mine", "full", "linear", "test", 0), without).metrics["top1"] > 50


def test_on_a_set_of_one_s_own_settings_are_chosen_for_the_others_alone(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SeDA has its defaults there whatever other settings would give."""
    own_set(tmp_path, rng)
    monkeypatch.setattr(command, "ROOT", tmp_path / "root")

    def make(runs: Runs, wanted: Sequence[Job], *rest: object) -> list[object]:
        for job in wanted:
            metrics = {"top1": int(job.key, 16) % 997 / 10, **{weight_name(w): 1.0 for w in VISUAL_WEIGHTS}}
            runs.add(Record(job, metrics, None, None, np.zeros(30, bool), 1.0))
        return []

    monkeypatch.setattr(workers, "make", make)
    chosen = ["--data", str(tmp_path), "--sets", "mine", "--regimes", "tail"]
    assert command.main([*chosen, "--select", "5"]) == 0
    root = tmp_path / "root" / "runs" / "quality_own"
    found = json.loads((root / "selected.json").read_text())
    assert {name: (f["tried"], f["settings"]) for name, f in found.items() if name == "seda"} == {"seda": (1, {})}
    assert {name: f["tried"] for name, f in found.items() if name in ("mlp on mine", "bridge on mine")} == {
        "mlp on mine": 5, "bridge on mine": 5,
    }  # fmt: skip
    assert {json.dumps(dict(r.job.settings)) for r in Runs(root / "runs.jsonl") if r.job.method == "seda"} == {"{}"}
    page = (root / "quality.md").read_text()
    assert "SeDA has its defaults, and nothing else was tried of it" in page
    assert f"{tmp_path} --sets mine --select 5`, which chooses" in page


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"label_train": np.array([0, 1, 2, -1] * 30)}, "row 3 of 'label_train' is unlabelled"),
        ({"label_train": np.eye(3, dtype=np.int64)[np.arange(120) % 3]}, "one label and one text a row"),
        ({"text_train": np.full((120, DT), np.nan, np.float32)}, "text"),
        (
            {"visual_test": np.ones((6, DV), np.float32), "label_test": np.arange(6) % 3},
            "every test row must have its text",
        ),
        ({"visual_train": np.ones((7, DV), np.float32)}, "visual_train"),
    ],
    ids=["unlabelled", "multi-label", "no text", "no text in the test part", "broken"],
)
def test_a_set_that_cannot_be_measured_is_refused(
    tmp_path: Path,
    rng: np.random.Generator,
    others: dict[str, object],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own_set(tmp_path, rng, **others)
    monkeypatch.setattr(command, "ROOT", tmp_path / "root")
    assert command.main(["--data", str(tmp_path), "--sets", "mine"]) == 2
    refused = capsys.readouterr().err
    assert "mine.npz" in refused and said in refused and refused.count("\n") == 1
    assert not (tmp_path / "root").exists()


def test_copies_of_an_image_lie_on_one_side_of_a_fold(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = made_rows(rng, 60)
    twice = np.repeat(np.arange(60), 2)
    own_set(tmp_path, rng, visual_train=rows.visual[twice], text_train=rows.text[twice], label_train=rows.labels[twice])
    part = fold(load("mine", tmp_path), 0, 3, seed=0)
    held = {row.tobytes() for row in part.test.visual}
    assert held and not held & {row.tobytes() for row in part.train.visual}


def test_the_quick_command_measures_anew_and_leaves_what_is_published(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its own files, and forgets what it measured the last time."""
    monkeypatch.setattr(command, "ROOT", folder)
    selected = folder / "benchmarks/results/quality_selected.json"
    for name, value in (("sets", ["cub10"]), ("methods", ["seda", "linear"])):
        monkeypatch.setitem(command.QUICK, name, value)
    known: list[int] = []
    aligned = dict.fromkeys(ALIGNMENT, 1.0)

    def make(runs: Runs, wanted: Sequence[Job], *rest: object) -> list[object]:
        known.append(len(runs.records))
        for job in wanted:
            runs.add(Record(job, {"top1": 50.0}, aligned, None, np.ones(4, bool), 1.0))
        return []

    monkeypatch.setattr(workers, "make", make)
    for _ in range(2):
        assert command.main(["--quick", "--data", str(folder), "--selected", str(selected)]) == 0
    assert known == [0, 0]
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {f"runs/quality_quick/{name}" for name in ("runs.jsonl", "quality.json", "quality.md")} <= written
    assert not any(name.startswith(("docs", "benchmarks")) for name in written)
    named = folder / "mine.jsonl"
    named.write_bytes((folder / "runs/quality_quick/runs.jsonl").read_bytes())
    before = named.read_text()
    assert command.main(["--quick", "--data", str(folder), "--selected", str(selected), "--runs", str(named)]) == 0
    assert named.read_text().startswith(before)
    assert known[2:] == [len(before.splitlines())]


@pytest.mark.parametrize(
    ("given", "sets", "said"),
    [
        ([], ["digits"], "--quick measures the embedded digits"),
        (["--data", "{folder}/none"], ["digits"], "none has no wikipedia.npz; --quick measures the embedded digits"),
        (["--data", "{folder}"], ["wikipedia", "cub10"], ""),
        (["--sets", "cub10"], ["cub10"], ""),
    ],
    ids=["no folder", "without the sets", "with them", "sets"],
)
def test_the_quick_command_needs_no_data(
    folder: Path, given: list[str], sets: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of digits it says so, and what it chose for other sets is not theirs."""
    (folder / "wikipedia.npz").write_bytes((folder / f"{SETS['cub10']}.npz").read_bytes())
    found = command.arguments(["--quick", *(word.format(folder=folder) for word in given)])
    assert found.sets == sets and found.data.name
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == bool(said)
    own = command.ROOT / "runs/quality_quick/selected.json"
    assert found.selected == (own if said else command.ROOT / command.PUBLISHED["selected"])


def test_the_embedded_digits_are_a_set_like_others(tmp_path: Path, rng: np.random.Generator) -> None:
    """Unless a file of that name lies in the folder."""
    data, expected = load("digits", tmp_path / "none"), FeatureSet.load("digits")
    np.testing.assert_array_equal(data.task.train.visual, expected.visual_train)
    np.testing.assert_array_equal(data.task.test.text, expected.text_test)
    assert command._command(command.arguments(["--sets", "digits"])) == "python -m benchmarks.quality --sets digits"
    own_set(tmp_path, rng)
    (tmp_path / "mine.npz").rename(tmp_path / "digits.npz")
    assert load("digits", tmp_path).task.n_classes == K
    assert str(tmp_path) in command._command(command.arguments(["--sets", "digits", "--data", str(tmp_path)]))


@pytest.mark.slow(seconds=120)
def test_the_quick_command_is_done_in_five_minutes_without_data(repository: Path, tmp_path: Path) -> None:
    """As anyone would try it, on one core: its time, and not that of what else a machine does."""
    places = {"runs": "runs.jsonl", "out": "quality.json", "docs": ""}
    options = [word for name, place in places.items() for word in (f"--{name}", str(tmp_path / place))]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.quality", "--quick", *options],
        cwd=repository, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
        check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 300
    assert "the embedded digits" in done.stderr
    rows = {row["regime"]: row for row in json.loads((tmp_path / "quality.json").read_text())["rows"]}
    assert set(rows) == {"full", "labels-4"}
    assert all(set(row["methods"]) == {"seda", "linear", "mlp"} for row in rows.values())
    assert min(row["methods"]["seda"]["top1"] for row in rows.values()) > 95
    assert "## digits" in (tmp_path / "quality.md").read_text()


def test_measure_reports_alignment_where_a_method_maps(task: Task) -> None:
    found = measure(Job("cub10", "full", "one_step", "test", 0, {"epochs": 2}), task)
    assert found.alignment is not None
    assert {"frechet", "cosine", "recall_at_10"} <= set(found.alignment)
    assert measure(Job("cub10", "full", "linear", "test", 0), task).alignment is None


def row(name: str, regime: str, difference: float) -> dict[str, object]:
    return {
        "set": name, "regime": regime, "difference": difference, "interval": [difference - 1, difference + 1],
        "methods": {"seda": {"top1": 50.0, "deviation": None, "seeds": 2, "median_seconds": 30.0, "ece": 4.25,
                             "alignment": None, "alignment_point": None}},
    }  # fmt: skip


def test_targets_are_reached_or_not_by_the_figures() -> None:
    good = [row("cub10", "full", 0.9), row("wikipedia", "full", 0.3), row("cub10", "labels-4", 3.1)]
    assert [t.reached for t in summary.targets([*good, row("cub10", "tail", -0.4)])] == [True] * 4
    bad = [row("cub10", "full", 0.9), row("wikipedia", "full", -0.4), row("cub10", "labels-4", 2.9)]
    found = summary.targets([*bad, row("cub10", "tail", -0.6)])
    assert not any(t.reached for t in found)
    assert found[-1].found == "cub10 tail -0.60"
    aligned = row("fashion_products", "full", 0.0)
    aligned["methods"] = {
        "seda": {
            "alignment": {"frechet": 61.0},
            "alignment_point": {"cosine": 0.4, "recall_at_10": 49.0},
            "least_seconds": 201.0,
            "median_seconds": 239.0,
            "most_seconds": 250.0,
            "seeds": 5,
        },
        "one_step_mse": {"alignment": {"cosine": 0.3, "recall_at_10": 50.0}},
    }
    assert [t.reached for t in summary.targets([aligned])[2:]] == [True, False, True, False]
    aligned["methods"]["seda"]["median_seconds"] = 241.0  # type: ignore[index]
    time = summary.targets([aligned])[2]
    assert not time.reached
    assert time.found == "241, the median of 5 trainings (201 to 250) made two at a time beside other work"


def test_what_text_gives_is_told_by_those_without_text() -> None:
    """Of made-up records: the MLP is right in 60 and 64 of 100 rows, the linear probe in 62 and 50."""

    def record(method: str, seed: int, right: int, first: int = 0) -> Record:
        job = Job("cub10", "full", method, "test", seed)
        rows = np.isin(np.arange(100), np.arange(first, first + right))
        return Record(job, {"top1": float(right)}, None, None, rows, 1.0)

    others = [("linear", 0, 62), ("linear", 1, 50), ("mlp", 0, 60), ("mlp", 1, 64), ("one_step", 0, 80)]
    records = [record("seda", 0, 84), record("seda", 1, 84), *(record(*other) for other in others)]
    (row,) = summary.summarise(records, {})
    assert (row["best_baseline"], row["difference"]) == ("one_step", 4.0)
    gain = row["text_gain"]
    assert (gain["baseline"], gain["difference"]) == ("mlp", 22.0)
    assert gain["interval"] == list(summary.bootstrap(records[:2], records[4:6])[1:])
    assert 10 < gain["interval"][0] < 22 < gain["interval"][1] < 34
    low, high = gain["interval"]
    text = "\n".join(page._where_it_helps([row]))
    assert "| regime | mean over sets | better | worse | no difference seen | minus the best without text |" in text
    assert f"| full | +4.0 | cub10 | - | - | cub10 +22.0 ({low:+.1f} .. {high:+.1f}) |" in text
    assert "as SeDA has also another model" in text.replace("\n", " ")
    (row,) = summary.summarise([records[0], records[-1]], {})
    assert "text_gain" not in row and "| full | +4.0 | cub10 | - | - | - |" in "\n".join(page._where_it_helps([row]))


def test_all_that_is_recorded_of_a_full_set_is_shown() -> None:
    """Top-5, balanced accuracy and calibration side by side; MMD and recall@5 beside the other figures of alignment."""
    aligned = dict(zip(ALIGNMENT, (30.0, 32.0, 0.0015, 0.4, 11.0, 27.0, 37.0), strict=True))
    metrics = [
        {"top1": 80.0, "top5": 97.0, "balanced_accuracy": 70.0, "ece": 2.0},
        {"top1": 82.0, "top5": 98.5, "balanced_accuracy": 71.0, "ece": 3.0},
    ]
    records = [
        Record(Job("cub10", "full", method, "test", seed), metrics[seed], aligned, None, np.ones(4, bool), 1.0)
        for method in ("seda", "one_step") for seed in range(2)
    ]  # fmt: skip
    rows = summary.summarise(records, {})
    assert rows[0]["methods"]["seda"]["top5"] == 97.75 and rows[0]["methods"]["seda"]["balanced_accuracy"] == 70.5
    text = page.markdown(rows, {}, "make it", (0, 0.0))
    assert "| | seda | one_step |\n|---|---|---|\n| top-5 | 97.8 | 97.8 |" in text
    assert "\n| balanced accuracy | 70.5 | 70.5 |\n| expected calibration error | 2.5 | 2.5 |" in text
    assert "| | frechet | mmd | cosine | recall_at_1 | recall_at_5 | recall_at_10 |" in text
    assert "| seda | 30 | 0.0015 | 0.4 | 11 | 27 | 37 |" in text


def test_the_mean_over_few_labels_has_an_interval() -> None:
    rng, records, gaps = np.random.default_rng(5), [], {"cub10": [], "wikipedia": []}  # type: ignore[var-annotated]
    for name, regime in itertools.product(gaps, ("labels-4", "labels-8", "full")):
        ours, theirs = rng.random(400) < 0.8, rng.random(400) < 0.7
        for method, right in (("seda", ours), ("linear", theirs)):
            metrics = {"top1": 100 * right.mean()}
            records.append(Record(Job(name, regime, method, "test", 0), metrics, None, None, right, 1.0))
        if regime != "full":
            gaps[name].append(100 * (ours.astype(float) - theirs))
    rows = summary.summarise(records, {})
    found = [row["few_labels_interval"] for row in rows if row["regime"] != "full"]
    assert len(found) == 4
    assert all(each == found[0] for each in found)
    assert not any("few_labels_interval" in row for row in rows if row["regime"] == "full")
    # The sets' rows are drawn apart: variances of their means add up.
    means = [np.mean(gap, axis=0) for gap in gaps.values()]
    middle, half = np.mean(means), 1.96 * np.sqrt(sum(m.var() / len(m) for m in means)) / len(means)
    assert found[0] == pytest.approx([middle - half, middle + half], abs=0.3)


def test_the_bridge_is_also_shown_as_it_starts_midway() -> None:
    def record(method: str, settings: dict[str, Any], top1: float) -> Record:
        job = Job("cub10", "full", method, "test", 0, settings)
        return Record(job, {"top1": top1}, None, None, np.ones(4, bool), 1.0)

    chosen = {"bridge on cub10": {"settings": {"start": 0.05}}}
    records = [record("seda", {}, 90.0), record("bridge", {}, 40.0), record("bridge", {"start": 0.05}, 70.0)]
    (shown,) = summary.summarise(records, chosen)
    assert (shown["methods"]["bridge"]["top1"], shown["bridge_midway"]["top1"]) == (70.0, 40.0)
    (shown,) = summary.summarise(records, {})
    assert "bridge_midway" not in shown


def test_ablations_are_read_against_seda_of_the_same_seeds() -> None:
    scores = {("seda", 0): 50.0, ("seda", 1): 90.0, ("seda:one_step", 0): 51.0}
    records = [
        Record(Job("cub10", "full", method, "test", seed), {"top1": top1}, None, None, np.ones(4, bool), 1.0)
        for (method, seed), top1 in scores.items()
    ]
    rows = summary.summarise(records, {})
    assert rows[0]["seda_of_ablations"]["top1"] == 50
    assert rows[0]["methods"]["seda"]["top1"] == 70
    assert "| full | 50.0 | 50.0 | - | - | - | 51.0 | - | - | - |" in page._ablation_table(rows)
    # Without the kernel head, which is not what they change.
    single = {weight_name(1.0): 47.0, weight_name(0.0, "kernel"): 48.0, weight_name(1.0, "kernel"): 46.0}
    records[0].metrics.update(single)
    records[2].metrics[weight_name(0.0, "kernel")] = 49.0
    rows = summary.summarise([records[0], records[2]], {})
    assert "| full | 50.0 | 48.0 | - | - | - | 49.0 | - | 47.0 | 46.0 |" in page._ablation_table(rows)


def test_page_says_where_it_helps_and_how_to_make_it_again() -> None:
    rows = [row("cub10", "full", 1.5), row("wikipedia", "full", -1.5), row("fashion_products", "full", 0.5)]
    for r in rows:
        r["methods"]["seda"]["alignment"] = dict.fromkeys(ALIGNMENT, 1.0)  # type: ignore[index]
        r["best_baseline"] = "mlp"
    chosen = {"settings": {}, "top1": 81.0, "default_top1": 81.0, "standard_error": 0.0, "tried": 20}
    of_seda = {"seda": {**chosen, "precision": "bf16"}}
    text = page.markdown(rows, of_seda, "python -m benchmarks.quality", (7, 2.6))
    assert "| full | +0.2 | cub10 | wikipedia | fashion_products |" in text
    assert "| `python -m benchmarks.quality --regimes full` | 6 | 3 |" in text
    assert "quality --select 20 --select-precision bf16`, which chooses the settings below | 7 | 3, their sum |" in text
    assert "![full](quality/full.png)" in text
    assert "| | seda |\n|---|---|\n| expected calibration error | 4.2 |" in text


def test_the_page_says_what_was_chosen_and_how_sure_that_is() -> None:
    selected = {
        "seda": {"settings": {"blocks": 2}, "top1": 81.0, "default_top1": 80.6, "standard_error": 0.3, "tried": 20,
                 "precision": "bf16", "visual_weights": {"cub10 full": {"0.5": 87.44, "0.7": 87.0}},
                 "float32": {"gain": 0.125, "standard_error": 0.31, "trainings": 18}, "seconds": {"cub10": 21.6}},
        "mlp on cub10": {"settings": {}, "top1": 86.0, "default_top1": 86.0, "standard_error": 0.0, "tried": 20,
                         "longer": {"factor": 4, "top1": 85.5, "seconds": 17.2, "shorter_top1": 86.0}},
    }  # fmt: skip
    text = page.markdown([], selected, "make it", (0, 0.0))
    assert "`one_step_mse` and `bridge` keep their defaults; `mlp_pseudo`" in text
    tuned = page.markdown([], {**selected, "one_step_mse on cub10": selected["mlp on cub10"]}, "make it", (0, 0.0))
    assert "all sets; `bridge` keeps its defaults; `mlp_pseudo`" in tuned
    every = {f"{m} on cub10": selected["mlp on cub10"] for m in ("one_step_mse", "bridge")}
    assert "all sets; `mlp_pseudo` has" in page.markdown([], {**selected, **every}, "make it", (0, 0.0))
    assert "| seda | 20 | 80.6 | 81.0 | +0.4 ± 0.3 | blocks 2 |" in text
    assert "| mlp on cub10 | 20 | 86.0 | 86.0 | - | the defaults |" in text
    assert "| set and regime | 0.5 | 0.7 |" in text
    assert "| cub10 full | 87.4 | 87.0 |" in text
    assert "trained in bf16" in text
    assert "(cub10 22; the least" in text
    assert "| mlp on cub10 | 4 | 17 | 85.5 | 86.0 |" in text
    assert "in float32 instead of bf16, on 18 folds: +0.12 ± 0.31 points." in text
    assert "Selection was not run" in page.markdown([], {}, "make it", (0, 0.0))
    # As method.md has it.
    assert "One choice looked at a test part: that `translator_dropout` falls with the rows" in text.replace("\n", " ")
    assert "One choice" not in "\n".join(page._about_choice(selected, published=False))


def test_workers_end_with_a_command_that_is_killed(tmp_path: Path, repository: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from benchmarks.quality.workers import _begin\n"
        "def work():\n"
        "    _begin(1)\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=work)\n"
        "    worker.start()\n"
        "    worker.join()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment)
    assert command.stdout is not None
    assert command.stdout.readline() == b"begun\n"
    command.kill()
    # The pipe ends when its last holder does, and the worker holds it.
    command.communicate(timeout=60)


def test_methods_are_compared_over_the_seeds_that_seda_has() -> None:
    def record(method: str, seed: int, top1: float) -> Record:
        job = Job("cub10", "full", method, "test", seed)
        return Record(job, {"top1": top1}, None, None, np.ones(4, bool), 1.0)

    records = [record("seda", 0, 50.0), record("mlp", 0, 40.0), record("mlp", 1, 90.0), record("linear", 1, 95.0)]
    row = summary.summarise(records, {})[0]
    assert row["methods"]["mlp"]["top1"] == 40
    assert row["methods"]["mlp"]["seeds"] == 1
    assert row["best_baseline"] == "mlp"
    assert "linear" not in row["methods"]


def test_published_page_is_that_of_the_published_records(repository: Path, tmp_path: Path) -> None:
    command.main(["--report-only", "--out", str(tmp_path / "quality.json"), "--docs", str(tmp_path)])
    written = (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert written == (repository / "docs/quality.md").read_text(encoding="utf-8")
    made, kept = (
        json.loads(file.read_text())
        for file in (tmp_path / "quality.json", repository / "benchmarks/results/quality.json")
    )
    assert made == kept
    pictures, published = ({f.name for f in (place / "quality").iterdir()} for place in (tmp_path, repository / "docs"))
    assert pictures == published == {f"{regime}.png" for regime in {row["regime"] for row in kept["rows"]}}


def test_published_settings_are_the_best_of_equally_many(repository: Path) -> None:
    """All but the linear probe's, which chooses its penalty by itself."""
    found = json.loads((repository / "benchmarks/results/quality_selected.json").read_text())
    tried = {name: choice["tried"] for name, choice in found.items() if not name.startswith("linear on ")}
    methods_and_sets = {f"{m} on {name}" for m in selection.SPACES if m != "seda" for name in SETS}
    assert set(tried) == {"seda", *methods_and_sets}
    assert min(tried.values()) >= 20 and len(set(tried.values())) == 1
