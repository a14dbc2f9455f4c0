"""PFIN: training pass and reverse chain are the same network."""

import pytest
import torch
from torch import Tensor, nn

from seda_fast.nn import PFIN, Dropout, NoiseSchedule

STEPS = 50


def network(dim: int = 6, condition_dim: int = 5) -> PFIN:
    torch.manual_seed(0)
    pfin = PFIN(dim, condition_dim, width=16, expansion=2, blocks=2, time_embedding=8, steps=STEPS).double()
    # Zero-initialised layers would hide faults in gates and modulation.
    for layer in (pfin.gates, pfin.modulation.tables):
        nn.init.normal_(layer.weight, std=0.3)
        nn.init.normal_(layer.bias, std=0.3)
    return pfin


def by_hand(pfin: PFIN, x: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
    """The method's formulas with PyTorch's own layers, row by row modulation."""

    def norm(h: Tensor) -> Tensor:
        return nn.functional.layer_norm(h, h.shape[-1:])

    embedded = norm(pfin.condition(condition))
    h = pfin.input(x) + embedded
    angles = timesteps.double()[:, None] * pfin.modulation.frequencies
    embedding = torch.cat((angles.sin(), angles.cos()), 1)
    rows = pfin.modulation.tables(nn.functional.silu(pfin.modulation.embed(embedding)))
    rows = rows.reshape(len(x), len(pfin.blocks), 3, -1)
    gates = (1 + pfin.gates(embedded)).reshape(len(x), len(pfin.blocks), -1)
    for i, block in enumerate(pfin.blocks):
        shift, scale, alpha = rows[:, i].unbind(1)
        u = nn.functional.silu(block.hidden(norm(h) * (1 + scale) + shift)) * gates[:, i]
        h = h + (1 + alpha) * block.output(u)
    return pfin.output(norm(h))


@pytest.mark.parametrize("rows", [1, 7, STEPS, STEPS + 3])
def test_forward_is_the_methods_formula(rows: int) -> None:
    """Both ways of making the modulation tables: by the rows' timesteps, and by all of them."""
    pfin = network()
    x, condition = torch.randn(rows, 6, dtype=torch.float64), torch.randn(rows, 5, dtype=torch.float64)
    timesteps = torch.randint(0, STEPS, (rows,)).sort().values
    found, expected = pfin(x, condition, timesteps), by_hand(pfin, x, condition, timesteps)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    parameters = list(pfin.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sampler_name", ["ddim", "renoise"])
@pytest.mark.parametrize("steps", [1, 3])
def test_chain_is_the_straightforward_loop(sampler_name: str, steps: int) -> None:
    pfin = network()
    sampler = NoiseSchedule(STEPS).sampler(sampler_name, steps)  # type: ignore[arg-type]
    initial, source = torch.randn(2, 4, 6, dtype=torch.float64).unbind(0)
    condition, ids = torch.randn(4, 5, dtype=torch.float64), torch.arange(4)
    key = {"seed": torch.tensor(3), "step": torch.tensor(1 << 16), "sample_ids": ids}
    found = pfin.chain(initial, source, condition, sampler, **key, stream=4)

    from_table = torch.zeros_like(initial)
    x = initial
    for i, (a, b, c, e, w) in enumerate(sampler.coefficients.double()):
        x0 = by_hand(pfin, x, condition, sampler.timesteps[i].expand(4))
        eps = torch.ops.seda_fast.q_sample(
            torch.zeros_like(x), torch.zeros_like(ids), torch.ones(1).double(), torch.ones(1).double(),
            key["seed"], key["step"] + 1 + i, ids, 4,
        )  # fmt: skip
        x = a * x0 + b * x + c * source + e * eps
        from_table = from_table + w * x0
    torch.testing.assert_close(found, from_table, rtol=1e-9, atol=1e-9)


def test_dropout_uses_one_stream_a_block_and_keeps_the_mean() -> None:
    pfin = network()
    rows = 4000
    x = torch.randn(1, 6, dtype=torch.float64).expand(rows, 6)
    condition = torch.randn(1, 5, dtype=torch.float64).expand(rows, 5)
    timesteps = torch.zeros(rows, dtype=torch.int64)

    def run(stream: int, step: int) -> Tensor:
        return pfin(
            x, condition, timesteps, Dropout(0.2, torch.tensor(0), torch.tensor(step), torch.arange(rows), stream)
        )

    assert torch.equal(run(6, 0), run(6, 0))
    assert not torch.equal(run(6, 0), run(6, 1))
    assert not torch.equal(run(6, 0), run(7, 0))
    none = Dropout(0.0, torch.tensor(0), torch.tensor(0), torch.arange(rows), 6)
    assert torch.equal(pfin(x, condition, timesteps), pfin(x, condition, timesteps, none))
