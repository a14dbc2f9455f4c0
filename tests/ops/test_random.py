"""The randomness contract: counters to bits, bits to uniforms, normals, dropout masks and timesteps."""

import math

import pytest
import torch
from torch import Tensor

from seda_fast import reference

ONES = 0xFFFFFFFF
# Salmon et al., SC 2011: the known-answer vectors of Random123's philox4x32-10.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# Where float32 goes wrong when it is used carelessly: both ends, the middle, and the turn's quarters.
CORNERS = sorted(
    {w + d for w in (0, 2**20, 2**21, 3 * 2**21, 2**22, 2**23, 11863283, 3 * 2**22, 2**24) for d in range(-3, 4)}
    & set(range(2**24))
)


def int64(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    words = reference.philox4x32([int64(c) for c in counter], [int64(k) for k in key])
    assert tuple(int(word) for word in words) == answer


def test_words_come_from_the_counters_that_the_contract_names() -> None:
    seed, step, sample, stream = 0x299F31D0A4093822, 0x1_13198A2E, 0x70734_85A308D3, 0x44
    words = reference.random_words(int64(seed), int64(step), torch.tensor([sample]), 10, stream)
    assert words.shape == (1, 10)
    for j in range(10):
        counter = (j // 4, 0x85A308D3, 0x13198A2E, 0x07073444)
        expected = reference.philox4x32([int64(c) for c in counter], [int64(0xA4093822), int64(0x299F31D0)])
        assert words[0, j] == expected[j % 4], f"word {j}"


def test_uniforms_are_exact_and_never_0_or_1() -> None:
    top = torch.tensor([w << 8 for w in CORNERS])
    u = reference.uniforms(top)
    assert u.tolist() == [w * 2.0**-24 + 2.0**-25 for w in CORNERS]
    assert torch.equal(u, reference.uniforms(top + 255)), "the low eight bits do not count"
    assert u.min() > 0
    assert u.max() < 1


def test_normals_have_the_moments_of_a_standard_normal() -> None:
    eps = reference.normals(int64(1), int64(2), torch.arange(2000), 100, 0)
    n = eps.numel()
    assert abs(eps.mean()) < 4 / math.sqrt(n)
    assert abs(eps.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((eps**4).mean() - 3) < 4 * math.sqrt(96 / n)
    pairs = torch.corrcoef(eps[:, :8].T) - torch.eye(8)
    assert pairs.abs().max() < 5 / math.sqrt(2000)


def test_normals_are_box_muller_on_neighbouring_words() -> None:
    key = (int64(5), int64(6), torch.tensor([7]))
    u = reference.uniforms(reference.random_words(*key, 4, 3))[0]
    eps = reference.normals(*key, 4, 3)[0]
    for i in (0, 2):
        radius, angle = math.sqrt(-2 * math.log(u[i])), 2 * math.pi * u[i + 1]
        assert eps[i] == pytest.approx(radius * math.cos(angle), abs=1e-12)
        assert eps[i + 1] == pytest.approx(radius * math.sin(angle), abs=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 2.0**-24, 2.0**-25, 1 - 2.0**-24])
def test_dropout_keeps_where_the_uniform_reaches_the_rate(rate: float) -> None:
    key = (int64(1), int64(2), torch.arange(50))
    keep = reference.dropout_keep(*key, 64, 6, rate)
    u = reference.uniforms(reference.random_words(*key, 64, 6))
    assert torch.equal(keep, u >= rate)


def test_dropout_drops_at_its_rate() -> None:
    keep = reference.dropout_keep(int64(3), int64(0), torch.arange(1000), 100, 6, 0.3)
    assert abs(keep.double().mean() - 0.7) < 4 * math.sqrt(0.21 / 1e5)


@pytest.mark.parametrize(("batch", "steps"), [(0, 10), (1, 1000), (7, 3), (64, 1000), (1000, 1000), (513, 17)])
def test_stratified_timesteps_follow_their_formula(batch: int, steps: int) -> None:
    key = (int64(11), int64(4), torch.arange(batch))
    tau = reference.stratified_timesteps(*key, steps, 2)
    u = reference.uniforms(reference.random_words(*key, 1, 2))[:, 0]
    expected = torch.floor((torch.arange(batch, dtype=torch.float64) + u) * steps / max(batch, 1)).long()
    assert torch.equal(tau, expected)
    assert torch.equal(tau, tau.sort().values)
    assert ((tau >= 0) & (tau < steps)).all()
