// kde_entropy: what the CPU and the CUDA file share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

namespace d2it {

constexpr double kReach = 6.0; // sigma; what lies beyond changes no entropy by more than 3e-7

constexpr double kGrayWeights[3] = {0.2989, 0.5870, 0.1140};
constexpr double kGrayLoss = 1 - (kGrayWeights[0] + kGrayWeights[1] + kGrayWeights[2]);

// The float that bounds floats as `bound` bounds doubles.
inline float round_up(double bound) {
  const float f = static_cast<float>(bound);
  return f < bound ? std::nextafter(f, std::numeric_limits<float>::infinity()) : f;
}

// value of a pixel, from the middle of the range = scale * (offset + sum of weight * (channel - middle)). The
// difference is small where the channel is not: far from 0 it is all that float32 keeps of a value.
struct Gray {
  float weights[3], middle, offset, scale;
  float least, most; // what a channel may hold
  double exact[4];   // value = the sum of exact[c] * channel, + exact[3]

  Gray(torch::headeronly::ScalarType dtype, int64_t channels, double low, double high, double slack) {
    double gray[3] = {1.0, 0.0, 0.0};
    if (channels == 3) std::copy_n(kGrayWeights, 3, gray);
    const double sum = gray[0] + gray[1] + gray[2], center = (low + high) / 2;
    const bool bytes = dtype == torch::headeronly::ScalarType::Byte;
    if (bytes) { // in 1 / 10,000: the weighted sum is exact in float
      const double part = (high - low) / 255 / 10000;
      for (int c = 0; c < 3; ++c) weights[c] = static_cast<float>(std::round(gray[c] * 10000));
      scale = static_cast<float>(part);
      middle = 0.0f;
      offset = static_cast<float>((low * sum - center) / part);
    } else {
      for (int c = 0; c < 3; ++c) weights[c] = static_cast<float>(gray[c]);
      scale = 1.0f;
      middle = static_cast<float>(center);
      offset = static_cast<float>(sum * middle - center);
    }
    const double unit = bytes ? (high - low) / 255 : 1.0;
    for (int c = 0; c < 3; ++c) exact[c] = gray[c] * unit;
    exact[3] = (bytes ? low * sum : 0.0) - center;
    least = round_up(low - slack);
    most = -round_up(-(high + slack));
  }
};

// A tensor of images by strides in elements, and the regions in it.
struct Regions {
  const void* images;
  int64_t batch, channel, row, column;
  int64_t count;
  int map_height, map_width, size, channels;

  Regions(const torch::stable::Tensor& tensor, const torch::stable::Tensor& map, int64_t region_size)
      : images(tensor.const_data_ptr()),
        batch(tensor.stride(0)),
        channel(tensor.stride(1)),
        row(tensor.stride(2)),
        column(tensor.stride(3)),
        count(map.numel()),
        map_height(static_cast<int>(map.size(1))),
        map_width(static_cast<int>(map.size(2))),
        size(static_cast<int>(region_size)),
        channels(static_cast<int>(tensor.size(1))) {}
};

// What becomes of a region: its entropy, and the number of thresholds that it exceeds.
struct Results {
  float* entropy;
  int64_t* grains = nullptr;
  const float* thresholds = nullptr;
  int num_thresholds = 0;
  bool normalize;

  Results(const torch::stable::Tensor& entropy, const std::optional<torch::stable::Tensor>& grains,
          const std::optional<torch::stable::Tensor>& thresholds, bool normalize)
      : entropy(static_cast<float*>(entropy.mutable_data_ptr())), normalize(normalize) {
    if (grains) this->grains = static_cast<int64_t*>(grains->mutable_data_ptr());
    if (thresholds) {
      this->thresholds = static_cast<const float*>(thresholds->const_data_ptr());
      num_thresholds = static_cast<int>(thresholds->numel());
    }
  }
};

} // namespace d2it
