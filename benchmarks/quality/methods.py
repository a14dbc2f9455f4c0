"""What is compared: SeDA, its ablations, the baselines, and two peers; each from a task to predictions."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from seda_fast import SeDA, SeDAConfig, TrainConfig
from seda_fast.arrays import mean_and_deviation
from seda_fast.baselines import Baseline, LinearSettings, fit_baseline
from seda_fast.data import FeatureSet
from seda_fast.engine import PrecisionName
from seda_fast.loop import Trainer
from seda_fast.nn.interaction import PFIN
from seda_fast.nn.kernel_head import judged_rows
from seda_fast.nn.scaling import POWERS, ROWS, best_power, scale_of
from seda_fast.nn.schedule import NoiseSchedule
from seda_fast.prepare import prepare

from .regimes import Rows, Task

Float = NDArray[np.float32]
Settings = Mapping[str, Any]
SEDA, LINEAR, MLP, ONE_STEP, ONE_STEP_MSE = "seda", "linear", "mlp", "one_step", "one_step_mse"
MLP_PSEUDO, BRIDGE = "mlp_pseudo", "bridge"
PEERS = (ONE_STEP_MSE, MLP_PSEUDO, BRIDGE)
DCSL_ONLY = "seda:dcsl_only"
ABLATIONS = (DCSL_ONLY, "seda:no_semantic_space", "seda:no_interaction", "seda:one_step", "seda:no_teacher")
METHODS = (SEDA, LINEAR, MLP, ONE_STEP, *PEERS, *ABLATIONS)
LINEAR_SETTINGS = {f.name for f in fields(LinearSettings)}
# Against the best of these the accuracy of SeDA is held.
BASELINES = (LINEAR, MLP, ONE_STEP, *PEERS)
# They see no text, neither in training nor by labels that a text gave.
TEXT_FREE = (LINEAR, MLP)


@dataclass(frozen=True)
class Fitted:
    """Predictions on a task's test rows: log_proba (M, K); where the method maps to texts, aligned (M, Dt) as samples
    and point (M, Dt) as point estimates, both standardised; seconds of training; SeDA's semantic, textual, visual
    and, where there is one, kernel head by themselves, (M, K) each."""

    log_proba: Float
    aligned: Float | None
    point: Float | None
    seconds: float
    heads: tuple[Float, ...] | None = None

    def weighted(self, visual_weight: float) -> Float | None:
        """SeDA's prediction (M, K), not normalised, of the three heads that are trained, had the visual one this weight
        and the other two half of the rest each; None where there are no heads."""
        if self.heads is None:
            return None
        semantic, textual, visual = self.heads[:3]
        return visual_weight * visual + (1 - visual_weight) / 2 * (semantic + textual)

    def with_kernel(self, kernel_weight: float) -> Float | None:
        """SeDA's prediction (M, K), not normalised, had the kernel head this weight; None where there is none."""
        three = self.weighted(SeDAConfig.visual_weight)
        if self.heads is None or three is None or len(self.heads) < 4:
            return None
        return kernel_weight * self.heads[3] + (1 - kernel_weight) * three


def standardised(task: Task, seed: int) -> Task:
    """The task in the units of its training rows, as SeDA with this ``seed`` itself standardises and scales."""
    v, t = (_mean_and_scale(_Known.of(values, task, seed)) for values in (task.train.visual, task.train.text))
    train, test = (Rows((r.visual - v[0]) / v[1], (r.text - t[0]) / t[1], r.labels) for r in (task.train, task.test))
    return Task(train, test, task.n_classes)


@dataclass(frozen=True)
class _Known:
    """Features without missing rows, told from others by ``digest``, the labels of these rows, and a seed."""

    digest: str
    seed: int
    values: Float = field(compare=False, repr=False)
    labels: NDArray[np.int64] = field(compare=False, repr=False)
    n_classes: int = field(compare=False)

    @classmethod
    def of(cls, values: Float, task: Task, seed: int) -> _Known:
        """The rows of ``values`` (N, D), one of the two features of ``task.train``."""
        known = ~np.isnan(values).any(1)
        values, labels = values[known], task.train.labels[known]
        digest = hashlib.sha256(str(values.shape).encode() + values.tobytes() + labels.tobytes()).hexdigest()
        return cls(digest, seed, values, labels, task.n_classes)


@lru_cache(maxsize=8)
def _mean_and_scale(known: _Known) -> tuple[Float, Float]:
    if not len(known.values):  # no row has a text: what is measured by texts has nothing to go by
        width = known.values.shape[1]
        return np.zeros(width, np.float32), np.ones(width, np.float32)
    mean, deviation = mean_and_deviation(known.values)
    labels, power = torch.from_numpy(known.labels), POWERS[0]
    judged = judged_rows(labels, torch.ones_like(labels, dtype=torch.bool), ROWS, known.seed)
    if len(judged):
        rows = (known.values[judged.numpy()] - mean) / scale_of(deviation, 1.0)
        power = best_power(torch.from_numpy(rows), deviation, labels[judged], known.n_classes)
    return mean.astype(np.float32), scale_of(deviation, power).astype(np.float32)


def fit(method: str, task: Task, seed: int, settings: Settings, precision: PrecisionName = "fp32") -> Fitted:
    """Train one of `METHODS` on ``task.train`` and predict ``task.test`` from its visual features.

    ``precision`` is that of SeDA's training; all others train in float32.
    """
    name, _, ablation = method.partition(":")
    if name == SEDA:
        model, seconds = train_ablated(task, seed, settings, ablation, precision)
        return seda_predictions(model, task, seconds)
    task = standardised(task, seed)
    if name == MLP_PSEUDO:
        return _baseline(MLP, Task(_pseudo_labelled(task.train), task.test, task.n_classes), seed, settings)
    if name == ONE_STEP_MSE:
        return _one_step_mse(task, seed, settings)
    if name == BRIDGE:
        return _bridge(task, seed, settings)
    return _baseline(name, task, seed, settings)


def _baseline(name: str, task: Task, seed: int, settings: Settings) -> Fitted:
    rows = task.train
    fitted = fit_baseline(name, rows.visual, rows.text, rows.labels, n_classes=task.n_classes, seed=seed, **settings)
    aligned = fitted.aligned(task.test.visual)
    return Fitted(fitted.log_proba(task.test.visual), aligned, aligned, fitted.seconds)


# ------------------------------------------------------------------------------ pairs alone, then their labelled texts


@dataclass(frozen=True)
class _Pairs:
    """Visual and textual features, told from others by ``digest``."""

    digest: str
    rows: Rows = field(compare=False, repr=False)
    n_classes: int

    @classmethod
    def of(cls, task: Task) -> _Pairs:
        """Those that ``task`` trains on."""
        found = hashlib.sha256()
        for array in (task.train.visual, task.train.text):
            found.update(str(array.shape).encode() + array.tobytes())
        return cls(found.hexdigest(), task.train, task.n_classes)


def sharing(method: str, settings: Settings) -> tuple[tuple[str, Any], ...] | None:
    """The settings of what two trainings of a method share on the same pairs, whatever their labels: the mapping, and
    of the bridge the text diffusion; None where they share nothing."""
    if method == ONE_STEP_MSE:
        return tuple(sorted((k, v) for k, v in settings.items() if k not in LINEAR_SETTINGS))
    if method == BRIDGE:
        return tuple((name, {**_BRIDGE, **settings}[name]) for name in _BRIDGE_TRAINING)
    return None


@lru_cache(maxsize=8)
def _mapping(pairs: _Pairs, seed: int, settings: tuple[tuple[str, Any], ...]) -> Baseline:
    """`one_step_mse`'s, whose labels train nothing but its probe."""
    rows = pairs.rows
    return fit_baseline(
        ONE_STEP_MSE, rows.visual, rows.text, rows.labels, n_classes=pairs.n_classes, seed=seed, **dict(settings)
    )


def _one_step_mse(task: Task, seed: int, settings: Settings) -> Fitted:
    """What `fit_baseline` gives, from a mapping that other labels and other probes share."""
    shared = sharing(ONE_STEP_MSE, settings)
    assert shared is not None
    mapping = _mapping(_Pairs.of(task), seed, shared)
    rows = task.train
    known = ~np.isnan(rows.text).any(1) & (rows.labels >= 0)
    text, probed = rows.text[known], {k: v for k, v in settings.items() if k in LINEAR_SETTINGS}
    probe = fit_baseline(LINEAR, text, text, rows.labels[known], n_classes=task.n_classes, seed=seed, **probed)
    aligned = mapping.aligned(task.test.visual)
    assert aligned is not None
    return Fitted(probe.log_proba(aligned), aligned, aligned, mapping.seconds + probe.seconds)


def _pseudo_labelled(rows: Rows) -> Rows:
    """Unlabelled pairs get the class that a classifier of the labelled texts gives their text."""
    known, paired = rows.labels >= 0, ~np.isnan(rows.text).any(1)
    unknown = ~known & paired
    if not unknown.any():
        return rows
    told, labels = known & paired, rows.labels.copy()
    classifier = _text_classifier(rows.labels[told]).fit(rows.text[told], rows.labels[told])
    labels[unknown] = classifier.predict(rows.text[unknown])
    return Rows(rows.visual, rows.text, labels)


def _text_classifier(labels: NDArray[np.int64]) -> LogisticRegression | LogisticRegressionCV:
    """With the penalty that up to five folds of the labelled rows choose."""
    folds = min(5, int(np.unique(labels, return_counts=True)[1].min()))
    if folds < 2:
        return LogisticRegression(max_iter=1000)
    parts = StratifiedKFold(folds, shuffle=True, random_state=0)
    return LogisticRegressionCV(Cs=[0.01, 0.1, 1.0, 10.0, 100.0], cv=parts, max_iter=1000, scoring="accuracy")


# ------------------------------------------------------------------------------------------------------ SeDA

_MODEL_FIELDS = set(SeDAConfig.__dataclass_fields__)
_ABLATED: dict[str, dict[str, Any]] = {
    "": {},
    # The semantic stage alone: no text is looked at, neither in training nor in prediction.
    "dcsl_only": {"textual_weight": 0.0, "visual_weight": 0.0, "kernel_weight": 0.0, "text_weight": 0.0,
                  "mapped_weight": 0.0, "textual_head_weight": 0.0, "teacher_weight": 0.0},
    "no_semantic_space": {"condition": "visual"},
    "no_interaction": {},
    "one_step": {"semantic_steps": 1, "textual_steps": 1},
    "no_teacher": {"teacher_weight": 0.0},
}  # fmt: skip


def _train_config(rows: int, settings: Settings, seed: int) -> TrainConfig:
    """The settings of a training; ``length`` among them multiplies the passes that the rule gives ``rows``."""
    chosen = dict(settings)
    length = chosen.pop("length", None)
    config = TrainConfig(seed=seed, **chosen)
    return config if length is None else replace(config, epochs=round(length * config.for_rows(rows).epochs))


Change = Callable[[SeDA, Task], object]


def train_seda(
    task: Task, seed: int, settings: Settings, precision: PrecisionName, change: Change
) -> tuple[SeDA, float]:
    """A SeDA trained on ``task.train`` with model and training ``settings``, and the seconds that took.

    ``change`` is given the model before its training, with the statistics of the task's data in it.
    """
    model_settings = {k: v for k, v in settings.items() if k in _MODEL_FIELDS}
    train_settings = {k: v for k, v in settings.items() if k not in _MODEL_FIELDS}
    rows = task.train
    sizes = {"visual_dim": rows.visual.shape[1], "text_dim": rows.text.shape[1], "n_classes": task.n_classes}
    begin = time.perf_counter()
    config = _train_config(len(rows.labels), train_settings, seed)
    shape = SeDAConfig(**sizes, **model_settings)
    model, data = prepare(_feature_set(task), shape, seed, torch.device("cpu"), label_share=config.label_share)
    change(model, task)
    model, _ = Trainer(model, data, config, precision=precision).run(lambda done, total: None)
    return model, time.perf_counter() - begin


def train_ablated(
    task: Task, seed: int, settings: Settings, ablation: str, precision: PrecisionName
) -> tuple[SeDA, float]:
    """What `train_seda` gives of SeDA without what ``ablation`` names, one of `ABLATIONS` without "seda:"; whole where
    it is empty."""

    def ablate(model: SeDA, task: Task) -> None:
        if ablation in ("dcsl_only", "no_teacher"):
            model.teacher = model.opinion = None
        if ablation == "no_teacher":
            _refit_kernel_head(model, task, seed)
        if ablation == "no_interaction":
            for stage in (model.learner, model.translator):
                stage.network.gates.requires_grad_(False)  # at its initial 0, so that g = 1

    return train_seda(task, seed, {**settings, **_ABLATED[ablation]}, precision, ablate)


def _refit_kernel_head(model: SeDA, task: Task, seed: int) -> None:
    """On the labelled rows alone, as where a model has no teacher of pairs."""
    rows = task.train.take(task.train.labels >= 0)
    visual, labels = torch.from_numpy(rows.visual), torch.from_numpy(rows.labels)
    paired = torch.zeros(len(labels), dtype=torch.bool)
    model.set_kernel_head(model.standardise_visual(visual), torch.from_numpy(rows.text), labels, paired, seed)


@torch.inference_mode()
def seda_predictions(model: SeDA, task: Task, seconds: float) -> Fitted:
    """What a trained ``model`` says of the task's test rows."""
    visual = torch.from_numpy(task.test.visual)
    log_proba, *heads = (x.numpy() for x in model.predict_log_proba(visual, heads=True))
    aligned = model.align(visual)[1].numpy()
    point = model.align(visual, steps=1)[1].numpy()
    return Fitted(log_proba, aligned, point, seconds, tuple(heads))


def _feature_set(task: Task) -> FeatureSet:
    train, test = task.train, task.test
    return FeatureSet(
        visual_train=train.visual,
        text_train=train.text,
        label_train=train.labels,
        visual_test=test.visual,
        label_test=test.labels,
        text_test=None,
        class_names=tuple(map(str, range(task.n_classes))),
        ids_train=np.arange(len(train.labels)),
        ids_test=np.arange(len(test.labels)),
        source="benchmark",
    )


# ------------------------------------------------------------------------------------------------------ bridge

# How the text diffusion and its one-step mapping are trained, and how a text is drawn and classified.
_BRIDGE_TRAINING = {"epochs": 40, "batch_size": 256, "learning_rate": 1e-3, "width": 512, "blocks": 3}
_BRIDGE = {**_BRIDGE_TRAINING, "start": 0.5, "steps": 10, "probe_c": 1.0}
_Denoiser = Callable[[Tensor, float, int], Tensor]


def _bridge(task: Task, seed: int, settings: Settings) -> Fitted:
    """The idea of Diffusion Bridge (CVPR 2025): a diffusion model of the texts alone, started midway.

    The one-step mapping's output is noised to ``start`` of the schedule and denoised in ``steps`` by a model that saw
    no image; a linear probe on real texts, of inverse penalty ``probe_c``, classifies the result.
    """
    chosen = {**_BRIDGE, **settings}
    shared = sharing(BRIDGE, settings)
    assert shared is not None
    mapping, denoise, seconds = _bridge_networks(_Pairs.of(task), seed, shared)
    begin = time.perf_counter()
    known = ~np.isnan(task.train.text).any(1) & (task.train.labels >= 0)
    probe = LogisticRegression(C=chosen["probe_c"], max_iter=1000).fit(task.train.text[known], task.train.labels[known])
    seconds += time.perf_counter() - begin
    mapped = mapping.aligned(task.test.visual)
    assert mapped is not None
    aligned = denoise(torch.from_numpy(mapped), chosen["start"], chosen["steps"]).numpy()
    log_proba = np.full((len(aligned), task.n_classes), -np.inf, np.float32)
    log_proba[:, probe.classes_] = probe.predict_log_proba(aligned)
    return Fitted(log_proba, aligned, mapped, seconds)


@lru_cache(maxsize=8)
def _bridge_networks(
    pairs: _Pairs, seed: int, training: tuple[tuple[str, Any], ...]
) -> tuple[Baseline, _Denoiser, float]:
    """The mapping, the text diffusion and the seconds that they took."""
    mapping = _mapping(pairs, seed, ())
    begin = time.perf_counter()
    text = torch.from_numpy(pairs.rows.text[~np.isnan(pairs.rows.text).any(1)])
    denoise = _text_diffusion(text, seed, dict(training))
    return mapping, denoise, mapping.seconds + time.perf_counter() - begin


def _text_diffusion(text: Tensor, seed: int, chosen: Settings) -> _Denoiser:
    """Train an unconditional denoiser of ``text`` (N, Dt); returns the map from a starting point to a sample."""
    schedule = NoiseSchedule(1000)
    abar = schedule.alpha_bar.float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PFIN(
            text.shape[1], 1, width=chosen["width"], expansion=2, blocks=chosen["blocks"], time_embedding=64, steps=1000
        )
        optimiser = torch.optim.AdamW(network.parameters(), lr=chosen["learning_rate"], weight_decay=0.05, fused=True)
        total = chosen["epochs"] * -(-len(text) // chosen["batch_size"])
        schedule_lr = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
        for _ in range(chosen["epochs"]):
            for rows in torch.randperm(len(text)).split(chosen["batch_size"]):
                tau = torch.randint(0, 1000, (len(rows),)).sort().values
                rate = abar[tau][:, None]
                noised = rate.sqrt() * text[rows] + (1 - rate).sqrt() * torch.randn_like(text[rows])
                estimate = network(rate.sqrt() * noised, text.new_zeros(len(rows), 1), tau)
                optimiser.zero_grad(set_to_none=True)
                (estimate - text[rows]).square().mean().backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
                schedule_lr.step()

    @torch.inference_mode()
    def denoise(point: Tensor, start: float, count: int) -> Tensor:
        steps = [round(999 * start * (1 - i / count)) for i in range(count)]
        generator = torch.Generator().manual_seed(seed)
        rate = abar[steps[0]]
        x = rate.sqrt() * point + (1 - rate).sqrt() * torch.randn(point.shape, generator=generator)
        for step, after in zip(steps, [*steps[1:], None], strict=True):
            rate = abar[step]
            tau = torch.full((len(x),), step)
            clean = network(rate.sqrt() * x, x.new_zeros(len(x), 1), tau)
            if after is None:
                return clean
            noise = (x - rate.sqrt() * clean) / (1 - rate).sqrt()
            x = abar[after].sqrt() * clean + (1 - abar[after]).sqrt() * noise
        return x

    return denoise
