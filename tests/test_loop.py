"""The training loop's parts, and that a run is reproducible to the bit."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seda_fast import SeDA, SeDAConfig, TrainConfig
from seda_fast.engine import MovingAverage, learning_rate_factor, parameter_groups
from seda_fast.loop import (
    TrainingError,
    TrainingSet,
    batches,
    evenly_spread,
    train,
)

CONFIG = SeDAConfig(visual_dim=8, text_dim=5, n_classes=3, width=16, blocks=2, time_embedding=8, diffusion_steps=60)
SETTINGS = TrainConfig(epochs=3, batch_size=16, learning_rate=3e-3)


def training_set(rows: int = 50) -> TrainingSet:
    generator = torch.Generator().manual_seed(9)
    labels = torch.arange(rows) % 3
    class_text = torch.randn(3, 5, generator=generator)
    class_visual = torch.randn(3, 8, generator=generator)
    return TrainingSet(
        class_visual[labels] + 0.5 * torch.randn(rows, 8, generator=generator),
        class_text[labels] + 0.5 * torch.randn(rows, 5, generator=generator),
        labels,
        torch.ones(rows, dtype=torch.bool),
        torch.arange(rows),
    )


def fresh(seed: int = 0) -> SeDA:
    torch.manual_seed(seed)
    model = SeDA(CONFIG)
    data = training_set()
    model.fit_statistics(torch.zeros(8), torch.ones(8), torch.zeros(5), torch.ones(5), data.visual, data.labels)
    return model


def test_runs_of_one_seed_are_bit_identical_and_seeds_differ() -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        settings = TrainConfig(**{**SETTINGS.__dict__, "seed": seed})
        return train(fresh(), training_set(), settings)[0].state_dict()

    one, two, other = weights(4), weights(4), weights(5)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["learner.head.weight"], other["learner.head.weight"])


def test_training_learns_and_reports_every_epoch() -> None:
    calls: list[tuple[int, int]] = []
    settings = TrainConfig(**{**SETTINGS.__dict__, "epochs": 30})
    model, history = train(fresh(), training_set(), settings, on_step=lambda done, total: calls.append((done, total)))
    assert [epoch.epoch for epoch in history] == list(range(1, 31))
    assert calls[-1] == (120, 120)
    assert len(calls) == 120
    assert history[-1].losses["total"] < 0.7 * history[0].losses["total"]
    assert set(history[0].row()) == {
        "epoch", "loss", "loss_centre", "loss_semantic", "loss_text", "loss_mapped", "loss_textual_head",
        "loss_teacher", "loss_visual", "learning_rate", "seconds",
    }  # fmt: skip
    assert not model.training
    accuracy = (model(training_set().visual).argmax(1) == training_set().labels).float().mean()
    assert accuracy > 0.9


def test_evaluated_weights_are_the_moving_average() -> None:
    """The average of two known weights, by the rule min(decay, (1 + n) / (10 + n)) with n updates before."""
    weight = fresh().learner.head.weight
    average = MovingAverage([weight], 0.9)
    first = weight.detach().clone()
    average.update(0)
    with torch.no_grad():
        weight.add_(1.0)
    average.update(1)
    decay = min(0.9, 2 / 11)
    torch.testing.assert_close(average.values[0], decay * first + (1 - decay) * (first + 1))
    for n in range(2, 202):
        average.update(n)
    before = average.values[0].clone()
    with torch.no_grad():
        weight.add_(1.0)
    average.update(202)
    torch.testing.assert_close(average.values[0], 0.9 * before + 0.1 * weight, rtol=1e-5, atol=1e-6)
    average.store()
    assert torch.equal(weight, average.values[0])


def test_learning_rate_rises_linearly_and_falls_by_half_a_cosine() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)), abs=1e-9)
    assert factors[99] < 1e-3


def test_batches_hold_every_row_once() -> None:
    found = list(batches(23, 5, torch.Generator().manual_seed(1)))
    assert [len(index) for index in found] == [5, 5, 5, 5, 3]
    assert sorted(torch.cat(found).tolist()) == list(range(23))


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 5216, 2**24 + 4, 30_000_001, 2**33 + 3])
def test_rows_that_tell_data_from_others_reach_from_the_first_to_the_last(rows: int) -> None:
    places = evenly_spread(rows, 64)
    assert len(places) == len(places.unique()) == min(rows, 64)
    assert (int(places[0]), int(places[-1])) == (0, rows - 1)
    assert bool((places.diff() <= -(-rows // 63)).all())


def test_only_matrices_decay() -> None:
    groups = parameter_groups(fresh(), 0.3)
    assert {g["weight_decay"] for g in groups} == {0.3, 0.0}
    assert all(p.ndim == 2 for p in groups[0]["params"])  # type: ignore[attr-defined]
    assert all(p.ndim == 1 for p in groups[1]["params"])  # type: ignore[attr-defined]


def test_a_loss_that_is_not_finite_stops_with_its_name() -> None:
    data = training_set()
    data.text[3] = float("inf")
    sentence = r"the loss term text is no longer finite, first in step 1 \(epoch 1\); no checkpoint yet"
    with pytest.raises(TrainingError, match=sentence):
        train(fresh(), data, TrainConfig(epochs=2, batch_size=64))


class Copies(TorchDispatchMode):
    """Counts the copies from the host to a device inside it, and those of them that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.waiting = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            self.all += 1
            self.waiting += not (kwargs or {}).get("non_blocking", False)
        return func(*args, **(kwargs or {}))


def test_an_epoch_s_row_numbers_go_to_the_device_in_one_copy() -> None:
    """A copy from pageable memory waits for the device; one a batch would make each step wait for the one before."""
    fields = (torch.zeros(60, 8), torch.zeros(60, 5), torch.zeros(60, dtype=torch.int64))
    data = TrainingSet(*(f.to("meta") for f in (*fields, torch.ones(60, dtype=torch.bool), torch.arange(60))))
    with Copies() as copies:
        sizes = [len(batch[0]) for batch in data.batches(torch.arange(60).split(14))]
    assert sizes == [14, 14, 14, 14, 4]
    assert copies.all == 1
    assert list(data.batches([])) == []
