"""Engines: the same training whichever runs it, the rule by which one is chosen, precisions, and losses gone bad."""

import dataclasses
import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seda_fast import SeDA, SeDAConfig, TrainConfig, checkpoint, engine, loop, train
from seda_fast.checkpoint import Checkpoints
from seda_fast.config import ConfigError
from seda_fast.engine import Glance, Plan, PrecisionName, Stepper, plan
from seda_fast.files import DataError
from seda_fast.loop import LOOK_SECONDS, LOOK_STEPS, Keeping, Telling, Trainer, TrainingError, TrainingSet
from seda_fast.ops import cpp_status, use_backend
from seda_fast.ranks import ALONE, Ranks

CONFIG = SeDAConfig(visual_dim=8, text_dim=5, n_classes=3, width=16, blocks=1, time_embedding=8, diffusion_steps=60)
# 4 batches of 14 rows and one of 4 an epoch: 50 steps.
SETTINGS = TrainConfig(epochs=10, batch_size=14, learning_rate=3e-3)
ROWS = 60


def training_set(device: str = "cpu", rows: int = ROWS) -> TrainingSet:
    generator = torch.Generator().manual_seed(9)
    labels = torch.arange(rows) % 3
    class_text = torch.randn(3, 5, generator=generator)
    class_visual = torch.randn(3, 8, generator=generator)
    fields = (
        class_visual[labels] + 0.5 * torch.randn(rows, 8, generator=generator),
        class_text[labels] + 0.5 * torch.randn(rows, 5, generator=generator),
        labels,
        torch.ones(rows, dtype=torch.bool),
        torch.arange(rows),
    )
    return TrainingSet(*(field.to(device) for field in fields))


def trainer(
    device: str = "cpu", settings: TrainConfig = SETTINGS, rows: int = ROWS, lone: bool = False, **options: Any
) -> Trainer:
    """``lone``: a class has no text, and labels are believed in part."""
    torch.manual_seed(0)
    model, data = SeDA(CONFIG), training_set(rows=rows)
    model.fit_statistics(torch.zeros(8), torch.ones(8), torch.zeros(5), torch.ones(5), data.visual, data.labels)
    there = training_set(device, rows)
    if lone:
        there = dataclasses.replace(there, paired=there.labels != 2)
        model.set_unseen(data.labels, data.labels != 2)
        model.set_label_share(0.4)
    return Trainer(model.to(device), there, settings, **options)


def agree(one: Trainer, other: Trainer, tolerance: float) -> None:
    """Loss curves and weights."""
    for a, b in zip(one.history, other.history, strict=True):
        assert b.losses == pytest.approx(a.losses, rel=tolerance)
        assert b.learning_rate == a.learning_rate
    for (name, a), (_, b) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=50 * tolerance, atol=50 * tolerance, msg=name)


def test_a_checkpoint_counts_no_steps_that_came_while_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file, counted = checkpoint.save_file, threading.Event()

    def slowly(*arguments: Any) -> None:
        save_file(*arguments)
        assert counted.wait(30)

    monkeypatch.setattr(checkpoint, "save_file", slowly)
    checkpoints = Checkpoints(tmp_path, print)
    found = trainer(engine="graph", keeping=Keeping(checkpoints))  # which a CPU has none of

    def stop(done: int, total: int) -> None:
        if done == found.steps_per_epoch + 2:
            counted.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found.run(stop)
    newest = checkpoints.newest()
    assert newest is not None and newest.step == found.steps_per_epoch
    assert newest.state["fallbacks"]["engine graph"]["steps"] == newest.step


@pytest.mark.slow
def test_compiled_training_agrees_with_eager_over_fifty_steps() -> None:
    eager, compiled = trainer(engine="eager"), trainer(engine="compile")
    eager.run()
    compiled.run()
    assert eager.stepper.done == compiled.stepper.done == 50
    agree(eager, compiled, 1e-5)
    report = compiled.stepper.report()
    assert report["used"] == "compile"
    assert report["fallbacks"] == [
        {"what": "a batch of 4 rows", "used": "eager", "reason": "a new shape would be compiled anew", "steps": 10}
    ]


# ------------------------------------------------------------------------------------------ one pass over the weights


needs_cpp = pytest.mark.skipif(cpp_status()["reason"] is not None, reason="the C++ half was not built")


def by_pytorch(settings: TrainConfig = SETTINGS, **options: Any) -> Trainer:
    """A trainer whose weights PyTorch's own optimiser updates."""
    with use_backend("reference"):
        found = trainer(settings=settings, **options)
    assert not found.stepper.one_pass
    return found


@needs_cpp
@pytest.mark.parametrize("clip_norm", [0.05, 1e3])
def test_one_pass_over_the_weights_agrees_with_pytorchs_optimiser(clip_norm: float) -> None:
    settings = dataclasses.replace(SETTINGS, clip_norm=clip_norm)
    one, other = trainer(settings=settings), by_pytorch(settings)
    assert one.stepper.one_pass
    one.run()
    other.run()
    assert one.stepper.done == other.stepper.done == 50
    agree(other, one, 1e-5)
    states = one.stepper.tensors(), other.stepper.tensors()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        scale = states[1][name].abs().amax().item() if states[1][name].numel() else 0.0  # no kernel head
        torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-3 * scale, msg=name)
        if name.startswith("optimiser.step."):
            assert value == 50


@needs_cpp
def test_one_pass_leaves_weights_without_a_gradient() -> None:
    found = trainer(), by_pytorch()
    for one in found:
        frozen = one.model.visual.head.weight.requires_grad_(False)
        before = frozen.clone()
        for _ in one.stepper.steps([torch.arange(14), torch.arange(14, 28)]):
            pass
        assert torch.equal(frozen, before)
        assert one.stepper.optimiser.state[frozen]["step"] == 0
    averages = [one.stepper.average.values for one in found]
    for a, b in zip(*averages, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_scaler_keeps_pytorchs_optimiser() -> None:
    assert not trainer(precision="fp16").stepper.one_pass
    assert trainer(precision="bf16").stepper.one_pass == trainer().stepper.one_pass


# ------------------------------------------------------------------------------------------ the step without the host


class NoReading(TorchDispatchMode):
    """Refuses what makes a host wait for its device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert name not in {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}, name
        return func(*args, **(kwargs or {}))


class FakeGraph:
    """Calls the step that a CUDA graph would have captured."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper

    def steps(self, parts: list[torch.Tensor]) -> Iterator[None]:
        for rows in parts:
            with NoReading():
                self.stepper.device_step(self.stepper.data.rows(rows), rows)
            yield


@pytest.fixture
def graph_plan(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(engine, "plan", lambda *unused: Plan("graph", "graph", "a test"))
    return monkeypatch


def test_the_captured_step_reads_nothing_and_agrees_with_eager(graph_plan: pytest.MonkeyPatch) -> None:
    graph_plan.setattr(engine, "Graph", FakeGraph)
    graphed = trainer(engine="graph")
    graph_plan.undo()
    eager = trainer(engine="eager")
    eager.run()
    graph_plan.setattr(engine, "Graph", FakeGraph)
    graphed.run()
    assert int(graphed.stepper.step) == graphed.stepper.done == 50
    agree(eager, graphed, 1e-5)
    assert graphed.stepper.report()["fallbacks"] == [
        {"what": "a batch of 4 rows", "used": "eager", "reason": "a graph has one shape", "steps": 10}
    ]


def test_the_reader_of_host_reads_sees_one() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        float(torch.ones(1))


@pytest.mark.parametrize("before", ["", "\n"], ids=["plain", "after a blank line"])
def test_a_capture_that_fails_is_told_and_training_goes_on(before: str, graph_plan: pytest.MonkeyPatch) -> None:
    def fail(stepper: Stepper) -> None:
        raise RuntimeError(f"{before}operation not permitted when stream is capturing\nmore")

    graph_plan.setattr(engine, "Graph", fail)
    said: list[str] = []
    graphed = trainer(engine="graph", say=said.append)
    graphed.run()
    sentence = "engine graph runs on eager: it failed: operation not permitted when stream is capturing"
    assert said == [sentence, "a batch of 4 rows runs on eager: a graph has one shape"]
    assert graphed.stepper.report()["asked"] == "graph"
    assert graphed.stepper.report()["used"] == "eager"
    graph_plan.undo()
    eager = trainer(engine="eager")
    eager.run()
    agree(eager, graphed, 1e-5)


class Unlucky(Ranks):
    """The first of two ranks, whose twin could not capture."""

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def largest(self, values: Sequence[int]) -> list[int]:
        return [max(value, 1) for value in values] if len(values) == 1 else list(values)

    def spread(self, tensor: torch.Tensor) -> None:
        pass


def test_a_capture_that_fails_on_another_rank_is_told_too(graph_plan: pytest.MonkeyPatch) -> None:
    graph_plan.setattr(engine, "Graph", FakeGraph)
    said: list[str] = []
    graphed = trainer(engine="graph", say=said.append, ranks=Unlucky(0, 2))
    graphed.run()
    assert said[0] == "engine graph runs on eager: it failed: on another rank"
    assert graphed.stepper.report()["used"] == "eager"
    assert graphed.stepper.done == 50


@pytest.mark.gpu
def test_graph_agrees_with_eager_over_fifty_steps_without_waiting() -> None:
    eager, graphed = trainer("cuda", engine="eager"), trainer("cuda", engine="graph")
    eager.run()

    def look(done: int, total: int) -> None:
        # Between the first and the last step of an epoch nothing may wait for the device.
        torch.cuda.set_sync_debug_mode("error" if 1 <= done % 5 <= 3 and done > 5 else "default")

    try:
        graphed.run(on_step=look)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    agree(eager, graphed, 1e-4)
    assert graphed.stepper.report()["used"] == "graph"
    assert "engine graph" not in graphed.stepper.fallbacks


class Alike(Ranks):
    """The first of two ranks, whose twin says what it says."""

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def largest(self, values: Sequence[int]) -> list[int]:
        return list(values)

    def spread(self, tensor: torch.Tensor) -> None:
        pass


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "ranks"), [("graph", ALONE), ("eager", ALONE), ("graph", Alike(0, 2))])
def test_losses_are_looked_at_within_an_epoch_without_waiting_for_the_newest_steps(name: Any, ranks: Ranks) -> None:
    # Two epochs of 150 steps.
    settings = dataclasses.replace(SETTINGS, epochs=2, batch_size=2)
    found = trainer("cuda", settings, rows=300, engine=name, ranks=ranks)
    assert found.steps_per_epoch == 3 * LOOK_STEPS

    def look(done: int, total: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if 2 <= done % 150 <= 148 else "default")

    try:
        found.run(on_step=look)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.stepper.report()["used"] == name


@pytest.mark.gpu
def test_a_loss_gone_bad_is_seen_within_an_epoch() -> None:
    settings = dataclasses.replace(SETTINGS, epochs=1, batch_size=2)
    broken = trainer("cuda", settings, rows=1000, engine="graph")

    def spoil(done: int, total: int) -> None:
        if done == 10:
            with torch.no_grad():
                broken.model.translator.head.weight[0, 0] = float("inf")

    with pytest.raises(TrainingError, match="the loss term mapped is no longer finite, first in step 11 "):
        broken.run(on_step=spoil)
    assert broken.stepper.done <= 10 + 3 * LOOK_STEPS


@pytest.mark.gpu
def test_the_eager_engine_waits_for_the_device_between_epochs_alone() -> None:
    eager = trainer("cuda", engine="eager")

    def look(done: int, total: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if 1 <= done % 5 <= 4 and done > 5 else "default")

    try:
        eager.run(on_step=look)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert eager.stepper.done == 50


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_graph_in_other_precisions_stays_near(precision: Any) -> None:
    exact, other = trainer("cuda", engine="eager"), trainer("cuda", engine="graph", precision=precision)
    exact.run()
    other.run()
    assert other.history[-1].losses["total"] == pytest.approx(exact.history[-1].losses["total"], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.02), ("fp16", 0.02)])
def test_what_texts_say_beside_labels_is_captured(precision: Any, tolerance: float) -> None:
    eager, graphed = (
        trainer("cuda", lone=True, engine=name, precision=precision if name == "graph" else "fp32")
        for name in ("eager", "graph")
    )
    eager.run()
    graphed.run()
    assert graphed.stepper.report()["used"] == "graph"
    assert graphed.model.opinion is not None
    assert graphed.model.unseen is not None
    for a, b in zip(eager.history, graphed.history, strict=True):
        assert b.losses["total"] == pytest.approx(a.losses["total"], rel=tolerance)


@pytest.mark.gpu
def test_a_graph_writes_to_no_memory_that_was_freed_meanwhile() -> None:
    """`torch.compile` frees the workspaces of all products where it makes graphs of its own."""
    alone, beside = (trainer("cuda", engine="graph", precision="bf16") for _ in range(2))
    alone.run()
    taken: list[torch.Tensor] = []

    def free(done: int, total: int) -> None:
        torch._C._cuda_clearCublasWorkspaces()
        if len(taken) < 16:
            taken.append(torch.ones(2**22, device="cuda"))

    beside.run(on_step=free)
    assert all(bool((tensor == 1).all()) for tensor in taken)
    for (name, a), b in zip(alone.model.named_parameters(), beside.model.parameters(), strict=True):
        assert torch.equal(a, b), name


# --------------------------------------------------------------------------------------------------------- the rule


@dataclasses.dataclass
class Shown:
    """As much of a training set as the rule looks at."""

    device: torch.device
    on_device: bool = True
    rows: int = 100

    def __len__(self) -> int:
        return self.rows


@pytest.mark.parametrize(
    ("asked", "device", "change", "precision", "used", "reason"),
    [
        ("auto", "cpu", {}, "fp32", "eager", "device is a CPU"),
        ("auto", "cuda", {}, "bf16", "graph", "device is CUDA"),
        ("graph", "cuda", {}, "tf32", "graph", "asked for"),
        ("graph", "cpu", {}, "fp32", "compile", "no graph: it needs a CUDA device"),
        ("auto", "cuda", {"on_device": False}, "fp32", "graph", "device is CUDA"),
        ("auto", "cuda", {"rows": 9}, "fp32", "compile", "no graph: the batch is larger than the training part"),
        ("graph", "cuda", {}, "fp16", "graph", "asked for"),
        ("eager", "cuda", {}, "fp16", "eager", "asked for"),
        ("compile", "cpu", {}, "bf16", "compile", "asked for"),
    ],
)
def test_the_rule_that_chooses(
    asked: Any, device: str, change: dict[str, Any], precision: Any, used: str, reason: str
) -> None:
    shown: Any = Shown(torch.device(device), **change)
    assert plan(asked, precision, shown, 10) == Plan(asked, used, reason)


def test_ranks_have_graphs_where_each_has_a_row() -> None:
    shown: Any = Shown(torch.device("cuda"))
    assert plan("auto", "bf16", shown, 10, Ranks(3, 10)).used == "graph"
    refused = "no graph: the batch has fewer rows than there are ranks"
    assert plan("auto", "bf16", shown, 10, Ranks(3, 11)) == Plan("auto", "compile", refused)


def test_tf32_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="precision tf32 needs a CUDA device"):
        trainer(precision="tf32")


@pytest.mark.parametrize("kind", ["TorchDynamoException", "FailOnRecompileLimitHit"])
def test_a_compiler_that_fails_is_told_and_training_goes_on(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    import torch._dynamo

    def failing(function: Any, **options: Any) -> Any:
        def fail(*args: Any) -> Any:
            raise getattr(torch._dynamo.exc, kind)("no compiler\nand a long story")

        return fail

    monkeypatch.setattr(torch, "compile", failing)
    said: list[str] = []
    compiled, eager = trainer(engine="compile", say=said.append), trainer(engine="eager")
    compiled.run()
    eager.run()
    assert said[0] == "engine compile runs on eager: it failed: no compiler"
    assert compiled.stepper.report()["used"] == "eager"
    agree(eager, compiled, 0.0)


def test_auto_says_that_it_could_not_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "plan", lambda *unused: Plan("auto", "compile", "no graph: a test"))
    said: list[str] = []
    # What `auto` would choose on a CPU is eager, on a GPU the graph; all else is told.
    found = trainer(engine="auto", say=said.append)
    assert said == ["engine eager runs on compile: no graph: a test"]
    assert [how["what"] for how in found.stepper.report()["fallbacks"]] == ["engine eager"]


# --------------------------------------------------------------------------------------------------------- precisions


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_keep_float32_masters_and_stay_near(precision: Any) -> None:
    exact, half = trainer(), trainer(precision=precision)
    if precision == "fp16":
        # A scale that fits from the start: none of the first epoch's five steps is left out, which would be compared.
        half.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    exact.run()
    half.run()
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert half.history[0].losses == pytest.approx(exact.history[0].losses, rel=0.1)
    assert half.history[-1].losses["total"] == pytest.approx(exact.history[-1].losses["total"], rel=0.05)
    assert half.history[-1].losses != exact.history[-1].losses


def test_fp16_finds_its_scale_by_leaving_out_steps_whose_gradients_overflow() -> None:
    half = trainer(precision="fp16")
    half.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: p.detach().clone() for name, p in half.model.named_parameters()}
    steps = half.stepper.steps([torch.arange(14)] * 40)
    next(steps)
    assert half.stepper.scaler.get_scale() == 2.0**39
    for name, p in half.model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=0)
    for _ in steps:
        pass
    assert half.stepper.scaler.get_scale() < 2.0**20
    assert any(not torch.equal(p, before[name]) for name, p in half.model.named_parameters())


@pytest.mark.slow
def test_a_compiled_half_precision_agrees_with_eager() -> None:
    settings = dataclasses.replace(SETTINGS, epochs=2, batch_size=20)
    eager, compiled = (trainer(settings=settings, engine=name, precision="bf16") for name in ("eager", "compile"))
    eager.run()
    compiled.run()
    assert compiled.stepper.report()["used"] == "compile"
    for a, b in zip(eager.history, compiled.history, strict=True):
        assert b.losses == pytest.approx(a.losses, rel=0.02)


# ------------------------------------------------------------------------------------------------- losses gone bad


def test_a_bad_loss_names_step_term_and_last_good_checkpoint(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, centre_weight=0.0)
    kept = Checkpoints(tmp_path, lambda sentence: None)
    broken = trainer(settings=settings, keeping=Keeping(kept))

    def spoil(done: int, total: int) -> None:
        if done == 12:
            with torch.no_grad():
                broken.model.translator.head.weight[0, 0] = float("inf")

    with pytest.raises(TrainingError) as caught:
        broken.run(on_step=spoil)
    # The head of the translator is in three terms; mapped is the first of them.
    assert str(caught.value) == (
        "the loss term mapped is no longer finite, first in step 13 (epoch 3); "
        f"the last good checkpoint is {tmp_path / 'step-000000010.safetensors'}"
    )
    assert kept.steps() == [5, 10]


def test_a_bad_loss_names_no_checkpoint_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path, lambda sentence: None)
    broken = trainer(settings=dataclasses.replace(SETTINGS, centre_weight=0.0), keeping=Keeping(kept))
    write = kept._write_files

    def full_disk(path: Path, step: int, *rest: Any) -> None:
        if step == 10:
            raise DataError(f"the checkpoint {path} cannot be written: no space is left")
        write(path, step, *rest)

    def spoil(done: int, total: int) -> None:
        if done == 12:
            with torch.no_grad():
                broken.model.translator.head.weight[0, 0] = float("inf")

    monkeypatch.setattr(kept, "_write_files", full_disk)
    # As if it were still being written.
    monkeypatch.setattr(kept, "raise_failure", lambda: None)
    with pytest.raises(TrainingError) as caught:
        broken.run(on_step=spoil)
    said = str(caught.value)
    assert f"the last good checkpoint is {tmp_path / 'step-000000005.safetensors'} (the checkpoint" in said
    assert "no space is left" in said


def test_a_checkpoint_that_cannot_be_written_ends_the_run_before_the_next_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path, lambda sentence: None)
    running = trainer(keeping=Keeping(kept))

    def full_disk(path: Path, *rest: Any) -> None:
        raise DataError(f"the checkpoint {path} cannot be written: no space is left")

    def wait(done: int, total: int) -> None:
        if done == 6 and kept._writer is not None:
            kept._writer.join()

    monkeypatch.setattr(kept, "_write_files", full_disk)
    with pytest.raises(DataError, match="no space is left"):
        running.run(on_step=wait)
    assert running.stepper.done == 6


def test_a_rank_without_checkpoints_leaves_them_to_the_first() -> None:
    broken = trainer(keeping=Keeping(None))
    broken._ranks = Ranks(1, 2)
    assert broken._kept() == "the first rank names the last good checkpoint"


def test_a_moment_gone_bad_is_found_too() -> None:
    broken = trainer()
    weight = broken.model.translator.head.weight
    broken.stepper.optimiser.state[weight]["exp_avg_sq"][0, 0] = float("inf")
    assert broken.stepper.first_non_finite() == "the optimiser's exp_avg_sq of translator.head.weight"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_tells_the_losses_that_an_undisturbed_one_tells(precision: PrecisionName, tmp_path: Path) -> None:
    def told(keeping: Keeping | None, stop: int = 0, resume: bool = False) -> dict[int, float]:
        found: dict[int, float] = {}
        telling = Telling(10, lambda step, means, rate: found.update({step: means["total"]}))
        running = trainer(keeping=keeping, telling=telling, precision=precision)
        if resume:
            assert running.resume()

        def halt(done: int, total: int) -> None:
            if done == stop:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            running.run(on_step=halt)
        return found

    whole = told(None)
    kept = Checkpoints(tmp_path, lambda sentence: None)
    halves = told(Keeping(kept), stop=17) | told(Keeping(kept), resume=True)
    assert halves == pytest.approx(whole, rel=1e-12)


def test_a_run_that_is_first_told_of_when_it_is_resumed_tells_of_what_it_does_then(tmp_path: Path) -> None:
    whole: dict[int, float] = {}
    later: dict[int, float] = {}

    def telling(found: dict[int, float]) -> Telling:
        return Telling(1, lambda step, means, rate: found.update({step: means["total"]}))

    def halt(done: int, total: int) -> None:
        if done == 17:
            raise KeyboardInterrupt

    trainer(telling=telling(whole)).run()
    kept = Checkpoints(tmp_path, lambda sentence: None)
    with suppress(KeyboardInterrupt):
        trainer(keeping=Keeping(kept)).run(on_step=halt)
    running = trainer(keeping=Keeping(kept), telling=telling(later))
    assert running.resume()
    running.run()
    assert later == pytest.approx({step: loss for step, loss in whole.items() if step > 15}, rel=1e-12)


def overflow_in(step: int, broken: Trainer) -> None:
    """The gradient of ``step`` (from 1) is infinite though its losses are not."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf") if broken.stepper.done == step - 1 else gradient

    broken.model.translator.head.weight.register_hook(spoil)


def test_a_checkpoint_of_weights_gone_bad_is_not_written(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, lambda sentence: None)
    broken = trainer(keeping=Keeping(kept))
    overflow_in(10, broken)
    with pytest.raises(TrainingError) as caught:
        broken.run()
    assert re.fullmatch(
        r"the weight \S+ is no longer finite after step 10 \(epoch 2\); the last good checkpoint is "
        + re.escape(str(tmp_path / "step-000000005.safetensors")),
        str(caught.value),
    )
    assert kept.steps() == [5]
    # And from there the run can go on.
    again = trainer(keeping=Keeping(kept))
    assert again.resume()
    again.run()
    assert again.stepper.done == 50


def test_weights_gone_bad_in_the_last_step_are_not_returned() -> None:
    broken = trainer()
    overflow_in(50, broken)
    with pytest.raises(TrainingError, match=r"the weight \S+ is no longer finite after step 50 .*no checkpoint yet"):
        broken.run()


def test_a_number_of_the_device_is_that_of_the_glance_before(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []

    class Event:
        def record(self, stream: Any) -> None:
            waits.append("recorded")

        def query(self) -> bool:
            """The device comes to it between the first question and the second."""
            waits.append("asked")
            return waits[-2] == "asked"

        def synchronize(self) -> None:
            raise AssertionError("a wait in the driver, where no signal is heard")

    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *args, pin_memory, **options: full(*args, **options))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    number = torch.tensor(-1)
    glance = Glance(number)
    assert glance.newest() == -1
    assert waits == ["recorded"]  # at the first there is nothing to wait for
    number.fill_(7)
    assert glance.newest() == -1  # it was made before the number changed
    assert glance.newest() == 7
    assert waits == ["recorded", *("asked", "asked", "recorded") * 2]


@pytest.mark.parametrize(("seconds", "steps"), [(1e-4, LOOK_STEPS), (0.1, 10), (20.0, 1)])
def test_ranks_look_every_second_or_so(monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int) -> None:
    clock = iter([0.0, 30 * seconds])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    looking = trainer()
    looking.stepper.done = 30
    assert looking._refuse_non_finite() == 0
    assert looking._look_at == 30 + steps


def test_the_pace_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host tells a GPU of 50 steps in no time; the clock is read when the GPU was waited for."""
    looking, clock = trainer(), [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    looking._looked = (0, 0.0)
    plain = looking.stepper.look

    def slow(stop: int, pace: Any, newest: bool) -> Any:
        clock[0] += 5.0  # what 50 steps of 0.1 s take
        return plain(stop, pace, newest)

    monkeypatch.setattr(looking.stepper, "look", slow)
    looking.stepper.done = 50
    looking._refuse_non_finite()
    assert looking._pace == 100_000
    assert looking._look_at == 60


@pytest.mark.parametrize("ranks", [ALONE, Ranks(0, 2)], ids=["one GPU", "two"])
@pytest.mark.parametrize("seconds", [1e-4, 0.05, 0.3, 3.0])
def test_a_gpu_never_has_more_steps_waiting_than_a_signal_may_wait_for(
    seconds: float, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU whose steps take ``seconds``, told by a host that takes a millisecond a step, and that now and then waits
    for the newest, as for a checkpoint amid an epoch and at an epoch's end."""
    looking = trainer()
    looking.data, looking._ranks = Shown(torch.device("cuda")), ranks
    # When the host and the device are done with what they were told, and when the device was with each look's steps.
    host, device, seen = [0.0], [0.0], [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: host[0])
    looking._looked = (0, 0.0)

    def glanced() -> int:
        host[0] = max(host[0], seen[-1])
        seen.append(device[0])
        return -1

    class Newest:
        def __int__(self) -> int:
            host[0] = max(host[0], device[0])
            return -1

    monkeypatch.setattr(looking.stepper, "_glanced", glanced)
    monkeypatch.setattr(looking.stepper, "_first_bad", Newest())
    worst = 0.0
    for looking.stepper.done in range(1, 2000):
        host[0] += 1e-3
        device[0] = max(device[0], host[0]) + seconds
        looking._keep() if looking.stepper.done % 397 else looking._refuse_non_finite()
        worst = max(worst, device[0] - host[0])
    assert worst <= 2 * max(seconds, LOOK_SECONDS) + seconds
    # And the host looks no more often than it must.
    assert len(seen) <= 5 + 2000 * max(1 / LOOK_STEPS, 2 * min(1.0, seconds / LOOK_SECONDS))


def test_a_sum_that_overflows_is_named_too() -> None:
    settings = dataclasses.replace(SETTINGS, text_weight=3e38, centre_weight=3e38, semantic_weight=3e38)
    with pytest.raises(TrainingError, match="the weighted sum of the losses is no longer finite, first in step 1 "):
        trainer(settings=settings).run()


# ----------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"engine": "compile"}, id="compile", marks=pytest.mark.slow),
        pytest.param({"precision": "bf16"}, id="bf16"),
        pytest.param({"precision": "fp16"}, id="fp16"),
    ],
)
def test_a_run_goes_on_to_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 24:
            raise Stop

    kept = Checkpoints(tmp_path, lambda sentence: None)
    whole = trainer(**options)
    whole.run()
    with pytest.raises(Stop):
        # Between the checkpoints of the third and of the fourth epoch fp16 still looks for its scale.
        trainer(**options, keeping=Keeping(kept, every=0.6)).run(on_step=stop)
    said: list[str] = []
    resumed = trainer(**options, keeping=Keeping(kept), say=said.append)
    assert resumed.resume()
    assert [sentence for sentence in said if "same bits" in sentence] == []
    assert resumed.stepper.done == 21
    resumed.run()
    for (name, a), b in zip(whole.stepper.tensors().items(), resumed.stepper.tensors().values(), strict=True):
        assert torch.equal(a, b), name
    assert [epoch.losses for epoch in whole.history] == [epoch.losses for epoch in resumed.history]
    assert resumed.stepper.report() == whole.stepper.report()


def test_a_run_goes_on_in_another_precision(tmp_path: Path) -> None:
    kept, said = Checkpoints(tmp_path, lambda sentence: None), list[str]()
    trainer(settings=dataclasses.replace(SETTINGS, epochs=1), keeping=Keeping(kept)).run()
    other = trainer(
        settings=dataclasses.replace(SETTINGS, epochs=1), precision="fp16", keeping=Keeping(kept), say=said.append
    )
    assert other.resume()
    assert "continuing with precision fp16 after fp32: close to, but not the same bits as, one run" in said


def test_what_changes_the_bits_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoints(tmp_path, lambda sentence: None)
    trainer(settings=dataclasses.replace(SETTINGS, epochs=1), keeping=Keeping(kept)).run()
    said: list[str] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    with use_backend("reference"):
        resumed = trainer(settings=dataclasses.replace(SETTINGS, epochs=1), keeping=Keeping(kept), say=said.append)
        assert resumed.resume()
    told = "\n".join(said)
    assert "continuing with threads 77 after " in told
    assert "continuing with processor ABACUS after " in told
    assert ("continuing with backends reference after " in told) == (cpp_status()["reason"] is None)


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_reports_its_engine(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    labels = np.arange(60) % 3
    rng = np.random.default_rng(1)
    np.savez(
        tmp_path / "data.npz",
        visual_train=rng.normal(size=(60, 8)),
        text_train=rng.normal(size=(60, 5)),
        label_train=labels,
    )
    arguments = ["--data", str(tmp_path / "data.npz"), "--width", "16", "--blocks", "1", "--epochs", "1"]
    arguments += ["--batch-size", "16", "--no-baselines", "--out"]
    assert train.main([*arguments, str(tmp_path / "half"), "--precision", "bf16", "--engine", "eager"]) == 0
    metrics = json.loads((tmp_path / "half" / "metrics.json").read_text())["train"]
    assert metrics["precision"] == "bf16"
    assert metrics["engine"] == {"asked": "eager", "used": "eager", "reason": "asked for", "fallbacks": []}
    capfd.readouterr()
    # No batch is whole here, so nothing is compiled, which would take long.
    falling = ["--engine", "graph", "--batch-size", "64"]
    assert train.main([*arguments, str(tmp_path / "graph"), *falling]) == 0
    why = "no graph: it needs a CUDA device; the batch is larger than the training part"
    said = capfd.readouterr().err
    assert f"seda_fast.train: engine graph runs on compile: {why}\n" in said
    assert "seda_fast.train: a batch of 48 rows runs on eager: a new shape would be compiled anew\n" in said
    told = json.loads((tmp_path / "graph" / "metrics.json").read_text())["train"]["engine"]
    assert told == {
        "asked": "graph",
        "used": "compile",
        "reason": why,
        "fallbacks": [
            {"what": "engine graph", "used": "compile", "reason": why, "steps": 1},
            {
                "what": "a batch of 48 rows",
                "used": "eager",
                "reason": "a new shape would be compiled anew",
                "steps": 1,
            },
        ],
    }
    assert train.main([*arguments, str(tmp_path / "tf32"), "--precision", "tf32", "--device", "cpu"]) == 2
    assert capfd.readouterr().err == "seda_fast.train: precision tf32 needs a CUDA device; give fp32 or bf16\n"
    assert not (tmp_path / "tf32").exists()
