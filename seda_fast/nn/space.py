"""The semantic space's category centres."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 2**20  # elements summed together


def category_centres(features: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Category centres C: the mean feature of each class (SeDA, DCSL), exact, in one pass with float64 sums.

    Args:
        features: (N, D) floating, standardised visual features.
        labels: (N,) int64 in -1 .. K-1; -1 rows are unlabelled and do not count. Multi-label: (N, K) integers, 1 where
            a row carries a class, 0 where not; rows of -1 are unlabelled. A row counts in each class that it carries.
        n_classes: K.

    Returns:
        (K, D) in the features' dtype. A class without labelled rows gets the origin, which is the mean of all
        standardised features.

    Raises:
        ValueError: a label is K or more, or (N, K) labels have another number of columns.
    """
    return centres_of(*class_sums(features, labels, n_classes)).to(features.dtype)


def class_sums(features: Tensor, labels: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """What `category_centres` is made of: float64 sums (K, D) and int64 counts (K,), which add up over parts."""
    if labels.ndim == 2:
        if labels.shape[1] != n_classes:
            raise ValueError(f"labels have {labels.shape[1]} columns but there are {n_classes} classes")
        together = max(1, _BLOCK // max(1, features.shape[1]))
        sums = features.new_zeros(n_classes, features.shape[1], dtype=torch.float64)
        for some, carried in zip(features.split(together), (labels > 0).split(together), strict=True):
            sums += carried.double().T @ some.double()
        return sums, (labels > 0).sum(0)
    labelled = labels >= 0
    target = labels[labelled]
    counts = torch.bincount(target, minlength=n_classes)
    if len(counts) > n_classes:
        raise ValueError(f"labels reach {len(counts) - 1} but there are {n_classes} classes")
    sums = torch.zeros(n_classes, features.shape[1], dtype=torch.float64, device=features.device)
    # Some rows at a time: in float64 all of them would be three times the features' memory.
    together = max(1, _BLOCK // max(1, features.shape[1]))
    for some, classes in zip(features.split(together), labels.split(together), strict=True):
        carried = classes >= 0
        sums.index_add_(0, classes[carried], some[carried].double())
    return sums, counts


def centres_of(sums: Tensor, counts: Tensor) -> Tensor:
    """The centres (K, D) float64 from `class_sums`."""
    return sums / counts.clamp(min=1)[:, None]
