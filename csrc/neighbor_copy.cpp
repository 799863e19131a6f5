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

using d2it::BFloat16;
using d2it::channels_adjacent;
using d2it::Half;
using d2it::mask;
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

// Copies one row of the grain map; negative if an entry is below 0 or above `most`.
D2IT_INLINE int64_t narrow(const int64_t* in, int64_t stride, int64_t most, int64_t columns,
                           uint8_t* __restrict out) {
  uint64_t signs = 0; // unsigned, since the difference wraps around for the most negative entries
  for (int64_t x = 0; x < columns; ++x) {
    const auto grain = static_cast<uint64_t>(in[x * stride]);
    signs |= grain | (static_cast<uint64_t>(most) - grain);
    out[x] = static_cast<uint8_t>(grain);
  }
  return static_cast<int64_t>(signs);
}

D2IT_CLONES_256 int64_t narrow_row(const int64_t* in, int64_t stride, int64_t most, int64_t columns,
                                   uint8_t* out) {
  return stride == 1 ? narrow(in, 1, most, columns, out) : narrow(in, stride, most, columns, out);
}

// Copies the grain map to a dense one; whether every entry names a grain. Nothing may be read by it
// otherwise.
bool read_map(const Tensor& grain_map, const Sizes& s, std::vector<uint8_t>& map) {
  map.resize(s.batch * s.map_height * s.map_width);
  const auto* data = static_cast<const int64_t*>(grain_map.const_data_ptr());
  const int64_t image = grain_map.stride(0), row = grain_map.stride(1), column = grain_map.stride(2);
  uint8_t* out = map.data();
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t y = 0; y < s.map_height; ++y, out += s.map_width) {
      if (narrow_row(data + b * image + y * row, column, s.grains - 1, s.map_width, out) < 0) return false;
    }
  }
  return true;
}

// An unsigned integer of some bytes.
template <int64_t kBytes>
using Unsigned =
    std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>;

// Two elements that lie side by side: what a cell of twice the size covers in a row, chosen and repeated as
// one.
template <typename T>
constexpr bool kPairs = sizeof(T) <= 4;
template <typename T>
struct PairOf {
  typedef Unsigned<2 * sizeof(T)> Type __attribute__((aligned(sizeof(T)), may_alias));
};
template <typename T>
using Pair = typename PairOf<T>::Type;

// A map of regions with every entry `times` times, as T.
template <typename T>
D2IT_INLINE void widen(const uint8_t* __restrict in, int64_t regions, int64_t times, T* __restrict out) {
  if (times == 1) {
    for (int64_t i = 0; i < regions; ++i) out[i] = in[i];
  } else if (times == 2) {
    for (int64_t i = 0; i < regions; ++i) out[2 * i] = out[2 * i + 1] = in[i];
  } else {
    for (int64_t i = 0; i < regions; ++i) {
      for (int64_t j = 0; j < times; ++j) *out++ = in[i];
    }
  }
}

D2IT_CLONES_256 void widened(const uint8_t* in, int64_t regions, int64_t times, uint16_t* out) {
  widen(in, regions, times, out);
}
D2IT_CLONES_256 void widened(const uint8_t* in, int64_t regions, int64_t times, uint32_t* out) {
  widen(in, regions, times, out);
}
D2IT_CLONES_256 void widened(const uint8_t* in, int64_t regions, int64_t times, uint64_t* out) {
  widen(in, regions, times, out);
}

// Bit i of present[y]: whether grain i occurs in row y.
D2IT_CLONES_256 void occur(const uint8_t* __restrict in, int64_t rows, int64_t columns,
                           uint8_t* __restrict present) {
  for (int64_t y = 0; y < rows; ++y, in += columns) {
    uint32_t bits = 0;
    for (int64_t x = 0; x < columns; ++x) bits |= 1u << in[x];
    present[y] = static_cast<uint8_t>(bits);
  }
}

// The grain map of one image as the row loops read it. T: an unsigned integer as wide as an element.
template <typename T>
struct Choice {
  using PairOfT = Unsigned<2 * sizeof(T)>;

  struct Cells {
    int64_t ratio = 0;
    std::vector<T> grains; // (map_height, width / ratio): of every cell that covers ratio finest columns
  };

  std::vector<Cells> cells;     // for every ratio that is wanted
  std::vector<PairOfT> pairs;   // (map_height, width / 2): of every two finest columns, where wanted
  std::vector<uint8_t> present; // (map_height,): bit i is set where grain i occurs in that row
  int64_t image = -1;

  Choice(const Sizes& s, bool with_pairs)
      : pairs(with_pairs ? s.map_height * s.width / 2 : 0), present(s.map_height) {}

  void want(int64_t ratio, const Sizes& s) {
    if (!of(ratio)) cells.push_back({ratio, std::vector<T>(s.map_height * (s.width / ratio))});
  }

  const T* of(int64_t ratio) const {
    for (const Cells& c : cells) {
      if (c.ratio == ratio) return c.grains.data();
    }
    return nullptr;
  }

  void load(const std::vector<uint8_t>& map, const Sizes& s, int64_t b) {
    if (b == image) return;
    image = b;
    const int64_t regions = s.map_height * s.map_width;
    const uint8_t* in = map.data() + b * regions;
    occur(in, s.map_height, s.map_width, present.data());
    for (Cells& c : cells) widened(in, regions, s.region / c.ratio, c.grains.data());
    if (!pairs.empty()) widened(in, regions, s.region / 2, pairs.data());
  }
};

// ----------------------------------------------------------------------------------------------------
// Forward

// One row of cells, each `ratio` times.
template <typename T>
D2IT_INLINE void stretch(T* __restrict out, const T* __restrict in, int64_t stride, int64_t ratio,
                         int64_t cells) {
  for (int64_t x = 0; x < cells; ++x) {
    for (int64_t i = 0; i < ratio; ++i) out[x * ratio + i] = in[x * stride];
  }
}

// Writes one row of the finest grid over the columns of out that are of a grain.
template <typename T>
D2IT_INLINE void blend(T* __restrict out, const T* __restrict in, const T* __restrict grains, T grain,
                       int64_t width) {
  for (int64_t x = 0; x < width; ++x) {
    const T mine = mask<T>(grains[x] == grain);
    out[x] = (in[x] & mine) | (out[x] & ~mine);
  }
}

// The two rows that a row of cells of twice the finest size covers: those cells, or the finest grain where it
// is.
template <typename T>
D2IT_INLINE void merge_pairs(T* out, int64_t out_row, const T* __restrict coarse, const T* fine,
                             int64_t fine_row, const Unsigned<2 * sizeof(T)>* __restrict grains,
                             int64_t finest, int64_t cells) {
  auto* __restrict out0 = reinterpret_cast<Pair<T>*>(out);
  auto* __restrict out1 = reinterpret_cast<Pair<T>*>(out + out_row);
  const auto* __restrict fine0 = reinterpret_cast<const Pair<T>*>(fine);
  const auto* __restrict fine1 = reinterpret_cast<const Pair<T>*>(fine + fine_row);
#pragma GCC ivdep
  for (int64_t x = 0; x < cells; ++x) {
    Pair<T> both = coarse[x];
    both |= both << 8 * sizeof(T);
    const Pair<T> is_fine = mask<Pair<T>>(grains[x] == static_cast<Pair<T>>(finest));
    out0[x] = (fine0[x] & is_fine) | (both & ~is_fine);
    out1[x] = (fine1[x] & is_fine) | (both & ~is_fine);
  }
}

// line: room for a row of the finest grid.
template <typename T>
D2IT_INLINE void merge_plane(const View<T>* latents, const Choice<T>& choice, T* line, T* out,
                             int64_t out_row, const Sizes& s, int64_t b, int64_t c) {
  const View<T>& fine = latents[s.grains - 1];
  const T* columns = choice.of(1);
  for (int64_t region_row = 0; region_row < s.map_height; ++region_row) {
    const int64_t top = region_row * s.region;
    const unsigned present = choice.present[region_row], finest = 1u << (s.grains - 1);
    bool all = true;
    for (int64_t i = 0; i < s.grains; ++i) {
      if (!(present >> i & 1)) continue;
      const View<T>& latent = latents[i];
      const int64_t ratio = latent.ratio, cells = s.width / ratio;
      const T* in = latent.at(b, c, top / ratio, 0);
      T* to = out + top * out_row;
      if constexpr (kPairs<T>) {
        if (ratio == 2 && latent.column == 1 && fine.column == 1 &&
            (present | finest) == (1u << i | finest)) {
          const auto* grains = choice.pairs.data() + region_row * cells;
          const T* below = fine.at(b, c, top, 0);
          for (int64_t y = 0; y < s.region; y += 2, in += latent.row) {
            merge_pairs(to + y * out_row, out_row, in, below + y * fine.row, fine.row, grains, s.grains - 1,
                        cells);
          }
          break;
        }
      }
      const T* grains = columns ? columns + region_row * s.width : nullptr;
      for (int64_t y = 0; y < s.region; y += ratio, in += latent.row) {
        const T* row = line;
        if (ratio == 1 && latent.column == 1) {
          row = in;
        } else if (ratio == 2 && latent.column == 1) {
          stretch(line, in, 1, 2, cells);
        } else if (ratio == 4 && latent.column == 1) {
          stretch(line, in, 1, 4, cells);
        } else {
          stretch(line, in, latent.column, ratio, cells);
        }
        for (int64_t j = 0; j < ratio; ++j, to += out_row) {
          if (all) { // no other grain has been before
            std::memcpy(to, row, s.width * sizeof(T));
          } else {
            blend(to, row, grains, static_cast<T>(i), s.width);
          }
        }
      }
      all = false;
    }
  }
}

#define D2IT_MERGE_PLANE(T)                                                                    \
  D2IT_CLONES_256 void merge(const View<T>* latents, const Choice<T>& choice, T* line, T* out, \
                             int64_t out_row, const Sizes& s, int64_t b, int64_t c) {          \
    merge_plane<T>(latents, choice, line, out, out_row, s, b, c);                              \
  }
D2IT_MERGE_PLANE(uint16_t)
D2IT_MERGE_PLANE(uint32_t)
D2IT_MERGE_PLANE(uint64_t)
#undef D2IT_MERGE_PLANE

template <typename T>
void forward_rows(const std::vector<View<T>>& latents, const std::vector<uint8_t>& map, const View<T>& out,
                  const Sizes& s) {
  const int64_t planes_per_thread = kElementsPerThread / (s.height * s.width) + 1;
  const bool pairs = kPairs<T> && s.region % 2 == 0;
  // Two grains, one twice the size of the other: every row is one of pairs or one of the finest grain alone.
  const bool pairs_alone =
      pairs && s.grains == 2 && latents[0].ratio == 2 && latents[0].column == 1 && latents[1].column == 1;
  torch::stable::parallel_for(0, s.batch * s.channels, planes_per_thread, [&](int64_t begin, int64_t end) {
    Choice<T> choice(s, pairs);
    if (!pairs_alone) choice.want(1, s);
    std::vector<T> line(s.width);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t b = plane / s.channels, c = plane % s.channels;
      choice.load(map, s, b);
      merge(latents.data(), choice, line.data(), out.at(b, c, 0, 0), out.row, s, b, c);
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

// ----------------------------------------------------------------------------------------------------
// Backward. A sum is taken in at least fp32, over the rows of a cell and in each over its columns.

using d2it::bits_as;
using d2it::to_float;
D2IT_INLINE double to_float(double v) { return v; }
D2IT_INLINE uint32_t bits_as(float v, float) { return __builtin_bit_cast(uint32_t, v); }
D2IT_INLINE uint64_t bits_as(double v, double) { return __builtin_bit_cast(uint64_t, v); }

// An element as the integer that it is stored as: integers are what the grain map chooses or clears fastest.
template <typename T>
using Lane = Unsigned<sizeof(T)>;
template <typename T>
struct BitsOf {
  typedef Lane<T> Type __attribute__((may_alias));
};
template <typename T>
using Bits = typename BitsOf<T>::Type;

// One row of cells: their gradients where the grain is theirs, zero elsewhere.
template <typename T>
D2IT_INLINE void sum_row(Bits<T>* __restrict to, const T* __restrict row, int64_t stride, int64_t next,
                         const Lane<T>* __restrict grains, Lane<T> grain, int64_t ratio, int64_t cells) {
#pragma GCC ivdep
  for (int64_t x = 0; x < cells; ++x) {
    Sum<T> sum = 0;
    for (int64_t j = 0; j < ratio; ++j) {
      for (int64_t i = 0; i < ratio; ++i) sum += to_float(row[j * next + (x * ratio + i) * stride]);
    }
    const auto bits = bits_as(sum, T{});
    to[x] = static_cast<Lane<T>>(bits & mask<Lane<T>>(grains[x] == grain));
  }
}

// The same where a cell has 2 x 2 elements of 16 or 32 bits.
template <typename T>
D2IT_INLINE void sum_pairs(Bits<T>* __restrict to, const T* row, int64_t next,
                           const uint32_t* __restrict grains, uint32_t grain, int64_t cells) {
  const auto* __restrict row0 = reinterpret_cast<const Pair<Lane<T>>*>(row);
  const auto* __restrict row1 = reinterpret_cast<const Pair<Lane<T>>*>(row + next);
  const auto left = [](Unsigned<2 * sizeof(T)> pair) __attribute__((always_inline)) {
    return to_float(__builtin_bit_cast(T, static_cast<Lane<T>>(pair)));
  };
  const auto right = [left](Unsigned<2 * sizeof(T)> pair)
                         __attribute__((always_inline)) { return left(pair >> 8 * sizeof(T)); };
#pragma GCC ivdep
  for (int64_t x = 0; x < cells; ++x) {
    const float sum = left(row0[x]) + right(row0[x]) + left(row1[x]) + right(row1[x]);
    to[x] = static_cast<Lane<T>>(bits_as(sum, T{}) & mask<uint32_t>(grains[x] == grain));
  }
}

template <typename T>
D2IT_INLINE void sum_plane(const View<T>& grad, const Choice<Lane<T>>& choice, const View<T>& out, int64_t i,
                           const Sizes& s, int64_t b, int64_t c) {
  const Lane<T> grain = static_cast<Lane<T>>(i);
  const int64_t ratio = out.ratio, cells = s.width / ratio;
  const Lane<T>* of_cells = choice.of(ratio);
  for (int64_t region_row = 0; region_row < s.map_height; ++region_row) {
    const int64_t top = region_row * s.region;
    const Lane<T>* grains = of_cells + region_row * cells;
    const bool present = choice.present[region_row] >> i & 1;
    T* to = out.at(b, c, top / ratio, 0);
    const T* row = grad.at(b, c, top, 0);
    for (int64_t y = 0; y < s.region; y += ratio, to += out.row, row += ratio * grad.row) {
      auto* __restrict bits = reinterpret_cast<Bits<T>*>(to);
      if (!present) {
        std::memset(to, 0, cells * sizeof(T));
      } else if (grad.column == 1 && ratio == 1) {
        const auto* __restrict in = reinterpret_cast<const Bits<T>*>(row);
#pragma GCC ivdep
        for (int64_t x = 0; x < cells; ++x) bits[x] = in[x] & mask<Lane<T>>(grains[x] == grain);
      } else if (grad.column == 1 && ratio == 2) {
        if constexpr (sizeof(T) == 2) {
          const uint32_t* pairs = choice.pairs.data() + region_row * cells;
          sum_pairs(bits, row, grad.row, pairs, static_cast<uint32_t>(i), cells);
        } else if constexpr (sizeof(T) == 4) {
          sum_pairs(bits, row, grad.row, grains, static_cast<uint32_t>(i), cells);
        } else {
          sum_row(bits, row, 1, grad.row, grains, grain, 2, cells);
        }
      } else if (grad.column == 1 && ratio == 4) {
        sum_row(bits, row, 1, grad.row, grains, grain, 4, cells);
      } else {
        sum_row(bits, row, grad.column, grad.row, grains, grain, ratio, cells);
      }
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
    T* to = out.at(b, 0, y / ratio, 0);
    for (int64_t x = 0; x < cells * s.map_width; ++x, to += out.column) {
      auto* __restrict bits = reinterpret_cast<Bits<T>*>(to);
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
          for (int64_t c = 0; c < channels; ++c) sums[c] += to_float(in[c * stride]);
        }
      }
      for (int64_t c = 0; c < channels; ++c) bits[c] = static_cast<Lane<T>>(bits_as(sums[c], T{}));
    }
  }
}

#define D2IT_BACKWARD(T)                                                                                   \
  D2IT_CLONES_256 void sum_rows(const View<T>& grad, const Choice<Lane<T>>& choice, const View<T>& out,    \
                                int64_t i, const Sizes& s, int64_t b, int64_t c) {                         \
    sum_plane<T>(grad, choice, out, i, s, b, c);                                                           \
  }                                                                                                        \
  D2IT_CLONES_256 void sum_line(const View<T>& grad, const uint8_t* grains, const View<T>& out, int64_t i, \
                                Sum<T>* sums, const Sizes& s, int64_t b, int64_t top) {                    \
    if (grad.channel == 1 && s.channels == 4) {                                                            \
      sum_pixels<4, T>(grad, grains, out, i, sums, s, b, top);                                             \
    } else if (grad.channel == 1 && s.channels == 8) {                                                     \
      sum_pixels<8, T>(grad, grains, out, i, sums, s, b, top);                                             \
    } else {                                                                                               \
      sum_pixels<0, T>(grad, grains, out, i, sums, s, b, top);                                             \
    }                                                                                                      \
  }
D2IT_BACKWARD(float)
D2IT_BACKWARD(double)
D2IT_BACKWARD(Half)
D2IT_BACKWARD(BFloat16)
#undef D2IT_BACKWARD

template <typename T>
void backward_rows(const View<T>& grad, const std::vector<uint8_t>& map, const std::vector<View<T>>& outs,
                   const Sizes& s) {
  const int64_t planes_per_thread = kElementsPerThread / (s.height * s.width) + 1;
  torch::stable::parallel_for(0, s.batch * s.channels, planes_per_thread, [&](int64_t begin, int64_t end) {
    Choice<Lane<T>> choice(s, sizeof(T) == 2 && s.region % 2 == 0);
    for (const View<T>& out : outs) choice.want(out.ratio, s);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t b = plane / s.channels, c = plane % s.channels;
      choice.load(map, s, b);
      for (int64_t i = 0; i < s.grains; ++i) {
        sum_rows(grad, choice, outs[i], i, s, b, c);
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
      return backward<Half>(grad, map, grads, s);
    case ScalarType::BFloat16:
      return backward<BFloat16>(grad, map, grads, s);
    default:
      d2it::fail("neighbor_copy_backward takes float32, float16, bfloat16 and float64");
  }
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CPU, m) {
  m.impl("neighbor_copy", TORCH_BOX(&neighbor_copy));
  m.impl("neighbor_copy_backward", TORCH_BOX(&neighbor_copy_backward));
}
