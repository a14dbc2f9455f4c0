"""Where the textual head starts: at a linear classifier of the training texts.

AdamW moves a weight by a learning rate a step whatever its gradient is, so in some hundred steps a head that starts at
small random weights gets no further than logits of its input's width times a few tenths. Of texts with tens of
dimensions it learns next to nothing in that time: it called 24 to 44 % of wikipedia's texts (10 dimensions) rightly,
which a fitted classifier calls 72 %, and is the teacher of the semantic and of the textual estimate (w6).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import binary_teacher, teacher
from .multi_label import labelled_rows, rate_logits
from .teacher import LABELLED_ROWS, Linear, some_of_each_class

# The penalty is of little weight, for training goes on from there: 0.1 and 0.001 gave the same within noise.
L2 = 0.01
# Products of a row, a feature and a class in one evaluation of the fit, which takes some fifty: seconds on one core.
# Where this leaves fewer than two rows a class, the classes are too many for such a start.
_LARGEST_FIT = 2**31


def textual_head_rows(labels: Tensor, paired: Tensor, text_dim: int, n_classes: int, seed: int) -> Tensor:
    """Which rows to fit the head's start on: int64 (n,), ascending, bounded in number; empty where it is left as drawn.

    ``labels`` (N,) int64, -1 unlabelled, or (N, K) as `multi_label` tells; ``paired`` (N,) bool.
    """
    rows = (labelled_rows(labels) & paired).nonzero()[:, 0]
    most = min(LABELLED_ROWS, _LARGEST_FIT // (text_dim * n_classes))
    if len(rows) > most:
        if most < 2 * n_classes:
            return rows[:0]
        # Of a class without a row this start knows nothing, and what texts say beside labels would never name it.
        rows = some_of_each_class(rows, labels, most, torch.Generator().manual_seed(seed)).sort().values
    return rows if len(labels[rows].unique(dim=0)) > 1 else rows[:0]


def fitted_textual_head(text: Tensor, labels: Tensor, n_classes: int) -> Linear:
    """A classifier of standardised ``text`` (n, Dt) with ``labels`` (n,) or multi-label (n, K), every row labelled."""
    if labels.ndim == 1:
        return teacher.fitted(text, F.one_hot(labels, n_classes).to(text.dtype), L2)
    start = Linear(text.new_zeros(n_classes, text.shape[1]), rate_logits(labels).to(text.dtype))
    return binary_teacher.fitted(text, labels.to(text.dtype), L2, start)
