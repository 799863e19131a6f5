// window_attention on CUDA for windows of up to 64 positions, backward.
//
// Q, k, v, grad and, at first, out of a group lie in shared memory. A warp has a tile of 16 keys, their dk
// and dv in registers, and walks over the queries of their windows; scores are held transposed, so that P^T
// and dS^T enter dv and dk from registers. dS^T goes to shared memory in float32: dq of a warp's 16 queries
// is a product with it, and the sum of the bias's gradient, which the block keeps in shared memory, takes it
// up window by window, each row of keys by the one warp that has the key's position. So nothing is added
// twice at a time and the order is fixed: the same bits every time.
#pragma once

#include "window_attention_backward.h"
#include "window_attention_groups.h"

namespace {

constexpr int kScoresPitch = kGroup + 4; // floats of a row of dS^T

template <int kWidth>
constexpr int group_backward_bytes(int n, bool segments, bool sums) {
  const int scores = std::max(kGroup * kScoresPitch * 4, kGroup * kPitch<kWidth> * 2);
  return chunk_bytes(segments) + 4 * kGroup * kPitch<kWidth> * 2 + scores + 2 * kGroup * 4 +
         (sums ? n * round_up(n, 4) * 4 : 0);
}

// The block at work on one group.
template <typename T, int kWidth>
struct GroupWork {
  const Backward<T>& b;
  const Chunk& at;
  const Residue& of;
  const Group& group;
  char* shared;
  int head, run;

  static constexpr int kRow = kPitch<kWidth>;
  __device__ T* k() const { return reinterpret_cast<T*>(shared); }
  __device__ T* v() const { return k() + kGroup * kRow; }
  __device__ T* q() const { return v() + kGroup * kRow; }
  __device__ T* grad() const { return q() + kGroup * kRow; }
  __device__ float* lse() const { return reinterpret_cast<float*>(grad() + kGroup * kRow); }
  __device__ float* delta() const { return lse() + kGroup; }
  __device__ float* scores() const { return delta() + kGroup; }
  __device__ T* out() const { return reinterpret_cast<T*>(scores()); } // until delta is there
  // The sum of the bias's gradient, if there is one: (n, pitch), at the start of shared memory.
  __device__ float* near() const {
    extern __shared__ float4 sums[];
    return reinterpret_cast<float*>(sums);
  }
  __device__ int pitch() const { return round_up(b.p.n, 4); }
  __device__ bool mixed() const { return group.end - group.window > 1 || at.segments; }

  __device__ void fetch() const {
    const Problem& p = b.p;
    const Rows<const T> from[5] = {{b.k, head}, {b.v, head}, {b.q, head}, {b.grad, head}, {b.out, head}};
    copy_group<T, kWidth, 5>({k(), v(), q(), grad(), out()}, from, at, group, p.width);
    const int row = threadIdx.x;
    if (row < group.count) {
      const int place = at.places[group.first + row];
      d2it::copy_async(lse() + row, lse_of(b.lse, p, of.window(place), head) + (place & 255));
    } else if (row < kGroup) {
      lse()[row] = kInfinity; // the weights of a query that is not there are zero
    }
    d2it::commit_copies();
  }

  // delta = rowsum(out * grad) of the warp's tile: the diagonal of their product.
  __device__ void sum_delta() const {
    const unsigned thread = d2it::opaque(threadIdx.x); // not kept: registers are full
    const unsigned lane = thread % kWarp, row = lane / 4;
    const int tile = thread / kWarp * kTile;
    if (tile >= group.count) return;
    float c[1][2][4] = {};
    multiply_rows<T, kWidth, 1, 1>(c, grad() + tile * kRow, 0, out() + tile * kRow, lane_in<kWidth>(lane));
    if (lane % 4 != row / 2) return;
    delta()[tile + row_in_place(row)] = row % 2 ? c[0][0][1] : c[0][0][0];
    delta()[tile + row_in_place(row + 8)] = row % 2 ? c[0][1][3] : c[0][1][2];
  }

  // Writes dk and dv of the warp's keys, and leaves their dS^T. Returns whether dk is finite.
  __device__ bool walk(const Bias& bias) const {
    const Problem& p = b.p;
    const int tile = threadIdx.x / kWarp * kTile;
    if (tile >= group.count) return true;
    const Lane own = lane_in<kWidth>(threadIdx.x % kWarp);
    const int2 range = group.tiles(at, tile);
    float dk[1][kWidth / 8][4] = {}, dv[1][kWidth / 8][4] = {};
#pragma unroll 1
    for (int u = range.x; u <= range.y; ++u) {
      // What follows from the lane is cheaper to compute again than to keep.
      const int lane = d2it::opaque(threadIdx.x) % kWarp, query = u * 16 + lane % 4 * 4;
      const int key[2] = {tile + lane_row(lane, 0), tile + lane_row(lane, 1)};
      const int place[2] = {at.places[group.first + key[0]], at.places[group.first + key[1]]};
      const T *from_q = q() + u * 16 * kRow, *from_grad = grad() + u * 16 * kRow;
      float s[1][2][4] = {}, dp[1][2][4] = {};
      multiply_rows<T, kWidth, 1, 1>(s, k() + tile * kRow, 0, from_q, own);
      const float4 found = *reinterpret_cast<const float4*>(lse() + query);
      const float sums[4] = {found.x, found.y, found.z, found.w};
      const Four queries(at, group.first + query);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float4 added =
            p.bias ? bias.four(place[r] & 255, queries.positions(), run) : make_float4(0, 0, 0, 0);
        const float more[4] = {added.x, added.y, added.z, added.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& x = s[0][e / 2][2 * r + e % 2];
          x = d2it::exp2_fast(fmaf(x + more[e], p.unit, -sums[e]));
        }
      }
      if (mixed() || max(tile, u * 16) + 16 > group.count) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            bool alike = (queries.place[e] ^ place[r]) < 256;
            if (at.segments && alike && max(key[r], query + e) < group.count)
              alike = at.segments[group.first + key[r]] == at.segments[group.first + query + e];
            if (!alike) s[0][e / 2][2 * r + e % 2] = 0.0f;
          }
        }
      }
      uint32_t weights[1][1][4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[0][0][i] = d2it::pack<T>(s[0][i / 2][i % 2 * 2], s[0][i / 2][i % 2 * 2 + 1]);
      add_weighted<T, kWidth>(dv, weights, from_grad, own);
      multiply_rows<T, kWidth, 1, 1>(dp, v() + tile * kRow, 0, from_grad, own);
      const float4 delta4 = *reinterpret_cast<const float4*>(delta() + query);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float x = s[0][0][2 * r] * (dp[0][0][2 * r] - delta4.x);
        const float y = s[0][0][2 * r + 1] * (dp[0][0][2 * r + 1] - delta4.y);
        const float z = s[0][1][2 * r] * (dp[0][1][2 * r] - delta4.z);
        const float w = s[0][1][2 * r + 1] * (dp[0][1][2 * r + 1] - delta4.w);
        *reinterpret_cast<float4*>(scores() + key[r] * kScoresPitch + query) = make_float4(x, y, z, w);
        weights[0][0][r] = d2it::pack<T>(x, y);
        weights[0][0][2 + r] = d2it::pack<T>(z, w);
        if (alone() && b.sums && key[r] < group.count)
          add_four(near() + (place[r] & 255) * pitch(), queries.positions(), group.count - query,
                   {x, y, z, w});
      }
      add_weighted<T, kWidth>(dk, weights, from_q, own);
    }
    const int lane = threadIdx.x % kWarp, key[2] = {tile + lane_row(lane, 0), tile + lane_row(lane, 1)};
    store(dk[0], p.scale, b.dk, key);
    store(dv[0], 1.0f, b.dv, key);
    return finite(dk[0]);
  }

  // dq of the warp's queries. Returns whether it is finite.
  __device__ bool store_queries() const {
    const Problem& p = b.p;
    const int tile = threadIdx.x / kWarp * kTile, lane = threadIdx.x % kWarp, quad = lane % 4;
    if (tile >= group.count) return true;
    const Lane own = lane_in<kWidth>(lane);
    const int2 range = group.tiles(at, tile);
    float dq[1][kWidth / 8][4] = {};
#pragma unroll 1
    for (int t = range.x; t <= range.y; ++t) {
      const float* from = scores() + (t * 16 + quad * 4) * kScoresPitch + tile + lane / 4;
      uint32_t x[1][1][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* one = from + i / 2 * (2 * kScoresPitch) + i % 2 * 8;
        x[0][0][i] = d2it::pack<T>(one[0], one[kScoresPitch]);
      }
      add_weighted<T, kWidth>(dq, x, k() + t * 16 * kRow, own);
    }
    store(dq[0], p.scale, b.dq, {tile + lane / 4, tile + lane / 4 + 8});
    return finite(dq[0]);
  }

  // Whether the group is one window, whose pairs have positions of their own, so that each may be added where
  // it is formed.
  __device__ bool alone() const { return group.end - group.window == 1; }

  // The sum of the bias's gradient takes up the dS^T of several windows.
  __device__ void add_scores() const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll 1
    for (int half = 0; half < group.count; half += kWarp) {
      const int mine = half + lane;
      const bool has = mine < group.count && at.places[group.first + mine] % kGroupWarps == warp;
      unsigned keys = __ballot_sync(kAll, has);
#pragma unroll 1
      for (; keys; keys &= keys - 1) {
        const int key = half + __ffs(keys) - 1, place = at.places[group.first + key], window = place >> 8;
        const int end = at.starts[window + 1] - group.first;
        float* to = near() + (place & 255) * pitch();
#pragma unroll 1
        for (int query = at.starts[window] - group.first + lane; query < end; query += kWarp)
          to[at.places[group.first + query] & 255] += scores()[key * kScoresPitch + query];
        __syncwarp(); // the next key may have the position of this one, in another window
      }
    }
  }

 private:
  // The first `there` of four queries' dS into a row of the sum.
  __device__ void add_four(float* to, int4 column, int there, float4 x) const {
    if (run == 4) {
      if (there <= 0) return;
      float4& sum = *reinterpret_cast<float4*>(to + column.x);
      sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    } else {
      if (there > 0) to[column.x] += x.x;
      if (there > 1) to[column.y] += x.y;
      if (there > 2) to[column.z] += x.z;
      if (there > 3) to[column.w] += x.w;
    }
  }

  __device__ static bool finite(const float (&c)[kWidth / 8][4]) {
    float zero = 0.0f;
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) zero = fmaf(c[j][i], 0.0f, zero);
    }
    return zero == 0.0f;
  }

  // The warp's 16 rows, of which a lane has `mine`.
  __device__ void store(const float (&c)[kWidth / 8][4], float factor, const Heads<T>& to,
                        const int (&mine)[2]) const {
    const int number[2] = {mine[0] < group.count ? at.rows[group.first + mine[0]] : -1,
                           mine[1] < group.count ? at.rows[group.first + mine[1]] : -1};
    store_rows(c, {factor, factor}, Rows<T>(to, head), number, b.p.width);
  }
};

// Blocks of narrow heads on a multiprocessor: as many as its shared memory holds.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900 && __CUDA_ARCH__ != 1000
constexpr int kGroupBlocks = 2;
#else
constexpr int kGroupBlocks = 3;
#endif

template <typename T, int kWidth>
__global__ void __launch_bounds__(kGroupThreads, kWidth <= 72 ? kGroupBlocks : 2)
    groups_backward(const __grid_constant__ Backward<T> b) {
  extern __shared__ float4 shared[];
  const Problem& p = b.p;
  const int head = blockIdx.x % p.heads, residue = blockIdx.x / p.heads % p.bias_windows;
  const int pitch = round_up(p.n, 4) / 4, entries = b.sums ? p.n * pitch : 0; // vectors
  float4* near = shared;
  char* rest = reinterpret_cast<char*>(near + entries);
  const Chunk at = chunk_in(rest, p.segments);
  char* own = rest + chunk_bytes(p.segments);
#pragma unroll 1
  for (int i = threadIdx.x; i < entries; i += kGroupThreads) near[i] = make_float4(0, 0, 0, 0);
  const auto each = [&] { return chunk_windows(d2it::opaque(p.n)); }; // not kept: registers are full
  Residue of{residue, p.bias_windows, (p.windows - residue + p.bias_windows - 1) / p.bias_windows};
#pragma unroll 1
  for (of.at = blockIdx.x / p.heads / p.bias_windows * each(); of.at < of.count; of.at += p.splits * each()) {
    of.windows = min(each(), of.count - of.at);
    const int run = close_chunk(p, at, of, [](int, int) {});
    const Bias bias(p, of.first, head);
    int apart = 0; // windows before this one are taken one at a time
#pragma unroll 1
    for (int window = 0; window < of.windows;) {
      const Group group(at, window, window < apart);
      if (group.count > 0) {
        const GroupWork<T, kWidth> work{b, at, of, group, own, head, run};
        work.fetch();
        d2it::wait_for_copies<0>();
        __syncthreads();
        work.sum_delta();
        __syncthreads();
        bool finite = work.walk(bias);
        __syncthreads();
        finite &= work.store_queries();
        if (__syncthreads_or(!finite) && group.end - window > 1) {
          apart = group.end;
          continue;
        }
        if (b.sums && !work.alone()) {
          work.add_scores();
          __syncthreads();
        }
      }
      window = group.end;
    }
    __syncthreads();
  }
  char* far = b.sums_of_block();
#pragma unroll 1
  for (int i = threadIdx.x; i < entries; i += kGroupThreads)
    reinterpret_cast<float4*>(far + i / pitch * b.row)[i % pitch] = near[i];
}

} // namespace
