"""``python -m benchmarks.quality.explore``: what each variant of the recipe does on folds of the training parts.

No test part is read. A fold's trainings share its rows and seed, so that differences to the defaults are paired.
What changes only how a trained model predicts is measured on the trainings of the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from seda_fast import SeDA, TrainConfig
from seda_fast.metrics import alignment_metrics, classification_metrics
from seda_fast.nn.schedule import NoiseSchedule, Sampler

from . import workers
from .explored import DEFAULTS, PREFIX, REGIMES, markdown
from .methods import seda_predictions, train_seda
from .regimes import SETS, Task
from .runs import Job, Record, Runs, earlier_recipe, other_file, recorded
from .variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
Float = NDArray[np.float32]


def job(name: str, regime: str, variant: str, fold: int) -> Job:
    """The training of a variant on a fold, in bf16: half the time, and the same for all."""
    return Job(name, regime, PREFIX + variant, f"cv {fold}/3", fold, VARIANTS[variant].settings, "bf16")


def measure(job: Job, task: Task) -> Record:
    """Train a variant and predict the fold's rows; the defaults also in every way of `PREDICTIONS`."""
    torch.manual_seed(job.seed)
    settings = dict(job.settings)
    share = settings.pop("batch_share", None)
    if share is not None:
        rule = TrainConfig().for_rows(len(task.train.labels))
        settings |= {"batch_size": round(share * rule.batch_size), "epochs": rule.epochs}
    variant = VARIANTS[job.method.removeprefix(PREFIX)]
    with variant.during():
        model, seconds = train_seda(task, job.seed, settings, job.precision, variant.change)
    record = recorded(job, task, seda_predictions(model, task, seconds))
    if job.method == DEFAULTS:
        record.metrics.update(_other_predictions(model, task))
    return record


# ---------------------------------------------------------------------------------------- one model, other predictions


def _with(**settings: object) -> Callable[[SeDA, Task], Float]:
    """Predictions with other settings of the model."""

    def predict(model: SeDA, task: Task) -> Float:
        with mock.patch.object(model, "config", dataclasses.replace(model.config, **settings)):  # type: ignore[arg-type]
            return _heads(model, task)[0]

    return predict


def _heads(model: SeDA, task: Task) -> tuple[Float, ...]:
    with torch.inference_mode():
        found = model.predict_log_proba(torch.from_numpy(task.test.visual), heads=True)
    return tuple(x.numpy() for x in found)


def _mean_of_probabilities(model: SeDA, task: Task) -> Float:
    _, *heads = _heads(model, task)
    weighted = zip(model.config.head_weights(len(heads)), heads, strict=True)
    return np.logaddexp.reduce([np.log(w) + x for w, x in weighted])  # type: ignore[no-any-return]


def _sharpened(factor: float) -> Callable[[SeDA, Task], Float]:
    """Log-probabilities times a factor that is the same for all sets."""
    return lambda model, task: log_softmax(factor * _heads(model, task)[0], axis=1)  # type: ignore[no-any-return]


def _scaled(model: SeDA, task: Task) -> Float:
    """Log-probabilities times the factor that is likeliest on the other half of the rows (Guo et al. 2017)."""
    found, labels = _heads(model, task)[0], task.test.labels
    half = np.random.default_rng(0).permutation(len(labels)) % 2 == 0
    result = np.empty_like(found)
    for other in (half, ~half):
        rows = found[~other], labels[~other]

        def likelihood(factor: float, rows: tuple[Float, NDArray[np.int64]] = rows) -> float:
            return -float(log_softmax(factor * rows[0], axis=1)[np.arange(len(rows[1])), rows[1]].mean())

        result[other] = log_softmax(minimize_scalar(likelihood, bounds=(0.1, 10.0)).x * found[other], axis=1)
    return result


PREDICTIONS: dict[str, tuple[str, Callable[[SeDA, Task], Float]]] = {
    "draws_4": ("mean of 4 noise draws", _with(noise_draws=4)),
    "draws_16": ("mean of 16 noise draws", _with(noise_draws=16)),
    "semantic_1": ("1 step of the semantic stage", _with(semantic_steps=1)),
    "semantic_2": ("2 steps of the semantic stage", _with(semantic_steps=2)),
    "semantic_10": ("10 steps of the semantic stage", _with(semantic_steps=10)),
    "semantic_20": ("20 steps of the semantic stage", _with(semantic_steps=20)),
    "semantic_ddim": ("the semantic stage by DDIM, 5 steps", _with(semantic_sampler="ddim")),
    "class_2": ("2 steps of the textual stage to classify", _with(classification_steps=2)),
    "class_5": ("5 steps of the textual stage to classify", _with(classification_steps=5)),
    "class_10": ("10 steps of the textual stage to classify", _with(classification_steps=10)),
    "mean": ("mean of the heads' probabilities, not product", _mean_of_probabilities),
    "sharp_1.25": ("all log-probabilities times 1.25", _sharpened(1.25)),
    "sharp_1.5": ("all log-probabilities times 1.5", _sharpened(1.5)),
    "sharp_2": ("all log-probabilities times 2", _sharpened(2.0)),
    "scaled": ("temperature fitted on the other half of the fold", _scaled),
}
# Ways of the textual stage to draw a text: sampler, steps.
SAMPLINGS: tuple[tuple[Literal["ddim", "renoise", "afresh"], int], ...] = (
    *(("ddim", steps) for steps in (2, 5, 20, 50)),
    *(("renoise", steps) for steps in (5, 10)),
    *(("afresh", steps) for steps in (2, 5, 10)),
)


class _Afresh(NoiseSchedule):
    """A textual stage whose every estimate is noised afresh (Song et al. 2023, algorithm 1); the last is the result."""

    def sampler(self, name: Literal["ddim", "renoise"], sampling_steps: int) -> Sampler:
        found = super().sampler(name, sampling_steps)
        if name == "renoise":  # the semantic stage stays as it is
            return found
        later = self.alpha_bar[found.timesteps[1:]]
        table = torch.zeros_like(found.coefficients)
        table[:-1, 0] = later.float()
        table[:-1, 3] = (later * (1 - later)).sqrt().float()
        table[-1, 4] = 1
        return dataclasses.replace(found, coefficients=table, noisy=sampling_steps > 1)


def _textual(model: SeDA, sampler: Literal["ddim", "renoise", "afresh"]) -> AbstractContextManager[object]:
    """While it holds, the textual stage draws by ``sampler``."""
    if sampler == "afresh":
        return mock.patch.object(model, "schedule", _Afresh(model.config.diffusion_steps))
    return mock.patch.object(model, "config", dataclasses.replace(model.config, textual_sampler=sampler))


def _other_predictions(model: SeDA, task: Task) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, (_, predict) in PREDICTIONS.items():
        metrics = classification_metrics(predict(model, task), task.test.labels)
        found |= {f"{key}_{name}": round(metrics[key], 4) for key in ("top1", "ece")}
    text = model.standardise_text(torch.from_numpy(task.test.text)).numpy()
    for sampler, steps in SAMPLINGS:
        with torch.inference_mode(), _textual(model, sampler):
            mapped = model.align(torch.from_numpy(task.test.visual), steps=steps)[1].numpy()
        metrics = alignment_metrics(mapped, text, seed=0)
        found |= {f"{key}_{sampler}_{steps}": round(metrics[key], 4) for key in ("frechet", "cosine", "recall_at_10")}
    return found


# -------------------------------------------------------------------------------------------------------- the command


def jobs(sets: Sequence[str], regimes: Sequence[str], variants: Sequence[str], folds: int) -> list[Job]:
    """Folds outermost, so that a stopped command leaves every variant measured equally often."""
    return [
        job(name, regime, variant, fold)
        for fold in range(folds)
        for regime in regimes
        for variant in variants
        for name in sets
        if regime == "full" or not VARIANTS[variant].labelled
    ]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.explore", description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the paired sets")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--folds", type=int, choices=range(1, 7), default=3, help="of two partitions into three")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="trainings at a time")
    parser.add_argument("--runs", type=Path, default=ROOT / "benchmarks/results/exploration.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/exploration.md")
    parser.add_argument("--report-only", action="store_true", help="train nothing, write from what is known")
    return parser.parse_args(argv)


def _refusal(chosen: argparse.Namespace, runs: Runs, wanted: Sequence[Job]) -> str:
    """Why the variants cannot be measured, or not beside those that were, in one sentence."""
    for name in chosen.sets:
        if not (chosen.data / f"{SETS[name]}.npz").is_file():
            return f"{chosen.data} has no {SETS[name]}.npz; give --data"
    missing = any(job.key not in runs.records for job in wanted)
    if missing and earlier_recipe(r for r in runs if r.job.method == DEFAULTS):
        return f"{chosen.runs} has trainings of an earlier recipe; name another file by --runs, and a page by --out"
    return other_file(runs, chosen.sets, chosen.data, folds=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 with one sentence where the data is missing or refused."""
    chosen = arguments(argv)
    runs = Runs(chosen.runs)
    if not chosen.report_only:
        wanted = jobs(chosen.sets, chosen.regimes, chosen.variants, chosen.folds)
        refusal = _refusal(chosen, runs, wanted)
        if refusal:
            print(f"benchmarks.quality.explore: {refusal}", file=sys.stderr)
            return 2
        workers.make(runs, wanted, chosen.data, chosen.workers, "exploration", measure)
    text = markdown(runs, {name: about for name, (about, _) in PREDICTIONS.items()}, SAMPLINGS)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
