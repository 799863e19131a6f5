"""The attention of a Swin Transformer's stage, as it is usually written and on d2it.ops, with equal results.

python examples/swin.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2it import ops

WINDOW, HEADS, CHANNELS, SIDE = 7, 4, 96, 28


def partition(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B * windows, w * w, C)."""
    return x.unflatten(1, (-1, WINDOW)).unflatten(3, (-1, WINDOW)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def merge(x: Tensor, batch: int) -> Tensor:
    """The inverse of `partition`."""
    x = x.reshape(batch, SIDE // WINDOW, SIDE // WINDOW, WINDOW, WINDOW, -1)
    return x.transpose(2, 3).reshape(batch, SIDE, SIDE, -1)


class SwinAttention(nn.Module):
    """Roll, partition, table bias and -100 mask around PyTorch's attention."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.qkv, self.proj = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.table = nn.Parameter(0.02 * torch.randn((2 * WINDOW - 1) ** 2, HEADS))
        part = torch.bucketize(torch.arange(SIDE), torch.tensor([SIDE - WINDOW, SIDE - shift]), right=True)
        part = part if shift else torch.zeros_like(part)
        segments = partition((3 * part[:, None] + part)[None, :, :, None])[..., 0]
        self.register_buffer("segments", segments)
        self.register_buffer("mask", torch.where(segments[:, :, None] != segments[:, None], -100.0, 0.0))

    def attend(self, x: Tensor) -> Tensor:
        """(windows, w * w, C), the same out."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        bias = self.table[ops.reference.relative_position_index(WINDOW).flatten()]
        bias = bias.unflatten(0, (WINDOW**2, WINDOW**2)).permute(2, 0, 1)[None]
        mask = self.mask[:, None].repeat(len(x) // len(self.mask), 1, 1, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias + mask).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), the same out."""
        rolled = x.roll((-self.shift, -self.shift), (1, 2))
        return merge(self.proj(self.attend(partition(rolled))), len(x)).roll((self.shift, self.shift), (1, 2))


class D2SwinAttention(SwinAttention):
    """The same on d2it.ops: what changes is `attend`."""

    def attend(self, x: Tensor) -> Tensor:
        """(windows, w * w, C), the same out."""
        qkv, bias = self.qkv(x).unflatten(-1, (3, HEADS, -1)), ops.relative_position_bias(self.table, WINDOW)
        segments = self.segments if self.shift else None
        return ops.window_attention_qkvpacked(qkv, bias, segment_ids=segments).flatten(-2)


def difference(shift: int) -> float:
    """The largest difference of the two, in the result and in the gradients of the input and of all parameters."""
    usual, ours = SwinAttention(shift), D2SwinAttention(shift)
    ours.load_state_dict(usual.state_dict())
    x, cotangent = torch.randn(2, SIDE, SIDE, CHANNELS, requires_grad=True), torch.randn(2, SIDE, SIDE, CHANNELS)
    found = []
    for module in (usual, ours):
        out = module(x)
        found.append([out, *torch.autograd.grad(out, (x, *module.parameters()), cotangent)])
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*found))


if __name__ == "__main__":
    torch.manual_seed(0)
    for shift in (0, 3):
        print(f"shift {shift}: largest difference {difference(shift):.1e} of the largest value")
