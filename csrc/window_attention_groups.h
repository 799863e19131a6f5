// window_attention on CUDA for windows of up to 64 positions: what forward and backward share.
//
// A block of four warps has one head and walks over chunks: neighbouring windows that share a bias, up to
// 768 positions. The rows of a chunk are closed up, and whole windows of them, as many as have up to 64
// rows, are a group: up to four tiles of 16 rows, a warp for each. Pairs of two windows of a group have a
// weight of zero, and pairs of tiles without a window in common are not formed. So time follows the rows
// that exist.
//
// 0 * NaN is NaN: where a result of a group is not finite, its windows are taken again one at a time, and
// what comes of them overwrites what the group left.
#pragma once

#include "window_attention_cuda.h"

namespace {

constexpr int kGroup = 64; // rows
constexpr int kGroupWarps = kGroup / kTile;
constexpr int kGroupThreads = kGroupWarps * kWarp;
constexpr int kChunk = 768; // positions
constexpr int kChunkWindows = 64;
constexpr int kNever = 1 << 20;        // rows that no chunk has
constexpr uint16_t kNoWindow = 0xff00; // a place in a window of its own

// The current chunk in shared memory; its rows come closed up, windows one after the other.
struct Chunk {
  int64_t* segments; // of each row, or null
  int32_t* rows;     // of the tensors, dense windows one behind the other
  int32_t* starts;   // the first row of each window, then their end, then kNever
  unsigned* named;   // a bit for each position
  uint16_t* places;  // of each row: window of the chunk * 256 + position; kNoWindow in a tile behind the last
};

constexpr int kStarts = kChunkWindows + 1 + kWarp;

C10_HOST_DEVICE constexpr int chunk_bytes(bool segments) {
  return round_up(kChunk * 4 + (kChunk + kTile) * 2 + (kStarts + kChunk / kWarp) * 4, 16) +
         (segments ? kChunk * 8 : 0);
}

__device__ inline Chunk chunk_in(char* shared, bool segments) {
  auto* ids = reinterpret_cast<int64_t*>(shared);
  auto* rows = reinterpret_cast<int32_t*>(segments ? ids + kChunk : ids);
  auto* places = reinterpret_cast<uint16_t*>(rows + kChunk);
  auto* starts = reinterpret_cast<int32_t*>(places + kChunk + kTile);
  return {segments ? ids : nullptr, rows, starts, reinterpret_cast<unsigned*>(starts + kStarts), places};
}

// Windows of one bias of all, and those of a chunk among them.
struct Residue {
  int first, step, count; // windows first + i * step
  int at, windows;        // of the chunk: i from `at` on

  __device__ int window(int place) const { return first + (at + (place >> 8)) * step; }
};

// The most windows that a chunk has.
C10_HOST_DEVICE inline int chunk_windows(int n) { return min(kChunk / n, kChunkWindows); }

// Closes up a chunk. `absent` is called with the window and the position of what has no row. Returns how
// many positions at a time are as many rows in a row, 1, 2 or 4.
template <typename Absent>
__device__ inline int close_chunk(const Problem& p, const Chunk& at, const Residue& of,
                                  const Absent& absent) {
  constexpr int kSteps = kChunk / kGroupThreads;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, positions = of.windows * p.n;
  int slots[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int place = i * kGroupThreads + threadIdx.x, window = place / p.n;
    slots[i] = -1;
    if (place < positions) {
      const int own = of.window(window << 8);
      slots[i] = slot_of(p, own, place - window * p.n);
      if (slots[i] >= p.tokens) slots[i] = -1;
      if (!p.slots) slots[i] += own * p.n;
      if (slots[i] < 0) absent(own, place - window * p.n);
    }
    const unsigned bits = __ballot_sync(kAll, slots[i] >= 0);
    if (lane == 0) at.named[i * kGroupWarps + warp] = bits;
  }
  __syncthreads();
  const unsigned word = lane < kChunk / kWarp ? at.named[lane] : 0;
  int before = __popc(word);
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAll, before, step);
    if (lane >= step) before += other;
  }
  const int count = __shfl_sync(kAll, before, kWarp - 1);
  before -= __popc(word);
  const unsigned apart = word ^ word >> 1; // bits that differ from the next
  const bool pairs = __ballot_sync(kAll, (apart & 0x55555555u) != 0) == 0;
  const bool fours = pairs && __ballot_sync(kAll, (apart & 0x77777777u) != 0) == 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int place = i * kGroupThreads + threadIdx.x, window = place / p.n, own = i * kGroupWarps + warp;
    const int row = __shfl_sync(kAll, before, own) + __popc(at.named[own] & ((1u << lane) - 1));
    if (slots[i] >= 0) {
      const int position = place - window * p.n;
      at.rows[row] = slots[i];
      at.places[row] = static_cast<uint16_t>(window << 8 | position);
      if (at.segments)
        at.segments[row] =
            p.segments[static_cast<int64_t>(of.window(window << 8) % p.segment_windows) * p.n + position];
    }
  }
  if (threadIdx.x < kTile) at.places[count + threadIdx.x] = kNoWindow;
  const int window = threadIdx.x, place = min(window, of.windows) * p.n,
            own = min(place / kWarp, kChunk / kWarp - 1);
  const int start = __shfl_sync(kAll, before, own) + __popc(at.named[own] & ((1u << place % kWarp) - 1));
  if (window < kStarts) at.starts[window] = window > of.windows ? kNever : place == kChunk ? count : start;
  __syncthreads();
  return min(p.run, fours ? 4 : pairs ? 2 : 1);
}

// Rows of a chunk that are worked on together: those of its windows window .. end.
struct Group {
  int window, end;  // of the chunk
  int first, count; // rows

  // As many windows from `window` on as have up to kGroup rows; one where `apart`.
  __device__ Group(const Chunk& at, int window, bool apart) : window(window) {
    const int lane = threadIdx.x % kWarp;
    first = at.starts[window];
    const unsigned fits = __ballot_sync(kAll, at.starts[window + 1 + lane] - first <= kGroup);
    end = window + (apart ? 1 : __popc(fits));
    count = at.starts[end] - first;
  }

  // The tiles, from and to, that have windows in common with the tile from row `row` on.
  __device__ int2 tiles(const Chunk& at, int row) const {
    const int last = min(row + kTile, count) - 1;
    const int from = at.starts[at.places[first + row] >> 8],
              to = at.starts[(at.places[first + last] >> 8) + 1];
    return {(from - first) / kTile, (to - first - 1) / kTile};
  }
};

// The rows of one head, of which a group takes one by its number: packed rows, or dense windows that lie one
// behind the other. Inputs are whole vectors.
template <typename T>
struct Rows {
  char* base;
  unsigned bytes; // from one to the next

  __device__ Rows(const Heads<T>& heads, int head)
      : base(reinterpret_cast<char*>(const_cast<std::remove_const_t<T>*>(heads.data + head * heads.head))),
        bytes(static_cast<unsigned>(heads.row) * sizeof(T)) {}
  __device__ T* at(int row) const {
    return reinterpret_cast<T*>(base + static_cast<uint64_t>(static_cast<unsigned>(row)) * bytes);
  }
};

// All rows of a group in the order of columns of pairs, of kTensors tensors, zeros up to the end of the last
// tile.
template <typename T, int kWidth, int kTensors>
__device__ inline void copy_group(T* const (&to)[kTensors], const Rows<const T> (&from)[kTensors],
                                  const Chunk& at, const Group& group, int width) {
  constexpr int kVectors = kWidth / kPerVector;
  const int rows = round_up(group.count, kTile), part = threadIdx.x % kPerRow;
#pragma unroll 1
  for (int place = threadIdx.x / kPerRow; place < rows; place += kGroupThreads / kPerRow) {
    const int row = row_in_place(place), in = at.rows[group.first + min(row, group.count - 1)];
    const int there = row < group.count ? width : 0;
#pragma unroll
    for (int t = 0; t < kTensors; ++t) {
      const T* own = from[t].at(in) + part * kPerVector;
      T* copy = to[t] + place * kPitch<kWidth> + part * kPerVector;
#pragma unroll
      for (int i = 0; i < kVectors; i += kPerRow) {
        if (i + kPerRow <= kVectors || part < kVectors - i)
          d2it::copy_async(copy + i * kPerVector, own + i * kPerVector, (i + part) * kPerVector < there);
      }
    }
  }
}

// 16 rows of kCount times 8 columns, times a factor for each of the lane's two rows, of which it has the
// numbers, negative where there is none.
template <typename T, int kCount>
__device__ inline void store_rows(const float (&c)[kCount][4], const float (&factor)[2], const Rows<T>& to,
                                  const int (&number)[2], int width) {
  const int quad = threadIdx.x % 4, odd = quad % 2, first = 8 * odd + 4 * (quad / 2);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    T* row = to.at(number[r]);
    // Columns behind the head's width are left out: there are none where kernels are made for it.
    const int there = number[r] >= 0 ? width : 0;
#pragma unroll
    for (int j = 0; j + 1 < kCount; j += 2) {
      // Of two neighbouring 8 columns a lane has two of each; it trades for four of one.
      const uint32_t x = d2it::pack<T>(c[j][2 * r] * factor[r], c[j][2 * r + 1] * factor[r]);
      const uint32_t y = d2it::pack<T>(c[j + 1][2 * r] * factor[r], c[j + 1][2 * r + 1] * factor[r]);
      const uint32_t other = __shfl_xor_sync(kAll, odd ? x : y, 1);
      if (8 * j + first < there) d2it::put(row + 8 * j + first, odd ? uint2{other, y} : uint2{x, other});
    }
    if constexpr (kCount % 2 != 0) {
      constexpr int j = kCount - 1;
      const uint32_t x = d2it::pack<T>(c[j][2 * r] * factor[r], c[j][2 * r + 1] * factor[r]);
      if (8 * j + 2 * quad < there) d2it::put(row + 8 * j + 2 * quad, x);
    }
  }
}

// The sums of a window's rows, by position.
template <typename F>
__device__ inline F* lse_of(F* lse, const Problem& p, int window, int head) {
  return lse + static_cast<uint64_t>(static_cast<unsigned>(window)) * static_cast<unsigned>(p.heads * p.n) +
         head * p.n;
}

// Of a lane the rows of a tile whose products it holds, in the order of columns.
__device__ inline int lane_row(int lane, int r) { return lane / 8 * 4 + lane / 4 % 2 + 2 * r; }

// The places of four rows; behind the group's end they are of other windows.
struct Four {
  int place[4];

  __device__ Four(const Chunk& at, int row) {
#pragma unroll
    for (int e = 0; e < 4; ++e) place[e] = at.places[row + e];
  }
  __device__ int4 positions() const {
    return {place[0] & 255, place[1] & 255, place[2] & 255, place[3] & 255};
  }
};

} // namespace
