// window_attention on CUDA, backward.
//
// One kernel, five products, each of q, k, v, grad and out read once and dq, dk, dv written once: 8
// rows where the floor (no `out`) is 7. A warp has 16 or 32 keys and their dk and dv in registers, and all
// warps walk over the queries, 32 at a time; scores are held transposed, so that P^T and dS^T enter dv and dk
// from registers. dS^T also goes to shared memory, where dq of the 32 queries is summed over all keys.
//
// The gradient of the bias is a float32 sum of dS at (position of the key, position of the query) over the
// windows of a block, N x N: 256 KB at N = 256, more than a multiprocessor has. What the ways to hold it move
// between a multiprocessor and L2, by count, for a window and head of n = 256 rows of D = 72, in row-units of
// 2 n D = 37 KB; 8 of them have to move in any case:
//
// - A block for every 64 or 128 positions, its part of the sum in shared memory: every such block reads q and
//   grad, or k and v, and one result is a sum over blocks, 2 to 4 units each way in float32, for which blocks
//   wait for each other. (A cluster does so without L2, on sm_90 alone.)
//
// - A second kernel for the sum: 4 more units, from HBM, and two of the five products once more.
//
// - A sum of the block's own in global memory, which stays in L2: 4 n^2 bytes each way, 14 units.
//
// This is the last, with as many rows of the sum in shared memory as fit beside the rest: 101 of 256 on an
// H100, which leaves 9 units; all of them for N <= 160. HBM sees the sum at the end alone: 34 MB for 16 heads
// of 8 blocks, 1 % of what 1,024 full windows move. A pair of a window is added by the one thread that has
// it, windows come in order, and blocks are added in order: no atomics, the same bits every time.
#pragma once

#include "window_attention_cuda.h"

namespace {

template <typename T>
struct Backward {
  Problem p;
  Heads<const T> q, k, v, grad, out;
  const float* lse;
  Heads<T> dq, dk, dv;
  float* sums;         // (splits, bias_windows, heads, n, sums_pitch): dS, keys before queries, or null
  unsigned block, row; // bytes of a block's part of them, and of a row

  int resident; // rows of them in shared memory

  // Of this block; computed where it is used, since registers are full.
  __device__ char* sums_of_block() const {
    return reinterpret_cast<char*>(sums) + static_cast<uint64_t>(d2it::opaque(blockIdx.x)) * block;
  }
};

template <int kWidth>
constexpr int backward_bytes(int n, bool segments) {
  const int rows = round_up(n, kTile);
  return window_bytes(n, segments) + 2 * rows * kPitch<kWidth> * 2 +
         kStages * kBlock * (3 * kPitch<kWidth> * 2 + 2 * 4) + rows * kPairsPitch * 2;
}

// Where things lie in shared memory, beside the rows of the sums at its end.
template <typename T, int kWidth>
struct Stage {
  T *q, *grad, *out; // (kBlock, kPitch)
  float *lse, *delta;
  T* ds; // (rows of the window, kPairsPitch), keys before queries

  __device__ Stage(char* shared, int number, int rows) {
    constexpr int kRow = kPitch<kWidth>;
    T* stages = reinterpret_cast<T*>(shared) + 2 * rows * kRow;
    q = stages + number * (3 * kBlock * kRow);
    grad = q + kBlock * kRow;
    out = grad + kBlock * kRow;
    ds = stages + kStages * (3 * kBlock * kRow);

    lse = reinterpret_cast<float*>(ds + rows * kPairsPitch) + number * (2 * kBlock);
    delta = lse + kBlock;
  }
};

template <typename T, int kWidth>
__device__ inline char* behind_stages(char* shared, int rows) {
  return reinterpret_cast<char*>(Stage<T, kWidth>(shared, kStages, rows).lse);
}

// The block at work on one window.
template <typename T, int kWidth>
struct Work {
  const Backward<T>& b;
  const Window& at;
  char* shared;
  float* near; // the sum's (resident, sums_pitch) in shared memory

  int window, head, count, rows, run;

  static constexpr int kRow = kPitch<kWidth>;
  __device__ Stage<T, kWidth> stage(int block) const { return {shared, block % kStages, rows}; }
  __device__ const T* k() const { return reinterpret_cast<const T*>(shared); }
  __device__ const T* v() const { return k() + rows * kRow; }

  // Starts to copy a block of queries.
  __device__ void fetch(int block) const {
    const Problem& p = b.p;
    const Stage<T, kWidth> to = stage(block);
    constexpr int kHalf = kThreads / 2;
    static_assert(kHalf == kBlock * kPerRow);
    const int thread = d2it::opaque(threadIdx.x); // not kept: registers are full
    const int place = thread % kHalf / kPerRow, mine = row_in_place(place);
    const int query = block * kBlock + mine;
    const bool there = query < count;
    const int64_t base = p.base(window);
    const int row = there ? at.rows[query] : 0, part = thread % kPerRow;
    const auto copy = [&](T* rows, const Heads<const T>& from) {
      copy_row<T, kWidth>(rows + place * kRow + part * kPerVector, from,
                          from.at(base, row, head) + part * kPerVector * from.column, part,
                          there ? p.width : 0);
    };
    if (threadIdx.x < kHalf) {
      copy(to.q, b.q);
      if (threadIdx.x % kPerRow == 0) {
        // The weights of a query that is not there are zero.
        if (there)
          d2it::copy_async(to.lse + mine, b.lse + (static_cast<int64_t>(window) * p.heads + head) * p.n +
                                              at.positions[query]);
        else
          to.lse[mine] = kInfinity;
      }
    } else {
      copy(to.grad, b.grad);
      copy(to.out, b.out);
    }
    d2it::commit_copies();
  }

  // delta = rowsum(out * grad) of a block whose copies have arrived: the diagonal of their product, 16 rows
  // by each of the last two warps, which have the least of dq.
  __device__ void sum_delta(int block) const {
    const int own = static_cast<int>(threadIdx.x / kWarp) - (kWarps - kBlock / 16);
    if (own < 0) return;
    const Stage<T, kWidth> from = stage(block);
    const unsigned lane = threadIdx.x % kWarp, row = lane / 4;
    float c[1][2][4] = {};
    const int first = own * 16 * kRow;
    multiply_rows<T, kWidth, 1, 1>(c, from.grad + first, 0, from.out + first, lane_in<kWidth>(lane));
    if (lane % 4 != row / 2) return;
    from.delta[own * 16 + row_in_place(row)] = row % 2 ? c[0][0][1] : c[0][0][0];
    from.delta[own * 16 + row_in_place(row + 8)] = row % 2 ? c[0][1][3] : c[0][1][2];
  }

  // Four queries' part of a row of the sum. Queries that are not there have one as well, which is not stored.
  __device__ float4 load_four(const char* row, int4 column) const {
    const auto at = [&](int i) { return reinterpret_cast<const float*>(row + i * 4u); };
    if (run == 4) return *reinterpret_cast<const float4*>(at(column.x));
    if (run == 2) {
      const auto x = *reinterpret_cast<const float2*>(at(column.x)),
                 y = *reinterpret_cast<const float2*>(at(column.z));
      return make_float4(x.x, x.y, y.x, y.y);
    }
    return make_float4(*at(column.x), *at(column.y), *at(column.z), *at(column.w));
  }

  // The first `there` of them.
  __device__ void store_four(char* row, int4 column, int there, float4 x) const {
    if (there <= 0) return;
    const auto at = [&](int i) { return reinterpret_cast<float*>(row + i * 4u); };
    if (run == 4) {
      *reinterpret_cast<float4*>(at(column.x)) = x;
    } else if (run == 2) {
      *reinterpret_cast<float2*>(at(column.x)) = {x.x, x.y};
      if (there > 2) *reinterpret_cast<float2*>(at(column.z)) = {x.z, x.w};
    } else {
      *at(column.x) = x.x;
      if (there > 1) *at(column.y) = x.y;
      if (there > 2) *at(column.z) = x.z;
      if (there > 3) *at(column.w) = x.w;
    }
  }

  // kSpans times 16 queries, from `from` on in a block, against kTiles tiles of 16 keys of the warp: kDv adds
  // to dv, kDk to dk and the sum of the bias's gradient, and leaves dS in shared memory. Returns nothing but
  // sums.
  template <int kTiles, int kSpans, bool kDk, bool kDv, int kSums>
  __device__ void step(const Bias<T>& bias, int block, int from, int first_key,
                       float (&dk)[kSums][kWidth / 8][4], float (&dv)[kSums][kWidth / 8][4]) const {
    const Problem& p = b.p;
    const Stage<T, kWidth> in = stage(block);
    // What follows from the lane is cheaper to compute again than to keep.
    const unsigned lane = d2it::opaque(threadIdx.x) % kWarp, quad = lane % 4;
    const Lane own = lane_in<kWidth>(lane);
    constexpr int kApart = kWarps * kTile; // keys between the tiles of a warp
    const float scale = p.scale * kLog2e;
    const int first_query = block * kBlock + from;

    float s[kTiles][2 * kSpans][4] = {};
    multiply_rows<T, kWidth, kTiles, kSpans>(s, k() + first_key * kRow, kApart * kRow, in.q + from * kRow,
                                             own);
    const bool edge = first_query + 16 * kSpans > count || first_key + (kTiles - 1) * kApart + kTile > count;
#pragma unroll
    for (int j = 0; j < kSpans; ++j) {
      const int query = first_query + j * 16 + static_cast<int>(quad * 4);
      const float4 found = *reinterpret_cast<const float4*>(in.lse + from + j * 16 + quad * 4);
      const float lse[4] = {found.x, found.y, found.z, found.w};
      const int4 where = *reinterpret_cast<const int4*>(at.positions + query);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int key = first_key + i * kApart + static_cast<int>(lane / 4) + 8 * r;
          const float4 b = p.bias ? bias.four(at.positions[key], where) : make_float4(0, 0, 0, 0);
          const float added[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& x = s[i][2 * j + e / 2][2 * r + e % 2];
            x = d2it::exp2_fast(fmaf(added[e], kLog2e, fmaf(x, scale, -lse[e])));
          }
          if (edge || at.segments) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const bool there = key < count && query + e < count;
              if (!there || (at.segments && at.segments[key] != at.segments[query + e]))
                s[i][2 * j + e / 2][2 * r + e % 2] = 0.0f;
            }
          }
        }
      }
    }
    if constexpr (kDv) {
      uint32_t weights[kTiles][kSpans][4];
      pack_pairs(weights, s);
      add_weighted<T, kWidth>(dv, weights, in.grad + from * kRow, own);
    }
    if constexpr (kDk) {
      // A tile at a time, since registers are full: the parts of the sum come, from L2 perhaps, while dP is
      // formed.
      uint32_t weights[kTiles][kSpans][4];
      char* far = b.sums_of_block();

#pragma unroll
      for (int j = 0; j < kSpans; ++j) {
        const int column = from + j * 16 + static_cast<int>(quad * 4),
                  there = count - (block * kBlock + column);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const int tile = first_key + i * kApart, key = tile + static_cast<int>(lane / 4);
          const int4 where = *reinterpret_cast<const int4*>(at.positions + block * kBlock + column);
          float4 before[2];
          char* row[2];
          if (b.sums) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int position = at.positions[key + 8 * r];
              // In one memory or the other.
              row[r] = (position < b.resident ? reinterpret_cast<char*>(near) : far) + position * b.row;

              before[r] = load_four(row[r], where);
            }
          }
          float dp[1][2][4] = {};
          multiply_rows<T, kWidth, 1, 1>(dp, v() + tile * kRow, 0, in.grad + (from + j * 16) * kRow, own);
          const float4 delta = *reinterpret_cast<const float4*>(in.delta + column);
          T* to = in.ds + key * kPairsPitch + column;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float x = s[i][2 * j][2 * r] * (dp[0][0][2 * r] - delta.x);
            const float y = s[i][2 * j][2 * r + 1] * (dp[0][0][2 * r + 1] - delta.y);
            const float z = s[i][2 * j + 1][2 * r] * (dp[0][1][2 * r] - delta.z);
            const float w = s[i][2 * j + 1][2 * r + 1] * (dp[0][1][2 * r + 1] - delta.w);
            if (b.sums) {
              const float4 old = before[r];
              store_four(row[r], where, key + 8 * r < count ? there : 0,
                         make_float4(old.x + x, old.y + y, old.z + z, old.w + w));
            }
            weights[i][j][r] = d2it::pack<T>(x, y);
            weights[i][j][2 + r] = d2it::pack<T>(z, w);
            // One by one, so that the registers of the fragment stay what they are.
            auto* words = reinterpret_cast<volatile uint32_t*>(to + 8 * r * kPairsPitch);
            words[0] = weights[i][j][r], words[1] = weights[i][j][2 + r];
          }
        }
      }
      add_weighted<T, kWidth>(dk, weights, in.q + from * kRow, own);
    }
  }

  // Pairs, rounded, as one a for every 16 queries.
  template <int kTiles, int kSpans>
  static __device__ void pack_pairs(uint32_t (&to)[kTiles][kSpans][4],
                                    const float (&s)[kTiles][2 * kSpans][4]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kSpans; ++j) {
        to[i][j / 2][j % 2 * 2] = d2it::pack<T>(s[i][j][0], s[i][j][1]);
        to[i][j / 2][j % 2 * 2 + 1] = d2it::pack<T>(s[i][j][2], s[i][j][3]);
      }
    }
  }

  // dq of a block of queries: a warp has 16 of them and every fourth 16 columns, the first also the last 8.
  __device__ void store_queries(int block) const {
    const Problem& p = b.p;
    const Stage<T, kWidth> in = stage(block);
    const int thread = d2it::opaque(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const int own = warp % 2 * 16, group = warp / 2, first = block * kBlock + own;
    constexpr int kGroups = kWarps / 2, kUnits = kWidth / 16;
    if (first >= count) return;
    T* row[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first + lane / 4 + 8 * r;
      row[r] = query < count ? b.dq.at(p.base(window), at.rows[query], head) : nullptr;
    }
    const float factor[2] = {p.scale, p.scale};
    const T* ds = in.ds + own + across_first(kPairsPitch, lane);
    const T* keys = k() + group * 16 + down_first(kRow, lane);
    constexpr bool kTail = kWidth % 16 != 0;
    constexpr int kMost = (kUnits + kGroups - 1) / kGroups;
    const bool tailed = kTail && group == kUnits % kGroups;
    float c[kMost][2][4] = {}, tail[1][4] = {};
    const auto sum = [&](auto with_tail) {
#pragma unroll 1
      for (int start = 0; start < count; start += kKeys, ds += kKeys * kPairsPitch, keys += kKeys * kRow) {
#pragma unroll
        for (int j = 0; j < kKeys / 16; ++j) {
          if (start + j * 16 >= count) break;
          uint32_t x[4];
          d2it::load_matrices_transposed(x, ds + j * (16 * kPairsPitch));
#pragma unroll
          for (int u = 0; u < kMost; ++u) {
            if (kUnits % kGroups != 0 && group + u * kGroups >= kUnits) break;
            uint32_t y[4];
            d2it::load_matrices_transposed(y, keys + j * (16 * kRow) + u * kGroups * 16);
            d2it::multiply_add<T>(c[u][0], x, y[0], y[1]);
            d2it::multiply_add<T>(c[u][1], x, y[2], y[3]);
          }
          if constexpr (with_tail.value) {
            uint32_t y[2];
            d2it::load_matrices_transposed(y, keys + j * (16 * kRow) + (kUnits - kUnits % kGroups) * 16);
            d2it::multiply_add<T>(tail[0], x, y[0], y[1]);
          }
        }
      }
    };
    if (tailed) {
      sum(std::integral_constant<bool, kTail>());
    } else {
      sum(std::false_type());
    }
#pragma unroll
    for (int u = 0; u < kMost; ++u) {
      const int unit = group + u * kGroups;
      if (unit < kUnits) store_columns(c[u], factor, row, unit * 16, p.width, b.dq.vectors);
    }
    if (tailed) store_columns(tail, factor, row, kUnits * 16, p.width, b.dq.vectors);
  }

  // All queries; block 0 is on its way. The sums of kTiles tiles of keys are written at the end.
  template <bool kDk, bool kDv>
  __device__ void walk(const Bias<T>& bias) const {
    const Problem& p = b.p;
    const int first_key = threadIdx.x / kWarp * kTile;
    const int blocks = (count + kBlock - 1) / kBlock;
    constexpr int kApart = kWarps * kTile;
    const int tiles = first_key >= count ? 0 : first_key + kApart >= count ? 1 : 2;
    float dk[2][kDk ? kWidth / 8 : 1][4] = {}, dv[2][kDv ? kWidth / 8 : 1][4] = {};
    auto& dk_sums = reinterpret_cast<float (&)[2][kWidth / 8][4]>(dk);
    auto& dv_sums = reinterpret_cast<float (&)[2][kWidth / 8][4]>(dv);
    d2it::wait_for_copies<0>();
    __syncthreads();
    if (blocks > 1) fetch(1);
    if constexpr (kDk) {
      sum_delta(0);
      __syncthreads();
    }

#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      if (tiles == 1) {
        step<1, 2, kDk, kDv>(bias, block, 0, first_key, dk_sums, dv_sums);
      } else if (tiles == 2) {
#pragma unroll 1
        for (int from = 0; from < kBlock && block * kBlock + from < count; from += 16)
          step<2, 1, kDk, kDv>(bias, block, from, first_key, dk_sums, dv_sums);
      }
      d2it::wait_for_copies<0>();
      __syncthreads();
      if (block + 2 < blocks) fetch(block + 2);
      if constexpr (kDk) {
        store_queries(block);
        if (block + 1 < blocks) sum_delta(block + 1);
        __syncthreads();
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i >= tiles) break;
      const int lane = d2it::opaque(threadIdx.x) % kWarp;
      T *dk_row[2], *dv_row[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = first_key + i * kApart + lane / 4 + 8 * r;
        const bool there = key < count;
        dk_row[r] = there ? b.dk.at(p.base(window), at.rows[key], head) : nullptr;
        dv_row[r] = there ? b.dv.at(p.base(window), at.rows[key], head) : nullptr;
      }
      if constexpr (kDk) store_columns(dk_sums[i], {p.scale, p.scale}, dk_row, 0, p.width, b.dk.vectors);
      if constexpr (kDv) store_columns(dv_sums[i], {1.0f, 1.0f}, dv_row, 0, p.width, b.dv.vectors);
    }
  }
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, 1) attention_backward(const __grid_constant__ Backward<T> b) {
  constexpr int kRow = kPitch<kWidth>;
  extern __shared__ float4 shared[];
  const Problem& p = b.p;
  const int rows = round_up(p.n, kTile);
  char* first = reinterpret_cast<char*>(shared);
  char* rest = behind_stages<T, kWidth>(first, rows);
  const Window at = window_in(rest, p.n, p.segments);
  float* near = reinterpret_cast<float*>(rest + window_bytes(p.n, p.segments));
  if (b.sums) {
    auto* far = reinterpret_cast<float4*>(b.sums_of_block());
    for (int i = threadIdx.x; i < static_cast<int>(b.block / 16); i += kThreads)
      (i < static_cast<int>(b.resident * b.row / 16) ? reinterpret_cast<float4*>(near) : far)[i] =
          make_float4(0, 0, 0, 0);
  }

  const int step = p.splits * p.bias_windows;
  int window = blockIdx.x / p.heads; // of residue window % bias_windows
  fetch_slot(p, at, window);
  d2it::commit_copies();
  for (; window < p.windows; window += step) {
    d2it::wait_for_copies<0>();
    int run;
    const int count = close_up(p, at, window, at.next[threadIdx.x], run);
    fetch_slot(p, at, window + step);
    d2it::commit_copies();
    if (count == 0) continue;
    const int head = d2it::opaque(blockIdx.x) % p.heads;
    const Work<T, kWidth> work{b, at, first, near, window, head, count, rows, run};
    T* k = reinterpret_cast<T*>(first);
    const int tiles = round_up(count, kTile), thread = d2it::opaque(threadIdx.x);
    copy_rows<T, kWidth, 2>({k, k + rows * kRow}, {&b.k, &b.v}, p, at, window, head, 0, count, tiles, thread,
                            kThreads);
    work.fetch(0);
    const Bias<T> bias(p, window % p.bias_windows, head, run);
    if constexpr (kWidth <= 72) {
      work.template walk<true, true>(bias);
    } else { // dk and dv of wide heads do not fit into registers together
      work.template walk<false, true>(bias);
      __syncthreads();
      work.fetch(0);
      work.template walk<true, false>(bias);
    }
    __syncthreads();
  }
  __syncthreads();
  if (b.sums) {
    auto* far = reinterpret_cast<float4*>(b.sums_of_block());
    for (int i = threadIdx.x; i < static_cast<int>(b.resident * b.row / 16); i += kThreads)
      far[i] = reinterpret_cast<const float4*>(near)[i];
  }
}

// The gradient of the bias: the blocks' sums in order, queries before keys again.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1) sum_blocks(const float* sums, T* dbias, int64_t bias_windows,
                                                          int heads, int n, int splits, bool per_head) {
  constexpr int kSide = kWarp, kAtOnce = 8; // blocks
  __shared__ float tile[kSide][kSide + 1];
  const int side = (n + kSide - 1) / kSide, pitch = sums_pitch(n);
  const int64_t matrix = blockIdx.x / (side * side);
  const int key = blockIdx.x % (side * side) / side * kSide, query = blockIdx.x % side * kSide;
  const int64_t residue = per_head ? matrix / heads : matrix;
  const int lane = threadIdx.x % kWarp;
  const int first_head = per_head ? static_cast<int>(matrix % heads) : 0,
            last_head = per_head ? first_head + 1 : heads;
#pragma unroll 1
  for (int i = threadIdx.x / kWarp; i < kSide; i += kWarps) {
    float sum = 0.0f;
    if (key + i < n && query + lane < n) {
#pragma unroll 1
      for (int head = first_head; head < last_head; ++head) {
#pragma unroll 1
        for (int first = 0; first < splits; first += kAtOnce) {
          float parts[kAtOnce];
#pragma unroll
          for (int s = 0; s < kAtOnce; ++s) {
            const int64_t block = ((first + s) * bias_windows + residue) * heads + head;
            parts[s] = first + s < splits ? __ldg(sums + (block * n + key + i) * pitch + query + lane) : 0.0f;
          }
#pragma unroll
          for (int s = 0; s < kAtOnce; ++s) sum += parts[s];
        }
      }
    }
    tile[i][lane] = sum;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x / kWarp; i < kSide; i += kWarps) {
    if (query + i < n && key + lane < n)
      dbias[(matrix * n + query + i) * n + key + lane] = d2it::to<T>(tile[lane][i]);
  }
}

} // namespace
