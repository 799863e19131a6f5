// kde_entropy and encode_grains on CPU (D2iT, section 3.1, Eqs. 2-3): the Shannon entropy of the Gaussian
// kernel density of gray levels in every region, and the number of thresholds it exceeds.
//
// Bins at least kClosestTaps sigma apart: a pixel touches only the bins within kReach sigma of it, its taps,
// at most 16. Their values are a function of where the pixel lies between two bins, so they are read from a
// table over `phases` positions, corrected to second order for the rest: exp(-(u - e)^2 / 2) = g(u) (1 + u e
// + (u^2 - 1) e^2 / 2) + O(e^3), g(u) = exp(-u^2 / 2). The taps of a pixel are adjacent bins: one vector,
// added to the density in place.
//
// Bins closer together: the moments of the pixels in every cell, a group of bins, then their expansion (a
// fast Gauss transform): see kde_entropy_moments.h.
//
// Consecutive pixels add to different copies of the density, because in a smooth region they would otherwise
// wait for each other's stores.
//
// A gray image of bytes whose bins are the 256 levels needs no taps per pixel: its histogram is exact, and
// the density is the histogram convolved with the kernel at whole steps.
//
// With p the density before normalisation and Z its sum, H = ln Z - (sum p ln p) / Z.
#include "kde_entropy.h"
#include "cpu.h"
#include "kde_entropy_moments.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using d2it::as;
using d2it::exp_negative;
using d2it::Floats;
using d2it::Gray;
using d2it::kLanes;
using d2it::kMoments;
using d2it::kMostSums;
using d2it::Lines;
using d2it::Regions;
using d2it::Results;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kLargestStep = 0.016; // sigma; the largest e: its third-order term stays below 1e-6
constexpr int kCopies = 8;             // of the density, at most
constexpr int kLevels = 256;
constexpr int kStrip = 256; // columns at a time: long loops, and what they leave stays in the L1 cache
constexpr int64_t kPixelsPerThread = 4096; // fewer are not worth waking a thread for

template <int n>
using Is = std::integral_constant<int, n>;
using Ints = typename d2it::VectorOf<int32_t, kLanes>::type;

// ----------------------------------------------------------------------------------------------------
// What is worked out once per call

struct Bins {
  int count;
  // Nodes: `phases` of them per bin, or the middles of the cells, `pitch` sigma apart. node = round(value *
  // nodes_per_unit + middle); e, in sigma, is what is left. Gray of three channels may leave the range, as
  // their weights add up to 0.9999: the nodes begin before the first bin and end after the last, where a
  // pixel's taps meet no bin.
  double nodes_per_unit, middle;
  float pitch;
  int phase_bits = 0, last_node;
  int cell = 0; // bins of a cell, a power of 2, or 0 where there are none
  bool in_pairs = false;
  // Bins that a pixel touches. In the interval j they are j - reach + 1 .. j + reach, padded to whole
  // vectors.
  int reach, taps;
  int density;       // floats of one; entry i of the first copy is bin i - first
  int first;         // entry of bin 0
  int copies, shift; // of the density: a bin lies `shift` entries lower in each than in the one before
  float spacing;     // sigma
  Lines<float> table;
  Lines<float> shares; // of an entry in the mean density: 1 / pixels where it is a bin

  Bins(int64_t num_bins, double low, double high, double sigma, int pixels)
      : count(static_cast<int>(num_bins)) {
    const double step = (high - low) / (count - 1), delta = step / sigma;
    spacing = static_cast<float>(delta);
    const double outside = std::max(0.0, d2it::kGrayLoss * std::max(low, -high) / step); // in bins, of gray
    const double farthest = count + std::ceil(outside);
    const d2it::CellShape cells(delta, count, farthest);
    if (cells.bins) {
      cell = cells.bins;
      reach = cells.reach;
      taps = cells.taps;
      in_pairs = cells.in_pairs();
      copies = in_pairs ? 1 : std::max(1, kLanes / cell);
      shift = cell;
      const int margin = static_cast<int>(std::ceil(outside / cell)), before = (taps - cell) / 2;
      first = margin * cell + before;
      last_node = 2 * margin + (count - 1) / cell;
      density = last_node * cell + taps + 2 * kLanes;
      nodes_per_unit = 1 / (cell * step);
      middle = margin + count / (2.0 * cell) - 0.5;
      pitch = static_cast<float>(cell * delta);
      const auto rows = d2it::moments_table(cell, taps, before, delta);
      table.assign(rows.begin(), rows.end());
      fill_shares(pixels);
      return;
    }
    reach = static_cast<int>(std::min(farthest, std::ceil(d2it::kReach / delta)));
    while (reach > 1 && delta / (2 << phase_bits) > kLargestStep) ++phase_bits;
    const int phases = 1 << phase_bits, width = 2 * reach;
    taps = width <= 4 ? 4 : width <= 8 ? 8 : 16;
    copies = kCopies;
    shift = 0;
    const int margin = taps - reach + 1;
    first = margin + reach - 1;
    density = (margin + count + reach + taps + 2 * kLanes - 1) / kLanes * kLanes;
    last_node = (margin + count - 1 + reach) * phases;
    nodes_per_unit = phases / step;
    middle = (margin + (count - 1) / 2.0) * phases;
    pitch = static_cast<float>(delta / phases);
    if (reach > 1) fill_taps(delta, phases);
    fill_shares(pixels);
  }

 private:
  void fill_shares(int pixels) {
    shares.resize(density);
    std::fill_n(shares.begin() + first, count, 1.0f / static_cast<float>(pixels));
  }

  void fill_taps(double delta, int phases) {
    table.resize(3 * taps * phases);
    for (int phase = 0; phase < phases; ++phase) {
      float* row = table.data() + 3 * taps * phase;
      for (int k = 0; k < taps; ++k) {
        const double u = (k - reach + 1 - static_cast<double>(phase) / phases) * delta;
        const double g = std::exp(-0.5 * u * u);
        row[k] = static_cast<float>(g);
        row[taps + k] = static_cast<float>(g * u);
        row[2 * taps + k] = static_cast<float>(g * (u * u - 1) / 2);
      }
    }
  }
};

// Where a pixel lies among the nodes: `add` and the sum of weight * channel, in float32 but as exact as in
// double. Weights and channels are split in two. Their upper parts have 12 bits, so that each product and
// the sum of all are exact; the rest is small, and so is what its rounding takes.
struct Position {
  float high[3], low[3], add_high, add_low;
  float round; // what is added to a channel and taken away again leaves its upper part

  Position(const Gray& gray, const Bins& bins, bool bytes) {
    double weights[3], largest = 0;
    for (int c = 0; c < 3; ++c) {
      weights[c] = gray.exact[c] * bins.nodes_per_unit;
      largest = std::max(largest, weights[c]);
    }
    const double most = bytes ? kLevels - 1 : std::max(-gray.least, gray.most);
    const double step = unit(most), weight_step = unit(largest);
    round = static_cast<float>(step * 0x1.8p23);
    for (int c = 0; c < 3; ++c) split(weights[c], weight_step, high[c], low[c]);
    split(gray.exact[3] * bins.nodes_per_unit + bins.middle, step * weight_step, add_high, add_low);
  }

 private:
  // Of which 2^11 are no less than x.
  static double unit(double x) { return std::exp2(std::ceil(std::log2(x)) - 11); }

  static void split(double x, double unit, float& high, float& low) {
    high = static_cast<float>(std::round(x / unit) * unit);
    low = static_cast<float>(x - high);
  }
};

struct Job {
  Regions in;
  Gray gray;
  Bins bins;
  Position position;
  Results out;

  int pixels() const { return in.size * in.size; }
  int64_t strips() const {
    return (in.map_width + regions_per_strip() - 1) / regions_per_strip();
  } // in a row of them
  int regions_per_strip() const { return std::max(1, kStrip / in.size); }
};

// Some regions of one row of the map, side by side.
struct Strip {
  int64_t first_pixel; // offset in elements
  int64_t first_region;
  int regions, width; // columns

  Strip(const Job& job, int64_t i) {
    const Regions& in = job.in;
    const int64_t line = i / job.strips(), x = i % job.strips() * job.regions_per_strip();
    const int64_t b = line / in.map_height, y = line % in.map_height;
    first_pixel = b * in.batch + y * in.size * in.row + x * in.size * in.column;
    first_region = line * in.map_width + x;
    regions = static_cast<int>(std::min<int64_t>(job.regions_per_strip(), in.map_width - x));
    width = regions * in.size;
  }
};

// What a thread works in.
struct Scratch {
  Lines<float> density; // copies of it, zero between regions
  Lines<float> moments; // kSums copies of every cell's, after one cell without pixels; zero between regions
  Lines<float> offsets, values; // of the pixels of a strip, row by row
  Lines<int32_t> nodes;
  Lines<int32_t> lowest, highest; // node of a column

  explicit Scratch(const Job& job)
      : density(job.bins.copies * job.bins.density),
        moments(job.bins.cell ? kMostSums * kMoments * (job.bins.last_node + d2it::kPerPass) : 0) {
    const int width = job.regions_per_strip() * job.in.size, pixels = width * job.in.size;
    offsets.resize(pixels + kLanes); // read and written by whole vectors
    if (job.bins.reach == 1) values.resize(pixels + kLanes);
    nodes.resize(pixels);
    lowest.resize(width);
    highest.resize(width);
  }
};

// ----------------------------------------------------------------------------------------------------
// Pixels

using d2it::BFloat16;
using d2it::Half;
using d2it::to_float;
D2IT_INLINE float to_float(uint8_t v) { return v; }

// A row of a strip: the node of every pixel, its distance from it in sigma, and what that makes of the
// columns' lowest and highest nodes. Returns whether all pixels may be there. A float near the end of
// the range errs by 3e-8, and with it the entropy of a region of one color there by 2e-6 nats: see Position.
// kColumn: 1 where neighbours are adjacent, 3 where pixels of three adjacent channels are, else 0.
template <typename T, int kChannels, int kColumn>
D2IT_INLINE bool locate_row(const Job& job, const T* __restrict in, int width, float* __restrict offsets,
                            int32_t* __restrict nodes, int32_t* __restrict lowest,
                            int32_t* __restrict highest) {
  const Bins& bins = job.bins;
  const int64_t step = kColumn ? kColumn : job.in.column, next = job.in.channel;
  const float least = job.gray.least, most = job.gray.most, pitch = bins.pitch;
  const Position& to = job.position;
  const float high0 = to.high[0], high1 = to.high[1], high2 = to.high[2], add_high = to.add_high;
  const float low0 = to.low[0], low1 = to.low[1], low2 = to.low[2], add_low = to.add_low, round = to.round;
  const float rounding = bins.reach == 1 ? 0.0f : 0.5f; // two neighbours: the node is the bin below
  const int last_node = bins.last_node;
  constexpr bool kBytes = std::is_same_v<T, uint8_t>;
  int bad = 0;
  for (int x = 0; x < width; ++x) {
    const T* pixel = in + x * step;
    float at, rest;
    if constexpr (kChannels == 1) {
      const float v = to_float(pixel[0]);
      if (!kBytes) bad |= !((v >= least) & (v <= most));
      const float upper = (v + round) - round;
      at = high0 * upper + add_high;
      rest = high0 * (v - upper) + (low0 * v + add_low);
    } else {
      const float r = to_float(pixel[0]);
      const float g = to_float(pixel[kColumn == 3 ? 1 : next]);
      const float b = to_float(pixel[kColumn == 3 ? 2 : 2 * next]);
      if (!kBytes)
        bad |= !((r >= least) & (r <= most) & (g >= least) & (g <= most) & (b >= least) & (b <= most));
      const float r0 = (r + round) - round, g0 = (g + round) - round, b0 = (b + round) - round;
      at = high0 * r0 + (high1 * g0 + (high2 * b0 + add_high));
      rest = high0 * (r - r0) + (high1 * (g - g0) + (high2 * (b - b0) + add_low));
      rest += low0 * r + (low1 * g + low2 * b);
    }
    int node = static_cast<int>(at + rest + rounding);
    node = node < 0 ? 0 : node;
    node = node > last_node ? last_node : node;
    offsets[x] = ((at - static_cast<float>(node)) + rest) * pitch;
    nodes[x] = node;
    lowest[x] = node < lowest[x] ? node : lowest[x];
    highest[x] = node > highest[x] ? node : highest[x];
  }
  return !bad;
}

template <typename T>
D2IT_INLINE bool locate(const Job& job, const Strip& strip, Scratch& s) {
  const Regions& in = job.in;
  const int width = strip.width;
  int32_t *lowest = s.lowest.data(), *highest = s.highest.data();
  std::fill_n(lowest, width, job.bins.last_node);
  std::fill_n(highest, width, 0);
  bool good = true;
  for (int y = 0; y < in.size; ++y) {
    const T* row = static_cast<const T*>(in.images) + strip.first_pixel + y * in.row;
    float* offsets = s.offsets.data() + y * width;
    int32_t* nodes = s.nodes.data() + y * width;
    const auto read = [&](auto channels, auto column) __attribute__((always_inline)) {
      good &= locate_row<T, channels, column>(job, row, width, offsets, nodes, lowest, highest);
    };
    if (in.channels == 1) {
      in.column == 1 ? read(Is<1>{}, Is<1>{}) : read(Is<1>{}, Is<0>{});
    } else if (in.column == 1) {
      read(Is<3>{}, Is<1>{});
    } else if (in.column == 3 && in.channel == 1) {
      read(Is<3>{}, Is<3>{});
    } else {
      read(Is<3>{}, Is<0>{});
    }
  }
  return good;
}

// ----------------------------------------------------------------------------------------------------
// Density

// Adds every tap of a region's pixels to the density. start: the region's first pixel in the strip.
template <int kTaps>
D2IT_INLINE void add_taps(const Job& job, Scratch& s, int start, int width) {
  constexpr int kWidth = kTaps == 4 ? 4 : kLanes;
  using V = Floats<kWidth>;
  const int size = job.bins.density, region = job.in.size;
  const int bits = job.bins.phase_bits, mask = (1 << bits) - 1;
  const float* table = job.bins.table.data();
  float* density = s.density.data() + kLanes;
  for (int y = 0; y < region; ++y) {
    const float* offsets = s.offsets.data() + start + y * width;
    const int32_t* nodes = s.nodes.data() + start + y * width;
    for (int x = 0; x < region; ++x) {
      const float* row = table + (nodes[x] & mask) * 3 * kTaps;
      float* out = density + x % kCopies * size + (nodes[x] >> bits);
      const float e = offsets[x];
      for (int k = 0; k < kTaps; k += kWidth)
        as<V>(out + k) += as<V>(row + k) + e * (as<V>(row + kTaps + k) + e * as<V>(row + 2 * kTaps + k));
    }
  }
}

// Bins at least kReach sigma apart: a pixel counts at its two neighbours, in full precision however small.
// These are the neighbours' values for a whole strip, the lower in place of the offsets.
D2IT_INLINE void weigh_neighbours(const Job& job, const Strip& strip, Scratch& s) {
  const float spacing = job.bins.spacing;
  for (int i = 0; i < strip.width * job.in.size; i += kLanes) {
    auto &below = as<Floats<kLanes>>(&s.offsets[i]), &above = as<Floats<kLanes>>(&s.values[i]);
    const Floats<kLanes> u = below, v = spacing - u;
    below = exp_negative(-0.5f * u * u);
    above = exp_negative(-0.5f * v * v);
  }
}

D2IT_INLINE void add_neighbours(const Job& job, Scratch& s, int start, int width) {
  const int size = job.bins.density, region = job.in.size;
  for (int y = 0; y < region; ++y) {
    const int row = start + y * width;
    for (int x = 0; x < region; ++x) {
      float* out = s.density.data() + kLanes + x % kCopies * size + s.nodes[row + x];
      out[0] += s.offsets[row + x];
      out[1] += s.values[row + x];
    }
  }
}

// ----------------------------------------------------------------------------------------------------
// Entropy

// ln x = exponent ln 2 + mantissa, of x > 0; finite where x is 0.
struct Log {
  Floats<kLanes> exponent, mantissa;

  // x = 2^exponent m, m within 1/16 of one of 1, 9/8 .. 15/8, whose inverse and logarithm are tabled.
  D2IT_INLINE explicit Log(const Floats<kLanes>& x) {
    constexpr Floats<kLanes> inverses = {1.0f,        8.0f / 9.0f,  0.8f,        8.0f / 11.0f,
                                         2.0f / 3.0f, 8.0f / 13.0f, 4.0f / 7.0f, 8.0f / 15.0f};
    constexpr Floats<kLanes> logs = {0.0f,         0.117783025f, 0.223143533f, 0.318453699f,
                                     0.405465066f, 0.485507786f, 0.559615731f, 0.628608584f};
    const Ints bits = (Ints)x, from = bits - (0x3f800000 - 0x80000), n = from >> 23, nearest = from >> 20;
    exponent = __builtin_convertvector(n, Floats<kLanes>);
    const Floats<kLanes> m = (Floats<kLanes>)(bits - (n << 23));
    const Floats<kLanes> r = m * d2it::lookup(inverses, nearest) - 1.0f;
    const Floats<kLanes> poly = (-0.25099412f * r + 0.33401403f) * r - 0.49999866f;
    mantissa = r * r * poly + (d2it::lookup(logs, nearest) + r);
  }
};

struct Sums {
  Floats<kLanes> total = {}, exponents = {}, mantissas = {}; // of p, and of p ln p

  // Where bins get nothing, moments may leave a little less than that.
  D2IT_INLINE void add(const Floats<kLanes>& p) {
    const Floats<kLanes> some = p > 0.0f ? p : Floats<kLanes>{};
    const Log log(some);
    total += p;
    exponents += some * log.exponent;
    mantissas += some * log.mantissa;
  }

  D2IT_INLINE void store(const Results& out, int64_t region) const {
    double z = 0, whole = 0, part = 0;
    for (int k = 0; k < kLanes; ++k) {
      z += total[k];
      whole += exponents[k];
      part += mantissas[k];
    }
    const double sum = whole * M_LN2 + part;
    const double entropy = !out.normalize ? -sum : z > 0 ? std::max(std::log(z) - sum / z, 0.0) : 0.0;
    out.entropy[region] = static_cast<float>(entropy);
    if (!out.grains) return;
    int64_t grain = 0;
    for (int i = 0; i < out.num_thresholds; ++i) grain += out.entropy[region] > out.thresholds[i];
    out.grains[region] = grain;
  }
};

// Sums up the copies of the density between two entries and clears them.
D2IT_INLINE void finish(const Job& job, Scratch& s, int first, int last, int64_t region) {
  const int next = job.bins.density - job.bins.shift;
  Sums sums;
  for (int i = first / kLanes * kLanes; i < last; i += kLanes) {
    float* entry = s.density.data() + kLanes + i;
    Floats<kLanes> p = {};
    for (int copy = 0; copy < job.bins.copies; ++copy, entry += next) {
      p += as<Floats<kLanes>>(entry);
      as<Floats<kLanes>>(entry) = Floats<kLanes>{};
    }
    sums.add(p * as<Floats<kLanes>>(&job.bins.shares[i]));
  }
  sums.store(job.out, region);
}

// Strips begin .. end - 1. Whether every value may be there.
template <typename T>
D2IT_INLINE bool encode_strips(const Job& job, int64_t begin, int64_t end) {
  const Bins& bins = job.bins;
  const int size = job.in.size;
  Scratch s(job);
  bool good = true;
  for (int64_t i = begin; i < end; ++i) {
    const Strip strip(job, i);
    good &= locate<T>(job, strip, s);
    if (bins.reach == 1) weigh_neighbours(job, strip, s);
    for (int r = 0; r < strip.regions; ++r) {
      const int start = r * job.in.size;
      const int32_t *lows = &s.lowest[start], *highs = &s.highest[start];
      int lowest = bins.last_node, highest = 0;
      for (int x = 0; x < size; ++x) lowest = std::min(lowest, lows[x]);
      for (int x = 0; x < size; ++x) highest = std::max(highest, highs[x]);
      int first = lowest >> bins.phase_bits, last = highest >> bins.phase_bits;
      if (bins.cell) {
        const d2it::Cells cells = {
            bins.cell,    bins.taps, bins.in_pairs, bins.table.data(), bins.copies,
            bins.density, lowest,    highest,       s.moments.data(),  s.density.data() + kLanes};
        const float* offsets = s.offsets.data() + start;
        const int32_t* nodes = s.nodes.data() + start;
        if (highest - lowest < job.pixels() / kMostSums)
          cells.add<kMostSums>(offsets, nodes, job.in.size, strip.width);
        else
          cells.add<d2it::kFewSums>(offsets, nodes, job.in.size, strip.width);
        first = lowest * bins.cell;
        last = highest * bins.cell;
      } else if (bins.reach == 1) {
        add_neighbours(job, s, start, strip.width);
      } else if (bins.taps == 4) {
        add_taps<4>(job, s, start, strip.width);
      } else if (bins.taps == 8) {
        add_taps<8>(job, s, start, strip.width);
      } else {
        add_taps<16>(job, s, start, strip.width);
      }
      finish(job, s, first, last + bins.taps, strip.first_region + r);
    }
  }
  return good;
}

// Regions begin .. end - 1 of a gray image of bytes whose bins are the levels.
D2IT_INLINE void encode_regions_of_levels(const Job& job, const float* taps, int reach, int64_t begin,
                                          int64_t end) {
  const Regions& in = job.in;
  const float mean = 1.0f / static_cast<float>(job.pixels());
  float counts[3 * kLevels] = {}; // with zeros on either side
  int32_t histogram[4][kLevels];  // several, because equal neighbours would wait for each other
  for (int64_t region = begin; region < end; ++region) {
    const int64_t x = region % in.map_width, line = region / in.map_width;
    const int64_t y = line % in.map_height, b = line / in.map_height;
    const auto* pixel = static_cast<const uint8_t*>(in.images) + b * in.batch + y * in.size * in.row +
                        x * in.size * in.column;
    for (auto& part : histogram) std::fill_n(part, kLevels, 0);
    for (int row = 0; row < in.size; ++row, pixel += in.row)
      for (int column = 0; column < in.size; ++column) ++histogram[column % 4][pixel[column * in.column]];
    for (int i = 0; i < kLevels; ++i)
      counts[kLevels + i] =
          static_cast<float>(histogram[0][i] + histogram[1][i] + histogram[2][i] + histogram[3][i]);
    Sums sums;
    for (int i = kLevels; i < 2 * kLevels; i += kLanes) {
      Floats<kLanes> p = as<Floats<kLanes>>(counts + i) * taps[0];
      for (int t = 1; t <= reach; ++t)
        p += (as<Floats<kLanes>>(counts + i - t) + as<Floats<kLanes>>(counts + i + t)) * taps[t];
      sums.add(p * mean);
    }
    sums.store(job.out, region);
  }
}

D2IT_CLONES bool encode_float(const Job& j, int64_t b, int64_t e) { return encode_strips<float>(j, b, e); }
D2IT_CLONES bool encode_half(const Job& j, int64_t b, int64_t e) { return encode_strips<Half>(j, b, e); }
D2IT_CLONES bool encode_bfloat16(const Job& j, int64_t b, int64_t e) {
  return encode_strips<BFloat16>(j, b, e);
}
D2IT_CLONES bool encode_bytes(const Job& j, int64_t b, int64_t e) { return encode_strips<uint8_t>(j, b, e); }
D2IT_CLONES void encode_levels(const Job& j, const float* taps, int reach, int64_t b, int64_t e) {
  encode_regions_of_levels(j, taps, reach, b, e);
}

// thresholds: float32, adjacent. entropy: (B, H/S, W/S) float32, grains: int64, both contiguous. False where
// a value lies more than `slack` outside low..high or is not finite; the results then mean nothing.
bool kde_entropy(Tensor images, std::optional<Tensor> thresholds, int64_t region_size, int64_t num_bins,
                 double low, double high, double sigma, bool normalize, double slack, Tensor entropy,
                 std::optional<Tensor> grains) {
  if (entropy.numel() == 0) return true;
  const ScalarType dtype = images.scalar_type();
  const Gray gray(dtype, images.size(1), low, high, slack);
  const Bins bins(num_bins, low, high, sigma, static_cast<int>(region_size * region_size));
  const Job job{Regions(images, entropy, region_size), gray, bins,
                Position(gray, bins, dtype == ScalarType::Byte),
                Results(entropy, grains, thresholds, normalize)};
  const int64_t grain_size = kPixelsPerThread / job.pixels() + 1;
  if (dtype == ScalarType::Byte && job.in.channels == 1 && num_bins == kLevels) {
    float taps[kLevels];
    for (int t = 0; t < kLevels; ++t)
      taps[t] = static_cast<float>(std::exp(-0.5 * std::pow(t * ((high - low) / (kLevels - 1) / sigma), 2)));
    const int reach = std::min(job.bins.reach, kLevels - 1);
    torch::stable::parallel_for(0, job.in.count, grain_size, [&](int64_t begin, int64_t end) {
      encode_levels(job, taps, reach, begin, end);
    });
    return true;
  }
  const auto encode = dtype == ScalarType::Float      ? encode_float
                      : dtype == ScalarType::Half     ? encode_half
                      : dtype == ScalarType::BFloat16 ? encode_bfloat16
                                                      : encode_bytes;
  const int64_t strips = job.in.count / job.in.map_width * job.strips();
  std::atomic<bool> good = true;
  torch::stable::parallel_for(0, strips, grain_size / job.regions_per_strip() + 1,
                              [&](int64_t begin, int64_t end) {
                                if (!encode(job, begin, end)) good = false;
                              });
  return good;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CPU, m) { m.impl("kde_entropy", TORCH_BOX(&kde_entropy)); }
