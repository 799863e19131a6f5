"""Guidance, classifier-free or by a weaker model: how strong, when, and on which channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Scales are used in float32.
_LARGEST = torch.finfo(torch.float32).max
MODES = ("constant", "interval", "power-cosine")


@dataclass(frozen=True)
class Guidance:
    """How strongly, when and on which channels the model's output is guided.

    Args:
        scale: w; 1 is no guidance.
        mode: "constant"; "interval", w inside `interval` and 1 outside (Kynkaanniemi et al. 2024); "power-cosine", from
            1 at t = T up to w at t = 0 as (1 - cos(pi (1 - t/T)^power)) / 2 (MDT).
        interval: (low, high) as fractions of T, ends included.
        power: of "power-cosine".
        channels: how many of the latent's first channels are guided; None is all. DiT's released figures guide 3 of 4.

    Raises:
        ValueError: an unknown mode or a value out of range.
    """

    scale: float = 1.0
    mode: str = "constant"
    interval: tuple[float, float] = (0.0, 1.0)
    power: float = 4.0
    channels: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("scale", self.scale), ("power", self.power)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < _LARGEST:
                raise ValueError(f"guidance {name} must be finite and not negative, got {value!r}")
        if self.mode not in MODES:
            raise ValueError(f"guidance mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"guidance interval must be 0 <= low <= high <= 1, got {self.interval}")
        if self.power == 0:
            raise ValueError(f"guidance power must be positive, got {self.power}")
        if self.channels is not None and not (isinstance(self.channels, int) and self.channels >= 1):
            raise ValueError(f"guidance channels must be at least 1, got {self.channels!r}")

    def at(self, fraction: float) -> float:
        """w at t / T = `fraction`."""
        if self.mode == "interval":
            return self.scale if self.interval[0] <= fraction <= self.interval[1] else 1.0
        if self.mode == "power-cosine":
            rise = (1 - math.cos(math.pi * (1 - min(fraction, 1.0)) ** self.power)) / 2
            return 1.0 + (self.scale - 1.0) * rise
        return self.scale


def guide(output: Tensor, reference: Tensor, scale: Tensor, channels: int) -> Tensor:
    """Returns reference + scale (output - reference) on the first `channels`, the output on the rest.

    Args:
        output: of the model, (B, C, H, W).
        reference: of the model without the label (Ho and Salimans 2022), or of a weaker model with it (autoguidance;
            Karras et al. 2024, Eq. 3); at least `channels` channels.
        scale: (), w.
        channels: that are guided.
    """
    guided = torch.lerp(reference[:, :channels], output[:, :channels], scale)
    return torch.cat([guided, output[:, channels:]], dim=1)
