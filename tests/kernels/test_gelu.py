import random

import pytest
import torch

import d2it.ops
from d2it.ops import reference
from tests import cuda_on_cpu
from tests.kernels.harness import DEVICE, Call, KernelSuite, Mutation, Shape

FILE = "kernels/gelu.py"
ROWS = "kernels/modulate_rows.py"
CPP = {
    "another cubic": ("2 * root * (x + «cubic» * x * x * x)", "0.04f"),
    "both halves alike": ("out = x * (twice < 0 ? «e * per» : per)", "per"),
    "no derivative of the sigmoid": ("«(e * per * per)» * (2 * root", "(0 * e)"),
    "derivative of the cubic": ("(1 + «3» * cubic * x * x)", "2"),
    "the sum of one row": ("store(sums + i, «load(sums + i, lanes) + d», lanes)", "d"),
    "blocks in one place": ("sums.data() + «r / kBlock * channels»", "0"),
    "a channel's neighbour": ("sum[«i % channels»] += sums[i]", "0"),
    "last lanes": ("if («i < n») work(i, static_cast<int>(n - i))", "false"),
    "the gradient's row for that of x": ("from.read(r, «second»)", "first"),
    "a row is not stored": ("«to.store(r, line)»;\n      if", "void()"),
}
SOURCES = cuda_on_cpu.Sources({"gelu.cpp": CPP})
MANY = {"rows": (300,), "C": 5}  # blocks of 32, of fewer rows than a tile
CORNERS = [
    {"rows": (0,), "C": 8},
    {"rows": (3,), "C": 0},
    {"rows": (2, 0), "C": 8},
    {"rows": (1,), "C": 1},
    {"rows": (17,), "C": 31},
    {"rows": (3, 43), "C": 257},
    {"rows": (2, 65), "C": 16},
    {"rows": (127,), "C": 9},
    MANY,
]


class TestGelu(KernelSuite):
    op = "gelu"
    gradients = ("x", "bias")
    corners = CORNERS
    gpu_corners = [{"rows": (32, 256), "C": channels} for channels in (1536, 4096, 4608)]
    small = {"rows": (3, 5), "C": 6}
    cpp_mutations = "gelu.cpp", CPP
    mutations = [
        Mutation("another cubic", FILE, "0.10294324", "0.1"),
        Mutation("the other half", FILE, "tl.exp2(-b_x * (", "tl.exp2(b_x * ("),
        Mutation("no derivative of the sigmoid", FILE, "b_slope = b_s * (", "b_slope = 0.0 * ("),
        Mutation("derivative of the cubic", FILE, "0.21406445 *", "0.2 *"),
        Mutation("missing channel", FILE, "m_col = o_col < C", "m_col = o_col < C - 1"),
        Mutation("missing row", FILE, "m_tile = (o_row < x.rows)", "m_tile = (o_row < x.rows - 1)"),
        Mutation("last row of a block", FILE, "m_tile = (o_row < i_stop)", "m_tile = (o_row < i_stop - 1)"),
        Mutation("one row in the sum", FILE, "b_sum += b_dx", "b_sum = b_dx"),
        Mutation("a block's place", FILE, "partials + i_block.to(tl.int64) * C + o_col", "partials + o_col", (MANY,)),
        Mutation("the first block alone", ROWS, "b_sum += tl.load(p_block,", "b_sum += 0 * tl.load(p_block,"),
        Mutation(
            "blocks past the last", ROWS, "(o_block < blocks)[:, None] & m_col", "(o_block >= 0)[:, None] & m_col"
        ),
    ]

    def random_shape(self, rng: random.Random) -> Shape:
        rows = rng.choice(((rng.randint(0, 300),), (rng.randint(1, 4), rng.randint(0, 80))))
        return {"rows": rows, "C": rng.choice((1, 2, 7, 16, 31, 64, 129, 384))}

    def build(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> Call:
        x = 2 * torch.randn(*shape["rows"], shape["C"], generator=rng, dtype=torch.float64)
        bias = torch.randn(shape["C"], generator=rng, dtype=torch.float64).float()
        return {"x": x.to(dtype), "bias": bias}

    def test_reference_gradcheck(self) -> None:
        """As callers have it: the layer before adds the bias without its gradient."""
        rng = torch.Generator().manual_seed(0)
        x, bias = (torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in ((9, 6), (6,)))
        assert torch.autograd.gradcheck(lambda x, bias: reference.gelu(x + bias.detach(), bias), (x, bias))

    def test_without_a_bias_or_without_its_gradient(self, backend: str) -> None:
        """The same bits, and no gradient where none is asked for."""
        x, bias, grad = (torch.randn(*shape, device=DEVICE) for shape in ((4, 9, 24), (24,), (4, 9, 24)))
        found = []
        for given in (None, bias, bias.clone().requires_grad_()):
            leaf = x.clone().requires_grad_()
            out = d2it.ops.gelu(leaf, given, backend=backend)
            out.backward(grad)
            found += [out.detach(), leaf.grad]
            assert given is None or (given.grad is not None) == given.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(found[:2] * 2, found[2:]))

    @pytest.mark.filterwarnings("ignore:overflow")  # of an exponential, in the interpreter
    def test_far_from_zero(self, backend: str) -> None:
        """There it is 0 or x, the slope 0 or 1, and what is no number stays where it is."""
        x = torch.tensor([[-1e4, -40.0, -12.0, 0.0, 12.0, 40.0, 1e4], [float("nan"), *6 * [1.0]]], device=DEVICE)
        x.requires_grad_()
        out = d2it.ops.gelu(x, backend=backend)
        torch.testing.assert_close(out[0], x[0].clamp(min=0))
        out.backward(torch.ones_like(out))
        torch.testing.assert_close(x.grad[0], torch.tensor([0, 0, 0, 0.5, 1, 1, 1], device=DEVICE))
        for result in (out, x.grad):
            assert result.isnan().nonzero().tolist() == [[1, 0]]

    def test_a_bias_of_another_dtype(self, backend: str) -> None:
        """Its gradient is summed in float32 and rounded once to its dtype."""
        x, grad = torch.randn(2, 300, 16, device=DEVICE)
        bias = torch.zeros(16, dtype=torch.float16, device=DEVICE, requires_grad=True)
        if d2it.ops.why_not("gelu", backend, x, bias):
            pytest.skip("takes one dtype")
        d2it.ops.gelu(x, bias, backend=backend).backward(grad)
        wide = bias.detach().double().requires_grad_()
        d2it.ops.gelu(x.double(), wide, backend="reference").backward(grad.double())
        assert bias.grad.dtype == torch.float16
        torch.testing.assert_close(bias.grad.double(), wide.grad, rtol=1e-3, atol=1e-3)
