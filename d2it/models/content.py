"""Dynamic Content Transformer (Sec. 3.2.3): rough noise for every region, corrected where the grain is fine.

Multi-grained Net (Eq. 6) -> router (Eq. 7) -> RefineNet on the fine cells (Eqs. 8 and 10) -> merge (Eq. 9). Fine tokens
are packed: the latents of the fine cells are gathered before the patch-1 embedding and merged after the final layer, so
that RefineNet's cost follows their number and what is moved has a dozen channels.

With more than two grains RefineNet also corrects codes of several cells. A code is one token, which stands at the
code's first cell: in the windows, in the relative bias and in the learned positions. It takes the state's value and the
mean of the rough noise over the code, and its correction goes to all of the code's cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d2it import ops
from d2it.diffusion.grains import copy_codes, expand_map, project_to_grains
from d2it.diffusion.process import NUM_TIMESTEPS
from d2it.models import layers
from d2it.models.base import check_whole, pair, set_whole_tuples
from d2it.models.dit import ClassConditional, TransformerConfig, Trunk
from d2it.models.presets import CONTENT_PRESETS
from d2it.nn import WindowAttention
from d2it.nn.window_attention import check_relative_bias


@dataclass
class ContentTransformerConfig(TransformerConfig):
    """Configuration of a `DynamicContentTransformer`.

    Args:
        patch_size: side of the Multi-grained Net's tokens in cells, P_L; 0 (or None) is one token a region.
        dim: width; a multiple of 4 and of `heads`.
        depth: DiT blocks of the Multi-grained Net.
        heads: attention heads.
        mlp_ratio: width of an MLP's hidden layer over `dim`.
        num_classes: 0 (or None) for an unconditional model.
        class_dropout_prob: share of the labels that training replaces by the null label.
        attention: "auto" | "sdpa" | "d2it" | "flash_attn" | "xformers" (`models.attention`), in the Multi-grained Net.
        diffusion: how its data are noised and what it predicts (`d2it.diffusion.DiffusionConfig`).
        image_size: pixels, (height, width) or one side; multiples of the coarsest downsampling factor.
        downsampling: the autoencoder's factors, finest first: their number is the number of grains k.
        in_channels: latent channels C.
        learn_sigma: the output has 2C channels, the second half interpolates the log-variance.
        refine_depth: blocks of RefineNet.
        window: side of RefineNet's windows in cells; it divides the latent grid.
        relative_bias: "matrix" | "table" | "none" (`d2it.nn.WindowAttention`).
        min_grain: the coarsest grain that RefineNet corrects; 1 is every grain but the coarsest.
        refine_until: share of the timesteps, counted from clean, at which RefineNet corrects anything: those with
            t / T below it; 1.0 is all of them.
        masked: RefineNet over all cells with masks instead of packed tokens: same parameters, same result, more work.
    """

    patch_size: int = 0
    depth: int = 23
    image_size: tuple[int, int] = (256, 256)
    downsampling: tuple[int, ...] = (8, 16)
    in_channels: int = 4
    learn_sigma: bool = True
    refine_depth: int = 5
    window: int = 16
    relative_bias: str = "matrix"
    min_grain: int = 1
    refine_until: float = 1.0
    masked: bool = False

    def __post_init__(self) -> None:
        self.image_size = pair("image_size", self.image_size)
        set_whole_tuples(self, "downsampling")
        check_whole(self, in_channels=1, refine_depth=1, window=1, min_grain=0)
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
        if self.patch_size in (None, 0):
            self.patch_size = self.cells_per_region
        super().__post_init__()
        if self.cells_per_region % self.patch_size:
            raise ValueError(
                f"patch_size must divide the {self.cells_per_region} cells of a region's side, got {self.patch_size}"
            )
        if any(side % self.window for side in self.grid):
            raise ValueError(f"window must divide the latent grid {self.grid[0]} x {self.grid[1]}, got {self.window}")
        if self.min_grain >= self.num_grains:
            raise ValueError(f"min_grain must be in 0 ... {self.num_grains - 1}, got {self.min_grain}")
        share = self.refine_until
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share <= 1:
            raise ValueError(f"refine_until must be a share in 0 ... 1, got {share!r}")
        if share < 1 and not self.min_grain:
            raise ValueError(f"refine_until must be 1 where RefineNet corrects the coarsest grain too, got {share}")
        check_relative_bias(self.relative_bias)

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
    def refines_codes(self) -> bool:
        """Whether RefineNet corrects codes of several cells; otherwise each of its tokens is a cell."""
        return self.code_sizes[self.min_grain] > 1

    def refines(self, fraction: float) -> bool:
        """Whether RefineNet corrects anything at the timestep t = `fraction` T."""
        return self.refine_until == 1 or fraction < self.refine_until

    def refined_maps(self, grain_map: Tensor, t: Tensor) -> Tensor:
        """The maps (B, h, w) as RefineNet sees them at the timesteps t (B,): all coarsest where it corrects nothing."""
        if self.refine_until == 1:
            return grain_map
        return torch.where((t < self.refine_until * NUM_TIMESTEPS)[:, None, None], grain_map, 0)

    def region_tokens(self, grain_map: Tensor) -> Tensor:
        """RefineNet's tokens in each region of the maps (B, h, w), int64 of the same shape."""
        tokens = torch.zeros_like(grain_map)
        for grain in range(self.min_grain, self.num_grains):
            tokens += (grain_map == grain) * (self.cells_per_region // self.code_sizes[grain]) ** 2
        return tokens

    @property
    def grid(self) -> tuple[int, int]:
        """(Hf, Wf), the finest latent's cells."""
        return (self.image_size[0] // self.downsampling[0], self.image_size[1] // self.downsampling[0])

    @property
    def region_grid(self) -> tuple[int, int]:
        """(H/S, W/S), the grain map's size."""
        return (self.image_size[0] // self.downsampling[-1], self.image_size[1] // self.downsampling[-1])

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


class RefineNet(nn.Module):
    """Fine-grained noise correction (Eq. 8) on rows of codes: packed, or all cells in window order.

    Per code (of the finest grain a cell): concat(eps_2, z_noised) -> Linear (patch 1), + learnable position, + grain
    embedding; adaLN-Zero blocks with window attention; a zero-initialised final layer, so that training starts from the
    rough prediction.
    """

    def __init__(self, config: ContentTransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.in_features = config.out_channels + config.in_channels
        self.embed = nn.Linear(self.in_features, dim)
        self.positions = nn.Parameter(torch.empty(config.grid[0] * config.grid[1], dim))
        self.grain = nn.Embedding(config.num_grains, dim)
        self.condition = layers.Conditioning(dim, config.num_classes)
        self.blocks = nn.ModuleList(
            layers.Block(
                dim,
                WindowAttention(dim, config.heads, config.window, config.relative_bias),
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
        *,
        sample: Tensor | None = None,
        slots: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Computes the correction of the rough noise.

        Args:
            features: (T, F + k) or (B, L, F + k): eps_2, z_noised and the grain as k indicators.
            positions: (T, dim) or (B, L, dim), the rows of `self.positions` that belong to the codes' first cells.
            t: timesteps (B,).
            y: labels (B,), or None without classes.
            sample: the plan's, for packed rows.
            slots: the plan's, for packed rows.
            segments: (windows, w*w), for all cells.

        Returns:
            (..., out_channels), the correction.
        """
        latent, grain = features.split([self.in_features, features.shape[-1] - self.in_features], dim=-1)
        # A product with indicators, not a lookup: its gradient is a matrix product too, in a fixed order.
        h = self.embed(latent) + grain @ self.grain.weight.to(grain.dtype)
        h = (h + positions).to(positions.dtype)
        return layers.run_blocks(self.blocks, self.final, h, self.condition(t, y), sample, slots, segments)


class DynamicContentTransformer(ClassConditional):
    """Predicts the noise of grained latents.

    `DynamicContentTransformer.from_preset("D2iT-XL", num_classes=1000, image_size=256)`

    forward(x (B, C, Hf, Wf), t (B,), y (B,), grain_map (B, H/S, W/S)) -> (B, C or 2C, Hf, Wf). RefineNet runs in every
    call, on zero rows if no region is fine, so that every parameter has a gradient on every rank.
    """

    Config = ContentTransformerConfig
    presets = CONTENT_PRESETS
    config: ContentTransformerConfig

    def __init__(self, config: ContentTransformerConfig) -> None:
        super().__init__(config)
        self.multi_grained = Trunk(config)
        self.grain = nn.Embedding(config.num_grains, config.dim)
        self.refine = RefineNet(config)
        layers.initialize(self)
        self.refine.initialize()

    def transformer_blocks(self) -> list[nn.Module]:
        return [*self.multi_grained.blocks, *self.refine.blocks]

    def make_plan(self, grain_map: Tensor, capacity: int | None = None) -> ops.TokenPlan:
        """The packed layout of the codes that RefineNet corrects; without a host synchronisation.

        Args:
            grain_map: (B, H/S, W/S) int64.
            capacity: rows to allocate; None is B*Hf*Wf, always enough. The loader has the maps and can ask for less.
        """
        config = self.config
        return ops.plan_tokens(
            grain_map,
            cells_per_region=config.cells_per_region,
            window=config.window,
            min_grain=config.min_grain,
            capacity=capacity,
            code_sizes=config.code_sizes if config.refines_codes else None,
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
        refine: bool = True,
    ) -> Tensor:
        """Predicts the noise of `x`.

        Args:
            x: noised latents.
            t: timesteps.
            y: labels, `num_classes` for none.
            grain_map: 0 = coarsest ... k-1.
            plan: `make_plan(grain_map)`, to be made once for many steps of the same maps; None makes it here, without
                the tokens of images whose timestep `refine_until` leaves out.
            capacity: for the plan made here.
            force_drop_ids: (B,), true where the label is replaced by the null label.
            refine: False leaves RefineNet out: the rough noise is the result, as where no timestep is below
                `refine_until`.

        Raises:
            ValueError: shapes that do not fit the configuration, no grain map, or a plan for another batch.
        """
        config = self.config
        self.check_input(self.multi_grained, x, t, y)
        batch = x.shape[0]
        if grain_map is None or grain_map.shape != (batch, *config.region_grid):
            got = None if grain_map is None else tuple(grain_map.shape)
            raise ValueError(f"grain_map must be {(batch, *config.region_grid)}, got {got}")
        y = self.labels(y, batch, force_drop_ids)

        grains = torch.arange(config.num_grains, device=x.device)
        indicators = (grain_map[..., None] == grains).to(x.dtype)  # (B, h, w, k)
        noise = self.multi_grained(x, t, y, self._grain_tokens(indicators))  # (B, Hf, Wf, out)
        noise = noise.to(x.dtype)
        if not refine:
            return noise.permute(0, 3, 1, 2).contiguous()
        rough = noise
        if config.refines_codes:
            rough = project_to_grains(noise.permute(0, 3, 1, 2), grain_map, code_sizes=config.code_sizes)
            rough = rough.permute(0, 2, 3, 1)
        cells = expand_map(indicators, config.cells_per_region)
        features = torch.cat([rough, x.permute(0, 2, 3, 1), cells], dim=-1)  # (B, Hf, Wf, out + C + k)
        if config.masked:
            merged = self._refine_masked(features, noise, t, y, grain_map)
        else:
            if plan is None:
                plan = self.make_plan(config.refined_maps(grain_map, t), capacity)
            elif plan.grid != (batch, *config.grid) or plan.window != config.window:
                raise ValueError(
                    f"plan must be for cells {(batch, *config.grid)} in windows of {config.window}, "
                    f"got {plan.grid} in windows of {plan.window}"
                )
            merged = self._refine_packed(features, noise, t, y, grain_map, plan)
        return merged.permute(0, 3, 1, 2).contiguous()

    def _grain_tokens(self, indicators: Tensor) -> Tensor:
        """(B, h, w, k) -> (B, L, dim): the grain embedding of every multi-grained token."""
        tokens = expand_map(indicators, self.config.cells_per_region // self.multi_grained.patch).flatten(1, 2)
        return tokens @ self.grain.weight.to(tokens.dtype)

    def _refine_packed(
        self, features: Tensor, noise: Tensor, t: Tensor, y: Tensor | None, grain_map: Tensor, plan: ops.TokenPlan
    ) -> Tensor:
        batch, height, width, out = noise.shape
        rows = ops.pack_tokens(features.flatten(1, 2), plan)  # (T, out + C + k)
        positions = self._positions(self.refine.positions, batch)
        correction = self.refine(
            rows,
            ops.pack_tokens(positions, plan),
            t,
            y,
            sample=plan.sample,
            slots=plan.slots,
        )
        if self.config.refines_codes:
            correction = ops.unpack_tokens(correction.to(rows.dtype), plan).unflatten(1, (height, width))
            return noise + self._on_codes(correction, grain_map)
        corrected = rows[:, :out] + correction.to(rows.dtype)  # eps_2* = eps_2 + correction
        merged = ops.unpack_tokens(corrected, plan, base=noise.flatten(1, 2))  # Eq. 9
        return merged.unflatten(1, (height, width))

    def _refine_masked(self, features: Tensor, noise: Tensor, t: Tensor, y: Tensor | None, grain_map: Tensor) -> Tensor:
        batch, height, width, _ = noise.shape
        window, to_windows = self.config.window, ops.reference.to_windows
        refined = self.config.refined_maps(grain_map, t)
        fine = expand_map(refined >= self.config.min_grain, self.config.cells_per_region)  # (B, Hf, Wf)
        if self.config.refines_codes:
            fine &= ops.reference.first_cells(grain_map, self.config.cells_per_region, self.config.code_sizes)
        positions = to_windows(self.refine.positions.unflatten(0, (height, width))[None], window).flatten(0, 1)
        correction = self.refine(
            to_windows(features, window).reshape(batch, height * width, -1),
            self._positions(positions, batch),
            t,
            y,
            segments=to_windows(fine, window).to(torch.int32),
        )
        correction = ops.reference.from_windows(correction, window, (batch, height, width))
        if self.config.refines_codes:
            correction = torch.where(fine[..., None], correction.to(noise.dtype), 0)
            return noise + self._on_codes(correction, grain_map)
        return torch.where(fine[..., None], noise + correction.to(noise.dtype), noise)

    def _on_codes(self, correction: Tensor, grain_map: Tensor) -> Tensor:
        """(B, Hf, Wf, out), every cell with the correction of its code's first cell."""
        return copy_codes(correction.permute(0, 3, 1, 2), grain_map, self.config.code_sizes).permute(0, 2, 3, 1)

    def _positions(self, positions: Tensor, batch: int) -> Tensor:
        """(L, dim) -> (B, L, dim) without a copy, in the dtype of the residual stream."""
        return positions.to(layers.autocast_dtype(positions)).expand(batch, -1, -1)
