"""What each dimension of a feature is divided by: its deviation, one number for all, or what lies between.

Standardised features suit dimensions that have nothing to do with each other. Principal components and singular vectors
are sorted, and their last ones, mostly noise, are blown up to the size of the first: of as many as there are rows, all
rows come to lie equally far from each other. The powers of the deviation have names of their own: 1 is autoscaling,
1/2 Pareto scaling, 0 mean centring (van den Berg et al. 2006, Centering, scaling, and transformations). A kernel
classifier tells by rows that it has not seen which of them suits the data.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .kernel_head import distinct, left_out_losses

Deviation = NDArray[np.float64]  # (D,), 0 where a dimension never changes

POWERS = (1.0, 0.5, 0.0)
# The choice takes time that grows with the cube of the rows: half a second a power for these many.
ROWS = 1024
# Less is gained than a head's accuracy shows, and features stay standardised, as the method has it: nats a row, and
# standard errors of the mean over rows.
_PLAIN_GAIN, _PLAIN_ERRORS = 0.05, 2.0


class Scaling(NamedTuple):
    """The powers of their deviations by which visual and textual features are divided, 0 .. 1."""

    visual: float
    text: float


def scale_of(deviation: Deviation, power: float) -> Deviation:
    """What dimensions of these deviations (D,) are divided by; the mean square of all stays that of standardised ones
    with the powers 0 and 1, and is less between them the more the deviations differ (0.3 of it for 1, 1/2, .. 1/256).

    A dimension that never changes, or by less than float32 can tell from 0, is divided by the root of the others' mean
    square, so that what it may be in a row to come counts the same in any unit; 1 where none changes.
    """
    changes = deviation >= np.finfo(np.float32).tiny
    if not changes.any():
        return np.ones_like(deviation)
    common = np.sqrt(np.mean(np.square(deviation[changes])))
    return np.where(changes, deviation if power == 1 else deviation**power * common ** (1 - power), common)


def best_power(features: Tensor, deviation: Deviation, labels: Tensor, n_classes: int) -> float:
    """The one of `POWERS` by which to divide, 1 unless another is plainly better.

    ``features`` (n, D) standardised, ``deviation`` (D,) of the raw ones, ``labels`` (n,) int64 in 0 .. n_classes - 1, a
    class at least with two rows, or (n, n_classes) multi-label. Better is what lets a kernel classifier explain the
    labels of rows that it has not seen, plainly better what saves 0.05 nats a row and two standard errors of the mean
    over rows.
    """
    multi_label = labels.ndim == 2
    indicator = labels if multi_label else F.one_hot(labels, n_classes)
    x, targets, counts = distinct(features.double(), indicator.double(), 2 if multi_label else n_classes)
    part = counts / counts.sum()
    standard: Tensor | None = None
    best, gained = POWERS[0], 0.0
    for power in POWERS:
        factor = torch.from_numpy(deviation / scale_of(deviation, power)).to(x)
        losses = left_out_losses(x * factor, targets, counts, multi_label)
        standard = losses if standard is None else standard
        gain = standard - losses
        mean = part @ gain
        error = (part.square() @ (gain - mean).square()).sqrt()
        if mean > max(gained, _PLAIN_GAIN) and mean > _PLAIN_ERRORS * error:
            best, gained = power, float(mean)
    return best
