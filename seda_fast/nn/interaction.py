"""PFIN, the Progressive Feature Interaction Network: the denoiser of both stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import (
    ChainWeights,
    embed_condition,
    interaction_block,
    interaction_network,
    layer_norm,
    memory_read,
    q_sample,
    reverse_chain,
)
from .precision import WholeBuffers
from .schedule import Sampler

# Why a network that reads a memory predicts otherwise than one that does not; shown by `info` and in metrics.
STEPWISE = "the fused reverse chain does not know a memory of class texts"


class Dropout(NamedTuple):
    """Dropout of one pass: its rate and what keys its mask. ``stream`` is that of the network's first block."""

    rate: float
    seed: Tensor
    step: Tensor
    sample_ids: Tensor
    stream: int

    def keys(self, layer: int) -> dict[str, Any]:
        """The keyword arguments that an operation takes of it; none without dropout."""
        if self.rate == 0:
            return {}
        counters = {"seed": self.seed, "step": self.step, "sample_ids": self.sample_ids}
        return {"dropout": self.rate, **counters, "stream": self.stream + layer}


class InteractionBlock(nn.Module):
    """One block: modulated norm, gated cross-feature interaction, gated residual. See `ops.interaction_block`."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, expansion * width)
        self.output = nn.Linear(expansion * width, width)

    def forward(
        self,
        h: Tensor,
        gate: Tensor,
        timesteps: Tensor,
        modulation: Tensor,
        dropout: Dropout | None,
        layer: int,
    ) -> Tensor:
        """``h`` (B, d), ``gate`` (B, m*d), ``timesteps`` (B,), ``modulation`` (3, T, d) -> (B, d)."""
        shift, scale, alpha = modulation.unbind(0)
        operands = (h, gate, timesteps, shift, scale, alpha)
        weights = (self.hidden.weight, self.hidden.bias, self.output.weight, self.output.bias)
        keys = {} if dropout is None else dropout.keys(layer)
        return interaction_block(*operands, *weights, **keys)


class TimestepModulation(WholeBuffers):
    """Shift, scale and alpha tables from a sinusoidal embedding of the timesteps (Vaswani et al. 2017, sec. 3.5).

    The small network runs over timesteps, never over rows; its last layer starts at 0, so a new block is unmodulated.
    """

    frequencies: Tensor
    # Timesteps above 256 are none of bfloat16, and an angle of 1000 is known to half a radian in float16.
    whole = ("frequencies",)

    def __init__(self, width: int, blocks: int, embedding: int) -> None:
        super().__init__()
        self.width, self.blocks = width, blocks
        self.embed = nn.Linear(embedding, embedding)
        frequencies = _frequencies(embedding).to(self.embed.weight.device)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.tables = nn.Linear(embedding, blocks * 3 * width)
        nn.init.zeros_(self.tables.weight)
        nn.init.zeros_(self.tables.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *others: Any) -> None:
        """What is made of nothing but settings is made anew: `torch.nn.Module.to_empty` has emptied it, too."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)
        weight = self.embed.weight
        if local_metadata.get("assign_to_params_buffers"):  # its place is taken, after this, by
            weight = state_dict.get(f"{prefix}embed.weight", weight)
        like = self.frequencies
        self.frequencies = _frequencies(2 * len(like)).to(weight.device, like.dtype)

    def forward(self, timesteps: Tensor) -> Tensor:
        """``timesteps`` (n,) integer -> (L, 3, n, d), a view."""
        angles = timesteps.to(self.frequencies.dtype)[:, None] * self.frequencies
        # The angles need float32; their sines and cosines go on in the weights' dtype.
        embedding = torch.cat((angles.sin(), angles.cos()), dim=1).to(self.embed.weight.dtype)
        rows: Tensor = self.tables(torch.nn.functional.silu(self.embed(embedding)))
        tables: Tensor = rows.unflatten(1, (self.blocks, 3, self.width))
        return tables.permute(1, 2, 0, 3)


def _frequencies(embedding: int) -> Tensor:
    """Of a sinusoidal embedding, (embedding / 2,) float32, from 1 downward."""
    half = torch.arange(embedding // 2, dtype=torch.float64, device="cpu") / (embedding // 2)
    return (-math.log(10_000.0) * half).exp().float()


class MemoryRead(nn.Module):
    """Cross-attention of the state to class prototypes. See `ops.memory_read`.

    Its last layer starts at 0: a new network does as if it had no memory.
    """

    def __init__(self, width: int, memory_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.keys = nn.Linear(memory_dim, width)
        self.values = nn.Linear(memory_dim, width)
        self.output = nn.Linear(width, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Prototypes (K, Dt) -> keys and values, (K, d) each, which no step changes."""
        return self.keys(memory), self.values(memory)

    def forward(self, h: Tensor, projected: tuple[Tensor, Tensor]) -> Tensor:
        """(B, d) -> (B, d)."""
        query, output = self.query, self.output
        return memory_read(h, *projected, query.weight, query.bias, output.weight, output.bias, heads=self.heads)


class PFIN(nn.Module):
    """``PFIN(x, c, tau)``: predicts the clean target from a noised state and a condition (SeDA, PFIN).

    Args:
        dim: size D of the state and of the prediction.
        condition_dim: size Dc of the condition.
        width, expansion, blocks: d, m, L.
        time_embedding: size of the timestep embedding.
        steps: T.
        memory_dim: size Dt of the prototypes that the state attends to at every step; 0: there are none.
        memory_heads: heads of that attention.
    """

    def __init__(
        self,
        dim: int,
        condition_dim: int,
        *,
        width: int,
        expansion: int,
        blocks: int,
        time_embedding: int,
        steps: int,
        memory_dim: int = 0,
        memory_heads: int = 1,
    ) -> None:
        super().__init__()
        self.steps = steps
        self.input = nn.Linear(dim, width)
        self.condition = nn.Linear(condition_dim, width)
        self.gates = nn.Linear(width, blocks * expansion * width)
        self.modulation = TimestepModulation(width, blocks, time_embedding)
        self.blocks = nn.ModuleList(InteractionBlock(width, expansion) for _ in range(blocks))
        self.output = nn.Linear(width, dim)
        nn.init.zeros_(self.gates.weight)
        nn.init.zeros_(self.gates.bias)
        self.memory = MemoryRead(width, memory_dim, memory_heads) if memory_dim else None

    def forward(
        self,
        x: Tensor,
        condition: Tensor | Sequence[Tensor],
        timesteps: Tensor,
        dropout: Dropout | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """``x`` (B, D) noised state times its gain, ``timesteps`` (B,) int64 -> (B, D).

        ``condition`` is (B, Dc), or its parts, which stand side by side in it; only those that need a gradient get one.
        ``memory`` (K, Dt) where the network has one.
        """
        if x.shape[0] < self.steps:
            # Fewer rows than timesteps: a table of the rows' own timesteps is the smaller one with the same entries.
            modulation = self.modulation(timesteps)
            timesteps = torch.arange(x.shape[0], device=x.device)
        else:
            modulation = self.modulation(torch.arange(self.steps, device=x.device))
        parts = (condition,) if isinstance(condition, Tensor) else tuple(condition)
        projected = self._projected(memory)
        if projected is None:
            keys = {} if dropout is None else dropout.keys(0)
            return interaction_network(x, parts, timesteps, modulation.permute(2, 0, 1, 3), self._weights(), **keys)
        normed, gates = embed_condition(
            torch.cat(parts, dim=1),
            self.condition.weight,
            self.condition.bias,
            self.gates.weight,
            self.gates.bias,
        )
        return self._denoise(x, normed, gates, timesteps, modulation, dropout, projected)

    def _projected(self, memory: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if (memory is None) != (self.memory is None):
            raise ValueError("memory must be given to a network that has one, and to no other")
        return self.memory.project(memory) if self.memory is not None and memory is not None else None

    def _denoise(
        self,
        x: Tensor,
        normed: Tensor,
        gates: Tensor,
        timesteps: Tensor,
        modulation: Tensor,
        dropout: Dropout | None,
        projected: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """The prediction from an embedded condition ``normed`` (B, d), its ``gates`` and the (L, 3, T, d) tables."""
        h = self.input(x) + normed
        # unbind, not an index a layer: the gradient of an index is the whole table again, in zeros.
        parts = zip(self.blocks, gates.chunk(len(self.blocks), dim=1), modulation.unbind(0), strict=True)
        for layer, (block, gate, tables) in enumerate(parts):
            if self.memory is not None and layer == self.read_before:
                h = self.memory(h, projected)
            h = block(h, gate, timesteps, tables, dropout, layer)
        prediction: Tensor = self.output(layer_norm(h))
        return prediction

    @property
    def read_before(self) -> int:
        """The block before which the memory is read: the second, or the only one."""
        return min(1, len(self.blocks) - 1)

    def _weights(self) -> ChainWeights:
        return ChainWeights(
            self.input.weight,
            self.input.bias,
            self.condition.weight,
            self.condition.bias,
            self.gates.weight,
            self.gates.bias,
            [block.hidden.weight for block in self.blocks],  # type: ignore[union-attr, misc]
            [block.hidden.bias for block in self.blocks],  # type: ignore[union-attr, misc]
            [block.output.weight for block in self.blocks],  # type: ignore[union-attr, misc]
            [block.output.bias for block in self.blocks],  # type: ignore[union-attr, misc]
            self.output.weight,
            self.output.bias,
        )

    def chain(
        self,
        initial: Tensor,
        source: Tensor,
        condition: Tensor,
        sampler: Sampler,
        *,
        seed: Tensor,
        step: Tensor,
        sample_ids: Tensor,
        stream: int,
        memory: Tensor | None = None,
    ) -> Tensor:
        """The reverse chain of this network; see `ops.reverse_chain`. (B, D) -> (B, D).

        A network with a memory (K, Dt) goes step by step.
        """
        if self.memory is not None:
            keys = {"seed": seed, "step": step, "sample_ids": sample_ids, "stream": stream}
            return self._stepwise(initial, source, condition, sampler, self._projected(memory), keys)
        return reverse_chain(
            initial,
            source,
            condition,
            sampler.coefficients,
            self.modulation(sampler.timesteps).permute(2, 0, 1, 3),
            self._weights(),
            seed=seed,
            step=step,
            sample_ids=sample_ids,
            stream=stream,
            noisy=sampler.noisy,
        )

    def _stepwise(
        self,
        initial: Tensor,
        source: Tensor,
        condition: Tensor,
        sampler: Sampler,
        projected: tuple[Tensor, Tensor] | None,
        keys: dict[str, Any],
    ) -> Tensor:
        """What `ops.reverse_chain` computes, with the memory read at every step; an operation a layer and step."""
        rows = initial.shape[0]
        normed, gates = embed_condition(
            condition, self.condition.weight, self.condition.bias, self.gates.weight, self.gates.bias
        )
        modulation = self.modulation(sampler.timesteps)
        a, b, c, e, w = sampler.coefficients.to(initial.dtype).unbind(1)
        first = torch.zeros(rows, dtype=torch.int64, device=initial.device)
        step, steps = keys.pop("step"), len(sampler.timesteps)
        x, result = initial, torch.zeros_like(initial)
        for i in range(steps):
            estimate = self._denoise(x, normed, gates, first + i, modulation, None, projected)
            result = result + w[i] * estimate
            if i + 1 < steps:
                x = a[i] * estimate + b[i] * x + c[i] * source
                if sampler.noisy:
                    x = q_sample(x, first, torch.ones_like(e[i : i + 1]), e[i : i + 1], step=step + 1 + i, **keys)
        return result
