"""A linear layer for predictions, whose rows do not see their place in the batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_LENGTH = 16  # floats of a 64-byte line
_COLUMNS = 4


def placeless_product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T``, (B, D), (n, D) -> (B, n), the same for a row of ``x`` wherever it stands among the B.

    A CPU's matrix product of few columns (n below some tens) rounds a row by how its beginning is aligned, so that
    rows of a length that is no multiple of 4 took turns: they are made longer by zeros. One of three columns or less
    has, with AVX-512, up to 15 rows by two ways of adding up: it gets columns of zeros.
    """
    more, columns = -x.shape[1] % _LENGTH, max(0, _COLUMNS - len(y))
    if not more and not columns:
        return x @ y.mT
    return (F.pad(x, (0, more)) @ F.pad(y, (0, more, 0, columns)).mT)[:, : len(y)]


def placeless_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.T + bias``, (B, D), (K, D), (K,) -> (B, K), see `placeless_product`."""
    more, columns = -x.shape[1] % _LENGTH, max(0, _COLUMNS - len(weight))
    if not more and not columns:
        return F.linear(x, weight, bias)
    wide = F.linear(F.pad(x, (0, more)), F.pad(weight, (0, more, 0, columns)), F.pad(bias, (0, columns)))
    return wide[:, : len(weight)]
