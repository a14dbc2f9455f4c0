"""From checked data to what the loop takes: a new model with the data's statistics, and standardised rows."""

from __future__ import annotations

import numpy as np
import torch

from .arrays import mean_and_scale
from .arrays import rows as float_rows
from .config import SeDAConfig
from .data import FeatureSet
from .files import DataError
from .loop import TrainingSet
from .nn import SeDA, centres_of, class_sums
from .ranks import ALONE, Ranks


def prepare(
    data: FeatureSet, config: SeDAConfig, seed: int, device: torch.device, ranks: Ranks = ALONE
) -> tuple[SeDA, TrainingSet]:
    """A new model carrying the data's statistics, and the standardised training set on ``device``.

    Rows without text keep zeros there, which nothing reads. Each of the ranks sums its part of the rows for the
    category centres. Raises DataError when no row is labelled.
    """
    if not data.labelled_train.any():
        raise DataError(f"{data.source}: 'label_train' has no labelled row")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SeDA(config, data.class_names)
    visual_mean, visual_scale = (torch.from_numpy(m).float() for m in mean_and_scale(data.visual_train))
    text_mean, text_scale = torch.zeros(data.text_dim), torch.ones(data.text_dim)
    if data.paired_train.any():
        moments = mean_and_scale(data.text_train, np.flatnonzero(data.paired_train))
        text_mean, text_scale = (torch.from_numpy(m).float() for m in moments)
    everything = np.arange(len(data.visual_train))
    visual = (torch.from_numpy(float_rows(data.visual_train, everything)) - visual_mean) / visual_scale
    text = (torch.from_numpy(float_rows(data.text_train, everything)) - text_mean) / text_scale
    labels = torch.from_numpy(np.asarray(data.label_train))
    part = ranks.part(len(labels))
    sums, counts = (ranks.add(found) for found in class_sums(visual[part], labels[part], config.n_classes))
    model.set_statistics(visual_mean, visual_scale, text_mean, text_scale, centres_of(sums, counts))
    text, paired = text.nan_to_num(nan=0.0), torch.from_numpy(data.paired_train)
    model.fit_teacher(visual, text, labels, paired, seed)
    rows = TrainingSet(
        visual.to(device),
        text.to(device),
        labels.to(device),
        paired.to(device),
        torch.from_numpy(data.ids_train).to(device),
    )
    return model.to(device), rows
