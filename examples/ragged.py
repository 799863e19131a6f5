"""A layer for ragged windows: attention and projections for the tokens that exist, the rest passes through.

python examples/ragged.py
"""

import torch
from torch import Tensor, nn

from d2it import ops


class RaggedAttention(nn.Module):
    """Window attention over the cells of the fine regions; all others come out as they went in."""

    def __init__(self, channels: int = 96, heads: int = 4, window: int = 8) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))

    def forward(self, x: Tensor, grain_map: Tensor) -> Tensor:
        """x (B, Hf * Wf, C), grain_map (B, Hf / 2, Wf / 2) -> (B, Hf * Wf, C)."""
        plan = ops.plan_tokens(grain_map, cells_per_region=2, window=self.window)
        rows = ops.pack_tokens(x, plan)
        qkv = self.qkv(self.norm(rows)).unflatten(-1, (3, self.heads, -1))
        bias = ops.relative_position_bias(self.table, self.window)
        out = ops.window_attention_qkvpacked(qkv, bias, slots=plan.slots)
        return ops.unpack_tokens(rows + self.proj(out.flatten(-2)), plan, base=x)


if __name__ == "__main__":
    torch.manual_seed(0)
    layer, x = RaggedAttention(), torch.randn(2, 32 * 32, 96, requires_grad=True)
    grain_map = torch.randint(0, 2, (2, 16, 16))
    y = layer(x, grain_map)
    y.backward(torch.randn_like(y))
    fine = grain_map.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1).bool()
    print(f"{int(fine.sum())} of {fine.numel()} cells have a token; the others: {torch.equal(y[~fine], x[~fine])}")
