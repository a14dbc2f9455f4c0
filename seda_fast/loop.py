"""The training loop: epochs and batches, history, checkpoints, and stopping without loss."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import Checkpoint, Checkpoints
from .config import ConfigError, TrainConfig
from .engine import TERMS, Batch, EngineName, PrecisionName, Rows, Stepper, matrix_precision, sent
from .files import DataError
from .interrupt import Interrupted, Interrupts
from .nn import SeDA
from .ranks import ALONE, Ranks
from .surroundings import undisturbed

# Looks for losses gone bad, and, of several ranks with GPUs, for signals: after so many seconds, as a signal has to be
# heard, and what a GPU was told before be done, within `interrupt.GRACE_SECONDS`; and after so many steps at most.
LOOK_SECONDS, LOOK_STEPS = 1.0, 50
# Rows by which a checkpoint tells its data from other data.
_TOLD_BY = 64


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one sentence."""


@dataclass(frozen=True)
class TrainingSet:
    """Standardised training triples on the training device.

    ``visual`` (N, Dv) and ``text`` (N, Dt) float32, finite; ``labels`` (N,) int64, -1 unlabelled; ``paired`` (N,) bool,
    whether the row has a text; ``sample_ids`` (N,) int64. With ``text_classes`` (K, Dt) a row's text is its class's,
    and ``text`` is (N, 0).
    """

    visual: Tensor
    text: Tensor
    labels: Tensor
    paired: Tensor
    sample_ids: Tensor
    text_classes: Tensor | None = None

    def __len__(self) -> int:
        return self.visual.shape[0]

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self.visual.device

    @property
    def on_device(self) -> bool:
        """A batch is a gather on the device."""
        return True

    def rows(self, index: Tensor) -> Batch:
        """The rows ``index`` (B,) of every field, in the order of `SeDA.losses`."""
        labels = self.labels[index]
        return (
            self.visual[index],
            self.text[index] if self.text_classes is None else self.text_classes[labels.clamp(min=0)],
            labels,
            self.paired[index],
            self.sample_ids[index],
        )

    def batches(self, parts: Iterable[Tensor]) -> Iterator[Batch]:
        """`rows` of each of ``parts``, which lie on the host."""
        todo = list(parts)
        if not todo:
            return
        order = sent(torch.cat(todo), self.device)
        for index in order.split(list(map(len, todo))):
            yield self.rows(index)


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


@dataclass(frozen=True)
class Keeping:
    """What a run keeps while it is unfinished.

    Attributes:
        checkpoints: where to, and from where `Trainer.resume` takes the newest; None on all ranks but the first.
        every: epochs between checkpoints; a fraction for several an epoch.
        interrupts: asked after each step whether to stop.
        resume: whether to go on from the newest checkpoint, where there is one. All ranks have the same.
    """

    checkpoints: Checkpoints | None
    every: float = 1.0
    interrupts: Interrupts | None = None
    resume: bool = False


@dataclass(frozen=True)
class Telling:
    """Whom a run tells its losses while it trains.

    Attributes:
        every: steps between two times. All ranks have the same.
        write: called with the step, the mean of each loss term over the rows since the last time, and the step's
            learning rate.
    """

    every: int
    write: Callable[[int, Mapping[str, float], float], None]


def batches(rows: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch's shuffled index batches, int64; every row once, the last batch may be smaller."""
    yield from torch.randperm(rows, generator=generator).split(batch_size)


def evenly_spread(rows: int, most: int) -> Tensor:
    """Numbers of at most ``most`` of the rows, the first and the last among them, int64 (n,), ascending."""
    count = min(rows, most)
    # In integers: float32 does not tell the last of more than 2**24 rows from the one that would follow it.
    return torch.arange(count) * (rows - 1) // max(1, count - 1)


class Trainer:
    """One training of ``model`` on standardised triples; its statistics must be set (`SeDA.fit_statistics`).

    Args:
        engine, precision: see `engine.plan`; the parameters stay in their own dtype.
        keeping: None keeps nothing. Either all ranks have one or none has.
        ranks: those that train together; each batch is shared among them.
        telling: None tells nobody.
        say: called with a sentence on what a user should know (a fallback of the engine, where a resumed run starts).
    """

    def __init__(
        self,
        model: SeDA,
        data: Rows,
        settings: TrainConfig,
        *,
        engine: EngineName = "eager",
        precision: PrecisionName = "fp32",
        keeping: Keeping | None = None,
        ranks: Ranks = ALONE,
        telling: Telling | None = None,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        settings = settings.for_rows(len(data))
        self.model, self.data, self.settings, self._keeping, self._say = model, data, settings, keeping, say
        self._telling = telling
        self.steps_per_epoch = -(-len(data) // settings.batch_size)
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.stepper = Stepper(
            model, data, settings, self.total_steps, engine=engine, precision=precision, ranks=ranks, say=say
        )
        self._precision, self._ranks = precision, ranks
        self._order = torch.Generator().manual_seed(settings.seed)
        self.history: list[Epoch] = []
        # Batches done and seconds spent of the epoch that is under way, and the shuffling's state at its start.
        self._batch, self._seconds = 0, 0.0
        self._order_state = self._order.get_state()
        self._last_checkpoint: Path | None = None
        # The step of the next look, that and time of the last, and how many steps lay between the two before.
        self._look_at, self._looked, self._waiting = 0, (0, time.perf_counter()), 0
        # Microseconds a step, on the slowest rank; not known yet.
        self._pace = 10**9
        # The epoch's sums when losses were last told, what earlier epochs added since then, and the rows since then.
        self._told, self._carried = torch.zeros_like(self.stepper.sums), torch.zeros_like(self.stepper.sums)
        self._untold_rows = 0

    @property
    def seconds(self) -> float:
        """Time spent on the steps so far, those before a resumption included."""
        return sum(epoch.seconds for epoch in self.history) + self._seconds

    def run(self, on_step: Callable[[int, int], None] = lambda done, total: None) -> tuple[SeDA, list[Epoch]]:
        """Train to the end; ``on_step`` is called after each optimiser step with (steps done, steps in all).

        Returns:
            The model carrying the moving average of the weights, in evaluation mode, and a row per epoch.

        Raises:
            TrainingError: a loss or a weight is no longer finite.
            Interrupted: a signal asked to stop; a checkpoint is written.
            DataError: a checkpoint cannot be written.
        """
        self.model.train()
        try:
            with matrix_precision(self._precision):
                while len(self.history) < self.settings.epochs:
                    self._epoch(on_step)
        except BaseException:
            with suppress(DataError):  # why the run ends is what counts
                self._finish_checkpoint()
            raise
        self._finish_checkpoint()
        self._refuse_bad_state()
        self.stepper.average.store()
        return self.model.eval(), self.history

    def _epoch(self, on_step: Callable[[int, int], None]) -> None:
        stepper, started = self.stepper, time.perf_counter() - self._seconds
        parts = list(batches(len(self.data), self.settings.batch_size, self._order))
        rate = stepper.rate()
        for _ in stepper.steps(parts[self._batch :]):
            self._tell(len(parts[self._batch]), rate)
            self._batch += 1
            on_step(stepper.done, self.total_steps)
            if self._batch < len(parts):
                self._seconds = time.perf_counter() - started
                self._keep()
                rate = stepper.rate()
        self._refuse_non_finite()
        self._carried += stepper.sums - self._told
        self._told.zero_()
        means = dict(zip(TERMS, (stepper.gather_sums() / len(self.data)).tolist(), strict=True))
        self.history.append(Epoch(len(self.history) + 1, means, rate, time.perf_counter() - started))
        stepper.sums.zero_()
        self._batch, self._seconds, self._order_state = 0, 0.0, self._order.get_state()
        self._keep()

    def _tell(self, rows: int, rate: float) -> None:
        """Count the ``rows`` of the step just done, and tell the losses where it is time."""
        if self._telling is None:
            return
        self._untold_rows += rows
        done = self.stepper.done
        if done % self._telling.every and done != self.total_steps:
            return
        means = dict(zip(TERMS, (self._untold() / self._untold_rows).tolist(), strict=True))
        self._carried.zero_()
        self._told.copy_(self.stepper.sums)
        self._untold_rows = 0
        self._telling.write(done, means, rate)

    def _untold(self) -> Tensor:
        """What all ranks added to the losses since they were told last; each must ask.

        Ranks may have handed their sums to the first since then, which changes nothing of it.
        """
        return self._ranks.add(self._carried + self.stepper.sums - self._told)

    def _refuse_non_finite(self, newest: bool = True) -> int:
        """Raises TrainingError where a loss on any rank is not finite; returns the signal that any rank got, or 0.

        Waits for all ranks, who settle together when they do so next, and as `Stepper.look` does for the device.
        """
        interrupts = self._keeping.interrupts if self._keeping is not None else None
        requested = (interrupts.requested or 0) if interrupts is not None else 0
        found, requested, pace = self.stepper.look(requested, lambda: self._measured_pace(newest), newest)
        self._look_again(pace)
        self._refuse_bad_loss(found)
        return requested

    def _measured_pace(self, newest: bool) -> int:
        """Microseconds a step since the last look, or as known then; asked right after waiting for the device."""
        (step, then), self._looked = self._looked, (self.stepper.done, time.perf_counter())
        told, since = self._waiting, self.stepper.done - step
        # A look that leaves the newest steps to the device has seen it do those that were told before the last one;
        # one at the newest leaves none, and the look after it, which waits for nothing, learns no pace.
        self._waiting = 0 if newest else since
        seen = since if newest else min(told, since)
        return int(1e6 * (self._looked[1] - then) / seen) if seen else self._pace

    def _look_again(self, pace: int) -> None:
        """After as many steps as take `LOOK_SECONDS`, at the ``pace`` of the slowest rank, in microseconds a step."""
        self._pace = pace
        self._look_at = self.stepper.done + max(1, min(LOOK_STEPS, int(1e6 * LOOK_SECONDS / max(1, pace))))

    def _refuse_bad_loss(self, found: tuple[int, str] | None) -> None:
        if found is None:
            return
        step, term = found
        what = "the weighted sum of the losses" if term == "total" else f"the loss term {term}"
        epoch = (step - 1) // self.steps_per_epoch + 1
        raise TrainingError(f"{what} is no longer finite, first in step {step} (epoch {epoch}); {self._kept()}")

    def _refuse_bad_state(self) -> None:
        """Raises TrainingError where the last step left weights or moments that are not finite, though no loss was:
        a gradient overflowed. The next loss would tell, but a checkpoint of now would not be a good one."""
        name = self.stepper.first_non_finite()
        if name is not None:
            done = self.stepper.done
            epoch = -(-done // self.steps_per_epoch)
            what = f"{name} is no longer finite after step {done}"
            raise TrainingError(f"{what} (epoch {epoch}); {self._kept()}")

    def _kept(self) -> str:
        """The checkpoint to go on from; where the newest, which may still be written, fails, the one before it."""
        if not self._ranks.first and self._keeping is not None:
            return "the first rank names the last good checkpoint"
        failed = ""
        try:
            self._finish_checkpoint()
        except DataError as error:
            assert self._keeping is not None and self._keeping.checkpoints is not None
            self._last_checkpoint = self._keeping.checkpoints.newest_path()
            failed = f" ({error})"
        kept = f"the last good checkpoint is {self._last_checkpoint}" if self._last_checkpoint else "no checkpoint yet"
        return kept + failed

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Look whether all is well, write a checkpoint where one is due, and stop where a signal asked for it."""
        keeping, done = self._keeping, self.stepper.done
        if keeping is not None and keeping.checkpoints is not None:
            keeping.checkpoints.raise_failure()  # no use to train on to the next one
        due = keeping is not None and (done % self._steps_between(keeping.every) == 0 or done == self.total_steps)
        told = keeping is not None and keeping.interrupts is not None and keeping.interrupts.requested is not None
        if not (due or (told and self._ranks.alone) or self._time_to_look()):
            return
        # Of several GPUs those steps that were told since the look before are left to the devices.
        newest = due or self._ranks.alone or self.data.device.type == "cpu"
        signum = self._refuse_non_finite(newest)
        if keeping is None or not (due or signum):
            return
        if not newest:
            self._refuse_non_finite()
        self._refuse_bad_state()
        tensors = {**self.stepper.tensors(), **self._some_rows, "order": self._order_state}
        state = self._state()
        tensors["untold"] = self._untold()
        tensors["sums"] = self.stepper.gather_sums()
        if keeping.checkpoints is not None:
            self._last_checkpoint = keeping.checkpoints.save(done, tensors, state)
        if signum:
            self._finish_checkpoint()
            where = f"; --resume continues from {self._last_checkpoint}" if keeping.checkpoints is not None else ""
            raise Interrupted(f"stopped in step {done} of {self.total_steps}{where}", signum)

    def _steps_between(self, epochs: float) -> int:
        """Of two checkpoints, so many epochs apart; of more than there are, at the end alone."""
        return max(1, round(min(epochs, self.settings.epochs) * self.steps_per_epoch))

    def _time_to_look(self) -> bool:
        """Whether to wait for the device: always on a CPU, which has no queue; never for the sake of a look on one GPU,
        which is told of the losses of the look before; together on several."""
        if self.data.device.type == "cpu":
            return True
        if self.stepper.done < self._look_at:
            return False
        if self._ranks.alone:
            found = self.stepper.glance()
            self._look_again(self._measured_pace(newest=False))
            self._refuse_bad_loss(found)
            return False
        return True

    def _finish_checkpoint(self) -> None:
        if self._keeping is not None and self._keeping.checkpoints is not None:
            self._keeping.checkpoints.finish()

    def _state(self) -> dict[str, Any]:
        return {
            "batch": self._batch,
            "seconds": self._seconds,
            "untold_rows": self._untold_rows,
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
            "scaler": self.stepper.scaler.state_dict(),
            # As they are now: the next steps, which count on, come while this is written.
            "fallbacks": {what: dict(how) for what, how in self.stepper.fallbacks.items()},
            "rows": len(self.data),
            "labels": self._labels_digest,
            "settings": {
                "train": dataclasses.asdict(self.settings),
                "model": dataclasses.asdict(self.model.config),
            },
            "ran_on": self._ran_on(),
        }

    def _ran_on(self) -> dict[str, Any]:
        """What a continued run must share with its beginning to be bit-identical."""
        return {
            "engine": self.stepper.plan.used,
            "precision": self._precision,
            "device": self.data.device.type,
            "ranks": self._ranks.world,
            "torch": torch.__version__,
            "processor": _processor(self.data.device),
            **({"threads": torch.get_num_threads()} if self.data.device.type == "cpu" else {}),
            "backends": self.stepper.backends(),
            **({"attention": self.stepper.attention.used} if self.stepper.attention is not None else {}),
        }

    def resume(self) -> bool:
        """Go to where the newest checkpoint was written; false where there is none. All ranks must call this.

        Raises:
            DataError: no checkpoint can be used, or it is of other data.
            ConfigError: it is of a run with other settings.
        """
        checkpoints = self._keeping.checkpoints if self._keeping is not None else None
        found = checkpoints.newest() if checkpoints is not None else None
        if found is not None:
            self._check_same_run(found)
            try:
                self.stepper.load(found.tensors)
                self._order_state = found.tensors["order"].clone()
                untold = found.tensors["untold"]
            except (KeyError, ValueError) as error:
                raise DataError(f"the checkpoint {found.path} is not of this version ({error})") from error
            self._last_checkpoint = found.path
        state = json.loads(self._ranks.spread_text(json.dumps(found.state if found is not None else None)))
        if state is None:
            return False
        self.stepper.spread()
        self._ranks.spread(self._order_state)
        self._order.set_state(self._order_state)
        if state["scaler"]:  # empty where the run began in another precision
            self.stepper.scaler.load_state_dict(state["scaler"])
        self.stepper.add_fallbacks(state.get("fallbacks", {}))
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        self._batch, self._seconds = int(state["batch"]), float(state["seconds"])
        # Nobody counted them in a run that told nobody.
        self._untold_rows = int(state["untold_rows"]) if self._telling is not None else 0
        if found is not None and self._untold_rows:
            self._carried.copy_(untold)
        self._told.copy_(self.stepper.sums)
        self._looked = (self.stepper.done, time.perf_counter())
        self._say(f"continuing after step {self.stepper.done} of {self.total_steps}, from {self._last_checkpoint}")
        return True

    @cached_property
    def _labels_digest(self) -> str:
        """What tells the rows' labels, and which of them have a text, from those of other data."""
        parts = (self.data.labels.cpu().numpy(), self.data.paired.cpu().numpy())
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()

    @cached_property
    def _some_rows(self) -> dict[str, Tensor]:
        """Standardised features and texts of some rows, spread over the training part, by their names there."""
        index = evenly_spread(len(self.data), _TOLD_BY)
        visual, text, *_ = self.data.rows(index.to(self.data.device))
        return {"some_visual": visual, "some_text": text}

    def _check_same_run(self, found: Checkpoint) -> None:
        state = found.state
        own = self._state()
        if any(state.get(name, own[name]) != own[name] for name in ("rows", "labels")):
            raise DataError(f"the checkpoint {found.path} is of a run on other data")
        for section, settings in own["settings"].items():
            _refuse_difference(settings, state.get("settings", {}).get(section, {}), found.path)
        statistics = ["visual_mean", "visual_scale", "text_mean", "text_scale", "centres"]
        statistics += ["text_classes"] if self.model.config.class_text else []
        told = {f"model.{name}": getattr(self.model, name) for name in statistics} | self._some_rows
        same = all(
            # Ranks in another number add up in another order.
            torch.allclose(found.tensors[name].to(value.device), value, rtol=1e-4, atol=1e-5)
            for name, value in told.items()
            if name in found.tensors
        )
        if not same:
            raise DataError(f"the checkpoint {found.path} is of a run on other data")
        for name, value in self._ran_on().items():
            before = state.get("ran_on", {}).get(name)
            if before != value:
                self._say(f"continuing with {name} {value} after {before}: close to, but not the same bits as, one run")


def _processor(device: torch.device) -> str:
    """What decides how the vendor's matrix products add: a GPU's name, a CPU's instruction set."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def _refuse_difference(own: Mapping[str, Any], before: Mapping[str, Any], path: Path) -> None:
    for name, value in own.items():
        if before.get(name) != value:
            raise ConfigError(f"{name} is {value!r}, but the run to resume began with {before.get(name)!r} ({path})")


@undisturbed()
def train(
    model: SeDA,
    data: Rows,
    settings: TrainConfig,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[SeDA, list[Epoch]]:
    """Train ``model`` in place, eagerly and without checkpoints; see `Trainer`."""
    return Trainer(model, data, settings).run(on_step)
