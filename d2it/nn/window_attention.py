"""Attention inside windows as a layer: projection, bias, fused attention, projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2it import ops
from d2it.nn.linear import Linear, bias_apart

#: What a `WindowAttention` can add to its scores.
RELATIVE_BIASES = ("matrix", "table", "none")


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows of w x w cells, with a learnable bias.

    It is the attention of a Swin Transformer's block (Liu et al. 2021, Eq. 4) and of RefineNet (D2iT, Eq. 10), over
    `d2it.ops.window_attention_qkvpacked`: windows are read where the projection left them, and of packed windows only
    the tokens that exist cost anything.

    Args:
        dim: C, channels; a multiple of `heads`.
        heads: H, attention heads.
        window: w, cells along a window's side.
        relative_bias: "table", Swin's (2w-1)^2 offsets per head; "matrix", one (w*w) x (w*w) matrix per head; "none".
        qkv_bias: whether the projection to queries, keys and values has a bias.

    Attributes:
        qkv: Linear, C -> 3 C.
        proj: Linear, C -> C.
        bias: ((2w-1)^2, H) or (1, H, w*w, w*w), zero at the start, or None.

    Raises:
        ValueError: `dim` is no multiple of `heads`, or an unknown `relative_bias`.

    Example:
        >>> import torch
        >>> from d2it import nn, ops
        >>> attention = nn.WindowAttention(96, heads=4, window=7)
        >>> attention(torch.randn(32, 49, 96)).shape  # 32 windows
        torch.Size([32, 49, 96])
        >>> segments = nn.shifted_segments((28, 28), window=7, shift=3)  # (16, 49): of one image's windows
        >>> attention(torch.randn(32, 49, 96), segments=segments).shape
        torch.Size([32, 49, 96])
        >>> plan = ops.plan_from_mask(torch.rand(2, 28, 28) < 0.3, window=7)  # only some cells have a token
        >>> rows = ops.pack_tokens(torch.randn(2, 28 * 28, 96), plan)
        >>> attention(rows, plan.slots).shape == rows.shape
        True
    """

    def __init__(
        self, dim: int, heads: int, window: int, relative_bias: str = "table", *, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}")
        check_relative_bias(relative_bias)
        self.heads = heads
        self.window = window
        self.relative_bias = relative_bias
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        shape = {"matrix": (1, heads, window**2, window**2), "table": ((2 * window - 1) ** 2, heads)}
        self.bias = None if relative_bias == "none" else nn.Parameter(torch.zeros(shape[relative_bias]))

    def forward(self, x: Tensor, slots: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Attends inside every window.

        Args:
            x: packed rows (T, C) with `slots`; or all cells in window order, (W, w*w, C) or (B, L, C).
            slots: (W, w*w) int32, the row of each position or -1 (`TokenPlan.slots`).
            segments: (Ws, w*w): cells attend to those of their window with the same number, window i to those of
                row i % Ws; only for all cells.

        Returns:
            The shape of `x`.

        Raises:
            TypeError, ValueError: as for `d2it.ops.window_attention_qkvpacked`.
        """
        return self.proj(self._attend(x, slots, segments))

    def apart(
        self, x: Tensor, slots: Tensor | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`forward`, and the projection's bias where its gradient is left to what takes the output, as to
        `d2it.ops.gated_residual`; else None."""
        return bias_apart(self.proj, self._attend(x, slots, segments))

    def _attend(self, x: Tensor, slots: Tensor | None, segments: Tensor | None) -> Tensor:
        """The heads of every position, side by side."""
        bias: Tensor | None = self.bias
        if bias is not None and self.relative_bias == "table":
            bias = ops.relative_position_bias(bias, self.window)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        if slots is not None:
            out = ops.window_attention_qkvpacked(qkv, bias, slots=slots, segment_ids=segments)  # (T, H, D)
        else:
            windows = qkv.flatten(0, 1).unflatten(0, (-1, self.window**2))  # (W, w*w, 3, H, D)
            out = ops.window_attention_qkvpacked(windows, bias, segment_ids=segments)
            out = out.reshape(*x.shape[:2], self.heads, -1)
        return out.flatten(-2)


def check_relative_bias(name: str) -> None:
    """Raises ValueError where `WindowAttention` has no such bias."""
    if name not in RELATIVE_BIASES:
        raise ValueError(f"relative_bias must be one of {', '.join(RELATIVE_BIASES)}, got {name!r}")


def shifted_segments(grid: tuple[int, int], window: int, shift: int, device: torch.device | None = None) -> Tensor:
    """Which cells of shifted windows attend to each other: those that were neighbours before the roll.

    A Swin block rolls the image by `shift` cells up and left before it cuts windows (Liu et al. 2021, Fig. 4); cells
    that the roll brings together from opposite borders must not see each other.

    Args:
        grid: (H, W) cells, multiples of `window`.
        window: w, cells along a window's side.
        shift: cells of the roll, 0 ... w - 1.
        device: of the result.

    Returns:
        (H / w * W / w, w*w) int64, windows row-major in the image, cells row-major in the window: equal numbers attend
        to each other.

    Raises:
        ValueError: a grid that windows do not divide, or a shift outside 0 ... w - 1.

    Example:
        >>> from d2it import nn
        >>> nn.shifted_segments((4, 4), window=2, shift=1)
        tensor([[0, 0, 0, 0],
                [1, 2, 1, 2],
                [3, 3, 6, 6],
                [4, 5, 7, 8]])
    """
    if window < 1 or any(side < 1 or side % window for side in grid):
        raise ValueError(f"grid must be multiples of window, got {tuple(grid)} and {window}")
    if not 0 <= shift < window:
        raise ValueError(f"shift must be in 0 ... {window - 1}, got {shift}")
    if shift:
        parts = [(torch.arange(s, device=device) >= s - torch.tensor([[window], [shift]])).sum(0) for s in grid]
    else:
        parts = [torch.zeros(s, dtype=torch.int64, device=device) for s in grid]
    cells = 3 * parts[0][:, None] + parts[1]
    return cells.unflatten(0, (-1, window)).unflatten(2, (-1, window)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
