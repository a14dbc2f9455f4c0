"""Where Triton's kernels are launched: each on its operands' device, which need not be the current one."""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
tuning: Any = pytest.importorskip("seda_fast.kernels.tuning")
interaction: Any = pytest.importorskip("seda_fast.kernels.interaction")
network: Any = pytest.importorskip("seda_fast.kernels.interaction_network")
chain: Any = pytest.importorskip("seda_fast.kernels.reverse_chain")
noising: Any = pytest.importorskip("seda_fast.kernels.noising")
projection: Any = pytest.importorskip("seda_fast.kernels.projection")
timesteps: Any = pytest.importorskip("seda_fast.kernels.timesteps")
MODULES = (interaction, network, chain, noising, projection, timesteps)
ROWS, WIDTH, HIDDEN, STEPS = 40, 16, 32, 5


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


H, GATE, TABLE, KEY = empty(ROWS, WIDTH), empty(ROWS, HIDDEN), empty(STEPS, WIDTH), empty(dtype=torch.int64)
ROW = empty(ROWS, dtype=torch.int64)
W_H, W_O = empty(HIDDEN, WIDTH), empty(WIDTH, HIDDEN)
BLOCK, DROPPED = (H, GATE, ROW, TABLE, TABLE, TABLE), (0.1, KEY, KEY, ROW, 6)


def head(classes: int) -> None:
    weight, bias, lse = empty(classes, WIDTH), empty(classes), empty(ROWS)
    projection.semantic_projection(H, ROW, weight, weight, bias, 1.0, 0.1, -100)
    projection.semantic_projection_backward(empty(), empty(), H, ROW, weight, weight, bias, lse, 1.0, 0.1, -100, True)


def whole(backward: bool, in_chain: bool = False) -> None:
    """A network of two blocks, its gradients, or its chain."""
    modulation, gates = empty(STEPS, 2, 3, WIDTH), empty(2 * HIDDEN, WIDTH)
    ends = [part for w in (W_O[:, :WIDTH], W_O[:, :WIDTH], gates) for part in (w, empty(len(w)))]
    inner, last = [[t, t] for t in (W_H, empty(HIDDEN), W_O, empty(WIDTH))], [W_O[:, :WIDTH], empty(WIDTH)]
    if in_chain:
        coefficients, keys = empty(3, 5), (KEY, KEY, ROW, 6, True)
        chain.reverse_chain(H, H, H, coefficients, modulation[:3], *ends, *inner, *last, *keys)
        return
    _, *saved = network.interaction_network(H, [H], ROW, modulation, *ends, *inner, *last, *DROPPED)
    if backward:
        weights = (ends[0], ends[2], *ends[4:], *inner, last[0])
        network.interaction_network_backward(H, H, [H], ROW, modulation, *weights, *DROPPED, saved, [True, True])


CALLS: dict[str, Callable[[], object]] = {
    "q_sample": lambda: noising.q_sample(H, ROW, empty(STEPS), empty(STEPS), KEY, KEY, ROW, 0),
    "q_sample, backward": lambda: noising.q_sample_backward(H, ROW, empty(STEPS)),
    "timesteps": lambda: timesteps.stratified_timesteps(KEY, KEY, ROW, STEPS, 2, 0, ROWS),
    "block": lambda: interaction.interaction_block(*BLOCK, W_H, empty(HIDDEN), W_O, empty(WIDTH), *DROPPED, None, True),
    "block, backward": lambda: interaction.interaction_block_backward(
        H, *BLOCK, W_H, W_O, H, GATE, GATE, *DROPPED, None
    ),
    "network": lambda: whole(False),
    "network, backward": lambda: whole(True),
    "chain": lambda: whole(False, in_chain=True),
    "head": lambda: head(7),
    "large head": lambda: head(5000),
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[torch.device]]]:
    """Each kernel that is launched, none of which runs, and the devices that it is launched on."""
    made: list[tuple[str, list[torch.device]]] = []
    inside: list[torch.device] = []

    @contextlib.contextmanager
    def on(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor.device)
        yield
        inside.pop()

    def run(kernel: Any, *arguments: Any, **options: Any) -> None:
        made.append((kernel.fn.__name__, list(inside)))

    for module in MODULES:
        monkeypatch.setattr(module, "launching_on", on)
    monkeypatch.setattr(type(noising.noising_kernel), "run", run)
    return made


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_launch_is_on_its_operands_device(
    launches: list[tuple[str, list[torch.device]]], call: Callable[[], object]
) -> None:
    call()
    assert launches
    for kernel, devices in launches:
        assert devices == [torch.device("meta")], kernel


def test_the_calls_above_launch_every_kernel(launches: list[tuple[str, list[torch.device]]]) -> None:
    for call in CALLS.values():
        call()
    kernels = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    assert {kernel for kernel, _ in launches} == kernels


def test_a_launch_makes_the_tensor_s_device_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[object] = []

    @contextlib.contextmanager
    def device(which: object) -> Iterator[None]:
        entered.append(which)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", device)
    there: Any = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    with tuning.launching_on(there):
        assert entered == [torch.device("cuda", 1)]
    assert entered[1:] == ["left"]
    with tuning.launching_on(torch.zeros(1)):
        assert len(entered) == 2
