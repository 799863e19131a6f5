"""The plain Diffusion Transformer (Peebles and Xie): the baseline, and the trunk of both dynamic transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2it.models import layers
from d2it.models.base import Model, check_whole, pair
from d2it.models.presets import DIT_PRESETS


class Trunk(nn.Module):
    """Patches, frozen positions, adaLN-Zero blocks, final layer: (B, C, H, W) -> (B, H, W, out_channels).

    Args:
        grid: (H, W) of the input, each a multiple of `patch`.
        num_classes: 0 for none.
    """

    positions: Tensor

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        grid: tuple[int, int],
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        num_classes: int,
        attention: str,
    ) -> None:
        super().__init__()
        if any(side % patch for side in grid):
            raise ValueError(f"patch_size must divide the grid {grid[0]} x {grid[1]}, got {patch}")
        if dim % heads:
            raise ValueError(f"heads must divide the width {dim}, got {heads}")
        self.grid = grid
        self.patch = patch
        self.embed = layers.PatchEmbed(in_channels, patch, dim)
        self.dim = dim
        self.reset_buffers(None)
        self.condition = layers.Conditioning(dim, num_classes)
        self.blocks = nn.ModuleList(
            layers.Block(dim, layers.Attention(dim, heads, attention), mlp_ratio) for _ in range(depth)
        )
        self.final = layers.FinalLayer(dim, out_channels * patch * patch)

    def reset_buffers(self, device: torch.device | None) -> None:
        grid = (self.grid[0] // self.patch, self.grid[1] // self.patch)
        self.register_buffer("positions", layers.sincos_positions(grid, self.dim, device), persistent=False)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None, extra: Tensor | None, run: Callable[..., Tensor]
    ) -> Tensor:
        """`extra` (B, L, dim) or None is added to the tokens; `run(block, *args)` executes a block."""
        h = self.embed(x)  # (B, L, dim)
        h = h + self.positions.to(h.dtype)
        if extra is not None:
            h = h + extra.to(h.dtype)
        c = self.condition(t, y)  # (B, dim)
        for block in self.blocks:
            h = run(block, h, c)
        return layers.unpatchify(self.final(h, c), self.grid, self.patch)


class ClassConditional(Model):
    """What the three transformers share about labels. The null label is `num_classes`."""

    config: Any

    def reset_buffers(self, device: torch.device) -> None:
        for part in self.modules():
            if isinstance(part, Trunk):
                part.reset_buffers(device)

    def check_input(self, x: Tensor, t: Tensor, channels: int, grid: tuple[int, int]) -> None:
        if x.ndim != 4 or x.shape[1:] != (channels, *grid):
            raise ValueError(f"x must be (B, {channels}, {grid[0]}, {grid[1]}), got {tuple(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must be ({x.shape[0]},), got {tuple(t.shape)}")

    def labels(self, y: Tensor | None, batch: int, drop: Tensor | None) -> Tensor | None:
        """The labels that the embedders see: None without classes, the null label where `drop` is true."""
        if not self.config.num_classes:
            return None
        if y is None or y.shape != (batch,):
            got = None if y is None else tuple(y.shape)
            raise ValueError(f"y must be ({batch},) labels in 0 ... {self.config.num_classes} (the null), got {got}")
        return layers.drop_labels(y, self.config.num_classes, drop)

    def label_dropout_mask(
        self, batch: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """(B,) bool with probability `config.class_dropout_prob`, to pass as `force_drop_ids` in training.

        The models drop no label by themselves: a step draws one mask, from a generator of its own, and both embedders
        of a D2iT see the same labels.
        """
        return layers.label_dropout_mask(batch, self.config.class_dropout_prob, generator=generator, device=device)


@dataclass
class DiTConfig:
    """`image_size` is in pixels, a side or (height, width); the latent grid is image_size / downsampling."""

    image_size: int | Iterable[int] = (256, 256)
    downsampling: int = 8
    in_channels: int = 4
    patch_size: int = 2
    dim: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int | None = 1000
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        self.image_size = pair(self.image_size)
        self.num_classes = self.num_classes or 0
        check_whole(self, downsampling=1, in_channels=1, patch_size=1, dim=4, depth=1, heads=1, num_classes=0)
        if any(side % self.downsampling for side in self.image_size):
            raise ValueError(f"image_size must be a multiple of {self.downsampling}, got {self.image_size}")

    @property
    def grid(self) -> tuple[int, int]:
        """(Hf, Wf), the latent's cells."""
        height, width = pair(self.image_size)
        return (height // self.downsampling, width // self.downsampling)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


class DiT(ClassConditional):
    """`DiT.from_preset("DiT-XL/2", num_classes=1000, image_size=256)`.

    forward(x (B, C, H, W), t (B,), y (B,) int64) -> (B, C or 2C, H, W): the predicted noise and, with `learn_sigma`,
    the interpolation of the log-variance.
    """

    Config = DiTConfig
    presets = DIT_PRESETS
    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.trunk = Trunk(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            grid=config.grid,
            patch=config.patch_size,
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            num_classes=config.num_classes or 0,
            attention=config.attention,
        )
        layers.initialize(self)

    def transformer_blocks(self) -> list[nn.Module]:
        return list(self.trunk.blocks)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, force_drop_ids: Tensor | None = None) -> Tensor:
        """
        Args:
            x: noised latents; t: timesteps; y: labels, `num_classes` for none.
            force_drop_ids: (B,), true where the label is replaced by the null label.

        Raises:
            ValueError: shapes that do not fit the configuration.
        """
        self.check_input(x, t, self.config.in_channels, self.config.grid)
        y = self.labels(y, x.shape[0], force_drop_ids)
        out = self.trunk(x, t, y, None, self.run_block)  # (B, H, W, out)
        return out.permute(0, 3, 1, 2).contiguous()
