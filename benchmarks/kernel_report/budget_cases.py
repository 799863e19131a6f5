"""The shapes of the goals, and how often the loops of each kernel run there.

Block sizes and splits are read off the launch; what depends on the data is the average over grain maps whose fine
regions are drawn at random, as the benchmarks draw them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from functools import partial

import attn_bench
import gelu_bench
import kde_entropy_bench
import modulate_bench
import neighbor_copy_bench
import optimizer_bench
import pack_tokens_bench
import plan_tokens_bench
import torch
from goals import ATTENTION_SHARE, ENTROPY_US, MOVER_SHARE, PLAN_US

from kernel_report import budget_cuda
from kernel_report.budget import Case, Trips
from kernel_report.compile import Launch, nvcc

BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
CELLS, HEADS, WIDTH = 262_144, 16, 72


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def mean_blocks(n: int, fill: float, size: int) -> float:
    """How many blocks of `size` rows the rows of a window of n cells fill on average, where each of its regions of four
    cells is fine with probability `fill`."""
    regions = n // 4
    return sum(
        math.comb(regions, k) * fill**k * (1 - fill) ** (regions - k) * math.ceil(4 * k / size)
        for k in range(regions + 1)
    )


def attention_trips(n: int, fill: float) -> dict[str, Trips]:
    """The loops of window attention over windows of n cells."""
    pairs = CELLS // n * HEADS  # of a window and a head

    def over(mine: str, theirs: str) -> Trips:
        """Blocks of a window's rows, and within each all blocks of its rows on the other side."""

        def trips(launch: Launch) -> list[float]:
            outer, inner = (mean_blocks(n, fill, launch.arguments[side]) for side in (mine, theirs))
            return [pairs * outer / launch.programs, inner]

        return trips

    def tiles(launch: Launch) -> list[float]:
        return [pairs / launch.arguments["REPEATS"] / launch.programs]

    def dbias(launch: Launch) -> list[float]:
        blocks = math.ceil(n / launch.arguments["BM"]) * math.ceil(n / launch.arguments["BN"])
        return [pairs * blocks / launch.programs]

    def reduce_sums(launch: Launch) -> list[float]:
        terms = launch.arguments["sums"].shape[0] * launch.arguments["REPEATS"]
        return [math.ceil(terms / launch.arguments["TERMS"])]

    return {
        "window_attention_fwd_kernel": tiles,
        "window_attention_bwd_kernel": tiles,
        "window_attention_blocks_fwd_kernel": over("BM", "BN"),
        "window_attention_blocks_dq_kernel": over("BM", "BN"),
        "window_attention_blocks_dkv_kernel": over("BN", "BM"),
        "window_attention_blocks_dbias_kernel": dbias,
        "reduce_sums_kernel": reduce_sums,
        # Every row has a slot: no row is cleared.
        "clear_unnamed_rows_kernel": lambda launch: 0.0,
    }


def attention() -> Iterator[Case]:
    from d2it.kernels import window_attention

    for n in (256, 64, 16):
        for fill in (0.25, 0.5, 1.0) if n <= 64 else (0.5, 1.0):
            rows = round(fill * CELLS)
            qkv, out = meta(rows, 3, HEADS, WIDTH), meta(rows, HEADS, WIDTH)
            bias, slots = meta(1, HEADS, n, n, dtype=F32), meta(CELLS // n, n, dtype=I32)
            lse = meta(CELLS // n, HEADS, n, dtype=F32)
            forward, backward = attn_bench.costs(n, HEADS, WIDTH, fill, CELLS, BF16)
            made = partial(
                Case,
                "window_attention",
                f"n{n}-H{HEADS}-D{WIDTH}-fill{fill:g}-bfloat16",
                trips=attention_trips(n, fill),
                share=ATTENTION_SHARE[n],
                unused=("clear_unnamed_rows_kernel.rows",),
            )
            scale = WIDTH**-0.5
            call = partial(window_attention.window_attention_qkvpacked_forward, qkv, bias, slots, None, scale)
            yield made("forward", forward, call)
            given = (out, qkv, bias, slots, None, out, lse, scale, True)
            yield made("backward", backward, partial(window_attention.window_attention_qkvpacked_backward, *given))
            if nvcc():
                shape = (n, HEADS, WIDTH, fill, CELLS)
                cleared = budget_cuda.unnamed_rows(rows, HEADS * WIDTH * 2, CELLS)
                made = partial(made, call=None, unused=())
                yield made("forward", forward, cuda=(budget_cuda.window_forward(*shape), *cleared))
                yield made("backward", backward, cuda=(*budget_cuda.window_backward(*shape), *cleared))


def block_sums(launch: Launch) -> list[float]:
    """The sums over blocks of rows, added up."""
    return [math.ceil(launch.arguments["blocks"] / launch.arguments["ROWS"])]


def modulation() -> Iterator[Case]:
    from d2it.kernels import modulate, modulate_gate

    batch, channels = 256, 1152
    for rows, packed in ((256, False), (512, True)):
        x = meta(batch * rows, channels) if packed else meta(batch, rows, channels)
        sample = meta(batch * rows, dtype=I32) if packed else None
        shift, scale, gate = meta(batch, 6 * channels, dtype=F32).chunk(6, dim=1)[:3]
        stats, bias = meta(batch * rows, 2, dtype=F32), meta(channels, dtype=F32)
        kind = "packed" if packed else "images"
        name = f"B{batch}-L{rows}-C{channels}-{kind}-bfloat16"

        def block(launch: Launch) -> list[float]:
            # A block of rows lies in one image.
            return [1.0, launch.arguments["runs.BLOCK_ROWS"] / launch.arguments["ROWS"]]

        def sums(launch: Launch, rows: int = rows, packed: bool = packed) -> list[float]:
            blocks = math.ceil(rows / launch.arguments["runs.BLOCK_ROWS"] / launch.arguments["ROWS"])
            if not packed:
                return [blocks]
            # The last loop is that of rows whose images are out of order.
            return [math.ceil(launch.arguments["runs.blocks"] / launch.arguments["BLOCK_BOUNDS"]), blocks, 0.0]

        trips: dict[str, Trips] = {
            "adaln_modulate_bwd_kernel": block,
            "gated_residual_bwd_kernel": block,
            "sum_runs_kernel": sums,
            "sum_blocks_kernel": block_sums,
        }
        calls = {
            "adaln_modulate": (
                "modulate",
                partial(modulate.adaln_modulate_forward, x, shift, scale, sample, 1e-6),
                partial(modulate.adaln_modulate_backward, x, x, stats, scale, sample, 1e-6),
            ),
            "gated_residual": (
                "gate",
                partial(modulate_gate.gated_residual_forward, x, x, gate, bias, sample),
                partial(modulate_gate.gated_residual_backward, x, x, gate, bias, sample),
            ),
            "gated_residual_modulate": (
                "gate-modulate",
                partial(modulate.gated_residual_modulate_forward, x, x, gate, shift, scale, bias, sample, 1e-6),
                partial(modulate.gated_residual_modulate_backward, x, x, x, stats, x, gate, scale, bias, sample, 1e-6),
            ),
        }
        for op, (prefix, *pair) in calls.items():
            costs = modulate_bench.costs(op, batch, rows, channels, packed, BF16)
            for direction, cost, call in zip(("forward", "backward"), costs, pair):
                yield Case(op, f"{prefix}-{name}", direction, cost, call, trips, share=MOVER_SHARE)


def gelu() -> Iterator[Case]:
    from d2it.kernels import gelu

    batch, rows, channels = 256, 256, 4608
    x, bias = meta(batch, rows, channels), meta(channels, dtype=F32)
    trips: dict[str, Trips] = {
        "gelu_bwd_kernel": lambda launch: [launch.arguments["BLOCK_ROWS"] / launch.arguments["ROWS"]],
        "sum_blocks_kernel": block_sums,
    }
    calls = {"forward": partial(gelu.gelu_forward, x, bias), "backward": partial(gelu.gelu_backward, x, x, bias)}
    costs = gelu_bench.costs(batch, rows, channels, BF16)
    for (direction, call), cost in zip(calls.items(), costs):
        name = f"B{batch}-L{rows}-C{channels}-bfloat16"
        yield Case("gelu", name, direction, cost, call, trips, share=MOVER_SHARE)


def in_turn(*calls: Callable[[], object]) -> Callable[[], object]:
    """One call that makes all of these."""
    return lambda: [call() for call in calls]


def movers() -> Iterator[Case]:
    from d2it.kernels import pack_tokens, plan_tokens

    batch, fill, cells = 256, 0.5, 1024
    count = round(batch * cells * fill)
    index, inverse = meta(count, dtype=I32), meta(batch * cells, dtype=I32)
    for channels in (1152, 12):
        pack, merge = pack_tokens_bench.costs(batch, channels, fill, BF16)
        name = f"B{batch}-C{channels}-fill{fill}-bfloat16"
        x, packed = meta(batch, cells, channels), meta(count, channels)
        forward = partial(pack_tokens.pack_tokens_forward, x, index, inverse)
        yield Case("pack_tokens", f"pack-{name}", "forward", pack[0], forward, {}, share=MOVER_SHARE)
        forward = partial(pack_tokens.unpack_tokens_forward, packed, x, index, inverse, batch, cells)
        base = partial(pack_tokens.unpack_tokens_forward, None, x, index, inverse, batch, cells)
        backward = in_turn(partial(pack_tokens.pack_tokens_forward, x, index, inverse), base)
        yield Case("unpack_tokens", f"merge-{name}", "forward", merge[0], forward, {}, share=MOVER_SHARE)
        yield Case("unpack_tokens", f"merge-{name}", "backward", merge[1], backward, {}, share=MOVER_SHARE)
    maps = meta(batch, 16, 16, dtype=I64)
    call = partial(plan_tokens.plan_tokens_forward, maps, 2, 16, 1, count)
    floor = plan_tokens_bench.cost(batch)
    yield Case("plan_tokens", "plan-B256-16x16-w16", "forward", floor, call, {}, ms=PLAN_US / 1e3)


def entropy() -> Iterator[Case]:
    from d2it.kernels import kde_entropy

    batch = 256
    images = meta(batch, 3, 256, 256, dtype=F32)
    call = partial(kde_entropy.kde_entropy, images, 16, 256, -1.0, 1.0, 0.01, True)
    floor, ms = kde_entropy_bench.cost(batch, 256, 3, F32), batch * ENTROPY_US / 1e3
    name = f"B{batch}-256x256-C3-bins256-float32"
    yield Case("kde_entropy", name, "forward", floor, call, {}, ms=ms)
    if nvcc():
        yield Case("kde_entropy", name, "forward", floor, None, {}, (budget_cuda.entropy(batch),), ms=ms)


def neighbor_copy() -> Iterator[Case]:
    if nvcc() is None:
        return
    shape = {"batch": 256, "channels": 256, "side": 16}
    launches = {
        "": budget_cuda.neighbor_copy_rows(**shape),
        "-channels_last": budget_cuda.neighbor_copy_pixels(**shape),
    }
    for layout, (merge, split) in launches.items():
        made = partial(Case, "neighbor_copy", f"B256-C256-16x16-fill0.5-bfloat16{layout}", call=None, trips={})
        memory = torch.channels_last if layout else torch.contiguous_format
        forward, backward = neighbor_copy_bench.costs(256, 256, 16, (0.5, 0.5), BF16, memory)
        yield made("forward", forward, cuda=(merge,), share=MOVER_SHARE)
        yield made("backward", backward, cuda=(split,), share=MOVER_SHARE)


def optimizer() -> Iterator[Case]:
    from d2it.kernels import adamw

    size = 687_000_000  # the weights of D2iT-XL
    for dtype in (F32, BF16):  # of the weights; those in bfloat16 have float32 masters
        call, floor = (
            in_turn(*adamw.launches(size, averages=1, weights=dtype)),
            optimizer_bench.cost([((size,), dtype)]),
        )
        yield Case("optimizer", f"D2iT-XL-{str(dtype)[6:]}", "forward", floor, call, {}, share=MOVER_SHARE)


@functools.cache
def cases() -> list[Case]:
    """Every case that has a goal; those that share a kernel stand together."""
    return [*attention(), *modulation(), *gelu(), *movers(), *entropy(), *neighbor_copy(), *optimizer()]
