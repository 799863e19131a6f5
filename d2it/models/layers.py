"""The parts that all transformers here share: adaLN-Zero blocks, embeddings, patches.

Shapes: tokens (B, L, C) or packed rows (T, C) with `sample` (T,) naming the batch row of each; conditioning (B, C).

Precision: under autocast the matrix products and the residual stream are in the autocast dtype; LayerNorm, softmax, the
modulation and the conditioning vector that it comes from are in float32.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2it import ops
from d2it.models.attention import attention
from d2it.nn import Linear, WindowAttention
from d2it.nn.linear import bias_apart, branch_apart, gelu_between


def check_like(weight: Tensor, floating: dict[str, Tensor], whole: dict[str, Tensor | None]) -> None:
    """Raises ValueError, naming the input, unless all are on the device of `weight` and the floating ones in its dtype.

    Under autocast any floating dtype will do.
    """
    device = weight.device
    for name, x in (*floating.items(), *whole.items()):
        if x is not None and x.device != device:
            raise ValueError(f"{name} must be on {device} as the model is, got {x.device}")
    for name, x in floating.items():
        cast = x.is_floating_point() and torch.is_autocast_enabled(device.type)
        if x.dtype != weight.dtype and not cast:
            raise ValueError(f"{name} must be {weight.dtype} as the weights are (or autocast be on), got {x.dtype}")


class Recomputable(nn.Module):
    """A block that can be computed again in the backward pass, so that only its input is kept until then.

    The checkpoint lies around `__call__`: outside of the block's hooks (FSDP2 has some) and of its compiled code.
    """

    recompute = False

    @property
    def recomputes(self) -> bool:
        """Whether a call made now is computed again in the backward pass."""
        return self.recompute and torch.is_grad_enabled()

    def __call__(self, *args: Any) -> Any:
        if not self.recomputes:
            return super().__call__(*args)
        # Blocks draw no random numbers, so there is no generator state to keep.
        return checkpoint(super().__call__, *args, use_reentrant=False, preserve_rng_state=False)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of an image: (B, L, C) -> (B, L, C)."""

    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, slots: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        return self.proj(self._attend(x))

    def apart(
        self, x: Tensor, slots: Tensor | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`forward`, and the projection's bias where its gradient is left to what takes the output; else None."""
        return bias_apart(self.proj, self._attend(x))

    def _attend(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, L, 3, H, D)
        return attention(qkv, self.backend).flatten(-2)


class Mlp(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_between(x, self.fc1, self.fc2, apart=False)[0]

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`forward`, and fc2's bias where its gradient is left to what takes the output; else None."""
        return gelu_between(x, self.fc1, self.fc2, apart=True)


class Modulation(nn.Module):
    """SiLU and a zero-initialised Linear: (B, C) -> `count` float32 tensors (B, C), each contiguous.

    Modulations of any count then have tensors of equal strides, which compiled blocks are made for.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(dim, count * dim)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        out = _float32_linear(self.linear, F.silu(c)).unflatten(-1, (self.count, -1))
        return out.movedim(-2, 0).contiguous().unbind(0)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a Linear with float32 weights returns for `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Autocast off for `device`; nothing on the meta device, which has none."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _float32_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """`linear(x)` outside autocast, in the dtype of the weights, returned as float32 (float64 stays).

    One row an image: its cost is nothing, its rounding would reach every token.
    """
    with without_autocast(x.device):
        out = linear(x.to(linear.weight.dtype))
    return out if out.dtype == torch.float64 else out.float()


class Block(Recomputable):
    """adaLN-Zero transformer block (Peebles and Xie, Sec. 3.2) around either kind of attention.

    A branch ends where the next one begins: its gate, the addition, the norm and the modulation are one operator. So a
    block takes its input modulated already, and modulates its output for whatever follows; `run_blocks` chains them.

    Attributes:
        backend: of these operators, as for `d2it.ops`; None chooses. "reference" is plain PyTorch, which a compiler
            can look into.
    """

    backend: str | None = None

    def __init__(self, dim: int, attn: Attention | WindowAttention, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.modulation = Modulation(dim, 6)
        self.attn = attn
        self.mlp = Mlp(dim, mlp_ratio)
        self._body: Callable[..., tuple[Tensor, Tensor | None]] = type(self).body
        self._compiled = False

    def forward(
        self,
        x: Tensor,
        modulated: Tensor | None,
        modulation: tuple[Tensor, ...],
        following: tuple[Tensor, ...] | None,
        sample: Tensor | None = None,
        slots: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Transforms the residual stream.

        Args:
            x: residual stream.
            modulated: `x` under this block's first shift and scale; None computes it here.
            modulation: what `self.modulation` returns.
            following: shift and scale (B, C) for the output; None leaves it as it is.
            sample: the plan's, for packed rows.
            slots: the plan's, for packed rows.
            segments: (windows, w*w), for all cells in window order.

        Returns:
            The residual stream, and the same modulated by `following` (None without).
        """
        if self._compiled and sample is not None:  # each batch has another number of packed rows: one graph for all
            for rows in (x, modulated, sample):
                if rows is not None:
                    torch._dynamo.maybe_mark_dynamic(rows, 0)
        return self._body(self, x, modulated, modulation, following, sample, slots, segments)

    def body(
        self,
        x: Tensor,
        modulated: Tensor | None,
        modulation: tuple[Tensor, ...],
        following: tuple[Tensor, ...] | None,
        sample: Tensor | None,
        slots: Tensor | None,
        segments: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """What is compiled of `forward`."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        how: dict[str, Any] = {"sample": sample, "backend": self.backend}
        if modulated is None:
            modulated = ops.adaln_modulate(x, shift_attn, scale_attn, **how)
        # The operator that gates a branch writes its gradient, and sums it for the bias of the branch's last layer.
        branch, bias = self._branch(self.attn, modulated, slots, segments)
        x, modulated = ops.gated_residual_modulate(x, branch, gate_attn, shift_mlp, scale_mlp, bias=bias, **how)
        branch, bias = self._branch(self.mlp, modulated)
        if following is None:
            return ops.gated_residual(x, branch, gate_mlp, bias=bias, **how), None
        return ops.gated_residual_modulate(x, branch, gate_mlp, *following, bias=bias, **how)

    def _branch(self, module: nn.Module, *args: Any) -> tuple[Tensor, Tensor | None]:
        """A branch, and the bias in it whose gradient is left to its gate: none in plain PyTorch."""
        return (module(*args), None) if self.backend == "reference" else branch_apart(module, *args)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile of the body, in place; arguments as for `torch.compile`.

        The modulation and the block's hooks stay outside: FSDP2 shards both apart, and Dynamo cannot trace its hooks.
        """
        self._body = torch.compile(type(self).body, *args, **kwargs)
        self._compiled = True


def cast_blocks(blocks: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Gives the weights of blocks a dtype, in place; the modulations in them stay float32."""
    for block in blocks:
        block.to(dtype)
        for module in block.modules():
            if isinstance(module, Modulation):
                module.float()


class FinalLayer(nn.Module):
    """adaLN and a zero-initialised Linear to the latent channels of a patch; `run_blocks` applies the adaLN."""

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.modulation = Modulation(dim, 2)
        self.linear = nn.Linear(dim, out_features)

    def forward(self, modulated: Tensor) -> Tensor:
        return self.linear(modulated)


def run_blocks(
    blocks: nn.ModuleList,
    final: FinalLayer,
    x: Tensor,
    c: Tensor,
    sample: Tensor | None = None,
    slots: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Runs the blocks on the tokens `x`, then the final layer, all under the conditioning `c` (B, C).

    A block that is computed again in the backward pass is handed the residual stream alone and returns it alone: one
    tensor is kept for it, not two.

    Args:
        blocks: of `Block`, one or more.
        final: the layer behind them.
        x: (B, L, C), or packed rows (T, C).
        c: conditioning.
        sample: the plan's, for packed rows.
        slots: the plan's, for packed rows.
        segments: (windows, w*w), for all cells in window order.
    """
    parts: list[Any] = [*blocks, final]
    # A modulation is made as late as possible, so that its gradient is ready, and reduced, early.
    modulation = parts[0].modulation(c)
    modulated = None
    if not parts[0].recomputes:
        modulated = ops.adaln_modulate(x, *modulation[:2], sample=sample)
    for block, behind in itertools.pairwise(parts):
        following = behind.modulation(c)
        target = None if block.recomputes else following[:2]
        x, modulated = block(x, modulated, modulation, target, sample, slots, segments)
        modulation = following
    if modulated is None:
        modulated = ops.adaln_modulate(x, *modulation, sample=sample)
    return final(modulated)


class TimestepEmbedder(nn.Module):
    """(B,) timesteps, whole or fractional -> (B, C): 256 sinusoids (cosines, then sines) through an MLP, float32."""

    FREQUENCIES = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(self.FREQUENCIES, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        half = self.FREQUENCIES // 2
        rate = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / half))
        angle = t.float()[:, None] * rate
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return _float32_linear(self.fc2, F.silu(_float32_linear(self.fc1, waves)))


class Conditioning(nn.Module):
    """c = embedding of t (+ embedding of y), (B, C) float32; row `num_classes` of the table is the null label."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.timestep = TimestepEmbedder(dim)
        self.label = nn.Embedding(num_classes + 1, dim) if num_classes else None

    def forward(self, t: Tensor, y: Tensor | None) -> Tensor:
        c = self.timestep(t)
        if self.label is not None:
            c = c + self.label(y).to(c.dtype)
        return c


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, L, dim): one Linear over patches in (channel, row, column) order, DiT's convolution."""

    def __init__(self, channels: int, patch: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels * patch * patch, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        p = self.patch
        x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        return self.proj(x.reshape(b, (h // p) * (w // p), c * p * p))


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, L, p*p*C), features in (row, column, channel) order -> (B, H, W, C), channels last."""
    b = tokens.shape[0]
    h, w = grid
    p = patch
    x = tokens.reshape(b, h // p, w // p, p, p, -1).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h, w, -1)


def sincos_positions(grid: tuple[int, int], dim: int, device: torch.device | None = None) -> Tensor:
    """(h*w, dim) float32, row-major: DiT's frozen embedding, half the width for the column, half for the row.

    The frequencies are those of MAE (He et al.), so that DiT's released weights get the positions of their training;
    the grid need not be square.
    """
    if dim % 4:
        raise ValueError(f"the width must be a multiple of 4 for a two-dimensional embedding, got {dim}")
    h, w = grid
    options: dict[str, Any] = {"dtype": torch.float64, "device": device}
    rate = 10000.0 ** (-torch.arange(dim // 4, **options) / (dim / 4))

    def axis(positions: Tensor) -> Tensor:
        angle = positions[:, None] * rate
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(h, **options), torch.arange(w, **options), indexing="ij")
    return torch.cat([axis(column.flatten()), axis(row.flatten())], dim=1).float()


def initialize(module: nn.Module) -> None:
    """DiT's initialisation: Linear xavier-uniform with zero bias, embeddings and timestep MLP N(0, 0.02), the
    modulations and the final Linear zero."""

    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
    for part in module.modules():
        if isinstance(part, TimestepEmbedder):
            nn.init.normal_(part.fc1.weight, std=0.02)
            nn.init.normal_(part.fc2.weight, std=0.02)
        elif isinstance(part, (Modulation, FinalLayer)):
            nn.init.zeros_(part.linear.weight)
            nn.init.zeros_(part.linear.bias)
