"""The CUDA kernels of window attention run thread by thread on the CPU, through the suite of every backend."""

import random

import pytest
import torch

import d2it.ops
from d2it.ops import _dispatch, reference
from d2it.ops.window_attention import _cuda_shared
from tests import cuda_on_cpu
from tests.kernels.harness import DEVICE, Call, Shape, fast_backends
from tests.kernels.test_window_attention import WindowSuite

FILE = "window_attention_cuda.cu"
MUTATIONS = {
    "positions of rows": ("at.positions[place] = «position»;", "place"),
    "fours that are none": ("run = min(p.run, «(apart & 0x77777777u) == 0» ? 4", "true"),
    "pairs that are none": ("? 4 : «(apart & 0x55555555u) == 0» ? 2 : 1", "true"),
    "order of queries": ("mine = half + «row_in_place(row + 8 * i)»;", "row + 8 * i"),
    "columns behind a head": ("row + i * kPerVector, «(i + part) * kPerVector < there»,", "true"),
    "sums not scaled down": ("sums[0][j][i] *= «factor[i / 2]»;", "1.0f"),
    "keys that are not there": ("if («key >= left» || (at", "false"),
    "segments ignored": ("|| (at.segments && «at.segments[query] != at.segments[start + key]»))", "false"),
    "segments ignored in the backward": (
        "(b.p.segmented() && «parts.at.segments[key] != parts.at.segments[query + e]»)",
        "false",
    ),
    "another window's bias": ("return «static_cast<int64_t>(residue)» * (p.bias_per_head", "int64_t{0}"),
    "groups: second entry of the bias": ("at<float>(own, column.x), at<float>(own, «column.y»),", "column.x"),
    "groups: third entry of the bias": ("b = at<float2>(own, «column.z»);", "column.x"),
    "row of the bias": ("at.positions[«first + lane / 4 + 8 * r»] * p.n", "first + lane / 4"),
    "weights not normalised": (": «__fdividef(1.0f, sum)»;", "1.0f"),
    "total not scaled down": ("total[i] *= «factor[i / 2]»;", "1.0f"),
    "keys taken for whole": ("&& «start + kKeys <= count») {", "true"),
    "pairs of the bias": ("(entries[r] + «columns[0]»)", "0"),
    "entries of the bias": ("(entries[i / 2] + «columns[i % 2]»)", "columns[0]"),
    "pairs of the bias in the backward": ("i < 2 ? where.x : «where.z»);", "where.x"),
    "entries of the bias in the backward": ("columns[«i / 4 * 2 + i % 2»]);", "0"),
    "a bias where there is none": (
        "parts.fixed.bias + position * b.p.n : «kZeros»;",
        "reinterpret_cast<const float*>(b.lse)",
    ),
    "queries of a warp before they are copied": (
        "      d2it::commit_copies();\n      «d2it::wait_for_copies<0>()»;\n      __syncwarp();",
        "void()",
    ),
    "delta of the other sign": ("to[0] = to[2] = «-delta»;", "delta"),
    "delta off the diagonal": ("if («lane % 4 != row / 2») return;\n#pragma", "lane % 4 != 0"),
    "delta before it is there": ("__syncwarp();\n      Stage<T, kWidth>& from = «stage(block)»;", "stage(block + 1)"),
    "weights of a key that is not there": ("const bool there = «key < count && query + e < count»;", "true"),
    "pairs taken for whole": ("query + from + 16 <= «whole»,", "256"),
    "sum of a query that is not there": ("if («there(i / 4, i % 4)»)", "true"),
    "sum of a third query": ("if («there(i / 2, i % 2 * 2)»)", "true"),
    "sum of four queries that are not there": ("if («there(r, 0)»)", "true"),
    "sum of a key that is not there": ("missing |= 1u << «(4 * r + e)»;", "e"),
    "sum in the other memory": ("(«static_cast<int>(position) < b.resident» ? parts.near", "false"),
    "sums in shared memory lost": (
        "i < «static_cast<int>(b.resident * b.row / 16)»; i += kBackwardThreads)\n      far[i]",
        "0",
    ),
    "sums of one block": ("parts[s] = first + s < «splits» ?", "1"),
    "sums of one head": ("last_head = «per_head ? first_head + 1 : heads»;", "first_head + 1"),
    "sums not transposed back": ("d2it::to<T>(«tile[lane][i]»)", "tile[i][lane]"),
    "dS of other warps before it is there": (
        "finish_copies<kDk>(block + 1);\n      «__syncthreads()»;",
        "void()",
    ),
    "queries before they are copied": (
        "void finish_copies(int block) const {\n    «d2it::wait_for_copies<0>()»;",
        "void()",
    ),
    "keys before they are copied": ("      finish_copies<kDk>(0);\n    }\n    «d2it::wait_for_copies<0>()»;", "void()"),
    "dq of another block": ("store_queries(«block - 1»);", "0"),
    "dq of the other columns": ("«threadIdx.x / kWarp % 2 == 0») {\n      sum_queries<0", "true"),
    "dS of the block before": ("parts.ds + «block % kStages» *", "0"),
    "dq of four tiles of keys": ("for (; tiles >= kAtOnce; «tiles -= kAtOnce») {", "tiles = 0"),
    "dq of a tile of keys": ("for (; tiles > 0; «--tiles») {", "tiles = 0"),
    "keys that are not copied": ("copy(parts.v, place, parts.fixed.v, row, «real», b.v.column);", "place < 16"),
    "bias of the next row": ("return d2it::load_pointer(Words(keys.rows) + («32 * r» + 2 * which));", "0"),
    "a block of queries too far": ("if («from == 0 || query + from < count»)", "from == 0"),
    "head of another block": ("head = «blockIdx.x % p.heads»;\n    const auto strip", "0"),
    "dk not scaled": ("store_columns(dk_sums[0], {«p.scale», p.scale}", "1.0f"),
    "groups: positions of rows": ("window << 8 | «position»);", "position / 2"),
    "groups: fours that are none": ("min(p.run, «fours» ? 4", "true"),
    "groups: pairs that are none": ("«pairs» ? 2 : 1);", "true"),
    "groups: positions behind the last row": ("at.places[count + threadIdx.x] = «kNoWindow»;", "0"),
    "groups: tiles before": ("return {«(from - first) / kTile»,", "row / kTile"),
    "groups: tiles behind": ("«(to - first - 1) / kTile»};", "row / kTile"),
    "groups: order of columns": ("const int row = «row_in_place(place)», in", "place"),
    "groups: keys of another window": ("«(keys.place[e] ^ place[r]) < 256»;", "true"),
    "groups: queries of another window": ("«(queries.place[e] ^ place[r]) < 256»;", "true"),
    "groups: segments ignored": (
        "alike = «at.segments[group.first + query[r]] == at.segments[group.first + key + e]»",
        "true",
    ),
    "groups: segments ignored in the backward": (
        "alike = «at.segments[group.first + key[r]] == at.segments[group.first + query + e]»;",
        "true",
    ),
    "groups: NaN of another window": ("return «zero == 0.0f»;\n}", "true"),
    "groups: NaN of another window in the backward": ("return «zero == 0.0f»;\n  }", "true"),
    "groups: weights not normalised": (
        "«__fdividef(1.0f, total[r])»;\n  }\n  store_rows",
        "1.0f",
    ),
    "groups: another window's bias": ("Bias bias(p, «residue», head);", "0"),
    "groups: delta off the diagonal": ("if («lane % 4 != row / 2») return;\n    delta()", "lane % 4 != 0"),
    "groups: delta before it is there": ("work.sum_delta();\n        «__syncthreads()»;", "void()"),
    "groups: dS before it is there": ("work.walk(bias);\n        «__syncthreads()»;", "void()"),
    "groups: dS of one key": ("pack<T>(one[0], «one[kScoresPitch]»);", "one[0]"),
    "groups: dk not scaled": ("store(dk[0], «p.scale», b.dk", "1.0f"),
    "groups: dq not scaled": ("store(dq[0], «p.scale», b.dq", "1.0f"),
    "groups: sum by every warp": ("% kGroupWarps == «warp»;", "0"),
    "groups: sum of two windows where it is formed": ("if («alone()» && b.sums", "true"),
    "groups: sum of a fourth query": ("if (there > «3») to[column.w]", "1 << 20"),
    "groups: sum of one key": ("for (; keys; «keys &= keys - 1») {", "keys = 0"),
    "groups: sum lost": ("[i % pitch] = «near[i]»;", "make_float4(0, 0, 0, 0)"),
    "unnamed rows not cleared": ("own < tokens && «unnamed[own]»", "false"),
}
SOURCES = cuda_on_cpu.Sources({FILE: MUTATIONS})
EMULATED = cuda_on_cpu.COMPILER and DEVICE == "cpu" and "cpu" in fast_backends("window_attention")
# Two tiles of 16 keys a warp, of the half empty windows one; the sum of the bias's gradient in both memories.
LARGE = [
    {"W": 1, "N": 136, "H": 1, "D": 32, "fill": None, "bias": (1, 1), "segments": 0},
    {"W": 1, "N": 256, "H": 1, "D": 72, "fill": 0.4, "bias": (1, 1), "segments": 0},
]


class CudaSource(WindowSuite):
    backends = ("cuda",)
    # Windows that are empty, full and in between; every width of kernel, rows of whole vectors and not.
    corners = [
        {"W": 0, "N": 4, "H": 2, "D": 16, "fill": None, "bias": (1, 2), "segments": 0},
        {"W": 3, "N": 4, "H": 2, "D": 16, "fill": 0.0, "bias": (1, 2), "segments": 0},
        {"W": 3, "N": 16, "H": 2, "D": 72, "fill": 0.5, "bias": (1, 2), "segments": 0},
        {"W": 3, "N": 20, "H": 2, "D": 32, "fill": None, "bias": (1, 1), "segments": 0},
        {"W": 5, "N": 9, "H": 1, "D": 20, "fill": None, "bias": (2, 1), "segments": 2},
        {"W": 2, "N": 40, "H": 2, "D": 24, "fill": 0.9, "bias": (2, 1), "segments": 1},
        {"W": 2, "N": 49, "H": 1, "D": 64, "fill": None, "bias": None, "segments": 0},
        {"W": 1, "N": 34, "H": 1, "D": 96, "fill": 1.0, "bias": (1, 1), "segments": 0},
        {"W": 70, "N": 4, "H": 1, "D": 16, "fill": 0.3, "bias": (2, 1), "segments": 0},
        {"W": 9, "N": 16, "H": 1, "D": 72, "fill": 0.4, "bias": (1, 1), "segments": 2},
        {"W": 3, "N": 64, "H": 1, "D": 32, "fill": 0.6, "bias": (1, 1), "segments": 0},
        {"W": 2, "N": 100, "H": 1, "D": 128, "fill": 0.7, "bias": (1, 1), "segments": 0},
        # More than 64 positions: a window at a time.
        {"W": 3, "N": 65, "H": 1, "D": 20, "fill": None, "bias": (2, 1), "segments": 2},
        {"W": 2, "N": 66, "H": 1, "D": 24, "fill": None, "bias": (2, 1), "segments": 1},
        {"W": 1, "N": 80, "H": 2, "D": 72, "fill": 0.5, "bias": (1, 1), "segments": 0},
    ]
    small = {"W": 3, "N": 6, "H": 2, "D": 16, "fill": 0.6, "bias": (1, 2), "segments": 1}

    @pytest.fixture(autouse=True)
    def _run_cuda_source(self, run, monkeypatch):
        run(FILE)
        monkeypatch.setitem(_dispatch._MACHINE, (self.op, "cuda"), [])
        reasons = _dispatch._device_reasons
        monkeypatch.setattr(_dispatch, "_device_reasons", lambda name, at: [] if name == "cuda" else reasons(name, at))

    def random_shape(self, rng: random.Random) -> Shape:
        return super().random_shape(rng) | {"W": rng.randint(1, 3)}


@pytest.mark.skipif(
    not EMULATED, reason="needs a C++ compiler and the CPU operators; a GPU runs the kernels themselves"
)
class TestWindowAttentionCuda(CudaSource):
    op = "window_attention"
    gradients = ("q", "k", "v", "bias")

    def build(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> Call:
        qkv, call = self.parts(shape, dtype, rng)
        if call["bias"] is not None and shape["N"] % 16 == 0:
            call["bias"] = call["bias"].float()  # as parameters are, under autocast
        q, k, v = qkv.unbind(-3)
        return {"q": q, "k": k, "v": v, **call}

    @pytest.mark.parametrize("large", LARGE, ids=lambda large: f"N{large['N']}")
    def test_large_windows(self, large):
        self.check(large, "cuda", torch.bfloat16, "plain")

    @pytest.mark.parametrize("rows", [0, 5, 80])
    def test_sums_in_shared_memory(self, rows, monkeypatch):
        """As many rows of the gradient of the bias as the GPU has room for; the others in global memory."""
        shape = self.corners[-1]
        needed = _cuda_shared(shape["N"], shape["D"])
        monkeypatch.setattr(SOURCES[FILE].most_shared, "value", needed + rows * 104 * 4)
        self.check(shape, "cuda", torch.float16, "plain")
        monkeypatch.setattr(SOURCES[FILE].most_shared, "value", needed - 1)
        with pytest.raises(RuntimeError, match="shared memory"):
            self.check(shape, "cuda", torch.float16, "plain")

    @pytest.mark.parametrize("n", [17, 81])
    def test_low_scores(self, n):
        """Scores of -300: the weight that a score of zero would have is no number."""
        one = torch.ones(1, n, 1, 16, dtype=torch.float16)
        q, k, v = (one * 9).requires_grad_(), (one * -9).requires_grad_(), torch.randn_like(one).requires_grad_()
        grad = torch.randn_like(one)
        results = []
        for op, backend in ((d2it.ops.window_attention, {"backend": "cuda"}), (reference.window_attention, {})):
            out = op(q, k, v, None, **backend)
            results.append([out, *torch.autograd.grad(out, (q, k, v), grad)])
        for got, want in zip(*results):
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("scale", [0.0, -0.3])
    def test_scales_that_are_not_above_zero(self, scale):
        q, k, v, grad = torch.randn(4, 1, 66, 1, 16, dtype=torch.float16).unbind()
        bias = torch.randn(1, 1, 66, 66)
        results = []
        for op, given, dtype in (
            (d2it.ops.window_attention, {"backend": "cuda"}, torch.float16),
            (reference.window_attention, {}, torch.float64),
        ):
            leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)] + [bias.to(dtype).requires_grad_()]
            out = op(*leaves, scale=scale, **given)
            results.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
        for got, want in zip(*results):
            torch.testing.assert_close(got.double(), want.double(), rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("count", [6, 12])
    def test_few_tokens_side_by_side(self, count):
        """Of 16 queries some are not there, which share a place of the bias's sum with one that is."""
        slots = torch.full((1, 80), -1, dtype=torch.int32)
        slots[0, :count] = torch.arange(count)
        qkv, grad = torch.randn(count, 3, 1, 16), torch.randn(count, 1, 16)
        bias = torch.randn(1, 1, 80, 80)
        results = []
        for op, given, dtype in (
            (d2it.ops.window_attention, {"backend": "cuda"}, torch.float16),
            (reference.window_attention, {}, torch.float64),
        ):
            leaves = [x.to(torch.float16).to(dtype).requires_grad_() for x in (qkv, bias)]
            out = op(*leaves[0].unbind(1), leaves[1], slots=slots, **given)
            results.append([out, *torch.autograd.grad(out, leaves, grad.to(torch.float16).to(dtype))])
        for got, want in zip(*results):
            torch.testing.assert_close(got.double(), want.double(), rtol=0.02, atol=0.02)

    def test_queries_without_a_key_and_numbers_that_are_none(self):
        qkv = torch.randn(3, 5, 3, 1, 16, dtype=torch.float16).requires_grad_()
        bias = torch.zeros(3, 1, 5, 5)
        bias[0, 0, 2] = -torch.inf
        bias[1] = torch.nan
        out = d2it.ops.window_attention(*qkv.unbind(2), bias.requires_grad_(), backend="cuda")
        dqkv, dbias = torch.autograd.grad(out, (qkv, bias), torch.randn_like(out))
        for x in (out[0, 2], dqkv[0, 2, 0], dbias[0, 0, 2]):
            assert not x.any()
        for x in (out, dqkv, dbias):
            assert x[[0, 2]].isfinite().all()
            assert x[1].isnan().any()

    def test_numbers_that_are_not_finite_stay_in_their_window(self):
        """Also where windows share a group."""
        clean = torch.randn(4, 5, 3, 1, 16, dtype=torch.float16)
        dirty = clean.clone()
        dirty[1, 2] = torch.nan
        dirty[2, :, 1] = torch.inf
        grad = torch.randn(4, 5, 1, 16, dtype=torch.float16)
        results = []
        for qkv in (clean.requires_grad_(), dirty.requires_grad_()):
            out = d2it.ops.window_attention(*qkv.unbind(2), None, backend="cuda")
            results.append([out, *torch.autograd.grad(out, qkv, grad)])
        for want, got in zip(*results):
            torch.testing.assert_close(got[[0, 3]], want[[0, 3]], rtol=0.02, atol=0.02)

    def check_everything(self):
        for shape in (*self.corners, LARGE[0]):
            self.check(shape, "cuda", torch.float16, "plain", repeats=1)
        self.test_few_tokens_side_by_side(6)
        self.test_few_tokens_side_by_side(12)
        self.test_low_scores(17)
        self.test_low_scores(81)
        self.test_scales_that_are_not_above_zero(0.0)
        self.test_numbers_that_are_not_finite_stay_in_their_window()

    @pytest.mark.parametrize("name", MUTATIONS)
    def test_mutation_of_the_source_is_noticed(self, name, run):
        run(FILE, name)
        with pytest.raises((AssertionError, RuntimeError)):
            self.check_everything()


@pytest.mark.skipif(
    not EMULATED, reason="needs a C++ compiler and the CPU operators; a GPU runs the kernels themselves"
)
class TestWindowAttentionQKVPackedCuda(CudaSource):
    op = "window_attention_qkvpacked"
    gradients = ("qkv", "bias")
    corners = CudaSource.corners[1:6]

    def build(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> Call:
        qkv, call = self.parts(shape, dtype, rng)
        return {"qkv": qkv, **call, "scale": 0.3}
