"""Dynamic Grain Transformer (Sec. 3.2.2): a DiT that samples the grain map from noise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from d2it.models import layers
from d2it.models.base import check_whole, pair
from d2it.models.dit import ClassConditional, Trunk
from d2it.models.presets import GRAIN_PRESETS


@dataclass
class GrainTransformerConfig:
    """`grid` is the grain map's (H/S, W/S); `patch_size` 1 serves maps with an odd side."""

    grid: int | Iterable[int] = (16, 16)
    num_grains: int = 2
    patch_size: int = 2
    dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    num_classes: int | None = 1000
    class_dropout_prob: float = 0.1
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        self.grid = pair(self.grid)
        self.num_classes = self.num_classes or 0
        check_whole(self, patch_size=1, dim=4, depth=1, heads=1, num_classes=0)
        if self.num_grains < 2:
            raise ValueError(f"num_grains must be at least 2, got {self.num_grains}")


class DynamicGrainTransformer(ClassConditional):
    """`DynamicGrainTransformer.from_preset("DiT-S", num_classes=1000)`.

    The grain map, scaled to [-1, 1] (`d2it.diffusion.grains_to_signal`), is noised by the same Gaussian diffusion as
    latents are; the network predicts the grain of every region of the clean map.
    """

    Config = GrainTransformerConfig
    presets = GRAIN_PRESETS
    config: GrainTransformerConfig

    def __init__(self, config: GrainTransformerConfig) -> None:
        super().__init__(config)
        self.trunk = Trunk(
            in_channels=1,
            out_channels=config.num_grains,
            grid=pair(config.grid),
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
        """(B, 1, h, w) noised signal, (B,) timesteps, (B,) labels -> (B, k, h, w) logits of the clean grain.

        Raises:
            ValueError: shapes that do not fit the configuration.
        """
        self.check_input(x, t, 1, pair(self.config.grid))
        y = self.labels(y, x.shape[0], force_drop_ids)
        out = self.trunk(x, t, y, None, self.run_block)  # (B, h, w, k)
        return out.permute(0, 3, 1, 2).contiguous()
