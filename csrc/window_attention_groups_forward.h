// window_attention on CUDA for windows of up to 64 positions, forward.
//
// Q, k and v of a group lie in shared memory; a warp has a tile of 16 queries, and their scores with all keys
// of their windows in registers.
#pragma once

#include "window_attention_forward.h"
#include "window_attention_groups.h"

namespace {

template <int kWidth>
constexpr int group_forward_bytes(bool segments) {
  return chunk_bytes(segments) + 3 * kGroup * kPitch<kWidth> * 2;
}

// The warp's queries. Returns whether all of their results are finite.
template <typename T, int kWidth>
__device__ inline bool attend_group(const Forward<T>& f, const Chunk& at, const Bias& bias, int run,
                                    const Residue& of, int head, const Group& group, const Rows<T>& out,
                                    const T* q, const T* k, const T* v) {
  constexpr int kRow = kPitch<kWidth>, kParts = kGroup / kTile;
  const Problem& p = f.p;
  const int tile = threadIdx.x / kWarp * kTile, lane = threadIdx.x % kWarp, quad = lane % 4;
  if (tile >= group.count) return true;
  const Lane own = lane_in<kWidth>(lane);
  const int2 range = group.tiles(at, tile);
  const int query[2] = {tile + lane_row(lane, 0), tile + lane_row(lane, 1)};
  int place[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) place[r] = at.places[group.first + query[r]];
  // Where windows share the group, or keys are missing from its last tile.
  const bool mixed = group.end - group.window > 1 || at.segments;
  float s[1][2 * kParts][4], most[2] = {-kInfinity, -kInfinity}, total[2] = {};
#pragma unroll
  for (int j = 0; j < kParts; ++j) {
    if (j >= range.x && j <= range.y) {
      auto& part = reinterpret_cast<float (&)[1][2][4]>(s[0][2 * j]);
      multiply_rows<T, kWidth, 1, 1>(part, q + tile * kRow, 0, k + j * 16 * kRow, own);
      const int key = j * 16 + quad * 4;
      const Four keys(at, group.first + key);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float4 b = p.bias ? bias.four(place[r] & 255, keys.positions(), run) : make_float4(0, 0, 0, 0);
        const float added[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& x = part[0][e / 2][2 * r + e % 2];
          x += added[e];
        }
      }
      if (mixed || j * 16 + 16 > group.count) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            bool alike = (keys.place[e] ^ place[r]) < 256;
            if (at.segments && alike && max(query[r], key + e) < group.count)
              alike = at.segments[group.first + query[r]] == at.segments[group.first + key + e];
            if (!alike) part[0][e / 2][2 * r + e % 2] = -kInfinity;
          }
        }
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) most[e / 2 % 2] = fmaxf(most[e / 2 % 2], part[0][e / 4][e % 4]);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) most[r] = fmaxf(most[r], __shfl_xor_sync(kAll, most[r], mask));
    most[r] = most[r] == -kInfinity ? 0.0f : most[r] * -p.unit;
  }
  float sums[1][kWidth / 8][4] = {};
#pragma unroll
  for (int j = 0; j < kParts; ++j) {
    if (j >= range.x && j <= range.y) {
      uint32_t weights[1][1][4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float (&x)[4] = s[0][2 * j + h];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = d2it::exp2_fast(fmaf(x[i], p.unit, most[i / 2]));
          total[i / 2] += x[i];
        }
        weights[0][0][2 * h] = d2it::pack<T>(x[0], x[1]);
        weights[0][0][2 * h + 1] = d2it::pack<T>(x[2], x[3]);
      }
      add_weighted<T, kWidth>(sums, weights, v + j * 16 * kRow, own);
    }
  }
  int number[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) total[r] += __shfl_xor_sync(kAll, total[r], mask);
    const bool there = query[r] < group.count;
    number[r] = there ? at.rows[group.first + query[r]] : -1;
    if (there && quad == 0)
      lse_of(f.lse, p, of.window(place[r]), head)[place[r] & 255] =
          total[r] == 0.0f ? kInfinity : __log2f(total[r]) - most[r];
    total[r] = total[r] == 0.0f ? 0.0f : __fdividef(1.0f, total[r]);
  }
  store_rows(sums[0], total, out, number, p.width);
  float zero = 0.0f;
#pragma unroll
  for (int j = 0; j < kWidth / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) zero = fmaf(sums[0][j][i], 0.0f, zero);
  }
  return zero == 0.0f;
}

// Blocks of narrow heads on a multiprocessor: as many as registers suffice for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kForwardBlocks = 3;
#else
constexpr int kForwardBlocks = 4;
#endif

template <typename T, int kWidth>
__global__ void __launch_bounds__(kGroupThreads, kWidth <= 72 ? kForwardBlocks : 3)
    groups_forward(const __grid_constant__ Forward<T> f) {
  constexpr int kRow = kPitch<kWidth>;
  extern __shared__ float4 shared[];
  const Problem& p = f.p;
  const int head = blockIdx.x % p.heads, residue = blockIdx.x / p.heads % p.bias_windows;
  T* q = reinterpret_cast<T*>(shared);
  T *k = q + kGroup * kRow, *v = k + kGroup * kRow;
  const Chunk at = chunk_in(reinterpret_cast<char*>(v + kGroup * kRow), p.segments);
  const Rows<const T> from[3] = {{f.q, head}, {f.k, head}, {f.v, head}};
  const Rows<T> out(f.out, head);
  const int each = chunk_windows(p.n);
  Residue of{residue, p.bias_windows, (p.windows - residue + p.bias_windows - 1) / p.bias_windows};
#pragma unroll 1
  for (of.at = blockIdx.x / p.heads / p.bias_windows * each; of.at < of.count; of.at += p.splits * each) {
    of.windows = min(each, of.count - of.at);
    const int run = close_chunk(
        p, at, of, [&](int window, int position) { lse_of(f.lse, p, window, head)[position] = kInfinity; });
    const Bias bias(p, residue, head);
    int apart = 0; // windows before this one are taken one at a time
#pragma unroll 1
    for (int window = 0; window < of.windows;) {
      const Group group(at, window, window < apart);
      if (group.count > 0) {
        copy_group<T, kWidth, 3>({q, k, v}, from, at, group, p.width);
        d2it::commit_copies();
        d2it::wait_for_copies<0>();
        __syncthreads();
        const bool finite = attend_group<T, kWidth>(f, at, bias, run, of, head, group, out, q, k, v);
        if (__syncthreads_or(!finite) && group.end - window > 1) {
          apart = group.end;
          continue;
        }
      }
      window = group.end;
    }
    __syncthreads();
  }
}

} // namespace
