"""Triton's kernels under NVIDIA's compute-sanitizer: no access out of bounds, no race for shared memory."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seda_fast.ops import (
    ChainWeights,
    _dispatch,
    interaction_block,
    interaction_network,
    q_sample,
    reverse_chain,
    semantic_projection,
    stratified_timesteps,
    use_backend,
)

pytest.importorskip("triton")
# What a tool says at the end where it found nothing.
CLEAN = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards displayed"}
HERE = Path(__file__)


def whole_network(draw: Callable[..., Tensor], width: int, hidden: int) -> ChainWeights:
    """Of two blocks, for 13 features and a condition of 12."""
    first = draw(width, 13), draw(width), draw(width, 12), draw(width), draw(2 * hidden, width), draw(2 * hidden)
    inner = ([draw(*shape), draw(*shape)] for shape in ((hidden, width), (hidden,), (width, hidden), (width,)))
    return ChainWeights(*first, *inner, draw(13, width), draw(13))


def small_calls(device: str) -> None:
    """A small call of each kernel, of sizes that leave every tile unfilled."""
    rows, width, hidden, steps = 37, 20, 36, 5
    key = {
        "seed": torch.tensor(3, device=device),
        "step": torch.tensor(1, device=device),
        "sample_ids": torch.arange(rows, device=device),
    }

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(torch.float16).requires_grad_()

    stratified_timesteps(key["seed"], key["step"], key["sample_ids"], steps, 2)
    tau = torch.arange(rows, device=device) % steps
    table = torch.rand(steps, device=device)
    q_sample(draw(rows, width), tau, table, table, **key).sum().backward()
    tables = [draw(steps, width) for _ in range(3)]
    weights = draw(hidden, width), draw(hidden), draw(width, hidden), draw(width)
    for order in (tau, tau.sort().values):
        h, gate = draw(rows, width), draw(rows, hidden)
        interaction_block(h, gate, order, *tables, *weights, dropout=0.2, **key).sum().backward()
        network, modulation = whole_network(draw, width, hidden), draw(steps, 2, 3, width)
        x, conditions = draw(rows, 13), (draw(rows, 7), draw(rows, 5))
        interaction_network(x, conditions, order, modulation, network, dropout=0.2, **key).sum().backward()
    with torch.no_grad():
        coefficients, condition = torch.rand(steps, 5, device=device), torch.cat(conditions, dim=1)
        reverse_chain(x, x, condition, coefficients, modulation, network, **key, stream=4)
    # One chunk of classes, and several.
    for classes in (7, 2300):
        labels = torch.arange(rows, device=device) % 7
        head = draw(rows, width), labels, draw(classes, width), draw(classes, width), draw(classes)
        sum(semantic_projection(*head, label_smoothing=0.1)).backward()  # type: ignore[union-attr, arg-type]


def test_the_calls_launch_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: list[Any] = [
        pytest.importorskip(f"seda_fast.kernels.{name}")
        for name in ("interaction", "interaction_network", "noising", "projection", "reverse_chain", "timesteps")
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (reason := _dispatch.refusal("q_sample", "triton", device)) is not None:
        pytest.skip(f"test_the_calls_launch_every_kernel: {reason}")
    launched: set[str] = set()
    kernel = type(modules[0].gate_kernel)
    monkeypatch.setattr(kernel, "run", lambda kernel, *unused, **options: launched.add(kernel.fn.__name__))
    with use_backend("triton"):
        small_calls(device)
    assert launched == {name for module in modules for name in vars(module) if name.endswith("_kernel")}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tool", CLEAN)
def test_the_kernels_are_clean_under_compute_sanitizer(request: pytest.FixtureRequest, tool: str) -> None:
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, homes), "/usr/local/cuda/bin"])
    sanitizer = shutil.which("compute-sanitizer", path=path)
    if sanitizer is None:
        pytest.skip(f"{request.node.nodeid} needs compute-sanitizer")
    code = "import runpy, sys, torch; here = runpy.run_path(sys.argv[1])\n"
    code += "with here['use_backend']('triton'): here['small_calls']('cuda'); torch.cuda.synchronize()\n"
    code += "print('all calls were made')"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code, str(HERE)]
    # Each tensor in memory of its own, so that what lies behind it belongs to no other.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    assert "all calls were made" in said
    assert CLEAN[tool] in said, said[-6000:]
