// neighbor_copy on CPU: the latents of k grains merged on the finest grid (D2iT, section 3.1), and its
// gradient.
//
// A cell of grain i covers ratio x ratio cells of the finest grid. Where columns are adjacent in memory, each
// (image, channel) plane is walked row by row: source rows are widened to the finest grid and blended by the
// grain map, so that the inner loops have no branches and run over whole rows. Where channels are adjacent
// (channels-last), each pixel is a run of channels.
#include "cpu.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxGrains = 8;             // the bits of a byte
constexpr int64_t kElementsPerThread = 32768; // fewer are not worth waking a thread for

// A (B, C, H, W) tensor: strides in elements, and how many finest cells one of its cells covers along a side.
template <typename T>
struct View {
  T* data;
  int64_t batch, channel, row, column, ratio;

  T* at(int64_t b, int64_t c, int64_t y, int64_t x) const {
    return data + b * batch + c * channel + y * row + x * column;
  }
};

template <typename T>
View<T> view(const Tensor& tensor, int64_t fine_height) {
  auto* data = static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
  return {data,
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2),
          tensor.stride(3),
          fine_height / std::max<int64_t>(tensor.size(2), 1)};
}

template <typename T>
std::vector<View<T>> views(const std::vector<Tensor>& tensors, int64_t fine_height) {
  std::vector<View<T>> result;
  for (const Tensor& tensor : tensors) result.push_back(view<T>(tensor, fine_height));
  return result;
}

struct Sizes {
  int64_t batch, channels, height, width; // of the finest grid
  int64_t map_height, map_width;
  int64_t region; // finest cells along a side of a region
  int64_t grains;

  Sizes(const Tensor& fine, const Tensor& grain_map, size_t num_grains)
      : batch(fine.size(0)),
        channels(fine.size(1)),
        height(fine.size(2)),
        width(fine.size(3)),
        map_height(grain_map.size(1)),
        map_width(grain_map.size(2)),
        region(height / std::max<int64_t>(map_height, 1)),
        grains(static_cast<int64_t>(num_grains)) {
    if (grains > kMaxGrains) d2it::fail("neighbor_copy takes at most ", kMaxGrains, " grains, got ", grains);
  }
};

// The grain map, dense, with every entry known to name a grain.
std::vector<uint8_t> read_map(const Tensor& grain_map, const Sizes& s) {
  std::vector<uint8_t> map;
  map.reserve(s.batch * s.map_height * s.map_width);
  const auto* data = static_cast<const int64_t*>(grain_map.const_data_ptr());
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t y = 0; y < s.map_height; ++y) {
      for (int64_t x = 0; x < s.map_width; ++x) {
        const int64_t grain =
            data[b * grain_map.stride(0) + y * grain_map.stride(1) + x * grain_map.stride(2)];
        if (grain < 0 || grain >= s.grains)
          d2it::fail("grain_map holds ", grain, ", outside 0..", s.grains - 1);
        map.push_back(static_cast<uint8_t>(grain));
      }
    }
  }
  return map;
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

// One row of a grain, widened to the finest grid.
template <typename T>
D2IT_INLINE void widen(T* __restrict out, const T* __restrict in, int64_t stride, int64_t width,
                       int64_t ratio) {
  if (stride == 1 && ratio == 2) {
    for (int64_t x = 0; x < width / 2; ++x) out[2 * x] = out[2 * x + 1] = in[x];
  } else {
    for (int64_t x = 0; x < width / ratio; ++x) {
      for (int64_t i = 0; i < ratio; ++i) out[x * ratio + i] = in[x * stride];
    }
  }
}

template <typename T>
D2IT_INLINE void merge_plane(const View<T>* latents, const Choice<T>& choice, T* out, int64_t out_row,
                             T* scratch, const Sizes& s, int64_t b, int64_t c) {
  for (int64_t y = 0; y < s.height; ++y, out += out_row) {
    const T* grain = choice.grain.data() + y / s.region * s.width;
    bool first = true;
    for (int64_t i = 0; i < s.grains; ++i) {
      if (!(choice.present[y / s.region] >> i & 1)) continue;
      const View<T>& latent = latents[i];
      const T* row = latent.at(b, c, y / latent.ratio, 0);
      if (latent.ratio != 1 || latent.column != 1) {
        T* wide = scratch + i * s.width;
        if (y % latent.ratio == 0) widen(wide, row, latent.column, s.width, latent.ratio);
        row = wide;
      }
      if (first) {
        std::memcpy(out, row, s.width * sizeof(T));
      } else {
        for (int64_t x = 0; x < s.width; ++x) out[x] = grain[x] == static_cast<T>(i) ? row[x] : out[x];
      }
      first = false;
    }
  }
}

#define D2IT_MERGE_PLANE(T)                                                                        \
  D2IT_CLONES void merge(const View<T>* latents, const Choice<T>& choice, T* out, int64_t out_row, \
                         T* scratch, const Sizes& s, int64_t b, int64_t c) {                       \
    merge_plane<T>(latents, choice, out, out_row, scratch, s, b, c);                               \
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
    std::vector<T> scratch(s.grains * s.width);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t b = plane / s.channels, c = plane % s.channels;
      choice.load(map, s, b);
      merge(latents.data(), choice, out.at(b, c, 0, 0), out.row, scratch.data(), s, b, c);
    }
  });
}

template <typename T>
void forward_channels(const std::vector<View<T>>& latents, const std::vector<uint8_t>& map,
                      const View<T>& out, const Sizes& s) {
  const int64_t rows_per_thread = kElementsPerThread / (s.width * s.channels) + 1;
  torch::stable::parallel_for(0, s.batch * s.height, rows_per_thread, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t b = line / s.height, y = line % s.height;
      const uint8_t* grains = map.data() + (b * s.map_height + y / s.region) * s.map_width;
      for (int64_t x = 0; x < s.width; ++x) {
        const View<T>& latent = latents[grains[x / s.region]];
        const T* in = latent.at(b, 0, y / latent.ratio, x / latent.ratio);
        T* to = out.at(b, 0, y, x);
        if (latent.channel == 1) {
          std::memcpy(to, in, s.channels * sizeof(T));
        } else {
          for (int64_t c = 0; c < s.channels; ++c) to[c] = in[c * latent.channel];
        }
      }
    }
  });
}

bool channels_adjacent(const Tensor& tensor) { return tensor.stride(1) == 1 && tensor.size(1) > 1; }

template <typename T>
void forward(const std::vector<Tensor>& latents, const std::vector<uint8_t>& map, const Tensor& out,
             const Sizes& s) {
  const auto inputs = views<T>(latents, s.height);
  const auto output = view<T>(out, s.height);
  channels_adjacent(out) ? forward_channels(inputs, map, output, s) : forward_rows(inputs, map, output, s);
}

void neighbor_copy(std::vector<Tensor> latents, Tensor grain_map, Tensor out) {
  const Sizes s(out, grain_map, latents.size());
  const auto map = read_map(grain_map, s);
  if (out.numel() == 0) return;
  switch (out.element_size()) {
    case 2:
      return forward<uint16_t>(latents, map, out, s);
    case 4:
      return forward<uint32_t>(latents, map, out, s);
    default:
      return forward<uint64_t>(latents, map, out, s);
  }
}

// A sum is kept in at least fp32, over the rows of a cell first and then over its columns.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// An integer as wide as T.
template <typename T>
using Lane =
    std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

template <typename T>
D2IT_INLINE void sum_plane(const View<T>& grad, const Choice<Lane<T>>& choice, const View<T>& out,
                           int64_t grain, T* gathered, Sum<T>* sums, const Sizes& s, int64_t b, int64_t c) {
  const int64_t ratio = out.ratio, width = s.width;
  for (int64_t y = 0; y < s.height; y += ratio) {
    T* __restrict to = out.at(b, c, y / ratio, 0);
    const Lane<T>* grains = choice.grain.data() + y / s.region * width;
    if (!(choice.present[y / s.region] >> grain & 1)) {
      std::memset(to, 0, width / ratio * sizeof(T));
      continue;
    }
    for (int64_t j = 0; j < ratio; ++j) {
      const T* row = grad.at(b, c, y + j, 0);
      if (grad.column != 1) {
        for (int64_t x = 0; x < width; ++x) gathered[x] = row[x * grad.column];
        row = gathered;
      }
      if (ratio == 1) {
        for (int64_t x = 0; x < width; ++x) to[x] = grains[x] == static_cast<Lane<T>>(grain) ? row[x] : T(0);
      } else if (j == 0) {
        for (int64_t x = 0; x < width; ++x) sums[x] = static_cast<Sum<T>>(row[x]);
      } else {
        for (int64_t x = 0; x < width; ++x) sums[x] += static_cast<Sum<T>>(row[x]);
      }
    }
    if (ratio == 1) continue;
    for (int64_t x = 0; x < width / ratio; ++x) {
      Sum<T> sum = sums[x * ratio];
      for (int64_t j = 1; j < ratio; ++j) sum += sums[x * ratio + j];
      to[x] = grains[x * ratio] == static_cast<Lane<T>>(grain) ? static_cast<T>(sum) : T(0);
    }
  }
}

template <typename T>
D2IT_INLINE void sum_pixels(const View<T>& grad, T* __restrict to, int64_t ratio, Sum<T>* __restrict sums,
                            const Sizes& s, int64_t b, int64_t y, int64_t x) {
  for (int64_t j = 0; j < ratio; ++j) {
    for (int64_t i = 0; i < ratio; ++i) {
      const T* __restrict in = grad.at(b, 0, y + j, x + i);
      if (i == 0 && j == 0) {
        for (int64_t c = 0; c < s.channels; ++c) sums[c] = static_cast<Sum<T>>(in[c * grad.channel]);
      } else if (grad.channel == 1) {
        for (int64_t c = 0; c < s.channels; ++c) sums[c] += static_cast<Sum<T>>(in[c]);
      } else {
        for (int64_t c = 0; c < s.channels; ++c) sums[c] += static_cast<Sum<T>>(in[c * grad.channel]);
      }
    }
  }
  for (int64_t c = 0; c < s.channels; ++c) to[c] = static_cast<T>(sums[c]);
}

#define D2IT_BACKWARD(T)                                                                             \
  D2IT_CLONES void sum_rows(const View<T>& grad, const Choice<Lane<T>>& choice, const View<T>& out,  \
                            int64_t grain, T* gathered, Sum<T>* sums, const Sizes& s, int64_t b,     \
                            int64_t c) {                                                             \
    sum_plane<T>(grad, choice, out, grain, gathered, sums, s, b, c);                                 \
  }                                                                                                  \
  D2IT_CLONES void sum_cell(const View<T>& grad, T* to, int64_t ratio, Sum<T>* sums, const Sizes& s, \
                            int64_t b, int64_t y, int64_t x) {                                       \
    sum_pixels<T>(grad, to, ratio, sums, s, b, y, x);                                                \
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
    std::vector<T> gathered(s.width);
    std::vector<Sum<T>> sums(s.width);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t b = plane / s.channels, c = plane % s.channels;
      choice.load(map, s, b);
      for (int64_t i = 0; i < s.grains; ++i) {
        sum_rows(grad, choice, outs[i], i, gathered.data(), sums.data(), s, b, c);
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
      const uint8_t* grains = map.data() + line * s.map_width;
      for (int64_t i = 0; i < s.grains; ++i) {
        const View<T>& out = outs[i];
        for (int64_t y = top; y < top + s.region; y += out.ratio) {
          for (int64_t x = 0; x < s.width; x += out.ratio) {
            T* to = out.at(b, 0, y / out.ratio, x / out.ratio);
            if (grains[x / s.region] != i) {
              std::memset(to, 0, s.channels * sizeof(T));
            } else if (out.ratio == 1 && grad.channel == 1) {
              std::memcpy(to, grad.at(b, 0, y, x), s.channels * sizeof(T));
            } else {
              sum_cell(grad, to, out.ratio, sums.data(), s, b, y, x);
            }
          }
        }
      }
    }
  });
}

template <typename T>
void backward(const Tensor& grad, const std::vector<uint8_t>& map, const std::vector<Tensor>& grads,
              const Sizes& s) {
  const auto input = view<T>(grad, s.height);
  const auto outputs = views<T>(grads, s.height);
  channels_adjacent(grads.back()) ? backward_channels(input, map, outputs, s)
                                  : backward_rows(input, map, outputs, s);
}

void neighbor_copy_backward(Tensor grad, Tensor grain_map, std::vector<Tensor> grads) {
  const Sizes s(grad, grain_map, grads.size());
  const auto map = read_map(grain_map, s);
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
