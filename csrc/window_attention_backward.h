// window_attention on CUDA, backward.
//
// One kernel, five products, each of q, k, v, grad and out read once and dq, dk, dv written once: 8
// rows where the floor (no `out`) is 7. A block is 16 warps, each with 16 keys and their dk and dv in
// registers, and all walk over the queries, 32 at a time; scores are held transposed, so that P^T and dS^T
// enter dv and dk from registers. dS^T also goes to shared memory, where half the warps sum dq of the 32
// queries over all keys while the other half copies the next queries.
//
// 16 warps leave 128 registers to a thread, of which kWidth are dk and dv: what follows from the thread
// or the window is looked up in shared memory, or computed again, rather than kept.
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
// This is the last, with as many rows of the sum in shared memory as fit beside the rest: 96 of 256 on an
// H100, which leaves 9 units; all of them for N <= 160. With 7 units of the bias in float32 a full window
// moves 24 units between a multiprocessor and L2, a window of half the tokens 8. HBM sees the sum at the end
// alone: 34 MB for 16 heads of 8 blocks, 1 % of what 1,024 full windows move. A pair of a window is added by
// the one thread that has it, windows come in order, and blocks are added in order: no atomics, the same bits
// every time.
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
  unsigned bias_row;   // bytes
  unsigned near;       // where shared memory has its first rows
  bool vectors;        // of q, k, v, grad and out

  int resident; // rows of the sum in shared memory

  // Of this block; computed where it is used, since registers are full.
  __device__ char* sums_of_block() const {
    return reinterpret_cast<char*>(sums) + static_cast<uint64_t>(d2it::opaque(blockIdx.x)) * block;
  }
};

// A block is 16 warps, as many as a window has tiles of 16 keys.
constexpr int kBackwardWarps = 16;
constexpr int kBackwardThreads = kBackwardWarps * kWarp;
constexpr int kQueryWarps = 8; // that sum dq; the others copy

// Where the rows of a key's position begin, in the bias and in the sum of its gradient.
struct alignas(16) PairRows {
  const char* bias;
  char* sum;
};

// Shared memory: what has one size for all windows, then what goes by its rows, then rows of the sum.
template <typename T, int kWidth>
struct Stage {
  T q[kBlock * kPitch<kWidth>], grad[kBlock * kPitch<kWidth>], out[kBlock * kPitch<kWidth>];
  float lse[kBlock], delta[kBlock];
};

// Rows of a tensor in the current window and the block's head.
template <typename T>
struct Strip {
  T* data;
  uint64_t row;

  __device__ T* at(unsigned i) const { return data + i * row; }
};

// What follows from a lane, kept where it takes one access and no register.
struct alignas(16) LaneInPairs {
  Lane heads;
  unsigned across, pair; // elements of ds: across_first, and the first pair of 16 x 16
};

template <typename T, int kWidth>
struct Fixed {
  Stage<T, kWidth> stages[kStages];
  LaneInPairs lanes[kWarp];
  // Of the current window and the block's head:
  Strip<const T> q, k, v, grad, out;
  Strip<T> dq, dk, dv;
  const float* lse;
  const char* bias; // or null
  int2 window;      // its rows, and how many of them lie side by side

  __device__ void find(const Backward<T>& b, int window) {
    const Problem& p = b.p;
    const int64_t base = p.base(window), head = blockIdx.x % p.heads;
    const auto strip = [&](const auto& heads) {
      return Strip{heads.at(base, 0, head), static_cast<uint64_t>(heads.row)};
    };
    q = strip(b.q), k = strip(b.k), v = strip(b.v), grad = strip(b.grad), out = strip(b.out);
    dq = strip(b.dq), dk = strip(b.dk), dv = strip(b.dv);
    lse = b.lse + (static_cast<int64_t>(window) * p.heads + head) * p.n;
    bias = static_cast<const char*>(p.bias);
    if (bias) bias += bias_matrix(p, window % p.bias_windows, head) * p.n * b.bias_row;
  }
};

template <int kWidth>
constexpr int backward_bytes(int n) {
  const int rows = round_up(n, kTile);
  return static_cast<int>(sizeof(Fixed<uint16_t, kWidth>)) + window_bytes(n) +
         rows * (2 * kPitch<kWidth> * 2 + kPairsPitch * 2 + static_cast<int>(sizeof(PairRows)));
}

// The block at work on one window.
template <typename T, int kWidth>
struct Work {
  const Backward<T>& b;
  const Window& at;
  Fixed<T, kWidth>& fixed;
  PairRows* pair_rows; // (rows)
  T *k, *v;            // (rows, kPitch)
  T* ds;               // (rows, kPairsPitch), keys before queries

  int count, run;

  static constexpr int kRow = kPitch<kWidth>;
  __device__ Stage<T, kWidth>& stage(int block) const { return fixed.stages[block % kStages]; }

  // Whether the thread copies queries, and does not sum dq.
  __device__ bool copies() const { return threadIdx.x >= kQueryWarps * kWarp; }

  // A thread's part of a row into shared memory; nothing: zeros.
  __device__ void copy(T* rows, unsigned place, const Strip<const T>& from, int row, bool there,
                       int64_t column) const {
    const unsigned part = d2it::opaque(threadIdx.x) % kPerRow;
    T* to = rows + place * kRow + part * kPerVector;
    const T* first = from.at(row);
    const int width = there ? b.p.width : 0;
    if (b.vectors) {
      copy_row<T, kWidth>(to, first + part * kPerVector, 1, true, part, width);
    } else {
      copy_row<T, kWidth>(to, first + part * kPerVector * column, column, false, part, width);
    }
  }

  // The window's keys and values, and where their part of the bias and of its gradient's sum lies.
  __device__ void fetch_keys(char* near) const {
    const unsigned there = round_up(count, kTile);
#pragma unroll 1
    for (unsigned place = d2it::opaque(threadIdx.x) / kPerRow; place < there;
         place += kBackwardThreads / kPerRow) {
      const bool real = place < static_cast<unsigned>(count);
      const int row = at.rows[real ? place : 0];
      copy(k, place, fixed.k, row, real, b.k.column);
      copy(v, place, fixed.v, row, real, b.v.column);
    }
    d2it::commit_copies();
    const unsigned key = d2it::opaque(threadIdx.x);
    if (key < there) {
      const unsigned position = at.positions[key];
      char* row = (static_cast<int>(position) < b.resident ? near : b.sums_of_block()) + position * b.row;
      pair_rows[key] = {fixed.bias + position * b.bias_row, row};
    }
  }

  // Starts to copy a block of queries, by the last warps: half of them q and grad, and half out and lse.
  __device__ void fetch(int block) const {
    const Problem& p = b.p;
    Stage<T, kWidth>& to = stage(block);
    const unsigned thread = d2it::opaque(threadIdx.x); // not kept: registers are full
    const unsigned place = thread / kPerRow % kBlock, part = thread % kPerRow;
    const unsigned mine = row_in_place(place), query = block * kBlock + mine;
    const bool there = query < static_cast<unsigned>(count), second = thread / (kBlock * kPerRow) % 2;
    const int row = there ? at.rows[query] : 0;
    if (!second) {
      copy(to.q, place, fixed.q, row, there, b.q.column);
      copy(to.grad, place, fixed.grad, row, there, b.grad.column);
    } else {
      copy(to.out, place, fixed.out, row, there, b.out.column);
      // The weights of a query that is not there are zero.
      if (part == 0 && there) {
        d2it::copy_async(to.lse + mine, fixed.lse + at.positions[query]);
      } else if (part == 0) {
        to.lse[mine] = kInfinity;
      }
    }
    d2it::commit_copies();
  }

  // delta = rowsum(out * grad) of a block whose copies have arrived: the diagonal of their product, 16 rows
  // by each of the last two warps, which have the least of dq.
  __device__ void sum_delta(int block) const {
    constexpr unsigned kFirst = kBackwardWarps - kBlock / 16;
    if (threadIdx.x >= kFirst * kWarp) {
      const unsigned own = threadIdx.x / kWarp - kFirst;
      Stage<T, kWidth>& from = stage(block);
      const unsigned lane = d2it::opaque(threadIdx.x) % kWarp, row = lane / 4;
      float c[1][2][4];
      const int first = own * 16 * kRow;
      multiply_rows<T, kWidth, 1, 1>(c, from.grad + first, 0, from.out + first, lane_in<kWidth>(lane));
      if (lane % 4 != row / 2) return;
      from.delta[own * 16 + row_in_place(row)] = row % 2 ? c[0][0][1] : c[0][0][0];
      from.delta[own * 16 + row_in_place(row + 8)] = row % 2 ? c[0][1][3] : c[0][1][2];
    }
  }

  // Adds four queries' dS to two rows of the sum, which begin at `row`; `there`: so many of the queries
  // exist, and whether these keys do. What does not exist goes by the position of something that does, so it
  // is not stored.
  __device__ void add_fours(char* const (&row)[2], const bool (&keys)[2], int4 column, int there,
                            const float (&s)[2][4]) const {
    const auto in = [](auto like, char* row, int i) {
      return reinterpret_cast<decltype(like)*>(row + static_cast<unsigned>(i) * uint64_t{4});
    };
    const auto again = [&](int r) { return d2it::opaque(row[r]); }; // after the loads
    if (run == 4) {                                                 // all four exist or none does
      float4 x[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        x[r] = *in(float4{}, row[r], column.x);
        x[r] = make_float4(x[r].x + s[0][2 * r], x[r].y + s[0][2 * r + 1], x[r].z + s[1][2 * r],
                           x[r].w + s[1][2 * r + 1]);
      }
      char* const to[2] = {again(0), again(1)};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (keys[r] && there > 0) *in(float4{}, to[r], column.x) = x[r];
      }
    } else if (run == 2) {
      float2 x[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2& sum = x[i / 2][i % 2];
        sum = *in(float2{}, row[i / 2], i % 2 ? column.z : column.x);
        sum.x += s[i % 2][i / 2 * 2], sum.y += s[i % 2][i / 2 * 2 + 1];
      }
      char* const to[2] = {again(0), again(1)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (keys[i / 2] && there > i % 2 * 2)
          *in(float2{}, to[i / 2], i % 2 ? column.z : column.x) = x[i / 2][i % 2];
      }
    } else {
      const int columns[4] = {column.x, column.y, column.z, column.w};
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        x[i] = *in(0.0f, row[i / 4], columns[i % 4]) + s[i % 4 / 2][i / 4 * 2 + i % 2];
      char* const to[2] = {again(0), again(1)};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (keys[i / 4] && there > i % 4) *in(0.0f, to[i / 4], columns[i % 4]) = x[i];
      }
    }
  }

  // 16 queries, from `from` on in a block, against the warp's 16 keys: kDv adds to dv, kDk to dk and the sum
  // of the bias's gradient, and leaves dS in shared memory.
  template <bool kDk, bool kDv, int kSums>
  __device__ void step(const Stage<T, kWidth>& in, int block, int from, const LaneInPairs& lane_in_pairs,
                       float (&dk)[1][kSums][4], float (&dv)[1][kSums][4]) const {
    const Problem& p = b.p;
    const Lane& own = lane_in_pairs.heads;
    const unsigned lane = threadIdx.x % kWarp;
    const int first_key = threadIdx.x / kWarp * kTile;
    const int column = from + static_cast<int>(lane % 4 * 4), query = block * kBlock + column;
    const int key[2] = {first_key + static_cast<int>(lane / 4), first_key + static_cast<int>(lane / 4) + 8};
    const int4 where = *reinterpret_cast<const int4*>(at.positions + query);
    const PairRows* rows = pair_rows + key[0]; // and 8 on
    const float scale = p.scale * kLog2e;

    float s[1][2][4];
    multiply_rows<T, kWidth, 1, 1>(s, k + first_key * kRow, 0, in.q + from * kRow, own);
    {
      float4 added[2];
      Bias<T>::fours(added, p, {rows[0].bias, rows[8].bias}, where, run);
      const float4 lse = *reinterpret_cast<const float4*>(in.lse + column);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float more[4] = {added[r].x, added[r].y, added[r].z, added[r].w};
        const float less[4] = {lse.x, lse.y, lse.z, lse.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& x = s[0][e / 2][2 * r + e % 2];
          x = d2it::exp2_fast(fmaf(more[e], kLog2e, fmaf(x, scale, -less[e])));
        }
      }
    }
    if (block * kBlock + from + 16 > count || first_key + 16 > count || at.segments) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool there = key[r] < count && query + e < count;
          if (!there || (at.segments && at.segments[key[r]] != at.segments[query + e]))
            s[0][e / 2][2 * r + e % 2] = 0.0f;
        }
      }
    }
    uint32_t weights[1][1][4];
    if constexpr (kDv) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[0][0][i] = d2it::pack<T>(s[0][i / 2][i % 2 * 2], s[0][i / 2][i % 2 * 2 + 1]);
      add_weighted<T, kWidth>(dv, weights, in.grad + from * kRow, own);
    }
    if constexpr (kDk) {
      float dp[1][2][4];
      multiply_rows<T, kWidth, 1, 1>(dp, v + first_key * kRow, 0, in.grad + from * kRow, own);
      const float4 delta4 = *reinterpret_cast<const float4*>(in.delta + column);
      const float delta[4] = {delta4.x, delta4.y, delta4.z, delta4.w};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[0][i][e] *= dp[0][i][e] - delta[2 * i + e % 2];
      }
      if (b.sums) {
        char* const row[2] = {rows[0].sum, rows[8].sum};
        const bool keys[2] = {key[0] < count, key[1] < count};
        add_fours(row, keys, where, count - query, s[0]);
      }
      T* to = ds + first_key * kPairsPitch + from + lane_in_pairs.pair;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[0][0][i] = d2it::pack<T>(s[0][i / 2][i % 2 * 2], s[0][i / 2][i % 2 * 2 + 1]);
        // One by one, so that the registers of the fragment stay what they are.
        *reinterpret_cast<volatile uint32_t*>(to + i % 2 * (8 * kPairsPitch) + i / 2 * 2) = weights[0][0][i];
      }
      add_weighted<T, kWidth>(dk, weights, in.q + from * kRow, own);
    }
  }

  static constexpr int kGroups = kQueryWarps / 2, kUnits = kWidth / 16;
  static constexpr int kMost = (kUnits + kGroups - 1) / kGroups;
  static constexpr bool kTail = kWidth % 16 != 0;

  // dq of a block of queries, by the first warps: each has 16 of the queries and every fourth 16 columns, two
  // of them also the last 8.
  __device__ void store_queries(int block) const {
    const Problem& p = b.p;
    const unsigned thread = d2it::opaque(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const unsigned own = warp % 2 * 16, group = warp / 2, first = block * kBlock + own;
    if (first >= static_cast<unsigned>(count)) return;
    const bool tailed = kTail && group == kUnits % kGroups;
    float c[kMost][2][4] = {}, tail[1][4] = {};
    const LaneInPairs from = fixed.lanes[lane];
    const T *pairs = ds + own + from.across, *keys = k + group * 16 + from.heads.down;
    const auto sum = [&](auto with_tail) {
      const auto add = [&](int j) { // the tile j of those to come
        uint32_t x[4];
        d2it::load_matrices_transposed(x, pairs + j * (kTile * kPairsPitch));
#pragma unroll
        for (int u = 0; u < kMost; ++u) {
          if (kUnits % kGroups != 0 && group + u * kGroups >= kUnits) break;
          uint32_t y[4];
          d2it::load_matrices_transposed(y, keys + j * (kTile * kRow) + u * kGroups * 16);
          d2it::multiply_add<T>(c[u][0], x, y[0], y[1]);
          d2it::multiply_add<T>(c[u][1], x, y[2], y[3]);
        }
        if constexpr (with_tail.value) {
          uint32_t y[2];
          d2it::load_matrices_transposed(y, keys + j * (kTile * kRow) + (kUnits - kUnits % kGroups) * 16);
          d2it::multiply_add<T>(tail[0], x, y[0], y[1]);
        }
      };
      constexpr int kAtOnce = 4;
      int tiles = static_cast<unsigned>(count + kTile - 1) / kTile;
#pragma unroll 1
      for (; tiles >= kAtOnce; tiles -= kAtOnce) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) add(j);
        pairs += kAtOnce * kTile * kPairsPitch, keys += kAtOnce * kTile * kRow;
      }
#pragma unroll 1
      for (; tiles > 0; --tiles) {
        add(0);
        pairs += kTile * kPairsPitch, keys += kTile * kRow;
      }
    };
    if (tailed) {
      sum(std::integral_constant<bool, kTail>());
    } else {
      sum(std::false_type());
    }
    T* row[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned query = first + lane / 4 + 8 * r;
      T* found = fixed.dq.at(at.rows[query]);
      row[r] = query < static_cast<unsigned>(count) ? found : nullptr;
    }
    const float factor[2] = {p.scale, p.scale};
#pragma unroll
    for (int u = 0; u < kMost; ++u) {
      const unsigned unit = group + u * kGroups;
      if (unit < kUnits) store_columns(c[u], factor, row, unit * 16, p.width, b.dq.vectors);
    }
    if (tailed) store_columns(tail, factor, row, kUnits * 16, p.width, b.dq.vectors);
  }

  // All queries; block 0 is on its way. The sums of the warp's keys are written at the end.
  template <bool kDk, bool kDv>
  __device__ void walk() const {
    const Problem& p = b.p;
    const unsigned warp = d2it::opaque(threadIdx.x) / kWarp;
    const int first_key = warp * kTile, blocks = static_cast<unsigned>(count + kBlock - 1) / kBlock;
    float dk[1][kDk ? kWidth / 8 : 1][4] = {}, dv[1][kDv ? kWidth / 8 : 1][4] = {};
    auto& dk_sums = reinterpret_cast<float (&)[1][kWidth / 8][4]>(dk);
    auto& dv_sums = reinterpret_cast<float (&)[1][kWidth / 8][4]>(dv);
    d2it::wait_for_copies<0>();
    __syncthreads();
    if (blocks > 1 && copies()) fetch(1);
    if constexpr (kDk) {
      sum_delta(0);
      __syncthreads();
    }

#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      if (first_key < count) {
        const LaneInPairs own = fixed.lanes[threadIdx.x % kWarp];
        const Stage<T, kWidth>& in = stage(block);
#pragma unroll
        for (int from = 0; from < kBlock; from += 16) {
          if (block * kBlock + from < count) step<kDk, kDv>(in, block, from, own, dk_sums, dv_sums);
        }
      }
      d2it::wait_for_copies<0>();
      __syncthreads();
      if (copies()) {
        if (block + 2 < blocks) fetch(block + 2);
        if (kDk && block + 1 < blocks) sum_delta(block + 1);
      } else if (kDk) {
        store_queries(block);
      }
      if (kDk) __syncthreads();
    }
    if (first_key >= count) return;
    const unsigned lane = d2it::opaque(threadIdx.x) % kWarp;
    T *dk_row[2], *dv_row[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = first_key + lane / 4 + 8 * r, row = at.rows[key];
      T *dk_found = fixed.dk.at(row), *dv_found = fixed.dv.at(row);
      dk_row[r] = key < count ? dk_found : nullptr, dv_row[r] = key < count ? dv_found : nullptr;
    }
    if constexpr (kDk) store_columns(dk_sums[0], {p.scale, p.scale}, dk_row, 0, p.width, b.dk.vectors);
    if constexpr (kDv) store_columns(dv_sums[0], {1.0f, 1.0f}, dv_row, 0, p.width, b.dv.vectors);
  }
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    attention_backward(const __grid_constant__ Backward<T> b) {
  constexpr int kRow = kPitch<kWidth>;
  extern __shared__ float4 shared[];
  const Problem& p = b.p;
  const int rows = round_up(p.n, kTile);
  auto& fixed = *reinterpret_cast<Fixed<T, kWidth>*>(shared);
  auto* pair_rows = reinterpret_cast<PairRows*>(&fixed + 1);
  T* k = reinterpret_cast<T*>(pair_rows + rows);
  T* v = k + rows * kRow;
  T* ds = v + rows * kRow;
  char* rest = reinterpret_cast<char*>(ds + rows * kPairsPitch);
  const Window at = window_in(rest, p.n, p.segments);
  char* near = reinterpret_cast<char*>(shared) + b.near; // the first rows of the sum
  if (b.sums) {
    auto* far = reinterpret_cast<float4*>(b.sums_of_block());
#pragma unroll 1
    for (int i = threadIdx.x; i < static_cast<int>(b.block / 16); i += kBackwardThreads)
      (i < static_cast<int>(b.resident * b.row / 16) ? reinterpret_cast<float4*>(near) : far)[i] =
          make_float4(0, 0, 0, 0);
  }

  if (threadIdx.x < kWarp) {
    const unsigned lane = threadIdx.x;
    fixed.lanes[lane] = {lane_in<kWidth>(lane), across_first(kPairsPitch, lane),
                         lane / 4 * kPairsPitch + lane % 4 * 4};
  }

  const int step = p.splits * p.bias_windows;
  int window = blockIdx.x / p.heads; // of residue window % bias_windows
  if (threadIdx.x < kThreads) fetch_slot(p, at, window, threadIdx.x);
  d2it::commit_copies();
#pragma unroll 1
  for (; window < p.windows; window += step) {
    d2it::wait_for_copies<0>();
    if (threadIdx.x < kThreads) {                        // as many as there are positions
      const unsigned thread = d2it::opaque(threadIdx.x); // not kept: registers are full
      int2 found;
      found.x = close_up(p, at, window, at.next[thread], thread, found.y);
      if (thread == 0) fixed.window = found;
      fetch_slot(p, at, window + step, thread);
      d2it::commit_copies();
    } else {
      if (d2it::opaque(threadIdx.x) == kThreads) fixed.find(b, window);
      __syncthreads(); // as in close_up
      __syncthreads();
    }
    __syncthreads();
    const int count = fixed.window.x;
    if (count == 0) continue;
    const Work<T, kWidth> work{b, at, fixed, pair_rows, k, v, ds, count, fixed.window.y};
    work.fetch_keys(near);
    if (work.copies()) work.fetch(0);
    if constexpr (kWidth <= 72) {
      work.template walk<true, true>();
    } else { // dk and dv of wide heads do not fit into registers together
      work.template walk<false, true>();
      __syncthreads();
      if (work.copies()) work.fetch(0);
      work.template walk<true, false>();
    }
    __syncthreads();
  }
  __syncthreads();
  if (b.sums) {
    auto* far = reinterpret_cast<float4*>(b.sums_of_block());
#pragma unroll 1
    for (int i = threadIdx.x; i < static_cast<int>(b.resident * b.row / 16); i += kBackwardThreads)
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
  const float* first_row = sums + (residue * heads * n + key) * pitch + query + lane;
  const int64_t apart = bias_windows * heads * n * pitch; // from a block's part to the next's
#pragma unroll 1
  for (int i = threadIdx.x / kWarp; i < kSide; i += kWarps) {
    float sum = 0.0f;
    if (key + i < n && query + lane < n) {
#pragma unroll 1
      for (int head = first_head; head < last_head; ++head) {
        const float* from = first_row + (static_cast<int64_t>(head) * n + i) * pitch;
#pragma unroll 1
        for (int first = 0; first < splits; first += kAtOnce) {
          float parts[kAtOnce];
#pragma unroll
          for (int s = 0; s < kAtOnce; ++s, from += apart) parts[s] = first + s < splits ? __ldg(from) : 0.0f;
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
