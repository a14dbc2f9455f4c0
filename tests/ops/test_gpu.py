"""What only a GPU shows: captured graphs, launches on another device than the current one, peak memory."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from seda_fast import reference
from seda_fast.ops import (
    ChainWeights,
    cuda_status,
    interaction_block,
    q_sample,
    reverse_chain,
    semantic_projection,
    stratified_timesteps,
    use_backend,
)

pytestmark = pytest.mark.gpu
needs_library = pytest.mark.usefixtures("cuda_library")


@pytest.fixture
def cuda_library(request: pytest.FixtureRequest) -> None:
    """Skip, by name, a test of the CUDA C++ operators where they are not here."""
    if not cuda_status()["available"]:
        pytest.skip(f"{request.node.nodeid} needs the CUDA library: {cuda_status()['reason']}")


def noised(x0: Tensor, step: Tensor) -> Tensor:
    rows = torch.arange(x0.shape[0], device=x0.device)
    table = torch.ones(x0.shape[0], device=x0.device)
    seed = torch.zeros((), dtype=torch.int64, device=x0.device)
    return q_sample(x0, rows, table, table, seed=seed, step=step, sample_ids=rows)


def test_a_captured_graph_reads_the_step_at_every_replay() -> None:
    x0, step = torch.randn(64, 100, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        noised(x0, step)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = noised(x0, step)
    for value in (3, 2**33):
        step.fill_(value)
        graph.replay()
        assert torch.equal(captured, noised(x0, torch.tensor(value, device="cuda")))


def test_captured_timesteps_follow_the_step() -> None:
    seed, step, ids = torch.tensor(1, device="cuda"), torch.tensor(0, device="cuda"), torch.arange(99, device="cuda")
    stratified_timesteps(seed, step, ids, 1000, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = stratified_timesteps(seed, step, ids, 1000, 2)
    for value in (3, 2**33):
        step.fill_(value)
        graph.replay()
        assert torch.equal(captured, reference.stratified_timesteps(seed, step, ids, 1000, 2))


def test_a_whole_block_and_head_are_captured() -> None:
    rows, width = 256, 64
    given: dict[str, Any] = {
        "h": torch.randn(rows, width, device="cuda"),
        "gate": torch.randn(rows, 2 * width, device="cuda"),
        "shift": torch.randn(10, width, device="cuda"),
        "scale": torch.randn(10, width, device="cuda"),
        "alpha": torch.randn(10, width, device="cuda"),
        "w_h": torch.randn(2 * width, width, device="cuda"),
        "b_h": torch.randn(2 * width, device="cuda"),
        "w_o": torch.randn(width, 2 * width, device="cuda"),
        "b_o": torch.randn(width, device="cuda"),
    }
    leaves = [tensor.requires_grad_() for tensor in given.values()]
    tau, ids = torch.randint(0, 10, (rows,), device="cuda"), torch.arange(rows, device="cuda")
    seed, step = torch.tensor(1, device="cuda"), torch.tensor(0, device="cuda")
    head, bias = torch.randn(30, width, device="cuda"), torch.zeros(30, device="cuda")

    def gradients() -> tuple[Tensor, ...]:
        key = {"seed": seed, "step": step, "sample_ids": ids}
        h = interaction_block(**given, timesteps=tau, dropout=0.2, **key)
        centre, entropy = semantic_projection(h, tau, head, head, bias)
        return torch.autograd.grad(centre + entropy, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    step.fill_(5)
    graph.replay()
    for got, expected in zip(captured, gradients(), strict=True):
        assert torch.equal(got, expected)


def test_launches_happen_on_the_tensor_s_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x0 = torch.randn(9, 33, device="cuda:1")
    with torch.cuda.device(0):
        there = noised(x0, torch.tensor(4, device="cuda:1"))
    assert there.device == x0.device
    here = noised(x0.to("cuda:0"), torch.tensor(4, device="cuda:0"))
    assert torch.equal(there.cpu(), here.cpu())


def test_a_large_head_needs_less_than_a_twentieth_of_its_logits() -> None:
    rows, dim, classes = 16_384, 768, 21_841
    features = torch.randn(rows, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(classes, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(classes, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, classes, (rows,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    semantic_projection(features, labels, None, weight, bias)[1].backward()
    extra = torch.cuda.max_memory_allocated() - before - features.nbytes - weight.nbytes - bias.nbytes
    assert extra < 4 * rows * classes / 20


def chain_arguments(rows: int, dim: int, width: int, hidden: int, blocks: int, steps: int) -> dict[str, Any]:
    """A call of `reverse_chain` in bfloat16 on the GPU."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device="cuda") * scale).bfloat16()

    def linear(out: int, into: int) -> tuple[Tensor, Tensor]:
        return draw(out, into, scale=into**-0.5), draw(out, scale=0.1)

    inner, outer = ([linear(*s) for _ in range(blocks)] for s in ((hidden, width), (width, hidden)))
    parts = [[layer[part] for layer in layers] for layers in (inner, outer) for part in (0, 1)]
    first = (*linear(width, dim), *linear(width, 2 * dim), *linear(blocks * hidden, width))
    return {
        "initial": draw(rows, dim),
        "source": draw(rows, dim),
        "condition": draw(rows, 2 * dim),
        "coefficients": torch.rand(steps, 5, device="cuda") * 0.6,
        "modulation": torch.randn(steps, blocks, 3, width, device="cuda") * 0.2,
        "weights": ChainWeights(*first, *parts, *linear(dim, width)),
        "seed": torch.tensor(9, device="cuda"),
        "step": torch.tensor(2, device="cuda"),
        "sample_ids": torch.arange(rows, device="cuda") + 2**35,
        "stream": 4,
    }


def plain_chain(given: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The definition in another dtype."""
    first = [given[n].to(dtype) for n in ("initial", "source", "condition", "coefficients", "modulation")]
    weights = [[t.to(dtype) for t in w] if isinstance(w, list) else w.to(dtype) for w in given["weights"]]
    keys = {n: given[n] for n in ("seed", "step", "sample_ids", "stream")}
    return reference.reverse_chain(*first, *weights, **keys)


@needs_library
@pytest.mark.parametrize(
    "sizes",
    [
        *((1, 768, 512, 1024, 3, 5), (333, 384, 512, 1024, 3, 5), (20_000, 768, 512, 1024, 3, 2)),
        # Panels, chunks and tiles that end inside, of each kernel; more rows than tiles of a pass.
        *((16, 136, 192, 320, 2, 3), (77, 64, 1024, 64, 1, 3), (200, 64, 1024, 64, 1, 3), (333, 136, 192, 320, 2, 3)),
        *((4300, 136, 192, 320, 2, 3), (9000, 40, 64, 64, 1, 1)),
    ],
    ids=str,
)
def test_the_persistent_chain_errs_no_more_than_twice_as_much_as_eager(sizes: tuple[int, ...]) -> None:
    given = chain_arguments(*sizes)
    with use_backend("cuda"):
        got = reverse_chain(**given)
    exact, eager = plain_chain(given, torch.float64), plain_chain(given, torch.bfloat16)
    assert torch.isfinite(got).all()
    assert (got.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max()


@needs_library
@pytest.mark.parametrize("rows", [1, 200])
def test_the_persistent_chain_takes_a_modulation_that_begins_anywhere(rows: int) -> None:
    given = chain_arguments(rows, 64, 128, 256, 2, 3)
    modulation = given["modulation"]
    moved = torch.cat((modulation.new_zeros(1), modulation.flatten()))[1:].view(modulation.shape)
    assert moved.data_ptr() % 16
    with use_backend("cuda"):
        assert torch.equal(reverse_chain(**{**given, "modulation": moved}), reverse_chain(**given))


# A row for each of the three ways that a call is spread over the GPU; and what is chosen by itself, where a capture
# must take what ran before it.
@needs_library
@pytest.mark.parametrize(("rows", "chosen"), [(1, "cuda"), (200, "cuda"), (5000, "cuda"), (64, "auto"), (128, "auto")])
def test_the_persistent_chain_is_captured_and_reads_the_step_at_every_replay(rows: int, chosen: str) -> None:
    given = chain_arguments(rows, 64, 128, 256, 2, 3)
    with use_backend(chosen):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            reverse_chain(**given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = reverse_chain(**given)
        for value in (3, 2**33):
            given["step"].fill_(value)
            graph.replay()
            assert torch.equal(captured, reverse_chain(**given))


# In a process of its own: nothing of the library has run there before.
COLD = """
import runpy, sys, torch
here = runpy.run_path(sys.argv[1])
given = here["chain_arguments"](int(sys.argv[2]), 64, 128, 256, 2, 3)
graph = torch.cuda.CUDAGraph()
with here["use_backend"]("cuda"):
    with torch.cuda.graph(graph):
        captured = here["reverse_chain"](**given)
    graph.replay()
    assert torch.equal(captured, here["reverse_chain"](**given))
"""


@needs_library
@pytest.mark.parametrize("rows", [1, 200, 5000])
def test_the_persistent_chain_s_first_call_may_be_inside_a_capture(rows: int) -> None:
    command = [sys.executable, "-c", COLD, __file__, str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
