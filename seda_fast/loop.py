"""The training loop: batches, optimiser, exponential moving average, history."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .config import TrainConfig
from .nn import Losses, SeDA

Tensors = tuple[Tensor, ...] | list[Tensor]


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one sentence."""


@dataclass(frozen=True)
class TrainingSet:
    """Standardised training triples on the training device.

    ``visual`` (N, Dv) and ``text`` (N, Dt) float32, finite; ``labels`` (N,) int64, -1 unlabelled; ``paired`` (N,) bool,
    whether the row has a text; ``sample_ids`` (N,) int64.
    """

    visual: Tensor
    text: Tensor
    labels: Tensor
    paired: Tensor
    sample_ids: Tensor

    def __len__(self) -> int:
        return self.visual.shape[0]

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The rows ``index`` (B,) of every field, in the order of `SeDA.losses`."""
        return (
            self.visual[index],
            self.text[index],
            self.labels[index],
            self.paired[index],
            self.sample_ids[index],
        )


@dataclass(frozen=True)
class Epoch:
    """One row of the history: mean of each loss term over the epoch's rows, and the last learning rate."""

    epoch: int
    losses: dict[str, float]
    learning_rate: float
    seconds: float

    def row(self) -> dict[str, float]:
        """Flat, for ``history.csv``; the loss columns start with ``loss``."""
        terms = {("loss" if name == "total" else f"loss_{name}"): value for name, value in self.losses.items()}
        return {"epoch": self.epoch, **terms, "learning_rate": self.learning_rate, "seconds": self.seconds}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay, biases do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def moving_average(model: SeDA, decay: float) -> AveragedModel:
    """An exponential moving average that forgets its start: update n uses ``min(decay, (1 + n) / (10 + n))``."""

    def update(averaged: Tensors, current: Tensors, n: Tensor | int) -> None:
        now = min(decay, (1 + float(n)) / (10 + float(n)))
        torch._foreach_lerp_(averaged, current, 1 - now)

    return AveragedModel(model, multi_avg_fn=update)


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Linear rise over the first ``warmup`` share of the steps, then a half cosine down to 0."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, total - rise)
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * progress, dtype=torch.float64))))


def batches(rows: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch's shuffled index batches, int64; every row once, the last batch may be smaller."""
    yield from torch.randperm(rows, generator=generator).split(batch_size)


def train(
    model: SeDA,
    data: TrainingSet,
    settings: TrainConfig,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[SeDA, list[Epoch]]:
    """Train ``model`` in place on standardised triples; its statistics must be set (`SeDA.fit_statistics`).

    Args:
        on_step: called after each optimiser step with (steps done, steps in all).

    Returns:
        The model carrying the moving average of the weights, in evaluation mode, and a row per epoch.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    device = data.visual.device
    optimiser = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.99), fused=True
    )
    steps_per_epoch = -(-len(data) // settings.batch_size)
    total_steps = settings.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate_factor(step, total_steps, settings.warmup)
    )
    average = moving_average(model, settings.ema_decay)
    order = torch.Generator().manual_seed(settings.seed)
    seed = torch.tensor(settings.seed, dtype=torch.int64, device=device)
    step = torch.zeros((), dtype=torch.int64, device=device)
    history: list[Epoch] = []
    model.train()
    done = 0
    for epoch in range(1, settings.epochs + 1):
        started = time.perf_counter()
        sums = torch.zeros(len(Losses._fields), dtype=torch.float64, device=device)
        rate = settings.learning_rate
        for index in batches(len(data), settings.batch_size, order):
            rate = float(schedule.get_last_lr()[0])
            batch = data.rows(index.to(device))
            losses = model.losses(*batch, seed=seed, step=step, settings=settings)
            optimiser.zero_grad(set_to_none=True)
            losses.total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimiser.step()
            schedule.step()
            average.update_parameters(model)
            step += 1
            done += 1
            sums += torch.stack([term.detach().double() for term in losses]) * len(index)
            on_step(done, total_steps)
        means = dict(zip(Losses._fields, (sums / len(data)).tolist(), strict=True))
        history.append(Epoch(epoch, means, rate, time.perf_counter() - started))
        _refuse_non_finite(history[-1])
    model.load_state_dict(average.module.state_dict())
    return model.eval(), history


def _refuse_non_finite(epoch: Epoch) -> None:
    for name, value in epoch.losses.items():
        if name != "total" and value - value != 0:
            raise TrainingError(f"the loss term {name} became {value} in epoch {epoch.epoch}")
