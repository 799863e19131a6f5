import dataclasses
import functools
import math
import random
from pathlib import Path

import pytest
import torch

import d2it.ops
from tests import cuda_on_cpu
from tests.kernels.harness import (
    DEVICE,
    INTERPRETED,
    LAYOUTS,
    Call,
    KernelSuite,
    Mutation,
    Shape,
    dtypes,
    mutated,
    poisoned,
)

FILE = "kernels/window_attention.py"
CPP_MUTATIONS = {
    "wrong bias index": ("bias.matrix + «bias.positions[query]» * bias.n", "query"),
    "another window's bias": ("matrix = «index % p.bias_windows» * p.bias_heads", "0"),
    "segments ignored": ("«bias.segments[k] == own» ? row[k]", "true"),
    "missing row": ("tokens += «row >= 0»;", "row > 0"),
    "unnamed rows not cleared": ("if («unnamed[row]»)\n      for (const Heads* to", "false"),
    "no delta": ("const float delta = «total(sums) * inverse_sums[i]»;", "0.0f"),
    "weights not normalised": ("(matrix.row(begin + i) + j) *= «factors[i]»;", "1.0f"),
    "gradient not scaled": ("tokens, p.width, b_dk, nullptr, «p.scale»)", "1.0f"),
    "queries that come later alone": ("const bool add = «i > 0»;", "false"),
    "remainder of the exponential": ("(bounded - n * «0.693359375f»)", "0.7f"),  # of cpu.h
    "missing run of the bias's sum": ("for (int64_t run = 0; run < «work.runs»; ++run)", "work.runs / 2"),
    "sums not cleared": ("if (fresh && window.tokens < p.n) «clear()»;", "void()"),
    "last window's sum alone": ("      fresh = «false»;\n    }\n    if (fresh) clear();", "fresh"),
}
NARROW = {"vectors of 8": ("inline bool wide() { return «has_v4()»; }", "false")}
WIDE = {  # of machines with AVX-512
    "biases closed up by whole vectors": ("to += «__builtin_popcount(there)»;", "0"),
    "gradients of a line's first tokens alone": ("row += «count»;", "0"),
    "another position's bias": ("there[i / kWide] |= static_cast<uint16_t>((row >= 0) << «i % kWide»)", "0"),
}
NO_PAIRS = {"no pairs": ("dtype == ScalarType::BFloat16 && «d2it::pairs::available()»;", "false")}
PAIRS = {
    "last number of an odd row": ("int64_t words(int64_t n) { return «(n + 1) / 2»; }", "n / 2"),
    "one row twice in a pair": ("if (pairs) store_interleaved(upper, «lower», pairs", "upper"),
    "weights of the first queries alone": ("weights{weights_.row(«j / 2»), weights_.pitch}", "0"),
    "gradients of the first queries' scores alone": ("ds_pairs{ds_pairs_.row(«j / 2»), ds_pairs_.pitch}", "0"),
    "gradient of k of the last queries alone": ("words(block), dk_, «i > 0»);", "false"),
    "gradient of v of the last queries alone": ("words(block), dv_, «i > 0»);", "false"),
    "gradient of k not scaled": ("rows, tokens, p.width, dk_, nullptr, «p.scale»)", "1.0f"),
    "another head's rows": ("from.data) + «first»;\n  for (int64_t i = 0; i < window.tokens", "0"),
}
# More positions than a tile of heads that wide.
BLOCKWISE = {"W": 2, "N": 18, "H": 1, "D": 96, "fill": 0.6, "bias": (1, 1), "segments": 1}
SOURCES = cuda_on_cpu.Sources({"window_attention.cpp": CPP_MUTATIONS | NARROW | WIDE | NO_PAIRS | PAIRS})


HAS_V4 = torch.cpu._is_avx512_supported()
HAS_PAIRS = torch.cpu._is_avx512_bf16_supported()


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


BACKENDS = d2it.ops.available_backends("window_attention")


@dataclasses.dataclass
class Contract:
    """A call of window attention on 4 windows of n positions, with gradients; bias[i % 2] belongs to window i.

    layout: "dense", "packed" (window 1 and a quarter of the positions are empty, three rows unnamed) or "qkv" (packed,
    one projection). Tensors are rows (T, 1, 16), and `rows` (4, n) has the row of each position, or -1.
    """

    backend: str
    n: int
    layout: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        rng = torch.Generator().manual_seed(self.n)
        self.rows, count, self.slots = torch.arange(4 * self.n).view(4, self.n), 4 * self.n, None
        if self.layout != "dense":
            self.slots = slots_of(4, self.n, 0.75, rng).roll(1, 0)
            self.rows, count = self.slots.long(), int(self.slots.max()) + 4
        self.q, self.k, self.v, self.grad = (torch.randn(count, 1, 16, generator=rng).to(self.dtype) for _ in range(4))
        self.bias = torch.randn(2, 1, self.n, self.n, generator=rng).to(self.dtype)
        self.segment_ids: torch.Tensor | None = None

    def run(self, backend: str | None = None, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The result, and the gradients of q, k, v and the bias."""
        leaves = [x.detach().to(DEVICE, dtype).requires_grad_() for x in (self.q, self.k, self.v, self.bias)]
        shape = (4, self.n, 1, 16) if self.slots is None else self.q.shape
        *given, bias = leaves
        given = [x.view(shape) for x in given]
        call = {
            "slots": None if self.slots is None else self.slots.to(DEVICE),
            "segment_ids": None if self.segment_ids is None else self.segment_ids.to(DEVICE),
            "scale": 0.5,
            "backend": backend or self.backend,
        }
        if self.layout == "qkv":
            out = d2it.ops.window_attention_qkvpacked(torch.stack(given, -3), bias, **call)
        else:
            out = d2it.ops.window_attention(*given, bias, **call)
        grads = torch.autograd.grad(out, leaves, self.grad.to(DEVICE, dtype).view(shape))
        found = {"out": out.detach().reshape(self.q.shape), **dict(zip(("q", "k", "v", "bias"), grads))}
        return {name: x.cpu() for name, x in found.items()}

    def named(self, windows: slice | list[int], positions: slice | int = slice(None)) -> torch.Tensor:
        """The rows at those positions of those windows, as far as they hold a token."""
        rows = self.rows[windows, positions]
        return rows[rows >= 0]


# In float16 windows of up to 64 are one tile for Triton, larger ones are not; in float32 those of 18 are not. The
# interpreter takes 8 seconds for windows of 256, and does with 96.
SIZES = [*((n, torch.float16) for n in (4, 16, 25, 49, 64, 256)), (4, torch.float32), (18, torch.float32)]
OF_CPU = [(n, torch.bfloat16) for n in (4, 25, 256)]  # which multiplies bfloat16 itself where it can
CONTRACT = [
    pytest.param((backend, n, layout, dtype), id=f"{backend}-{n}-{layout}-{str(dtype)[6:]}")
    for backend in BACKENDS
    for size, dtype in SIZES + OF_CPU * (backend == "cpu")
    for n in (96 if size == 256 and backend == "triton" and INTERPRETED else size,)
    for layout in ("dense", "packed", "qkv")
]


@pytest.fixture(params=CONTRACT)
def contract(request: pytest.FixtureRequest) -> Contract:
    return Contract(*request.param)


@functools.cache
def run_unchanged(backend: str, n: int, layout: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a contract gives before a test changes anything in it."""
    return Contract(backend, n, layout, dtype).run()


@pytest.fixture
def clean(contract: Contract) -> dict[str, torch.Tensor]:
    return run_unchanged(contract.backend, contract.n, contract.layout, contract.dtype)


def test_query_that_sees_no_key(contract: Contract) -> None:
    """By the bias, or by segments and the bias: zero, and zero gradients; all others are right."""
    blind, alone = 1, 3
    contract.bias[0, :, blind] = -math.inf  # in windows 0 and 2
    contract.bias[:, :, alone, alone] = -math.inf
    contract.segment_ids = torch.zeros(1, contract.n, dtype=torch.int64)
    contract.segment_ids[:, alone] = 7
    got = contract.run()
    sees_none = torch.cat((contract.named([0, 2], blind), contract.named([0, 1, 2, 3], alone)))
    seen_by_none = contract.named([0, 1, 2, 3], alone)
    assert not any(got[name][sees_none].any() for name in ("out", "q"))
    assert not any(got[name][seen_by_none].any() for name in ("k", "v"))
    assert not got["bias"][0, :, blind].any()
    assert not got["bias"][:, :, alone].any()
    rough = 100 * torch.finfo(contract.dtype).eps
    for name, want in contract.run("reference", torch.float64).items():
        error = (got[name].double() - want).abs().max().item()
        assert error <= rough * want.abs().max().item(), f"{name}: {error}"


@pytest.mark.parametrize("where", ["q", "k", "v", "grad", "bias"])
def test_what_is_not_finite_stays_in_its_window(contract: Contract, clean: dict[str, torch.Tensor], where: str) -> None:
    """In a row of window 2, or of the bias of windows 1 and 3: results of the other windows keep their bits."""
    for value in (math.nan, math.inf, -math.inf) if contract.n == 4 else (math.nan,):
        if where == "bias":
            contract.bias[1, 0, 2] = value
            kept, matrix = contract.named([0, 2]), 0
        else:
            getattr(contract, where)[contract.named([2])[1]] = value
            kept, matrix = contract.named([0, 1, 3]), 1
        got = contract.run()
        assert torch.equal(got["bias"][matrix], clean["bias"][matrix])
        for name in ("out", "q", "k", "v"):
            assert torch.equal(got[name][kept], clean[name][kept]), f"{name} of {value}"


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the library")
@pytest.mark.parametrize("n", [5, 41])
def test_a_key_of_infinity_that_gets_no_weight(n: int) -> None:
    """In bfloat16, in which queries come in pairs, NaN goes where it goes in float16 if the last is alone."""
    found = []
    for dtype in (torch.float16, torch.bfloat16):
        contract = Contract("cpu", n, "dense", dtype)
        contract.q[..., 0] = -contract.q[..., 0].abs() - 1
        contract.k[contract.named([2])[1], 0, 0] = math.inf
        found.append(contract.run())
    for name, got in found[1].items():
        assert torch.equal(got.isfinite(), found[0][name].isfinite()), name
    assert found[1]["v"].isfinite().all()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_smaller_window_after_one_that_is_not_finite(dtype: torch.dtype) -> None:
    """What a thread worked in holds nothing of the window before."""
    slots = torch.tensor([[0, 1, 2, 3, 4], [5, -1, 6, 7, -1]], dtype=torch.int32)
    q, k, v, grad = torch.randn(4, 8, 1, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.zeros(1, 1, 5, 5, requires_grad=True)
    for x in (q, k, v, grad):
        x[3:5] = math.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = d2it.ops.window_attention(*leaves, bias, slots=slots, backend="cpu")
    for x in (out, *torch.autograd.grad(out, leaves, grad)):
        assert x[5:].isfinite().all()


@pytest.mark.skipif(not INTERPRETED or "triton" not in BACKENDS, reason="kernels are mutated in the interpreter alone")
@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("m_row &= o_local == i_only", "m_row &= o_local >= 0", "v"),
        ("if not_finite(b_check):", "if i_split < 0:", "v"),
        ("if tl.sum(b_check * 0.0, 0) != 0.0:", "if i_split < 0:", "grad"),
        ("b_delta = tl.sum(b_ds + b_product * 0.0, 1)", "b_delta = tl.sum(b_ds, 1)", "k"),
        ("b_ds = tl.where(m_row[:, None], b_ds, 0.0)", "b_ds += 0.0", "v"),
    ],
)
def test_contract_notices_windows_that_are_not_kept_apart(old: str, new: str, where: str, tmp_path: Path) -> None:
    contract = Contract("triton", 4, "dense", torch.float32)
    if where == "k":  # scores of -inf alone: no weight shows them
        contract.q, contract.k = contract.q.abs(), contract.k.abs()
    with mutated(Mutation("not kept apart", FILE, old, new), tmp_path):
        clean = contract.run()
        with pytest.raises(AssertionError):
            test_what_is_not_finite_stays_in_its_window(contract, clean, where)


def test_rows_that_no_slot_names(contract: Contract, clean: dict[str, torch.Tensor]) -> None:
    """They are zero, and what they hold does not matter."""
    unnamed = torch.ones(len(contract.q), dtype=torch.bool)
    unnamed[contract.named([0, 1, 2, 3])] = False
    for x in (contract.q, contract.k, contract.v, contract.grad):
        x[unnamed] = math.nan
    for name, value in contract.run().items():
        assert torch.equal(value, clean[name]), name
        assert name == "bias" or not value[unnamed].any()


def test_scores_beyond_float16(contract: Contract) -> None:
    """Scores of -320,000 are scores: a token that sees itself alone has its own value as the result."""
    contract.q.fill_(200.0)
    contract.k.fill_(-200.0)
    contract.bias.zero_()
    contract.segment_ids = torch.arange(contract.n)[None]
    got = contract.run()
    named = contract.named([0, 1, 2, 3])
    assert torch.equal(got["out"][named], contract.v[named])
    assert torch.equal(got["v"][named], contract.grad[named])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0, 0)])
def test_slots_without_a_window_or_a_position(backend: str, shape: tuple[int, int]) -> None:
    """All rows are unnamed: zeros, also in memory that held something else."""
    q = torch.randn(5, 2, 8, device=DEVICE, requires_grad=True)
    bias = torch.randn(1, 2, shape[1], shape[1], device=DEVICE, requires_grad=True)
    slots = torch.empty(shape, dtype=torch.int32, device=DEVICE)
    with poisoned():
        out = d2it.ops.window_attention(q, q, q, bias, slots=slots, backend=backend)
        grads = torch.autograd.grad(out, (q, bias), torch.randn_like(out))
    assert not any(x.any() for x in (out, *grads))


class TestWindowAttention(WindowSuite):
    op = "window_attention"
    gradients = ("q", "k", "v", "bias")
    cpp_mutations = "window_attention.cpp", [*CPP_MUTATIONS, *(WIDE if HAS_V4 else ()), *(PAIRS if HAS_PAIRS else ())]
    # Packed, dense with segments, more positions than are queries at a time, more packed ones than a vector has.
    cpp_shapes = [WindowSuite.corners[i] for i in (2, 4, 9, 10)]

    def build(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> Call:
        qkv, call = self.parts(shape, dtype, rng)
        q, k, v = qkv.unbind(-3)
        return {"q": q, "k": k, "v": v, **call}

    @pytest.mark.skipif(
        not (cuda_on_cpu.COMPILER and DEVICE == "cpu" and "cpu" in BACKENDS), reason="needs a compiler and the library"
    )
    def test_vectors_of_a_machine_without_avx512(self, run):
        run("window_attention.cpp", *NARROW)
        for shape in self.cpp_shapes:
            self.check(shape, "cpu", torch.float32, "plain", seed=1)

    @pytest.mark.skipif(
        not (cuda_on_cpu.COMPILER and DEVICE == "cpu" and "cpu" in BACKENDS), reason="needs a compiler and the library"
    )
    def test_bfloat16_of_a_machine_without_its_products(self, run):
        run("window_attention.cpp", *NO_PAIRS)
        for shape in self.cpp_shapes:
            self.check(shape, "cpu", torch.bfloat16, "plain", seed=1)

    @pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the library")
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_odd_widths(self, layout):
        """Of an odd number of positions, too; more than are taken as queries at a time."""
        for n, width in ((9, 1), (33, 7), (131, 33)):
            shape = {"W": 2, "N": n, "H": 2, "D": width, "fill": 0.8, "bias": (1, 2), "segments": 1}
            for dtype in dtypes("cpu"):
                self.check(shape, "cpu", dtype, layout, seed=2)


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
            ("no delta", "b_ds -= b_p * b_delta[:, None]", "b_ds -= b_p * 0.0"),
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
