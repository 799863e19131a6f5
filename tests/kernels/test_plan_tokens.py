import random
import subprocess
import sys
import textwrap

import pytest
import torch

import d2it.ops
from d2it.ops import reference
from tests import cuda_on_cpu
from tests.kernels.harness import DEVICE, INTERPRETED, ROOT, Call, KernelSuite, Mutation, Shape, tensors_in

FILE = "kernels/plan_tokens.py"
CPP_MUTATIONS = {
    "coarser grains too": ("wanted[x] = «grain >= min_grain»", "grain > min_grain"),
    "first row of an image": ("const auto start = static_cast<int32_t>(«first»)", "0"),
    "row of a window": ("const int64_t cell = b * cells + «(top + y) * columns» + left", "top * columns"),
    "row of regions": ("wanted + «y / side» * regions", "top / side"),
    "row of a code": ("starts[layout + «y % side»]", "0"),
    "size of a code": ("add(«code_sizes[grain]»)", "1"),
    "layout of a grain": ("(«grain - min_grain + 1», 0)", "grain - min_grain"),
    "image of a row": ("sample + last, static_cast<int32_t>(«b»))", "0"),
    "cell without a token": ("*slot++ = «row | (one - 1)»", "row"),
    "rows past the count": ("std::fill(ints(index) + total, ints(index) + capacity, «-1»)", "0"),
}
SOURCES = cuda_on_cpu.Sources({"plan_tokens.cpp": CPP_MUTATIONS})
WRONG_MAPS = [
    (1, 63, None, "capacity must hold"),
    (-1, 64, None, "grain_map must have no value below 0"),
    (0, 14, (2, 1), "capacity must hold"),
    (2, 64, (2, 1), "grain_map must have no value"),
]


class TestPlanTokens(KernelSuite):
    op = "plan_tokens"
    cpp_mutations = "plan_tokens.cpp", CPP_MUTATIONS
    # Regions (h, w) of s x s cells, windows of w x w cells that may cut through regions, a share of fine regions,
    # rows to spare. 1,025 images of one cell are a block and one.
    corners = [
        {"B": 0, "h": 2, "w": 2, "s": 2, "window": 2, "fine": 0.5, "spare": 5},
        {"B": 1, "h": 1, "w": 1, "s": 1, "window": 1, "fine": 1.0, "spare": 0},
        {"B": 2, "h": 3, "w": 6, "s": 2, "window": 3, "fine": 0.5, "spare": 7},
        {"B": 3, "h": 4, "w": 2, "s": 2, "window": 4, "fine": 0.0, "spare": 0},
        {"B": 3, "h": 4, "w": 2, "s": 2, "window": 4, "fine": 1.0, "spare": 0},
        {"B": 1025, "h": 1, "w": 1, "s": 1, "window": 1, "fine": 0.5, "spare": 1},
        {"B": 2, "h": 7, "w": 14, "s": 4, "window": 7, "fine": 0.5, "spare": 3000},
        # Codes of 4, 2 and 1 cells, of unequal factors, that windows cut through, one grain, and no token at all.
        {"B": 3, "h": 2, "w": 4, "s": 4, "window": 8, "fine": 0.4, "spare": 5, "sizes": (4, 2, 1)},
        {"B": 2, "h": 1, "w": 2, "s": 8, "window": 4, "fine": 0.4, "spare": 0, "sizes": (8, 2, 1)},
        {"B": 2, "h": 3, "w": 3, "s": 4, "window": 3, "fine": 0.4, "spare": 9, "sizes": (4, 2, 1), "min_grain": 0},
        {"B": 1, "h": 2, "w": 1, "s": 2, "window": 2, "fine": 1.0, "spare": 0, "sizes": (2,), "min_grain": 0},
        {"B": 2, "h": 2, "w": 2, "s": 2, "window": 2, "fine": 1.0, "spare": 3, "sizes": (2, 1), "min_grain": 2},
    ]
    gpu_corners = [
        {"B": 256, "h": 16, "w": 16, "s": 2, "window": 16, "fine": 0.5, "spare": 1000},
        {"B": 1500, "h": 16, "w": 16, "s": 2, "window": 4, "fine": 0.3, "spare": 17},
        {"B": 256, "h": 8, "w": 8, "s": 4, "window": 16, "fine": 0.25, "spare": 17, "sizes": (4, 2, 1)},
    ]
    small = {"B": 2, "h": 2, "w": 4, "s": 2, "window": 2, "fine": 0.5, "spare": 3, "sizes": (2, 1), "min_grain": 0}
    mutations = [
        Mutation("rows of the chunk before", FILE, "o_chunk < i_chunk", "o_chunk <= i_chunk"),
        Mutation("inclusive row", FILE, "tl.cumsum(b_token, 0) - 1", "tl.cumsum(b_token, 0)"),
        Mutation(
            "window across the image",
            FILE,
            "(o_window % grains.windows_across) * WINDOW",
            "(o_window // grains.windows_across) * WINDOW",
        ),
        Mutation("columns of regions", FILE, "(o_x // grains.REGION)", "(o_x // WINDOW)"),
        Mutation("missing tail", FILE, "o_position >= i_total", "o_position > i_total"),
        Mutation("image of the tail", FILE, "max(batch - 1, 0)", "max(batch - 2, 0)"),
        Mutation("coarsest grain", FILE, "m_position & (b_grain >=", "m_position & (b_grain >"),
        Mutation("every row of a code", FILE, "(o_y % grains.CODE_SIZES[i_grain] == 0) & ", ""),
        Mutation("every column of a code", FILE, " & (o_x % grains.CODE_SIZES[i_grain] == 0)", ""),
        Mutation("size of another grain", FILE, "o_y % grains.CODE_SIZES[i_grain]", "o_y % grains.CODE_SIZES[0]"),
        Mutation("the finest codes alone", FILE, "m_first |=", "m_first ="),
    ]

    def random_shape(self, rng: random.Random) -> Shape:
        window, s = rng.choice((1, 2, 3, 4, 5)), rng.choice((1, 2, 3, 4))
        # The smallest count of regions whose cells are whole windows.
        step = next(n for n in range(1, window + 1) if n * s % window == 0)
        return {
            "B": rng.randint(0, 5),
            "h": step * rng.randint(1, 3),
            "w": step * rng.randint(1, 3),
            "s": s,
            "window": window,
            "fine": rng.random(),
            "spare": rng.choice((0, 1, 37)),
            "sizes": rng.choice((None, tuple(size for size in (4, 3, 2, 1) if s % size == 0))),
            "min_grain": rng.randint(0, 2),
        }

    def build(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> Call:
        # Without code sizes three grains, of which the finest alone has tokens.
        sizes = shape.get("sizes")
        finest = len(sizes) - 1 if sizes else 2
        min_grain = shape.get("min_grain", 1 if sizes else 2)
        size = (shape["B"], shape["h"], shape["w"])
        fine = torch.rand(size, generator=rng) < shape["fine"]
        grains = torch.where(fine, finest, torch.randint(0, max(finest, 1), size, generator=rng))
        tokens = [(shape["s"] // cells) ** 2 for cells in sizes or (1, 1, 1)]
        rows = sum(int((grains == grain).sum()) * n for grain, n in enumerate(tokens) if grain >= min_grain)
        return {
            "grain_map": grains,
            "cells_per_region": shape["s"],
            "window": shape["window"],
            "min_grain": min_grain,
            "capacity": rows + shape["spare"],
            "code_sizes": sizes,
        }

    @pytest.mark.skipif(not INTERPRETED, reason="the GPU runs the batches that need more than one block a chunk")
    def test_chunks_of_several_blocks(self, monkeypatch):
        from d2it.kernels import plan_tokens

        monkeypatch.setattr(plan_tokens, "BLOCK", 16)
        monkeypatch.setattr(plan_tokens, "MAX_CHUNKS", 3)
        self.check(self.corners[2], "triton", torch.float32, "transposed")

    def test_no_capacity_is_room_for_every_cell(self, backend):
        grains = torch.ones(2, 2, 2, dtype=torch.int64, device=DEVICE)
        plan = d2it.ops.plan_tokens(grains, backend=backend)
        assert plan.capacity == plan.count == 2 * 16
        want = reference.plan_tokens(grains)
        assert all(torch.equal(a, b) for a, b in zip(tensors_in(plan), tensors_in(want)))

    @pytest.mark.skipif(not INTERPRETED, reason="on a GPU a device-side assertion")
    @pytest.mark.parametrize(("grain", "capacity", "sizes", "match"), WRONG_MAPS)
    def test_what_the_maps_hold_is_checked(self, backend, grain, capacity, sizes, match):
        grains = torch.ones(1, 4, 4, dtype=torch.int64)
        grains[0, 1, 1] = grain
        with pytest.raises(ValueError, match=match):
            d2it.ops.plan_tokens(grains, capacity=capacity, code_sizes=sizes, backend=backend)

    @pytest.mark.skipif(not INTERPRETED, reason="the launcher asserts on a GPU")
    @pytest.mark.parametrize("capacity", [0, 1, 31])
    def test_rows_past_the_capacity_are_left_out(self, capacity):
        """Below the check, what a GPU leaves behind until the assertion is seen: nothing outside the buffers."""
        from d2it.kernels import plan_tokens

        grains = torch.ones(2, 2, 2, dtype=torch.int64)
        got = plan_tokens.plan_tokens_forward(grains, 2, 2, 1, capacity)
        want = reference.plan_tokens(grains, window=2, capacity=capacity)
        assert all(torch.equal(a, b) for a, b in zip(got, tensors_in(want)))

    @pytest.mark.gpu
    @pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
    @pytest.mark.parametrize(("grain", "capacity", "sizes", "match"), WRONG_MAPS)
    def test_what_the_maps_hold_is_asserted_on_the_device(self, backend, grain, capacity, sizes, match):
        code = f"""
            import torch, d2it.ops
            grains = torch.ones(1, 4, 4, dtype=torch.int64)
            grains[0, 1, 1] = {grain}
            d2it.ops.plan_tokens(grains.cuda(), capacity={capacity}, code_sizes={sizes}, backend={backend!r})
            torch.cuda.synchronize()
        """
        run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
        assert run.returncode != 0
        assert match in run.stderr + run.stdout
