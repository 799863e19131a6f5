// Attention inside windows on CUDA (D2iT, Eq. 10), forward and backward, for windows of up to 256 positions
// in float16 and bfloat16: softmax(q k^T * scale + bias) v over the tokens that exist.
//
// A block has one head and walks over windows. Of a window it takes the rows that exist, closed up, so that a
// window of n tokens costs n rows of traffic and n^2 pairs, rounded up to tiles of 16. All products are
// mma.sync on tiles of 16 x 16 pairs.
//
// Forward: k and v of the window lie in shared memory, a warp has 16 queries and walks over keys, 64 at a
// time.
//
// Backward: one kernel, five products, each of q, k, v, grad and out read once and dq, dk, dv written once: 8
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
#include "cuda.h"
#include "mma.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <optional>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kTile = 16;     // rows and columns of pairs
constexpr int kPerVector = 8; // elements
constexpr int kBlock = 32;    // queries that the backward takes at a time
constexpr int kKeys = 64;     // keys that the forward takes at a time
constexpr int kStages = 2;    // blocks of queries in shared memory
constexpr int kPad = 8;       // elements behind a row of pairs, against conflicts of banks
constexpr float kLog2e = 1.44269504f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

C10_HOST_DEVICE constexpr int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Elements from one row of a head to the next in shared memory: an odd number of vectors, so that eight rows
// at the same column lie in different banks.
template <int kWidth>
constexpr int kPitch = (kWidth / kPerVector | 1) * kPerVector;
constexpr int kPairsPitch = kBlock + kPad;
C10_HOST_DEVICE constexpr int sums_pitch(int n) { return round_up(n, kWarp) + kPad; }

// ------------------------------------------------------------------------------------------------ the
// problem

// q, k, v, an output or a gradient: (W, N, H, D), or (T, H, D) with slots.
template <typename T>
struct Heads {
  T* data;
  int64_t window, row, head, column;
  bool vectors; // rows are whole vectors (of an output: whole halves of them), aligned to their size

  __device__ T* at(int64_t w, int64_t r, int64_t h) const { return data + w * window + r * row + h * head; }
};

struct Problem {
  const int32_t* slots; // or null: all windows are full
  int64_t slots_window, slots_position, tokens;
  const int64_t* segments; // (segment_windows, n), or null
  int segment_windows;
  const void* bias; // (bias_windows, bias_heads, n, n), or null; of the backward: keys before queries
  int bias_windows;
  bool bias_per_head, bias_single; // bias_single: float32, not the dtype of q
  int run;                         // entries that rows of the bias are aligned to: 1, 2 or 4
  int windows, n, heads, width, splits;
  float scale;

  // The window that rows are counted from: packed windows have theirs in one.
  __device__ int64_t base(int window) const { return slots ? 0 : window; }
};

// What a block keeps of the current window: its rows, closed up.
struct Window {
  int32_t* rows;      // of the tensors
  int32_t* positions; // in the window; 0 behind the last row
  int64_t* segments;  // or null
  unsigned* named;    // a bit for each position
  int32_t* next;      // the slots of the window after this one, each for its thread alone
};

// The row of a position of a window, negative where there is none.
__device__ inline int slot_of(const Problem& p, int window, int position) {
  if (position >= p.n || window >= p.windows) return -1;
  if (!p.slots) return position;
  return __ldg(p.slots + window * p.slots_window + position * p.slots_position);
}

// The same for the position threadIdx.x, to be read from at.next once the thread's copies have arrived.
__device__ inline void fetch_slot(const Problem& p, const Window& at, int window) {
  const int position = threadIdx.x;
  if (p.slots && position < p.n && window < p.windows)
    d2it::copy_async(at.next + position, p.slots + window * p.slots_window + position * p.slots_position);
  else
    at.next[position] = window < p.windows && position < p.n ? position : -1;
}

// Closes up a window, of which the thread has `slot`, that of the position threadIdx.x. Returns its rows;
// `run`: so many of them at a time, 1, 2 or 4, are as many positions in a row, aligned to their number.
__device__ inline int close_up(const Problem& p, const Window& at, int window, int slot, int& run) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, position = threadIdx.x;
  const bool named = slot >= 0 && slot < p.tokens;
  const unsigned own = __ballot_sync(kAll, named);
  if (lane == 0) at.named[warp] = own;
  __syncthreads();
  int place = __popc(own & ((1u << lane) - 1)), count = 0;
  unsigned apart = 0; // bits that differ from the next
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    const unsigned bits = at.named[i];
    if (i < warp) place += __popc(bits);
    count += __popc(bits);
    apart |= bits ^ bits >> 1;
  }
  run = min(p.run, (apart & 0x77777777u) == 0 ? 4 : (apart & 0x55555555u) == 0 ? 2 : 1);
  if (named) {
    at.rows[place] = slot;
    at.positions[place] = position;
    if (at.segments)
      at.segments[place] = p.segments[static_cast<int64_t>(window % p.segment_windows) * p.n + position];
  }
  if (position >= count && position < round_up(p.n, kBlock)) at.positions[position] = 0;
  __syncthreads();
  return count;
}

// A warp's products leave a lane with columns 2t, 2t + 1, 2t + 8 and 2t + 9 of 16. Rows of heads that become
// columns of pairs lie in shared memory in such an order that these are four in a row, 4t .. 4t + 3.
__device__ inline int row_in_place(int place) {
  return place / 16 * 16 + place % 8 / 2 * 4 + place % 16 / 8 * 2 + place % 2;
}

// ------------------------------------------------------------------------------------------------ rows

// A vector of a row into shared memory, zeros behind its end, or everywhere where `row` is null.
template <typename T>
__device__ inline void copy_vector(T* to, const Heads<const T>& from, const T* row, int vector, int width) {
  const int first = vector * kPerVector;
  if (from.vectors) {
    const bool there = row && first < width;
    d2it::copy_async(to + first, there ? row + first : from.data, there);
  } else {
#pragma unroll 1
    for (int i = first; i < first + kPerVector; ++i) to[i] = row && i < width ? row[i * from.column] : T{};
  }
}

constexpr int kPerRow = 4; // threads that copy a row: a warp's vectors of one row lie side by side

// Rows first .. first + rows of the current window, zeros behind the `count` that it has, copied by `threads`
// of which this is `thread`. kColumns: they become columns of pairs.
template <typename T, int kWidth, bool kColumns>
__device__ inline void copy_rows(T* to, const Heads<const T>& from, const Problem& p, const Window& at,
                                 int window, int head, int first, int count, int rows, int thread,
                                 int threads) {
#pragma unroll 1
  for (int place = thread / kPerRow; place < rows; place += threads / kPerRow) {
    const int row = first + (kColumns ? row_in_place(place) : place);
    const T* own = row < count ? from.at(p.base(window), at.rows[row], head) : nullptr;
#pragma unroll
    for (int i = 0; i < kWidth / kPerVector; i += kPerRow) {
      const int vector = i + thread % kPerRow;
      if (vector < kWidth / kPerVector) copy_vector(to + place * kPitch<kWidth>, from, own, vector, p.width);
    }
  }
}

template <typename T>
__device__ inline void store_elements(T* row, int column, int width, uint32_t x) {
  T pair[2];
  memcpy(pair, &x, sizeof(x));
  if (column < width) row[column] = pair[0];
  if (column + 1 < width) row[column + 1] = pair[1];
}

// 16 rows of kCount times 8 columns from `column` on, times a factor for each of the lane's two rows, which
// are null where there is none.
template <typename T, int kCount>
__device__ inline void store_columns(const float (&c)[kCount][4], const float (&factor)[2],
                                     T* const (&row)[2], int column, int width, bool vectors) {
  const int quad = d2it::opaque(threadIdx.x) % 4, odd = quad % 2; // not kept: registers are full
#pragma unroll
  for (int j = 0; j < kCount; j += 2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t x = d2it::pack<T>(c[j][2 * r] * factor[r], c[j][2 * r + 1] * factor[r]);
      if (j + 1 == kCount) {
        const int at = column + 8 * j + 2 * quad;
        if (!row[r]) continue;
        if (vectors) {
          if (at < width) d2it::put(row[r] + at, x);
        } else {
          store_elements(row[r], at, width, x);
        }
        continue;
      }
      // Of two neighbouring 8 columns a lane has two of each; it trades for four of one.
      const int k = j + 1 < kCount ? j + 1 : j;
      const uint32_t y = d2it::pack<T>(c[k][2 * r] * factor[r], c[k][2 * r + 1] * factor[r]);
      const uint32_t other = __shfl_xor_sync(kAll, odd ? x : y, 1);
      const uint2 four = odd ? uint2{other, y} : uint2{x, other};
      const int at = column + 8 * (j + odd) + 4 * (quad / 2);
      if (!row[r]) continue;
      if (vectors) {
        if (at < width) d2it::put(row[r] + at, four);
      } else {
        store_elements(row[r], at, width, four.x);
        store_elements(row[r], at + 2, width, four.y);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ products

// Lanes' addresses of 16 x 16 elements of a row-major matrix for load_matrices: as an a, or transposed as two
// b whose depth runs down the rows...
__device__ inline int down_first(int pitch, unsigned lane) { return lane % 16 * pitch + lane / 16 * 8; }
// ... and as two b whose depth runs along the rows, or transposed as an a.
__device__ inline int across_first(int pitch, unsigned lane) {
  return (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8;
}

// A lane's own elements of 16 x 16 in rows of heads, by the two ways to give them.
struct Lane {
  int down, across;
};

template <int kWidth>
__device__ inline Lane lane_in(unsigned lane) {
  return {down_first(kPitch<kWidth>, lane), across_first(kPitch<kWidth>, lane)};
}

// c (kTiles times 16 rows, kSpans times 16 columns) += a b^T for rows of heads a and b. Tiles of a lie a_step
// elements apart.
template <typename T, int kWidth, int kTiles, int kSpans>
__device__ inline void multiply_rows(float (&c)[kTiles][2 * kSpans][4], const T* a, int a_step, const T* b,
                                     const Lane& lane) {
  constexpr int kRow = kPitch<kWidth>;
  const T *own_a = a + lane.down, *own_b = b + lane.across;
#pragma unroll
  for (int k = 0; k + 16 <= kWidth; k += 16) {
    uint32_t x[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) d2it::load_matrices(x[i], own_a + i * a_step + k);
#pragma unroll
    for (int j = 0; j < kSpans; ++j) {
      uint32_t y[4];
      d2it::load_matrices(y, own_b + j * (16 * kRow) + k);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        d2it::multiply_add<T>(c[i][2 * j], x[i], y[0], y[1]);
        d2it::multiply_add<T>(c[i][2 * j + 1], x[i], y[2], y[3]);
      }
    }
  }
  if constexpr (kWidth % 16 != 0) { // 8 columns more
    constexpr int kFirst = kWidth / 16 * 16;
    const T* tail_b = b + lane.down;
    uint32_t x[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) d2it::load_matrices(x[i], own_a + i * a_step + kFirst);
#pragma unroll
    for (int j = 0; j < kSpans; ++j) {
      uint32_t y[2];
      d2it::load_matrices(y, tail_b + j * (16 * kRow) + kFirst);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        d2it::multiply_add<T>(c[i][2 * j], x[i], y[0]);
        d2it::multiply_add<T>(c[i][2 * j + 1], x[i], y[1]);
      }
    }
  }
}

// c (kTiles times 16 rows, kWidth columns) += weights (kSpans times 16 deep, as an a each) times rows of
// heads.
template <typename T, int kWidth, int kTiles, int kSpans, int kSums>
__device__ inline void add_weighted(float (&c)[kSums][kWidth / 8][4],
                                    const uint32_t (&weights)[kTiles][kSpans][4], const T* rows,
                                    const Lane& lane) {
  constexpr int kRow = kPitch<kWidth>;
#pragma unroll
  for (int s = 0; s < kSpans; ++s) {
    const T* from = rows + lane.down + s * (16 * kRow);
#pragma unroll
    for (int k = 0; k + 16 <= kWidth; k += 16) {
      uint32_t y[4];
      d2it::load_matrices_transposed(y, from + k);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        d2it::multiply_add<T>(c[i][k / 8], weights[i][s], y[0], y[1]);
        d2it::multiply_add<T>(c[i][k / 8 + 1], weights[i][s], y[2], y[3]);
      }
    }
    if constexpr (kWidth % 16 != 0) {
      uint32_t y[2];
      d2it::load_matrices_transposed(y, from + kWidth / 16 * 16);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) d2it::multiply_add<T>(c[i][kWidth / 8 - 1], weights[i][s], y[0], y[1]);
    }
  }
}

// ------------------------------------------------------------------------------------------------ bias

// One head's bias of the current window, where positions lie `run` in a row.
template <typename T>
struct Bias {
  const void* matrix;
  int n, run;
  bool single;

  __device__ Bias(const Problem& p, int residue, int head, int run)
      : matrix(nullptr), n(p.n), run(run), single(p.bias_single) {
    if (!p.bias) return;
    const int64_t at =
        (static_cast<int64_t>(residue) * (p.bias_per_head ? p.heads : 1) + (p.bias_per_head ? head : 0)) * n *
        n;
    matrix = static_cast<const char*>(p.bias) + at * (single ? sizeof(float) : sizeof(T));
  }

  // Entries of type E from an offset of less than 2^32 bytes.
  template <typename E>
  __device__ E at(unsigned offset) const {
    return __ldg(reinterpret_cast<const E*>(static_cast<const char*>(matrix) + offset));
  }

  // Four entries of a row.
  __device__ float4 four(int row, int4 column) const {
    const unsigned first = row * n;
    if (single) {
      const unsigned x = (first + column.x) * 4u, y = (first + column.y) * 4u;
      const unsigned z = (first + column.z) * 4u, w = (first + column.w) * 4u;
      if (run == 4) return at<float4>(x);
      if (run == 2) {
        const float2 a = at<float2>(x), b = at<float2>(z);
        return make_float4(a.x, a.y, b.x, b.y);
      }
      return make_float4(at<float>(x), at<float>(y), at<float>(z), at<float>(w));
    }
    const unsigned x = (first + column.x) * 2u, y = (first + column.y) * 2u;
    const unsigned z = (first + column.z) * 2u, w = (first + column.w) * 2u;
    uint2 bits;
    if (run == 4) {
      bits = at<uint2>(x);
    } else if (run == 2) {
      bits = {at<uint32_t>(x), at<uint32_t>(z)};
    } else {
      bits = {at<uint16_t>(x) | static_cast<uint32_t>(at<uint16_t>(y)) << 16,
              at<uint16_t>(z) | static_cast<uint32_t>(at<uint16_t>(w)) << 16};
    }
    const float2 a = d2it::unpack<T>(bits.x), b = d2it::unpack<T>(bits.y);
    return make_float4(a.x, a.y, b.x, b.y);
  }
};

// ------------------------------------------------------------------------------------------------ forward

template <typename T>
struct Forward {
  Problem p;
  Heads<const T> q, k, v;
  Heads<T> out;
  float* lse; // (windows, heads, n)
};

// The first bytes of shared memory: what close_up fills.
C10_HOST_DEVICE constexpr int window_bytes(int n, bool segments) {
  const int rows = round_up(n, kBlock);
  return kWarps * 4 + kThreads * 4 + rows * 4 + rows * 4 + (segments ? rows * 8 : 0);
}

__device__ inline Window window_in(char* shared, int n, bool segments) {
  const int rows = round_up(n, kBlock);
  auto* ids = reinterpret_cast<int64_t*>(shared);
  auto* rest = reinterpret_cast<int32_t*>(segments ? ids + rows : ids);
  auto* named = reinterpret_cast<unsigned*>(rest + 2 * rows);
  return {rest, rest + rows, segments ? ids : nullptr, named, rest + 2 * rows + kWarps};
}

template <int kWidth>
constexpr int forward_bytes(int n, bool segments) {
  const int rows = 2 * round_up(n, kTile) + kWarps * kTile;
  return window_bytes(n, segments) + rows * kPitch<kWidth> * 2;
}

// 16 queries of a warp, from `first` on, against all keys.
template <typename T, int kWidth>
__device__ inline void attend(const Forward<T>& f, const Window& at, const Bias<T>& bias, int window,
                              int head, int first, int count, const T* q, const T* k, const T* v) {
  const Problem& p = f.p;
  const int64_t base_window = p.base(window);
  const int lane = threadIdx.x % kWarp, quad = lane % 4;
  const int query[2] = {first + lane / 4, first + lane / 4 + 8};
  const Lane own = lane_in<kWidth>(lane);
  int position[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) position[r] = at.positions[query[r]];
  float sums[1][kWidth / 8][4] = {}, most[2] = {-kInfinity, -kInfinity}, total[2] = {};
  const float scale = p.scale * kLog2e;
#pragma unroll 1
  for (int start = 0; start < count; start += kKeys) {
    float s[1][kKeys / 8][4] = {};
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      if (start + j * 16 >= count) break;
      auto& part = reinterpret_cast<float (&)[1][2][4]>(s[0][2 * j]);
      multiply_rows<T, kWidth, 1, 1>(part, q, 0, k + (start + j * 16) * kPitch<kWidth>, own);
    }
    float largest[2] = {most[0], most[1]};
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      const int key = start + j * 16 + quad * 4;
      if (start + j * 16 < count) {
        const int4 where = *reinterpret_cast<const int4*>(at.positions + key);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float4 b = p.bias ? bias.four(position[r], where) : make_float4(0, 0, 0, 0);
          const float added[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& x = s[0][2 * j + e / 2][2 * r + e % 2];
            x = fmaf(x, scale, added[e] * kLog2e);
          }
        }
      }
      if (start + j * 16 + 16 > count || at.segments) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int other = key + e;
            const bool alike = !at.segments || at.segments[query[r]] == at.segments[other];
            if (other >= count || !alike) s[0][2 * j + e / 2][2 * r + e % 2] = -kInfinity;
          }
        }
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) largest[e / 2 % 2] = fmaxf(largest[e / 2 % 2], s[0][2 * j + e / 4][e % 4]);
    }
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2)
        largest[r] = fmaxf(largest[r], __shfl_xor_sync(kAll, largest[r], mask));
      const float base = largest[r] == -kInfinity ? 0.0f : largest[r];
      factor[r] = d2it::exp2_fast(most[r] - base);
      most[r] = largest[r];
      largest[r] = base;
      total[r] *= factor[r];
    }
    uint32_t weights[1][kKeys / 16][4];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[0][j][i] = d2it::exp2_fast(s[0][j][i] - largest[i / 2]);
        total[i / 2] += s[0][j][i];
      }
      weights[0][j / 2][j % 2 * 2] = d2it::pack<T>(s[0][j][0], s[0][j][1]);
      weights[0][j / 2][j % 2 * 2 + 1] = d2it::pack<T>(s[0][j][2], s[0][j][3]);
    }
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[0][j][i] *= factor[i / 2];
    }
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      if (start + j * 16 >= count) break;
      const auto& part = reinterpret_cast<const uint32_t (&)[1][1][4]>(weights[0][j]);
      add_weighted<T, kWidth>(sums, part, v + (start + j * 16) * kPitch<kWidth>, own);
    }
  }
  T* row[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) total[r] += __shfl_xor_sync(kAll, total[r], mask);
    row[r] = query[r] < count ? f.out.at(base_window, at.rows[query[r]], head) : nullptr;
    if (row[r] && quad == 0)
      f.lse[(static_cast<int64_t>(window) * p.heads + head) * p.n + position[r]] =
          total[r] == 0.0f ? kInfinity : most[r] + log2f(total[r]);
    total[r] = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
  }
  store_columns(sums[0], total, row, 0, p.width, f.out.vectors);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth <= 72 ? 2 : 1)
    attention_forward(const __grid_constant__ Forward<T> f) {
  constexpr int kRow = kPitch<kWidth>;
  extern __shared__ float4 shared[];
  const Problem& p = f.p;
  const int warp = threadIdx.x / kWarp, head = blockIdx.x % p.heads;
  const int rows = round_up(p.n, kTile);
  T* k = reinterpret_cast<T*>(shared);
  T* v = k + rows * kRow;
  T* q = v + rows * kRow + warp * kTile * kRow;
  char* rest = reinterpret_cast<char*>(v + (rows + kWarps * kTile) * kRow);
  const Window at = window_in(rest, p.n, p.segments);

  int window = blockIdx.x / p.heads;
  fetch_slot(p, at, window);
  d2it::commit_copies();
  for (; window < p.windows; window += p.splits) {
    d2it::wait_for_copies<0>();
    const int slot = at.next[threadIdx.x];

    int run;
    const int count = close_up(p, at, window, slot, run);
    const auto copy_queries = [&](int first) {
      copy_rows<T, kWidth, false>(q, f.q, p, at, window, head, first, count, kTile,
                                  d2it::opaque(threadIdx.x) % kWarp, kWarp);
    };
    fetch_slot(p, at, window + p.splits);
    copy_rows<T, kWidth, true>(k, f.k, p, at, window, head, 0, count, round_up(count, kTile), threadIdx.x,
                               kThreads);
    copy_rows<T, kWidth, true>(v, f.v, p, at, window, head, 0, count, round_up(count, kTile), threadIdx.x,
                               kThreads);
    copy_queries(warp * kTile);
    d2it::commit_copies();
    if (p.slots && threadIdx.x < p.n && (slot < 0 || slot >= p.tokens))
      f.lse[(static_cast<int64_t>(window) * p.heads + head) * p.n + threadIdx.x] = kInfinity;

    d2it::wait_for_copies<0>();
    __syncthreads();
    const Bias<T> bias(p, window % p.bias_windows, head, run);
    for (int first = warp * kTile; first < count; first += kWarps * kTile) {
      attend<T, kWidth>(f, at, bias, window, head, first, count, q, k, v);
      if (first + kWarps * kTile >= count) break;
      __syncwarp();
      copy_queries(first + kWarps * kTile);
      d2it::commit_copies();
      d2it::wait_for_copies<0>();
      __syncwarp();
    }
    __syncthreads();
  }
}

// ----------------------------------------------------------------------------------------------- backward

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
    const int place = threadIdx.x % kHalf / kPerRow, mine = row_in_place(place);
    const int query = block * kBlock + mine;
    const bool there = query < count;
    const int64_t base = p.base(window);
    const int row = there ? at.rows[query] : 0;
    const auto copy = [&](T* rows, const Heads<const T>& from) {
      const T* own = there ? from.at(base, row, head) : nullptr;
#pragma unroll
      for (int i = 0; i < kWidth / kPerVector; i += kPerRow) {
        const int vector = i + threadIdx.x % kPerRow;
        if (vector < kWidth / kPerVector) copy_vector(rows + place * kRow, from, own, vector, p.width);
      }
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
            if (edge && (key >= count || query + e >= count)) x = 0.0f;
            if (at.segments && x != 0.0f && at.segments[key] != at.segments[query + e]) x = 0.0f;
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
#pragma unroll 4
      for (int key = 0; key < count; key += 16, ds += 16 * kPairsPitch, keys += 16 * kRow) {
        uint32_t x[4];
        d2it::load_matrices_transposed(x, ds);
#pragma unroll
        for (int u = 0; u < kMost; ++u) {
          if (kUnits % kGroups != 0 && group + u * kGroups >= kUnits) break;
          uint32_t y[4];
          d2it::load_matrices_transposed(y, keys + u * kGroups * 16);
          d2it::multiply_add<T>(c[u][0], x, y[0], y[1]);
          d2it::multiply_add<T>(c[u][1], x, y[2], y[3]);
        }
        if constexpr (with_tail.value) {
          uint32_t y[2];
          d2it::load_matrices_transposed(y, keys + (kUnits - kUnits % kGroups) * 16);
          d2it::multiply_add<T>(tail[0], x, y[0], y[1]);
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
    copy_rows<T, kWidth, false>(k, b.k, p, at, window, head, 0, count, tiles, thread, kThreads);
    copy_rows<T, kWidth, false>(k + rows * kRow, b.v, p, at, window, head, 0, count, tiles, thread, kThreads);
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
  constexpr int kSide = kWarp;
  __shared__ float tile[kSide][kSide + 1];
  const int side = (n + kSide - 1) / kSide, pitch = sums_pitch(n);
  const int64_t matrix = blockIdx.x / (side * side);
  const int key = blockIdx.x % (side * side) / side * kSide, query = blockIdx.x % side * kSide;
  const int64_t residue = per_head ? matrix / heads : matrix;
  const int lane = threadIdx.x % kWarp;
  const int first_head = per_head ? static_cast<int>(matrix % heads) : 0,
            last_head = per_head ? first_head + 1 : heads;
  for (int i = threadIdx.x / kWarp; i < kSide; i += kWarps) {
    float sum = 0.0f;
    if (key + i < n && query + lane < n) {
      for (int split = 0; split < splits; ++split) {
        for (int head = first_head; head < last_head; ++head) {
          const int64_t block = (split * bias_windows + residue) * heads + head;
          sum += __ldg(sums + (block * n + key + i) * pitch + query + lane);
        }
      }
    }
    tile[i][lane] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x / kWarp; i < kSide; i += kWarps) {
    if (query + i < n && key + lane < n)
      dbias[(matrix * n + query + i) * n + key + lane] = d2it::to<T>(tile[lane][i]);
  }
}

// ------------------------------------------------------------------------------------------------ unnamed
// rows

__global__ void __launch_bounds__(kThreads) mark_named(const Problem p, uint8_t* unnamed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(p.windows) * p.n) return;
  const int row = slot_of(p, static_cast<int>(i / p.n), static_cast<int>(i % p.n));
  CUDA_KERNEL_ASSERT(row < p.tokens && "slots must name rows that are there");
  if (row >= 0 && row < p.tokens) unnamed[row] = 0;
}

template <typename T>
struct Cleared {
  Heads<T> tensors[3];
  int count;
};

// A warp has one row of every tensor.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    clear_unnamed(const __grid_constant__ Cleared<T> to, const uint8_t* unnamed, int64_t tokens, int width) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= tokens || !unnamed[row]) return;
  for (int i = 0; i < to.count; ++i) {
    for (int column = threadIdx.x % kWarp; column < width; column += kWarp)
      to.tensors[i].at(0, row, 0)[column] = T{};
  }
}

// ------------------------------------------------------------------------------------------------ launch

template <typename T>
Heads<T> heads_of(const Tensor& t, bool packed) {
  using Element = std::remove_const_t<T>;
  const int dims = packed ? 3 : 4;
  Heads<T> heads{static_cast<T*>(const_cast<void*>(t.const_data_ptr())),
                 packed ? 0 : t.stride(0),
                 t.stride(dims - 3),
                 t.stride(dims - 2),
                 t.stride(dims - 1),
                 false};
  // Results are written in halves of vectors.
  const int64_t unit = std::is_const_v<T> ? kPerVector : kPerVector / 2;
  const int64_t width = t.size(dims - 1);
  heads.vectors = (heads.column == 1 || width == 1) && width % unit == 0 && heads.window % unit == 0 &&
                  heads.row % unit == 0 && heads.head % unit == 0 &&
                  reinterpret_cast<uintptr_t>(heads.data) % (unit * sizeof(Element)) == 0;
  return heads;
}

Problem problem_of(const Tensor& q, const std::optional<Tensor>& bias, const std::optional<Tensor>& slots,
                   const std::optional<Tensor>& segments, double scale) {
  Problem p = {};
  const int dims = slots ? 3 : 4;
  p.heads = static_cast<int>(q.size(dims - 2));
  p.width = static_cast<int>(q.size(dims - 1));
  const int64_t windows = slots ? slots->size(0) : q.size(0);
  if (windows > std::numeric_limits<int>::max() / 2)
    d2it::fail("window attention: too many windows, ", windows);
  p.windows = static_cast<int>(windows);
  p.n = static_cast<int>(slots ? slots->size(1) : q.size(1));
  p.tokens = slots ? q.size(0) : p.n;
  if (slots) {
    p.slots = static_cast<const int32_t*>(slots->const_data_ptr());
    p.slots_window = slots->stride(0), p.slots_position = slots->stride(1);
  }
  p.segment_windows = p.bias_windows = 1;
  if (segments) {
    p.segments = static_cast<const int64_t*>(segments->const_data_ptr());
    p.segment_windows = static_cast<int>(segments->size(0));
  }
  p.run = p.n % 4 == 0 ? 4 : p.n % 2 == 0 ? 2 : 1;
  if (bias) {
    p.bias = bias->const_data_ptr();
    p.bias_windows = static_cast<int>(bias->size(0));
    p.bias_per_head = bias->size(1) > 1;
    p.bias_single = bias->scalar_type() == ScalarType::Float;
    while (reinterpret_cast<uintptr_t>(p.bias) % (p.run * bias->element_size()) != 0) p.run /= 2;
  }
  p.scale = static_cast<float>(scale);
  return p;
}

unsigned blocks_of(int64_t count, const char* what) {
  if (count > std::numeric_limits<int>::max()) d2it::fail(what, ": too many blocks, ", count);
  return static_cast<unsigned>(count);
}

// Calls `function` with the least of the widths that kernels are made for.
template <typename Function>
void with_width(int width, const Function& function) {
  if (width <= 32) return function(std::integral_constant<int, 32>());
  if (width <= 64) return function(std::integral_constant<int, 64>());
  if (width <= 72) return function(std::integral_constant<int, 72>());
  if (width <= 96) return function(std::integral_constant<int, 96>());
  if (width <= 128) return function(std::integral_constant<int, 128>());
  d2it::fail("window attention on CUDA takes heads of up to 128, not ", width);
}

template <typename Function>
void with_dtype(ScalarType dtype, const Function& function) {
  if (dtype == ScalarType::Half) return function(__half());
  if (dtype == ScalarType::BFloat16) return function(__nv_bfloat16());
  d2it::fail("window attention on CUDA takes float16 and bfloat16");
}

// Zeros the rows of packed tensors that no slot names, and touches no other; `unnamed`: a byte for each row.
template <typename T>
void clear(const Problem& p, const std::vector<Tensor>& tensors, const std::optional<Tensor>& unnamed,
           cudaStream_t stream) {
  if (!p.slots || p.tokens == 0 || p.heads * p.width == 0) return;
  auto* flags = static_cast<uint8_t*>(const_cast<void*>(unnamed->const_data_ptr()));
  if (p.windows > 0 && p.n > 0) {
    const unsigned blocks =
        blocks_of((static_cast<int64_t>(p.windows) * p.n + kThreads - 1) / kThreads, "window attention");
    mark_named<<<blocks, kThreads, 0, stream>>>(p, flags);
  }
  Cleared<T> to = {};
  for (const Tensor& tensor : tensors) to.tensors[to.count++] = heads_of<T>(tensor, true);
  const unsigned blocks = blocks_of((p.tokens + kWarps - 1) / kWarps, "window attention");
  clear_unnamed<T><<<blocks, kThreads, 0, stream>>>(to, flags, p.tokens, p.heads * p.width);
}

// lse (windows, heads, n): the base-2 logarithm of every row's sum, infinite where there is no row or no key.
// unnamed: a byte for each row of packed windows, ones.
void window_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias, std::optional<Tensor> slots,
                      std::optional<Tensor> segment_ids, double scale, Tensor out, Tensor lse,
                      std::optional<Tensor> unnamed) {
  Problem p = problem_of(q, bias, slots, segment_ids, scale);
  const d2it::OnDevice device(q);
  const bool packed = slots.has_value();
  with_dtype(q.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (p.windows > 0 && q.numel() > 0) {
      with_width(p.width, [&](auto width) {
        constexpr int kWidth = width.value;
        const int bytes = forward_bytes<kWidth>(p.n, p.segments);
        // A block starts with little: many of them, which windows of any length keep busy.
        p.splits = static_cast<int>(std::clamp(16 * device.processors() / p.heads, 1, p.windows));
        const Forward<T> f{p,
                           heads_of<const T>(q, packed),
                           heads_of<const T>(k, packed),
                           heads_of<const T>(v, packed),
                           heads_of<T>(out, packed),
                           static_cast<float*>(const_cast<void*>(lse.const_data_ptr()))};
        const auto kernel = attention_forward<T, kWidth>;
        d2it::allow_shared(kernel, bytes);
        kernel<<<blocks_of(static_cast<int64_t>(p.splits) * p.heads, "window attention"), kThreads, bytes,
                 device.stream>>>(f);
      });
    }
    clear<T>(p, {out}, unnamed, device.stream);
  });
  d2it::check_launch("window_attention");
}

// bias: transposed, keys before queries. sums: (splits, bias_windows, heads, n, sums_pitch) float32, and
// dbias, where the bias's gradient is wanted.
void window_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias,
                               std::optional<Tensor> slots, std::optional<Tensor> segment_ids, Tensor out,
                               Tensor lse, double scale, Tensor dq, Tensor dk, Tensor dv,
                               std::optional<Tensor> sums, std::optional<Tensor> dbias,
                               std::optional<Tensor> unnamed, int64_t splits) {
  Problem p = problem_of(q, bias, slots, segment_ids, scale);
  const d2it::OnDevice device(q);
  const bool packed = slots.has_value();
  with_dtype(q.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (p.windows > 0 && q.numel() > 0) {
      with_width(p.width, [&](auto width) {
        constexpr int kWidth = width.value;
        p.splits = static_cast<int>(splits);
        Backward<T> b{p,
                      heads_of<const T>(q, packed),
                      heads_of<const T>(k, packed),
                      heads_of<const T>(v, packed),
                      heads_of<const T>(grad, packed),
                      heads_of<const T>(out, packed),
                      static_cast<const float*>(lse.const_data_ptr()),
                      heads_of<T>(dq, packed),
                      heads_of<T>(dk, packed),
                      heads_of<T>(dv, packed),
                      nullptr,
                      0,
                      0,
                      0};
        int bytes = backward_bytes<kWidth>(p.n, p.segments);
        if (sums) {
          const int row = sums_pitch(p.n) * static_cast<int>(sizeof(float));
          b.row = row, b.block = p.n * row;
          b.sums = static_cast<float*>(const_cast<void*>(sums->const_data_ptr()));
          b.resident = std::clamp((device.most_shared() - bytes) / row, 0, p.n);
          bytes += b.resident * row;
        }
        const auto kernel = attention_backward<T, kWidth>;
        d2it::allow_shared(kernel, bytes);
        const int64_t blocks = splits * p.bias_windows * p.heads;
        kernel<<<blocks_of(blocks, "window attention"), kThreads, bytes, device.stream>>>(b);
      });
      if (dbias) {
        const int64_t side = (p.n + kWarp - 1) / kWarp, matrices = dbias->size(0) * dbias->size(1);
        const unsigned blocks = blocks_of(matrices * side * side, "window attention");
        const auto* from = static_cast<const float*>(sums->const_data_ptr());
        const auto reduce = [&](auto like) {
          using Element = decltype(like);
          auto* to = static_cast<Element*>(const_cast<void*>(dbias->const_data_ptr()));
          sum_blocks<Element><<<blocks, kThreads, 0, device.stream>>>(from, to, p.bias_windows, p.heads, p.n,
                                                                      static_cast<int>(splits),
                                                                      p.bias_per_head || p.heads == 1);
        };
        if (dbias->scalar_type() == ScalarType::Float) {
          reduce(float());
        } else {
          with_dtype(dbias->scalar_type(), reduce);
        }
      }
    }
    clear<T>(p, {dq, dk, dv}, unnamed, device.stream);
  });
  d2it::check_launch("window_attention_backward");
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CUDA, m) {
  m.impl("window_attention_saved", TORCH_BOX(&window_attention));
  m.impl("window_attention_saved_backward", TORCH_BOX(&window_attention_backward));
}
