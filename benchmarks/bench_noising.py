"""Noising, forward: one pass with counter-based noise, against PyTorch's generator and two more passes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from seda_fast import reference
from seda_fast.ops import q_sample

STEPS = 1000
DIM = 768
ROWS = {"cuda": 65_536, "cpu": 1024}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def bench_noising(
    contest: Any,
    device: torch.device,
    quick: bool,
    workload: Any,
    compile_variants: Any,
    challengers: Any,
    close: Any,
    backward: bool,
) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = 256 if quick else ROWS[device.type]
    x0 = torch.randn(rows, DIM, device=device).to(dtype)
    tau = torch.randint(0, STEPS, (rows,), device=device).sort().values
    angle = torch.linspace(0.01, 1.5, STEPS, device=device)
    signal, noise = angle.cos(), angle.sin()
    seed, step = torch.tensor(1, device=device), torch.tensor(2, device=device)
    ids = torch.arange(rows, device=device)

    def eager(x0: Tensor, tau: Tensor) -> Tensor:
        return (signal[tau, None] * x0 + noise[tau, None] * torch.randn_like(x0)).to(x0.dtype)

    def eager_backward(grad: Tensor, tau: Tensor) -> Tensor:
        return (signal[tau, None] * grad).to(grad.dtype)

    plain = eager_backward if backward else eager
    competitors = {
        "seda_fast": lambda: (
            torch.ops.seda_fast.q_sample_backward(x0, tau, signal)
            if backward
            else q_sample(x0, tau, signal, noise, seed=seed, step=step, sample_ids=ids)
        ),
        "eager": lambda: plain(x0, tau),
    }
    operation = "q_sample_backward" if backward else "q_sample"
    competitors |= challengers(operation, device, competitors["seda_fast"])
    for name, variant in compile_variants(plain, device).items():
        competitors[name] = lambda variant=variant: variant(x0, tau)
    exact = reference.q_sample(x0.double(), tau, signal, noise, seed=seed, step=step, sample_ids=ids)
    expected = signal.double()[tau, None] * x0.double() if backward else exact
    usual = plain(x0, tau) if backward else exact.to(dtype)

    def check(name: str, result: Tensor) -> None:
        if backward or name.startswith("seda_fast"):
            # What the contract allows the normals.
            close(result, expected, usual, name, contract=0.0 if backward else 2e-6)
            return
        # Another generator's noise: compare what remains of it after the signal is taken off.
        eps = (result.float() - signal[tau, None] * x0.float()) / noise[tau, None]
        assert abs(eps.mean()) < 0.02, name
        assert abs(eps.std() - 1) < 0.02, name

    title = f"noising {'backward' if backward else 'forward'}, {rows} x {DIM} {str(dtype)[6:]}"
    contest(workload(title, operation, moved=2 * x0.nbytes, dtype=dtype), competitors, check)
