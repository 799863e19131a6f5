import random
import subprocess
import sys
import textwrap

import pytest
import torch

import d2it.ops
from d2it.ops import reference
from tests import cuda_on_cpu
from tests.kernels.harness import DEVICE, INTERPRETED, ROOT, Call, KernelSuite, Mutation, Shape, lay_out

FILE = "kernels/pack_tokens.py"
ROWS = {
    "row of the source": ("reinterpret_cast<int64_t>(source.data) + «row * source.stride»", "0"),
    "row of the base": ("reinterpret_cast<int64_t>(base.data) + «r * base.stride»", "0"),
    "last byte of a known size": ("std::memcpy(to, from, «kBytes»)", "kBytes - 1"),
    "vector of a row": ("*reinterpret_cast<const Vector*>(from + «i»)", "0"),
    "last byte": ("std::memcpy(to + i, from + i, «bytes - i»)", "bytes - i - 1"),
    "row of a block": ("base.at(«r + i»), kBytes)", "r"),
    "block of zeros": ("std::memset(to + i * kBytes, «0», kBytes)", "64"),
    "first of a block": ("all &= «rows_of[r + i]»", "rows_of[r]"),
    "row of a strided image": ("r / length * batch + «r % length * row»", "0"),
    "channel of a strided row": ("*to++ = first[«c * from.offsets.channel»]", "0"),
}
SOURCES = cuda_on_cpu.Sources({"pack_tokens.cpp": ROWS})
# C: 1 and 5 are narrower than a vector, 12 is what the model's latents have, 72 a tile of 64 and 8, 300 two chunks and
# part of a third; 4 with few tokens has blocks of short rows without any. L = h * w regions of 2 x 2 cells: 31 rows and
# 32 of tail are a tile and one.
CORNERS = [
    {"B": 0, "h": 2, "w": 2, "C": 4, "fine": 0.5, "spare": 3},
    {"B": 2, "h": 2, "w": 2, "C": 0, "fine": 0.5, "spare": 0},
    {"B": 2, "h": 2, "w": 4, "C": 1, "fine": 0.5, "spare": 1},
    {"B": 1, "h": 4, "w": 4, "C": 5, "fine": 0.0, "spare": 0},
    {"B": 3, "h": 2, "w": 4, "C": 12, "fine": 0.0, "spare": 9},
    {"B": 3, "h": 4, "w": 2, "C": 72, "fine": 1.0, "spare": 0},
    {"B": 2, "h": 6, "w": 4, "C": 300, "fine": 0.5, "spare": 33},
    {"B": 3, "h": 6, "w": 6, "C": 4, "fine": 0.2, "spare": 11},
    {"B": 1, "h": 6, "w": 6, "C": 2, "fine": 0.9, "spare": 0},
    {"B": 3, "h": 6, "w": 6, "C": 4, "fine": 0.2, "spare": 0},
]
GPU_CORNERS = [
    {"B": 32, "h": 16, "w": 16, "C": channels, "fine": 0.5, "spare": 500} for channels in (4, 12, 384, 768, 1152)
]


class Packing(KernelSuite):
    corners = CORNERS
    gpu_corners = GPU_CORNERS
    small = {"B": 2, "h": 2, "w": 4, "C": 6, "fine": 0.5, "spare": 3}

    def random_shape(self, rng: random.Random) -> Shape:
        return {
            "B": rng.randint(0, 4),
            "h": 2 * rng.randint(1, 2),
            "w": 2 * rng.randint(1, 3),
            "C": rng.choice((1, 2, 3, 4, 7, 8, 12, 16, 31, 64, 65, 129, 257)),
            "fine": rng.random(),
            "spare": rng.choice((0, 1, 40)),
        }

    def plan(self, shape: Shape, rng: torch.Generator) -> d2it.ops.TokenPlan:
        grains = (torch.rand(shape["B"], shape["h"], shape["w"], generator=rng) < shape["fine"]).long()
        return reference.plan_tokens(grains, capacity=4 * int(grains.sum()) + shape["spare"])


class TestPackTokens(Packing):
    op = "pack_tokens"
    gradients = ("x",)
    mutations = [
        Mutation("row by row number", FILE, "row_offsets(source, b_from)", "row_offsets(source, o_row)"),
        # A shape whose row -1 is memory of the test: what surrounds the arguments is NaN.
        Mutation("row before the first", FILE, "mask=m_tile & m_from, other", "mask=m_tile, other", (CORNERS[4],)),
        Mutation("missing channel", FILE, "tl.expand_dims(o_col < C,", "tl.expand_dims(o_col < C - 1,"),
        Mutation("missing row", FILE, "m_row = o_row < rows", "m_row = o_row < rows - 1"),
    ]

    def build(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> Call:
        plan = self.plan(shape, rng)
        x = torch.randn(shape["B"], 4 * shape["h"] * shape["w"], shape["C"], generator=rng, dtype=torch.float64)
        return {"x": x.to(dtype), "plan": plan}


class TestUnpackTokens(Packing):
    op = "unpack_tokens"
    gradients = ("packed", "base")
    cpp_mutations = "pack_tokens.cpp", ROWS
    corners = [{**shape, "base": i % 3 > 0} for i, shape in enumerate(CORNERS)]
    gpu_corners = [{**shape, "base": True} for shape in GPU_CORNERS]
    small = {**Packing.small, "base": True}
    mutations = [
        Mutation("base everywhere", FILE, "tl.where(m_from, b_out, b_base)", "b_out + b_base + 1"),
        Mutation("base where rows are", FILE, "mask=m_tile & (m_from == 0), other", "mask=m_tile & m_from, other"),
        Mutation("gradient of the base", FILE, "(tape, inverse, packed,", "(tape, inverse + (packed is None), packed,"),
    ]

    def random_shape(self, rng: random.Random) -> Shape:
        return {**super().random_shape(rng), "base": rng.random() < 0.7}

    def build(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> Call:
        plan = self.plan(shape, rng)
        packed = torch.randn(plan.capacity, shape["C"], generator=rng, dtype=torch.float64)
        size = (shape["B"], 4 * shape["h"] * shape["w"], shape["C"])
        base = torch.randn(size, generator=rng, dtype=torch.float64).to(dtype) if shape["base"] else None
        return {"packed": packed.to(dtype), "plan": plan, "base": base}

    def test_packing_and_merging_are_exact(self, backend):
        """Copies: every bit of every value, NaN and infinity too."""
        plan = self.plan(self.corners[6], torch.Generator().manual_seed(1)).to(DEVICE)
        bits = torch.randint(-(2**31), 2**31 - 1, (2, 96, 20), dtype=torch.int32).to(DEVICE)
        x, base = bits.view(torch.float32), bits.flip(1).view(torch.float32)
        merged = d2it.ops.unpack_tokens(d2it.ops.pack_tokens(x, plan, backend=backend), plan, base, backend=backend)
        fine = plan.inverse.reshape(2, 96, 1) >= 0
        assert torch.equal(merged.view(torch.int32), torch.where(fine, bits, bits.flip(1)))

    def test_only_the_gradients_that_are_wanted(self, backend):
        plan = self.plan(self.small, torch.Generator().manual_seed(1)).to(DEVICE)
        packed = torch.randn(plan.capacity, 3, device=DEVICE)
        base = torch.randn(2, 32, 3, device=DEVICE, requires_grad=True)
        out = d2it.ops.unpack_tokens(packed, plan, base, backend=backend)
        cotangent = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, base, cotangent)
        assert torch.equal(grad, torch.where(plan.inverse.reshape(2, 32, 1) >= 0, 0, cotangent))


@pytest.mark.skipif(not INTERPRETED, reason="the launcher asserts on a GPU")
def test_rows_that_do_not_exist_are_not_read():
    """Below the check, what a GPU leaves behind until the assertion is seen: nothing of foreign memory."""
    from d2it.kernels import pack_tokens

    x = lay_out(torch.ones(1, 4, 3), "plain")  # NaN all around
    index = torch.tensor([2, 4, 5, -1, 2**31 - 1], dtype=torch.int32)
    got = pack_tokens.pack_tokens_forward(x, index, index)
    assert torch.equal(got, torch.tensor([1.0, 0, 0, 0, 0])[:, None].expand(5, 3))
    base = torch.full((1, 5, 3), 2.0)
    got = pack_tokens.unpack_tokens_forward(x[0], base, index, index, 1, 5)
    assert torch.equal(got[0], torch.tensor([1.0, 2, 2, 2, 2])[:, None].expand(5, 3))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_rows_that_do_not_exist_are_asserted_on_the_device():
    code = """
        import torch, d2it.ops
        plan = d2it.ops.plan_tokens(torch.ones(1, 2, 2, dtype=torch.int64, device="cuda"))
        plan.index[3] = 16
        d2it.ops.pack_tokens(torch.ones(1, 16, 8, device="cuda"), plan, backend="triton")
        torch.cuda.synchronize()
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode != 0
    assert "plan must contain only rows that exist" in run.stderr + run.stdout


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda x, plan: (x[:, :15], plan), ValueError, "x must have the plan's 2 images of 16 cells"),
        (lambda x, plan: (x.long(), plan), TypeError, "x must be a floating-point tensor"),
        (lambda x, plan: (x.to("meta"), plan), ValueError, "x must have the device of plan"),
    ],
)
def test_bad_input_names_the_argument(change, error, match):
    plan = d2it.ops.plan_tokens(torch.ones(2, 2, 2, dtype=torch.int64))
    with pytest.raises(error, match=match):
        d2it.ops.pack_tokens(*change(torch.zeros(2, 16, 3), plan))
