"""The linear path between data and noise (rectified flow: Liu et al. 2023; SiT: Ma et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from d2it.diffusion.process import NUM_TIMESTEPS, Diffusion, DiffusionConfig, draw_fractions, shifted

EDGE = 1e-3
"""Training stays this far from both ends of the path, in units of the whole."""


class LinearDiffusion(Diffusion):
    """The linear process: x_t = (1 - t / T) x_0 + (t / T) eps, t a real number from 0 to T = 1000.

    T is only the unit of the time that the network is given: the one that its timestep embedding is made for.

    Args:
        config: None is the linear path with the velocity predicted.
    """

    learn_sigma = False

    def __init__(self, config: DiffusionConfig | None = None) -> None:
        self.config = config or DiffusionConfig(path="linear", prediction="velocity")
        self.num_timesteps = NUM_TIMESTEPS

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = (t.float() / self.num_timesteps).view(-1, 1, 1, 1)
        return 1 - s, s

    def sample_timesteps(
        self, batch: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        fraction = shifted(draw_fractions(self.config.timesteps, batch, generator, device), self.config.shift)
        return fraction.clamp(EDGE, 1 - EDGE) * self.num_timesteps
