"""Dynamic Grain Transformer (Sec. 3.2.2): a DiT that samples the grain map from noise."""

from __future__ import annotations

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
        attention: "sdpa" | "flash_attn" | "xformers" (`layers.attention`).
        diffusion: how its data are noised and what it predicts (`d2it.diffusion.DiffusionConfig`).
        grid: (H/S, W/S) of the grain map, or one side.
        num_grains: k.
    """

    dim: int = 384
    depth: int = 12
    heads: int = 6
    grid: tuple[int, int] = (16, 16)
    num_grains: int = 2

    def __post_init__(self) -> None:
        self.grid = pair("grid", self.grid)
        check_whole(self, num_grains=2)
        super().__post_init__()

    @property
    def in_channels(self) -> int:
        return 1

    @property
    def out_channels(self) -> int:
        return self.num_grains


class DynamicGrainTransformer(PlainTransformer):
    """Predicts the grain of every region: `DynamicGrainTransformer.from_preset("DiT-S", num_classes=1000)`.

    The grain map, scaled to [-1, 1] (`d2it.diffusion.grains_to_signal`), is noised by the same Gaussian diffusion as
    latents are; the network predicts the clean map.

    forward(x (B, 1, h, w), t (B,), y (B,) int64) -> (B, k, h, w): the logits of the clean grain.
    """

    Config = GrainTransformerConfig
    presets = GRAIN_PRESETS
    config: GrainTransformerConfig
