"""One stage's reverse chain of five steps, no gradients, against a loop over the network as one would write it.

Such a loop calls the network at every step. What it makes of the condition is the same each time, and our operation
makes it once; so does a loop that is written with that in mind, which is measured as well ("gates once").
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seda_fast.nn.schedule import NoiseSchedule
from seda_fast.ops import ChainWeights, reverse_chain

DIM, WIDTH, HIDDEN, BLOCKS, STEPS = 768, 512, 1024, 3, 5
TIMESTEPS = 1000
ROWS = {"cuda": [65_536, 1], "cpu": [1024, 1]}
SIZES = (1, 16, 256, 1024, 4096, 16_384, 65_536)
# So many rows of a size's result, at its ends, are compared with float64; a chain's rows do not depend on each other.
CHECKED = 4096


class Network(nn.Module):
    """The denoiser as a plain module, with the modulation of every step and block in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.condition = nn.Linear(DIM, WIDTH), nn.Linear(DIM, WIDTH)
        self.gates = nn.Linear(WIDTH, BLOCKS * HIDDEN)
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(BLOCKS))
        self.output = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(BLOCKS))
        self.last = nn.Linear(WIDTH, DIM)
        self.register_buffer("modulation", torch.randn(STEPS, BLOCKS, 3, WIDTH) * 0.2)
        self.modulation: Tensor

    def forward(self, x: Tensor, condition: Tensor, i: int) -> Tensor:
        return self.step(x, *self.conditioned(condition), i)

    def conditioned(self, condition: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What a step needs of the condition, whichever step it is."""
        c = F.layer_norm(self.condition(condition), (WIDTH,))
        return c, (1 + self.gates(c)).chunk(BLOCKS, dim=1)

    def step(self, x: Tensor, c: Tensor, gates: tuple[Tensor, ...], i: int) -> Tensor:
        h = self.input(x) + c
        for layer in range(BLOCKS):
            shift, scale, alpha = self.modulation[i, layer]
            z = F.layer_norm(h, (WIDTH,)) * (1 + scale) + shift
            h = h + (1 + alpha) * self.output[layer](F.silu(self.hidden[layer](z)) * gates[layer])
        return self.last(F.layer_norm(h, (WIDTH,)))

    def weights(self) -> ChainWeights:
        hidden, output = list(self.hidden), list(self.output)
        return ChainWeights(
            *(self.input.weight, self.input.bias, self.condition.weight, self.condition.bias),
            *(self.gates.weight, self.gates.bias),
            *([layer.weight for layer in hidden], [layer.bias for layer in hidden]),
            *([layer.weight for layer in output], [layer.bias for layer in output]),
            *(self.last.weight, self.last.bias),
        )


def loop(network: Network, x: Tensor, condition: Tensor, coefficients: list[list[float]]) -> Tensor:
    """Deterministic sampling (DDIM): no noise, so that results can be compared."""
    clean = x
    for i, (a, b, *_) in enumerate(coefficients):
        clean = network(x, condition, i)
        x = a * clean + b * x
    return clean


def loop_with_gates_once(network: Network, x: Tensor, condition: Tensor, coefficients: list[list[float]]) -> Tensor:
    """The same with what the condition gives made before the first step."""
    clean, (c, gates) = x, network.conditioned(condition)
    for i, (a, b, *_) in enumerate(coefficients):
        clean = network.step(x, c, gates, i)
        x = a * clean + b * x
    return clean


LOOPS = {"": loop, ", gates once": loop_with_gates_once}


def diffusers_loop(
    network: Network, latent: Tensor, condition: Tensor, schedule: NoiseSchedule
) -> Callable[[], Tensor]:
    """The same sampling as diffusers would have it: its DDIMScheduler around the network, a step at a time."""
    from diffusers import DDIMScheduler

    alpha_bar = schedule.alpha_bar
    betas = 1 - alpha_bar / torch.cat((alpha_bar.new_ones(1), alpha_bar[:-1]))
    scheduler = DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        trained_betas=betas.numpy(),
        prediction_type="sample",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(STEPS, device=latent.device)
    gains = alpha_bar.sqrt().to(device=latent.device, dtype=latent.dtype)

    def run() -> Tensor:
        x = latent
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(network(gains[t] * x, condition, i), t, x).prev_sample
        return x

    return run


def products(rows: int, folded: bool) -> int:
    """The least multiplications of a chain's matrix products.

    ``folded``: without noise a step may go from one state of the network to the next by a product of its input and
    output weights, (d, d), which is made once where it saves more than it costs.
    """
    blocks = BLOCKS * 2 * WIDTH * HIDDEN
    usual = rows * (WIDTH * DIM + BLOCKS * WIDTH * HIDDEN + STEPS * (2 * WIDTH * DIM + blocks))
    saved = rows * (STEPS - 1) * (2 * WIDTH * DIM - WIDTH * WIDTH) - WIDTH * WIDTH * DIM
    return usual - max(0, saved) if folded else usual


@pytest.mark.parametrize("place", [0, 1], ids=["large batch", "one row"])
@torch.no_grad()
def bench_reverse_chain(
    contest: Any,
    device: torch.device,
    quick: bool,
    workload: Any,
    compile_variants: Any,
    challengers: Any,
    close: Any,
    peer: Any,
    place: int,
) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = [32, 1][place] if quick else ROWS[device.type][place]
    network = Network().to(device=device, dtype=dtype)
    latent, condition = (torch.randn(rows, DIM, device=device).to(dtype) for _ in range(2))
    schedule = NoiseSchedule(TIMESTEPS)
    sampler = schedule.sampler("ddim", STEPS)
    coefficients, steps = sampler.coefficients.to(device), sampler.coefficients.tolist()
    x = latent * float(sampler.initial_noise)
    ids, weights = torch.arange(rows, device=device), network.weights()
    seed, step = torch.tensor(1, device=device), torch.tensor(0, device=device)
    keys: dict[str, Any] = {"seed": seed, "step": step, "sample_ids": ids, "stream": 4, "noisy": False}
    competitors = {
        "seda_fast": lambda: reverse_chain(x, x, condition, coefficients, network.modulation, weights, **keys),
    }
    competitors |= challengers("reverse_chain", device, competitors["seda_fast"])
    for how, call in LOOPS.items():
        variants = {"eager": call, **compile_variants(call, device, large=True)}
        if device.type == "cuda":
            variants["compiled, reduce-overhead"] = torch.compile(
                call, mode="reduce-overhead", fullgraph=True, dynamic=False
            )
        for name, variant in variants.items():
            competitors[f"{name}{how}"] = lambda variant=variant: variant(network, x, condition, steps)
    competitors["eager, diffusers' DDIMScheduler"] = peer(lambda: diffusers_loop(network, latent, condition, schedule))
    wide = Network().to(device).double()
    wide.load_state_dict(network.state_dict())
    exact, usual = loop(wide, x.double(), condition.double(), steps), loop(network, x, condition, steps)

    def check(name: str, result: Tensor) -> None:
        close(result, exact, usual, name)

    flops = 2.0 * products(rows, folded=device.type == "cpu")
    parameters = sum(p.nbytes for p in network.parameters())
    title = f"reverse chain of {STEPS} steps, B = {rows} {str(dtype)[6:]}"
    contest(
        workload(title, "reverse_chain", moved=parameters + 3 * x.nbytes, flops=flops, dtype=dtype, host=True),
        competitors,
        check,
    )


@pytest.mark.timeout(1800)
@torch.no_grad()
def bench_chain_sizes(
    contest: Any, device: torch.device, quick: bool, growth: Any, any_size: Any, close: Any, peer: Any
) -> None:
    """The chain at every number of rows against eager and compiled, which is compiled for all sizes at once."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network = Network().to(device=device, dtype=dtype)
    wide = Network().to(device).double()
    wide.load_state_dict(network.state_dict())
    schedule = NoiseSchedule(TIMESTEPS)
    sampler = schedule.sampler("ddim", STEPS)
    coefficients, steps = sampler.coefficients.to(device), sampler.coefficients.tolist()
    weights, seed, step = network.weights(), torch.tensor(1, device=device), torch.tensor(0, device=device)
    keys: dict[str, Any] = {"seed": seed, "step": step, "stream": 4, "noisy": False}

    def drawn(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        latent, condition = (torch.randn(rows, DIM, device=device).to(dtype) for _ in range(2))
        return latent, latent * float(sampler.initial_noise), condition

    def ours(latent: Tensor, x: Tensor, condition: Tensor) -> Callable[[], Tensor]:
        ids = torch.arange(len(x), device=device)
        return lambda: reverse_chain(x, x, condition, coefficients, network.modulation, weights, **keys, sample_ids=ids)

    def other(call: Callable[..., Tensor], latent: Tensor, x: Tensor, condition: Tensor) -> Callable[[], Tensor]:
        return lambda: call(network, x, condition, steps)

    given = {n: drawn(n) for n in SIZES[: 2 if quick else None]}

    @cache
    def expected(n: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.arange(n, device=device)
        rows = torch.cat((rows[: CHECKED // 2], rows[CHECKED // 2 :][-CHECKED // 2 :]))
        x, condition = (part[rows] for part in given[n][1:])
        return rows, loop(wide, x.double(), condition.double(), steps), loop(network, x, condition, steps)

    def check(name: str, n: int, result: Tensor) -> None:
        assert len(result) == n and result.isfinite().all(), f"{name}, {n} rows"
        rows, *two = expected(n)
        close(result[rows], *two, f"{name}, {n} rows")

    points = {n: ours(*tensors) for n, tensors in given.items()}
    calls = {"eager": loop, "eager, gates once": loop_with_gates_once, **any_size(loop, device)}
    others = {name: {n: other(call, *tensors) for n, tensors in given.items()} for name, call in calls.items()}
    others["eager, diffusers' DDIMScheduler"] = {
        n: peer(lambda latent=latent, condition=condition: diffusers_loop(network, latent, condition, schedule))
        for n, (latent, _, condition) in given.items()
    }
    growth(contest, f"a reverse chain of {STEPS} steps over its rows", points, check, others)
