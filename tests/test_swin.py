"""A Swin Transformer block's attention (Liu et al. 2021, section 3.2) built on d2it.ops, against the textbook."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from d2it import ops

README = Path(__file__).resolve().parents[1] / "README.md"


def textbook(x: Tensor, qkv: torch.nn.Linear, table: Tensor, w: int, shift: int) -> Tensor:
    """(B, H, W, C) -> (windows, w * w, heads, C / heads), cell by cell as the paper words it, in float64."""
    height, width, heads = x.shape[1], x.shape[2], table.shape[1]
    q, k, v = torch.nn.functional.linear(x, qkv.weight.double(), qkv.bias.double()).chunk(3, dim=-1)
    outputs = []
    for image in range(x.shape[0]):
        for top in range(0, height, w):
            for left in range(0, width, w):
                # A cell of the rolled image, and where it was before.
                cells = [((top + i + shift) % height, (left + j + shift) % width) for i in range(w) for j in range(w)]
                y, z = (torch.tensor(axis) for axis in zip(*cells))
                # The roll carries what left on one side to the other: such cells are no neighbours of those there.
                own = torch.tensor([(a < shift and shift > 0, b < shift and shift > 0) for a, b in cells])
                apart = (own[:, None] != own[None, :]).any(-1)
                i = torch.arange(w * w)
                dy, dx = i[:, None] // w - i // w, i[:, None] % w - i % w
                bias = table.double()[(dy + w - 1) * (2 * w - 1) + dx + w - 1]  # (w * w, w * w, heads)
                for_heads = []
                for h in range(heads):
                    a, b, c = (t[image, y, z].chunk(heads, dim=-1)[h] for t in (q, k, v))
                    scores = a @ b.T / math.sqrt(a.shape[-1]) + bias[:, :, h]
                    for_heads.append(scores.masked_fill(apart, -math.inf).softmax(-1) @ c)
                outputs.append(torch.stack(for_heads, dim=1))
    return torch.stack(outputs)


def assert_agrees(out: Tensor, x: Tensor, qkv: torch.nn.Linear, table: Tensor, w: int, shift: int) -> None:
    """Values, and the gradients of the projection and of the table."""
    want = textbook(x.double(), qkv, table, w, shift)
    cotangent = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    leaves = (qkv.weight, qkv.bias, table)
    got_grads = torch.autograd.grad(out, leaves, cotangent)
    want_grads = torch.autograd.grad(want, leaves, cotangent.double())
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    for got, expected in zip(got_grads, want_grads):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_the_lines_of_the_readme_run_and_its_block_is_the_textbooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(README.parent)
    torch.manual_seed(0)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(compile(code, str(README), "exec"), names)
    assert names["images"].shape == (3, 3, 64, 64)
    assert names["out"].shape == (32, 49, 4, 24)
    assert names["rows"].shape == (4 * 32 * 32, 96)
    assert_agrees(*(names[name] for name in ("out", "x", "qkv", "table", "w", "shift")))


@pytest.mark.parametrize("backend", ops.available_backends("window_attention_qkvpacked"))
@pytest.mark.parametrize("shift", [0, 1])
def test_plain_and_shifted_windows(backend: str, shift: int) -> None:
    if torch.cuda.is_available() and backend == "cpu":
        pytest.skip("the block lies on the GPU")
    w, side, heads = 3, 6, 2
    torch.manual_seed(2)
    x, qkv = torch.randn(2, side, side, 32), torch.nn.Linear(32, 96)
    table = torch.randn((2 * w - 1) ** 2, heads, requires_grad=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def windows(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, w)).unflatten(3, (-1, w)).transpose(2, 3).flatten(3, 4).flatten(0, 2)

    part = torch.bucketize(torch.arange(side), torch.tensor([side - w, side - shift]), right=True)
    segments = windows(3 * part[None, :, None] + part).to(device) if shift else None
    projected = qkv(windows(x.roll((-shift, -shift), (1, 2)))).unflatten(-1, (3, heads, -1))
    table_backend = backend if backend in ops.available_backends("relative_position_bias") else None
    bias = ops.relative_position_bias(table.to(device), w, backend=table_backend)
    out = ops.window_attention_qkvpacked(projected.to(device), bias, segment_ids=segments, backend=backend)
    assert_agrees(out.cpu(), x, qkv, table, w, shift)
