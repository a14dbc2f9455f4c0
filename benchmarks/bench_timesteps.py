"""Stratified timesteps from counters, against one draw of PyTorch's generator and the same formula."""

from typing import Any

import pytest
import torch
from torch import Tensor

from seda_fast import reference
from seda_fast.ops import stratified_timesteps

ROWS, STEPS = 4096, 1000


@pytest.mark.gpu
def bench_timesteps(contest: Any, device: torch.device, workload: Any, compile_variants: Any) -> None:
    """On a CPU they are PyTorch's own operations."""
    ids, seed, step = torch.arange(ROWS, device=device), *(torch.tensor(n, device=device) for n in (1, 2))

    def eager(ids: Tensor) -> Tensor:
        return ((ids + torch.rand(ROWS, device=ids.device)) * STEPS / ROWS).long()

    competitors = {
        "seda_fast": lambda: stratified_timesteps(seed, step, ids, STEPS, 2),
        "eager": lambda: eager(ids),
        "the same counters in PyTorch": lambda: reference.stratified_timesteps(seed, step, ids, STEPS, 2),
    }
    for name, variant in compile_variants(eager, device).items():
        competitors[name] = lambda variant=variant: variant(ids)
    expected = reference.stratified_timesteps(seed, step, ids, STEPS, 2)

    def check(name: str, result: Tensor) -> None:
        # Another generator's offsets: a row's timestep lies in its stratum all the same.
        assert (result - ids * STEPS // ROWS).abs().max() <= 1, name
        if name == "seda_fast":
            assert torch.equal(result, expected)

    title = f"timesteps, B = {ROWS}"
    contest(workload(title, "stratified_timesteps", moved=16.0 * ROWS, dtype=torch.float32), competitors, check)
