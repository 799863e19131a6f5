// kde_entropy and encode_grains on CUDA (D2iT, section 3.1, Eqs. 2-3). One warp has one region.
//
// A pixel touches only the bins within about 6 sigma of it, its taps, and those fit a window of kWidth bins.
// In each residue class modulo kWidth one bin lies in the window: lane l owns the bins l modulo kWidth, so
// all taps of a pixel are added at once, to a density in shared memory that needs neither atomics nor
// synchronisation, because a lane only ever meets its own bins, and bin b lies in bank l: no conflicts. Where
// kWidth is below 32 the warp takes several pixels at a time, each group of lanes into a density of its own;
// kCopies independent densities besides keep the additions from waiting for each other.
//
// At the default settings the density comes from moments, at less than half the instructions: see
// kde_entropy_moments_cuda.h, `PairCells::fit` decides.
//
// A gray image of bytes whose bins are the 256 levels needs no kernel value per pixel: its histogram is
// exact, and the density is the histogram convolved with the kernel at whole steps (`entropy_of_levels`).
//
// With p the density before normalisation and Z its sum, H = ln Z - (sum p ln p) / Z.
#include "cuda.h"
#include "kde_entropy.h"
#include "kde_entropy_moments_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <optional>

namespace {

using d2it::Gray;
using d2it::kAll;
using d2it::kSums;
using d2it::kWarp;
using d2it::Moments;
using d2it::PairCells;
using d2it::Regions;
using d2it::Results;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarps = 4; // per block
constexpr int kCopies = 2;
constexpr int kVector = 16; // bytes
constexpr int kLevels = 256;
constexpr int kMaxShared = 48 * 1024;

template <typename T>
constexpr int kPerLane = kVector / sizeof(T); // pixels

struct Bins {
  int count, width;
  int density; // floats of one: whole windows, the first before bin 0, the last after the last bin
  float per_unit, middle, spacing_high, spacing_low;
  // sqrt(log2(e) / 2) / sigma, so that a kernel value is exp2(-(distance * per_sigma)^2); spacing of the bins
  // in it
  float per_sigma, spacing;

  Bins(int64_t num_bins, double low, double high, double sigma) : count(static_cast<int>(num_bins)) {
    const double step = (high - low) / (count - 1), scale = std::sqrt(0.5 / std::log(2.0)) / sigma;
    // The window's middle is the bin nearest to the pixel: half a bin of it is lost.
    const double needed = 2 * (d2it::kReach - 0.15) * sigma / step + 1;
    width = needed <= 4 ? 4 : needed <= 16 ? 16 : needed <= 32 ? 32 : 0;
    if (!width)
      width = static_cast<int>(std::min(std::ceil(needed / kWarp), std::ceil(2.0 * count / kWarp))) * kWarp;
    density = ((count - 1 + width / 2) / width + 2) * std::max(width, kWarp);
    per_unit = static_cast<float>(1 / step);
    middle = static_cast<float>((count - 1) / 2.0);
    spacing_high = static_cast<float>(step);
    spacing_low = static_cast<float>(step - spacing_high);
    per_sigma = static_cast<float>(scale);
    spacing = static_cast<float>(step * scale);
  }
};

// ------------------------------------------------------------------------------------------------ pixels

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(uint8_t x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ bool in_range(const Gray& gray, float x) {
  return std::is_same_v<T, uint8_t> || (x >= gray.least && x <= gray.most);
}

template <typename T>
__device__ float weigh(const Gray& gray, int channel, float x) {
  return gray.weights[channel] * (std::is_same_v<T, uint8_t> ? x : x - gray.middle);
}

// A value outside the range ends the kernel, as an index out of range does in PyTorch: the host does not
// wait.
__device__ inline void check(bool good) {
  CUDA_KERNEL_ASSERT(good && "images must be finite and inside value_range");
}

// The channels of adjacent pixels, those of one pixel side by side.
template <int kChannels, bool kInterleaved, typename T>
__device__ void load_vectors(const Regions& in, const T* first, int y, int x,
                             T (&values)[kPerLane<T>][kChannels]) {
  constexpr int kCount = kPerLane<T>;
  const T* from = first + y * in.row + x * (kInterleaved ? kChannels : 1);
  T raw[kChannels * kCount];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const T* vector = from + (kInterleaved ? c * kCount : c * in.channel);
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(vector));
    memcpy(raw + c * kCount, &bits, kVector);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) values[i][c] = raw[kInterleaved ? i * kChannels + c : c * kCount + i];
  }
}

template <int kChannels, bool kInterleaved, typename T>
__device__ void read_vectors(const Regions& in, const Gray& gray, const T* first, int pixel,
                             float (&values)[kPerLane<T>], bool& good) {
  constexpr int kCount = kPerLane<T>;
  T raw[kCount][kChannels];
  load_vectors<kChannels, kInterleaved>(in, first, pixel / in.size, pixel % in.size, raw);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float x = to_float(raw[i][c]);
      good &= in_range<T>(gray, x);
      sum += weigh<T>(gray, c, x);
    }
    values[i] = (sum + gray.offset) * gray.scale;
  }
}

template <typename T>
__device__ float read_pixel(const Regions& in, const Gray& gray, const T* first, int pixel, bool& good) {
  const T* from = first + pixel / in.size * in.row + pixel % in.size * in.column;
  float sum = 0.0f;
  for (int c = 0; c < in.channels; ++c) {
    const float x = to_float(from[c * in.channel]);
    good &= in_range<T>(gray, x);
    sum += weigh<T>(gray, c, x);
  }
  return (sum + gray.offset) * gray.scale;
}

template <typename T>
__device__ const T* first_pixel(const Regions& in, int region) {
  const int x = region % in.map_width, line = region / in.map_width;
  const int y = line % in.map_height, b = line / in.map_height;
  return static_cast<const T*>(in.images) + b * in.batch + y * (in.size * in.row) + x * (in.size * in.column);
}

// ------------------------------------------------------------------------------------------------ density

// x: the bin nearest to a pixel; y: how far the pixel lies above it, in 1 / per_sigma.
__device__ inline float2 locate(const Bins& bins, float value) {
  const float nearest = rintf(value * bins.per_unit + bins.middle);
  const float bin = fminf(fmaxf(nearest, 0.0f), bins.count - 1.0f), at = bin - bins.middle;
  return {bin, ((value - at * bins.spacing_high) - at * bins.spacing_low) * bins.per_sigma};
}

// Of the bins `own` modulo kWidth the one in the window of the pixel: its row in the density, and its tap.
template <int kWidth>
__device__ inline int tap(const Bins& bins, float2 pixel, float own, int width, float& value) {
  constexpr float kRound = 12582912.0f; // 1.5 * 2^23: what is added to it is rounded to a whole number
  const float from = pixel.x - own;
  const float shifted = kWidth ? fmaf(from, 1.0f / kWidth, kRound) : from / width + kRound;
  const float bins_away = fmaf(shifted - kRound, -static_cast<float>(width), from);
  const float distance = fmaf(bins_away, bins.spacing, pixel.y);
  value = d2it::exp2_fast(-distance * distance);
  return __float_as_int(shifted) - __float_as_int(kRound) + 1;
}

// Adds pixels to the warp's densities. kWidth: of the window, 0: any multiple of 32.
template <int kWidth>
__device__ void add_taps(const Bins& bins, float* density, const float2* pixels, int count) {
  constexpr int kGroup = kWidth && kWidth < kWarp ? kWidth : kWarp;
  constexpr int kGroups = kWarp / kGroup; // pixels at a time in one copy
  const int lane = threadIdx.x % kWarp;
  const int width = kWidth ? kWidth : bins.width, row = max(width, kWarp), size = bins.density;
  const float4* pairs = reinterpret_cast<const float4*>(pixels) + lane / kGroup;
  // Pixels come in multiples of 16, or are filled up by some that are far from every bin.
  constexpr int kAtOnce = kGroups > 2 ? 1 : 4;
  const int steps = (count + kCopies * kGroups - 1) / (kCopies * kGroups);
#pragma unroll 1
  for (int first = 0; first < steps; first += kAtOnce) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float4 pair = pairs[(first + i) * kGroups];
#pragma unroll 1
      for (int slot = 0; slot < (kWidth ? 1 : width / kWarp); ++slot) {
        const float own = static_cast<float>(slot * kWarp + lane % kGroup);
        float value0, value1;
        const int row0 = tap<kWidth>(bins, {pair.x, pair.y}, own, width, value0);
        const int row1 = tap<kWidth>(bins, {pair.z, pair.w}, own, width, value1);
        float* at0 = density + row0 * row + slot * kWarp + lane;
        float* at1 = density + size + row1 * row + slot * kWarp + lane;
        const float sum0 = *at0 + value0, sum1 = *at1 + value1;
        *at0 = sum0;
        *at1 = sum1;
      }
    }
  }
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int i = kWarp / 2; i > 0; i /= 2) x += __shfl_xor_sync(kAll, x, i);
  return x;
}

// From the lane's own sums of p and p log2 p.
__device__ void store_results(const Results& out, int region, float total, float weighted) {
  constexpr float kLn2 = 0.693147181f;
  const float z = warp_sum(total), sum = warp_sum(weighted);
  float entropy = -kLn2 * sum;
  // Fused, because sum / z is the larger part: rounded once, with the result.
  if (out.normalize) entropy = z > 0 ? fmaxf(fmaf(-kLn2 / z, sum, kLn2 * log2f(z)), 0.0f) : 0.0f;
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) out.entropy[region] = entropy;
  if (out.grains) {
    int grain = 0;
#pragma unroll 1
    for (int i = lane; i < out.num_thresholds; i += kWarp) grain += entropy > out.thresholds[i];
    grain = __reduce_add_sync(kAll, grain);
    if (lane == 0) out.grains[region] = grain;
  }
}

__device__ inline float p_log2_p(float p) { return p > 0 ? p * __log2f(p) : 0.0f; }

// ------------------------------------------------------------------------------------------------ kernels

// The warp's part of shared memory: kCopies densities, then the pixels of a step.
struct Shared {
  float* density;
  float2* pixels;

  __device__ Shared(const Bins& bins, int step) {
    extern __shared__ float4 shared[];
    const int own = kCopies * bins.density + 2 * step;
    density = reinterpret_cast<float*>(shared) + threadIdx.x / kWarp * own;
    pixels = reinterpret_cast<float2*>(density + kCopies * bins.density);
  }
};

int shared_bytes(const Bins& bins, int step) { return (kCopies * bins.density + 2 * step) * sizeof(float); }

template <int kWidth>
__device__ void finish(const Bins& bins, const Results& out, int region, const float* density, int pixels) {
  constexpr int kGroup = kWidth && kWidth < kWarp ? kWidth : kWarp;
  const int width = kWidth ? kWidth : bins.width, row = max(width, kWarp), size = bins.density;
  const float mean = 1.0f / pixels;
  float total = 0.0f, weighted = 0.0f;
#pragma unroll 1
  for (int bin = threadIdx.x % kWarp; bin < bins.count; bin += kWarp) {
    const float* entry = density + (bin / width + 1) * row + bin % width;
    float p = 0.0f;
#pragma unroll
    for (int i = 0; i < kCopies * (kWarp / kGroup); ++i)
      p += entry[i % kCopies * size + i / kCopies * kGroup];
    p *= mean;
    total += p;
    weighted += p_log2_p(p);
  }
  store_results(out, region, total, weighted);
}

__device__ inline void clear(float* density, int count) {
#pragma unroll 1
  for (int i = threadIdx.x % kWarp; i < count / 4; i += kWarp)
    reinterpret_cast<float4*>(density)[i] = make_float4(0, 0, 0, 0);
}

// Rows of the region are vectors of pixels: of one channel each, or of three adjacent channels
// (kInterleaved).
template <typename T, int kWidth, int kChannels, bool kInterleaved>
__global__ void __launch_bounds__(kWarps* kWarp)
    entropy_of_vectors(const __grid_constant__ Regions in, const __grid_constant__ Gray gray,
                       const __grid_constant__ Bins bins, const __grid_constant__ Results out, int step) {
  constexpr int kCount = kPerLane<T>;
  const int lane = threadIdx.x % kWarp;
  const int region = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (region >= in.count) return;
  const Shared shared(bins, step);
  const T* first = first_pixel<T>(in, region);
  const int pixels = in.size * in.size;
  bool good = true;
  clear(shared.density, kCopies * bins.density);
  for (int start = 0; start < pixels; start += kCount * kWarp) {
    const int pixel = start + lane * kCount;
    __syncwarp();
    if (pixel < pixels) {
      float values[kCount];
      read_vectors<kChannels, kInterleaved>(in, gray, first, pixel, values, good);
#pragma unroll
      for (int i = 0; i < kCount; i += 2) {
        const float2 a = locate(bins, values[i]), b = locate(bins, values[i + 1]);
        reinterpret_cast<float4*>(shared.pixels)[(lane * kCount + i) / 2] = make_float4(a.x, a.y, b.x, b.y);
      }
    }
    __syncwarp();
    add_taps<kWidth>(bins, shared.density, shared.pixels, min(pixels - start, kCount * kWarp));
  }
  __syncwarp();
  finish<kWidth>(bins, out, region, shared.density, pixels);
  check(good);
}

// Any strides and sizes, a pixel at a time.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kWarps* kWarp)
    entropy_of_any(const __grid_constant__ Regions in, const __grid_constant__ Gray gray,
                   const __grid_constant__ Bins bins, const __grid_constant__ Results out, int step) {
  const int lane = threadIdx.x % kWarp;
  const int region = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (region >= in.count) return;
  const Shared shared(bins, step);
  const T* first = first_pixel<T>(in, region);
  const int pixels = in.size * in.size;
  bool good = true;
  clear(shared.density, kCopies * bins.density);
  for (int start = 0; start < pixels; start += step) {
    __syncwarp();
    for (int i = lane; i < step; i += kWarp) {
      // What fills up the last step lies so far from every bin that its taps are 0.
      float2 pixel = {0.0f, 1e18f};
      if (start + i < pixels) pixel = locate(bins, read_pixel(in, gray, first, start + i, good));
      shared.pixels[i] = pixel;
    }
    __syncwarp();
    add_taps<kWidth>(bins, shared.density, shared.pixels, min(pixels - start, step));
  }
  __syncwarp();
  finish<kWidth>(bins, out, region, shared.density, pixels);
  check(good);
}

// ------------------------------------------------------------------------------------------------ moments

// Rows as in entropy_of_vectors, of regions of d2it::kSize. Lanes whose pixels share a cell wait for each
// other: at most half of the warp, where all pixels have one color, since odd lanes add to a copy of their
// own in other banks.
template <typename T, int kChannels, bool kInterleaved>
__global__ void __launch_bounds__(kWarps* kWarp)
    entropy_of_moments(const __grid_constant__ Regions in, const __grid_constant__ PairCells cells,
                       const __grid_constant__ Results out) {
  constexpr int kCount = kPerLane<T>;
  __shared__ Moments shared[kWarps][kSums];
  const int lane = threadIdx.x % kWarp;
  const int region = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (region >= in.count) return;
  Moments* sums = shared[threadIdx.x / kWarp];
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i].clear(lane);
  __syncwarp();
  const T* first = first_pixel<T>(in, region);
  bool good = true;
#pragma unroll
  for (int start = 0; start < d2it::kPixels; start += kCount * kWarp) {
    const int pixel = start + lane * kCount;
    if (pixel >= d2it::kPixels) continue;
    T values[kCount][kChannels];
    load_vectors<kChannels, kInterleaved>(in, first, pixel / d2it::kSize, pixel % d2it::kSize, values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float x[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        x[c] = to_float(values[i][c]) - cells.middle;
        good &= std::is_same_v<T, uint8_t> || fabsf(x[c]) <= cells.most;
      }
      sums[lane % kSums].add(cells, x);
    }
  }
  __syncwarp();
  float p[d2it::kOwnBins], total = 0.0f, weighted = 0.0f;
  d2it::spread(cells, sums, p);
#pragma unroll
  for (const float each : p) {
    total += each;
    weighted += p_log2_p(each);
  }
  store_results(out, region, total, weighted);
  check(good);
}

struct Taps {
  int reach;
  float value[kLevels]; // at whole steps of a level
};

// Gray bytes whose bins are the levels. `kVectors`: rows of 16-byte vectors.
template <bool kVectors>
__device__ void entropy_of_histogram(const Regions& in, const Taps& taps, const Results& out) {
  __shared__ int counts[kWarps][3 * kLevels]; // 256 zeros on either side
  const int lane = threadIdx.x % kWarp;
  const int region = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (region >= in.count) return;
  int* own = counts[threadIdx.x / kWarp];
  for (int i = lane; i < 3 * kLevels; i += kWarp) own[i] = 0;
  __syncwarp();
  const uint8_t* first = first_pixel<uint8_t>(in, region);
  const int pixels = in.size * in.size;
  own += kLevels;
  if constexpr (kVectors) {
    for (int pixel = lane * kVector; pixel < pixels; pixel += kWarp * kVector) {
      const uint8_t* from = first + pixel / in.size * in.row + pixel % in.size;
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
      uint8_t level[kVector];
      memcpy(level, &bits, kVector);
#pragma unroll
      for (int i = 0; i < kVector; ++i) atomicAdd(own + level[i], 1);
    }
  } else {
    for (int pixel = lane; pixel < pixels; pixel += kWarp)
      atomicAdd(own + first[pixel / in.size * in.row + pixel % in.size * in.column], 1);
  }
  __syncwarp();
  constexpr int kOwn = kLevels / kWarp;
  float p[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) p[i] = own[lane + i * kWarp] * taps.value[0];
  for (int t = 1; t <= taps.reach; ++t) {
    const float tap = taps.value[t];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int* at = own + lane + i * kWarp;
      p[i] += static_cast<float>(at[t] + at[-t]) * tap;
    }
  }
  const float mean = 1.0f / pixels;
  float total = 0.0f, weighted = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    total += p[i] * mean;
    weighted += p_log2_p(p[i] * mean);
  }
  store_results(out, region, total, weighted);
}

__global__ void __launch_bounds__(kWarps* kWarp)
    entropy_of_levels(const __grid_constant__ Regions in, const __grid_constant__ Taps taps,
                      const __grid_constant__ Results out) {
  entropy_of_histogram<true>(in, taps, out);
}

__global__ void __launch_bounds__(kWarps* kWarp)
    entropy_of_levels_any(const __grid_constant__ Regions in, const __grid_constant__ Taps taps,
                          const __grid_constant__ Results out) {
  entropy_of_histogram<false>(in, taps, out);
}

// ------------------------------------------------------------------------------------------------ launch

// Whether every row of every region starts and ends with a vector.
template <typename T>
bool vectors_fit(const Regions& in) {
  constexpr int kCount = kPerLane<T>;
  const bool interleaved = in.channels == 3 && in.column == 3 && in.channel == 1;
  return (in.column == 1 || interleaved) && in.size % kCount == 0 && in.row % kCount == 0 &&
         in.batch % kCount == 0 && (in.channels == 1 || interleaved || in.channel % kCount == 0) &&
         reinterpret_cast<uintptr_t>(in.images) % kVector == 0;
}

template <typename T, int kWidth>
void launch(const Regions& in, const Gray& gray, const Bins& bins, const Results& out, cudaStream_t stream) {
  const bool vectors = vectors_fit<T>(in);
  const int pixels = (in.size * in.size + kWarp - 1) / kWarp * kWarp;
  const int step = std::min(pixels, vectors ? kPerLane<T> * kWarp : 4 * kWarp);
  const int warps = std::clamp(kMaxShared / shared_bytes(bins, step), 1, kWarps);
  const auto blocks = static_cast<unsigned>((in.count + warps - 1) / warps);
  const auto kernel = !vectors           ? entropy_of_any<T, kWidth>
                      : in.channels == 1 ? entropy_of_vectors<T, kWidth, 1, false>
                      : in.column == 1   ? entropy_of_vectors<T, kWidth, 3, false>
                                         : entropy_of_vectors<T, kWidth, 3, true>;
  kernel<<<blocks, warps * kWarp, warps * shared_bytes(bins, step), stream>>>(in, gray, bins, out, step);
}

template <typename T>
void launch(const Regions& in, const PairCells& cells, const Results& out, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((in.count + kWarps - 1) / kWarps);
  const auto kernel = in.channels == 1 ? entropy_of_moments<T, 1, false>
                      : in.column == 1 ? entropy_of_moments<T, 3, false>
                                       : entropy_of_moments<T, 3, true>;
  kernel<<<blocks, kWarps * kWarp, 0, stream>>>(in, cells, out);
}

template <typename T>
void launch(const Regions& in, const Gray& gray, const Bins& bins, const Results& out, cudaStream_t stream) {
  switch (bins.width) {
    case 4:
      return launch<T, 4>(in, gray, bins, out, stream);
    case 16:
      return launch<T, 16>(in, gray, bins, out, stream);
    case 32:
      return launch<T, 32>(in, gray, bins, out, stream);
    default:
      return launch<T, 0>(in, gray, bins, out, stream);
  }
}

void launch_levels(const Regions& in, double spacing, const Results& out, cudaStream_t stream) {
  Taps taps;
  taps.reach = static_cast<int>(std::min<double>(kLevels - 1, std::ceil(d2it::kReach / spacing)));
  for (int t = 0; t < kLevels; ++t)
    taps.value[t] = static_cast<float>(std::exp(-0.5 * spacing * spacing * t * t));
  const auto blocks = static_cast<unsigned>((in.count + kWarps - 1) / kWarps);
  const auto kernel = vectors_fit<uint8_t>(in) ? entropy_of_levels : entropy_of_levels_any;
  kernel<<<blocks, kWarps * kWarp, 0, stream>>>(in, taps, out);
}

// As on CPU, but always true: a value outside the range is a device-side assertion, since the host must not
// wait.
bool kde_entropy(Tensor images, std::optional<Tensor> thresholds, int64_t region_size, int64_t num_bins,
                 double low, double high, double sigma, bool normalize, double slack, Tensor entropy,
                 std::optional<Tensor> grains) {
  if (entropy.numel() == 0) return true;
  if (entropy.numel() > std::numeric_limits<int>::max() - kWarps) d2it::fail("kde_entropy: too many regions");
  const d2it::OnDevice device(images);
  const ScalarType dtype = images.scalar_type();
  const Regions in(images, entropy, region_size);
  const Results out(entropy, grains, thresholds, normalize);
  if (dtype == ScalarType::Byte && in.channels == 1 && num_bins == kLevels) {
    launch_levels(in, (high - low) / (kLevels - 1) / sigma, out, device.stream);
  } else {
    const Gray gray(dtype, in.channels, low, high, slack);
    const bool moments = PairCells::fit(in.size, num_bins, low, high, sigma);
    const auto run = [&]<typename T>(T) {
      if (moments && vectors_fit<T>(in))
        launch<T>(in, PairCells(gray, dtype == ScalarType::Byte, low, high, sigma, slack), out,
                  device.stream);
      else
        launch<T>(in, gray, Bins(num_bins, low, high, sigma), out, device.stream);
    };
    switch (dtype) {
      case ScalarType::Float:
        run(float());
        break;
      case ScalarType::Half:
        run(__half());
        break;
      case ScalarType::BFloat16:
        run(__nv_bfloat16());
        break;
      default:
        run(uint8_t());
    }
  }
  d2it::check_launch("kde_entropy");
  return true;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CUDA, m) { m.impl("kde_entropy", TORCH_BOX(&kde_entropy)); }
