"""What else was tried of the recipe: that each variant is what it says, and that the page tells what was measured."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from benchmarks.quality import explore, explored, methods, workers
from benchmarks.quality.regimes import SETS, Rows, Task
from benchmarks.quality.runs import Job, Record, Runs, weight_name
from benchmarks.quality.variants import _SGD, VARIANTS, _FastSGD, _Muon, _Split, _Warped
from seda_fast import engine
from seda_fast.nn.schedule import NoiseSchedule

K, DV, DT = 3, 6, 4


@pytest.fixture
def task(rng: np.random.Generator) -> Task:
    labels = np.arange(96) % K
    means = [rng.standard_normal((K, d)) for d in (DV, DT)]
    visual, text = ((m[labels] + rng.standard_normal((96, m.shape[1]))).astype(np.float32) for m in means)
    rows = Rows(visual, text, labels)
    return Task(rows.take(np.arange(96) < 64), rows.take(np.arange(96) >= 64), K)


def small(variant: str, fold: int = 0) -> Job:
    """The training of a variant, of few passes and narrow networks."""
    job = explore.job("cub10", "full", variant, fold)
    settings = {"width": 32, "visual_width": 32, "blocks": 2, **job.settings}
    return replace(job, settings=settings if "batch_share" in settings else {"epochs": 2, **settings}, precision="fp32")


def test_every_variant_trains_another_model_than_the_defaults(task: Task) -> None:
    found = {}
    for name, variant in VARIANTS.items():
        settings = {k: v for k, v in small(name).settings.items() if k != "batch_share"}
        settings |= {"epochs": 6, "batch_size": round(32 * variant.settings.get("batch_share", 1))}
        torch.manual_seed(0)
        with variant.during():
            model, _ = methods.train_seda(task, 0, settings, "fp32", variant.change)
        found[name] = methods.seda_predictions(model, task, 0.0)
        assert np.isfinite(found[name].log_proba).all(), name
    reference = found.pop("defaults")
    for name, fitted in found.items():
        heads = [reference.heads, fitted.heads]
        assert heads[0] is not None and heads[1] is not None
        assert any(not np.array_equal(a, b) for a, b in zip(*heads, strict=True)), name


def test_more_passes_or_rows_are_what_the_names_say(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def train(task: Task, seed: int, settings: dict[str, object], *rest: object) -> tuple[None, float]:
        given.update(settings)
        raise InterruptedError

    monkeypatch.setattr(explore, "train_seda", train)
    with pytest.raises(InterruptedError):
        explore.measure(explore.job("cub10", "full", "batch_half", 0), task)
    assert given == {"batch_size": 16, "epochs": 120}  # 32 rows and 120 passes of two steps by the rule


def test_what_holds_while_a_variant_trains_holds_in_its_measurement(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def train(*given: object) -> None:
        seen["now"] = (engine.learning_rate_factor, torch.optim.AdamW)
        raise InterruptedError

    monkeypatch.setattr(explore, "train_seda", train)
    usual = engine.learning_rate_factor, torch.optim.AdamW
    changed = ("rate_steady", "rate_linear", "betas", "muon", "sgd", "sgd_fast")
    for name, variant in VARIANTS.items():
        with pytest.raises(InterruptedError):
            explore.measure(explore.job("cub10", "full", name, 0), task)
        with variant.during():
            assert seen["now"] == (engine.learning_rate_factor, torch.optim.AdamW), name
        assert (seen["now"] != usual) == (name in changed)


def test_warped_timesteps_are_those_of_the_schedule() -> None:
    plain = NoiseSchedule(1000).alpha_bar
    torch.testing.assert_close(_Warped(1000, lambda u: u).alpha_bar, plain)
    half = _Warped(1000, lambda u: 0.5 + 0.5 * u).alpha_bar
    assert half[0] == pytest.approx(float(plain[499:501].mean()), rel=1e-6)
    assert half[-1] == plain[-1]
    assert _Warped(1000, lambda u: u**0.5).alpha_bar[250] < plain[250] < _Warped(1000, lambda u: u**2).alpha_bar[250]


@pytest.mark.parametrize("kind", [_Muon, _SGD, _FastSGD])
def test_matrices_go_to_the_other_optimiser_with_the_same_decay(kind: type[_Split]) -> None:
    """Without a gradient what is left of a step is its decay; of vectors AdamW takes none."""
    matrix, vector = (torch.ones(shape, requires_grad=True) for shape in ((4, 4), (4,)))
    optimiser = kind([{"params": [matrix], "weight_decay": 0.5}, {"params": [vector], "weight_decay": 0.0}], lr=1e-3)
    for group in optimiser.param_groups:
        group["lr"] = 2e-3
    for _ in range(200):
        matrix.grad, vector.grad = torch.zeros(4, 4), torch.zeros(4)
        optimiser.step()
    assert vector.tolist() == [1] * 4
    assert float(matrix.detach()[0, 0]) == pytest.approx((1 - 2e-3 * 0.5) ** 200, abs=0.01)
    assert not optimiser.state[matrix]
    matrix.grad, vector.grad = torch.eye(4), torch.ones(4)
    before = matrix.detach().clone()
    optimiser.step()
    assert not torch.equal(matrix, before) and not torch.equal(vector, torch.ones(4))


def test_an_estimate_noised_afresh_has_the_next_timesteps_noise() -> None:
    schedule = explore._Afresh(1000)
    plain, sampler = NoiseSchedule(1000), schedule.sampler("ddim", 5)
    signal, noise = (table[sampler.timesteps[1:]] for table in plain.training_tables())
    torch.testing.assert_close(sampler.coefficients[:-1, 0], signal)
    torch.testing.assert_close(sampler.coefficients[:-1, 3], noise)
    assert sampler.coefficients[:, 4].tolist() == [0, 0, 0, 0, 1]
    assert sampler.noisy and not sampler.coefficients[:, 1:3].any()
    assert torch.equal(schedule.sampler("renoise", 5).coefficients, plain.sampler("renoise", 5).coefficients)


def test_ways_to_draw_a_text_differ(task: Task) -> None:
    model, _ = methods.train_seda(task, 0, {"epochs": 3, "width": 32, "blocks": 2}, "fp32", lambda m, t: None)
    visual = torch.from_numpy(task.test.visual)
    kept = model.config, model.schedule
    found = {}
    for sampler in explored.SAMPLERS:
        with torch.inference_mode(), explore._textual(model, sampler):
            found[sampler] = model.align(visual, steps=4)
    assert (model.config, model.schedule) == kept
    for name in ("renoise", "afresh"):
        assert torch.equal(found[name][0], found["ddim"][0]) and not torch.allclose(found[name][1], found["ddim"][1])
    assert not torch.allclose(found["renoise"][1], found["afresh"][1])


def test_scaled_probabilities_are_calibrated_without_another_class(task: Task) -> None:
    model, _ = methods.train_seda(task, 0, {"epochs": 3, "width": 32, "blocks": 2}, "fp32", lambda m, t: None)
    plain, scaled = explore._heads(model, task)[0], explore._scaled(model, task)
    assert np.array_equal(plain.argmax(1), scaled.argmax(1))
    assert not np.allclose(plain, scaled)
    assert np.logaddexp.reduce(scaled, axis=1) == pytest.approx(0, abs=1e-5)


def test_defaults_are_also_measured_in_other_ways_to_predict(task: Task) -> None:
    record = explore.measure(small("defaults"), task)
    assert {f"top1_{name}" for name in explore.PREDICTIONS} <= set(record.metrics)
    for name in ("scaled", "sharp_1.25", "sharp_1.5", "sharp_2"):
        assert record.metrics[f"top1_{name}"] == record.metrics["top1"]
        assert record.metrics[f"ece_{name}"] != record.metrics["ece"]
    assert {f"frechet_{sampler}_{steps}" for sampler, steps in explore.SAMPLINGS} <= set(record.metrics)
    assert not any(key.startswith("top1_draws") for key in explore.measure(small("teacher_hot"), task).metrics)


def made(variant: str, fold: int, top1: float) -> Record:
    metrics = {"top1": top1, "ece": 5.0}
    if variant == "defaults":
        metrics |= {f"top1_{n}": top1 - 1 for n in explore.PREDICTIONS} | {f"ece_{n}": 3.0 for n in explore.PREDICTIONS}
        ways = [f"{sampler}_{steps}" for sampler, steps in explore.SAMPLINGS]
        keys = ("frechet", "cosine", "recall_at_10")
        metrics |= {f"{key}_{way}": int(way.split("_")[1]) / 2 for key in keys for way in ways}
    alignment = {"frechet": 20.0, "cosine": 0.5, "recall_at_10": 40.0}
    job = explore.job("cub10", "full", variant, fold)
    return Record(job, metrics, alignment, alignment, np.ones(4, bool), 2.0)


def test_page_tells_differences_on_the_same_folds(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs.jsonl")
    for variant, fold, top1 in (("defaults", 0, 80.0), ("defaults", 1, 90.0), ("mixup_all", 0, 81.0),
                                ("mixup_all", 1, 93.0), ("mixup_all", 2, 10.0)):  # fmt: skip
        runs.add(made(variant, fold, top1))
    explore.main(["--report-only", "--runs", str(runs.path), "--out", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| mixup (Beta 0.4) of whole triples | +2.0 ± 1.0 (2) | +2.0 ± 1.0 |" in text  # fold 2 has no defaults
    assert "| nothing: top-1 itself | 85.0 | |" in text
    assert "So far 5 trainings, whose wall times add up to 0 minutes" in text
    assert "| mean of 4 noise draws | -1.0 ± 0.0 (2) | -1.0 ± 0.0 | 3.0 |" in text
    assert "| DDIM | 20 | 10, 10.000, 10.0 |" in text
    assert "| the estimate noised afresh at every step; the last | 5 | 2.5, 2.500, 2.5 |" in text
    assert "cosine" not in text.split("## Other ways")[0].split("## With all labels")[1].splitlines()[4]


def test_trainings_of_an_earlier_recipe_are_not_added_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of today's recipe less one of an earlier one's would be told as the effect of what the variant changes."""
    monkeypatch.setattr(workers, "make", lambda runs, wanted, *rest: [runs.add(made("mixup_all", 1, 93.0))])
    (tmp_path / f"{SETS['cub10']}.npz").write_bytes(b"")
    runs = Runs(tmp_path / "runs.jsonl")
    runs.add(made("defaults", 1, 90.0))
    chosen = ["--data", str(tmp_path), "--sets", "cub10", "--runs", str(runs.path), "--out", str(tmp_path / "page.md")]
    before = runs.path.read_text()
    assert explore.main(chosen) == 2
    said = capsys.readouterr().err
    assert "trainings of an earlier recipe" in said and said.count("\n") == 1
    assert runs.path.read_text() == before and not (tmp_path / "page.md").exists()
    runs.path.unlink()
    record = made("defaults", 1, 90.0)
    record.metrics[weight_name(0.0, "kernel")] = 80.0
    Runs(runs.path).add(record)
    assert explore.main(chosen) == 0
    assert "earlier recipe" not in (tmp_path / "page.md").read_text(encoding="utf-8").replace("today's", "earlier")


def test_variants_need_labels_where_they_say_so() -> None:
    found = explore.jobs(["cub10"], list(explored.REGIMES), list(VARIANTS), 2)
    labelled = {job.method for job in found if job.regime == "full"} - {j.method for j in found if j.regime != "full"}
    assert labelled == {explored.PREFIX + name for name, variant in VARIANTS.items() if variant.labelled} != set()


def test_published_page_is_that_of_the_published_records(repository: Path, tmp_path: Path) -> None:
    explore.main(["--report-only", "--out", str(tmp_path / "page.md")])
    written = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert written == (repository / "docs/exploration.md").read_text(encoding="utf-8")
