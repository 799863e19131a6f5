"""The plain Diffusion Transformer (Peebles and Xie): the baseline, and the trunk of both dynamic transformers."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from d2it.diffusion.process import DiffusionConfig
from d2it.models import layers
from d2it.models.attention import check_attention_backend
from d2it.models.base import Model, check_share, check_whole, pair
from d2it.models.presets import DIT_PRESETS


@dataclass
class TransformerConfig(abc.ABC):
    """What the three transformers share: the sizes of a `Trunk` and the labels.

    Args:
        patch_size: side of a token in cells of the input.
        dim: width; a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: width of an MLP's hidden layer over `dim`.
        num_classes: 0 (or None) for an unconditional model.
        class_dropout_prob: share of the labels that training replaces by the null label.
        attention: "auto" | "sdpa" | "d2it" | "flash_attn" | "xformers" (`models.attention`).
        diffusion: how its data are noised and what it predicts (`d2it.diffusion.DiffusionConfig`).
    """

    patch_size: int = 2
    dim: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    class_dropout_prob: float = 0.1
    attention: str = "auto"
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    def __post_init__(self) -> None:
        if isinstance(self.diffusion, dict):  # as a file holds it
            self.diffusion = DiffusionConfig(**self.diffusion)
        if self.num_classes is None:
            self.num_classes = 0
        check_whole(self, patch_size=1, dim=4, depth=1, heads=1, num_classes=0)
        check_share(self, "class_dropout_prob")
        if not isinstance(self.mlp_ratio, (int, float)) or not 0 < self.mlp_ratio < float("inf"):
            raise ValueError(f"mlp_ratio must be positive and finite, got {self.mlp_ratio!r}")
        if any(side % self.patch_size for side in self.grid):
            raise ValueError(f"patch_size must divide the grid {self.grid[0]} x {self.grid[1]}, got {self.patch_size}")
        if self.dim % self.heads:
            raise ValueError(f"heads must divide the width {self.dim}, got {self.heads}")
        check_attention_backend(self.attention)

    @property
    @abc.abstractmethod
    def grid(self) -> tuple[int, int]:
        """(H, W) of the input in cells."""

    @property
    @abc.abstractmethod
    def in_channels(self) -> int:
        """Channels of the input."""

    @property
    @abc.abstractmethod
    def out_channels(self) -> int:
        """Channels of the output."""

    @property
    def num_tokens(self) -> int:
        """Tokens of an image in the trunk."""
        return self.grid[0] * self.grid[1] // self.patch_size**2


class Trunk(nn.Module):
    """Patches, frozen positions, adaLN-Zero blocks, final layer: (B, C, H, W) -> (B, H, W, out_channels)."""

    positions: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, self.grid, self.patch = config.dim, config.grid, config.patch_size
        self.embed = layers.PatchEmbed(config.in_channels, self.patch, dim)
        self.dim = dim
        self.reset_buffers(None)
        self.condition = layers.Conditioning(dim, config.num_classes)
        self.blocks = nn.ModuleList(
            layers.Block(dim, layers.Attention(dim, config.heads, config.attention), config.mlp_ratio)
            for _ in range(config.depth)
        )
        self.final = layers.FinalLayer(dim, config.out_channels * self.patch**2)

    def reset_buffers(self, device: torch.device | None) -> None:
        """Computes the positions on `device`; they are not saved."""
        grid = (self.grid[0] // self.patch, self.grid[1] // self.patch)
        self.register_buffer("positions", layers.sincos_positions(grid, self.dim, device), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None, extra: Tensor | None = None) -> Tensor:
        """`extra` (B, L, dim) is added to the tokens."""
        h = self.embed(x)  # (B, L, dim)
        h = h + self.positions.to(h.dtype)
        if extra is not None:
            h = h + extra.to(h.dtype)
        out = layers.run_blocks(self.blocks, self.final, h, self.condition(t, y))
        return layers.unpatchify(out, self.grid, self.patch)


class ClassConditional(Model):
    """What the three transformers share about inputs and labels. The null label is `num_classes`."""

    config: Any

    def reset_buffers(self, device: torch.device) -> None:
        for part in self.modules():
            if isinstance(part, Trunk):
                part.reset_buffers(device)

    def check_input(self, trunk: Trunk, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        """Raises ValueError unless x is (B, in_channels, *grid) and t (B,), on the model's device, x in its dtype."""
        c, (h, w) = self.config.in_channels, self.config.grid
        if x.ndim != 4 or x.shape[1:] != (c, h, w):
            raise ValueError(f"x must be (B, {c}, {h}, {w}), got {tuple(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must be ({x.shape[0]},), got {tuple(t.shape)}")
        layers.check_like(trunk.embed.proj.weight, {"x": x}, {"t": t, "y": y})

    def labels(self, y: Tensor | None, batch: int, drop: Tensor | None) -> Tensor | None:
        """The labels that are embedded: None without classes, the null label where `drop` (B,) is true."""
        null = self.config.num_classes
        if not null:
            return None
        if y is None or y.shape != (batch,):
            got = None if y is None else tuple(y.shape)
            raise ValueError(f"y must be ({batch},) labels in 0 ... {null} (the null), got {got}")
        return y if drop is None else torch.where(drop.to(torch.bool), null, y)

    def label_dropout_mask(
        self, batch: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """(B,) bool, true with probability `config.class_dropout_prob`, to pass as `force_drop_ids` in training.

        The models drop no label by themselves: a step draws one mask, and both embedders of a D2iT get the same labels.
        """
        return torch.rand(batch, generator=generator, device=device) < self.config.class_dropout_prob


class PlainTransformer(ClassConditional):
    """A trunk alone, on latents or on grain maps: a `DiT` or a `DynamicGrainTransformer`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.trunk = Trunk(config)
        layers.initialize(self)

    def transformer_blocks(self) -> list[nn.Module]:
        return list(self.trunk.blocks)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, force_drop_ids: Tensor | None = None) -> Tensor:
        """Predicts from `x`.

        Args:
            x: (B, C, H, W), noised.
            t: (B,) timesteps.
            y: (B,) int64 labels, `num_classes` for none.
            force_drop_ids: (B,), true where the label is replaced by the null label.

        Returns:
            (B, out_channels, H, W).

        Raises:
            ValueError: shapes that do not fit the configuration.
        """
        self.check_input(self.trunk, x, t, y)
        out = self.trunk(x, t, self.labels(y, x.shape[0], force_drop_ids))  # (B, H, W, out)
        return out.permute(0, 3, 1, 2).contiguous()


@dataclass
class DiTConfig(TransformerConfig):
    """Configuration of a plain `DiT`.

    Args:
        patch_size: side of a token in latent cells.
        dim: width; a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: width of an MLP's hidden layer over `dim`.
        num_classes: 0 (or None) for an unconditional model.
        class_dropout_prob: share of the labels that training replaces by the null label.
        attention: "auto" | "sdpa" | "d2it" | "flash_attn" | "xformers" (`models.attention`).
        diffusion: how its data are noised and what it predicts (`d2it.diffusion.DiffusionConfig`).
        image_size: pixels, (height, width) or one side; the latent grid is image_size / downsampling.
        downsampling: the autoencoder's factor.
        in_channels: latent channels C.
        learn_sigma: the output has 2C channels, the second half interpolates the log-variance.
    """

    image_size: tuple[int, int] = (256, 256)
    downsampling: int = 8
    in_channels: int = 4
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        self.image_size = pair("image_size", self.image_size)
        check_whole(self, downsampling=1, in_channels=1)
        if any(side % self.downsampling for side in self.image_size):
            raise ValueError(f"image_size must be a multiple of {self.downsampling}, got {self.image_size}")
        super().__post_init__()

    @property
    def grid(self) -> tuple[int, int]:
        """(Hf, Wf), the latent's cells."""
        return (self.image_size[0] // self.downsampling, self.image_size[1] // self.downsampling)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


class DiT(PlainTransformer):
    """The plain Diffusion Transformer on latents: `DiT.from_preset("DiT-XL/2", num_classes=1000, image_size=256)`.

    forward(x (B, C, H, W), t (B,), y (B,) int64) -> (B, C or 2C, H, W): the predicted noise and, with `learn_sigma`,
    the interpolation of the log-variance.
    """

    Config = DiTConfig
    presets = DIT_PRESETS
    config: DiTConfig
