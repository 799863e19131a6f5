// neighbor_copy on CUDA: the latents of k grains merged on the finest grid (D2iT, section 3.1), and its
// gradient.
//
// Bandwidth is all there is to it: each kernel reads what it needs once and writes every output once, zeros
// included, so no output has to be cleared first and no sum needs atomics. A thread moves 16 bytes of the
// finest grid at a time:
//   rows      columns adjacent in memory: 16 bytes of a row for up to four channels. Of a coarser grain it
//             reads 16 / ratio bytes and repeats them in registers. The grain map is read once for the four.
//   pixels    channels adjacent (channels-last): 16 bytes of channels for each pixel of a region, so a warp
//             mostly has one grain.
//   any       whatever the others do not take (odd sizes or strides, misaligned data): one element.
#include "cuda.h"
#include "neighbor_copy.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>

namespace {

using d2it::kMaxGrains;
using d2it::Sizes;
using d2it::View;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kChannelsPerThread = 4;
constexpr int kVector = 16; // bytes

template <typename T>
struct Grains {
  View<T> view[kMaxGrains];
  int shift[kMaxGrains]; // log2 of its ratio, where that is a power of two
  int count;
};

struct Map {
  const int64_t* data;
  int64_t batch, row, column;

  __device__ int64_t at(int64_t b, int64_t y, int64_t x) const {
    return __ldg(data + b * batch + y * row + x * column);
  }

  // One that does not exist ends the kernel, as an index out of range does in PyTorch.
  __device__ int checked(int64_t b, int64_t y, int64_t x, int grains) const {
    const int64_t grain = at(b, y, x);
    CUDA_KERNEL_ASSERT(grain >= 0 && grain < grains && "grain_map must name one of the grains");
    return static_cast<int>(grain);
  }
};

// ------------------------------------------------------------------------------------------------ registers

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ float from_float(float x) {
  return x;
}
template <>
__device__ __half from_float(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}

// A vector of 2, 4, 8 or 16 bytes.
template <int kBytes>
using Packed = std::conditional_t<kBytes <= 4, std::conditional_t<kBytes == 2, unsigned short, unsigned int>,
                                  std::conditional_t<kBytes == 8, uint2, uint4>>;

// kCount elements, kCount * sizeof(T) bytes aligned to their size (to 16 at most), as vectors.
template <int kCount, typename T>
__device__ void load(const T* from, T (&to)[kCount]) {
  constexpr int kBytes = kCount * sizeof(T) < kVector ? kCount * sizeof(T) : kVector;
  using Chunk = Packed<kBytes>;
#pragma unroll
  for (int i = 0; i < static_cast<int>(kCount * sizeof(T)) / kBytes; ++i) {
    const Chunk chunk = __ldg(reinterpret_cast<const Chunk*>(from) + i);
    memcpy(reinterpret_cast<char*>(to) + i * kBytes, &chunk, kBytes);
  }
}

template <int kCount, typename T>
__device__ void store(T* to, const T (&from)[kCount]) {
  constexpr int kBytes = kCount * sizeof(T) < kVector ? kCount * sizeof(T) : kVector;
  using Chunk = Packed<kBytes>;
#pragma unroll
  for (int i = 0; i < static_cast<int>(kCount * sizeof(T)) / kBytes; ++i) {
    Chunk chunk;
    memcpy(&chunk, reinterpret_cast<const char*>(from) + i * kBytes, kBytes);
    d2it::put(reinterpret_cast<Chunk*>(to) + i, chunk);
  }
}

// 16 bytes of the finest grid out of 16 >> kShift bytes of a grain whose cells span 1 << kShift columns; out
// of one element, where they span 16 bytes or more.
template <int kShift, typename T>
__device__ uint4 load_repeated(const T* from) {
  constexpr int kCount = kVector / sizeof(T);
  T in[kCount >> kShift], out[kCount];
  load(from, in);
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = in[i >> kShift];
  uint4 result;
  memcpy(&result, out, kVector);
  return result;
}

// -------------------------------------------------------------------------------------------------- forward

// Where a block of the row kernels works. Its x dimension runs over the groups of columns of a plane, its y
// dimension over channels.
struct Tiles {
  uint32_t groups;        // of columns, in a row
  uint32_t positions;     // groups in a plane
  uint32_t tiles, chunks; // blocks over a plane, over the channels
};

// T: an unsigned integer as wide as an element.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    merge_rows(const __grid_constant__ Grains<const T> latents, const Map map, const View<T> out,
               const Tiles tiles, int64_t channels, int region_shift) {
  constexpr int kCount = kVector / sizeof(T);
  constexpr int kWords = 4;
  constexpr int kPerWord = kCount / kWords;
  const uint32_t tile = blockIdx.x % tiles.tiles, rest = blockIdx.x / tiles.tiles;
  const uint32_t position = tile * blockDim.x + threadIdx.x;
  if (position >= tiles.positions) return;
  const int64_t b = rest / tiles.chunks;
  const int64_t first =
      static_cast<int64_t>(rest % tiles.chunks) * blockDim.y * kChannelsPerThread + threadIdx.y;
  const int64_t y = position / tiles.groups;
  const int64_t x = static_cast<int64_t>(position % tiles.groups) * kCount;

  int grain[kWords]; // a region is never narrower than a word
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    grain[w] = map.checked(b, y >> region_shift, (x + w * kPerWord) >> region_shift, latents.count);
  }

  uint4 value[kChannelsPerThread] = {};
  for (int i = 0; i < latents.count; ++i) {
    if (grain[0] != i && grain[1] != i && grain[2] != i && grain[3] != i) continue;
    const View<const T>& latent = latents.view[i];
    const int shift = latents.shift[i];
    const T* from = latent.at(b, first, y >> shift, x >> shift);
    const auto blend = [&](auto load_one) {
#pragma unroll
      for (int u = 0; u < kChannelsPerThread; ++u) {
        if (first + u * blockDim.y >= channels) continue;
        const uint4 in = load_one(from + static_cast<int64_t>(u) * blockDim.y * latent.channel);
        if (grain[0] == i) value[u].x = in.x;
        if (grain[1] == i) value[u].y = in.y;
        if (grain[2] == i) value[u].z = in.z;
        if (grain[3] == i) value[u].w = in.w;
      }
    };
    if (shift == 0) {
      blend([](const T* p) { return load_repeated<0>(p); });
    } else if (shift == 1) {
      blend([](const T* p) { return load_repeated<1>(p); });
    } else if (shift == 2 || sizeof(T) == 4) {
      blend([](const T* p) { return load_repeated<2>(p); });
    } else {
      blend([](const T* p) { return load_repeated<sizeof(T) == 2 ? 3 : 2>(p); });
    }
  }
#pragma unroll
  for (int u = 0; u < kChannelsPerThread; ++u) {
    const int64_t c = first + u * blockDim.y;
    if (c < channels) d2it::put(out.at(b, c, y, x), value[u]);
  }
}

// Channels-last, whatever the element: the views count bytes, a region has kRegion x kRegion pixels, a pixel
// `vectors` times 16 bytes.
template <int kRegion>
__global__ void __launch_bounds__(kThreads, 1)
    merge_pixels(const __grid_constant__ Grains<const char> latents, const Map map, const View<char> out,
                 uint32_t blocks_per_image, uint32_t map_width, uint32_t vectors, uint32_t items) {
  const uint32_t item = blockIdx.x % blocks_per_image * kThreads + threadIdx.x;
  if (item >= items) return;
  const int64_t b = blockIdx.x / blocks_per_image;
  const uint32_t region = item / vectors;
  const int64_t offset = static_cast<int64_t>(item % vectors) * kVector;
  const int64_t y = region / map_width, x = region % map_width;

  const int grain = map.checked(b, y, x, latents.count);
  const View<const char>& latent = latents.view[grain];
  const int shift = latents.shift[grain];
  const char* from = latent.at(b, 0, y * kRegion >> shift, x * kRegion >> shift) + offset;
  char* to = out.at(b, 0, y * kRegion, x * kRegion) + offset;
#pragma unroll(kRegion == 2 ? 2 : 1)
  for (int j = 0; j < kRegion; ++j) {
    uint4 row[kRegion];
#pragma unroll
    for (int i = 0; i < kRegion; ++i) { // the pixels of a coarse cell after its first come from the L1 cache
      row[i] = __ldg(
          reinterpret_cast<const uint4*>(from + (j >> shift) * latent.row + (i >> shift) * latent.column));
    }
#pragma unroll
    for (int i = 0; i < kRegion; ++i) d2it::put(to + j * out.row + i * out.column, row[i]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    merge_any(const __grid_constant__ Grains<const T> latents, const Map map, const View<T> out,
              const Sizes s, bool channels_last) {
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (id >= s.batch * s.channels * s.height * s.width) return;
  int64_t c, pixel;
  if (channels_last) {
    c = id % s.channels, pixel = id / s.channels;
  } else {
    pixel = id / (s.height * s.width) / s.channels * (s.height * s.width) + id % (s.height * s.width);
    c = id / (s.height * s.width) % s.channels;
  }
  const int64_t x = pixel % s.width, y = pixel / s.width % s.height, b = pixel / s.width / s.height;
  const View<const T>& latent = latents.view[map.checked(b, y / s.region, x / s.region, latents.count)];
  *out.at(b, c, y, x) = *latent.at(b, c, y / latent.ratio, x / latent.ratio);
}

// ------------------------------------------------------------------------------------------------- backward

// The rows kernel's thread has kRegion rows of kColumns columns of the gradient in registers. This writes
// what they give to a grain whose cells span 1 << kShift of them: a cell's sum, over its rows and in each
// over its columns.
template <int kShift, int kRegion, int kColumns, typename T>
__device__ void write_cells(const T (&grad)[kRegion][kColumns], const int (&grain)[kColumns / kRegion], int i,
                            T* to, int64_t to_row) {
  constexpr int kRatio = 1 << kShift, kCells = kColumns >> kShift;
#pragma unroll
  for (int y = 0; y < kRegion >> kShift; ++y) {
    T row[kCells];
#pragma unroll
    for (int x = 0; x < kCells; ++x) {
      if constexpr (kShift == 0) {
        row[x] = grad[y][x];
      } else {
        float sum = 0;
#pragma unroll
        for (int l = 0; l < kRatio; ++l) {
#pragma unroll
          for (int m = 0; m < kRatio; ++m) sum += to_float(grad[y * kRatio + l][x * kRatio + m]);
        }
        row[x] = from_float<T>(sum);
      }
      if (grain[x * kRatio / kRegion] != i) row[x] = from_float<T>(0.0f);
    }
    store(to + y * to_row, row);
  }
}

template <typename T, int kRegion>
__global__ void __launch_bounds__(kThreads, 1)
    sum_rows(const View<const T> grad, const Map map, const __grid_constant__ Grains<T> grads,
             const Tiles tiles, int64_t channels) {
  constexpr int kCount = kVector / sizeof(T), kColumns = kCount < kRegion ? kRegion : kCount;
  const uint32_t tile = blockIdx.x % tiles.tiles, rest = blockIdx.x / tiles.tiles;
  const uint32_t position = tile * blockDim.x + threadIdx.x;
  if (position >= tiles.positions) return;
  const int64_t b = rest / tiles.chunks;
  const int64_t first =
      static_cast<int64_t>(rest % tiles.chunks) * blockDim.y * kChannelsPerThread + threadIdx.y;
  const int64_t region_y = position / tiles.groups;
  const int64_t x = static_cast<int64_t>(position % tiles.groups) * kColumns;

  int grain[kColumns / kRegion];
#pragma unroll
  for (int r = 0; r < kColumns / kRegion; ++r)
    grain[r] = static_cast<int>(map.at(b, region_y, x / kRegion + r));

  for (int u = 0; u < kChannelsPerThread; ++u) {
    const int64_t c = first + u * blockDim.y;
    if (c >= channels) return;
    T in[kRegion][kColumns];
#pragma unroll
    for (int y = 0; y < kRegion; ++y) load(grad.at(b, c, region_y * kRegion + y, x), in[y]);
    for (int i = 0; i < grads.count; ++i) {
      const View<T>& view = grads.view[i];
      const int shift = grads.shift[i];
      T* to = view.at(b, c, region_y * kRegion >> shift, x >> shift);
      if (shift == 0) {
        write_cells<0>(in, grain, i, to, view.row);
      } else if (shift == 1) {
        write_cells<1>(in, grain, i, to, view.row);
      } else if constexpr (kRegion >= 4) {
        if (shift == 2) {
          write_cells<2>(in, grain, i, to, view.row);
        } else if constexpr (kRegion >= 8) {
          write_cells<3>(in, grain, i, to, view.row);
        }
      }
    }
  }
}

template <typename T, int kRegion>
__global__ void __launch_bounds__(kThreads, 1)
    sum_pixels(const View<const T> grad, const Map map, const __grid_constant__ Grains<T> grads,
               uint32_t blocks_per_image, uint32_t map_width, uint32_t vectors, uint32_t items) {
  constexpr int kCount = kVector / sizeof(T);
  const uint32_t item = blockIdx.x % blocks_per_image * kThreads + threadIdx.x;
  if (item >= items) return;
  const int64_t b = blockIdx.x / blocks_per_image;
  const uint32_t region = item / vectors;
  const int64_t c = static_cast<int64_t>(item % vectors) * kCount;
  const int64_t top = static_cast<int64_t>(region / map_width) * kRegion;
  const int64_t left = static_cast<int64_t>(region % map_width) * kRegion;
  const int64_t grain = map.at(b, region / map_width, region % map_width);

  const T* from = grad.at(b, c, top, left);
#pragma unroll 1
  for (int i = 0; i < grads.count; ++i) {
    const View<T>& view = grads.view[i];
    const int shift = grads.shift[i];
    T* to = view.at(b, c, top >> shift, left >> shift);
    if (grain != i) {
      const T zero[kCount] = {};
#pragma unroll 1
      for (int y = 0; y < kRegion >> shift; ++y) {
#pragma unroll 1
        for (int x = 0; x < kRegion >> shift; ++x) store(to + y * view.row + x * view.column, zero);
      }
    } else if (shift == 0) {
#pragma unroll 1
      for (int y = 0; y < kRegion; ++y) {
        T row[kRegion][kCount];
#pragma unroll
        for (int x = 0; x < kRegion; ++x) load(from + y * grad.row + x * grad.column, row[x]);
#pragma unroll
        for (int x = 0; x < kRegion; ++x) store(to + y * view.row + x * view.column, row[x]);
      }
    } else {
#pragma unroll 1
      for (int y = 0; y < kRegion >> shift; ++y) {
#pragma unroll 1
        for (int x = 0; x < kRegion >> shift; ++x) {
          const T* cell = from + (y << shift) * grad.row + (x << shift) * grad.column;
          float sum[kCount] = {};
#pragma unroll 1
          for (int l = 0; l < 1 << shift; ++l) {
#pragma unroll 2
            for (int m = 0; m < 1 << shift; ++m) {
              T in[kCount];
              load(cell + l * grad.row + m * grad.column, in);
#pragma unroll
              for (int e = 0; e < kCount; ++e) sum[e] += to_float(in[e]);
            }
          }
          T result[kCount];
#pragma unroll
          for (int e = 0; e < kCount; ++e) result[e] = from_float<T>(sum[e]);
          store(to + y * view.row + x * view.column, result);
        }
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    sum_any(const View<const T> grad, const Map map, const __grid_constant__ Grains<T> grads, const Sizes s,
            bool channels_last) {
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t regions = s.map_height * s.map_width;
  if (id >= s.batch * s.channels * regions) return;
  const int64_t b = id / (s.channels * regions), inner = id % (s.channels * regions);
  const int64_t c = channels_last ? inner % s.channels : inner / regions;
  const int64_t region = channels_last ? inner / s.channels : inner % regions;
  const int64_t region_y = region / s.map_width, region_x = region % s.map_width;
  const int64_t grain = map.at(b, region_y, region_x);
  for (int i = 0; i < grads.count; ++i) {
    const View<T>& view = grads.view[i];
    const int64_t cells = s.region / view.ratio;
    for (int64_t y = region_y * cells; y < (region_y + 1) * cells; ++y) {
      for (int64_t x = region_x * cells; x < (region_x + 1) * cells; ++x) {
        float sum = 0;
        if (grain == i) {
          for (int64_t l = 0; l < view.ratio; ++l) {
            for (int64_t m = 0; m < view.ratio; ++m) {
              sum += to_float(*grad.at(b, c, y * view.ratio + l, x * view.ratio + m));
            }
          }
        }
        *view.at(b, c, y, x) = from_float<T>(sum);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------ host

int log2_of(int64_t n) {
  for (int shift = 0; shift < 31; ++shift) {
    if (int64_t{1} << shift == n) return shift;
  }
  return -1;
}

template <typename T>
Grains<T> grains_of(const std::vector<Tensor>& tensors, int64_t fine_height) {
  Grains<T> grains;
  grains.count = static_cast<int>(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    grains.view[i] = d2it::view<T>(tensors[i], fine_height);
    grains.shift[i] = log2_of(grains.view[i].ratio);
  }
  return grains;
}

Map map_of(const Tensor& grain_map) {
  return {static_cast<const int64_t*>(grain_map.const_data_ptr()), grain_map.stride(0), grain_map.stride(1),
          grain_map.stride(2)};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

uint32_t grid(int64_t blocks) {
  if (blocks > INT32_MAX) d2it::fail("neighbor_copy: the tensors are too large for one launch");
  return static_cast<uint32_t>(blocks);
}

template <typename T>
bool aligned(const T* data, std::initializer_list<int64_t> strides, int64_t bytes) {
  const auto fits = [&](int64_t stride) { return stride * static_cast<int64_t>(sizeof(T)) % bytes == 0; };
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && std::all_of(strides.begin(), strides.end(), fits);
}

// Whether what a group of `columns` finest columns takes of this tensor is a vector.
template <typename T>
bool rows_fit(const View<T>& view, int64_t columns) {
  const int64_t bytes = std::max<int64_t>(columns / view.ratio, 1) * sizeof(T);
  return view.column == 1 &&
         aligned(view.data, {view.batch, view.channel, view.row}, std::min<int64_t>(bytes, kVector));
}

template <typename T>
bool pixels_fit(const View<T>& view, int64_t channels) {
  return view.channel == 1 && channels * sizeof(T) % kVector == 0 &&
         aligned(view.data, {view.batch, view.row, view.column}, kVector);
}

template <typename T, typename Fits>
bool all_fit(const Grains<T>& grains, Fits fits) {
  return std::all_of(grains.view, grains.view + grains.count, fits);
}

// The launch of a row kernel: planes of `height` rows in groups of `columns` columns.
struct RowLaunch {
  Tiles tiles;
  dim3 block, grid_size;

  RowLaunch(const Sizes& s, int64_t height, int64_t columns) {
    const int64_t groups = s.width / columns, positions = groups * height;
    const auto threads = static_cast<uint32_t>(std::min<int64_t>(ceil_div(positions, 32) * 32, kThreads));
    block = dim3(threads, static_cast<uint32_t>(std::min<int64_t>(kThreads / threads, s.channels)));
    const int64_t across = ceil_div(positions, threads);
    const int64_t chunks = ceil_div(s.channels, static_cast<int64_t>(block.y) * kChannelsPerThread);
    grid_size = dim3(grid(across * chunks * s.batch));
    tiles = {static_cast<uint32_t>(groups), static_cast<uint32_t>(positions), static_cast<uint32_t>(across),
             static_cast<uint32_t>(chunks)};
  }
};

// The launch of a pixel kernel: a thread for every 16 bytes of channels of a region.
struct PixelLaunch {
  uint32_t vectors, items, blocks_per_image, grid_size;

  PixelLaunch(const Sizes& s, int64_t element_size) {
    const int64_t per_pixel = s.channels * element_size / kVector,
                  per_image = s.map_height * s.map_width * per_pixel;
    vectors = static_cast<uint32_t>(per_pixel);
    items = static_cast<uint32_t>(per_image);
    blocks_per_image = static_cast<uint32_t>(ceil_div(per_image, kThreads));
    grid_size = grid(ceil_div(per_image, kThreads) * s.batch);
  }
};

// The vector kernels count positions within an image in 32 bits.
bool image_fits(const Sizes& s) { return s.channels * s.height * s.width <= INT32_MAX; }

// Calls launch with the size of a region as a constant, if it is one that the kernels are compiled for.
template <typename Launch>
bool with_region(int64_t region, Launch launch) {
  switch (region) {
    case 2:
      launch(std::integral_constant<int, 2>());
      return true;
    case 4:
      launch(std::integral_constant<int, 4>());
      return true;
    case 8:
      launch(std::integral_constant<int, 8>());
      return true;
    default:
      return false;
  }
}

template <typename T>
void forward(const std::vector<Tensor>& latents, const Tensor& grain_map, const Tensor& out, const Sizes& s,
             cudaStream_t stream) {
  const auto in = grains_of<const T>(latents, s.height);
  const auto to = d2it::view<T>(out, s.height);
  const Map map = map_of(grain_map);
  constexpr int64_t kCount = kVector / sizeof(T);
  const int region_shift = log2_of(s.region);

  if (image_fits(s) && region_shift >= 0 && s.region * sizeof(T) >= 4 && s.width % kCount == 0 &&
      rows_fit(to, kCount) && all_fit(in, [&](const auto& view) { return rows_fit(view, kCount); })) {
    const RowLaunch launch(s, s.height, kCount);
    merge_rows<T>
        <<<launch.grid_size, launch.block, 0, stream>>>(in, map, to, launch.tiles, s.channels, region_shift);
    return;
  }
  if (image_fits(s) && pixels_fit(to, s.channels) &&
      all_fit(in, [&](const auto& view) { return pixels_fit(view, s.channels); })) {
    const auto bytes = [](const auto& view) {
      using Char =
          std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(view.data)>>, const char, char>;
      constexpr int64_t size = sizeof(T);
      return View<Char>{reinterpret_cast<Char*>(view.data),
                        view.batch * size,
                        size,
                        view.row * size,
                        view.column * size,
                        view.ratio};
    };
    Grains<const char> raw;
    raw.count = in.count;
    for (int i = 0; i < in.count; ++i) {
      raw.view[i] = bytes(in.view[i]);
      raw.shift[i] = in.shift[i];
    }
    const PixelLaunch launch(s, sizeof(T));
    const bool done = with_region(s.region, [&](auto region) {
      merge_pixels<region.value><<<launch.grid_size, kThreads, 0, stream>>>(
          raw, map, bytes(to), launch.blocks_per_image, static_cast<uint32_t>(s.map_width), launch.vectors,
          launch.items);
    });
    if (done) return;
  }
  merge_any<T><<<grid(ceil_div(s.batch * s.channels * s.height * s.width, kThreads)), kThreads, 0, stream>>>(
      in, map, to, s, d2it::channels_adjacent(out));
}

template <typename T>
void backward(const Tensor& grad, const Tensor& grain_map, const std::vector<Tensor>& grads, const Sizes& s,
              cudaStream_t stream) {
  const auto in = d2it::view<const T>(grad, s.height);
  const auto to = grains_of<T>(grads, s.height);
  const Map map = map_of(grain_map);
  constexpr int64_t kCount = kVector / sizeof(T);
  const int64_t columns = std::max(kCount, s.region);

  if (image_fits(s) && s.width % columns == 0 && rows_fit(in, columns) &&
      all_fit(to, [&](const auto& view) { return rows_fit(view, columns); })) {
    const RowLaunch launch(s, s.map_height, columns);
    const bool done = with_region(s.region, [&](auto region) {
      sum_rows<T, region.value>
          <<<launch.grid_size, launch.block, 0, stream>>>(in, map, to, launch.tiles, s.channels);
    });
    if (done) return;
  }
  if (image_fits(s) && pixels_fit(in, s.channels) &&
      all_fit(to, [&](const auto& view) { return pixels_fit(view, s.channels); })) {
    const PixelLaunch launch(s, sizeof(T));
    const bool done = with_region(s.region, [&](auto region) {
      sum_pixels<T, region.value><<<launch.grid_size, kThreads, 0, stream>>>(
          in, map, to, launch.blocks_per_image, static_cast<uint32_t>(s.map_width), launch.vectors,
          launch.items);
    });
    if (done) return;
  }
  sum_any<T>
      <<<grid(ceil_div(s.batch * s.channels * s.map_height * s.map_width, kThreads)), kThreads, 0, stream>>>(
          in, map, to, s, d2it::channels_adjacent(grads.back()));
}

// True: on a GPU a grain that does not exist is a device-side assertion, since the host must not wait for it.
bool neighbor_copy(std::vector<Tensor> latents, Tensor grain_map, Tensor out) {
  const Sizes s(out, grain_map, latents.size());
  if (out.numel() == 0) return true;
  const d2it::OnDevice device(out);
  if (out.element_size() == 2) {
    forward<uint16_t>(latents, grain_map, out, s, device.stream);
  } else {
    forward<uint32_t>(latents, grain_map, out, s, device.stream);
  }
  d2it::check_launch("neighbor_copy");
  return true;
}

void neighbor_copy_backward(Tensor grad, Tensor grain_map, std::vector<Tensor> grads) {
  const Sizes s(grad, grain_map, grads.size());
  if (grad.numel() == 0) return;
  const d2it::OnDevice device(grad);
  switch (grad.scalar_type()) {
    case ScalarType::Float:
      backward<float>(grad, grain_map, grads, s, device.stream);
      break;
    case ScalarType::Half:
      backward<__half>(grad, grain_map, grads, s, device.stream);
      break;
    case ScalarType::BFloat16:
      backward<__nv_bfloat16>(grad, grain_map, grads, s, device.stream);
      break;
    default:
      d2it::fail("neighbor_copy_backward takes float32, float16 and bfloat16 on CUDA");
  }
  d2it::check_launch("neighbor_copy_backward");
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CUDA, m) {
  m.impl("neighbor_copy", TORCH_BOX(&neighbor_copy));
  m.impl("neighbor_copy_backward", TORCH_BOX(&neighbor_copy_backward));
}
