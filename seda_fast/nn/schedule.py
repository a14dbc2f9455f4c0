"""The noise schedule and the coefficient tables that training and every sampler read from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def cosine_alpha_bar(steps: int) -> Tensor:
    """Cumulative signal rate of the cosine schedule, float64 (T,), strictly falling (Nichol & Dhariwal 2021, eq. 17).

    Their offset s = 0.008 and their cap of 0.999 on each beta.
    """
    # On the CPU also where a model is made on the meta device, whose constants nothing brings afterwards.
    t = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
    f = ((t + 0.008) / 1.008 * (math.pi / 2)).cos().square()
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, dim=0)


@dataclass(frozen=True)
class Sampler:
    """What a reverse chain of S steps needs besides weights; all tensors float32 but the timesteps.

    Attributes:
        timesteps: int64 (S,), descending.
        coefficients: (S, 5), columns a, b, c, e, w of ``x <- a*x0_hat + b*x + c*source + e*eps; result += w*x0_hat``.
        initial_signal, initial_noise: (1,) tables of the initial state ``signal*source + noise*eps``.
        noisy: whether any e is not 0.
    """

    timesteps: Tensor
    coefficients: Tensor
    initial_signal: Tensor
    initial_noise: Tensor
    noisy: bool

    def first(self, steps: int) -> Sampler:
        """The chain cut after ``steps`` steps: its result is the best estimate known by then."""
        table = self.coefficients[:steps].clone()
        share = table[:, 4].sum()
        if share > 0:
            table[:, 4] /= share
        else:
            table[-1, 4] = 1
        return Sampler(self.timesteps[:steps], table, self.initial_signal, self.initial_noise, self.noisy)

    def to(self, device: torch.device) -> Sampler:
        """The same tables on ``device``."""
        return Sampler(
            self.timesteps.to(device),
            self.coefficients.to(device),
            self.initial_signal.to(device),
            self.initial_noise.to(device),
            self.noisy,
        )


class NoiseSchedule:
    """Signal rates of T timesteps and every table made from them.

    The networks see ``sqrt(alpha_bar) * x``, the Wiener estimate's gain, which keeps noise out of the residual stream.
    All tables here carry that gain, so no operation ever multiplies by it.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.alpha_bar = cosine_alpha_bar(steps)

    def training_tables(self) -> tuple[Tensor, Tensor]:
        """``(signal, noise)`` (T,) of `ops.q_sample` for the networks' input: ``abar``, ``sqrt(abar (1 - abar))``."""
        abar = self.alpha_bar
        return abar.float(), (abar * (1 - abar)).sqrt().float()

    def timesteps(self, sampling_steps: int) -> Tensor:
        """S evenly spaced timesteps, int64, from T-1 downward ("trailing" spacing: Lin et al. 2024, table 2)."""
        places = [round(self.steps - i * self.steps / sampling_steps) - 1 for i in range(sampling_steps)]
        return torch.tensor(places, device="cpu")

    def sampler(self, name: Literal["ddim", "renoise"], sampling_steps: int) -> Sampler:
        """The coefficient table of a sampler, computed in float64.

        "ddim": deterministic DDIM (Song et al. 2021, eq. 12, eta = 0) from pure noise; the result is the last
        estimate. "renoise": the source is noised afresh at every timestep; the result is the mean of the estimates.
        """
        tau = self.timesteps(sampling_steps)
        abar = self.alpha_bar[tau]
        gain, noise_rate = abar.sqrt(), (1 - abar).sqrt()
        # On the CPU whatever the default device is, as the rates are; `Sampler.to` moves them.
        table = torch.zeros(sampling_steps, 5, dtype=torch.float64, device="cpu")
        a, b, c, e, w = table.unbind(1)
        if name == "ddim":
            # Written for x, then turned to the state gain * x that the network reads.
            ratio = noise_rate[1:] / noise_rate[:-1]
            a[:-1] = gain[1:] * (gain[1:] - gain[:-1] * ratio)
            b[:-1] = gain[1:] * ratio / gain[:-1]
            w[-1] = 1
            initial_signal, initial_noise = torch.zeros(1, device="cpu"), gain[:1]
        elif name == "renoise":
            c[:-1] = gain[1:] * gain[1:]
            e[:-1] = gain[1:] * noise_rate[1:]
            w[:] = 1 / sampling_steps
            initial_signal, initial_noise = abar[:1], (gain * noise_rate)[:1]
        else:
            raise ValueError(f"sampler must be 'ddim' or 'renoise', not {name!r}")
        return Sampler(
            tau, table.float(), initial_signal.float(), initial_noise.float(), name == "renoise" and sampling_steps > 1
        )
