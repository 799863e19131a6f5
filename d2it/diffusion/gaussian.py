"""Gaussian diffusion with the paper's linear schedule (Sec. 4.1), and the variational bound of learned variances."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2it.diffusion.process import NUM_TIMESTEPS, Diffusion, DiffusionConfig, draw_fractions


class GaussianDiffusion(Diffusion):
    """The paper's process: q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) for t = 0 ... T-1, betas linear.

    Args:
        num_timesteps: T.
        beta_start: the first beta.
        beta_end: the last beta.
        config: what the model predicts and how its loss is weighted; None is the paper's.
        learn_sigma: the model's output has 2C channels, the second half v interpolating the log-variance between its
            two bounds (LEARNED_RANGE of Nichol and Dhariwal, Eq. 15).
        device: where the tables lie; `to` moves them.

    Raises:
        ValueError: betas that do not ascend within (0, 1), no timestep, or settings of another path.
    """

    def __init__(
        self,
        num_timesteps: int = NUM_TIMESTEPS,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
        *,
        config: DiffusionConfig | None = None,
        learn_sigma: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"0 < beta_start <= beta_end < 1 must hold, got {beta_start} and {beta_end}")
        self.config = config or DiffusionConfig()
        if self.config.path != "ddpm":
            raise ValueError(f"config must be of the ddpm path, got {self.config.path!r}")
        self.num_timesteps = num_timesteps
        self.beta_start = beta_start
        self.beta_end = beta_end
        self.learn_sigma = learn_sigma
        betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        self._signal = (1 - betas).cumprod(0)  # abar
        self._tabulate(device)
        if self.config.shift != 1.0:
            ratio = (1 / self._signal - 1).sqrt()  # s / a, ascending
            middles = (ratio[1:] * ratio[:-1]).sqrt()
            self._shifted = torch.searchsorted(middles, self.config.shift * ratio)  # stays: the host draws too
            self.tables["shifted"] = self._shifted.to(device)

    def _tabulate(self, device: torch.device | str) -> None:
        signal = self._signal
        previous = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
        betas = 1 - signal / previous
        variance = betas * (1 - previous) / (1 - signal)
        # The variance of t = 0 is 0: its logarithm is that of t = 1, as in DDPM's released code.
        clipped = torch.cat([variance[1:2], variance[1:]]) if len(signal) > 1 else betas
        tables = {
            "sqrt_alphas_cumprod": signal.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - signal).sqrt(),
            "sqrt_recip_alphas_cumprod": signal.rsqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / signal - 1).sqrt(),
            "sqrt_previous": previous.sqrt(),
            "sqrt_one_minus_previous": (1 - previous).sqrt(),
            "posterior_log_variance": clipped.log(),
            "posterior_mean_x0": betas * previous.sqrt() / (1 - signal),
            "posterior_mean_xt": (1 - previous) * (1 - betas).sqrt() / (1 - signal),
            "log_betas": betas.log(),
        }
        self.tables = {name: table.float().to(device) for name, table in tables.items()}

    def respaced(self, timesteps: Sequence[int]) -> GaussianDiffusion:
        """The diffusion that visits `timesteps` alone (ascending): its t counts them, its tables lie where ours do."""
        spaced = copy.copy(self)
        spaced.num_timesteps = len(timesteps)
        spaced._signal = self._signal[list(timesteps)]
        spaced._tabulate(self.tables["log_betas"].device)
        return spaced

    def to(self, device: torch.device | str) -> GaussianDiffusion:
        """Moves the tables to `device`, in place."""
        self.tables = {name: table.to(device) for name, table in self.tables.items()}
        return self

    def _at(self, name: str, t: Tensor) -> Tensor:
        return self.tables[name][t].view(-1, 1, 1, 1)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._at("sqrt_alphas_cumprod", t), self._at("sqrt_one_minus_alphas_cumprod", t)

    def sample_timesteps(
        self, batch: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """(B,) int64 in 0 ... T-1, as the settings draw them; a shift takes the timestep whose s / a is nearest."""
        if self.config.timesteps == "uniform":
            t = torch.randint(self.num_timesteps, (batch,), generator=generator, device=device)
        else:
            fraction = draw_fractions(self.config.timesteps, batch, generator, device)
            t = (fraction * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)
        if self.config.shift == 1.0:
            return t
        return (self._shifted if t.device.type == "cpu" else self.tables["shifted"])[t]

    def predict(self, out: Tensor, xt: Tensor, t: Tensor, prediction: str | None = None) -> tuple[Tensor, Tensor]:
        if (prediction or self.config.prediction) == "epsilon":
            return self.predict_x0(xt, out, t), out
        return super().predict(out, xt, t, prediction)

    def predict_x0(self, xt: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_0 of x_t and its noise."""
        return self._at("sqrt_recip_alphas_cumprod", t) * xt - self._at("sqrt_recipm1_alphas_cumprod", t) * noise

    def q_sample_before(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_{t-1} of x_0 and its noise; x_0 itself at t = 0."""
        return self._at("sqrt_previous", t) * x0 + self._at("sqrt_one_minus_previous", t) * noise

    def posterior(self, x0: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W), log-variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x_0); at t = 0 the variance is t = 1's."""
        mean = self._at("posterior_mean_x0", t) * x0 + self._at("posterior_mean_xt", t) * xt
        return mean, self._at("posterior_log_variance", t)

    def model_log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """log Sigma = f log beta_t + (1 - f) log posterior variance, f = (v + 1) / 2."""
        fraction = (v + 1) / 2
        return fraction * self._at("log_betas", t) + (1 - fraction) * self._at("posterior_log_variance", t)

    def vlb_terms(self, x0: Tensor, xt: Tensor, t: Tensor, predicted_noise: Tensor, v: Tensor) -> Tensor:
        """The term of the variational bound at t in bits, for every element (B, C, H, W).

        KL(q(x_{t-1} | x_t, x_0) || p) for t > 0, the discretised Gaussian likelihood of x_0 at t = 0 (bins of 1/255 on
        [-1, 1], as DiT has it for latents too). The mean is detached: this term trains the variance alone.
        """
        true_mean, true_log_variance = self.posterior(x0, xt, t)
        mean, _ = self.posterior(self.predict_x0(xt, predicted_noise.detach(), t), xt, t)
        log_variance = self.model_log_variance(v, t)
        kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
        nll = -discretized_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where((t == 0).view(-1, 1, 1, 1), nll, kl) / math.log(2)

    def scheduler_arguments(self) -> dict[str, Any]:
        """The schedule as arguments of diffusers' schedulers."""
        return {
            "num_train_timesteps": self.num_timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": "linear",
        }


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) of diagonal Gaussians, element by element, in nats."""
    return 0.5 * (
        -1.0
        + log_variance2
        - log_variance1
        + (log_variance1 - log_variance2).exp()
        + (mean1 - mean2).square() * (-log_variance2).exp()
    )


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of a Gaussian's mass in the bin of width 2/255 around x, open towards both ends of [-1, 1] (DDPM, Eq. 13)."""
    inverse = (-log_scale).exp()
    upper = torch.special.ndtr((x - mean + 1 / 255) * inverse)
    lower = torch.special.ndtr((x - mean - 1 / 255) * inverse)
    upper = torch.where(x > 0.999, 1.0, upper)
    lower = torch.where(x < -0.999, 0.0, lower)
    return (upper - lower).clamp(min=1e-12).log()
