"""What only a GPU shows: captured graphs, launches on another device than the current one, peak memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from seda_fast.ops import interaction_block, q_sample, semantic_projection

pytestmark = pytest.mark.gpu


def noised(x0: Tensor, step: Tensor) -> Tensor:
    rows = torch.arange(x0.shape[0], device=x0.device)
    table = torch.ones(x0.shape[0], device=x0.device)
    seed = torch.zeros((), dtype=torch.int64, device=x0.device)
    return q_sample(x0, rows, table, table, seed=seed, step=step, sample_ids=rows)


def test_a_captured_graph_reads_the_step_at_every_replay() -> None:
    x0, step = torch.randn(64, 100, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
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
