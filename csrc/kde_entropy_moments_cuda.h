// kde_entropy on CUDA by the moments of cells of two bins; kde_entropy_moments.h says why that is exact. A
// warp has one region. Its lanes add the powers of their pixels to moments in shared memory, as integers.
// Then each has four cells and the eight bins in them: it adds up what its cells give to these bins and to
// those of the lanes beside it, and the lanes exchange the latter.
#pragma once

#include "cuda.h"
#include "kde_entropy.h"
#include "kde_entropy_cells.h"

#include <cmath>
#include <cstdint>

namespace d2it {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kSize = 16, kPixels = kSize * kSize; // of a region
constexpr int kOwnBins = 8, kOwnCells = 4;         // of a lane
constexpr int kBins = kWarp * kOwnBins, kCells = kWarp * kOwnCells;
constexpr int kSums = 2;      // copies of the moments
constexpr int kSide = kLanes; // bins that a cell adds to on either side of its middle

// A moment is a sum of whole numbers, in units of which the power of a pixel at the end of a cell has kUnit:
// the bits do not depend on the order. The sum of 256 fits 32 bits, and a power is off by at most 1.2e-7 of
// the largest. What is added to kRound is rounded to a whole number, in the low bits of the sum; kUnit leaves
// room for a distance that rounding makes longer than half a cell.
constexpr float kUnit = 4190208.0f;   // 2^22 - 2^12
constexpr float kRound = 12582912.0f; // 1.5 * 2^23
constexpr unsigned kRoundBits = 0x4b400000u;

struct PairCells {
  // A pixel lies `add` + the sum of weight * (channel - middle) cells from the middle of cell kCells / 2.
  // lower: what rounding takes from the weights.
  float weights[3], lower[3], middle, add;
  float most; // |channel - middle| may have
  // What a unit of a moment adds to the mean of the bins above the middle of its cell: the nearest first.
  float above[kMoments][kSide];

  PairCells(const Gray& gray, bool bytes, double low, double high, double sigma, double slack) {
    const double step = (high - low) / (kBins - 1), delta = step / sigma;
    middle = static_cast<float>(bytes ? 255 / 2.0 : (low + high) / 2);
    most = round_up((high - low) / 2 + slack);
    double offset = gray.exact[3];
    for (int c = 0; c < 3; ++c) {
      const double weight = gray.exact[c] / (2 * step);
      weights[c] = static_cast<float>(weight);
      lower[c] = static_cast<float>(weight - weights[c]);
      offset += gray.exact[c] * middle;
    }
    add = static_cast<float>(offset / (2 * step) - 0.5);
    const auto table = moments_table(2, 2 * kSide, kSide - 1, delta); // of powers of sigma, here of cells
    for (int k = 0; k < kMoments; ++k) {
      const double unit = (k ? std::exp2(k) * kUnit : 1.0) * kPixels;
      for (int j = 0; j < kSide; ++j)
        above[k][j] = static_cast<float>(table[(kMoments + k) * kSide + j] * std::pow(2 * delta, k) / unit);
    }
  }

  // Whether this is how the entropy is computed: the region and the bins are as above, a cell reaches kSide
  // bins, and gray does not leave the range.
  static bool fit(int region_size, int64_t num_bins, double low, double high, double sigma) {
    const CellShape shape((high - low) / (kBins - 1) / sigma, kBins, kBins);
    return region_size == kSize && num_bins == kBins && low <= 0 && high >= 0 && shape.in_pairs();
  }
};

// Of all cells, by order. The first is a count.
struct alignas(16) Moments {
  unsigned sums[kMoments][kCells];
  unsigned apart[kWarp / kSums]; // puts a cell of the next copy into other banks

  __device__ uint4& of_lane(int k, int lane) { return *reinterpret_cast<uint4*>(&sums[k][lane * kOwnCells]); }

  __device__ void clear(int lane) {
#pragma unroll
    for (int k = 0; k < kMoments; ++k) of_lane(k, lane) = {0, 0, 0, 0};
  }

  // Adds a pixel, of channels that `middle` has been taken from.
  template <int kChannels>
  __device__ void add(const PairCells& cells, const float (&x)[kChannels]) {
    const float rest = kChannels == 3 ? fmaf(cells.weights[2], x[2], cells.add) : cells.add;
    constexpr int kMain = kChannels == 3 ? 2 : 1;
    float place = rest;
#pragma unroll
    for (int c = 0; c < kMain; ++c) place = fmaf(cells.weights[c], x[c], place);
    const float shifted = place + kRound;
    // The distance, from the largest part on: what is added to is small then, and with it what rounding
    // takes.
    float e = kRound - shifted;
#pragma unroll
    for (int c = kMain - 1; c >= 0; --c) e = fmaf(cells.weights[c], x[c], e);
    e += rest;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) e = fmaf(cells.lower[c], x[c], e);
    const unsigned cell = min(__float_as_uint(shifted) - (kRoundBits - kCells / 2), kCells - 1u);
    const float e2 = e * e, e3 = e2 * e, e4 = e2 * e2;
    const float powers[kMoments] = {1.0f, e, e2, e3, e4, e3 * e2, e3 * e3, e4 * e3};
    atomicAdd(&sums[0][cell], 1u);
#pragma unroll
    for (int k = 1; k < kMoments; ++k)
      atomicAdd(&sums[k][cell], __float_as_uint(fmaf(powers[k], kUnit * (1 << k), kRound)));
  }
};

// The density of the lane's bins, from the copies of the moments.
__device__ inline void spread(const PairCells& cells, Moments* copies, float (&p)[kOwnBins]) {
  const int lane = threadIdx.x % kWarp;
  float moments[kOwnCells][kMoments];
  unsigned counts[kOwnCells];
#pragma unroll
  for (int k = 0; k < kMoments; ++k) {
    unsigned own[kOwnCells] = {};
#pragma unroll
    for (int copy = 0; copy < kSums; ++copy) {
      const uint4 part = copies[copy].of_lane(k, lane);
      own[0] += part.x;
      own[1] += part.y;
      own[2] += part.z;
      own[3] += part.w;
    }
#pragma unroll
    for (int i = 0; i < kOwnCells; ++i) {
      if (k == 0) counts[i] = own[i];
      moments[i][k] = static_cast<float>(static_cast<int>(k ? own[i] - counts[i] * kRoundBits : own[i]));
    }
  }
  // The lane's bins, and kPast before and after them that are a neighbour's. Even moments count alike on both
  // sides of a cell, odd ones with opposite signs. -0, because what adds to it is left out.
  constexpr int kPast = kSide - 1;
  float bins[kOwnBins + 2 * kPast];
#pragma unroll
  for (float& bin : bins) bin = -0.0f;
#pragma unroll
  for (int i = 0; i < kOwnCells; ++i) {
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      float even = moments[i][0] * cells.above[0][j], odd = moments[i][1] * cells.above[1][j];
#pragma unroll
      for (int k = 2; k < kMoments; k += 2) {
        even = fmaf(moments[i][k], cells.above[k][j], even);
        odd = fmaf(moments[i][k + 1], cells.above[k + 1][j], odd);
      }
      bins[kPast + 2 * i + 1 + j] += even + odd;
      bins[kPast + 2 * i - j] += even - odd;
    }
  }
#pragma unroll
  for (int j = 0; j < kOwnBins; ++j) p[j] = bins[kPast + j];
#pragma unroll
  for (int j = 0; j < kPast; ++j) {
    const float from_next = __shfl_down_sync(kAll, bins[j], 1);
    const float from_last = __shfl_up_sync(kAll, bins[kPast + kOwnBins + j], 1);
    if (lane < kWarp - 1) p[j + 1] += from_next;
    if (lane > 0) p[j] += from_last;
  }
}

} // namespace d2it
