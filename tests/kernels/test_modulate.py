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

FILE = "kernels/modulate.py"
GATE = "kernels/modulate_gate.py"
ROWS = "kernels/modulate_rows.py"
# The last three are of cpu.h.
NORMS = {
    "biased variance": ("sum(n, squared) / «n» + eps", "(n + 1)"),
    "plain scale": ("m.per_deviation * («1.0f + scale[i]») + shift[i]", "scale[i]"),
    "statistics of another row": ("line, moments + «2 * r», channels)", "0"),
    "another mean": ("stats[0] = «m.mean»", "0.0f"),
    "parameters of another image": ("modulate(from.read(r, room.data()), shift_of.of(«image»)", "0"),
    "scale in dshift": ("dshift[i] += «grad[i]»", "grad[i] * y"),
    "no mean in dx": ("dx[i] = (g[i] - «mean_g» -", "0.0f"),
    "no dot in dx": ("- dx[i] * «mean_gy»)", "0.0f"),
    "last lanes": ("for (; «i < n»; ++i) total +=", "false"),
    "one part of a sum": ("const V all = («parts[0] + parts[1]») +", "parts[0]"),
    "run of another image": ("runs.empty() || «runs.back().image != image»", "false"),
    "line of the other sum": ("run.sums.data() + «line * channels_», floats_of(to) + run", "0"),
    "image of a row": ("of_.empty() ? «row / length_»", "0"),
    "stride of the images": ("r * row : «r / length * batch» + r % length * row", "r / length * length * row"),
    "stride of the channels": ("to_float(«in[i * stride]»)", "in[i]"),
    "half without its sign": ("const uint32_t sign = «static_cast<uint32_t>(v.bits & 0x8000) << 16»", "0u"),
    "exponent of a stored half": ("(magnitude - («112u» << 23) + 0xfff", "111u"),
    "bits of a bfloat16": ("static_cast<uint32_t>(v.bits) << «16»", "15"),
}
GATES = {
    "gate on the residual": ("out[i] = «x[i] + gate[i] * branch[i]»", "gate[i] * x[i] + branch[i]"),
    "no gate in dbranch": ("dbranch[i] = «grad[i] * gate[i]»", "grad[i]"),
    "no gate in dbias": ("if (bias) add(«line», sums + channels, channels)", "grads.read(r, room.data())"),
    "dbias of one image": ("run.sums.data() + «line * channels_», floats_of(to), channels_)", "0"),
    "branch missing in dgate": ("dgate[i] += «grad[i] * branch[i]»", "grad[i]"),
}
FUSED = {
    "total not rounded": ("«totals.read(r, room.data())»; // as it was rounded", "line"),
    "gradient of the total": ("«add(grads_total.read(r, first), line, channels)»;", "void()"),
    "gate of another image": ("branches.read(r, second), gate_of.of(«image»), line_branch", "0"),
    "sum of the scale": ("runs.add_up(«2», dgate)", "1"),
    "no gate in the fused dbias": ("if (bias) add(«line_branch», sums + 3 * channels", "line"),
    "sum of the gate for dbias": ("runs.add_up_all(«3», dbias)", "2"),
}
SOURCES = cuda_on_cpu.Sources({"modulate.cpp": {**NORMS, **GATES, **FUSED}})
# order: images by (B, L); rows in order of their images, as a plan's; rows in any order; most images without rows.
# C: 1 and 5 are narrower than a vector, 72 pads half a warp, 257 three chunks and one. Blocks are 16 rows: L = 17 puts
# a run across two blocks, L = 3 five images into one.
PLAN = {"B": 3, "L": 17, "C": 5, "order": "plan"}
ANY = {"B": 3, "L": 9, "C": 5, "order": "any"}
LONG = {"B": 2, "L": 70, "C": 9, "order": "images"}  # more than the 64 rows of a block in C++
HALVES = {"B": 4, "L": 8, "C": 72, "order": "halves"}  # in order inside each block of rows, not from one to the next
WIDE = {"B": 2, "L": 1, "C": 4100, "order": "plan"}  # its branch and the total's gradient are read late
CORNERS = [
    {"B": 0, "L": 3, "C": 8, "order": "images"},
    {"B": 2, "L": 0, "C": 8, "order": "images"},
    {"B": 2, "L": 3, "C": 0, "order": "images"},
    {"B": 1, "L": 1, "C": 1, "order": "images"},
    {"B": 3, "L": 17, "C": 5, "order": "images"},
    {"B": 7, "L": 3, "C": 72, "order": "images"},
    {"B": 2, "L": 17, "C": 257, "order": "images"},
    LONG,
    {"B": 2, "L": 0, "C": 8, "order": "plan"},
    PLAN,
    {"B": 9, "L": 3, "C": 72, "order": "gaps"},
    ANY,
    {"B": 2, "L": 5, "C": 1152, "order": "any"},
    HALVES,
]
GPU_CORNERS = [
    {"B": 32, "L": 256, "C": channels, "order": order}
    for channels in (384, 768, 1024, 1152, 4096)
    for order in ("images", "plan", "any")
]


class Modulation(KernelSuite):
    corners = CORNERS
    gpu_corners = GPU_CORNERS
    small = {"B": 3, "L": 5, "C": 6, "order": "plan"}

    def random_shape(self, rng: random.Random) -> Shape:
        return {
            "B": rng.randint(1, 6),
            "L": rng.randint(0, 20),
            "C": rng.choice((1, 2, 3, 7, 8, 16, 31, 64, 65, 129, 384)),
            "order": rng.choice(("images", "plan", "gaps", "any")),
        }

    def parts(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator, rows: int, parameters: int):
        """`rows` tensors of rows, `parameters` slices of one projection in float32, and sample."""
        batch, length, channels = shape["B"], shape["L"], shape["C"]
        size = (batch, length) if shape["order"] == "images" else (batch * length,)
        tensors = [torch.randn(*size, channels, generator=rng, dtype=torch.float64) for _ in range(rows)]
        projection = torch.randn(batch, parameters, channels, generator=rng, dtype=torch.float64).float()
        if shape["order"] == "images":
            sample = None
        elif shape["order"] == "gaps":
            first = batch * length // 3
            sample = torch.tensor([batch // 3, batch // 2]).repeat_interleave(
                torch.tensor([first, batch * length - first])
            )
            sample = sample.int()
        elif shape["order"] == "halves":
            sample = torch.arange(batch).repeat_interleave(length // 2).repeat(2).int()
        else:
            sample = torch.randint(0, batch, size, generator=rng)
            sample = sample if shape["order"] == "any" else sample.sort().values.int()
        return [t.to(dtype) for t in tensors], projection.unbind(1), sample


def bias_of(shape: Shape, rng: torch.Generator) -> torch.Tensor:
    """(C,) float32."""
    return torch.randn(shape["C"], generator=rng, dtype=torch.float64).float()


def check_reference_with_bias(function, count: int) -> None:
    """The gradients of `count` arguments and of the bias, as callers have it: the layer that made the branch added the
    bias without its gradient."""
    sample = torch.tensor([0, 0, 1, 1, 1])
    given = [torch.randn(5, 6, dtype=torch.float64) for _ in range(2)]
    given += [torch.randn(2, 6, dtype=torch.float64) for _ in range(count - 2)]
    leaves = [t.requires_grad_() for t in (*given, torch.randn(6, dtype=torch.float64))]

    def called(x, branch, *rest):
        *parameters, bias = rest
        return function(x, branch + bias.detach(), *parameters, bias=bias, sample=sample)

    assert torch.autograd.gradcheck(called, leaves)


class TestAdalnModulate(Modulation):
    op = "adaln_modulate"
    gradients = ("x", "shift", "scale")
    cpp_mutations = "modulate.cpp", NORMS
    mutations = [
        Mutation("plain scale", FILE, "b_normed[i] * (1.0 + b_scale) + b_shift", "b_normed[i] * b_scale + b_shift"),
        Mutation("biased variance", FILE, "tl.sum(b_sum, 1) / C + eps", "tl.sum(b_sum, 1) / (C + 1) + eps"),
        Mutation("mean over padding", FILE, "if (i + 1) * CHUNK > C:", "if False:"),
        Mutation("scale in dshift", FILE, "+ b_grad * b_weight[:, None],)", "+ b_grad * b_normed,)"),
        Mutation("last row again in dshift", FILE, "+ b_grad * b_weight[:, None],)", "+ b_grad,)"),
        Mutation("last row again in dscale", FILE, "b_rstd *= b_weight", "b_rstd *= 1.0"),
        Mutation("no dot in dx", FILE, "b_rstd * b_rstd * (b_dot / -C)", "0.0 * b_dot"),
        Mutation("run of the image before", ROWS, "& ((b_image <= i_image) |", "& ((b_image < i_image) |"),
        Mutation("last run", ROWS, "i_image_last = i_last // length", "i_image_last = i_first // length"),
        Mutation("order unnoticed", ROWS, "tl.where(ordered, i_image, -1)", "i_image", (ANY,)),
        Mutation("order across blocks", ROWS, "mask=o_row + 1 < rows", "mask=o_row < i_last", (HALVES,)),
        Mutation(
            "statistics of another row",
            FILE,
            "stats + o_row.to(tl.int64) * 2 + 1",
            "stats + o_row.to(tl.int64) * 0 + 1",
        ),
        Mutation(
            "last block", ROWS, "i_end += tl.sum((b_from <= i_image)", "i_end += tl.sum((b_from < i_image)", (PLAN,)
        ),
    ]

    def build(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> Call:
        (x,), (shift, scale), sample = self.parts(shape, dtype, rng, 1, 2)
        return {"x": x, "shift": shift, "scale": scale, "sample": sample}

    def test_large_mean_keeps_its_variance(self, backend):
        """Two passes over the row, not E[x^2] - E[x]^2."""
        x = 1000 + torch.randn(2, 9, 96, generator=torch.Generator().manual_seed(0))
        zero = torch.zeros(2, 96, device=DEVICE)
        got = d2it.ops.adaln_modulate(x.to(DEVICE), zero, zero, backend=backend)
        want = reference.adaln_modulate(x.double(), zero.double().cpu(), zero.double().cpu())
        assert (got.cpu() - want).abs().max() < 1e-3

    def test_eps_is_used(self, backend):
        x = torch.randn(1, 3, 40, device=DEVICE) * 0.01
        zero = torch.zeros(1, 40, device=DEVICE)
        got = d2it.ops.adaln_modulate(x, zero, zero, eps=0.5, backend=backend)
        torch.testing.assert_close(got, reference.adaln_modulate(x, zero, zero, eps=0.5))


class TestGatedResidual(Modulation):
    op = "gated_residual"
    gradients = ("x", "branch", "gate", "bias")
    cpp_mutations = "modulate.cpp", GATES
    mutations = [
        Mutation("gate on the residual", GATE, "b_x + b_gate * b_branch", "b_gate * b_x + b_branch"),
        Mutation("no gate in dbranch", GATE, "b_dbranch = b_grad * b_gate", "b_dbranch = b_grad"),
        Mutation("no gate in dbias", GATE, "b_bias_sum += b_dbranch", "b_bias_sum += b_grad"),
        Mutation("a block's place in dbias", GATE, "runs.bias + i_block.to(tl.int64) * C", "runs.bias", (LONG,)),
        Mutation("branch missing in dgate", GATE, "b_sum += b_grad * b_branch", "b_sum += b_grad"),
        Mutation(
            "missing channel", ROWS, "element_ty), mask=m_tile)", "element_ty), mask=m_tile & (o_col < C - 1)[None, :])"
        ),
        Mutation(
            "missing row",
            GATE,
            "o_row < i_first + i_end\n            m_tile",
            "o_row < i_first + i_end - 1\n            m_tile",
        ),
        Mutation("blocks of the next image", ROWS, "(i_block + o_place + i_image)", "(i_block + o_place)"),
        Mutation("last block of an image", ROWS, "// runs.BLOCK_ROWS + 1, 0)", "// runs.BLOCK_ROWS, 0)"),
    ]

    def build(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> Call:
        (x, branch), (gate,), sample = self.parts(shape, dtype, rng, 2, 1)
        return {"x": x, "branch": branch, "gate": gate, "bias": bias_of(shape, rng), "sample": sample}

    def test_reference_gradcheck(self):
        check_reference_with_bias(reference.gated_residual, 3)

    def test_branch_may_have_another_dtype(self, backend):
        x, branch, gate = (torch.randn(2, 5, 24, device=DEVICE).requires_grad_() for _ in range(3))
        gate = gate[:, 0].detach().requires_grad_()
        half = branch.detach().half().requires_grad_()
        out = d2it.ops.gated_residual(x, half, gate, backend=backend)
        want = reference.gated_residual(x, half, gate)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, want)
        cotangent = torch.randn_like(out)
        got = torch.autograd.grad(out, (x, half, gate), cotangent)
        for a, b in zip(got, torch.autograd.grad(want, (x, half, gate), cotangent)):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


class TestGatedResidualModulate(Modulation):
    op = "gated_residual_modulate"
    corners = [*(shape for shape in CORNERS if shape["C"] != 1152), WIDE]
    gpu_corners = [*GPU_CORNERS, {"B": 4, "L": 256, "C": 8192, "order": "images"}]
    gradients = ("x", "branch", "gate", "shift", "scale", "bias")
    cpp_mutations = "modulate.cpp", [name for name in FUSED if name != "total not rounded"]
    mutations = [
        Mutation("no gate", FILE, "b_chunk += load_chunk(gate, o_image, i, C, CHUNK) *", "b_chunk += 1.0 *"),
        Mutation("gradient of the total", FILE, "b_dx += b_total_chunk *", "b_dx -= b_total_chunk *"),
        Mutation("last row again in dgate", FILE, "b_total_chunk * b_weight[:, None]", "b_total_chunk"),
        Mutation("x for the branch", FILE, "b_dx * b_branch_chunk,)", "b_dx * b_x[i],)"),
        Mutation(
            "no gate in dbranch",
            FILE,
            "b_dbranch = b_dx * load_chunk(gate,",
            "b_dbranch = b_dx + 0 * load_chunk(gate,",
        ),
        Mutation("branch of a wide row", FILE, "else load_chunk(branch,", "else load_chunk(x,", (WIDE,)),
        Mutation("sum of the scale", FILE, "partials=runs.partials[:, 2]", "partials=runs.partials[:, 1]"),
        Mutation("sums side by side", FILE, "p_run + 2 * C + o_col", "p_run + C + o_col"),
        Mutation("no gate in dbias", FILE, "(b_bias_sum[i] + b_dbranch,)", "(b_bias_sum[i] + b_dx,)"),
        Mutation("one run in dbias", FILE, "b_bias_sum[i] + b_dbranch", "0.0 * b_bias_sum[i] + b_dbranch"),
        Mutation("dbias of a wide row", FILE, "mask=o_bias < C) + b_dbranch,", "mask=o_bias < C) + b_dx,", (WIDE,)),
        Mutation("dbias of a wide row from 1", FILE, "tl.zeros((1, CHUNK)", "1.0 + tl.zeros((1, CHUNK)", (WIDE,)),
        Mutation("gate out of order", FILE, "dx, branch, sample, dgate)", "grad, branch, sample, dgate)", (ANY,)),
    ]

    def build(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> Call:
        (x, branch), (gate, shift, scale), sample = self.parts(shape, dtype, rng, 2, 3)
        parameters = {"gate": gate, "shift": shift, "scale": scale, "bias": bias_of(shape, rng)}
        return {"x": x, "branch": branch, **parameters, "sample": sample}

    def test_reference_gradcheck(self):
        check_reference_with_bias(reference.gated_residual_modulate, 5)

    def test_the_two_operators_one_after_the_other(self, backend):
        """The same total to the bit, in half precision too: what is modulated is the total as it was rounded."""
        for dtype in (torch.float32, torch.float16):
            x, branch = torch.randn(2, 2, 7, 72, device=DEVICE).to(dtype)
            gate, shift, scale = torch.randn(3, 2, 72, device=DEVICE)
            total, out = d2it.ops.gated_residual_modulate(x, branch, gate, shift, scale, eps=0.1, backend=backend)
            want = d2it.ops.gated_residual(x, branch, gate, backend=backend)
            assert torch.equal(total, want)
            torch.testing.assert_close(
                out, d2it.ops.adaln_modulate(want, shift, scale, eps=0.1, backend=backend), rtol=1e-6, atol=1e-6
            )

    def test_one_of_the_two_gradients(self, backend):
        given = [torch.randn(2, 5, 24, device=DEVICE) for _ in range(2)]
        given = [t.requires_grad_() for t in (*given, *torch.randn(3, 2, 24, device=DEVICE))]
        for i in range(2):
            cotangent = torch.randn(2, 5, 24, device=DEVICE)
            got, want = (
                torch.autograd.grad(f(*given)[i], given, cotangent, allow_unused=True, materialize_grads=True)
                for f in (
                    lambda *a: d2it.ops.gated_residual_modulate(*a, backend=backend),
                    reference.gated_residual_modulate,
                )
            )
            for a, b in zip(got, want):
                torch.testing.assert_close(a, b)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU a device-side assertion")
@pytest.mark.parametrize("backend", d2it.ops.available_backends("adaln_modulate"))
@pytest.mark.parametrize("wrong", [-1, 2])
def test_a_sample_that_names_no_image(backend, wrong):
    x, parameter = torch.randn(3, 8), torch.randn(2, 8)
    sample = torch.tensor([0, wrong, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"sample must name images 0\.\.1"):
        d2it.ops.adaln_modulate(x, parameter, parameter, sample=sample, backend=backend)
    with pytest.raises(ValueError, match=r"sample must name images 0\.\.1"):
        d2it.ops.gated_residual(x, x, parameter, sample=sample, backend=backend)
    with pytest.raises(ValueError, match=r"sample must name images 0\.\.1"):
        d2it.ops.gated_residual_modulate(x, x, *(parameter,) * 3, sample=sample, backend=backend)


@pytest.mark.skipif(not INTERPRETED, reason="the launcher asserts on a GPU")
@pytest.mark.parametrize("wrong", [-1, 2, 2**31 - 1])
def test_an_image_that_does_not_exist_is_not_read(wrong):
    """Below the check, what a GPU leaves behind until the assertion is seen: nothing of foreign memory."""
    from d2it.kernels import modulate, modulate_gate

    x, parameter = lay_out(torch.randn(3, 8), "plain"), lay_out(torch.randn(2, 8), "plain")  # NaN all around
    sample = torch.tensor([0, wrong, 1], dtype=torch.int32)
    assert all(t.isfinite().all() for t in modulate.adaln_modulate_forward(x, parameter, parameter, sample, 1e-6))
    assert modulate_gate.gated_residual_forward(x, x, parameter, None, sample).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("call", ["adaln_modulate(x, p, p, sample=s)", "gated_residual(x, x, p, sample=s)"])
def test_an_image_that_does_not_exist_is_asserted_on_the_device(call):
    code = f"""
        import torch, d2it.ops
        x, p = torch.ones(3, 8, device="cuda"), torch.ones(2, 8, device="cuda")
        s = torch.tensor([0, 2, 1], dtype=torch.int32, device="cuda")
        d2it.ops.{call}
        torch.cuda.synchronize()
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode != 0
    assert "sample must name an image" in run.stderr + run.stdout
