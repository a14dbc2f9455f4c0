"""``python -m seda_fast.train``: train SeDA and the baselines, evaluate, and write everything to one folder.

The folder holds ``config.toml`` (every setting in force), ``model.safetensors``, ``history.csv`` (a row an epoch),
``metrics.json``, ``outputs.safetensors`` (what the metrics were computed from) and ``report/*.png``. It appears whole
or not at all; until then the run lives in ``OUT.unfinished`` beside it, with checkpoints from which ``--resume``
continues to the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from . import _eval_extra  # noqa: F401 - checks first that what measuring needs is installed
from .arrays import labelled_rows
from .arrays import rows as float_rows
from .baselines import BASELINES, Baseline, enough_epochs, fit_baseline
from .checkpoint import Checkpoints
from .command import choose_device, out_of_memory, progress, report, run, settings_of
from .config import ConfigError, SeDAConfig, TrainConfig, check_given, check_range, check_types, setting
from .data import EvaluationRows, FeatureSet, told_rows, told_texts
from .engine import EngineName, PrecisionName, Rows
from .events import EventLog, event_log, require_tensorboard
from .figures import write_figures
from .files import atomic_path
from .interrupt import Interrupts
from .loop import Epoch, Keeping, Telling, Trainer, TrainingSet
from .measure import (
    alignment,
    class_metrics,
    outputs_metrics,
    peak_memory_bytes,
    refuse_unpredictable,
    standardised_text,
    table,
    versions,
)
from .nn import SeDA
from .nn.multi_label import labelled_rows as are_labelled
from .nn.scaling import Scaling
from .nn.unseen import classes_without_pairs
from .outputs import Outputs
from .prepare import prepare
from .profiling import Profile, profiled
from .ranks import ALONE, Ranks, job, joined, restarted
from .results import (
    CONFIG_FILE,
    HISTORY_FILE,
    METRICS_FILE,
    OUTPUTS_FILE,
    REPORT_FOLDER,
    TRACE_FILE,
    results_folder,
    unfinished_folder,
    write_history,
    write_settings,
)
from .sharded import sharded_outputs

PROGRAM = "seda_fast.train"
# Between two lines on how far a training is, where there is no terminal for a progress bar.
_SECONDS_BETWEEN_LINES = 30.0
# Samples whose way through the steps is drawn.
_PATH_SAMPLES = 12
_FROM_DATA = ("visual_dim", "text_dim", "n_classes", "class_text", "multi_label")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run reads and writes."""

    data: str = setting("digits", "a .npz or .safetensors file, a folder of .npy files, or digits (embedded)")
    out: str = setting("runs/seda", "folder for the results")
    overwrite: bool = setting(False, "replace the results of an earlier run in that folder")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to train")
    unpaired: Literal["refuse", "keep"] = setting("refuse", "what to do with rows whose text is missing")
    test_fraction: float = setting(0.2, "share of the rows to hold out where the data has no test part")
    baselines: bool = setting(True, "train and measure the baselines too")
    engine: EngineName = setting("auto", "what runs a training step; auto goes by the device")
    precision: PrecisionName = setting("fp32", "of products and activations; the weights stay float32")
    checkpoint_every: float = setting(1.0, "epochs between checkpoints; a fraction for several an epoch")
    memory_share: float = setting(0.5, "share of the device's free memory beyond which features stay in their files")
    profile: bool = setting(False, "write trace.json of some steps, and print the share of time of each operation")
    resume: bool = setting(False, "continue the unfinished run to that folder")
    tensorboard: str = setting(
        "", "folder for TensorBoard's event files, in a folder named as the results; none without"
    )
    log_every: int = setting(10, "steps between two entries of the losses for TensorBoard")

    def __post_init__(self) -> None:
        check_types(self)
        check_given(self, "data", "out")
        check_range(self, "test_fraction", 0 < self.test_fraction < 1, "between 0 and 1")
        check_range(self, "memory_share", 0 <= self.memory_share <= 1, "in 0 .. 1")
        check_range(self, "log_every", self.log_every >= 1, "at least 1")
        check_range(self, "checkpoint_every", 0 < self.checkpoint_every < float("inf"), "positive")


SECTIONS: dict[str, type] = {"run": RunConfig, "model": SeDAConfig, "train": TrainConfig}


@dataclass(frozen=True)
class Settings:
    """A run's settings, and the model's as far as they are given; its sizes come from the data."""

    run: RunConfig
    train: TrainConfig
    model: dict[str, Any]

    def model_config(self, data: FeatureSet) -> SeDAConfig:
        """The model's settings with the data's sizes.

        Raises:
            ConfigError: a size was given and the data has another.
        """
        sizes: dict[str, Any] = {"visual_dim": data.visual_dim, "text_dim": data.text_dim, "n_classes": data.n_classes}
        sizes |= {"class_text": data.text_classes is not None, "multi_label": data.multi_label}
        for name, size in sizes.items():
            if self.model.get(name, size) != size:
                raise ConfigError(f"{name} is set to {self.model[name]!r} but {data.source} has {size}")
        return SeDAConfig(**{**self.model, **sizes})


def parse(argv: Sequence[str] | None) -> Settings:
    """Settings from defaults, then ``--config FILE``, then the command line."""
    given = settings_of(PROGRAM, __doc__, SECTIONS, argv, skip=_FROM_DATA)
    return Settings(RunConfig(**given["run"]), TrainConfig(**given["train"]), given["model"])


def fit_baselines(rows: TrainingSet, config: SeDAConfig, settings: TrainConfig) -> dict[str, Baseline]:
    """All baselines that these standardised rows can train, with the settings they were tuned for."""
    # Not by a gather of all rows, and on the host: as they are, they may take up to half of a device's memory.
    labels, paired = rows.labels.cpu(), rows.paired.cpu()
    text = rows.text.cpu() if rows.text_classes is None else rows.text_classes.cpu()[labels.clamp(min=0)]
    text = text.masked_fill(~paired[:, None], float("nan"))
    arrays = (rows.visual.cpu().numpy(), text.numpy(), labels.numpy())
    labelled, with_text = labelled_rows(arrays[2]), paired.numpy()
    learned = {"mlp": labelled, "one_step": labelled | with_text, "one_step_mse": with_text}
    found = {}
    with progress(len(BASELINES), "baselines") as bar:
        for name in BASELINES:
            bar.set_postfix_str(name)
            options: dict[str, Any] = {
                "n_classes": config.n_classes,
                "seed": settings.seed,
                "device": str(rows.visual.device),
            }
            if name in learned:
                options["epochs"] = enough_epochs(int(learned[name].sum()))
            with _left_out(f"the baseline {name} cannot be trained on these rows and is"):
                found[name] = fit_baseline(name, *arrays, **options)
            bar.update()
    return found


@contextmanager
def _left_out(what: str) -> Iterator[None]:
    """Goes on, with a sentence, where a baseline cannot be had: SeDA needs less of the rows, and of the memory, and its
    training, which is done, is not lost for that."""
    try:
        yield
    except (ValueError, MemoryError, RuntimeError) as error:
        lacking = out_of_memory(error) is not None
        if isinstance(error, RuntimeError) and not lacking:
            raise
        report(PROGRAM, f"{what} left out: {'there is not enough memory' if lacking else error}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what this one took in vain is the next one's


def baseline_results(
    baselines: dict[str, Baseline], model: SeDA, part: EvaluationRows
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """The baselines' metrics by name, and the arrays they were computed from."""
    raw = torch.from_numpy(float_rows(part.visual, np.arange(len(part.visual))))
    with torch.inference_mode():
        visual = model.standardise_visual(raw.to(model.centres.device)).cpu().numpy()
    text = standardised_text(model, part)
    metrics: dict[str, Any] = {}
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, baseline in baselines.items():
        with _left_out(f"the baseline {name} cannot be measured on the test part and is"):
            log_proba, aligned = baseline.log_proba(visual), baseline.aligned(visual)
            measured: dict[str, Any] = {**class_metrics(log_proba, part.labels), "alignment": None}
            if aligned is not None:
                measured["alignment"] = alignment(aligned, text)
                arrays[f"{name}.aligned"] = aligned
            arrays[f"{name}.log_proba"] = log_proba
            metrics[name] = {**measured, "seconds": baseline.seconds}
    return metrics, arrays


def write_report(folder: Path, model: SeDA, part: EvaluationRows, outputs: Outputs, history: Sequence[Epoch]) -> None:
    """The pictures of ``report/``."""
    some = np.linspace(0, len(part.visual) - 1, min(_PATH_SAMPLES, len(part.visual))).astype(np.int64)
    everything = np.arange(len(part.visual))
    device = model.centres.device
    with torch.inference_mode():
        raw = torch.from_numpy(float_rows(part.visual, everything)).to(device)
        ids = torch.from_numpy(np.asarray(part.ids)).to(device)
        semantic_path, aligned_path = model.alignment_path(raw[some], ids[some])
        visual = model.standardise_visual(raw).cpu().numpy()
    write_figures(
        folder,
        history=[epoch.row() for epoch in history],
        labels=part.labels,
        predicted=outputs.log_proba if model.config.multi_label else outputs.log_proba.argmax(1),
        class_names=model.class_names,
        visual=visual,
        semantic=outputs.semantic,
        aligned=outputs.aligned,
        text=standardised_text(model, part),
        semantic_path=semantic_path.cpu().numpy(),
        aligned_path=aligned_path.cpu().numpy(),
        centres=model.centres.cpu().numpy(),
    )


def lines(trainer: Trainer, say: Callable[[str], None]) -> Callable[[int, int], None]:
    """Says now and then how far a training is and what its last whole epoch's loss was; asked after each step."""
    told = time.perf_counter()

    def line(done: int, total: int) -> None:
        nonlocal told
        if time.perf_counter() - told > _SECONDS_BETWEEN_LINES:
            told, past = time.perf_counter(), trainer.history[-1:]
            loss = f", loss {past[0].losses['total']:.4f} in epoch {past[0].epoch}" if past else ""
            say(f"step {done} of {total}{loss}")

    return line


def _begin(trainer: Trainer, keeping: Keeping, events: EventLog | None, nothing: str) -> None:
    """Go on where the run was left, if that is asked for and it was (if it was not, say ``nothing``); else drop what an
    earlier one has left, as now nothing but the training can fail."""
    resumed = keeping.resume and trainer.resume()
    if keeping.resume and not resumed and keeping.checkpoints is not None:
        report(PROGRAM, nothing)
    if not resumed and keeping.checkpoints is not None:
        keeping.checkpoints.start_anew(job())
    if events is not None:
        events.start(trainer.stepper.done, anew=not keeping.resume)


def fit(
    model: SeDA,
    rows: Rows,
    settings: Settings,
    keeping: Keeping,
    ranks: Ranks = ALONE,
    trace: Path | None = None,
    events: EventLog | None = None,
) -> tuple[SeDA, list[Epoch], dict[str, Any]]:
    """Train, or continue training; returns the model, its history, and what ``metrics.json`` says of it.

    ``trace`` is where the trace of a profiled training goes, None without; ``events`` is told the losses.
    """

    def say(sentence: str) -> None:
        if ranks.first:
            report(PROGRAM, sentence)

    trainer = Trainer(
        model,
        rows,
        settings.train,
        engine=settings.run.engine,
        precision=settings.run.precision,
        keeping=keeping,
        ranks=ranks,
        telling=None if events is None else Telling(settings.run.log_every, events.losses),
        say=say,
    )
    _begin(trainer, keeping, events, f"there is no unfinished run to {settings.run.out}; starting at the beginning")
    resumed_after, before = trainer.stepper.done, trainer.seconds
    started = time.perf_counter()
    assert keeping.interrupts is not None
    found = Profile({})
    left = trainer.total_steps - resumed_after
    if trace is not None and not left:
        say("--profile looks at nothing: no step of the training is left")
    with (
        progress(trainer.total_steps, "training") as bar,
        profiled(trace, rows.device, left, found) as recorder,
        keeping.interrupts.deferred(),
    ):
        bar.update(resumed_after)

        # Where no bar is shown, a log file say.
        line = lines(trainer, say) if bar.disable else lambda done, total: None

        def on_step(done: int, total: int) -> None:
            recorder.step()
            bar.update()
            line(done, total)

        model, history = trainer.run(on_step)
    seconds = before + time.perf_counter() - started
    return model, history, {
        "seconds": seconds,
        "epochs": trainer.settings.epochs,
        "batch_size": trainer.settings.batch_size,
        "samples_per_second": trainer.settings.epochs * len(rows) / seconds,
        "peak_memory_bytes": peak_memory_bytes(rows.device),
        "engine": trainer.stepper.report(),
        "ranks": ranks.world,
        "data": "on the device" if rows.on_device else "in its files",
        "precision": settings.run.precision,
        "resumed_after_step": resumed_after,
        **({"attention": trainer.stepper.attention._asdict()} if trainer.stepper.attention is not None else {}),
        **({"profile": found} if found.shares else {}),
    }  # fmt: skip


def _prepared(
    data: FeatureSet, config: SeDAConfig, settings: Settings, device: torch.device, ranks: Ranks
) -> tuple[SeDA, Rows]:
    chosen = settings.train
    return prepare(
        data,
        config,
        chosen.seed,
        device,
        ranks=ranks,
        memory_share=settings.run.memory_share,
        label_share=chosen.label_share,
        scaling=Scaling(chosen.visual_scaling, chosen.text_scaling),
    )


def _worth_saying(run: RunConfig, data: FeatureSet, rows: Rows, model: SeDA) -> Iterator[str]:
    """Sentences on settings that change nothing here, and on classes that no text shows."""
    if data.split is None and run.test_fraction != RunConfig().test_fraction:
        yield f"test_fraction is not used: {data.source} has a test part of its own"
    if not run.tensorboard and run.log_every != RunConfig().log_every:
        yield "log_every is not used: it is of --tensorboard"
    if not model.config.has_memory and model.config.memory_heads != SeDAConfig.memory_heads:
        yield "memory_heads is not used: only of data with one text a class have the networks a memory"
    mapped = any(isinstance(array, np.memmap) for array in (data.visual_train, data.text_train))
    in_memory = rows.device.type == "cpu" and not mapped
    if in_memory and run.memory_share != RunConfig().memory_share:
        yield "memory_share is not used: only a folder of .npy files with a test part of its own is read batch by batch"
    classes = model.config.n_classes
    lone = None if model.config.class_text else classes_without_pairs(rows.labels, rows.paired, classes)
    if lone is not None and rows.paired.any():
        untaught = model.teacher is None and bool((rows.paired & ~are_labelled(rows.labels)).any())
        yield (
            f"{len(lone)} of {classes} classes have labelled rows but none with a text: only images tell of these"
            + (", and no teacher labels the unlabelled pairs" if untaught else "")
        )


def train_and_evaluate(
    settings: Settings, draft: Path | None, keeping: Keeping, ranks: Ranks = ALONE, events: EventLog | None = None
) -> str:
    """The whole run into ``draft``; returns the table to print. Without a draft only this rank's share of the work."""
    device = choose_device(settings.run.device)
    data = FeatureSet.load(
        settings.run.data,
        unpaired=settings.run.unpaired,
        test_fraction=settings.run.test_fraction,
        seed=settings.train.seed,
    )
    config = settings.model_config(data)
    began = time.perf_counter()
    model, rows = _prepared(data, config, settings, device, ranks)
    prepare_seconds = time.perf_counter() - began
    # What could not be predicted or measured is refused now, not after hours.
    refuse_unpredictable(model, data.visual_test, data.source)
    standardised_text(model, data.test_part)
    for sentence in _worth_saying(settings.run, data, rows, model) if ranks.first else ():
        report(PROGRAM, sentence)
    if settings.run.baselines and not isinstance(rows, TrainingSet):
        raise ConfigError(
            "the training part is larger than memory_share allows and stays in its files, but the baselines would "
            "load it whole; give --no-baselines"
        )
    trace = draft / TRACE_FILE if draft is not None and settings.run.profile else None
    model, history, training = fit(model, rows, settings, keeping, ranks, trace, events)
    profile = training.pop("profile", None)
    part = data.test_part
    with progress(len(part.visual), "predicting") as bar:
        outputs = sharded_outputs(model, part, ranks, on_rows=bar.update)
    if draft is None:
        return ""
    metrics = outputs_metrics(outputs, model, part)
    metrics["train"] = {**training, "prepare_seconds": prepare_seconds}  # standardising, and what is fitted before
    absence = {"reason": model.kernel.absence} if model.kernel.absence else {}
    metrics["kernel_head"] = {"rows": len(model.kernel.rows), **absence}
    metrics["label_share"] = model.label_share
    metrics["scaling"] = model.scaling._asdict() if model.scaling else {}
    arrays = {**outputs.arrays(), "labels": part.labels, "ids": part.ids}
    metrics["baselines"] = {}
    if settings.run.baselines and isinstance(rows, TrainingSet):
        with _left_out("the baselines are"):
            found = fit_baselines(rows, config, settings.train)
            metrics["baselines"], more = baseline_results(found, model, part)
            arrays.update(more)
    if events is not None:
        events.metrics(metrics)
    metrics.update(
        data=data.source, split=data.split, test_rows=told_rows(part.visual, part.labels),
        test_texts=told_texts(part), seed=settings.train.seed,
        device=str(device), versions=versions(),
    )  # fmt: skip
    model.save_pretrained(draft)
    sections = {
        # What a repetition of the run must not do unasked is left out.
        "run": {**dataclasses.asdict(settings.run), "resume": False, "overwrite": False},
        "model": dataclasses.asdict(config),
        "train": dataclasses.asdict(settings.train),
    }
    write_settings(draft / CONFIG_FILE, sections)
    write_history(draft / HISTORY_FILE, history)
    (draft / METRICS_FILE).write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(draft / OUTPUTS_FILE) as file:
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, file)
    write_report(draft / REPORT_FOLDER, model, part, outputs, history)
    shown = {"SeDA": metrics, **{f"  {name} head": values for name, values in metrics["heads"].items()}}
    shown["SeDA, point estimate"] = {**metrics, "alignment": metrics["alignment_point"]}
    results = table({**shown, **metrics["baselines"]})
    return results if profile is None else f"{results}\n\n{profile.table()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or with one sentence on stderr 2, or 128 + n when signal n stopped it."""

    def body() -> None:
        settings = parse(argv)
        with Interrupts() as interrupts, joined(choose_device(settings.run.device)) as ranks:
            run_on(settings, ranks, interrupts)

    return run(body, PROGRAM)


def run_on(settings: Settings, ranks: Ranks, interrupts: Interrupts) -> None:
    """One rank's whole run; the first one's has the results folder, and prints."""
    out, options = Path(settings.run.out), settings.run
    if options.tensorboard:
        require_tensorboard()
    say, again = partial(report, PROGRAM), restarted(ranks)
    # What torchrun starts anew has the arguments that it had, and must not drop what it did.
    goes_on = again and ranks.first and Checkpoints(unfinished_folder(out), say).begun_by(job())
    resume = bool(ranks.largest([options.resume or goes_on])[0])
    keeping = Keeping(None, options.checkpoint_every, interrupts, resume)
    if not ranks.first:
        silent = EventLog(None) if options.tensorboard else None
        train_and_evaluate(settings, None, keeping, ranks, silent)
        return
    told = Path(options.tensorboard) / out.absolute().name if options.tensorboard else None
    with (
        results_folder(
            out, overwrite=options.overwrite, resume=resume, report=say, undisturbed=interrupts.deferred
        ) as (draft, checkpoints),
        event_log(told, overwrite=options.overwrite, resume=resume) as events,
    ):
        keeping = dataclasses.replace(keeping, checkpoints=checkpoints)
        shown = train_and_evaluate(settings, draft, keeping, ranks, events if told is not None else None)
    print(shown)
    print(f"\nresults: {out}")


if __name__ == "__main__":
    sys.exit(main())
