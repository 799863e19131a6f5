// window_attention on CUDA, backward.
//
// One kernel, five products, each of q, k, v, grad and out read once and dq, dk, dv written once: 8
// rows where the floor (no `out`) is 7. A block is 16 warps, each with 16 keys and their dk and dv in
// registers, and all walk over the queries, 32 at a time; scores are held transposed, so that P^T and dS^T
// enter dv and dk from registers. dS^T also goes to shared memory. While all work on a block of queries, four
// warps also sum dq of the block before over all keys, and two copy the next: others every time, so that all
// have the same to do, and no warp waits for another but at the end of a block.
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
// This is the last, with as many rows of the sum in shared memory as fit beside the rest: 86 of 256 on an
// H100, which leaves 9 units; all of them for N <= 136. With 7 units of the bias in float32 a full window
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
constexpr int kQueryWarps = 4; // that sum dq of a block

// Shared memory is aligned to this, so that places in a row of pairs are told apart by bits of their
// addresses.
constexpr int kLine = 64;
struct alignas(kLine) Line {
  float4 parts[4];
};

// A row of the bias where there is none.
__device__ alignas(16) const float kZeros[kThreads] = {};

// Where the rows of a key's position begin, in the bias and in the sum of its gradient.
struct alignas(16) PairRows {
  const char* bias;
  char* sum;
};

// A block of queries.
template <typename T, int kWidth>
struct Stage {
  T q[kBlock * kPitch<kWidth>], grad[kBlock * kPitch<kWidth>];
  float lse[kBlock];
  // -rowsum(out * grad), with which the products of grad begin, as they lie there: of four queries the first
  // two, twice, and the other two.
  float delta[2][kBlock];
  int positions[kBlock];
};

// Rows of a tensor in the current window and the block's head.
template <typename T>
struct Strip {
  T* data;
  uint32_t row; // bytes

  __device__ T* at(unsigned i) const {
    using Bytes = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Bytes*>(data) + uint64_t{i} * row);
  }
};

// A lane's own places for one of the stages, by address: in q by the two ways to give 16 x 16 elements, in
// lse, and in ds. Kept where they take one access and no register.
struct alignas(16) Places {
  uint32_t down, across, four, pair;
};
// A thread's own: in k, and the rows of its first key.
struct Keys {
  uint32_t down, rows;
};

template <typename T, int kWidth>
struct alignas(kLine) Fixed {
  Stage<T, kWidth> stages[kStages];
  T out[kBlock * kPitch<kWidth>]; // of the block that is copied
  Places places[kStages][kWarp];
  PairRows rows[kThreads]; // of the keys
  // Of the current window and the block's head:
  Strip<const T> q, k, v, grad, out_rows;
  Strip<T> dq, dk, dv;
  const float* lse;
  const float* bias; // or null
  int2 window;       // its rows, and how many of them lie side by side
  int number;

  __device__ void find(const Backward<T>& b, int window) {
    const Problem& p = b.p;
    const int64_t base = p.base(window), head = blockIdx.x % p.heads;
    const auto strip = [&](const auto& heads) {
      return Strip{heads.at(base, 0, head), static_cast<uint32_t>(heads.row * sizeof(T))};
    };
    q = strip(b.q), k = strip(b.k), v = strip(b.v), grad = strip(b.grad), out_rows = strip(b.out);
    dq = strip(b.dq), dk = strip(b.dk), dv = strip(b.dv);
    lse = b.lse + (static_cast<int64_t>(window) * p.heads + head) * p.n;
    bias = Bias(p, window % p.bias_windows, head).matrix;
  }
};

// Where things lie in shared memory, which has room for kRows rows of a window, so that all addresses are
// known beforehand.
template <typename T, int kWidth, int kRows>
struct Parts {
  Fixed<T, kWidth>& fixed;
  T *k, *v; // (kRows, kPitch)
  T* ds;    // (kStages, kRows, kBlock), keys before queries; see in_rows
  Window at;
  char* near; // rows of the sum

  __device__ explicit Parts(Line* shared)
      : fixed(*reinterpret_cast<Fixed<T, kWidth>*>(shared)),
        k(reinterpret_cast<T*>(&fixed + 1)),
        v(k + kRows * kPitch<kWidth>),
        ds(v + kRows * kPitch<kWidth>),
        at(window_in(reinterpret_cast<char*>(ds + kStages * kRows * kBlock), kRows, true)),
        near(reinterpret_cast<char*>(shared) + bytes()) {}

  __device__ void find_places(unsigned lane) const {
    const Lane own = lane_in<kWidth>(lane);
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      Stage<T, kWidth>& stage = fixed.stages[i];
      T* pairs = ds + i * (kRows * kBlock);
      fixed.places[i][lane] = {d2it::shared_address(stage.q + own.down),
                               d2it::shared_address(stage.q + own.across),
                               d2it::shared_address(stage.lse + lane % 4 * 4),
                               d2it::shared_address(pairs + in_rows(lane / 4, lane % 4 * 4))};
    }
  }

  C10_HOST_DEVICE static constexpr int bytes() {
    return static_cast<int>(sizeof(Fixed<T, kWidth>)) + window_bytes(kRows) +
           kRows * (2 * kPitch<kWidth> + kStages * kBlock) * static_cast<int>(sizeof(T));
  }
};

constexpr int kSummed = 8;

// The block at work on one window.
template <typename T, int kWidth, int kRows>
struct Work {
  const Backward<T>& b;
  const Parts<T, kWidth, kRows> parts;
  int count; // rows of the window
  int runs;  // how many of them lie side by side, + kSummed where the bias's gradient is wanted

  static constexpr int kRow = kPitch<kWidth>;
  __device__ Stage<T, kWidth>& stage(int block) const { return parts.fixed.stages[block % kStages]; }
  __device__ T* pairs(int block) const { return parts.ds + block % kStages * (kRows * kBlock); }

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
  __device__ void fetch_keys() const {
    const unsigned there = round_up(count, kTile);
#pragma unroll 1
    for (unsigned place = d2it::opaque(threadIdx.x) / kPerRow; place < there;
         place += kBackwardThreads / kPerRow) {
      const bool real = place < static_cast<unsigned>(count);
      const int row = parts.at.rows[real ? place : 0];
      copy(parts.k, place, parts.fixed.k, row, real, b.k.column);
      copy(parts.v, place, parts.fixed.v, row, real, b.v.column);
    }
    d2it::commit_copies();
    const unsigned key = d2it::opaque(threadIdx.x);
    if (key < there) {
      const unsigned position = parts.at.positions[key];
      char* row =
          (static_cast<int>(position) < b.resident ? parts.near : b.sums_of_block()) + position * b.row;
      const float* bias = parts.fixed.bias ? parts.fixed.bias + position * b.p.n : kZeros;
      parts.fixed.rows[key] = {reinterpret_cast<const char*>(bias), row};
    }
  }

  // While a block is worked on, four warps in turn sum dq of the block before, and two others copy the next.
  __device__ static unsigned turn(int block) {
    return (d2it::opaque(threadIdx.x) / kWarp + kQueryWarps * block) % kBackwardWarps;
  }
  __device__ static bool sums_last(unsigned turn) { return turn / kQueryWarps == 0; }
  __device__ static bool copies_next(unsigned turn) { return turn / 2 == kBackwardWarps / 4; }

  // Starts to copy half of a block of queries, by one warp.
  template <bool kDk>
  __device__ void fetch(int block) const {
    const Problem& p = b.p;
    Stage<T, kWidth>& to = stage(block);
    const unsigned thread = d2it::opaque(threadIdx.x); // not kept: registers are full
    const unsigned part = thread % kPerRow;
#pragma unroll
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned place = thread / kWarp % 2 * 16 + thread % kWarp / kPerRow + 8 * i;
      const unsigned mine = row_in_place(place), query = block * kBlock + mine;
      const bool there = query < static_cast<unsigned>(count);
      const int row = there ? parts.at.rows[query] : 0;
      copy(to.q, place, parts.fixed.q, row, there, b.q.column);
      copy(to.grad, place, parts.fixed.grad, row, there, b.grad.column);
      if (kDk) copy(parts.fixed.out, place, parts.fixed.out_rows, row, there, b.out.column);
      // The weights of a query that is not there are zero.
      if (part == 0) {
        const int position = parts.at.positions[query];
        to.positions[mine] = position;
        if (there) {
          d2it::copy_async(to.lse + mine, parts.fixed.lse + position);
        } else {
          to.lse[mine] = kInfinity;
        }
      }
    }
    d2it::commit_copies();
  }

  // Waits for them, and takes the sums delta: the diagonal of the product of grad and out.
  template <bool kDk>
  __device__ void finish_copies(int block) const {
    d2it::wait_for_copies<0>();
    if constexpr (kDk) {
      __syncwarp();
      Stage<T, kWidth>& from = stage(block);
      const unsigned thread = d2it::opaque(threadIdx.x), lane = thread % kWarp, row = lane / 4;
      const unsigned half = thread / kWarp % 2 * 16;
      float c[1][2][4];
      multiply_rows<T, kWidth, 1, 1>(c, from.grad + half * kRow, 0, parts.fixed.out + half * kRow,
                                     lane_in<kWidth>(lane));
      if (lane % 4 != row / 2) return;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float delta = row % 2 ? c[0][i][2 * i + 1] : c[0][i][2 * i];
        const unsigned mine = half + row_in_place(row + 8 * i);
        float* to = from.delta[mine % 4 / 2] + mine / 4 * 4 + mine % 2;
        to[0] = to[2] = -delta;
      }
    }
  }

  // Adds four queries' dS to two rows of the sum, if there is one, which begin at `row`. missing: bits of
  // those of the first row, then of the second, that are of a query or a key that does not exist; such go by
  // the position of something that does, so they are not stored.
  __device__ void add_fours(char* const (&row)[2], uint4 column, unsigned missing,
                            const float (&s)[2][4]) const {
    const auto in = [](auto like, char* row, unsigned i) {
      return reinterpret_cast<decltype(like)*>(row + i * uint64_t{4});
    };
    const auto again = [&](int r) { return d2it::opaque(row[r]); }; // after the loads
    const auto there = [&](int r, int e) { return !(missing & 1u << (4 * r + e)); };
    if (runs == kSummed + 4) { // all four exist or none does
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
        if (there(r, 0)) *in(float4{}, to[r], column.x) = x[r];
      }
    } else if (runs == kSummed + 2) {
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
        if (there(i / 2, i % 2 * 2)) *in(float2{}, to[i / 2], i % 2 ? column.z : column.x) = x[i / 2][i % 2];
      }
    } else if (runs == kSummed + 1) {
      const unsigned columns[4] = {column.x, column.y, column.z, column.w};
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        x[i] = *in(0.0f, row[i / 4], columns[i % 4]) + s[i % 4 / 2][i / 4 * 2 + i % 2];
      char* const to[2] = {again(0), again(1)};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (there(i / 4, i % 4)) *in(0.0f, to[i / 4], columns[i % 4]) = x[i];
      }
    }
  }

  // 16 queries, from `from` on in a block, against the warp's 16 keys: kDv adds to dv, kDk to dk and the sum
  // of the bias's gradient, and leaves dS in shared memory. whole: no pair of them is to be left out.
  template <bool kDk, bool kDv, int kSums>
  __device__ void step(int first_query, int from, bool whole, const Places& places, const Keys& keys,
                       float (&dk)[1][kSums][4], float (&dv)[1][kSums][4]) const {
    using Elements = d2it::Place<T>;
    using Words = d2it::Place<uint32_t>;
    const Elements q_down = Elements(places.down) + from * kRow,
                   q_across = Elements(places.across) + from * kRow;
    const Elements k_down(keys.down), v_down = k_down + kRows * kRow;
    constexpr int kNext = kBlock * kRow; // from q to grad
    const d2it::Place<float> lse_place = d2it::Place<float>(places.four) + from;
    const uint4 where = d2it::load_four(Words(places.four) + (from + 3 * kBlock));
    // Of the bias, or of the sum, the row of the lane's key, or of the key eight on.
    const auto row = [&](int r, int which) {
      return d2it::load_pointer(Words(keys.rows) + (32 * r + 2 * which));
    };

    float s[1][2][4]; // begins with the bias
    {
      const char* const rows[2] = {row(0, 0), row(1, 0)};
      if (runs % kSummed > 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 two = Bias::at<float2>(rows[i % 2], i < 2 ? where.x : where.z);
          s[0][i / 2][i % 2 * 2] = two.x, s[0][i / 2][i % 2 * 2 + 1] = two.y;
        }
      } else {
        __syncwarp(); // keeps the compiler from loading both, each under its own condition
        const unsigned columns[4] = {where.x, where.y, where.z, where.w};
#pragma unroll
        for (int i = 0; i < 8; ++i)
          s[0][i / 4][i % 4] = Bias::at<float>(rows[i % 4 / 2], columns[i / 4 * 2 + i % 2]);
      }
    }
    multiply_rows<T, kWidth, 1, 1, true>(s, k_down, 0, q_across, q_down);
    const float4 lse4 = d2it::load_four(lse_place);
    const float lse[4] = {lse4.x, lse4.y, lse4.z, lse4.w};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        s[0][i][e] = d2it::exp2_fast(fmaf(s[0][i][e], b.p.unit, -lse[2 * i + e % 2]));
    }
    unsigned missing = 0;
    if (!whole) {
      const int thread = d2it::opaque(threadIdx.x), lane = thread % kWarp; // not kept: registers are full
      const int query = first_query + from + lane % 4 * 4;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = thread / kWarp * kTile + lane / 4 + 8 * r;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool there = key < count && query + e < count;
          if (!there) missing |= 1u << (4 * r + e);
          if (!there || (b.p.segmented() && parts.at.segments[key] != parts.at.segments[query + e]))
            s[0][e / 2][2 * r + e % 2] = 0.0f;
        }
      }
    }
    uint32_t weights[1][1][4];
    if constexpr (kDv) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[0][0][i] = d2it::pack<T>(s[0][i / 2][i % 2 * 2], s[0][i / 2][i % 2 * 2 + 1]);
      add_weighted<T, kWidth>(dv, weights, q_down + kNext);
    }
    if constexpr (kDk) {
      float4 dp[2] = {d2it::load_four(lse_place + kBlock), d2it::load_four(lse_place + 2 * kBlock)};
      auto& products = reinterpret_cast<float (&)[1][2][4]>(dp);
      multiply_rows<T, kWidth, 1, 1, true>(products, v_down, 0, q_across + kNext, q_down + kNext);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[0][i][e] *= products[0][i][e];
      }
      char* const rows[2] = {row(0, 1), row(1, 1)};
      add_fours(rows, where, missing, s[0]);
      const Words to =
          Words(places.pair ^ (from * 2)) + static_cast<int>(threadIdx.x / kWarp) * (kTile * kBlock / 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[0][0][i] = d2it::pack<T>(s[0][i / 2][i % 2 * 2], s[0][i / 2][i % 2 * 2 + 1]);
        d2it::store_one(to + (i % 2 * (8 * kBlock / 2) + i / 2), weights[0][0][i]);
      }
      add_weighted<T, kWidth>(dk, weights, q_down);
    }
  }

  static constexpr int kUnits = kWidth / 8, kOwn = (kUnits + 1) / 2; // of 8 columns; of half of the columns

  // dq of a block of queries, by four warps: each has 16 of the queries and half of the columns.
  __device__ void store_queries(int block) const {
    if (threadIdx.x / kWarp % 2 == 0) {
      sum_queries<0, kOwn>(block);
    } else {
      sum_queries<kOwn, kUnits - kOwn>(block);
    }
  }

  // kCount times 8 columns.
  template <int kFirst, int kCount>
  __device__ void sum_queries(int block) const {
    const Problem& p = b.p;
    const unsigned thread = d2it::opaque(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const unsigned own = warp / 2 % 2 * 16, first = block * kBlock + own;
    if (first >= static_cast<unsigned>(count)) return;
    float c[kCount][4] = {};
    d2it::Place<T> pairs(this->pairs(block) + (in_rows(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8) ^ own));
    d2it::Place<T> keys(parts.k + kFirst * 8 + lane_in<kWidth>(lane).down);
    const auto add = [&](int j) { // the tile j of those to come
      uint32_t x[4];
      d2it::load_matrices_transposed(x, pairs + j * (kTile * kBlock));
#pragma unroll
      for (int u = 0; u + 1 < kCount; u += 2) {
        uint32_t y[4];
        d2it::load_matrices_transposed(y, keys + (j * (kTile * kRow) + u * 8));
        d2it::multiply_add<T>(c[u], x, y[0], y[1]);
        d2it::multiply_add<T>(c[u + 1], x, y[2], y[3]);
      }
      if constexpr (kCount % 2 != 0) {
        uint32_t y[2];
        d2it::load_matrices_transposed(y, keys + (j * (kTile * kRow) + (kCount - 1) * 8));
        d2it::multiply_add<T>(c[kCount - 1], x, y[0], y[1]);
      }
    };
    constexpr int kAtOnce = 8;
    int tiles = static_cast<unsigned>(count + kTile - 1) / kTile;
#pragma unroll 1
    for (; tiles >= kAtOnce; tiles -= kAtOnce) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) add(j);
      pairs = pairs + kAtOnce * kTile * kBlock, keys = keys + kAtOnce * kTile * kRow;
    }
#pragma unroll 1
    for (; tiles > 0; --tiles) {
      add(0);
      pairs = pairs + kTile * kBlock, keys = keys + kTile * kRow;
    }
    T* row[2];
    int there[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned query = first + lane / 4 + 8 * r;
      row[r] = parts.fixed.dq.at(parts.at.rows[query]);
      there[r] = query < static_cast<unsigned>(count) ? p.width : 0;
    }
    store_columns(c, {p.scale, p.scale}, row, there, kFirst * 8, b.dq.vectors);
  }

  // All queries. The sums of the warp's keys are written at the end.
  template <bool kDk, bool kDv>
  __device__ void walk() const {
    const Problem& p = b.p;
    const unsigned warp = d2it::opaque(threadIdx.x) / kWarp;
    const int first_key = warp * kTile, blocks = static_cast<unsigned>(count + kBlock - 1) / kBlock;
    float dk[1][kDk ? kWidth / 8 : 1][4] = {}, dv[1][kDv ? kWidth / 8 : 1][4] = {};
    auto& dk_sums = reinterpret_cast<float (&)[1][kWidth / 8][4]>(dk);
    auto& dv_sums = reinterpret_cast<float (&)[1][kWidth / 8][4]>(dv);
    const unsigned thread = threadIdx.x;
    const T* own_keys = parts.k + first_key * kRow + lane_in<kWidth>(thread % kWarp).down;
    const Keys keys = {d2it::opaque(d2it::shared_address(own_keys)),
                       d2it::shared_address(parts.fixed.rows + first_key + thread % kWarp / 4)};
    // So many queries have all of their pairs with the warp's keys.
    const int whole = d2it::opaque(first_key + kTile > count || p.segmented() ? 0 : count);
    if (copies_next(turn(-1))) {
      fetch<kDk>(0);
      finish_copies<kDk>(0);
    }
    d2it::wait_for_copies<0>();
    __syncthreads();

#pragma unroll 1
    for (int block = 0;; ++block) {
      const unsigned turn = this->turn(block);
      if (kDk && block > 0 && sums_last(turn)) store_queries(block - 1);
      if (block == blocks) break;
      const bool copies = block + 1 < blocks && copies_next(turn);
      if (copies) fetch<kDk>(block + 1);
      const unsigned again = d2it::opaque(threadIdx.x); // not kept: registers are full
      if (first_key < count) {
        const Places places = parts.fixed.places[block % kStages][again % kWarp];
        const int query = block * kBlock;
#pragma unroll
        for (int from = 0; from < kBlock; from += 16) {
          if (from == 0 || query + from < count)
            step<kDk, kDv>(query, from, query + from + 16 <= whole, places, keys, dk_sums, dv_sums);
        }
      }
      if (copies) finish_copies<kDk>(block + 1);
      __syncthreads();
    }
    const unsigned again = d2it::opaque(threadIdx.x), lane = again % kWarp;
    const int own = again / kWarp * kTile;
    if (own >= count) return;
    T *dk_row[2], *dv_row[2];
    int there[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = own + lane / 4 + 8 * r, row = parts.at.rows[key];
      dk_row[r] = parts.fixed.dk.at(row), dv_row[r] = parts.fixed.dv.at(row);
      there[r] = key < count ? p.width : 0;
    }
    if constexpr (kDk) store_columns(dk_sums[0], {p.scale, p.scale}, dk_row, there, 0, b.dk.vectors);
    if constexpr (kDv) store_columns(dv_sums[0], {1.0f, 1.0f}, dv_row, there, 0, b.dv.vectors);
  }

  __device__ void run_window() const {
    fetch_keys();
    if constexpr (kWidth <= 72) {
      walk<true, true>();
    } else { // dk and dv of wide heads do not fit into registers together
      walk<false, true>();
      walk<true, false>();
    }
  }
};

template <typename T, int kWidth, int kRows>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    attention_backward(const __grid_constant__ Backward<T> b) {
  extern __shared__ Line lines[];
  const Problem& p = b.p;
  const Parts<T, kWidth, kRows> parts(lines);
  auto& fixed = parts.fixed;
  const Window& at = parts.at;
  if (b.sums) {
    auto* far = reinterpret_cast<float4*>(b.sums_of_block());
#pragma unroll 1
    for (int i = threadIdx.x; i < static_cast<int>(b.block / 16); i += kBackwardThreads)
      (i < static_cast<int>(b.resident * b.row / 16) ? reinterpret_cast<float4*>(parts.near) : far)[i] =
          make_float4(0, 0, 0, 0);
  }

  if (threadIdx.x < kWarp) parts.find_places(threadIdx.x);

  const int step = p.splits * p.bias_windows;
  int window = blockIdx.x / p.heads; // of residue window % bias_windows
  if (threadIdx.x < kThreads) fetch_slot(p, at, window, threadIdx.x);
  d2it::commit_copies();
#pragma unroll 1
  for (; window < p.windows; window = fixed.number + step) {
    d2it::wait_for_copies<0>();
    const unsigned thread = d2it::opaque(threadIdx.x); // not kept: registers are full
    if (thread < kThreads) {                           // as many as there are positions
      int run;
      const int count = close_up(p, at, window, at.next[thread], thread, run);
      if (thread == 0) fixed.window = {count, run};
      fetch_slot(p, at, window + step, thread);
      d2it::commit_copies();
    } else {
      if (thread == kThreads) fixed.find(b, window);
      __syncthreads(); // as in close_up
      if (thread == kThreads) fixed.number = window;
      __syncthreads();
    }
    __syncthreads();
    const int2 found = fixed.window;
    if (found.x == 0) continue;
    // Without the shuffle, which changes nothing, conditions on it take two instructions each.
    const int run = __shfl_sync(kAll, found.y, threadIdx.x % kWarp);
    Work<T, kWidth, kRows>{b, parts, found.x, b.sums ? run + kSummed : run}.run_window();
    __syncthreads();
  }
  __syncthreads();
  if (b.sums) {
    auto* far = reinterpret_cast<float4*>(b.sums_of_block());
#pragma unroll 1
    for (int i = threadIdx.x; i < static_cast<int>(b.resident * b.row / 16); i += kBackwardThreads)
      far[i] = reinterpret_cast<const float4*>(parts.near)[i];
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
