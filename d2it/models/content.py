"""Dynamic Content Transformer (Sec. 3.2.3): rough noise for every region, corrected where the grain is fine.

Multi-grained Net (Eq. 6) -> router (Eq. 7) -> RefineNet on the fine cells (Eqs. 8 and 10) -> merge (Eq. 9). Fine tokens
are packed: the latents of the fine cells are gathered before the patch-1 embedding and merged after the final layer, so
that RefineNet's cost follows their number and what is moved has a dozen channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d2it import ops
from d2it.models import layers
from d2it.models.base import check_whole, pair, set_whole_tuples
from d2it.models.dit import ClassConditional, Trunk
from d2it.models.presets import CONTENT_PRESETS


@dataclass
class ContentTransformerConfig:
    """
    Args:
        image_size: pixels, a side or (height, width); multiples of the coarsest downsampling factor.
        downsampling: the autoencoder's factors, finest first: their number is the number of grains k.
        patch_size: P_L of the Multi-grained Net in cells; None is one token a region.
        depth, refine_depth: DiT blocks and RefineNet blocks.
        window: side of RefineNet's windows in cells; it divides the latent grid.
        relative_bias: "matrix" | "table" | "none" (`layers.WindowAttention`).
        min_grain: the coarsest grain that RefineNet corrects; 1 is every grain but the coarsest.
        masked: RefineNet over all cells with masks instead of packed tokens: same parameters, same result, more work.
    """

    image_size: int | Iterable[int] = (256, 256)
    downsampling: tuple[int, ...] = (8, 16)
    in_channels: int = 4
    patch_size: int | None = None
    dim: int = 1152
    depth: int = 23
    refine_depth: int = 5
    heads: int = 16
    mlp_ratio: float = 4.0
    window: int = 16
    relative_bias: str = "matrix"
    min_grain: int = 1
    num_classes: int | None = 1000
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    masked: bool = False
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        self.image_size = pair(self.image_size)
        set_whole_tuples(self, "downsampling")
        self.num_classes = self.num_classes or 0
        check_whole(self, in_channels=1, dim=4, depth=1, refine_depth=1, heads=1, window=1, num_classes=0)
        finest, coarsest = self.downsampling[0], self.downsampling[-1]
        if list(self.downsampling) != sorted(set(self.downsampling)) or any(
            coarsest % f or f % finest for f in self.downsampling
        ):
            raise ValueError(
                "downsampling must ascend, each factor a multiple of the first and a divisor of the last, "
                f"got {self.downsampling}"
            )
        if any(side % coarsest for side in self.image_size):
            raise ValueError(f"image_size must be a multiple of {coarsest}, got {self.image_size}")
        if self.patch_size is None:
            self.patch_size = self.cells_per_region
        check_whole(self, patch_size=1)
        if self.cells_per_region % self.patch_size:
            raise ValueError(
                f"patch_size must divide the {self.cells_per_region} cells of a region's side, got {self.patch_size}"
            )
        if any(side % self.window for side in self.grid):
            raise ValueError(f"window must divide the latent grid {self.grid[0]} x {self.grid[1]}, got {self.window}")
        if not 0 <= self.min_grain < self.num_grains:
            raise ValueError(f"min_grain must be in 0 ... {self.num_grains - 1}, got {self.min_grain}")

    @property
    def num_grains(self) -> int:
        return len(self.downsampling)

    @property
    def cells_per_region(self) -> int:
        """Cells along a region's side."""
        return self.downsampling[-1] // self.downsampling[0]

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """Cells along the side of one latent code, by grain (coarsest first): (2, 1) for {8, 16}."""
        return tuple(f // self.downsampling[0] for f in reversed(self.downsampling))

    @property
    def grid(self) -> tuple[int, int]:
        """(Hf, Wf), the finest latent's cells."""
        height, width = pair(self.image_size)
        return (height // self.downsampling[0], width // self.downsampling[0])

    @property
    def region_grid(self) -> tuple[int, int]:
        """(H/S, W/S), the grain map's size."""
        height, width = pair(self.image_size)
        return (height // self.downsampling[-1], width // self.downsampling[-1])

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


class RefineNet(nn.Module):
    """Fine-grained noise correction (Eq. 8) on rows of cells: packed, or all of them in window order.

    Per cell: concat(eps_2, z_noised) -> Linear (patch 1), + learnable position, + grain embedding; adaLN-Zero blocks
    with window attention; a zero-initialised final layer, so that training starts from the rough prediction.
    """

    def __init__(self, config: ContentTransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.in_features = config.out_channels + config.in_channels
        self.embed = nn.Linear(self.in_features, dim)
        self.positions = nn.Parameter(torch.empty(config.grid[0] * config.grid[1], dim))
        self.grain = nn.Embedding(config.num_grains, dim)
        self.condition = layers.Conditioning(dim, config.num_classes or 0)
        self.blocks = nn.ModuleList(
            layers.Block(
                dim,
                layers.WindowAttention(dim, config.heads, config.window, config.relative_bias),
                config.mlp_ratio,
            )
            for _ in range(config.refine_depth)
        )
        self.final = layers.FinalLayer(dim, config.out_channels)
        self.grid = config.grid

    def initialize(self) -> None:
        with torch.no_grad():
            self.positions.copy_(layers.sincos_positions(self.grid, self.positions.shape[1]))

    def forward(
        self,
        features: Tensor,
        positions: Tensor,
        t: Tensor,
        y: Tensor | None,
        run: Callable[..., Tensor],
        *,
        sample: Tensor | None = None,
        slots: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            features: (T, F + k) or (B, L, F + k): eps_2, z_noised and the grain as k indicators.
            positions: (T, dim) or (B, L, dim), the rows of `self.positions` that belong to the cells.
            sample, slots: the plan's, for packed rows. segments: (windows, w*w), for all cells.

        Returns:
            (..., out_channels), the correction.
        """
        latent, grain = features.split([self.in_features, features.shape[-1] - self.in_features], dim=-1)
        # A product with indicators, not a lookup: its gradient is a matrix product too, in a fixed order.
        h = self.embed(latent) + grain @ self.grain.weight.to(grain.dtype)
        h = (h + positions).to(positions.dtype)
        c = self.condition(t, y)
        for block in self.blocks:
            h = run(block, h, c, sample, slots, segments)
        return self.final(h, c, sample)


class DynamicContentTransformer(ClassConditional):
    """`DynamicContentTransformer.from_preset("D2iT-XL", num_classes=1000, image_size=256)`.

    forward(x (B, C, Hf, Wf), t (B,), y (B,), grain_map (B, H/S, W/S)) -> (B, C or 2C, Hf, Wf). RefineNet runs in every
    call, on zero rows if no region is fine, so that every parameter has a gradient on every rank.
    """

    Config = ContentTransformerConfig
    presets = CONTENT_PRESETS
    config: ContentTransformerConfig

    def __init__(self, config: ContentTransformerConfig) -> None:
        super().__init__(config)
        self.multi_grained = Trunk(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            grid=config.grid,
            patch=config.patch_size or config.cells_per_region,
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            num_classes=config.num_classes or 0,
            attention=config.attention,
        )
        self.grain = nn.Embedding(config.num_grains, config.dim)
        self.refine = RefineNet(config)
        layers.initialize(self)
        self.refine.initialize()

    def transformer_blocks(self) -> list[nn.Module]:
        return [*self.multi_grained.blocks, *self.refine.blocks]

    def make_plan(self, grain_map: Tensor, capacity: int | None = None) -> ops.TokenPlan:
        """The packed layout of the cells that RefineNet corrects; without a host synchronisation.

        Args:
            grain_map: (B, H/S, W/S) int64.
            capacity: rows to allocate; None is B*Hf*Wf, always enough. The loader knows the maps and can ask for less.
        """
        config = self.config
        return ops.plan_tokens(
            grain_map,
            cells_per_region=config.cells_per_region,
            window=config.window,
            min_grain=config.min_grain,
            capacity=capacity,
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        grain_map: Tensor | None = None,
        plan: ops.TokenPlan | None = None,
        *,
        capacity: int | None = None,
        force_drop_ids: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x: noised latents; t: timesteps; y: labels, `num_classes` for none; grain_map: 0 = coarsest ... k-1.
            plan: `make_plan(grain_map)`, to be made once for many steps of the same maps; None makes it here.
            capacity: for the plan made here.
            force_drop_ids: (B,), true where the label is replaced by the null label.

        Raises:
            ValueError: shapes that do not fit the configuration, no grain map, or a plan for another batch.
        """
        config = self.config
        self.check_input(x, t, config.in_channels, config.grid)
        batch = x.shape[0]
        if grain_map is None or grain_map.shape != (batch, *config.region_grid):
            got = None if grain_map is None else tuple(grain_map.shape)
            raise ValueError(f"grain_map must be {(batch, *config.region_grid)}, got {got}")
        y = self.labels(y, batch, force_drop_ids)

        grains = torch.arange(config.num_grains, device=x.device)
        indicators = (grain_map[..., None] == grains).to(x.dtype)  # (B, h, w, k)
        noise = self.multi_grained(x, t, y, self._grain_tokens(indicators), self.run_block)  # (B, Hf, Wf, out)
        noise = noise.to(x.dtype)
        cells = _repeat(indicators, config.cells_per_region)
        features = torch.cat([noise, x.permute(0, 2, 3, 1), cells], dim=-1)  # (B, Hf, Wf, out + C + k)
        if config.masked:
            merged = self._refine_masked(features, noise, t, y, grain_map)
        else:
            if plan is None:
                plan = self.make_plan(grain_map, capacity)
            elif plan.grid != (batch, *config.grid) or plan.window != config.window:
                raise ValueError(
                    f"plan must be for cells {(batch, *config.grid)} in windows of {config.window}, "
                    f"got {plan.grid} in windows of {plan.window}"
                )
            merged = self._refine_packed(features, noise, t, y, plan)
        return merged.permute(0, 3, 1, 2).contiguous()

    def _grain_tokens(self, indicators: Tensor) -> Tensor:
        """(B, h, w, k) -> (B, L, dim): the grain embedding of every multi-grained token."""
        tokens = _repeat(indicators, self.config.cells_per_region // self.multi_grained.patch).flatten(1, 2)
        return tokens @ self.grain.weight.to(tokens.dtype)

    def _refine_packed(
        self, features: Tensor, noise: Tensor, t: Tensor, y: Tensor | None, plan: ops.TokenPlan
    ) -> Tensor:
        batch, height, width, out = noise.shape
        rows = ops.pack_tokens(features.flatten(1, 2), plan)  # (T, out + C + k)
        positions = self._positions(self.refine.positions, batch)
        correction = self.refine(
            rows,
            ops.pack_tokens(positions, plan),
            t,
            y,
            self.run_block,
            sample=plan.sample,
            slots=plan.slots,
        )
        corrected = rows[:, :out] + correction.to(rows.dtype)  # eps_2* = eps_2 + correction
        merged = ops.unpack_tokens(corrected, plan, base=noise.flatten(1, 2))  # Eq. 9
        return merged.unflatten(1, (height, width))

    def _refine_masked(self, features: Tensor, noise: Tensor, t: Tensor, y: Tensor | None, grain_map: Tensor) -> Tensor:
        window = self.config.window
        fine = _repeat((grain_map >= self.config.min_grain)[..., None], self.config.cells_per_region)
        segments = layers.to_windows(fine, window).reshape(-1, window * window).to(torch.int32)
        positions = layers.to_windows(self.refine.positions.unflatten(0, self.config.grid)[None], window)[0]
        correction = self.refine(
            layers.to_windows(features, window),
            self._positions(positions, noise.shape[0]),
            t,
            y,
            self.run_block,
            segments=segments,
        )
        correction = layers.from_windows(correction, window, self.config.grid)
        return torch.where(fine, noise + correction.to(noise.dtype), noise)

    def _positions(self, positions: Tensor, batch: int) -> Tensor:
        """(L, dim) -> (B, L, dim) without a copy, in the dtype of the residual stream."""
        return positions.to(layers.autocast_dtype(positions)).expand(batch, -1, -1)


def _repeat(x: Tensor, times: int) -> Tensor:
    """(B, h, w, C) -> (B, h * times, w * times, C), every entry repeated times x times."""
    if times == 1:
        return x
    b, h, w, c = x.shape
    x = x[:, :, None, :, None].expand(b, h, times, w, times, c)
    return x.reshape(b, h * times, w * times, c)
