"""The counter generator in Triton: the same bits as the definition, the same normals to 2e-6."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seda_fast import reference

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
philox: Any = pytest.importorskip("seda_fast.kernels.philox")

# Where float32 goes wrong when it is used carelessly: both ends, the middle, and the turn's quarters.
CORNERS = sorted(
    {w + d for w in (0, 2**20, 2**21, 3 * 2**21, 2**22, 2**23, 11863283, 3 * 2**22, 2**24) for d in range(-3, 4)}
    & set(range(2**24))
)


def int64(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


@triton.jit
def _words_kernel(seed_ptr, step_ptr, ids_ptr, out_ptr, stream, rows, QUADS: tl.constexpr):
    row = tl.arange(0, 8)
    ids = tl.load(ids_ptr + row, mask=row < rows, other=0)[:, None]
    quads = tl.arange(0, QUADS)[None, :]
    words = philox.random_words(seed_ptr, step_ptr, ids, quads, stream)
    for i in tl.static_range(4):
        place = row[:, None] * 4 * QUADS + quads * 4 + i
        tl.store(out_ptr + place, words[i].to(tl.int64), mask=row[:, None] < rows)


@triton.jit
def _box_muller_kernel(word0_ptr, word1_ptr, cosine_ptr, sine_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word0 = tl.load(word0_ptr + i, mask=i < count, other=0).to(tl.uint32)
    word1 = tl.load(word1_ptr + i, mask=i < count, other=0).to(tl.uint32)
    cosine, sine = philox.box_muller(word0, word1)
    tl.store(cosine_ptr + i, cosine, mask=i < count)
    tl.store(sine_ptr + i, sine, mask=i < count)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where Triton runs: interpreted on the CPU, or on a GPU."""
    if request.param == "cpu" and not philox.INTERPRETED:
        pytest.skip(f"{request.node.nodeid}: Triton is compiling for a GPU in this process")
    return str(request.param)


def test_triton_draws_the_same_bits(device: str) -> None:
    ids = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 + 12345, 2**56 - 1], device=device)
    for seed, step, stream in ((0, 0, 0), (-1, 2**33 + 5, 255), (0x299F31D0A4093822, 2**31, 6)):
        keys = (int64(seed).to(device), int64(step).to(device))
        out = torch.full((6, 32), -1, device=device)
        _words_kernel[(1,)](*keys, ids, out, stream, 6, QUADS=8)
        assert torch.equal(out, reference.random_words(*keys, ids, 32, stream))


def box_muller(word0: Tensor, word1: Tensor, device: str) -> tuple[Tensor, Tensor]:
    count = word0.numel()
    cosine, sine = (torch.full((count,), math.nan, device=device) for _ in range(2))
    grid = (triton.cdiv(count, 1024),)
    _box_muller_kernel[grid](word0.to(device), word1.to(device), cosine, sine, count, BLOCK=1024)
    return cosine.double().cpu(), sine.double().cpu()


def exact_box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    u0, u1 = reference.uniforms(word0).numpy(), reference.uniforms(word1).numpy()
    radius = np.sqrt(-2 * np.log(u0))
    angle = 2 * np.pi * u1
    return torch.from_numpy(radius * np.cos(angle)), torch.from_numpy(radius * np.sin(angle))


@pytest.mark.parametrize("words", ["corners", "random"])
def test_triton_makes_the_same_normals_to_2e_6(device: str, words: str, rng: np.random.Generator) -> None:
    if words == "corners":
        top = torch.tensor(CORNERS)
        word0, word1 = (top[:, None] << 8).expand(-1, len(top)).flatten(), (top << 8).repeat(len(top))
    else:
        word0, word1 = (torch.from_numpy(rng.integers(0, 2**32, 200_000)) for _ in range(2))
    for got, exact in zip(box_muller(word0, word1, device), exact_box_muller(word0, word1), strict=True):
        assert (got - exact).abs().max() <= 2e-6


def test_triton_keeps_the_largest_uniform_apart_from_1(device: str) -> None:
    top, zero = int64(2**32 - 1).reshape(1), int64(0).reshape(1)
    cosine, _ = box_muller(top, zero, device)
    assert cosine.item() == pytest.approx(math.sqrt(-2 * math.log1p(-(2.0**-25))), rel=1e-6)
