"""The interaction network on the CPU: one call of C++ each way (csrc/cpu/interaction_network.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._cpp import contiguous, implement_with_cpp, rows, table
from ..interaction_network import _fake, _fake_backward, _reference, _reference_backward

# Where biases and the modulation stand among the gradients before the blocks'; they are float32.
_NARROW = (1, 3, 5, 7, 9)


def interaction_network(
    x: Tensor,
    conditions: list[Tensor],
    timesteps: Tensor,
    modulation: Tensor,
    w_x: Tensor,
    b_x: Tensor,
    w_c: Tensor,
    b_c: Tensor,
    w_g: Tensor,
    b_g: Tensor,
    w_h: list[Tensor],
    b_h: list[Tensor],
    w_o: list[Tensor],
    b_o: list[Tensor],
    w_y: Tensor,
    b_y: Tensor,
    *dropout: Any,
) -> tuple[Tensor, ...]:
    """The op ``seda_fast::interaction_network``; biases and modulation are read as float32."""
    prediction, *saved = results = _fake(x, conditions, timesteps, modulation, w_x, b_x, w_c, b_c, w_g, b_g, w_h)
    torch.ops.seda_fast_cpp.interaction_network(
        *(rows(x), [rows(part) for part in conditions], timesteps, table(modulation).contiguous()),
        *(rows(w_x), table(b_x), rows(w_c), table(b_c), rows(w_g), table(b_g)),
        *([rows(w) for w in w_h], [table(b) for b in b_h], [rows(w) for w in w_o], [table(b) for b in b_o]),
        *(rows(w_y), table(b_y), *contiguous(dropout), saved, prediction),
    )
    return results


def interaction_network_backward(
    grad: Tensor,
    x: Tensor,
    conditions: list[Tensor],
    timesteps: Tensor,
    modulation: Tensor,
    w_x: Tensor,
    w_c: Tensor,
    w_g: Tensor,
    b_g: Tensor,
    w_h: list[Tensor],
    b_h: list[Tensor],
    w_o: list[Tensor],
    b_o: list[Tensor],
    w_y: Tensor,
    *rest: Any,
) -> list[Tensor]:
    """The op ``seda_fast::interaction_network_backward``; the dropout's masks are drawn again, not kept."""
    *dropout, saved, wanted = rest
    weights = (w_x, w_c, w_g, b_g, w_h, b_h, w_o, b_o, w_y)
    found = _fake_backward(grad, x, conditions, timesteps, modulation, *weights, wanted)
    blocks = len(w_h)
    biases = range(10 + blocks, 10 + 2 * blocks), range(10 + 3 * blocks, 10 + 4 * blocks)
    for i in (*_NARROW, *biases[0], *biases[1]):
        found[i] = found[i].to(torch.float32)
    torch.ops.seda_fast_cpp.interaction_network_backward(
        *(rows(grad), rows(x), [rows(part) for part in conditions], timesteps, table(modulation).contiguous()),
        *(rows(w_x), rows(w_c), rows(w_g), table(b_g)),
        *([rows(w) for w in w_h], [table(b) for b in b_h], [rows(w) for w in w_o], [table(b) for b in b_o]),
        *(rows(w_y), *contiguous(dropout), [t.contiguous() for t in saved], found),
    )
    return [t.to(x.dtype) for t in found]


implement_with_cpp("interaction_network", interaction_network, slice(16), _reference)
implement_with_cpp("interaction_network_backward", interaction_network_backward, slice(14), _reference_backward)
