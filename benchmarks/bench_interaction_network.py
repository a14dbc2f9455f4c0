"""A whole PFIN, forward and backward, with dropout, against the same network in plain PyTorch."""

import copy
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_train import network
from seda_fast.nn import PFIN
from seda_fast.nn.interaction import Dropout

DIM, WIDTH, EXPANSION, BLOCKS, STEPS, DROPOUT = 768, 512, 2, 3, 1000, 0.1
ROWS = {"cuda": 16_384, "cpu": 1024}


def bench_interaction_network(
    contest: Any, device: torch.device, quick: bool, workload: Any, compile_variants: Any, close: Any
) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = 64 if quick else ROWS[device.type]
    # The angles of high frequencies are rounded by up to a thousand radians' last bit, and how far that takes the
    # gradient of the tables (22 to 33 roundings were seen, 32 are allowed to eager) depends on the timesteps drawn.
    torch.manual_seed(0)
    net = PFIN(DIM, DIM, width=WIDTH, expansion=EXPANSION, blocks=BLOCKS, time_embedding=64, steps=STEPS)
    net = net.to(device=device, dtype=dtype)
    x, condition, weight = (torch.randn(rows, DIM, device=device).to(dtype) for _ in range(3))
    tau = torch.randint(0, STEPS, (rows,), device=device).sort().values
    counters = (torch.tensor(1, device=device), torch.tensor(2, device=device), torch.arange(rows, device=device))
    dropout = Dropout(DROPOUT, *counters, 6)

    def gradients(net: PFIN, result: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(result, list(net.parameters()), weight)

    competitors = {
        "seda_fast": lambda: gradients(net, net(x, condition, tau, dropout)),
        "eager": lambda: gradients(net, network(net, x, condition, tau, DROPOUT)),
    }
    variants = compile_variants(network, device, large=True)
    for name, variant in variants.items():
        competitors[name] = lambda variant=variant: gradients(net, variant(net, x, condition, tau, DROPOUT))

    # Dropout's masks differ, so values and gradients are compared without it.
    wide = copy.deepcopy(net).double()
    exact = network(wide, x.double(), condition.double(), tau, 0.0)
    expected = torch.autograd.grad(exact, list(wide.parameters()), weight.double())
    usual = network(net, x, condition, tau, 0.0)
    usual_gradients = gradients(net, usual)
    functions = {"seda_fast": lambda: net(x, condition, tau), "eager": lambda: usual}
    functions |= {name: lambda v=v: v(net, x, condition, tau, 0.0) for name, v in variants.items()}

    def check(name: str, result: tuple[Tensor, ...]) -> None:
        assert all(part.isfinite().all() for part in result), name
        value = functions[name]()
        close(value, exact, usual, f"{name} without dropout")
        found = usual_gradients if value is usual else gradients(net, value)
        for (part, _), *three in zip(net.named_parameters(), found, expected, usual_gradients, strict=True):
            close(*three, f"{name} without dropout, gradient of {part}")

    hidden = EXPANSION * WIDTH
    products = 2 * DIM * WIDTH + BLOCKS * (2 * WIDTH * hidden + WIDTH * hidden) + WIDTH * DIM
    # Read once: x, the condition and the gradient; written once: the prediction.
    moved = 4 * rows * DIM * x.element_size()
    title = f"network forward + backward, B = {rows} {str(dtype)[6:]}"
    operation = "interaction_network"
    # Neither input asks for a gradient: their products have one less backward.
    flops = rows * (6 * products - 2 * 2 * DIM * WIDTH)
    contest(workload(title, operation, moved=moved, flops=flops, dtype=dtype), competitors, check)
