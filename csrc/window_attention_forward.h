// window_attention on CUDA, forward.
//
// K and v of the window lie in shared memory, a warp has 16 queries and walks over keys, 64 at a time. What
// is issued for them decides its speed: products begin with the bias, a query's total is a product with ones,
// and 64 keys that are all there pass no branch.
#pragma once

#include "window_attention_cuda.h"

namespace {

template <typename T>
struct Forward {
  Problem p;
  Heads<const T> q, k, v;
  Heads<T> out;
  float* lse; // (windows, heads, n)
};

template <int kWidth>
constexpr int forward_bytes(int n) {
  const int rows = 2 * round_up(n, kTile) + kWarps * kTile;
  return window_bytes(n) + rows * kPitch<kWidth> * 2;
}

// How a lane finds the bias of its keys: there is none, positions lie two in a row at least, or as they come.
enum class Entries { kNone, kPairs, kOnes };

// 16 queries of a warp, from `first` on, against all keys.
template <typename T, int kWidth, Entries kEntries>
__device__ inline void attend(const Forward<T>& f, const Window& at, int window, int head, int first,
                              int count, d2it::Place<T> q, d2it::Place<T> k, d2it::Place<T> v) {
  constexpr bool kAdd = kEntries != Entries::kNone;
  const Problem& p = f.p;
  const int lane = threadIdx.x % kWarp, quad = lane % 4;
  unsigned entries[2]; // the first of a row
  const Bias bias(p, window % p.bias_windows, head);
#pragma unroll
  for (int r = 0; r < 2; ++r)
    entries[r] = d2it::opaque(static_cast<unsigned>(at.positions[first + lane / 4 + 8 * r] * p.n));
  const float unit = p.unit;
  const uint32_t ones = d2it::pack<T>(1.0f, 1.0f); // a column of v: a query's total
  float sums[1][kWidth / 8][4] = {}, most[2] = {-kInfinity, -kInfinity}, total[4] = {};
  // 64 keys from `start` on. whole: all of them are there, and alike.
  const auto step = [&](auto whole, int start, float (&s)[1][kKeys / 8][4]) {
    constexpr bool kWhole = whole.value;
    const int lane = d2it::opaque(threadIdx.x) % kWarp; // not kept: registers are full
    const Lane own = lane_in<kWidth>(lane);
    const int left = count - start;
    if constexpr (kWhole) {
      multiply_rows<T, kWidth, 1, kKeys / 16, kAdd>(s, q, 0, k + start * kPitch<kWidth>, own);
    } else {
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        if (j * 16 >= left) break;
        auto& part = reinterpret_cast<float (&)[1][2][4]>(s[0][2 * j]);
        multiply_rows<T, kWidth, 1, 1, kAdd>(part, q, 0, k + (start + j * 16) * kPitch<kWidth>, own);
      }
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        if (!at.segments && j * 8 + 8 <= left) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = j * 8 + lane % 4 * 2 + i % 2, query = first + lane / 4 + i / 2 * 8;
          if (key >= left || (at.segments && at.segments[query] != at.segments[start + key]))
            s[0][j][i] = -kInfinity;
        }
      }
    }
    float largest[2] = {most[0], most[1]};
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) largest[i / 2] = fmaxf(largest[i / 2], s[0][j][i]);
    }
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2)
        largest[r] = fmaxf(largest[r], __shfl_xor_sync(kAll, largest[r], mask));
      const float base = largest[r] == -kInfinity ? 0.0f : largest[r];
      factor[r] = d2it::exp2_fast((most[r] - base) * unit);
      most[r] = largest[r];
      largest[r] = base * -unit;
    }
    uint32_t weights[1][kKeys / 16][4];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[0][j][i] = d2it::exp2_fast(fmaf(s[0][j][i], unit, largest[i / 2]));
      weights[0][j / 2][j % 2 * 2] = d2it::pack<T>(s[0][j][0], s[0][j][1]);
      weights[0][j / 2][j % 2 * 2 + 1] = d2it::pack<T>(s[0][j][2], s[0][j][3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i % 2 == 0) total[i] *= factor[i / 2]; // all columns of a row are alike: the others are not read
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j) sums[0][j][i] *= factor[i / 2];
    }
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      if (!kWhole && j * 16 >= left) break;
      const auto& part = reinterpret_cast<const uint32_t (&)[1][1][4]>(weights[0][j]);
      d2it::multiply_add<T>(total, weights[0][j], ones, ones);
      add_weighted<T, kWidth>(sums, part, v + (start + j * 16) * kPitch<kWidth>, own);
    }
  };
#pragma unroll 1
  for (int start = 0; start < count; start += kKeys) {
    float s[1][kKeys / 8][4];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      const int* columns = at.positions + start + j * 8 + quad * 2;
      if constexpr (kEntries == Entries::kPairs) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float2 b = __ldg(reinterpret_cast<const float2*>(bias.matrix + (entries[r] + columns[0])));
          s[0][j][2 * r] = b.x, s[0][j][2 * r + 1] = b.y;
        }
      } else if constexpr (kEntries == Entries::kOnes) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[0][j][i] = __ldg(bias.matrix + (entries[i / 2] + columns[i % 2]));
      }
    }
    if (!at.segments && start + kKeys <= count) {
      step(std::true_type(), start, s);
    } else {
      step(std::false_type(), start, s);
    }
  }
  const int again = d2it::opaque(threadIdx.x) % kWarp; // not kept: registers are full
  T* row[2];
  int there[2];
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = total[2 * r];
    const int query = first + again / 4 + 8 * r;
    row[r] = f.out.at(p.base(window), at.rows[query], head);
    there[r] = query < count ? p.width : 0;
    if (query < count && again % 4 == 0)
      f.lse[(static_cast<int64_t>(window) * p.heads + head) * p.n + at.positions[query]] =
          sum == 0.0f ? kInfinity : fmaf(most[r], unit, __log2f(sum));
    inverse[r] = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
  }
  store_columns(sums[0], inverse, row, there, 0, f.out.vectors);
}

// Whether registers suffice for two blocks on a multiprocessor; where they do not, the compiler was seen to
// spill.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
template <typename T, int kWidth>
constexpr bool kTwo = std::is_same_v<T, __half> ? kWidth == 72 : kWidth <= 72;
#else
template <typename T, int kWidth>
constexpr bool kTwo = __CUDA_ARCH__ < 900 && kWidth <= 64;
#endif

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kTwo<T, kWidth> ? 2 : 1)
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
  const Window at = window_in(rest, p.n, p.segmented());

  int window = blockIdx.x / p.heads;
  fetch_slot(p, at, window, threadIdx.x);
  d2it::commit_copies();
  for (; window < p.windows; window += p.splits) {
    d2it::wait_for_copies<0>();
    const unsigned thread = d2it::opaque(threadIdx.x); // not kept: registers are full
    const int slot = at.next[thread];

    int run;
    const int count = close_up(p, at, window, slot, thread, run);
    const auto copy_queries = [&](int first) {
      copy_rows<T, kWidth, 1>({q}, {&f.q}, p, at, window, head, first, count, kTile,
                              d2it::opaque(threadIdx.x) % kWarp, kWarp);
    };
    fetch_slot(p, at, window + p.splits, thread);
    copy_rows<T, kWidth, 2>({k, v}, {&f.k, &f.v}, p, at, window, head, 0, count, round_up(count, kTile),
                            thread, kThreads);
    if (warp * kTile < count) copy_queries(warp * kTile);
    d2it::commit_copies();
    if (p.slots && static_cast<int>(thread) < p.n && (slot < 0 || slot >= p.tokens))
      f.lse[(static_cast<int64_t>(window) * p.heads + head) * p.n + thread] = kInfinity;

    d2it::wait_for_copies<0>();
    __syncthreads();
    const d2it::Place<T> q_place(q), k_place(k), v_place(v);
    for (int first = warp * kTile; first < count; first += kWarps * kTile) {
      if (!p.bias) {
        attend<T, kWidth, Entries::kNone>(f, at, window, head, first, count, q_place, k_place, v_place);
      } else if (run > 1) {
        attend<T, kWidth, Entries::kPairs>(f, at, window, head, first, count, q_place, k_place, v_place);
      } else {
        attend<T, kWidth, Entries::kOnes>(f, at, window, head, first, count, q_place, k_place, v_place);
      }
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

} // namespace
