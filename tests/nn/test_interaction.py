"""PFIN: training pass and reverse chain are the same network."""

import pytest
import torch
from torch import Tensor, nn

from seda_fast.nn import PFIN, Dropout, NoiseSchedule

STEPS = 50


def network(dim: int = 6, condition_dim: int = 5, memory_dim: int = 0) -> PFIN:
    torch.manual_seed(0)
    sizes = {"width": 16, "expansion": 2, "blocks": 2, "time_embedding": 8, "steps": STEPS}
    pfin = PFIN(dim, condition_dim, **sizes, memory_dim=memory_dim, memory_heads=4).double()
    if pfin.memory is not None:
        nn.init.normal_(pfin.memory.output.weight, std=0.3)
    # Zero-initialised layers would hide faults in gates and modulation.
    for layer in (pfin.gates, pfin.modulation.tables):
        nn.init.normal_(layer.weight, std=0.3)
        nn.init.normal_(layer.bias, std=0.3)
    return pfin


def read_by_hand(pfin: PFIN, h: Tensor, memory: Tensor) -> Tensor:
    """Attention of one state after another, head by head."""
    read = pfin.memory
    assert read is not None
    query = read.query(nn.functional.layer_norm(h, h.shape[-1:]))
    keys, values = read.keys(memory), read.values(memory)
    heads = []
    for part in torch.arange(h.shape[1]).chunk(read.heads):
        weights = (query[:, part] @ keys[:, part].T / len(part) ** 0.5).softmax(1)
        heads.append(weights @ values[:, part])
    return h + read.output(torch.cat(heads, 1))


def by_hand(pfin: PFIN, x: Tensor, condition: Tensor, timesteps: Tensor, memory: Tensor | None = None) -> Tensor:
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
        if memory is not None and i == 1:  # before the second block
            h = read_by_hand(pfin, h, memory)
        shift, scale, alpha = rows[:, i].unbind(1)
        u = nn.functional.silu(block.hidden(norm(h) * (1 + scale) + shift)) * gates[:, i]
        h = h + (1 + alpha) * block.output(u)
    return pfin.output(norm(h))


MEMORY = pytest.mark.parametrize("memory_dim", [0, 3], ids=["no memory", "memory"])


def memory_of(pfin: PFIN) -> Tensor | None:
    return torch.randn(7, 3, dtype=torch.float64) if pfin.memory is not None else None


@MEMORY
@pytest.mark.parametrize("rows", [1, 7, STEPS, STEPS + 3])
def test_forward_is_the_methods_formula(rows: int, memory_dim: int) -> None:
    """Both ways of making the modulation tables: by the rows' timesteps, and by all of them."""
    pfin = network(memory_dim=memory_dim)
    memory = memory_of(pfin)
    x, condition = torch.randn(rows, 6, dtype=torch.float64), torch.randn(rows, 5, dtype=torch.float64)
    timesteps = torch.randint(0, STEPS, (rows,)).sort().values
    found = pfin(x, condition, timesteps, memory=memory)
    expected = by_hand(pfin, x, condition, timesteps, memory)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    parameters = list(pfin.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@MEMORY
@pytest.mark.parametrize("sampler_name", ["ddim", "renoise"])
@pytest.mark.parametrize("steps", [1, 3])
def test_chain_is_the_straightforward_loop(sampler_name: str, steps: int, memory_dim: int) -> None:
    pfin = network(memory_dim=memory_dim)
    memory = memory_of(pfin)
    sampler = NoiseSchedule(STEPS).sampler(sampler_name, steps)  # type: ignore[arg-type]
    initial, source = torch.randn(2, 4, 6, dtype=torch.float64).unbind(0)
    condition, ids = torch.randn(4, 5, dtype=torch.float64), torch.arange(4)
    key = {"seed": torch.tensor(3), "step": torch.tensor(1 << 16), "sample_ids": ids}
    found = pfin.chain(initial, source, condition, sampler, **key, stream=4, memory=memory)

    from_table = torch.zeros_like(initial)
    x = initial
    for i, (a, b, c, e, w) in enumerate(sampler.coefficients.double()):
        x0 = by_hand(pfin, x, condition, sampler.timesteps[i].expand(4), memory)
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


def test_a_new_network_ignores_its_memory_and_learns_to_read_it() -> None:
    torch.manual_seed(0)
    sizes = {"width": 16, "expansion": 2, "blocks": 2, "time_embedding": 8, "steps": STEPS}
    pfin = PFIN(6, 5, **sizes, memory_dim=3, memory_heads=4)
    x, condition, timesteps = torch.randn(4, 6), torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    found = [pfin(x, condition, timesteps, memory=torch.randn(7, 3)) for _ in range(2)]
    assert torch.equal(*found)
    (gradient,) = torch.autograd.grad(found[0].square().sum(), pfin.memory.output.weight)  # type: ignore[union-attr]
    assert gradient.abs().max() > 0


def test_a_chain_with_a_memory_that_is_not_read_is_the_fused_one() -> None:
    """The two ways of going through the steps agree, noise included."""
    fused, stepwise = network(), network(memory_dim=3)
    stepwise.load_state_dict(fused.state_dict(), strict=False)
    nn.init.zeros_(stepwise.memory.output.weight)  # type: ignore[union-attr]
    nn.init.zeros_(stepwise.memory.output.bias)  # type: ignore[union-attr]
    initial, source = torch.randn(2, 5, 6, dtype=torch.float64).unbind(0)
    condition = torch.randn(5, 5, dtype=torch.float64)
    key = {"seed": torch.tensor(3), "step": torch.tensor(1 << 16), "sample_ids": torch.arange(5)}
    for name in ("ddim", "renoise"):
        given = (initial, source, condition, NoiseSchedule(STEPS).sampler(name, 4))  # type: ignore[arg-type]
        found = stepwise.chain(*given, **key, stream=4, memory=memory_of(stepwise))
        torch.testing.assert_close(found, fused.chain(*given, **key, stream=4), rtol=1e-9, atol=1e-9)


def test_a_memory_goes_to_networks_that_have_one() -> None:
    x, condition, timesteps = torch.randn(4, 6), torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    given = (x.double(), condition.double(), timesteps)
    with pytest.raises(ValueError, match="memory must be given to a network that has one"):
        network(memory_dim=3)(*given)
    with pytest.raises(ValueError, match="memory must be given to a network that has one"):
        network()(*given, memory=torch.zeros(7, 3).double())
