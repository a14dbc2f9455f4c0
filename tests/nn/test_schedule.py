"""The noise schedule and its tables against the formulas they come from."""

import math

import pytest
import torch

from seda_fast.nn import NoiseSchedule
from seda_fast.nn.schedule import cosine_alpha_bar


def test_alpha_bar_is_nichol_and_dhariwals_cosine() -> None:
    abar = cosine_alpha_bar(1000)

    def f(t: float) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    # Before the cap on beta the product telescopes.
    for tau in (0, 1, 499, 900):
        assert abar[tau].item() == pytest.approx(f(tau + 1) / f(0), rel=1e-12)
    assert (abar[1:] < abar[:-1]).all()
    assert 0 < abar[-1] < 1e-6
    assert abar.dtype == torch.float64


def test_training_tables_carry_the_wiener_gain() -> None:
    schedule = NoiseSchedule(100)
    signal, noise = schedule.training_tables()
    gain = schedule.alpha_bar.sqrt()
    torch.testing.assert_close(signal, (gain * gain).float())
    torch.testing.assert_close(noise, (gain * (1 - schedule.alpha_bar).sqrt()).float())


@pytest.mark.parametrize(("steps", "expected"), [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])])
def test_timesteps_are_evenly_spaced_from_the_noisiest(steps: int, expected: list[int]) -> None:
    assert NoiseSchedule(1000).timesteps(steps).tolist() == expected


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_ddim_table_repeats_ddim_written_out(steps: int) -> None:
    schedule = NoiseSchedule(1000)
    sampler = schedule.sampler("ddim", steps)
    generator = torch.Generator().manual_seed(steps)
    target = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    eps = torch.randn(3, 4, dtype=torch.float64, generator=generator)

    def predict(x: torch.Tensor, i: int) -> torch.Tensor:
        return 0.3 * x + target * (1 + i)

    # Song et al. 2021, equation 12 with eta = 0, in x itself.
    abar = schedule.alpha_bar[sampler.timesteps]
    x = eps
    for i in range(steps):
        x0 = predict(x, i)
        if i + 1 < steps:
            eps_hat = (x - abar[i].sqrt() * x0) / (1 - abar[i]).sqrt()
            x = abar[i + 1].sqrt() * x0 + (1 - abar[i + 1]).sqrt() * eps_hat
    # The table moves the network's input, gain * x.
    state, result = sampler.initial_noise.double() * eps, torch.zeros_like(eps)
    for i, (a, b, c, e, w) in enumerate(sampler.coefficients.double()):
        found = predict(state / abar[i].sqrt(), i)
        result = result + w * found
        state = a * found + b * state + c * 0 + e * 0
    torch.testing.assert_close(result, x0, rtol=1e-5, atol=1e-5)
    assert not sampler.noisy


def test_renoise_table_noises_the_source_at_every_step() -> None:
    schedule, steps = NoiseSchedule(1000), 4
    sampler = schedule.sampler("renoise", steps)
    abar = schedule.alpha_bar[sampler.timesteps]
    a, b, c, e, w = sampler.coefficients.double().unbind(1)
    assert (a == 0).all()
    assert (b == 0).all()
    # State after step i is the training input at the next timestep: abar * source + sqrt(abar (1 - abar)) * eps.
    torch.testing.assert_close(c[:-1], abar[1:], rtol=1e-6, atol=0)
    torch.testing.assert_close(e[:-1], (abar * (1 - abar)).sqrt()[1:], rtol=1e-6, atol=0)
    torch.testing.assert_close(w, torch.full((steps,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(sampler.initial_signal.double(), abar[:1], rtol=1e-6, atol=0)
    assert sampler.noisy


@pytest.mark.parametrize("name", ["ddim", "renoise"])
def test_cut_chain_results_in_the_best_estimate_so_far(name: str) -> None:
    full = NoiseSchedule(1000).sampler(name, 5)  # type: ignore[arg-type]
    torch.testing.assert_close(full.first(5).coefficients, full.coefficients)
    for steps in range(1, 5):
        w = full.first(steps).coefficients[:, 4]
        expected = torch.full((steps,), 1 / steps) if name == "renoise" else torch.eye(steps)[-1]
        torch.testing.assert_close(w, expected)


def test_unknown_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="sampler must be 'ddim' or 'renoise', not 'euler'"):
        NoiseSchedule(10).sampler("euler", 2)  # type: ignore[arg-type]
