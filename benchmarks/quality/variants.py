"""What else was tried of the recipe: changes of a model or of its training, each away from the defaults by one thing.

They exist to be measured (`python -m benchmarks.quality.explore`), not to be used: one that paid would move into the
library. None touches what is frozen: the interaction block's algebra, the two stages with the semantic space between,
text absent at prediction, the contract on randomness of what the library itself draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seda_fast import SeDA, TrainConfig
from seda_fast.nn.interaction import PFIN, Dropout
from seda_fast.nn.schedule import NoiseSchedule, Sampler
from seda_fast.nn.seda import FIRST_DROPOUT, Losses
from seda_fast.nn.visual import GaussianDropout
from seda_fast.ops import embed_condition

from .regimes import Task


def unchanged(model: SeDA, task: Task) -> None:
    """The model as it is."""


@dataclass(frozen=True)
class Variant:
    """A change: ``about`` in words for the table, ``settings`` of model and training, ``change`` of the model itself,
    ``during`` what holds while it trains.

    ``labelled`` ones are defined only where every row has its label.
    """

    about: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[SeDA, Task], None] = unchanged
    labelled: bool = False
    during: Callable[[], AbstractContextManager[object]] = nullcontext


# ------------------------------------------------------------------------------------------------------ objective


class _Watched(SeDA):
    """Keeps what the two stages gave, for terms that `SeDA.losses` does not have."""

    def losses(self, *args: Any, **named: Any) -> Losses:
        seen: dict[str, Tensor] = {}
        hooks = [
            stage.register_forward_hook(lambda module, given, out, name=name: seen.update({name: out}))
            for name, stage in (("s", self.learner), ("t", self.translator))
        ]
        try:
            found = super().losses(*args, **named)
        finally:
            for hook in hooks:
                hook.remove()
        return found._replace(total=found.total + self.extra(found, seen, *args, **named))

    def extra(self, found: Losses, seen: dict[str, Tensor], *args: Any, **named: Any) -> Tensor:
        """What is added to the weighted sum."""
        raise NotImplementedError


class _ThroughMapped(_Watched):
    """w4 also trains the translator: no gradient is stopped before the textual head."""

    def extra(self, found: Losses, seen: dict[str, Tensor], *args: Any, **named: Any) -> Tensor:
        labels, paired, settings = args[2], args[3], named["settings"]
        head = self.translator.head
        logits = F.linear(seen["t"], head.weight.detach(), head.bias.detach()).float()
        known = labels.masked_fill(~paired, -1)
        return settings.mapped_weight * _entropy(logits, known, settings.label_smoothing)


class _StoppedSemantic(SeDA):
    """The translator's terms do not train the learner."""

    def _conditions(self, s: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        return super()._conditions(s.detach(), visual)


def _entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    total = F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=smoothing, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


def _share(rate: float) -> float:
    """How much of the first of two rows a mixture has (Zhang et al. 2018, mixup)."""
    return float(np.random.default_rng(torch.randint(2**31, ()).item()).beta(rate, rate))


class _MixedVisual(SeDA):
    """mixup for the visual head: its term is that of mixed features and labels."""

    rate = 0.4

    def losses(self, *args: Any, **named: Any) -> Losses:
        visual, labels, ids = args[0], args[2], args[4]
        settings: TrainConfig = named["settings"]
        found = super().losses(*args, **{**named, "settings": dataclasses.replace(settings, visual_head_weight=0.0)})
        share, other = _share(self.rate), torch.randperm(len(visual))
        noise = GaussianDropout.of(settings, named["seed"], named["step"], ids, FIRST_DROPOUT + 2 * self.config.blocks)
        hidden = self.visual.hidden(share * visual + (1 - share) * visual[other], noise)
        logits = self.visual.head(hidden).float()
        parts = (_entropy(logits, y, settings.label_smoothing) for y in (labels, labels[other]))
        mixed = sum((w * part for w, part in zip((share, 1 - share), parts, strict=True)), torch.zeros(()))
        return found._replace(total=found.total + settings.visual_head_weight * mixed, visual=mixed)


class _MixedAll(SeDA):
    """mixup of whole triples: features, texts and labels."""

    rate = 0.4

    def losses(self, *args: Any, **named: Any) -> Losses:
        visual, text, labels, *others = args
        share, other = _share(self.rate), torch.randperm(len(visual))
        mixed = [share * x + (1 - share) * x[other] for x in (visual, text)]
        first, second = (super(_MixedAll, self).losses(*mixed, y, *others, **named) for y in (labels, labels[other]))
        return Losses(*(share * a + (1 - share) * b for a, b in zip(first, second, strict=True)))


# ---------------------------------------------------------------------------------------------------------- heads


class _CosineHead(nn.Linear):
    """Logits are a learnt scale times the cosines of the feature and the classes' weights."""

    def __init__(self, dim: int, n_classes: int, weight: Tensor | None = None, scale: float = 16.0) -> None:
        super().__init__(dim, n_classes)
        self.scale = nn.Parameter(torch.tensor(scale))
        if weight is not None:
            self.weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1), self.bias)


class _CosineVisual(SeDA):
    """The visual head's last layer by cosines."""

    def losses(self, *args: Any, **named: Any) -> Losses:
        visual, labels, ids = args[0], args[2], args[4]
        settings: TrainConfig = named["settings"]
        found = super().losses(*args, **{**named, "settings": dataclasses.replace(settings, visual_head_weight=0.0)})
        noise = GaussianDropout.of(settings, named["seed"], named["step"], ids, FIRST_DROPOUT + 2 * self.config.blocks)
        term = _entropy(self.visual.head(self.visual.hidden(visual, noise)).float(), labels, settings.label_smoothing)
        return found._replace(total=found.total + settings.visual_head_weight * term, visual=term)


class _CosineSemantic(_Watched):
    """The semantic head by cosines to weights that begin as the category centres."""

    def losses(self, *args: Any, **named: Any) -> Losses:
        self.semantic_weight = named["settings"].semantic_weight
        settings = dataclasses.replace(named["settings"], semantic_weight=0.0)
        return super().losses(*args, **{**named, "settings": settings})

    def extra(self, found: Losses, seen: dict[str, Tensor], *args: Any, **named: Any) -> Tensor:
        logits = self.learner.head(seen["s"]).float()
        return self.semantic_weight * _entropy(logits, args[2], named["settings"].label_smoothing)


def _cosine_visual(model: SeDA, task: Task) -> None:
    model.__class__ = _CosineVisual
    model.visual.head = _CosineHead(model.config.visual_width, model.config.n_classes)


def _cosine_semantic(model: SeDA, task: Task) -> None:
    model.__class__ = _CosineSemantic
    model.learner.head = _CosineHead(model.config.visual_dim, model.config.n_classes, model.centres)


# ------------------------------------------------------------------------------------------------------ diffusion


class _Warped(NoiseSchedule):
    """The signal rates of the timesteps ``share(tau / T) * T`` in place of tau's: as if those were drawn more often."""

    def __init__(self, steps: int, share: Callable[[np.ndarray[Any, Any]], Any]) -> None:
        super().__init__(steps)
        at = torch.from_numpy(share(np.arange(steps) / (steps - 1)) * (steps - 1)).double()
        below = at.floor().long().clamp(max=steps - 2)
        part = at - below
        self.alpha_bar = self.alpha_bar[below] * (1 - part) + self.alpha_bar[below + 1] * part


def _warp(share: Callable[[np.ndarray[Any, Any]], Any]) -> Callable[[SeDA, Task], None]:
    def change(model: SeDA, task: Task) -> None:
        model.schedule = _Warped(model.config.diffusion_steps, share)
        for buffer, table in zip((model.signal, model.noise), model.schedule.training_tables(), strict=True):
            buffer.copy_(table)

    return change


def _linear_schedule(model: SeDA, task: Task) -> None:
    """The betas rise linearly (Ho et al. 2020), scaled to the number of timesteps."""
    steps = model.config.diffusion_steps
    model.schedule = NoiseSchedule(steps)
    betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64).clamp(max=0.999)
    model.schedule.alpha_bar = torch.cumprod(1 - betas, dim=0)
    for buffer, table in zip((model.signal, model.noise), model.schedule.training_tables(), strict=True):
        buffer.copy_(table)


class _SelfConditioned(PFIN):
    """Reads its own last estimate beside the state (Chen, Zhang & Hinton 2023); in training, in every second step."""

    def forward(  # type: ignore[override]
        self, x: Tensor, condition: Sequence[Tensor], timesteps: Tensor, dropout: Dropout, memory: None
    ) -> Tensor:
        told = torch.cat(tuple(condition), dim=1)
        before = torch.zeros_like(x)
        if int(dropout.step) % 2:
            with torch.no_grad():
                before = self._once(x, before, told, timesteps, dropout)
        return self._once(x, before, told, timesteps, dropout)

    def _once(
        self, x: Tensor, before: Tensor, condition: Tensor, timesteps: Tensor, dropout: Dropout | None = None
    ) -> Tensor:
        normed, gates = embed_condition(
            condition, self.condition.weight, self.condition.bias, self.gates.weight, self.gates.bias
        )
        tables = self.modulation(torch.arange(self.steps, device=x.device))
        state = torch.cat((x, before.to(x.dtype)), dim=1)
        return self._denoise(state, normed, gates, timesteps, tables, dropout, None)

    def chain(  # type: ignore[override]
        self, initial: Tensor, source: Tensor, condition: Tensor, sampler: Sampler, **keys: Any
    ) -> Tensor:
        """Step by step, twice at the first timestep; deterministic samplers only."""
        assert not sampler.noisy
        a, b, c, _, w = sampler.coefficients.unbind(1)
        x, result = initial, torch.zeros_like(initial)
        tau = [timestep.expand(len(x)) for timestep in sampler.timesteps]
        estimate = self._once(x, torch.zeros_like(x), condition, tau[0])
        for i, timestep in enumerate(tau):
            estimate = self._once(x, estimate, condition, timestep)
            result = result + w[i] * estimate
            x = a[i] * estimate + b[i] * x + c[i] * source
        return result


def _self_condition(model: SeDA, task: Task) -> None:
    network, dim = model.translator.network, model.config.text_dim
    network.__class__ = _SelfConditioned
    network.input = nn.Linear(2 * dim, model.config.width)


def _prototypes(model: SeDA, task: Task) -> None:
    """Mean text of each class, from labelled pairs, as the memory of both networks."""
    rows = task.train
    known = (rows.labels >= 0) & ~np.isnan(rows.text).any(1)
    assert model.text_classes is not None
    for label in np.unique(rows.labels[known]):
        model.text_classes[label] = model.standardise_text(
            torch.from_numpy(rows.text[known & (rows.labels == label)])
        ).mean(0)


def _class(kind: type[SeDA]) -> Callable[[SeDA, Task], None]:
    def change(model: SeDA, task: Task) -> None:
        model.__class__ = kind

    return change


# ------------------------------------------------------------------------------------------------------- optimisation


def _steady(step: int, total: int, warmup: float) -> float:
    """The learning rate's factor: a linear rise, then no change; the moving average alone quiets the weights."""
    return min(1.0, (step + 1) / max(1, round(total * warmup)))


def _falling(step: int, total: int, warmup: float) -> float:
    """A linear rise, then a linear fall to 0."""
    rise = max(1, round(total * warmup))
    return min((step + 1) / rise, (total - step) / max(1, total - rise))


def _rate(factor: Callable[[int, int, float], float]) -> Callable[[], AbstractContextManager[object]]:
    return lambda: mock.patch("seda_fast.engine.learning_rate_factor", factor)


class _LongMemory(torch.optim.AdamW):
    """AdamW that remembers squared gradients over 1 000 steps and not 100."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **{**settings, "betas": (0.9, 0.999)})


class _Split(torch.optim.AdamW):
    """AdamW whose matrices are left to another optimiser, at AdamW's learning rate times ``times``."""

    times = 1.0

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        group = next(group for group in self.param_groups if group["weight_decay"] > 0)
        self.matrices = group["params"]
        self.other = self.made(group["params"], self.times * group["lr"], group["weight_decay"])

    def made(self, matrices: Sequence[Tensor], rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """The other optimiser; a step is to shrink a weight by the share that AdamW's would."""
        raise NotImplementedError

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.other.param_groups[0]["lr"] = self.times * self.param_groups[0]["lr"]
        self.other.step()
        for p in self.matrices:
            p.grad = None
        super().step()


class _Muon(_Split):
    """Orthogonalised momentum, scaled to the size of AdamW's steps (Jordan et al. 2024; Liu et al. 2025)."""

    def made(self, matrices: Sequence[Tensor], rate: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.Muon(matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


class _SGD(_Split):
    """Gradient descent with Nesterov's momentum."""

    times = 100.0

    def made(self, matrices: Sequence[Tensor], rate: float, weight_decay: float) -> torch.optim.Optimizer:
        momentum = 0.9
        decay = (1 - momentum) * weight_decay / self.times  # it goes through the momentum, which multiplies it
        return torch.optim.SGD(matrices, lr=rate, momentum=momentum, nesterov=True, weight_decay=decay)


class _FastSGD(_SGD):
    times = 300.0


@contextmanager
def _optimiser(kind: type[torch.optim.Optimizer]) -> Iterator[None]:
    with ExitStack() as patches:
        patches.enter_context(mock.patch("torch.optim.AdamW", kind))
        if issubclass(kind, _Split):  # the pass that clips, updates and averages at once is AdamW's
            patches.enter_context(mock.patch("seda_fast.engine.updates_in_one_pass", return_value=False))
        yield


VARIANTS: dict[str, Variant] = {
    "defaults": Variant("the recipe as it is"),
    "mixup_visual": Variant("mixup (Beta 0.4) for the visual head", change=_class(_MixedVisual), labelled=True),
    "mixup_all": Variant("mixup (Beta 0.4) of whole triples", change=_class(_MixedAll), labelled=True),
    "cosine_visual": Variant("visual head by cosines, learnt scale", change=_cosine_visual, labelled=True),
    "cosine_semantic": Variant("semantic head by cosines to centres", change=_cosine_semantic, labelled=True),
    "through_mapped": Variant("no stopped gradient before the textual head", change=_class(_ThroughMapped)),
    "stopped_semantic": Variant("gradient stopped from translator to learner", change=_class(_StoppedSemantic)),
    "told_semantic": Variant("translator told s alone", {"condition": "semantic"}),
    "told_visual": Variant("translator told v alone", {"condition": "visual"}),
    "more_noise": Variant("noisy timesteps drawn more often (u^0.5)", change=_warp(lambda u: u**0.5)),
    "less_noise": Variant("clean timesteps drawn more often (u^2)", change=_warp(lambda u: u**2)),
    "noisy_half": Variant("only the noisier half of the timesteps", change=_warp(lambda u: 0.5 + 0.5 * u)),
    "linear_schedule": Variant("linear betas and not the cosine schedule", change=_linear_schedule),
    "self_conditioning": Variant("translator reads its last estimate", change=_self_condition),
    "prototypes": Variant("mean text of each class as memory", {"class_text": True}, _prototypes),
    "teacher_cold": Variant("teacher's temperature 1", {"teacher_temperature": 1.0}),
    "teacher_hot": Variant("teacher's temperature 4", {"teacher_temperature": 4.0}),
    "batch_half": Variant("half the rows a batch, as many passes", {"batch_share": 0.5}),
    "batch_double": Variant("twice the rows a batch, as many passes", {"batch_share": 2.0}),
    "warmup_long": Variant("learning rate rises for a fifth of the steps", {"warmup": 0.2}),
    "semantic_light": Variant("w2 0.3: the semantic head's cross entropy", {"semantic_weight": 0.3}),
    "semantic_heavy": Variant("w2 3: the semantic head's cross entropy", {"semantic_weight": 3.0}),
    "text_light": Variant("w3 0.3: distance to the text", {"text_weight": 0.3}),
    "text_heavy": Variant("w3 3: distance to the text", {"text_weight": 3.0}),
    "textual_light": Variant(
        "w4, w5 0.3: the textual head's cross entropies", {"mapped_weight": 0.3, "textual_head_weight": 0.3}
    ),
    "textual_heavy": Variant(
        "w4, w5 3: the textual head's cross entropies", {"mapped_weight": 3.0, "textual_head_weight": 3.0}
    ),
    "no_average": Variant("no moving average of the weights", {"ema_decay": 0.0}),
    "expansion_1": Variant("blocks as wide inside as outside", {"expansion": 1}),
    "expansion_4": Variant("blocks four times as wide inside", {"expansion": 4}),
    "visual_wide": Variant("visual head of twice the width", {"visual_width": 1024}),
    "rate_steady": Variant("learning rate does not fall", during=_rate(_steady)),
    "rate_linear": Variant("learning rate falls linearly", during=_rate(_falling)),
    "betas": Variant("AdamW with betas 0.9, 0.999", during=partial(_optimiser, _LongMemory)),
    "muon": Variant("matrices by Muon", during=partial(_optimiser, _Muon)),
    "sgd": Variant("matrices by SGD, Nesterov 0.9, rate 0.1", during=partial(_optimiser, _SGD)),
    "sgd_fast": Variant("matrices by SGD, Nesterov 0.9, rate 0.3", during=partial(_optimiser, _FastSGD)),
}
