// window_attention on CUDA, forward.
//
// K and v of the window lie in shared memory, a warp has 16 queries and walks over keys, 64 at a time.
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
            x = fmaf(x, p.scale, added[e]);
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
      factor[r] = d2it::exp2_fast((most[r] - base) * kLog2e);
      most[r] = largest[r];
      largest[r] = base * -kLog2e;
      total[r] *= factor[r];
    }
    uint32_t weights[1][kKeys / 16][4];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[0][j][i] = d2it::exp2_fast(fmaf(s[0][j][i], kLog2e, largest[i / 2]));
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
          total[r] == 0.0f ? kInfinity : fmaf(most[r], kLog2e, __log2f(total[r]));
    total[r] = total[r] == 0.0f ? 0.0f : __fdividef(1.0f, total[r]);
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
    if (warp * kTile < count) copy_queries(warp * kTile);
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

} // namespace
