"""`TokenPlan`: where every packed token comes from and goes to, and its checks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

MOST_CELLS = 2**31 - 2**22  # of a plan, and most rows: int32 positions, rounded up to whole blocks


@dataclasses.dataclass(frozen=True, eq=False)
class TokenPlan:
    """Where every packed token comes from and goes to. Made by `plan_tokens`; every tensor is int32 on one device.

    Rows follow the images in order, the windows row-major in the image, the cells row-major in the window.

    Attributes:
        index: (capacity,) the cell of each row, flat over B * Hf * Wf, or -1 past the count.
        inverse: (B * Hf * Wf,) the row of each cell, or -1.
        slots: (B * windows, w * w) the row of each position of each window, or -1.
        sample: (capacity,) the image of each row, never descending; B - 1 past the count.
        count: () rows in use.
        capacity: rows there are, a host integer.
        window: cells along a window's side.
        grid: (B, Hf, Wf).
    """

    index: Tensor
    inverse: Tensor
    slots: Tensor
    sample: Tensor
    count: Tensor
    capacity: int
    window: int
    grid: tuple[int, int, int]

    @property
    def batch(self) -> int:
        """B."""
        return self.grid[0]

    @property
    def cells_per_image(self) -> int:
        """Hf * Wf."""
        return self.grid[1] * self.grid[2]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenPlan:
        """The same plan on another device."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


def check_plan(plan: Any) -> None:
    if not isinstance(plan, TokenPlan):
        raise TypeError(f"plan must be a TokenPlan, got {type(plan).__name__}")
