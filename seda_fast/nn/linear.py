"""A linear layer for predictions, whose rows do not see their place in the batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_LENGTH = 16  # floats of a 64-byte line


def placeless_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.T + bias``, (B, D), (K, D), (K,) -> (B, K), the same for a row wherever it stands among the B.

    A CPU's matrix product of few columns (K below some tens) rounds a row by how its beginning is aligned, so that
    rows of a length that is no multiple of 4 took turns: they are made longer by zeros.
    """
    more = -x.shape[1] % _LENGTH
    return F.linear(F.pad(x, (0, more)), F.pad(weight, (0, more)), bias) if more else F.linear(x, weight, bias)
