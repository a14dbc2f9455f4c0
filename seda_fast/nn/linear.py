"""A linear layer for predictions, whose rows do not see their place in the batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_LENGTH = 16  # floats of a 64-byte line


def placeless_product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T``, (B, D), (n, D) -> (B, n), the same for a row of ``x`` wherever it stands, see `placeless_linear`."""
    more = -x.shape[1] % _LENGTH
    return F.pad(x, (0, more)) @ F.pad(y, (0, more)).mT if more else x @ y.mT


def placeless_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.T + bias``, (B, D), (K, D), (K,) -> (B, K), the same for a row wherever it stands among the B.

    A CPU's matrix product of few columns (K below some tens) rounds a row by how its beginning is aligned, so that
    rows of a length that is no multiple of 4 took turns: they are made longer by zeros.
    """
    more = -x.shape[1] % _LENGTH
    return F.linear(F.pad(x, (0, more)), F.pad(weight, (0, more)), bias) if more else F.linear(x, weight, bias)
