"""Dynamic Grain Transformer (Sec. 3.2.2): a DiT that samples the grain map from noise.

With `levels` above the number of grains it samples each region's entropy instead, as one of so many quantile levels:
level l holds the regions whose entropy exceeds that of the share l / levels of all regions. Any shares of the grains
are then thresholds of what it samples (`d2it.diffusion.level_grains`), so one model serves every budget. With as many
levels as grains the levels are the grains, at the autoencoder's thresholds: the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from d2it.models.base import check_whole, pair
from d2it.models.dit import PlainTransformer, TransformerConfig
from d2it.models.presets import GRAIN_PRESETS


@dataclass
class GrainTransformerConfig(TransformerConfig):
    """Configuration of a `DynamicGrainTransformer`.

    Args:
        patch_size: side of a token in regions; 1 serves maps with an odd side.
        dim: width; a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: width of an MLP's hidden layer over `dim`.
        num_classes: 0 (or None) for an unconditional model.
        class_dropout_prob: share of the labels that training replaces by the null label.
        attention: "auto" | "sdpa" | "d2it" | "flash_attn" | "xformers" (`models.attention`).
        diffusion: how its data are noised and what it predicts (`d2it.diffusion.DiffusionConfig`).
        grid: (H/S, W/S) of the grain map, or one side.
        num_grains: k.
        levels: of the entropy of a region; 0 (or None) is k, and then they are the grains.
        edges: levels + 1 ascending entropies in nats: the quantiles of the training images' regions at 0, 1 / levels,
            ..., 1. () where the levels are the grains, or for a model that is yet to be trained.
    """

    dim: int = 384
    depth: int = 12
    heads: int = 6
    grid: tuple[int, int] = (16, 16)
    num_grains: int = 2
    levels: int = 0
    edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self.grid = pair("grid", self.grid)
        check_whole(self, num_grains=2)
        self.levels = self.levels or self.num_grains
        check_whole(self, levels=self.num_grains)
        self.edges = tuple(self.edges or ())
        numbers = all(isinstance(edge, (int, float)) and math.isfinite(edge) for edge in self.edges)
        if self.edges and (
            not self.has_levels
            or not numbers
            or len(self.edges) != self.levels + 1
            or list(self.edges) != sorted(self.edges)
        ):
            wanted = f"{self.levels + 1} ascending entropies" if self.has_levels else "none where levels are the grains"
            raise ValueError(f"edges must be {wanted} for {self.levels} levels, got {self.edges}")
        super().__post_init__()

    @property
    def has_levels(self) -> bool:
        """Whether the model samples levels of the entropy, of which the grains are thresholds."""
        return self.levels > self.num_grains

    @property
    def in_channels(self) -> int:
        return 1

    @property
    def out_channels(self) -> int:
        return self.levels


class DynamicGrainTransformer(PlainTransformer):
    """Predicts the grain of every region: `DynamicGrainTransformer.from_preset("DiT-S", num_classes=1000)`.

    The grain map, scaled to [-1, 1] (`d2it.diffusion.grains_to_signal`), is noised by the same Gaussian diffusion as
    latents are; the network predicts the clean map.

    forward(x (B, 1, h, w), t (B,), y (B,) int64) -> (B, levels, h, w): the logits of the clean grain, or of the clean
    level of the entropy.
    """

    Config = GrainTransformerConfig
    presets = GRAIN_PRESETS
    config: GrainTransformerConfig
