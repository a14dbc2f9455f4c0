"""From checked data to what the loop takes: a new model with the data's statistics, and standardised rows."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .arrays import Features, Moments, mean_and_deviation, release
from .arrays import rows as float_rows
from .config import FOUND, ConfigError, SeDAConfig
from .data import FeatureSet
from .files import DataError
from .loop import TrainingSet
from .nn import SeDA, centres_of, class_sums
from .nn.kernel_head import RIDGE_ROWS, SHARES, judged_rows, kernel_rows
from .nn.scaling import POWERS, ROWS, Scaling, best_power, scale_of
from .nn.teacher import lone_rows, teacher_rows
from .nn.textual_head import textual_head_rows
from .ranks import ALONE, Ranks
from .streaming import RowReader, StreamedSet, free_memory
from .surroundings import seeded, undisturbed

# Share of the device's free memory that the training part may take.
MEMORY_SHARE = 0.5
# Elements standardised together where the features stay in their files: 16 MiB of float32, and three such buffers lie
# ready (64 MiB each took 0.5 GB at the peak).
_BLOCK = 2**22
_ROWS_TOGETHER = 32
# Threads that read a batch's rows for a GPU.
READERS = 4
FIND_SCALING = Scaling(FOUND, FOUND)


def processors() -> int:
    """How many this process may run on. PyTorch's number of threads is 1 in every rank that ``torchrun`` starts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reading_threads(device: torch.device, ranks: Ranks) -> int:
    """How many read a batch's rows for ``device``; on a CPU the training itself has all others."""
    return 1 if device.type == "cpu" else max(1, min(READERS, processors() // ranks.on_host))


@undisturbed()
def prepare(
    data: FeatureSet,
    config: SeDAConfig,
    seed: int,
    device: torch.device,
    *,
    ranks: Ranks = ALONE,
    memory_share: float = MEMORY_SHARE,
    label_share: float = FOUND,
    scaling: Scaling = FIND_SCALING,
) -> tuple[SeDA, TrainingSet | StreamedSet]:
    """A new model carrying the data's statistics, and the standardised training set on ``device``.

    Rows without text keep zeros there, which nothing reads. Where the features would take more than ``memory_share``
    of the device's free memory they are streamed instead (the ranks of a host share that of its CPUs); those that all
    lie in the memory of a CPU already never are.
    Each of the ranks sums its part of the rows for the category centres. ``label_share`` as in `TrainConfig`, as are
    the parts of ``scaling``. Raises DataError when no row is labelled, and ConfigError where a given ``label_share``
    has no meaning.
    """
    if not data.labelled_train.any():
        raise DataError(f"{data.source}: 'label_train' has no labelled row")
    with seeded(seed):
        model = SeDA(config, data.class_names)
    of_visual, of_text = mean_and_deviation(data.visual_train), _text_moments(data)
    for name, (_, deviation) in (("visual_train", of_visual), ("text_train", of_text)):
        if 0 < deviation.max(initial=0) < np.finfo(np.float32).tiny:
            raise DataError(
                f"{data.source}: '{name}' varies by {deviation.max():.3g} at most, which float32 cannot tell from "
                "nothing; multiply it first"
            )
    model.scaling = _found_scaling(data, (of_visual, of_text), scaling, seed, ranks)
    moments = (*_scaled(of_visual, model.scaling.visual), *_scaled(of_text, model.scaling.text))
    about = (torch.from_numpy(np.asarray(a)) for a in (data.label_train, data.paired_train, data.ids_train))
    texts = None if data.text_classes is None else torch.from_numpy(data.text_classes)
    standardised = None if texts is None else (texts - moments[2]) / moments[3]
    threads = reading_threads(device, ranks)
    readers = (RowReader(data.visual_train, threads), RowReader(data.text_train, threads))
    streamed = dataclasses.replace(StreamedSet(*readers, *moments, *about), text_classes=standardised)
    # Where one rank has too little memory, all of them stream.
    too_large = any(ranks.largest([_too_large(data, device, memory_share, ranks)]))
    rows = streamed if too_large else _loaded(data, streamed)
    _fit(model, rows, seed, ranks, moments, label_share)
    if texts is not None:
        model.set_class_texts(texts)
    return model.to(device), _to(rows, device)


def _text_moments(data: FeatureSet) -> tuple[Moments, Moments]:
    """Mean and deviation of the texts, (Dt,) each; 0 and 0 without one."""
    if data.text_classes is not None:
        # Those of the rows' texts: a class counts as often as it has rows.
        return mean_and_deviation(data.text_classes, data.label_train[data.labelled_train])
    if data.paired_train.any():
        return mean_and_deviation(data.text_train, np.flatnonzero(data.paired_train))
    return np.zeros(data.text_dim), np.zeros(data.text_dim)


def _scaled(moments: tuple[Moments, Moments], power: float) -> tuple[Tensor, Tensor]:
    mean, deviation = moments
    return torch.from_numpy(mean).float(), torch.from_numpy(scale_of(deviation, power)).float()


def _found_scaling(
    data: FeatureSet, moments: tuple[tuple[Moments, Moments], ...], wanted: Scaling, seed: int, ranks: Ranks
) -> Scaling:
    """``wanted`` with what is to be found in it found, the same on all ranks; ``moments`` of both features.

    Class texts stay standardised: a class has one, so that none can be left out and still be told.
    """
    powers, paired = list(wanted), np.asarray(data.paired_train)
    parts = ((data.visual_train, np.ones_like(paired)), (data.text_train, paired & (data.text_classes is None)))
    for i, ((features, usable), (mean, deviation)) in enumerate(zip(parts, moments, strict=True)):
        if wanted[i] != FOUND:
            continue
        found = POWERS[0]
        labels = torch.from_numpy(np.asarray(data.label_train))
        if len(judged := judged_rows(labels, torch.from_numpy(usable), ROWS, seed)):
            x = (_few_rows(features, judged.numpy()) - mean) / scale_of(deviation, 1.0)
            found = best_power(torch.from_numpy(x), deviation, labels[judged], data.n_classes)
        powers[i] = POWERS[ranks.largest([POWERS.index(found)])[0]]
    return Scaling(*powers)


def _few_rows(features: Features, index: NDArray[np.int64]) -> NDArray[np.float32]:
    """Rows of an array wherever it lies, (n, D), a few at a time: of a memory map each row brings those around it into
    memory, 1.2 MB for 32 KB where this was seen."""
    found = np.empty((len(index), features.shape[1]), dtype=np.float32)
    for start in range(0, len(index), _ROWS_TOGETHER):
        some = slice(start, start + _ROWS_TOGETHER)
        found[some] = float_rows(features, index[some])
        release(features)
    return found


def _too_large(data: FeatureSet, device: torch.device, memory_share: float, ranks: Ranks) -> bool:
    if device.type == "cpu" and not any(isinstance(a, np.memmap) for a in (data.visual_train, data.text_train)):
        return False
    needed = 4 * (data.visual_train.size + data.text_train.size)
    if device.type != "cpu" and needed > memory_share * free_memory(device):
        return True
    # What goes to a GPU is standardised on the host, by every rank.
    return needed * ranks.on_host > memory_share * free_memory(torch.device("cpu"))


def _loaded(data: FeatureSet, rows: StreamedSet) -> TrainingSet:
    everything = slice(None)
    # In place: a second array of this size might be one too many.
    visual = torch.from_numpy(float_rows(data.visual_train, everything)).sub_(rows.visual_mean).div_(rows.visual_scale)
    release(data.visual_train)
    rest = (rows.labels, rows.paired, rows.sample_ids, rows.text_classes)
    if rows.text_classes is not None:
        return TrainingSet(visual, visual.new_zeros(len(visual), 0), *rest)
    text = torch.from_numpy(float_rows(data.text_train, everything)).sub_(rows.text_mean).div_(rows.text_scale)
    release(data.text_train)
    return TrainingSet(visual, text.nan_to_num_(nan=0.0), *rest)


def _fit(
    model: SeDA,
    rows: TrainingSet | StreamedSet,
    seed: int,
    ranks: Ranks,
    moments: tuple[Tensor, Tensor, Tensor, Tensor],
    label_share: float,
) -> None:
    """The model's statistics, teacher, kernel head and the start of its textual head, from rows on the host."""
    part, classes = ranks.part(len(rows)), model.config.n_classes
    if isinstance(rows, TrainingSet):
        sums, counts = class_sums(rows.visual[part], rows.labels[part], classes)
    else:
        sums = torch.zeros(classes, model.config.visual_dim, dtype=torch.float64)
        counts = torch.zeros(classes, dtype=torch.int64)
        together = max(1, _BLOCK // (model.config.visual_dim + model.config.text_dim))
        for visual, _, labels, _, _ in rows.batches(torch.arange(len(rows))[part].split(together)):
            more_sums, more_counts = class_sums(visual, labels, classes)
            sums, counts = sums + more_sums, counts + more_counts
    model.set_statistics(*moments, centres_of(ranks.add(sums), ranks.add(counts)))
    model.set_rates(rows.labels)
    taught = teacher_rows(rows.labels, rows.paired, seed)
    model.teacher = None
    if len(taught):
        visual, text, labels, _, _ = rows.rows(taught)
        lone, _, lone_labels, _, _ = rows.rows(lone_rows(rows.labels, rows.paired, seed))
        model.set_teacher(visual, text, labels, seed, (lone, lone_labels))
    model.set_unseen(rows.labels, rows.paired)
    told = textual_head_rows(rows.labels, rows.paired, model.config.text_dim, classes, seed)
    if len(told):
        _, text, labels, _, _ = rows.rows(told)
        model.set_textual_head(text, labels)
    alone = _labels_stand_alone(model, len(told))
    if alone and label_share not in (FOUND, 1.0):
        raise ConfigError(f"label_share is {label_share:g}, but labels have nothing beside them here: {alone}")
    shares = (1.0,) if alone else SHARES if label_share == FOUND else (label_share,)
    compared, absence = kernel_rows(rows.labels, rows.paired, model.teacher is not None, classes)
    model.kernel.absence = absence if model.config.kernel_weight > 0 else "its weight is 0"
    if not model.kernel.absence:
        visual, text, labels, paired, _ = rows.rows(compared)
        share = model.set_kernel_head(visual, text, labels, paired, seed, shares)
    elif len(shares) > 1 and len(judged := judged_rows(rows.labels, rows.paired, RIDGE_ROWS, seed)):
        visual, text, labels, _, _ = rows.rows(judged)
        share = model.find_label_share(visual, text, labels, seed)
    else:
        share = shares[0]
    # Ranks whose hosts round otherwise would each teach, and predict with, what they fitted themselves.
    model.set_label_share(float(ranks.spread_text(repr(float(share)))))
    for tensor in (*model.parameters(), *model.buffers()):
        ranks.spread(tensor.data)


def _labels_stand_alone(model: SeDA, told: int) -> str:
    """Why no text's opinion stands beside a label; empty where one does. ``told``: rows that its classifier saw."""
    if model.config.multi_label:
        return "a row has several of them"
    if model.config.class_text:
        return "a text is a class's and not a row's"
    if model.teacher is not None:
        return "there are unlabelled pairs, which a teacher of pairs labels"
    return "" if told else "no classifier of texts was fitted"


def _to(rows: TrainingSet | StreamedSet, device: torch.device) -> TrainingSet | StreamedSet:
    moved: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(rows).items()
    }
    return dataclasses.replace(rows, **moved)
