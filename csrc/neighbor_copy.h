// neighbor_copy: what the CPU and the CUDA file share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/macros/Macros.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "check.h"

namespace d2it {

constexpr int64_t kMaxGrains = 8;

// A (B, C, H, W) tensor: strides in elements, and how many finest cells one of its cells covers along a side.
template <typename T>
struct View {
  T* data;
  int64_t batch, channel, row, column, ratio;

  C10_HOST_DEVICE T* at(int64_t b, int64_t c, int64_t y, int64_t x) const {
    return data + b * batch + c * channel + y * row + x * column;
  }
};

template <typename T>
View<T> view(const torch::stable::Tensor& tensor, int64_t fine_height) {
  auto* data = static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
  return {data,
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2),
          tensor.stride(3),
          fine_height / std::max<int64_t>(tensor.size(2), 1)};
}

struct Sizes {
  int64_t batch, channels, height, width; // of the finest grid
  int64_t map_height, map_width;
  int64_t region; // finest cells along a side of a region
  int64_t grains;

  Sizes(const torch::stable::Tensor& fine, const torch::stable::Tensor& grain_map, size_t num_grains)
      : batch(fine.size(0)),
        channels(fine.size(1)),
        height(fine.size(2)),
        width(fine.size(3)),
        map_height(grain_map.size(1)),
        map_width(grain_map.size(2)),
        region(height / std::max<int64_t>(map_height, 1)),
        grains(static_cast<int64_t>(num_grains)) {
    if (grains > kMaxGrains) fail("neighbor_copy takes at most ", kMaxGrains, " grains, got ", grains);
  }
};

// Channels-last, or a slice of it: then a pixel is a run of channels.
inline bool channels_adjacent(const torch::stable::Tensor& tensor) {
  return tensor.stride(1) == 1 && tensor.size(1) > 1;
}

// A sum is kept in at least fp32.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

} // namespace d2it
