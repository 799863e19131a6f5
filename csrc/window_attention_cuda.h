// window_attention on CUDA: what forward and backward share, the windows, their rows, products and the bias.
#pragma once

#include "cuda.h"
#include "mma.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <limits>
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
constexpr int kPad = 8;       // entries behind a row of the sum of dS, against conflicts of banks
constexpr float kLog2e = 1.44269504f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

C10_HOST_DEVICE constexpr int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Elements from one row of a head to the next in shared memory: an odd number of vectors, so that eight rows
// at the same column lie in different banks.
template <int kWidth>
constexpr int kPitch = (kWidth / kPerVector | 1) * kPerVector;
C10_HOST_DEVICE constexpr int sums_pitch(int n) { return round_up(n, kWarp) + kPad; }

// ---------------------------------------------------------------------------------------- the problem

// q, k, v, an output or a gradient: (W, N, H, D), or (T, H, D) with slots.
template <typename T>
struct Heads {
  T* data;
  int64_t window, row, head, column;
  bool vectors; // rows are whole vectors, aligned to their size

  __device__ T* at(int64_t w, int64_t r, int64_t h) const { return data + w * window + r * row + h * head; }
};

struct Problem {
  const int32_t* slots; // or null: all windows are full
  int64_t slots_window, slots_position, tokens;
  const int64_t* segments; // (segment_windows, n), or null
  int segment_windows;     // 0 where there are none
  float unit;              // scale * log2(e)
  // (bias_windows, bias_heads, n, n) over the scale, or null; of the backward: keys before queries. Products
  // begin with it, and what comes of both is scaled.
  const float* bias;
  int bias_windows;
  bool bias_per_head;
  int run; // entries that rows of the bias are aligned to: 1, 2 or 4
  int windows, n, heads, width, splits;
  float scale;

  __device__ bool segmented() const { return segment_windows > 0; }
  // The window that rows are counted from: packed windows have theirs in one.
  __device__ int64_t base(int window) const { return slots ? 0 : window; }
};

// What a block keeps of the current window: its rows, closed up.
struct Window {
  int32_t* rows;      // of the tensors
  int32_t* positions; // in the window; 0 behind the last row
  int64_t* segments;  // of each row, if there are any
  unsigned* named;    // a bit for each position
  int32_t* next;      // the slots of the window after this one, each for its thread alone
};

// The row of a position of a window, negative where there is none.
__device__ inline int slot_of(const Problem& p, int window, int position) {
  if (position >= p.n || window >= p.windows) return -1;
  if (!p.slots) return position;
  return __ldg(p.slots + window * p.slots_window + position * p.slots_position);
}

// The same for the position `thread`, the number of the thread, to be read from at.next once the thread's
// copies have arrived.
__device__ inline void fetch_slot(const Problem& p, const Window& at, int window, unsigned thread) {
  const int position = thread;
  if (p.slots && position < p.n && window < p.windows)
    d2it::copy_async(at.next + position, p.slots + window * p.slots_window + position * p.slots_position);
  else
    at.next[position] = window < p.windows && position < p.n ? position : -1;
}

// Closes up a window, of which `thread`, the thread, has `slot`, that of this position. Returns its rows;
// `run`: so many of them at a time, 1, 2 or 4, are as many positions in a row, aligned to their number.
__device__ inline int close_up(const Problem& p, const Window& at, int window, int slot, unsigned thread,
                               int& run) {
  const int lane = thread % kWarp, warp = thread / kWarp, position = thread;
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
    if (p.segmented())
      at.segments[place] = p.segments[static_cast<int64_t>(window % p.segment_windows) * p.n + position];
  }
  if (position >= count && position < round_up(p.n, kKeys)) at.positions[position] = 0;
  __syncthreads();
  return count;
}

// The first bytes of shared memory: what close_up fills.
C10_HOST_DEVICE constexpr int window_bytes(int n) {
  return kWarps * 4 + kThreads * 4 + round_up(n, kKeys) * (8 + 4 + 4);
}

__device__ inline Window window_in(char* shared, int n, bool segments) {
  const int rows = round_up(n, kKeys);
  auto* ids = reinterpret_cast<int64_t*>(shared);
  auto* rest = reinterpret_cast<int32_t*>(ids + rows);
  auto* named = reinterpret_cast<unsigned*>(rest + 2 * rows);
  return {rest, rest + rows, segments ? ids : nullptr, named, rest + 2 * rows + kWarps};
}

// A warp's products leave a lane with columns 2t, 2t + 1, 2t + 8 and 2t + 9 of 16. Rows of heads that become
// columns of pairs lie in shared memory in such an order that these are four in a row, 4t .. 4t + 3.
__device__ inline unsigned row_in_place(unsigned place) {
  return place / 16 * 16 + place % 8 / 2 * 4 + place % 16 / 8 * 2 + place % 2;
}

// ------------------------------------------------------------------------------------------------ rows

constexpr int kPerRow = 4; // threads that copy a row: a warp's vectors of one row lie side by side

// A thread's vectors of a row into shared memory, zeros from column `there` on. `to` and `row` begin with its
// first one; vectors: whether rows are whole vectors, aligned to their size.
template <typename T, int kWidth>
__device__ inline void copy_row(T* to, const T* row, int64_t column, bool vectors, int part, int there) {
  constexpr int kVectors = kWidth / kPerVector;
  if (vectors) {
#pragma unroll
    for (int i = 0; i < kVectors; i += kPerRow)
      d2it::copy_async(to + i * kPerVector, row + i * kPerVector, (i + part) * kPerVector < there,
                       i + kPerRow <= kVectors || part < kVectors - i);
  } else {
#pragma unroll 1
    for (int i = 0; i < kVectors - part; i += kPerRow) {
#pragma unroll 1
      for (int e = i * kPerVector; e < (i + 1) * kPerVector; ++e)
        to[e] = e + part * kPerVector < there ? row[e * column] : T{};
    }
  }
}

// Rows first .. first + rows of the current window, of each tensor, zeros behind the `count` that it has,
// copied by `threads` of which this is `thread`.
template <typename T, int kWidth, int kCount>
__device__ inline void copy_rows(T* const (&to)[kCount], const Heads<const T>* const (&from)[kCount],
                                 const Problem& p, const Window& at, int window, int head, int first,
                                 int count, int rows, int thread, int threads) {
  const int part = thread % kPerRow;
  const T* base[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    base[i] = from[i]->at(p.base(window), 0, head) + part * kPerVector * from[i]->column;
#pragma unroll 1
  for (int place = thread / kPerRow; place < rows; place += threads / kPerRow) {
    const int row = first + place, number = at.rows[min(row, count - 1)];
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      copy_row<T, kWidth>(to[i] + place * kPitch<kWidth> + part * kPerVector, base[i] + number * from[i]->row,
                          from[i]->column, from[i]->vectors, part, row < count ? p.width : 0);
  }
}

// Where an element of rows of 32 lies, so that eight rows at the same column lie in different banks: with so
// many columns more, 8 or 16, a bit of it changes, with 16 rows more none.
__device__ inline unsigned in_rows(unsigned row, unsigned column) {
  return row * 32 + (column / 8 ^ row / 2 % 4) * 8 + column % 8;
}

template <typename T>
__device__ inline void store_elements(T* row, int column, int width, uint32_t x) {
  T pair[2];
  memcpy(pair, &x, sizeof(x));
  if (column < width) row[column] = pair[0];
  if (column + 1 < width) row[column + 1] = pair[1];
}

// 16 rows of kCount times 8 columns from `column` on, times a factor for each of the lane's two rows, which
// have `there` columns: none where there is no row.
template <typename T, int kCount>
__device__ inline void store_columns(const float (&c)[kCount][4], const float (&factor)[2],
                                     T* const (&row)[2], const int (&there)[2], int column, bool vectors) {
  const unsigned quad = d2it::opaque(threadIdx.x) % 4, odd = quad % 2; // not kept: registers are full
  const int first = column + 8 * odd + 4 * (quad / 2);
  const auto store = [&](const auto& put_two, const auto& put_one) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto pair = [&](int j) {
        return d2it::pack<T>(c[j][2 * r] * factor[r], c[j][2 * r + 1] * factor[r]);
      };
#pragma unroll
      for (int j = 0; j + 1 < kCount; j += 2) {
        // Of two neighbouring 8 columns a lane has two of each; it trades for four of one.
        const uint32_t x = pair(j), y = pair(j + 1), other = __shfl_xor_sync(kAll, odd ? x : y, 1);
        put_two(row[r], first + 8 * j, there[r], uint2{odd ? other : x, odd ? y : other});
      }
      if constexpr (kCount % 2 != 0)
        put_one(row[r], column + 8 * (kCount - 1) + 2 * static_cast<int>(quad), there[r], pair(kCount - 1));
    }
  };
  if (vectors) {
    const auto put = [](T* row, int at, int there, auto x) { d2it::put(row + at, x, at < there); };
    store(put, put);
  } else {
    const auto put = [](T* row, int at, int there, uint32_t x) { store_elements(row, at, there, x); };
    store([&](T* row, int at, int there, uint2 x) { put(row, at, there, x.x), put(row, at + 2, there, x.y); },
          put);
  }
}

// ------------------------------------------------------------------------------------------------ products

// Lanes' addresses of 16 x 16 elements of a row-major matrix for load_matrices: as an a, or transposed as two
// b whose depth runs down the rows...
__device__ inline unsigned down_first(unsigned pitch, unsigned lane) {
  return lane % 16 * pitch + lane / 16 * 8;
}
// ... and as two b whose depth runs along the rows, or transposed as an a.
__device__ inline unsigned across_first(unsigned pitch, unsigned lane) {
  return (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8;
}

// A lane's own elements of 16 x 16 in rows of heads, by the two ways to give them.
struct Lane {
  unsigned down, across;
};

template <int kWidth>
__device__ inline Lane lane_in(unsigned lane) {
  return {down_first(kPitch<kWidth>, lane), across_first(kPitch<kWidth>, lane)};
}

// c (kTiles times 16 rows, kSpans times 16 columns) = a b^T, or += a b^T, for rows of heads a and b. Tiles of
// a lie a_step elements apart. a_down, b_across, b_down: with the lane's own elements.
template <typename T, int kWidth, int kTiles, int kSpans, bool kAdd = false, typename A, typename B>
__device__ inline void multiply_rows(float (&c)[kTiles][2 * kSpans][4], A a_down, int a_step, B b_across,
                                     B b_down) {
  constexpr int kRow = kPitch<kWidth>;
#pragma unroll
  for (int k = 0; k + 16 <= kWidth; k += 16) {
    uint32_t x[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) d2it::load_matrices(x[i], a_down + i * a_step + k);
#pragma unroll
    for (int j = 0; j < kSpans; ++j) {
      uint32_t y[4];
      d2it::load_matrices(y, b_across + j * (16 * kRow) + k);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (k == 0 && !kAdd) {
            d2it::multiply<T>(c[i][2 * j + h], x[i], y[2 * h], y[2 * h + 1]);
          } else {
            d2it::multiply_add<T>(c[i][2 * j + h], x[i], y[2 * h], y[2 * h + 1]);
          }
        }
      }
    }
  }
  if constexpr (kWidth % 16 != 0) { // 8 columns more
    constexpr int kFirst = kWidth / 16 * 16;
    uint32_t x[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) d2it::load_matrices(x[i], a_down + i * a_step + kFirst);
#pragma unroll
    for (int j = 0; j < kSpans; ++j) {
      uint32_t y[2];
      d2it::load_matrices(y, b_down + j * (16 * kRow) + kFirst);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        d2it::multiply_add<T>(c[i][2 * j], x[i], y[0]);
        d2it::multiply_add<T>(c[i][2 * j + 1], x[i], y[1]);
      }
    }
  }
}

template <typename T, int kWidth, int kTiles, int kSpans, bool kAdd = false, typename A, typename B>
__device__ inline void multiply_rows(float (&c)[kTiles][2 * kSpans][4], A a, int a_step, B b,
                                     const Lane& lane) {
  multiply_rows<T, kWidth, kTiles, kSpans, kAdd>(c, a + lane.down, a_step, b + lane.across, b + lane.down);
}

// c (kTiles times 16 rows, kWidth columns) += weights (kSpans times 16 deep, as an a each) times rows of
// heads; rows_down: with the lane's own elements.
template <typename T, int kWidth, int kTiles, int kSpans, int kSums, typename P>
__device__ inline void add_weighted(float (&c)[kSums][kWidth / 8][4],
                                    const uint32_t (&weights)[kTiles][kSpans][4], P rows_down) {
  constexpr int kRow = kPitch<kWidth>;
#pragma unroll
  for (int s = 0; s < kSpans; ++s) {
    const P from = rows_down + s * (16 * kRow);
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

template <typename T, int kWidth, int kTiles, int kSpans, int kSums, typename P>
__device__ inline void add_weighted(float (&c)[kSums][kWidth / 8][4],
                                    const uint32_t (&weights)[kTiles][kSpans][4], P rows, const Lane& lane) {
  add_weighted<T, kWidth>(c, weights, rows + lane.down);
}

// ------------------------------------------------------------------------------------------------ bias

__device__ inline int64_t bias_matrix(const Problem& p, int residue, int head) {
  return static_cast<int64_t>(residue) * (p.bias_per_head ? p.heads : 1) + (p.bias_per_head ? head : 0);
}

// One head's bias of the current window.
struct Bias {
  const float* matrix; // or null
  int n;

  __device__ Bias(const Problem& p, int residue, int head) : matrix(nullptr), n(p.n) {
    if (p.bias) matrix = p.bias + bias_matrix(p, residue, head) * n * n;
  }

  // Where a row begins.
  __device__ const char* row(int position) const {
    return reinterpret_cast<const char*>(matrix) + static_cast<unsigned>(position * n) * sizeof(float);
  }

  // Entries of a row that begins there, from a column that is a multiple of their number.
  template <typename E>
  static __device__ E at(const char* row, unsigned column) {
    return __ldg(reinterpret_cast<const E*>(row + uint64_t{column} * sizeof(float)));
  }

  // Four entries of a row, whose positions lie `run` in a row.
  __device__ float4 four(int position, int4 column, int run) const {
    const char* own = row(position);
    if (run == 4) return at<float4>(own, column.x);
    if (run == 2) {
      const float2 a = at<float2>(own, column.x), b = at<float2>(own, column.z);
      return make_float4(a.x, a.y, b.x, b.y);
    }
    return make_float4(at<float>(own, column.x), at<float>(own, column.y), at<float>(own, column.z),
                       at<float>(own, column.w));
  }
};

} // namespace
