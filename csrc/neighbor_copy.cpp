// neighbor_copy on CPU: the latents of k grains merged on the finest grid (D2iT, section 3.1), and its
// gradient.
//
// A cell of grain i covers ratio x ratio cells of the finest grid. Where columns are adjacent in memory, each
// (image, channel) plane is walked row by row: source rows are widened to the finest grid and blended by the
// grain map, so that the inner loops have no branches and run over whole rows. Where channels are adjacent
// (channels-last), each pixel is a run of channels.
#include "neighbor_copy.h"
#include "cpu.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

using d2it::channels_adjacent;
using d2it::Sizes;
using d2it::Sum;
using d2it::View;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerThread = 32768; // fewer are not worth waking a thread for

template <typename T>
std::vector<View<T>> views(const std::vector<Tensor>& tensors, int64_t fine_height) {
  std::vector<View<T>> result;
  for (const Tensor& tensor : tensors) result.push_back(d2it::view<T>(tensor, fine_height));
  return result;
}

// Copies the grain map to a dense one; whether every entry names a grain. Nothing may be read by it
// otherwise.
bool read_map(const Tensor& grain_map, const Sizes& s, std::vector<uint8_t>& map) {
  map.resize(s.batch * s.map_height * s.map_width);
  const auto* data = static_cast<const int64_t*>(grain_map.const_data_ptr());
  const int64_t image = grain_map.stride(0), row = grain_map.stride(1), column = grain_map.stride(2);
  uint8_t* out = map.data();
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t y = 0; y < s.map_height; ++y) {
      for (int64_t x = 0; x < s.map_width; ++x) {
        const int64_t grain = data[b * image + y * row + x * column];
        if (grain < 0 || grain >= s.grains) return false;
        *out++ = static_cast<uint8_t>(grain);
      }
    }
  }
  return true;
}

// The grain map of one image as the row loops want it.
template <typename T>
struct Choice {
  std::vector<T> grain;         // (map_height, width): at every finest column, in lanes as wide as an element
  std::vector<uint8_t> present; // (map_height,): bit i is set where grain i occurs in that row of regions
  int64_t image = -1;

  void load(const std::vector<uint8_t>& map, const Sizes& s, int64_t b) {
    if (b == image) return;
    image = b;
    grain.resize(s.map_height * s.width);
    present.assign(s.map_height, 0);
    const uint8_t* in = map.data() + b * s.map_height * s.map_width;
    T* out = grain.data();
    for (int64_t y = 0; y < s.map_height; ++y) {
      for (int64_t x = 0; x < s.map_width; ++x, ++in) {
        present[y] |= static_cast<uint8_t>(1u << *in);
        for (int64_t i = 0; i < s.region; ++i) *out++ = *in;
      }
    }
  }
};

// Writes one row of a grain, every value ratio times, over the columns of out that are that grain's; or over
// all of them, where no other grain has been before.
template <int64_t kRatio, typename T>
D2IT_INLINE void spread(T* __restrict out, const T* __restrict in, const T* __restrict grains, T grain,
                        bool all, int64_t stride, int64_t ratio, int64_t cells) {
  if constexpr (kRatio != 0) stride = 1, ratio = kRatio;
  if (all) {
    for (int64_t x = 0; x < cells; ++x) {
      for (int64_t i = 0; i < ratio; ++i) out[x * ratio + i] = in[x * stride];
    }
  } else {
    for (int64_t x = 0; x < cells; ++x) {
      for (int64_t i = 0; i < ratio; ++i) {
        T& to = out[x * ratio + i];
        to = grains[x * ratio + i] == grain ? in[x * stride] : to;
      }
    }
  }
}

template <typename T>
D2IT_INLINE void merge_plane(const View<T>* latents, const Choice<T>& choice, T* out, int64_t out_row,
                             const Sizes& s, int64_t b, int64_t c) {
  for (int64_t y = 0; y < s.height; ++y, out += out_row) {
    const T* grains = choice.grain.data() + y / s.region * s.width;
    const unsigned present = choice.present[y / s.region];
    for (int64_t i = 0; i < s.grains; ++i) {
      if (!(present >> i & 1)) continue;
      const View<T>& latent = latents[i];
      const T* in = latent.at(b, c, y / latent.ratio, 0);
      const T grain = static_cast<T>(i);
      const bool all = (present & ((1u << i) - 1)) == 0;
      if (latent.column == 1 && latent.ratio == 1) {
        spread<1>(out, in, grains, grain, all, 1, 1, s.width);
      } else if (latent.column == 1 && latent.ratio == 2) {
        spread<2>(out, in, grains, grain, all, 1, 2, s.width / 2);
      } else if (latent.column == 1 && latent.ratio == 4) {
        spread<4>(out, in, grains, grain, all, 1, 4, s.width / 4);
      } else {
        spread<0>(out, in, grains, grain, all, latent.column, latent.ratio, s.width / latent.ratio);
      }
    }
  }
}

#define D2IT_MERGE_PLANE(T)                                                                        \
  D2IT_CLONES void merge(const View<T>* latents, const Choice<T>& choice, T* out, int64_t out_row, \
                         const Sizes& s, int64_t b, int64_t c) {                                   \
    merge_plane<T>(latents, choice, out, out_row, s, b, c);                                        \
  }
D2IT_MERGE_PLANE(uint16_t)
D2IT_MERGE_PLANE(uint32_t)
D2IT_MERGE_PLANE(uint64_t)
#undef D2IT_MERGE_PLANE

template <typename T>
void forward_rows(const std::vector<View<T>>& latents, const std::vector<uint8_t>& map, const View<T>& out,
                  const Sizes& s) {
  const int64_t planes_per_thread = kElementsPerThread / (s.height * s.width) + 1;
  torch::stable::parallel_for(0, s.batch * s.channels, planes_per_thread, [&](int64_t begin, int64_t end) {
    Choice<T> choice;
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t b = plane / s.channels, c = plane % s.channels;
      choice.load(map, s, b);
      merge(latents.data(), choice, out.at(b, c, 0, 0), out.row, s, b, c);
    }
  });
}

// One pixel of s.channels elements. kBytes is its size where that is one that a register or two can hold.
template <int64_t kBytes, typename T>
D2IT_INLINE void copy_pixel(T* __restrict to, const T* __restrict in, int64_t stride, const Sizes& s) {
  if constexpr (kBytes != 0) {
    std::memcpy(to, in, kBytes);
  } else if (stride == 1) {
    std::memcpy(to, in, s.channels * sizeof(T));
  } else {
    for (int64_t c = 0; c < s.channels; ++c) to[c] = in[c * stride];
  }
}

template <int64_t kBytes, typename T>
void merge_line(const View<T>* latents, const uint8_t* grains, const View<T>& out, const Sizes& s, int64_t b,
                int64_t y) {
  T* to = out.at(b, 0, y, 0);
  for (int64_t x = 0; x < s.map_width; ++x) {
    const View<T>& latent = latents[grains[x]];
    const int64_t cells = s.region / latent.ratio;
    const T* in = latent.at(b, 0, y / latent.ratio, x * cells);
    for (int64_t j = 0; j < cells; ++j, in += latent.column) {
      for (int64_t i = 0; i < latent.ratio; ++i, to += out.column) {
        copy_pixel<kBytes>(to, in, latent.channel, s);
      }
    }
  }
}

template <int64_t kBytes, typename T>
void forward_channels(const std::vector<View<T>>& latents, const std::vector<uint8_t>& map,
                      const View<T>& out, const Sizes& s) {
  const int64_t lines_per_thread = kElementsPerThread / (s.width * s.channels) + 1;
  torch::stable::parallel_for(0, s.batch * s.height, lines_per_thread, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t b = line / s.height, y = line % s.height;
      const uint8_t* grains = map.data() + (b * s.map_height + y / s.region) * s.map_width;
      merge_line<kBytes>(latents.data(), grains, out, s, b, y);
    }
  });
}

template <typename T>
void forward(const std::vector<Tensor>& latents, const std::vector<uint8_t>& map, const Tensor& out,
             const Sizes& s) {
  const auto inputs = views<T>(latents, s.height);
  const auto output = d2it::view<T>(out, s.height);
  if (!channels_adjacent(out)) return forward_rows(inputs, map, output, s);
  const bool dense = std::all_of(latents.begin(), latents.end(), channels_adjacent);
  switch (dense ? s.channels * sizeof(T) : 0) {
    case 8:
      return forward_channels<8>(inputs, map, output, s);
    case 16:
      return forward_channels<16>(inputs, map, output, s);
    case 32:
      return forward_channels<32>(inputs, map, output, s);
    default:
      return forward_channels<0>(inputs, map, output, s);
  }
}

bool neighbor_copy(std::vector<Tensor> latents, Tensor grain_map, Tensor out) {
  const Sizes s(out, grain_map, latents.size());
  std::vector<uint8_t> map;
  if (!read_map(grain_map, s, map)) return false;
  if (out.numel() == 0) return true;
  switch (out.element_size()) {
    case 2:
      forward<uint16_t>(latents, map, out, s);
      return true;
    case 4:
      forward<uint32_t>(latents, map, out, s);
      return true;
    default:
      forward<uint64_t>(latents, map, out, s);
      return true;
  }
}

// An integer as wide as T.
template <typename T>
using Lane =
    std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

// One row of cells: their gradient where the grain is theirs, zero elsewhere.
template <int64_t kRatio, typename T>
D2IT_INLINE void sum_row(T* __restrict to, const T* __restrict row, int64_t stride, int64_t next,
                         const Lane<T>* __restrict grains, Lane<T> grain, Sum<T>* __restrict sums,
                         int64_t ratio, int64_t width) {
  if constexpr (kRatio != 0) ratio = kRatio;
  for (int64_t x = 0; x < width; ++x) sums[x] = static_cast<Sum<T>>(row[x * stride]);
  for (int64_t j = 1; j < ratio; ++j) {
    const T* __restrict below = row + j * next;
    for (int64_t x = 0; x < width; ++x) sums[x] += static_cast<Sum<T>>(below[x * stride]);
  }
  for (int64_t x = 0; x < width / ratio; ++x) {
    Sum<T> sum = sums[x * ratio];
    for (int64_t j = 1; j < ratio; ++j) sum += sums[x * ratio + j];
    to[x] = grains[x * ratio] == grain ? static_cast<T>(sum) : T(0);
  }
}

template <typename T>
D2IT_INLINE void sum_plane(const View<T>& grad, const Choice<Lane<T>>& choice, const View<T>& out, int64_t i,
                           Sum<T>* sums, const Sizes& s, int64_t b, int64_t c) {
  const Lane<T> grain = static_cast<Lane<T>>(i);
  for (int64_t y = 0; y < s.height; y += out.ratio) {
    T* to = out.at(b, c, y / out.ratio, 0);
    const T* row = grad.at(b, c, y, 0);
    const Lane<T>* grains = choice.grain.data() + y / s.region * s.width;
    if (!(choice.present[y / s.region] >> i & 1)) {
      std::memset(to, 0, s.width / out.ratio * sizeof(T));
    } else if (grad.column == 1 && out.ratio == 1) {
      for (int64_t x = 0; x < s.width; ++x) to[x] = grains[x] == grain ? row[x] : T(0);
    } else if (grad.column == 1 && out.ratio == 2) {
      sum_row<2>(to, row, 1, grad.row, grains, grain, sums, 2, s.width);
    } else if (grad.column == 1 && out.ratio == 4) {
      sum_row<4>(to, row, 1, grad.row, grains, grain, sums, 4, s.width);
    } else {
      sum_row<0>(to, row, grad.column, grad.row, grains, grain, sums, out.ratio, s.width);
    }
  }
}

// One row of regions, channels-last, for grain i. kChannels is the number of channels where it is a small
// one.
template <int64_t kChannels, typename T>
D2IT_INLINE void sum_pixels(const View<T>& grad, const uint8_t* grains, const View<T>& out, int64_t i,
                            Sum<T>* __restrict sums, const Sizes& s, int64_t b, int64_t top) {
  const int64_t channels = kChannels != 0 ? kChannels : s.channels, ratio = out.ratio;
  const int64_t cells = s.region / ratio, stride = kChannels != 0 ? 1 : grad.channel;
  for (int64_t y = top; y < top + s.region; y += ratio) {
    T* __restrict to = out.at(b, 0, y / ratio, 0);
    for (int64_t x = 0; x < cells * s.map_width; ++x, to += out.column) {
      if (grains[x / cells] != i) {
        std::memset(to, 0, channels * sizeof(T));
        continue;
      }
      const T* cell = grad.at(b, 0, y, x * ratio);
      if (ratio == 1 && stride == 1) {
        std::memcpy(to, cell, channels * sizeof(T));
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) sums[c] = Sum<T>(0);
      for (int64_t j = 0; j < ratio; ++j) {
        for (int64_t l = 0; l < ratio; ++l) {
          const T* __restrict in = cell + j * grad.row + l * grad.column;
          for (int64_t c = 0; c < channels; ++c) sums[c] += static_cast<Sum<T>>(in[c * stride]);
        }
      }
      for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<T>(sums[c]);
    }
  }
}

#define D2IT_BACKWARD(T)                                                                               \
  D2IT_CLONES void sum_rows(const View<T>& grad, const Choice<Lane<T>>& choice, const View<T>& out,    \
                            int64_t i, Sum<T>* sums, const Sizes& s, int64_t b, int64_t c) {           \
    sum_plane<T>(grad, choice, out, i, sums, s, b, c);                                                 \
  }                                                                                                    \
  D2IT_CLONES void sum_line(const View<T>& grad, const uint8_t* grains, const View<T>& out, int64_t i, \
                            Sum<T>* sums, const Sizes& s, int64_t b, int64_t top) {                    \
    if (grad.channel == 1 && s.channels == 4) {                                                        \
      sum_pixels<4, T>(grad, grains, out, i, sums, s, b, top);                                         \
    } else if (grad.channel == 1 && s.channels == 8) {                                                 \
      sum_pixels<8, T>(grad, grains, out, i, sums, s, b, top);                                         \
    } else {                                                                                           \
      sum_pixels<0, T>(grad, grains, out, i, sums, s, b, top);                                         \
    }                                                                                                  \
  }
D2IT_BACKWARD(float)
D2IT_BACKWARD(double)
D2IT_BACKWARD(c10::Half)
D2IT_BACKWARD(c10::BFloat16)
#undef D2IT_BACKWARD

template <typename T>
void backward_rows(const View<T>& grad, const std::vector<uint8_t>& map, const std::vector<View<T>>& outs,
                   const Sizes& s) {
  const int64_t planes_per_thread = kElementsPerThread / (s.height * s.width) + 1;
  torch::stable::parallel_for(0, s.batch * s.channels, planes_per_thread, [&](int64_t begin, int64_t end) {
    Choice<Lane<T>> choice;
    std::vector<Sum<T>> sums(s.width);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t b = plane / s.channels, c = plane % s.channels;
      choice.load(map, s, b);
      for (int64_t i = 0; i < s.grains; ++i) {
        sum_rows(grad, choice, outs[i], i, sums.data(), s, b, c);
      }
    }
  });
}

template <typename T>
void backward_channels(const View<T>& grad, const std::vector<uint8_t>& map, const std::vector<View<T>>& outs,
                       const Sizes& s) {
  const int64_t lines_per_thread = kElementsPerThread / (s.region * s.width * s.channels) + 1;
  torch::stable::parallel_for(0, s.batch * s.map_height, lines_per_thread, [&](int64_t begin, int64_t end) {
    std::vector<Sum<T>> sums(s.channels);
    for (int64_t line = begin; line < end; ++line) {
      const int64_t b = line / s.map_height, top = line % s.map_height * s.region;
      for (int64_t i = 0; i < s.grains; ++i) {
        sum_line(grad, map.data() + line * s.map_width, outs[i], i, sums.data(), s, b, top);
      }
    }
  });
}

template <typename T>
void backward(const Tensor& grad, const std::vector<uint8_t>& map, const std::vector<Tensor>& grads,
              const Sizes& s) {
  const auto input = d2it::view<T>(grad, s.height);
  const auto outputs = views<T>(grads, s.height);
  channels_adjacent(grads.back()) ? backward_channels(input, map, outputs, s)
                                  : backward_rows(input, map, outputs, s);
}

void neighbor_copy_backward(Tensor grad, Tensor grain_map, std::vector<Tensor> grads) {
  const Sizes s(grad, grain_map, grads.size());
  std::vector<uint8_t> map;
  if (!read_map(grain_map, s, map)) d2it::fail("grain_map must have values in 0..", s.grains - 1);
  if (grad.numel() == 0) return;
  switch (grad.scalar_type()) {
    case ScalarType::Float:
      return backward<float>(grad, map, grads, s);
    case ScalarType::Double:
      return backward<double>(grad, map, grads, s);
    case ScalarType::Half:
      return backward<c10::Half>(grad, map, grads, s);
    case ScalarType::BFloat16:
      return backward<c10::BFloat16>(grad, map, grads, s);
    default:
      d2it::fail("neighbor_copy_backward takes float32, float16, bfloat16 and float64");
  }
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CPU, m) {
  m.impl("neighbor_copy", TORCH_BOX(&neighbor_copy));
  m.impl("neighbor_copy_backward", TORCH_BOX(&neighbor_copy_backward));
}
