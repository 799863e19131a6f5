"""Dynamic VAE (Sec. 3.1): a hierarchical encoder, one latent grain per region by its entropy, one decoder.

The convolutional parts are those of the latent-diffusion autoencoder (Rombach et al.), the branching that of DQ-VAE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2it import ops
from d2it.diffusion.grains import Generators, copy_codes, randn
from d2it.models import layers
from d2it.models.attention import attention
from d2it.models.base import Model, check_whole, set_whole_tuples
from d2it.models.presets import VAE_PRESETS

#: Median entropy in nats (256 bins on [-1, 1], sigma 0.01, regions of 16 x 16) over 1,000 ImageNet photos (one per
#: class): half of the regions of natural photos are fine.
MEDIAN_ENTROPY = 4.04
#: Settings of the entropy.
ENTROPY = ("region_size", "num_bins", "value_range", "sigma", "normalize")


@dataclass
class DynamicVAEConfig:
    """Configuration of a `DynamicVAE`.

    Args:
        downsampling: the factors, finest first; powers of 2. The last is the region size S.
        latent_channels: n_z.
        channels: width of the first level.
        encoder_mult: multiples of `channels`, level by level from full resolution down.
        decoder_mult: the same for the decoder.
        residual_blocks: a level in the encoder; the decoder has one more.
        attention_from: levels downsampled by at least this factor have self-attention.
        thresholds: k-1 ascending entropies in nats; () (or None) is the median of natural photos for two grains.
        num_bins: of the entropy (`d2it.ops.kde_entropy`); 0 (or None) is S * S.
        value_range: of the entropy.
        sigma: of the entropy.
        normalize: of the entropy.
        scaling_factor: latents times this have unit variance.
    """

    downsampling: tuple[int, ...] = (8, 16)
    latent_channels: int = 4
    channels: int = 128
    encoder_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_mult: tuple[int, ...] = (1, 1, 2, 2)
    residual_blocks: int = 2
    attention_from: int = 8
    thresholds: tuple[float, ...] = ()
    num_bins: int = 0
    value_range: tuple[float, float] = (-1.0, 1.0)
    sigma: float = 0.01
    normalize: bool = True
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        set_whole_tuples(self, "downsampling", "encoder_mult", "decoder_mult")
        ends = tuple(self.value_range) if isinstance(self.value_range, (list, tuple)) else ()
        if len(ends) != 2 or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in ends):
            raise ValueError(f"value_range must be two finite numbers, got {self.value_range!r}")
        self.value_range = (float(ends[0]), float(ends[1]))
        check_whole(self, latent_channels=1, channels=1, residual_blocks=1, attention_from=1)
        self.num_bins = self.num_bins or self.region_size**2
        check_whole(self, num_bins=2)
        if not isinstance(self.sigma, (int, float)) or not 0 < self.sigma < float("inf"):
            raise ValueError(f"sigma must be positive and finite, got {self.sigma!r}")
        if not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range must ascend, got {self.value_range}")
        factors = self.downsampling
        if list(factors) != sorted(set(factors)) or any(f < 2 or f & (f - 1) for f in factors):
            raise ValueError(f"downsampling must be ascending powers of 2, got {factors}")
        for name, factor in (("encoder_mult", factors[-1]), ("decoder_mult", factors[0])):
            if 2 ** (len(getattr(self, name)) - 1) != factor:
                raise ValueError(
                    f"{name} must have {factor.bit_length()} levels for a factor of {factor}, got {getattr(self, name)}"
                )
        if not self.thresholds and len(factors) > 2:
            raise ValueError(f"thresholds must be given for the {len(factors)} grains of {factors}")
        self.thresholds = self.check_thresholds(self.thresholds or (MEDIAN_ENTROPY,) * (len(factors) - 1))
        self.check_scaling_factor(self.scaling_factor)

    def check_thresholds(self, thresholds: Sequence[float]) -> tuple[float, ...]:
        """The thresholds as a tuple; ValueError unless they are k-1 ascending values."""
        try:
            values = tuple(float(x) for x in thresholds)
        except (TypeError, ValueError):
            raise ValueError(f"thresholds must be numbers, got {thresholds!r}") from None
        if len(values) != self.num_grains - 1 or list(values) != sorted(values) or any(map(math.isnan, values)):
            raise ValueError(f"thresholds must be {self.num_grains - 1} ascending values, got {values}")
        return values

    def check_scaling_factor(self, factor: float) -> float:
        """The factor; ValueError unless it is positive and finite."""
        if not isinstance(factor, (int, float)) or not 0 < factor < float("inf"):
            raise ValueError(f"scaling_factor must be positive and finite, got {factor!r}")
        return float(factor)

    @property
    def num_grains(self) -> int:
        return len(self.downsampling)

    @property
    def region_size(self) -> int:
        """S, pixels along a region's side."""
        return self.downsampling[-1]

    @property
    def entropy(self) -> dict[str, Any]:
        """The settings of `d2it.ops.kde_entropy`, as its keyword arguments."""
        return {name: getattr(self, name) for name in ENTROPY}

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """Cells along the side of one latent code, by grain (coarsest first)."""
        return tuple(f // self.downsampling[0] for f in reversed(self.downsampling))


class ResidualBlock(nn.Module):
    """(norm, SiLU, convolution) twice, added to the input."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """Self-attention with one head over all positions, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, L, C)
        out = attention(self.qkv(tokens).reshape(b, h * w, 3, 1, c)).reshape(b, h * w, c)
        return x + self.proj(out).transpose(1, 2).reshape(b, c, h, w)


class Level(layers.Recomputable):
    """Residual blocks of one resolution, each followed by attention where asked."""

    def __init__(self, channels: int, out_channels: int, blocks: int, attention: bool) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for i in range(blocks):
            parts.append(ResidualBlock(channels if i == 0 else out_channels, out_channels))
            if attention:
                parts.append(AttentionBlock(out_channels))
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)


class Middle(layers.Recomputable, nn.Sequential):
    """A residual block, attention, a residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


class Head(nn.Module):
    """norm, SiLU, convolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of at least 4 channels: groups of one would erase what a narrow layer carries in its mean."""
    return nn.GroupNorm(min(32, max(1, channels // 4)), channels, eps=1e-6)


class HierarchicalEncoder(nn.Module):
    """E_h: (B, 3, H, W) -> k moments (B, 2 n_z, H/f, W/f), coarsest to finest: a branch leaves at each f's level."""

    def __init__(self, config: DynamicVAEConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.encoder_mult]
        self.factors = config.downsampling
        self.embed = nn.Conv2d(3, config.channels, 3, padding=1)
        self.levels = nn.ModuleList()
        self.down = nn.ModuleList()
        self.branches = nn.ModuleDict()
        channels = config.channels
        for i, width in enumerate(widths):
            factor = 2**i
            self.levels.append(Level(channels, width, config.residual_blocks, factor >= config.attention_from))
            channels = width
            if factor in config.downsampling:
                self.branches[f"f{factor}"] = nn.Sequential(Middle(width), Head(width, 2 * config.latent_channels))
            if i + 1 < len(widths):
                self.down.append(nn.Conv2d(width, width, 3, stride=2))

    def blocks(self) -> list[nn.Module]:
        return [*self.levels, *(cast(nn.Sequential, branch)[0] for branch in self.branches.values())]

    def forward(self, images: Tensor) -> list[Tensor]:
        h = self.embed(images)
        moments = []
        for i, level in enumerate(self.levels):
            h = level(h)
            if f"f{2**i}" in self.branches:
                moments.append(self.branches[f"f{2**i}"](h))
            if i < len(self.down):
                h = self.down[i](F.pad(h, (0, 1, 0, 1)))
        return moments[::-1]


class Decoder(nn.Module):
    """(B, n_z, Hf, Wf) and the grain map -> (B, 3, H, W).

    Position enters after the first convolution (a unit-variance embedding on the latent itself would swamp four
    channels): a linear map of sinusoids of the cell's place in the image, and a learned vector for each grain and place
    within the region, which makes equal cells of one code differ. Neither depends on the image size.
    """

    WAVES = 4

    def __init__(self, config: DynamicVAEConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.decoder_mult]
        channels = widths[-1]
        side = config.code_sizes[0]
        self.cells_per_region = side
        self.embed = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.place = nn.Linear(4 * self.WAVES, channels)
        self.grain = nn.Parameter(torch.randn(config.num_grains, side, side, channels) * 0.02)
        self.middle = Middle(channels)
        self.levels = nn.ModuleList()
        self.up = nn.ModuleList()
        for i in reversed(range(len(widths))):
            attention = 2**i >= config.attention_from
            self.levels.append(Level(channels, widths[i], config.residual_blocks + 1, attention))
            channels = widths[i]
            if i:
                self.up.append(nn.Conv2d(channels, channels, 3, padding=1))
        self.head = Head(channels, 3)

    def blocks(self) -> list[nn.Module]:
        return [self.middle, *self.levels]

    def forward(self, z: Tensor, grain_map: Tensor) -> Tensor:
        h = self.embed(z)
        h = self.middle(h + self._positions(grain_map, h))
        for i, level in enumerate(self.levels):
            h = level(h)
            if i < len(self.up):
                h = self.up[i](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.head(h)

    def _positions(self, grain_map: Tensor, h: Tensor) -> Tensor:
        batch, rows, columns = grain_map.shape
        side = self.cells_per_region
        grains = torch.arange(self.grain.shape[0], device=grain_map.device)
        indicators = (grain_map[..., None] == grains).to(self.grain.dtype)
        within = indicators @ self.grain.flatten(1)  # a product, so that its gradient has a fixed order
        within = within.reshape(batch, rows, columns, side, side, -1).permute(0, 5, 1, 3, 2, 4)
        within = within.reshape(batch, -1, rows * side, columns * side)

        def waves(cells: int) -> Tensor:
            # Cosines of half-periods over the image: distinct at both borders, smooth, any number of cells.
            place = (torch.arange(cells, device=h.device, dtype=torch.float32) + 0.5) / cells
            angle = place[:, None] * torch.pi * 2.0 ** torch.arange(self.WAVES, device=h.device)
            return torch.cat([angle.cos(), angle.sin()], dim=1)

        y = waves(rows * side)[:, None].expand(-1, columns * side, -1)
        x = waves(columns * side)[None].expand(rows * side, -1, -1)
        place = self.place(torch.cat([y, x], dim=-1).to(self.place.weight.dtype))  # (Hf, Wf, C)
        return (within + place.permute(2, 0, 1)).to(h.dtype)


class VAEOutput(NamedTuple):
    """What a training step needs of a `DynamicVAE`.

    Args:
        reconstruction: (B, 3, H, W).
        mean: of the posterior, (B, n_z, Hf, Wf), as `DynamicVAE.encode` returns it.
        logvar: of the posterior.
        grain_map: (B, H/S, W/S) int64.
    """

    reconstruction: Tensor
    mean: Tensor
    logvar: Tensor
    grain_map: Tensor


class DynamicVAE(Model):
    """The autoencoder of the first stage: `DynamicVAE.from_preset("f8f16")`.

    Images are (B, 3, H, W) in [-1, 1], their sides multiples of S; latents are (B, n_z, Hf, Wf), the codes of every
    grain neighbour-copied onto the finest grid; grain maps (B, H/S, W/S) int64.
    """

    Config = DynamicVAEConfig
    presets = VAE_PRESETS
    config: DynamicVAEConfig
    #: (k-1,) entropies in nats, and the factor that gives latents unit variance: buffers, so that they travel with the
    #: weights. `set_thresholds` and `set_scaling_factor` change them.
    thresholds: Tensor
    scaling_factor: Tensor

    def __init__(self, config: DynamicVAEConfig) -> None:
        super().__init__(config)
        self.encoder = HierarchicalEncoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("thresholds", torch.tensor(config.thresholds, dtype=torch.float32))
        self.register_buffer("scaling_factor", torch.tensor(config.scaling_factor, dtype=torch.float32))

    @property
    def downsampling(self) -> tuple[int, ...]:
        """Finest to coarsest, (8, 16)."""
        return self.config.downsampling

    def transformer_blocks(self) -> list[nn.Module]:
        """The levels and middles. The heads are not among them: `last_layer` must have a gradient of its own."""
        return [*self.encoder.blocks(), *self.decoder.blocks()]

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, at which the adversarial weight compares gradients."""
        return self.decoder.head.conv.weight

    def set_thresholds(self, thresholds: Sequence[float]) -> None:
        """Replaces the entropy thresholds: k-1 ascending values (ValueError otherwise)."""
        self.config.thresholds = self.config.check_thresholds(thresholds)
        self.thresholds.copy_(torch.tensor(self.config.thresholds))

    def set_scaling_factor(self, factor: float) -> None:
        """Replaces the latents' scaling factor, a positive number (ValueError otherwise)."""
        self.config.scaling_factor = self.config.check_scaling_factor(factor)
        self.scaling_factor.fill_(factor)

    def grain_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Dynamic Grained Coding: (grain map, entropy (B, H/S, W/S) float32) of images in [-1, 1] or uint8."""
        return ops.encode_grains(images, self.thresholds, **self.config.entropy)

    def encode(self, images: Tensor, grain_map: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Encodes images into the moments of their posterior.

        Args:
            images: (B, 3, H, W) in [-1, 1] (`d2it.pictures.from_uint8` makes them of uint8).
            grain_map: given, it is used as it is; None takes it from the images' entropy.

        Returns:
            mean, logvar (B, n_z, Hf, Wf) float32, neighbour-copied, logvar in [-30, 20]; the grain map; the entropy, or
            None where the map was given.

        Raises:
            ValueError: images whose sides are not multiples of S, of another dtype or device, or a grain map of another
                size.
        """
        self._check_images(images)
        layers.check_like(self.encoder.embed.weight, {}, {"grain_map": grain_map})
        entropy = None
        if grain_map is None:
            grain_map, entropy = self.grain_map(images)
        s = self.config.region_size
        expected = (images.shape[0], images.shape[2] // s, images.shape[3] // s)
        if tuple(grain_map.shape) != expected:
            raise ValueError(f"grain_map must be {expected}, got {tuple(grain_map.shape)}")
        moments = [m.float() for m in self.encoder(images)]
        mean, logvar = ops.neighbor_copy(moments, grain_map).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20), grain_map, entropy

    def encode_all(self, images: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Encodes images into the moments of every grain, of which any grain map takes its own.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            mean, logvar (B, n_z, H/f, W/f) float32 of each grain on its own grid, coarsest first, logvar in [-30, 20];
            the entropy of the regions (B, H/S, W/S) float32, nats.

        Raises:
            ValueError: images whose sides are not multiples of S, of another dtype or device.
        """
        self._check_images(images)
        entropy = self.grain_map(images)[1]
        moments = [m.float().chunk(2, dim=1) for m in self.encoder(images)]
        return [(mean, logvar.clamp(-30, 20)) for mean, logvar in moments], entropy

    def _check_images(self, images: Tensor) -> None:
        s = self.config.region_size
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % s or images.shape[3] % s:
            raise ValueError(f"images must be (B, 3, H, W) with H and W multiples of {s}, got {tuple(images.shape)}")
        layers.check_like(self.encoder.embed.weight, {"images": images}, {})

    def sample(self, mean: Tensor, logvar: Tensor, grain_map: Tensor, generator: Generators = None) -> Tensor:
        """A draw of the posterior with one normal variate a code: equal cells of a code stay equal."""
        noise = randn(mean.shape, generator, device=mean.device, dtype=mean.dtype)
        return mean + (0.5 * logvar).exp() * copy_codes(noise, grain_map, self.config.code_sizes)

    def decode(self, z: Tensor, grain_map: Tensor) -> Tensor:
        """(B, n_z, Hf, Wf) latents, unscaled, and their grain map -> (B, 3, H, W) images, about [-1, 1].

        Raises:
            ValueError: latents and grain map of different grids.
        """
        side = self.config.code_sizes[0]
        batch, h, w = grain_map.shape
        if tuple(z.shape) != (batch, self.config.latent_channels, h * side, w * side):
            raise ValueError(
                f"z must be {(batch, self.config.latent_channels, h * side, w * side)} for this grain_map, "
                f"got {tuple(z.shape)}"
            )
        layers.check_like(self.decoder.embed.weight, {"z": z}, {"grain_map": grain_map})
        return self.decoder(z, grain_map)

    def forward(self, images: Tensor, grain_map: Tensor | None = None, *, generator: Generators = None) -> VAEOutput:
        """Encodes, draws from the posterior, decodes: the whole of a training step that must go through DDP."""
        mean, logvar, grain_map, _ = self.encode(images, grain_map)
        z = self.sample(mean, logvar, grain_map, generator)
        return VAEOutput(self.decode(z, grain_map), mean, logvar, grain_map)
