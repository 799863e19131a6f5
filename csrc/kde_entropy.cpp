// kde_entropy and encode_grains on CPU (D2iT, section 3.1, Eqs. 2-3): the Shannon entropy of the Gaussian
// kernel density of gray levels in every region, and the number of thresholds it exceeds.
//
// A pixel touches only the bins within kReach sigma of it, its taps. Their values are a function of where the
// pixel lies between two bins, so they are read from a table over `phases` positions, corrected to second
// order for the rest: exp(-(u - e)^2 / 2) = g(u) (1 + u e + (u^2 - 1) e^2 / 2) + O(e^3), g(u) = exp(-u^2 /
// 2). The taps of a pixel are adjacent bins: one vector, added to the density in place. Consecutive pixels
// add to different copies of it, because in a smooth region they would otherwise wait for each other's
// stores.
//
// With p the density before normalisation and Z its sum, H = ln Z - (sum p ln p) / Z.
#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kReach = 6.0;         // sigma; what lies beyond changes no entropy by more than 3e-7
constexpr double kLargestStep = 0.016; // sigma; the largest e: its third-order term stays below 1e-6
constexpr int kCopies = 8;
constexpr int kLanes = 16;
constexpr int kMaxPixels = 64 * 64;
constexpr int64_t kPixelsPerThread = 4096; // fewer are not worth waking a thread for

template <typename T, int n>
struct VectorOf {
  typedef T type __attribute__((vector_size(n * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <int n>
using Floats = typename VectorOf<float, n>::type;
using Ints = typename VectorOf<int32_t, kLanes>::type;

template <typename V>
D2IT_INLINE V& as(float* p) {
  return *reinterpret_cast<V*>(p);
}
template <typename V>
D2IT_INLINE const V& as(const float* p) {
  return *reinterpret_cast<const V*>(p);
}

// ----------------------------------------------------------------------------------------------------
// What is worked out once per call

struct Job {
  const void* images;
  int64_t stride_batch, stride_channel, stride_row, stride_column; // elements
  int64_t map_height, map_width;
  int region, channels, bins;
  bool normalize;

  // value of a pixel, from the middle of the range = scale * (offset + sum of weight * channel)
  float weights[3], offset, scale;
  float least, most; // what a channel may hold

  // Nodes: `phases` of them per bin. node = round(value * nodes_per_unit + middle); e, in sigma, is what is
  // left.
  float nodes_per_unit, middle, step_high, step_low, per_sigma;
  int phase_bits, last_node;
  int reach, taps; // bins j - reach + 1 .. j + reach, padded to whole vectors
  float spacing;   // of the bins, in sigma
  std::vector<float> table;

  const float* thresholds;
  int num_thresholds;
  float* entropy;
  int64_t* grains;

  int pixels() const { return region * region; }
  int copy_size() const { return (bins + taps + 2 * kLanes - 1) / kLanes * kLanes; }
};

// The float that bounds floats as `bound` bounds doubles.
float round_up(double bound) {
  const float f = static_cast<float>(bound);
  return f < bound ? std::nextafter(f, std::numeric_limits<float>::infinity()) : f;
}

void set_values(Job& job, ScalarType dtype, double low, double high, double slack) {
  const double gray[3] = {0.2989, 0.5870, 0.1140};
  const double middle = (low + high) / 2;
  double total = 0;
  for (int c = 0; c < job.channels; ++c) total += job.channels == 1 ? 1.0 : gray[c];
  if (dtype == ScalarType::Byte) { // weights in 1 / 10,000: the weighted sum is exact in float
    const double unit = (high - low) / 255 / (job.channels == 1 ? 1 : 10000);
    for (int c = 0; c < job.channels; ++c) {
      job.weights[c] = job.channels == 1 ? 1.0f : static_cast<float>(std::round(gray[c] * 10000));
    }
    job.scale = static_cast<float>(unit);
    job.offset = static_cast<float>((low * total - middle) / unit);
  } else {
    for (int c = 0; c < job.channels; ++c)
      job.weights[c] = job.channels == 1 ? 1.0f : static_cast<float>(gray[c]);
    job.scale = 1.0f;
    job.offset = static_cast<float>(-middle);
  }
  job.least = round_up(low - slack);
  job.most = -round_up(-(high + slack));
}

void set_density(Job& job, double low, double high, double sigma) {
  const double spacing = (high - low) / (job.bins - 1), delta = spacing / sigma;
  job.spacing = static_cast<float>(delta);
  job.reach = static_cast<int>(std::min<double>(job.bins, std::ceil(kReach / delta)));
  job.phase_bits = 0;
  if (job.reach > 1) {
    while (delta / (2 << job.phase_bits) > kLargestStep) ++job.phase_bits;
  }
  const int phases = 1 << job.phase_bits, width = 2 * job.reach;
  job.taps = width <= 4 ? 4 : width <= 8 ? 8 : (width + kLanes - 1) / kLanes * kLanes;
  job.last_node = (job.bins - 1) * phases;
  job.nodes_per_unit = static_cast<float>(phases / spacing);
  job.middle = static_cast<float>(job.last_node / 2.0);
  job.step_high = static_cast<float>(spacing / phases);
  job.step_low = static_cast<float>(spacing / phases - job.step_high);
  job.per_sigma = static_cast<float>(1 / sigma);
  if (job.reach == 1) return; // two neighbours: worked out directly
  job.table.resize(3 * job.taps * phases);
  for (int phase = 0; phase < phases; ++phase) {
    float* row = job.table.data() + 3 * job.taps * phase;
    for (int k = 0; k < job.taps; ++k) {
      const double u = (k - job.reach + 1 - static_cast<double>(phase) / phases) * delta;
      const double g = std::exp(-0.5 * u * u);
      row[k] = static_cast<float>(g);
      row[job.taps + k] = static_cast<float>(g * u);
      row[2 * job.taps + k] = static_cast<float>(g * (u * u - 1) / 2);
    }
  }
}

// ----------------------------------------------------------------------------------------------------
// Pixels of a region

using d2it::BFloat16;
using d2it::Half;
using d2it::to_float;
D2IT_INLINE float to_float(float v) { return v; }
D2IT_INLINE float to_float(uint8_t v) { return v; }

// Writes the region's values, from the middle of the range, row by row; whether all of them may be there.
// column: the stride between neighbours in a row where it is known (0: read it).
template <typename T, int channels, int column>
D2IT_INLINE bool read_region(const Job& job, const T* __restrict in, float* __restrict values) {
  const int64_t step = column ? column : job.stride_column, next = job.stride_channel;
  const float least = job.least, most = job.most, offset = job.offset, scale = job.scale;
  const float w0 = job.weights[0], w1 = job.weights[1], w2 = job.weights[2];
  const int region = job.region;
  int bad = 0;
  for (int y = 0; y < region; ++y, in += job.stride_row, values += region) {
    for (int x = 0; x < region; ++x) {
      const T* pixel = in + x * step;
      float value;
      if (channels == 1) {
        const float v = to_float(pixel[0]);
        bad |= !((v >= least) & (v <= most));
        value = v + offset;
      } else {
        const float r = to_float(pixel[0]);
        const float g = to_float(pixel[column == 3 ? 1 : next]);
        const float b = to_float(pixel[column == 3 ? 2 : 2 * next]);
        bad |= !((r >= least) & (r <= most) & (g >= least) & (g <= most) & (b >= least) & (b <= most));
        value = std::is_same_v<T, uint8_t> ? (w0 * r + w1 * g + w2 * b) + offset
                                           : w0 * r + (w1 * g + (w2 * b + offset));
      }
      values[x] = value * scale;
    }
  }
  return std::is_same_v<T, uint8_t> || !bad;
}

template <typename T>
D2IT_INLINE bool read_any(const Job& job, int64_t start, float* values) {
  const T* in = static_cast<const T*>(job.images) + start;
  if (job.channels == 1) {
    return job.stride_column == 1 ? read_region<T, 1, 1>(job, in, values)
                                  : read_region<T, 1, 0>(job, in, values);
  }
  if (job.stride_column == 1) return read_region<T, 3, 1>(job, in, values);
  if (job.stride_column == 3 && job.stride_channel == 1) return read_region<T, 3, 3>(job, in, values);
  return read_region<T, 3, 0>(job, in, values);
}

// ----------------------------------------------------------------------------------------------------
// Density

struct Scratch {
  std::vector<float> density; // kCopies of them; entry i is bin i - (reach - 1); zero between regions
  std::vector<float> values, offsets;
  std::vector<int32_t> nodes;

  explicit Scratch(const Job& job)
      : density(kCopies * job.copy_size()), values(kMaxPixels), offsets(kMaxPixels), nodes(kMaxPixels) {}
};

// The node of every pixel and its distance from it, in sigma. Returns the first and the last bin below a
// pixel.
D2IT_INLINE void locate(const Job& job, Scratch& s, int& first, int& last) {
  const float* __restrict values = s.values.data();
  float* __restrict offsets = s.offsets.data();
  int32_t* __restrict nodes = s.nodes.data();
  const float nodes_per_unit = job.nodes_per_unit, middle = job.middle, per_sigma = job.per_sigma;
  const float step_high = job.step_high, step_low = job.step_low;
  const float rounding = middle + (job.reach == 1 ? 0.0f : 0.5f);
  const int last_node = job.last_node, pixels = job.pixels();
  int lowest = last_node, highest = 0;
  for (int i = 0; i < pixels; ++i) {
    int node = static_cast<int>(values[i] * nodes_per_unit + rounding);
    node = node < 0 ? 0 : node;
    node = node > last_node ? last_node : node;
    const float at = static_cast<float>(node) - middle;
    offsets[i] = ((values[i] - at * step_high) - at * step_low) * per_sigma;
    nodes[i] = node;
    lowest = node < lowest ? node : lowest;
    highest = node > highest ? node : highest;
  }
  first = lowest >> job.phase_bits;
  last = highest >> job.phase_bits;
}

// Adds every pixel's taps to the density. kTaps: their number where it is a vector of its own, 0: whole
// kLanes.
template <int kTaps>
D2IT_INLINE void add_taps(const Job& job, Scratch& s) {
  constexpr int kWidth = kTaps ? kTaps : kLanes;
  using V = Floats<kWidth>;
  const int taps = kTaps ? kTaps : job.taps, pixels = job.pixels(), copy_size = job.copy_size();
  const int bits = job.phase_bits, mask = (1 << bits) - 1;
  const float* table = job.table.data();
  float* density = s.density.data();
  const float* offsets = s.offsets.data();
  const int32_t* nodes = s.nodes.data();
  for (int i = 0; i < pixels; ++i) {
    const float* row = table + (nodes[i] & mask) * 3 * taps;
    float* out = density + (i % kCopies) * copy_size + (nodes[i] >> bits);
    const float e = offsets[i];
    for (int k = 0; k < taps; k += kWidth) {
      as<V>(out + k) += as<V>(row + k) + e * (as<V>(row + taps + k) + e * as<V>(row + 2 * taps + k));
    }
  }
}

// exp(y) for y <= 0; 0 from about -87 on. Relative error 2e-7.
D2IT_INLINE float exp_negative(float y) {
  const float bounded = y < -87.0f ? -87.0f : y;
  const float n = (bounded * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float poly = 1.9875691500e-4f;
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * r * r + r + 1.0f;
  const int32_t power = (static_cast<int32_t>(n) + 127) << 23;
  return poly * __builtin_bit_cast(float, power);
}

// Bins kReach sigma apart or farther: a pixel counts at its two neighbours, in full precision however small.
D2IT_INLINE void add_neighbours(const Job& job, Scratch& s) {
  float* __restrict below = s.offsets.data(); // in: the distance from the bin below
  float* __restrict above = s.values.data();
  const int pixels = job.pixels(), copy_size = job.copy_size();
  const float spacing = job.spacing;
  for (int i = 0; i < pixels; ++i) {
    const float u = below[i], v = spacing - u;
    below[i] = exp_negative(-0.5f * u * u);
    above[i] = exp_negative(-0.5f * v * v);
  }
  float* density = s.density.data();
  const int32_t* nodes = s.nodes.data();
  for (int i = 0; i < pixels; ++i) {
    float* out = density + (i % kCopies) * copy_size + nodes[i];
    out[0] += below[i];
    out[1] += above[i];
  }
}

// ----------------------------------------------------------------------------------------------------
// Entropy

// p ln p, 0 where p is 0; p is normal or 0, at most 2^127.
D2IT_INLINE void p_log_p(const Floats<kLanes>& p, Floats<kLanes>& result) {
  // p = 2^n (1 + f), 1 + f in sqrt(1/2) .. sqrt(2)
  const Ints bits = (Ints)p;
  const Ints n = (bits - 0x3f3504f3) >> 23;
  const Floats<kLanes> f = (Floats<kLanes>)(bits - (n << 23)) - 1.0f;
  const Floats<kLanes> power = __builtin_convertvector(n, Floats<kLanes>);
  const Floats<kLanes> z = f * f;
  Floats<kLanes> poly = 7.0376836292e-2f * f - 1.1514610310e-1f;
  poly = poly * f + 1.1676998740e-1f;
  poly = poly * f - 1.2420140846e-1f;
  poly = poly * f + 1.4249322787e-1f;
  poly = poly * f - 1.6668057665e-1f;
  poly = poly * f + 2.0000714765e-1f;
  poly = poly * f - 2.4999993993e-1f;
  poly = poly * f + 3.3333331174e-1f;
  const Floats<kLanes> log = (f * z * poly - 0.5f * z + power * -2.12194440e-4f) + f + power * 0.693359375f;
  result = (Floats<kLanes>)((Ints)(p * log) & (p > 0.0f));
}

// Sums up the copies of the density between two entries, clears them and returns the entropy.
D2IT_INLINE float finish(const Job& job, Scratch& s, int first, int last) {
  const int size = job.copy_size(), begin = job.reach - 1,
            end = begin + job.bins; // the entries that are bins
  first = first / kLanes * kLanes;
  Floats<kLanes> total = {}, weighted = {};
  Ints index;
  for (int k = 0; k < kLanes; ++k) index[k] = k;
  for (int i = first; i < last; i += kLanes) {
    float* entry = s.density.data() + i;
    Floats<kLanes> p = {};
    for (int copy = 0; copy < kCopies; ++copy) {
      p += as<Floats<kLanes>>(entry + copy * size);
      as<Floats<kLanes>>(entry + copy * size) = Floats<kLanes>{};
    }
    const Ints at = index + i;
    p = (Floats<kLanes>)((Ints)p & (at >= begin) & (at < end));
    Floats<kLanes> term;
    p_log_p(p, term);
    total += p;
    weighted += term;
  }
  double z = 0, sum = 0;
  for (int k = 0; k < kLanes; ++k) {
    z += total[k];
    sum += weighted[k];
  }
  if (!(z > 0)) return 0.0f;
  if (job.normalize) return static_cast<float>(std::log(z) - sum / z);
  const double pixels = job.pixels(); // p was a sum over the pixels and is to be their mean
  return static_cast<float>((z * std::log(pixels) - sum) / pixels);
}

// Regions begin .. end - 1, in the order of the map. Whether every value may be there.
template <typename T>
D2IT_INLINE bool encode_regions(const Job& job, int64_t begin, int64_t end) {
  Scratch s(job);
  bool good = true;
  for (int64_t region = begin; region < end; ++region) {
    const int64_t b = region / (job.map_height * job.map_width);
    const int64_t y = region / job.map_width % job.map_height, x = region % job.map_width;
    const int64_t start =
        b * job.stride_batch + y * job.region * job.stride_row + x * job.region * job.stride_column;
    good &= read_any<T>(job, start, s.values.data());
    int first, last;
    locate(job, s, first, last);
    if (job.reach == 1) {
      add_neighbours(job, s);
    } else if (job.taps == 4) {
      add_taps<4>(job, s);
    } else if (job.taps == 8) {
      add_taps<8>(job, s);
    } else if (job.taps == 16) {
      add_taps<16>(job, s);
    } else {
      add_taps<0>(job, s);
    }
    const float entropy = finish(job, s, first, last + job.taps);
    job.entropy[region] = entropy;
    if (job.grains) {
      int64_t grain = 0;
      for (int i = 0; i < job.num_thresholds; ++i) grain += entropy > job.thresholds[i];
      job.grains[region] = grain;
    }
  }
  return good;
}

D2IT_CLONES bool encode_float(const Job& j, int64_t b, int64_t e) { return encode_regions<float>(j, b, e); }
D2IT_CLONES bool encode_half(const Job& j, int64_t b, int64_t e) { return encode_regions<Half>(j, b, e); }
D2IT_CLONES bool encode_bfloat16(const Job& j, int64_t b, int64_t e) {
  return encode_regions<BFloat16>(j, b, e);
}
D2IT_CLONES bool encode_bytes(const Job& j, int64_t b, int64_t e) { return encode_regions<uint8_t>(j, b, e); }

// thresholds: float32, adjacent. entropy: (B, H/S, W/S) float32, grains: int64, both contiguous. False where
// a value lies more than `slack` outside low..high or is not finite; the results then mean nothing.
bool kde_entropy(Tensor images, std::optional<Tensor> thresholds, int64_t region_size, int64_t num_bins,
                 double low, double high, double sigma, bool normalize, double slack, Tensor entropy,
                 std::optional<Tensor> grains) {
  Job job;
  job.images = images.const_data_ptr();
  job.stride_batch = images.stride(0);
  job.stride_channel = images.stride(1);
  job.stride_row = images.stride(2);
  job.stride_column = images.stride(3);
  job.map_height = entropy.size(1);
  job.map_width = entropy.size(2);
  job.region = static_cast<int>(region_size);
  job.channels = static_cast<int>(images.size(1));
  job.bins = static_cast<int>(num_bins);
  job.normalize = normalize;
  job.thresholds = thresholds ? static_cast<const float*>(thresholds->const_data_ptr()) : nullptr;
  job.num_thresholds = thresholds ? static_cast<int>(thresholds->numel()) : 0;
  job.entropy = static_cast<float*>(entropy.mutable_data_ptr());
  job.grains = grains ? static_cast<int64_t*>(grains->mutable_data_ptr()) : nullptr;
  const ScalarType dtype = images.scalar_type();
  set_values(job, dtype, low, high, slack);
  set_density(job, low, high, sigma);

  const auto encode = dtype == ScalarType::Float      ? encode_float
                      : dtype == ScalarType::Half     ? encode_half
                      : dtype == ScalarType::BFloat16 ? encode_bfloat16
                                                      : encode_bytes;
  const int64_t regions_per_thread = kPixelsPerThread / job.pixels() + 1;
  std::atomic<bool> good = true;
  torch::stable::parallel_for(0, entropy.numel(), regions_per_thread, [&](int64_t begin, int64_t end) {
    if (!encode(job, begin, end)) good = false;
  });
  return good;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CPU, m) { m.impl("kde_entropy", TORCH_BOX(&kde_entropy)); }
