"""The CUDA kernels at the shapes of the goals: their launches, and how often the statements of their sources run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import neighbor_copy_bench
import torch

from d2it.ops.window_attention import _cuda_shared
from kernel_report.budget import CudaLaunch
from kernel_report.gpus import ARCHS

SMS = ARCHS["sm_90"]["sms"]
NEVER, ONCE = 0.0, 1.0
COPIED = "d2it::copy_async(to + i * kPerVector, row + i * kPerVector, (i"
FILE = "window_attention_cuda.cu"
LAST = "step(std::false_type(), start, s);"
# The compiler's lines name this call for nearly all stores of the three.
ANY = "attend<T, kWidth, Entries::kOnes>(f, at"


def mean(n: int, fill: float, of: Callable[[int], float]) -> float:
    """The mean over windows of n cells of what `of` gives for their tokens, where each region of four cells is fine
    with probability `fill`."""
    regions = n // 4
    return sum(math.comb(regions, k) * fill**k * (1 - fill) ** (regions - k) * of(4 * k) for k in range(regions + 1))


def tiles(count: int) -> int:
    """Of 16 rows."""
    return math.ceil(count / 16)


class Layout:
    """Where the pointers of the structures of csrc/window_attention_*.h lie."""

    SLOTS, SEGMENTS, BIAS, PROBLEM, HEADS = 0, 32, 48, 96, 48

    @staticmethod
    def heads(number: int) -> tuple[int, int]:
        return 0, Layout.PROBLEM + number * Layout.HEADS


def shared_by_windows(fill: float) -> dict[str, float]:
    """What forward and backward have in common: rows of whole vectors, a bias in float32, no segments. Regions of
    2 x 2 cells are fine or not, so positions lie two in a row, and four only where all exist."""
    return {
        "for (int i = 0; i < kVectors - part; i += kPerRow) { #pragma": NEVER,
        "if (p.segmented()) at.segments[place] =": NEVER,
        "store([&](T* row, int at, int there, uint2 x)": NEVER,
        "T pair[2];": NEVER,
        "if (column < width) row[column] = pair[0];": NEVER,
        "if (column + 1 < width) row[column + 1] = pair[1];": NEVER,
        "if (run == 4) return at<float4>(own, column.x);": ONCE if fill == 1 else 0.25,
        "const float2 a = at<float2>(own, column.x), b =": float(fill != 1),
        "return make_float4(at<float>(own, column.x), at<float>(own, column.y), at<float>(own": NEVER,
    }


def attention_forward(n: int, heads: int, width: int, fill: float, cells: int) -> CudaLaunch:
    windows = cells // n
    splits = min(16 * SMS // heads, windows)
    rows = round(fill * cells) * heads * width * 2
    everything = mean(n, fill, tiles)
    whole = mean(n, fill, lambda count: tiles(count) * (count // 64)) / everything
    broken = mean(n, fill, lambda count: tiles(count) * (count % 64 > 0)) / everything
    passes = mean(n, fill, lambda count: math.ceil(tiles(count) / 4))
    # Of the last 64 keys, where they are not all there: the tiles of 16, and those of them that are not whole.
    part = edge = 0.0
    if broken:
        ends = 4 * broken * everything
        part = mean(n, fill, lambda count: tiles(count) * tiles(count % 64)) / ends
        edge = mean(n, fill, lambda count: tiles(count) * (8 - count % 64 // 8) * float(count % 64 > 0)) / 2 / ends
    second = mean(n, fill, lambda count: max(tiles(count) - 8, 0))
    runs = {
        "for (; window < p.windows; window += p.splits) {": windows / splits,
        "for (int place = thread / kPerRow; place < rows;": passes,
        "const auto copy_queries = [&](int first) {": 2 / passes,
        "for (int first = warp * kTile; first < count; first += kWarps * kTile) {": everything / 8,
        "copy_queries(first + kWarps * kTile);": second / everything,
        "attend<T, kWidth, Entries::kNone>(f, at": NEVER,
        f"{ANY} => for (int r = 0; r < 2; ++r) entries[r] =": NEVER,
        f"{ANY} => float sums[1][kWidth / 8][4] = {{}}, most": NEVER,
        f"{ANY} => for (int start = 0; start < count; start += kKeys) {{": NEVER,
        f"{ANY} => for (int r = 0; r < 2; ++r) {{ const float sum": NEVER,
        f"{ANY} => store_columns(sums[0], inverse": 1 / 3,
        "for (int start = 0; start < count; start += kKeys) {": whole + broken,
        "step(std::true_type(), start, s);": whole / (whole + broken),
        LAST: broken / (whole + broken),
        "for (int j = 0; j < kKeys / 16; ++j) { if (j * 16 >= left) break; auto& part": part,
        f"{LAST} => for (int i = 0; i < 4; ++i) {{ const int key = j": edge,
        f"{LAST} => for (int j = 0; j < kKeys / 16; ++j) {{ if (!kWhole": part,
        **shared_by_windows(fill),
    }
    lanes = {COPIED: width / 8 / (math.ceil(width / 32) * 4)}
    pitch = (width // 8 | 1) * 8
    shared = 8 * 4 + 256 * 4 + 16 * n + (2 * n + 128) * pitch * 2
    tensors = {Layout.heads(i): rows for i in range(4)}
    tensors |= {
        (0, Layout.SLOTS): cells * 4,
        (0, Layout.SEGMENTS): 0,
        (0, Layout.BIAS): heads * n * n * 4,
        (0, 288): cells * heads * 4,
    }
    kernel = f"attention_forward<__nv_bfloat16, {width}>"
    return CudaLaunch(FILE, kernel, splits * heads, 256, shared, runs, tensors, lanes)


def attention_backward(n: int, heads: int, width: int, fill: float, cells: int) -> tuple[CudaLaunch, CudaLaunch]:
    """The one pass, and the sum of its blocks' parts of the bias's gradient, which is in float32 as the bias is."""
    windows = cells // n
    splits = max(1, min(windows, SMS // heads))
    size, row = round(fill * cells) * heads * width * 2, (math.ceil(n / 32) * 32 + 8) * 4
    shared = _cuda_shared(n, width)
    resident = min((ARCHS["sm_90"]["block_shared"] - shared) // row, n)

    def blocks(count: int) -> int:
        return math.ceil(count / 32)

    each = mean(n, fill, blocks)
    more = mean(n, fill, lambda count: max(blocks(count) - 1, 0))
    own = mean(n, fill, tiles) / 16
    with_keys = mean(n, fill, lambda count: blocks(count) * tiles(count))
    steps = mean(n, fill, lambda count: tiles(count) ** 2)
    fours = mean(n, fill, lambda count: tiles(count) * (tiles(count) // 8))
    halves = mean(n, fill, tiles)
    # Pairs of tiles of which some are not there: those of the last rows.
    edges = mean(n, fill, lambda count: float(count % 16 > 0) * (2 * tiles(count) - 1)) / steps
    whole = float(fill == 1)
    runs = {
        "for (int i = threadIdx.x; i < static_cast<int>(b.block / 16); i += kBackwardThreads)": n * row / 16 / 512,
        "for (int i = threadIdx.x; i < static_cast<int>(b.resident * b.row / 16); i += kBackwardThreads)": resident
        * row
        / 16
        / 512,
        "for (; window < p.windows; window = fixed.number + step) {": windows / splits,
        "walk<false, true>();": NEVER,
        "for (unsigned place = d2it::opaque(threadIdx.x) / kPerRow; place < there;": mean(
            n, fill, lambda count: math.ceil(tiles(count) / 8)
        ),
        "if (thread < kThreads) {": 0.5,
        "if (thread == kThreads) fixed.find(": 1 / 16,
        "if (key < there) {": 0.5,
        "to.lse[mine] = kInfinity;": NEVER,
        "copy_row<T, kWidth>(to, first + part * kPerVector * column": NEVER,
        "if (copies_next(turn(-1))) {": 1 / 8,
        "for (int block = 0;; ++block) {": each,
        "store_queries(block - 1);": halves / each / 8,
        "if (copies) fetch<kDk>(block + 1);": more / each / 8,
        "if (copies) finish_copies<kDk>(block + 1);": more / each / 8,
        "if (first_key < count) {": with_keys / each / 16,
        "if (from == 0 || query + from < count) step<kDk, kDv>(": steps / with_keys / 2,
        "if (!whole) {": edges,
        "else { __syncwarp();": NEVER,
        "const unsigned columns[4] = {where.x": NEVER,
        "for (int i = 0; i < 8; ++i) s[0][i / 4][i % 4] = Bias::at<float>(": NEVER,
        "float4 x[2];": whole,
        "for (int r = 0; r < 2; ++r) { x[r] = *in(float4{}": whole,
        "for (int r = 0; r < 2; ++r) { if (there(r, 0))": whole,
        "else if (runs == kSummed + 2) { float2 x[2][2];": 1 - whole,
        "const unsigned columns[4] = {column.x": NEVER,
        "for (int i = 0; i < 8; ++i) x[i] =": NEVER,
        "for (int i = 0; i < 8; ++i) { if (there(i / 4, i % 4))": NEVER,
        "for (; tiles >= kAtOnce; tiles -= kAtOnce) {": fours / halves,
        "for (; tiles > 0; --tiles) {": (steps - 8 * fours) / halves,
        "sum_queries<0, kOwn>(block);": 0.5,
        "sum_queries<kOwn, kUnits - kOwn>(block);": 0.5,
        "for (int r = 0; r < 2; ++r) { const int key = own + lane / 4": own,
        "if constexpr (kDk) store_columns(dk_sums[0],": own,
        "if constexpr (kDv) store_columns(dv_sums[0],": own,
        **shared_by_windows(fill),
    }
    lanes = {
        COPIED: width / 8 / (math.ceil(width / 32) * 4),
        "if (part == 0) {": 0.25,
    }
    total = splits * heads * n * row
    tensors = {Layout.heads(i): size for i in range(5)}
    tensors |= {(0, 344 + 48 * i): size for i in range(3)}
    tensors |= {
        (0, Layout.SLOTS): cells * 4,
        (0, Layout.SEGMENTS): 0,
        (0, Layout.BIAS): heads * n * n * 4,
        (0, 336): cells * heads * 4,
        (0, 488): total,
    }
    kernel = f"attention_backward<__nv_bfloat16, {width}, 256>"
    one_pass = CudaLaunch(FILE, kernel, splits * heads, 512, shared + resident * row, runs, tensors, lanes)
    return one_pass, sum_of_blocks(n, heads, splits)


def sum_of_blocks(n: int, heads: int, splits: int) -> CudaLaunch:
    """The sum of the blocks' parts of the bias's gradient."""
    side = math.ceil(n / 32)
    runs = {
        "for (int i = threadIdx.x / kWarp; i < kSide; i += kWarps) { float sum": 4.0,
        "for (int first = 0; first < splits; first += kAtOnce) {": math.ceil(splits / 8),
        "for (int head = first_head; head < last_head; ++head) {": ONCE,
        "for (int i = threadIdx.x / kWarp; i < kSide; i += kWarps) { if (query + i < n": 4.0,
    }
    tensors = {(0, 0): splits * heads * n * (math.ceil(n / 32) * 32 + 8) * 4, (1, 0): heads * n * n * 4}
    return CudaLaunch(FILE, "sum_blocks<float>", heads * side**2, 256, 0, runs, tensors)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Means over groups of small windows, as csrc/window_attention_groups.h makes them."""

    chunks: int
    per_chunk: float
    rows: float
    """Of a group."""
    tiles: float
    """Of 16 rows."""
    pairs: float
    """Of tiles that have windows in common."""
    masked: float
    """The share of these in which a pair of rows is of two windows, or of a row that is not there."""
    halves: float
    """Of 32 rows."""
    alone: float
    """The share of them that are one window, and of the pairs of tiles those in such."""
    pairs_alone: float
    passes: float
    """Of 32 queries that share a window with a key."""

    @staticmethod
    def of(n: int, fill: float, cells: int) -> Groups:
        """Of grain maps whose regions are drawn at random."""
        windows = min(768 // n, 64)
        regions = torch.rand(64, windows, n // 4, generator=torch.Generator().manual_seed(0)) < fill
        found = [group for chunk in (4 * regions.sum(-1)).tolist() for group in Groups.split(chunk)]
        counts = [sum(group) for group in found]
        pairs = masked = pairs_alone = passes = 0.0
        for group, count in zip(found, counts):
            starts = [sum(group[:i]) for i in range(len(group) + 1)]
            window = [i for i, size in enumerate(group) for _ in range(size)]
            for tile in range(0, count, 16):
                first, last = starts[window[tile]], starts[window[min(tile + 16, count) - 1] + 1] - 1
                others = range(first // 16, last // 16 + 1)
                pairs += len(others)
                pairs_alone += len(others) * (len(group) == 1)
                masked += sum(len(group) > 1 or max(tile, 16 * other) + 16 > count for other in others)
            passes += sum(size * math.ceil(size / 32) for size in group)
        whole = len(found)
        return Groups(
            chunks=math.ceil(cells / (n * windows)),
            per_chunk=whole / 64,
            rows=sum(counts) / whole,
            tiles=sum(map(tiles, counts)) / whole,
            pairs=pairs / whole,
            masked=masked / pairs,
            halves=sum(math.ceil(count / 32) for count in counts) / whole,
            alone=sum(len(group) == 1 for group in found) / whole,
            pairs_alone=pairs_alone / pairs,
            passes=passes / sum(counts),
        )

    @staticmethod
    def split(counts: list[int]) -> list[list[int]]:
        """The windows of a chunk in groups, each by its rows; groups without any are left out."""
        found: list[list[int]] = [[]]
        for count in counts:
            if sum(found[-1]) + count > 64 or len(found[-1]) == 32:
                found.append([])
            found[-1].append(count)
        return [group for group in found if sum(group)]


OVER_CHUNKS = (
    "for (of.at = blockIdx.x / p.heads / p.bias_windows * each; of.at < of.count; of.at += p.splits * each) { "
    "of.windows = min(each, of.count - of.at); const int run ="
)
OVER_GROUPS = (
    "for (int window = 0; window < of.windows;) { const Group group(at, window, window < apart); if (group.count > 0) {"
)


def shared_by_groups(groups: Groups, width: int, fill: float) -> tuple[dict[str, float], dict[str, float]]:
    """Runs and lanes that forward and backward of small windows have in common."""
    runs = {
        "if (slots[i] < 0) absent(": float(fill < 1),
        "if (at.segments) at.segments[row] =": NEVER,
        "for (int place = threadIdx.x / kPerRow; place < rows; place += kGroupThreads / kPerRow) {": groups.tiles / 2,
        **shared_by_windows(fill),
    }
    rows = groups.rows / (16 * groups.tiles)
    vectors = width / 8 / (math.ceil(width / 32) * 4)
    vectors_of_rows = "if (i + kPerRow <= kVectors || part < kVectors - i) d2it::copy_async(copy + i"
    return runs, {vectors_of_rows: rows * vectors}


def groups_forward(n: int, heads: int, width: int, fill: float, cells: int) -> CudaLaunch:
    groups = Groups.of(n, fill, cells)
    splits = min(16 * SMS // heads, groups.chunks)
    size = round(fill * cells) * heads * width * 2
    each, lanes = shared_by_groups(groups, width, fill)
    part = groups.pairs / groups.tiles / 4
    runs = {
        f"{OVER_CHUNKS} close_chunk( p, at, of, [&]": groups.chunks / splits,
        f"{OVER_GROUPS} copy_group": groups.per_chunk,
        "const bool finite = attend_group<T, kWidth>(": groups.tiles / 4,
        "if (j >= range.x && j <= range.y) { auto& part": part,
        "if (mixed || j * 16 + 16 > group.count) {": groups.masked,
        "if (at.segments && alike && max(query[r], key + e) < group.count)": NEVER,
        "if (j >= range.x && j <= range.y) { uint32_t": part,
        **each,
    }
    lanes |= {
        "lse_of(f.lse, p, window, head)[position] = kInfinity;": 1 - fill,
        "if (there && quad == 0)": 0.25 * groups.rows / (16 * groups.tiles),
    }
    pitch = (width // 8 | 1) * 8
    tensors = (
        {Layout.heads(i): size for i in range(4)} | attention_tensors(n, heads, cells) | {(0, 288): cells * heads * 4}
    )
    kernel = f"groups_forward<__nv_bfloat16, {width}>"
    return CudaLaunch(FILE, kernel, splits * heads, 128, 5136 + 3 * 128 * pitch, runs, tensors, lanes)


def groups_backward(n: int, heads: int, width: int, fill: float, cells: int) -> tuple[CudaLaunch, CudaLaunch]:
    groups = Groups.of(n, fill, cells)
    splits = max(1, min(groups.chunks, 6 * SMS // heads))
    size, entries = round(fill * cells) * heads * width * 2, n * (math.ceil(n / 32) * 32 + 8)
    each, lanes = shared_by_groups(groups, width, fill)
    warps = groups.tiles / 4
    runs = {
        f"{OVER_CHUNKS.replace('each', 'each()')} close_chunk(p, at, of, []": groups.chunks / splits,
        f"{OVER_GROUPS} const GroupWork": groups.per_chunk,
        "for (int i = threadIdx.x; i < entries; i += kGroupThreads) near[i] =": n * n / 4 / 128,
        "for (int i = threadIdx.x; i < entries; i += kGroupThreads) reinterpret_cast<float4*>(far": n * n / 4 / 128,
        "work.sum_delta();": warps,
        "bool finite = work.walk(bias);": warps,
        "finite &= work.store_queries();": warps,
        "if (row < group.count) { const int place": 0.5,
        "for (int u = range.x; u <= range.y; ++u) {": groups.pairs / groups.tiles,
        "if (mixed() || max(tile, u * 16) + 16 > group.count) {": groups.masked,
        "if (at.segments && alike && max(key[r], query + e) < group.count)": NEVER,
        "for (int t = range.x; t <= range.y; ++t) {": groups.pairs / groups.tiles,
        "if (alone() && b.sums && key[r] < group.count)": groups.pairs_alone,
        "if (run == 4) { if (there <= 0) return;": float(fill == 1),
        "if (there > 0) to[column.x] += x.x;": float(fill < 1),
        "if (there > 1) to[column.y] += x.y;": float(fill < 1),
        "if (there > 2) to[column.z] += x.z;": float(fill < 1),
        "if (there > 3) to[column.w] += x.w;": float(fill < 1),
        "if (b.sums && !work.alone()) {": 1 - groups.alone,
        "for (int half = 0; half < group.count; half += kWarp) {": groups.halves,
        "for (; keys; keys &= keys - 1) {": groups.rows / 4 / groups.halves,
        "for (int query = at.starts[window] - group.first + lane; query < end; query += kWarp)": groups.passes,
        **each,
    }
    lanes |= {"if (row < group.count) { const int place": groups.rows / 64}
    pitch = (width // 8 | 1) * 8
    shared = 5136 + 512 * pitch + max(64 * 68 * 4, 128 * pitch) + 512 + 4 * n * n
    tensors = {Layout.heads(i): size for i in range(5)} | {(0, 344 + 48 * i): size for i in range(3)}
    tensors |= attention_tensors(n, heads, cells)
    tensors |= {(0, 336): cells * heads * 4, (0, 488): splits * heads * entries * 4}
    kernel = f"groups_backward<__nv_bfloat16, {width}>"
    own = CudaLaunch(FILE, kernel, splits * heads, 128, shared, runs, tensors, lanes)
    return own, sum_of_blocks(n, heads, splits)


def attention_tensors(n: int, heads: int, cells: int) -> dict[tuple[int, int], int]:
    """Slots, segments and the bias."""
    return {(0, Layout.SLOTS): cells * 4, (0, Layout.SEGMENTS): 0, (0, Layout.BIAS): heads * n * n * 4}


def window_forward(n: int, heads: int, width: int, fill: float, cells: int) -> CudaLaunch:
    """The kernel that windows of n positions take."""
    return (groups_forward if n <= 64 else attention_forward)(n, heads, width, fill, cells)


def window_backward(n: int, heads: int, width: int, fill: float, cells: int) -> tuple[CudaLaunch, CudaLaunch]:
    """The kernels that windows of n positions take."""
    return (groups_backward if n <= 64 else attention_backward)(n, heads, width, fill, cells)


def unnamed_rows(rows: int, row_bytes: int, cells: int) -> tuple[CudaLaunch, CudaLaunch]:
    """What clears the rows that no slot names, where every row has a slot."""
    mark = CudaLaunch(
        FILE, "mark_named", math.ceil(cells / 256), 256, 0, {}, {(0, Layout.SLOTS): cells * 4, (1, 0): rows}
    )
    runs = {"for (; found; found &= found - 1) {": NEVER}
    tensors = {(0, 48 * i): rows * row_bytes for i in range(3)} | {(1, 0): rows}
    return mark, CudaLaunch(FILE, "clear_unnamed<__nv_bfloat16>", math.ceil(rows / 256), 256, 0, runs, tensors)


OVER_CHANNELS = "for (int u = 0; u < kChannelsPerThread; ++u) {"
OVER_GRAINS = (
    "for (int i = 0; i < grads.count; ++i) { const View<T>& view = grads.view[i]; const int shift = grads.shift[i]; "
    "T* to = view.at(b, c,"
)
OVER_ROWS = "for (int y = 0; y < kRegion >> shift; ++y) { #pragma unroll 1 for (int x = 0; x < kRegion >> shift; ++x)"


def neighbor_copy_rows(batch: int, channels: int, side: int) -> tuple[CudaLaunch, CudaLaunch]:
    """Forward and backward in bfloat16 of two grains on a map of side x side regions, half of them fine, columns
    adjacent: a thread has eight columns, which are four regions, and four channels."""
    # Of a grain the sectors are read that hold it, by whatever kernel.
    layout = torch.contiguous_format
    coarse, fine = neighbor_copy_bench.shares_moved(batch, channels, side, (0.5, 0.5), torch.bfloat16, layout)
    cells = batch * channels * side**2 * 2
    sizes = {"map": batch * side**2 * 8, "grains": (cells, 4 * cells), "all": 4 * cells}
    # Each of these is one of the two turns of the loop over grains.
    runs = {
        "for (int i = 0; i < latents.count; ++i) {": 2.0,
        "if (shift == 0) { blend(": 0.5,
        "} else if (shift == 1) { blend(": 0.5,
        "} else if (shift == 2 || sizeof(T) == 4) {": NEVER,
        "blend([](const T* p) { return load_repeated<sizeof(T) == 2 ? 3 : 2>(p); });": NEVER,
    }
    lanes = {"if (shift == 0) { blend(": fine, "} else if (shift == 1) { blend(": coarse}
    positions = side * 2 * side * 2 // 8
    forward = CudaLaunch(
        "neighbor_copy_cuda.cu", "merge_rows<unsigned short>", batch * channels * positions // 4 // 256, 256, 0, runs,
        {(0, 0): sizes["grains"][0], (0, 48): sizes["grains"][1], (1, 0): sizes["map"], (2, 0): sizes["all"]}, lanes,
    )  # fmt: skip
    runs = {
        f"{OVER_CHANNELS} const int64_t c = first + u * blockDim.y; if (c >= channels)": 4.0,
        f"{OVER_GRAINS} region_y": 2.0,
        "if (shift == 0) { write_cells<0>": 0.5,
        "} else if (shift == 1) { write_cells<1>": 0.5,
    }
    backward = CudaLaunch(
        "neighbor_copy_cuda.cu", "sum_rows<__nv_bfloat16, 2>", batch * channels * positions // 2 // 4 // 256, 256, 0,
        runs, {(0, 0): sizes["all"], (1, 0): sizes["map"], (2, 0): sizes["grains"][0], (2, 48): sizes["grains"][1]},
    )  # fmt: skip
    return forward, backward


def neighbor_copy_pixels(batch: int, channels: int, side: int) -> tuple[CudaLaunch, CudaLaunch]:
    """The same with channels adjacent: a thread has eight channels of a region of 2 x 2 pixels."""
    cells, regions = batch * channels * side**2 * 2, batch * side**2
    blocks = regions * channels // 8 // 256
    # The four pixels of a coarse region are one cell, which is read once.
    forward = CudaLaunch(
        "neighbor_copy_cuda.cu", "merge_pixels<2>", blocks, 256, 0, {},
        {(0, 0): cells, (0, 48): 4 * cells, (1, 0): regions * 8, (2, 0): 4 * cells},
        {"row[i] = __ldg(": 0.5 + 0.5 / 4},
    )  # fmt: skip
    # Of two grains one is another's, with zeros in its one or four cells, and one the region's own, half of the
    # time with four cells and half of the time with the sum of four.
    runs = {
        f"{OVER_GRAINS} top": 2.0,
        "if (grain != i) {": 0.5,
        f"{OVER_ROWS} store(": 1.5,
        "for (int x = 0; x < kRegion >> shift; ++x) store(": 2.5 / 1.5,
        "} else if (shift == 0) { #pragma": 0.25,
        "for (int y = 0; y < kRegion; ++y) { T row": 2.0,
        f"{OVER_ROWS} {{ const": 0.25,
        "for (int x = 0; x < kRegion >> shift; ++x) { const": ONCE,
        "for (int l = 0; l < 1 << shift; ++l) { #pragma unroll 2": 2.0,
        "for (int m = 0; m < 1 << shift; ++m) { T in": ONCE,
    }
    backward = CudaLaunch(
        "neighbor_copy_cuda.cu", "sum_pixels<__nv_bfloat16, 2>", blocks, 256, 0, runs,
        {(0, 0): 4 * cells, (1, 0): regions * 8, (2, 0): cells, (2, 48): 4 * cells},
    )  # fmt: skip
    return forward, backward


def entropy(batch: int) -> CudaLaunch:
    """Images of 256 x 256 in float32, three channels, 256 bins."""
    regions, warps = batch * 16 * 16, 4
    runs = {"if (out.grains) {": NEVER}
    tensors = {(0, 0): batch * 3 * 256 * 256 * 4, (2, 0): regions * 4, (2, 8): 0, (2, 16): 0}
    kernel = "entropy_of_moments<float, 3, false>"
    return CudaLaunch("kde_entropy_cuda.cu", kernel, regions // warps, 32 * warps, 0, runs, tensors)
