import random

import pytest
import torch

import d2it.ops
from tests import cuda_on_cpu
from tests.kernels.harness import DEVICE, Call, KernelSuite, Mutation, Shape

FILE = "kernels/window_attention.py"
CPP_MUTATIONS = {
    "wrong bias index": ("bias.matrix + «bias.positions[query]» * bias.n", "query"),
    "another window's bias": ("matrix = «index % p.bias_windows» * p.bias_heads", "0"),
    "segments ignored": ("«bias.segments[k] == own» ? row[k]", "true"),
    "missing row": ("tokens += «row >= 0»;", "row > 0"),
    "unnamed rows not cleared": ("if («unnamed[row]»)\n      for (const Heads* to", "false"),
    "no delta": ("const float delta = «total(sums) * inverse_sums[i]»;", "0.0f"),
    "weights not normalised": ("as<V>(matrix.row(begin + i) + j) *= «factors[i]»", "1.0f"),
    "gradient not scaled": ("tokens, p.width, b_dk, nullptr, «p.scale»)", "1.0f"),
    "queries that come later alone": ("const bool add = «i > 0»;", "false"),
    "remainder of the exponential": ("(bounded - n * «0.693359375f»)", "0.7f"),  # of cpu.h
    "missing run of the bias's sum": ("for (int64_t run = 0; run < «work.runs»; ++run)", "work.runs / 2"),
}
# More positions than a tile of heads that wide.
BLOCKWISE = {"W": 2, "N": 18, "H": 1, "D": 96, "fill": 0.6, "bias": (1, 1), "segments": 1}
SOURCES = cuda_on_cpu.Sources({"window_attention.cpp": CPP_MUTATIONS})


@pytest.mark.parametrize("fill", [None, 0.3])
def test_more_windows_than_a_grid_axis_has(fill: float | None) -> None:
    """70,000 of them, on the backend that the machine prefers."""
    rng = torch.Generator().manual_seed(0)
    slots = None if fill is None else slots_of(70_000, 4, fill, rng)
    rows = (70_000, 4) if slots is None else (int((slots >= 0).sum()),)
    qkv = torch.randn(*rows, 3, 1, 16, generator=rng).to(DEVICE).requires_grad_()
    bias = torch.randn(1, 1, 4, 4, generator=rng).to(DEVICE).requires_grad_()
    slots = slots if slots is None else slots.to(DEVICE)
    results = []
    for backend in (None, "reference"):
        out = d2it.ops.window_attention_qkvpacked(qkv, bias, slots=slots, backend=backend)
        results.append([out, *torch.autograd.grad(out, (qkv, bias), out.detach())])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_products_of_float32_are_exact_unless_torch_allows_tf32() -> None:
    pytest.importorskip("triton")
    from d2it.kernels.window_attention_rows import precision

    single, half = torch.zeros(1), torch.zeros(1, dtype=torch.float16)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert precision(single) == "ieee"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert (precision(single), precision(half)) == ("tf32", "ieee")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def slots_of(windows: int, n: int, fill: float, rng: torch.Generator) -> torch.Tensor:
    """(windows, n) int32: rows in a random order, so that nothing relies on a plan's; the first window is empty."""
    exists = torch.rand(windows, n, generator=rng) < fill
    if fill < 1:
        exists[:1] = False
    slots = torch.full((windows, n), -1, dtype=torch.int32)
    slots[exists] = torch.randperm(int(exists.sum()), generator=rng).to(torch.int32)
    return slots


class WindowSuite(KernelSuite):
    """Shapes: W windows of N positions, H heads of D; fill (None: dense), bias (Wb, Hb) or None, segments Ws."""

    half_alone = ("cuda",)

    corners = [
        {"W": 0, "N": 4, "H": 2, "D": 16, "fill": None, "bias": (1, 2), "segments": 0},
        {"W": 3, "N": 4, "H": 2, "D": 16, "fill": 0.0, "bias": (1, 2), "segments": 0},
        {"W": 5, "N": 4, "H": 2, "D": 32, "fill": 0.5, "bias": (1, 2), "segments": 0},
        {"W": 7, "N": 16, "H": 2, "D": 72, "fill": 1.0, "bias": (1, 1), "segments": 0},
        {"W": 3, "N": 16, "H": 2, "D": 16, "fill": None, "bias": (3, 2), "segments": 2},
        {"W": 2, "N": 49, "H": 1, "D": 24, "fill": None, "bias": (2, 1), "segments": 2},
        {"W": 3, "N": 64, "H": 1, "D": 64, "fill": 0.5, "bias": (1, 1), "segments": 0},
        {"W": 2, "N": 65, "H": 1, "D": 16, "fill": 0.7, "bias": None, "segments": 0},
        {"W": 2, "N": 66, "H": 2, "D": 16, "fill": 0.3, "bias": (2, 1), "segments": 1},
        {"W": 1, "N": 66, "H": 1, "D": 16, "fill": None, "bias": (1, 1), "segments": 0},
        {"W": 2, "N": 20, "H": 1, "D": 104, "fill": 0.6, "bias": (2, 1), "segments": 0},
    ]
    gpu_corners = [
        {"W": 64, "N": 16, "H": 16, "D": 72, "fill": 0.5, "bias": (1, 16), "segments": 0},
        {"W": 32, "N": 64, "H": 12, "D": 64, "fill": 1.0, "bias": (32, 12), "segments": 4},
        {"W": 8, "N": 256, "H": 16, "D": 72, "fill": 0.5, "bias": (1, 16), "segments": 0},
        {"W": 8, "N": 256, "H": 8, "D": 128, "fill": None, "bias": (1, 1), "segments": 0},
        {"W": 70_000, "N": 4, "H": 1, "D": 16, "fill": 0.5, "bias": (1, 1), "segments": 0},
    ]
    small = {"W": 3, "N": 4, "H": 2, "D": 16, "fill": 0.6, "bias": (1, 2), "segments": 1}

    def random_shape(self, rng: random.Random) -> Shape:
        heads = rng.randint(1, 3)
        return {
            "W": rng.randint(1, 5),
            "N": rng.choice((4, 9, 16, 25, 36)),
            "H": heads,
            "D": rng.choice((16, 24, 40, 72)),
            "fill": rng.choice((None, 0.2, 0.7, 1.0)),
            "bias": rng.choice((None, (1, heads), (2, 1), (3, heads))),
            "segments": rng.choice((0, 0, 1, 2)),
        }

    def parts(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> tuple[torch.Tensor, Call]:
        """The three projections as one tensor, and the other arguments."""
        windows, n, heads, width = (shape[key] for key in ("W", "N", "H", "D"))
        slots = None if shape["fill"] is None else slots_of(windows, n, shape["fill"], rng)
        rows = (windows, n) if slots is None else (int((slots >= 0).sum()) + 3,)
        qkv = torch.randn(*rows, 3, heads, width, generator=rng, dtype=torch.float64).to(dtype)
        call: Call = {"bias": None, "slots": slots, "segment_ids": None}
        if shape["bias"]:
            call["bias"] = torch.randn(*shape["bias"], n, n, generator=rng, dtype=torch.float64).to(dtype)
        if shape["segments"]:
            call["segment_ids"] = torch.randint(0, 2, (shape["segments"], n), generator=rng)
        return qkv, call


class TestWindowAttention(WindowSuite):
    op = "window_attention"
    gradients = ("q", "k", "v", "bias")
    cpp_mutations = "window_attention.cpp", CPP_MUTATIONS
    # Packed, dense with segments, and more positions than are taken as queries at a time.
    cpp_shapes = [WindowSuite.corners[i] for i in (2, 4, 9)]

    def build(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> Call:
        qkv, call = self.parts(shape, dtype, rng)
        q, k, v = qkv.unbind(-3)
        return {"q": q, "k": k, "v": v, **call}


class TestWindowAttentionQKVPacked(WindowSuite):
    op = "window_attention_qkvpacked"
    gradients = ("qkv", "bias")
    corners = WindowSuite.corners[1:5]
    small = BLOCKWISE  # the kernels by blocks go through the tests of the contract
    mutations = [
        Mutation(name, FILE, old, new, ({"W": 5, "N": 4, "H": 2, "D": 16, "fill": 1.0, "bias": (1, 2), "segments": 0},))
        for name, old, new in (
            ("broken mask", "(o_local[:, None] == o_local[None, :]) & m_tile", "(o_local[:, None] >= 0) & m_tile"),
            (
                "wrong bias index",
                "(o_position * call.bias.stride_key)[None, :]",
                "(o_position * call.bias.stride_query)[None, :]",
            ),
            ("missing row", "m_tile = (o_repeat < REPEATS)", "m_tile = (o_tile > 0) & (o_repeat < REPEATS)"),
            ("no delta", "b_ds -= b_p * tl.sum(b_ds, 1)[:, None]", "b_ds -= b_p * 0.0"),
        )
    ] + [
        Mutation(name, "kernels/window_attention_blocks.py", old, new, (BLOCKWISE,))
        for name, old, new in (
            ("missing row of a block", "m_row = o_row < length", "m_row = o_row + 1 < length"),
            (
                "positions not kept",
                "positions + o_place, o_position, mask",
                "positions + o_place, o_position * 0, mask",
            ),
            ("no delta in a block", "PRECISION) - b_delta[None, :])", "PRECISION) - b_delta[None, :] * 0)"),
        )
    ]

    def build(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> Call:
        qkv, call = self.parts(shape, dtype, rng)
        return {"qkv": qkv, **call, "scale": 0.3}
