"""A whole training run by the default recipe, in processes of their own, against the same recipe in plain PyTorch.

Both begin with raw features in memory, prepare them alike, train, and end with the outputs on a test part.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_train import SIZES, SMALL, Plain, assert_same_loss, conditioned, denoised, plain_loss
from seda_fast import FeatureSet, SeDA, SeDAConfig, TrainConfig, reference
from seda_fast.data import EvaluationRows
from seda_fast.engine import learning_rate_factor, parameter_groups
from seda_fast.loop import Trainer, TrainingSet
from seda_fast.measure import peak_memory_bytes
from seda_fast.nn import PFIN
from seda_fast.nn.schedule import Sampler
from seda_fast.outputs import Outputs, model_outputs
from seda_fast.prepare import prepare

# The size of fashion_products; its 20 passes.
ROWS, TEST_ROWS, CLASSES = 5216, 1304, 28
# Deviations of a row between two class centres, over the root of 2.
APART = 2.6
# Rows predicted together by plain PyTorch.
TOGETHER = 1024
COVERS = "both sides fit what is fitted before the training, train, and predict a test part"

RUN = """
import sys, time
start = time.perf_counter()
sys.path.insert(0, sys.argv[1])
from benchmarks import bench_run
bench_run.run(start, sys.argv[2], *map(int, sys.argv[3:]))
"""


def artificial(rows: int, test_rows: int, config: SeDAConfig) -> FeatureSet:
    """Features of classes that overlap, each row with its text; texts tell no more than labels do."""
    rng = np.random.default_rng(0)
    labels = np.arange(rows + test_rows) % config.n_classes

    def features(dim: int) -> Any:
        centres = rng.normal(scale=APART * dim**-0.5, size=(config.n_classes, dim))
        return (centres[labels] + rng.normal(size=(len(labels), dim))).astype(np.float32)

    visual, text = features(config.visual_dim), features(config.text_dim)
    train, test = slice(rows), slice(rows, None)
    return FeatureSet.from_arrays(visual[train], text[train], labels[train], visual[test], labels[test], text[test])


def prepared(rows: int, test_rows: int, classes: int, small: int) -> tuple[FeatureSet, SeDA, TrainingSet]:
    """The data, a model with what is fitted before the training, and the standardised rows, the same on both sides."""
    config = SeDAConfig(**{**SIZES, **(SMALL if small else {}), "n_classes": classes})
    data = artificial(rows, test_rows, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, found = prepare(data, config, TrainConfig().seed, device)
    # Plain PyTorch's objective has no terms for these.
    assert isinstance(found, TrainingSet) and model.teacher is None and model.opinion is None and model.unseen is None
    return data, model, found


def trained(model: SeDA, data: TrainingSet, settings: TrainConfig) -> float:
    """Train by the library; the last pass's loss."""
    precision: Any = "bf16" if data.device.type == "cuda" else "fp32"
    _, history = Trainer(model, data, settings, engine="auto", precision=precision).run()
    return history[-1].losses["total"]


def plainly_trained(model: SeDA, data: TrainingSet, settings: TrainConfig) -> float:
    """The same in plain PyTorch."""
    plain = Plain(model, data, settings.batch_size, plain_loss, settings)
    groups: Any = parameter_groups(model, settings.weight_decay)
    plain.optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)
    parts = -(-len(data) // settings.batch_size)
    total = settings.epochs * parts
    for epoch in range(settings.epochs):
        loss = torch.zeros((), device=data.device)
        for part, index in enumerate(torch.randperm(len(data)).to(data.device).split(settings.batch_size)):
            step = epoch * parts + part
            for group in plain.optimiser.param_groups:
                group["lr"] = settings.learning_rate * learning_rate_factor(step, total, settings.warmup)
            # As in ours the average forgets its start.
            plain.moved = 1 - min(settings.ema_decay, (1 + step) / (10 + step)) if step else 1.0
            loss += plain.step(index) * len(index)
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), plain.average)
    model.eval()
    return float(loss) / len(data)


Noise = Callable[[Tensor, int], Tensor]


def plain_chain(net: PFIN, source: Tensor, condition: Tensor, sampler: Sampler, noise: Noise) -> Tensor:
    """A stage's sampling, what does not change from step to step made once. ``noise(like, step)`` draws."""
    c, gates = conditioned(net, condition)
    tables, here = net.modulation(sampler.timesteps), torch.arange(len(sampler.timesteps), device=source.device)
    x = sampler.initial_signal * source + sampler.initial_noise * noise(source, 0)
    result = torch.zeros_like(x)
    for i, (a, b, fresh, e, w) in enumerate(sampler.coefficients.tolist()):
        estimate = denoised(net, x, c, gates, tables, here[i : i + 1], 0.0)
        result = result + w * estimate
        if i + 1 < len(here):
            x = a * estimate + b * x + fresh * source
            x = x + e * noise(source, i + 1) if sampler.noisy else x
    return result


def plain_outputs(model: SeDA, raw: Tensor, semantic_noise: Noise, textual_noise: Noise) -> tuple[Tensor, ...]:
    """`Outputs`, in their order, of raw features (B, Dv): the learner's stage once, the translator's twice."""
    config, v = model.config, model.standardise_visual(raw)
    samplers = [
        model.schedule.sampler(name, steps).to(raw.device)
        for name, steps in (
            (config.semantic_sampler, config.semantic_steps),
            (config.textual_sampler, config.textual_steps),
            (config.textual_sampler, config.classification_steps),
        )
    ]
    s = plain_chain(model.learner.network, v, v, samplers[0], semantic_noise)
    condition, blank = torch.cat((s, v), dim=1), v.new_zeros(len(v), config.text_dim)
    aligned, point = (
        plain_chain(model.translator.network, blank, condition, sampler, textual_noise) for sampler in samplers[1:]
    )
    logits = [model.learner.head(s), model.translator.head(point), model.visual(v)]
    logits += [model.kernel(v)] if model.kernel.fitted else []
    heads = [F.log_softmax(head, dim=1) for head in logits]
    weighted = zip(config.head_weights(len(heads)), heads, strict=True)
    combined = F.log_softmax(torch.stack([weight * head for weight, head in weighted]).sum(0), dim=1)
    return combined, *heads[:3], s, aligned, point, *heads[3:]


def plainly_predicted(model: SeDA, part: EvaluationRows) -> Outputs:
    """`model_outputs` in plain PyTorch, with PyTorch's random numbers."""

    def blocks() -> Iterator[tuple[Tensor, ...]]:
        for raw in torch.from_numpy(np.asarray(part.visual)).split(TOGETHER):
            found = plain_outputs(model, raw.to(model.centres.device), *[lambda like, step: torch.randn_like(like)] * 2)
            yield tuple(output.cpu() for output in found)

    with torch.inference_mode():
        return Outputs(*(torch.cat(output).numpy() for output in zip(*blocks(), strict=True)))


def run(start: float, who: str, rows: int, test_rows: int, classes: int, epochs: int, small: int) -> None:
    """One side's whole run, which began at ``start``; prints the last pass's loss, the share of the test rows that were
    predicted rightly, seconds and peak bytes."""
    torch.manual_seed(0)
    data, model, found = prepared(rows, test_rows, classes, small)
    settings = TrainConfig(epochs=epochs).for_rows(rows)
    if who == "eager":
        loss = plainly_trained(model, found, settings)
        outputs = plainly_predicted(model, data.test_part)
    else:
        loss = trained(model, found, settings)
        outputs = model_outputs(model, data.test_part)
    right = float((outputs.log_proba.argmax(1) == data.label_test).mean())
    print(loss, right, time.perf_counter() - start, peak_memory_bytes(found.device))


def assert_same_outputs(model: SeDA, raw: Tensor) -> None:
    """With the same random numbers, in float64, both sides' outputs agree, of any weights: a new network has zeros."""
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.05 * torch.randn_like(weights)
    ids, seed = torch.arange(len(raw), device=raw.device), torch.tensor(0, device=raw.device)

    def noise(stream: int) -> Noise:
        return lambda like, step: reference.normals(seed, seed + step, ids, like.shape[1], stream).to(like.dtype)

    wide = model.double()
    with torch.inference_mode():
        expected = plain_outputs(wide, raw.double(), noise(4), noise(5))
        combined, *heads = wide.predict_log_proba(raw.double(), heads=True)
        point = wide.align(raw.double(), steps=wide.config.classification_steps)[1]
        found = (combined, *heads[:3], *wide.align(raw.double()), point, *heads[3:])
    for got, known in zip(found, expected, strict=True):
        torch.testing.assert_close(got, known, rtol=1e-6, atol=1e-6)


def check(told: dict[str, list[float]]) -> None:
    """Both sides' last losses and hits, of one recipe and other random numbers."""
    (loss, right), (plain, plainly_right) = (told[who] for who in ("seda_fast", "eager"))
    assert abs(loss - plain) <= 0.1 * plain, f"a last loss of {loss:.4f}, eager's {plain:.4f}"
    assert abs(right - plainly_right) <= 0.1, f"{right:.1%} of the test rows are right, eager's {plainly_right:.1%}"


@pytest.mark.timeout(1800)
def bench_run(contest: Any, quick: bool, whole_run: Any) -> None:
    """From the start of the process to the outputs; both draw the same data."""
    rows, test_rows, epochs = (64, 64, 1) if quick else (ROWS, TEST_ROWS, 20)
    few = (4 * CLASSES, CLASSES, CLASSES, 1)
    data, model, found = prepared(*few)
    assert_same_loss(model, found, 64)
    assert_same_outputs(model, torch.from_numpy(np.asarray(data.visual_test)).to(found.device))
    sizes = [str(n) for n in (rows, test_rows, CLASSES, epochs, int(quick))]
    root = str(Path(__file__).resolve().parents[1])
    commands = {name: [sys.executable, "-c", RUN, root, name, *sizes] for name in ("seda_fast", "eager")}
    whole_run(contest, f"a whole run, {rows} rows, {epochs} passes", commands, 1 if quick else 3, check, COVERS)
