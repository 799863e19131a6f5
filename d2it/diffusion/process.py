"""What every diffusion process shares: its settings, and what a prediction and its loss mean on its path.

A path is x_t = a(t) x_0 + s(t) eps. A network predicts one of four quantities, each linear in x_0 and eps:

    epsilon    eps
    sample     x_0
    v          a eps - s x_0      (Salimans and Ho 2022)
    velocity   eps - x_0          (the derivative of the linear path; Lipman et al. 2023, Liu et al. 2023)

Given x_t any one gives the others, so samplers and losses work with x_0 and eps whatever the network predicts.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
"""T, the scale on which a network is given its timestep: 0 is clean, T noise."""

PATHS = ("ddpm", "linear")
PREDICTIONS = ("epsilon", "v", "sample", "velocity")
TIMESTEPS = ("uniform", "logit_normal")
WEIGHTINGS = ("none", "v", "min_snr")

LEAST = 0.05  # of a and s where a weight divides by them: weights stay below 400 (Li and He 2025 clamp alike)
SNR_CAP = 5.0  # gamma of min-SNR (Hang et al. 2023)


@dataclass
class DiffusionConfig:
    """How latents are noised, what the network predicts, and how its loss is weighted; the defaults are the paper's.

    It is stored in a transformer's `config.json`, so that sampling follows the training.

    Attributes:
        path: "ddpm", the paper's linear betas over 1,000 steps; "linear", x_t = (1 - t) x_0 + t eps.
        prediction: "epsilon" | "v" | "sample" (x_0) | "velocity" (eps - x_0, on the linear path). The Grain
            Transformer always predicts the clean map.
        timesteps: how training draws them: "uniform", or "logit_normal" (the sigmoid of a normal variate; Esser et
            al. 2024).
        shift: multiplies the noise-to-signal ratio s / a of every timestep, in training and in the linear path's
            sampling; above 1 spends more steps at high noise (Esser et al. 2024, Eq. 23).
        weighting: of the loss over time: "none", the squared error of what is predicted; "v", that of v, or of the
            velocity on the linear path, whatever is predicted; "min_snr", min(SNR, 5) times the squared error of x_0.

    Raises:
        ValueError: an unknown name, a shift that is not positive and finite, a velocity on the ddpm path.
    """

    path: str = "ddpm"
    prediction: str = "epsilon"
    timesteps: str = "uniform"
    shift: float = 1.0
    weighting: str = "none"

    def __post_init__(self) -> None:
        for name, known in (
            ("path", PATHS),
            ("prediction", PREDICTIONS),
            ("timesteps", TIMESTEPS),
            ("weighting", WEIGHTINGS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"diffusion.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        number = isinstance(self.shift, (int, float)) and not isinstance(self.shift, bool)
        if not number or not 0 < self.shift < math.inf:
            raise ValueError(f"diffusion.shift must be positive and finite, got {self.shift!r}")
        if self.prediction == "velocity" and self.path != "linear":
            raise ValueError("diffusion.prediction=velocity needs diffusion.path=linear; on the ddpm path use v")


class Diffusion(abc.ABC):
    """A noising process x_t = a(t) x_0 + s(t) eps, with t from 0 (clean) to `num_timesteps` (noise).

    Attributes:
        config: its settings.
        num_timesteps: T, the scale of the timesteps that the network is given.
        learn_sigma: the network also predicts the variance of a step (the ddpm path alone).
    """

    config: DiffusionConfig
    num_timesteps: int
    learn_sigma: bool

    @abc.abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and s at t (B,), as (B, 1, 1, 1) float32 on the device of t."""

    @abc.abstractmethod
    def sample_timesteps(
        self, batch: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """(B,) timesteps as training draws them."""

    def q_sample(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, H, W) of x_0, its noise and t (B,)."""
        a, s = self.coefficients(t)
        return a * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect network predicts, (B, C, H, W)."""
        prediction = self.config.prediction
        if prediction == "epsilon":
            return noise
        if prediction == "sample":
            return x0
        if prediction == "velocity":
            return noise - x0
        a, s = self.coefficients(t)
        return a * noise - s * x0

    def predict(self, out: Tensor, xt: Tensor, t: Tensor, prediction: str | None = None) -> tuple[Tensor, Tensor]:
        """x_0 and eps of x_t and the network's prediction; `prediction` names another kind than the settings'."""
        return split(prediction or self.config.prediction, out, xt, *self.coefficients(t))

    def loss_weight(self, t: Tensor) -> Tensor | None:
        """What the squared error of the prediction is multiplied by, (B, 1, 1, 1); None is 1."""
        weighting, prediction = self.config.weighting, self.config.prediction
        native = "velocity" if self.config.path == "linear" else "v"
        if weighting == "none" or (weighting == "v" and prediction == native):
            return None
        a, s = (x.clamp(min=LEAST) for x in self.coefficients(t))
        # (error of x_0 / error of the prediction)^2 at a given x_t
        ratio = {
            "epsilon": (s / a).square(),
            "sample": torch.ones_like(a),
            "v": (s / (a.square() + s.square())).square(),
            "velocity": (s / (a + s)).square(),
        }
        if weighting == "min_snr":
            return (a / s).square().clamp(max=SNR_CAP) * ratio[prediction]
        return ratio[prediction] / ratio[native]


def split(prediction: str, out: Tensor, xt: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """x_0 and eps of x_t = a x_0 + s eps and of what was predicted."""
    if prediction == "epsilon":
        return (xt - s * out) / a, out
    if prediction == "sample":
        return out, (xt - a * out) / s
    if prediction == "velocity":
        return (xt - s * out) / (a + s), (xt + a * out) / (a + s)
    power = a.square() + s.square()
    return (a * xt - s * out) / power, (s * xt + a * out) / power


def draw_fractions(kind: str, batch: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """(B,) float32 in [0, 1): uniform, or the sigmoid of a standard normal variate."""
    if kind == "uniform":
        return torch.rand(batch, generator=generator, device=device)
    return torch.randn(batch, generator=generator, device=device).sigmoid()


def shifted(fraction: Tensor, shift: float) -> Tensor:
    """The time of the linear path whose s / a is `shift` times that of `fraction`."""
    return shift * fraction / (1 + (shift - 1) * fraction)
