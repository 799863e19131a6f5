// kde_entropy on CPU where bins are close together: moments (a fast Gauss transform).
//
// With e the distance of a pixel from the middle of its cell, a group of bins, and u that of a bin, in sigma,
// exp(-(u - e)^2 / 2) is nearly a polynomial in e for each u: a pixel adds 1, e .. e^7 to its cell, one
// vector, and a cell adds to the bins around it eight rows of a table, each times a moment. The polynomial
// is the one that is exact at the roots of a Chebyshev polynomial over the cell. In cells of 1.6 sigma it
// errs by up to 5e-6 of the largest tap, but by multiples of He_k(u) exp(-u^2 / 2) with k >= 8, and those are
// orthogonal to the ln p of a pixel: by 3e-7 nats. Rounding takes more where many equal powers add up, so few
// pixels share a sum (kMostSums).
#pragma once

#include "cpu.h"
#include "kde_entropy_cells.h"

#include <cstdint>

namespace d2it {

constexpr int kMostSums = 8; // copies of the moments
constexpr int kFewSums = 2;  // where pixels lie in many cells, each with few
constexpr int kPerPass = 4;  // cells of two bins that are spread together

// Row i: the powers 0 .. 7 of e[i].
D2IT_INLINE void powers(const Floats<kLanes>& e, Floats<kMoments> (&rows)[kLanes]) {
  using V = Floats<kLanes>;
  const V one = V{} + 1.0f, e2 = e * e, e3 = e2 * e, e4 = e2 * e2;
  V quads[2][4]; // [i / 4][i % 4]: four powers of pixel i % 4 and of pixel 4 + i % 4
  for (int high = 0; high < 2; ++high) {
    const V a = high ? e4 : one, b = high ? a * e : e, c = high ? a * e2 : e2, d = high ? a * e3 : e3;
    const V ab0 = shuffle<0, 8, 1, 9, 4, 12, 5, 13>(a, b), ab2 = shuffle<2, 10, 3, 11, 6, 14, 7, 15>(a, b);
    const V cd0 = shuffle<0, 8, 1, 9, 4, 12, 5, 13>(c, d), cd2 = shuffle<2, 10, 3, 11, 6, 14, 7, 15>(c, d);
    quads[high][0] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(ab0, cd0);
    quads[high][1] = shuffle<2, 3, 10, 11, 6, 7, 14, 15>(ab0, cd0);
    quads[high][2] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(ab2, cd2);
    quads[high][3] = shuffle<2, 3, 10, 11, 6, 7, 14, 15>(ab2, cd2);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = shuffle<0, 1, 2, 3, 8, 9, 10, 11>(quads[0][i], quads[1][i]);
    rows[4 + i] = shuffle<4, 5, 6, 7, 12, 13, 14, 15>(quads[0][i], quads[1][i]);
  }
}

// Adds up the copies of the moments of a cell, and clears all but the sum.
template <int kSums>
D2IT_INLINE void sum_moments(float* cell) {
  using V = Floats<kMoments>;
  V sum = as<V>(cell);
  for (int copy = 1; copy < kSums; ++copy) {
    sum += as<V>(cell + copy * kMoments);
    as<V>(cell + copy * kMoments) = V{};
  }
  as<V>(cell) = sum;
}

// What a cell adds to the eight bins above its middle, and to the eight below from the middle down: even
// moments count alike on both sides, odd ones with opposite signs.
D2IT_INLINE void expand(const float* moments, const Floats<kLanes> (&table)[kMoments], Floats<kLanes>& above,
                        Floats<kLanes>& below) {
  Floats<kLanes> even = moments[0] * table[0], odd = moments[1] * table[1];
#pragma GCC unroll 3
  for (int k = 2; k < kMoments; k += 2) {
    even += moments[k] * table[k];
    odd += moments[k + 1] * table[k + 1];
  }
  above = even + odd;
  below = even - odd;
}

// The cells of a region.
struct Cells {
  int bins, taps; // of a cell, and of its window
  bool in_pairs;
  const float* table;
  int copies, size; // of the density, and floats of each
  int lowest, highest;
  // kMostSums or fewer copies of every cell's moments, after kPerPass - 1 cells without pixels. Consecutive
  // pixels add to different ones, also because in a smooth region they would otherwise wait for each other's
  // stores.
  float* moments;
  float* density;

  // Adds the pixels of a region to its density. offsets, nodes: of its first row, `width` apart from the
  // next.
  template <int kSums>
  D2IT_INLINE void add(const float* offsets, const int32_t* nodes, int region, int width) const {
    add_moments<kSums>(offsets, nodes, region, width);
    for (int cell = lowest; cell <= highest; ++cell)
      sum_moments<kSums>(moments + (kPerPass - 1) * kMostSums * kMoments + cell * kSums * kMoments);
    if (in_pairs)
      spread_pairs<kSums>();
    else
      spread<kSums>();
  }

 private:
  // Adds the powers of every pixel's distance to the moments of its cell.
  template <int kSums>
  D2IT_INLINE void add_moments(const float* offsets, const int32_t* nodes, int region, int width) const {
    using V = Floats<kMoments>;
    float* own = moments + (kPerPass - 1) * kMostSums * kMoments;
    for (int y = 0; y < region; ++y, offsets += width, nodes += width) {
      for (int x = 0; x < region; x += kLanes) {
        V rows[kLanes];
        powers(as<Floats<kLanes>>(offsets + x), rows);
        const int32_t* of = nodes + x;
        const auto add = [&](int i) __attribute__((always_inline)) {
          const uint64_t cell = static_cast<uint32_t>(of[i]);
          as<V>(own + cell * (kSums * kMoments) + i % kSums * kMoments) += rows[i];
        };
        if (region - x < kLanes) {
          for (int i = 0; i < region - x; ++i) add(i);
        } else {
#pragma GCC unroll 8
          for (int i = 0; i < kLanes; ++i) add(i);
        }
      }
    }
  }

  // Adds to the density what the cells have, and clears their moments. A cell adds to the
  // copy in which its window begins at a whole vector: what one cell stores, the next loads whole.
  template <int kSums>
  D2IT_INLINE void spread() const {
    using V = Floats<kLanes>;
    float* sums = moments + (kPerPass - 1) * kMostSums * kMoments;
    for (unsigned cell = lowest; cell <= static_cast<unsigned>(highest); ++cell) {
      float* own = sums + cell * kSums * kMoments;
      if (own[0] == 0) continue;
      float* out = density + (cell & (copies - 1u)) * size + cell * bins / kLanes * kLanes;
      for (int i = 0; i < taps; i += kLanes) {
        const float* row = table + i * kMoments;
        V even = as<V>(out + i) + own[0] * as<V>(row), odd = own[1] * as<V>(row + kLanes);
#pragma GCC unroll 3
        for (int k = 2; k < kMoments; k += 2) {
          even += own[k] * as<V>(row + k * kLanes);
          odd += own[k + 1] * as<V>(row + (k + 1) * kLanes);
        }
        as<V>(out + i) = even + odd;
      }
      as<Floats<kMoments>>(own) = Floats<kMoments>{};
    }
  }

  // As spread, of cells of two bins that reach eight on either side. The cells pass from the highest to the
  // lowest, kPerPass at a time, and the sixteen bins around the last of them stay in two registers. What
  // four more leave behind, eight bins, is stored: nothing is loaded again.
  template <int kSums>
  D2IT_INLINE void spread_pairs() const {
    using V = Floats<kLanes>;
    const V zero = {};
    V rows[kMoments]; // of the bins above
#pragma GCC unroll 8
    for (int k = 0; k < kMoments; ++k) rows[k] = as<V>(table + (kMoments + k) * kLanes);
    float* sums = moments + (kPerPass - 1) * kMostSums * kMoments;
    V above = {}, below = {};
    int cell = highest;
    for (; cell >= lowest; cell -= kPerPass) {
      float *own = sums + cell * kSums * kMoments, *out = density + cell * 2;
      V up[kPerPass], down[kPerPass];
#pragma GCC unroll 4
      for (int i = 0; i < kPerPass; ++i, own -= kSums * kMoments) {
        expand(own, rows, up[i], down[i]);
        as<Floats<kMoments>>(own) = Floats<kMoments>{};
      }
      as<V>(out + kLanes + 2) =
          (above + shuffle<2, 3, 4, 5, 6, 7, 8, 9>(up[0], zero)) +
          (shuffle<4, 5, 6, 7, 8, 9, 10, 11>(up[1], zero) + shuffle<6, 7, 8, 9, 10, 11, 12, 13>(up[2], zero));
      above = (up[3] + shuffle<9, 8, 0, 1, 2, 3, 4, 5>(up[2], down[2])) +
              (shuffle<11, 10, 9, 8, 0, 1, 2, 3>(up[1], down[1]) +
               shuffle<13, 12, 11, 10, 9, 8, 0, 1>(up[0], down[0])) +
              shuffle<7, 6, 5, 4, 3, 2, 1, 0>(below, zero);
      below = (down[3] + shuffle<2, 3, 4, 5, 6, 7, 8, 9>(down[2], zero)) +
              (shuffle<4, 5, 6, 7, 8, 9, 10, 11>(down[1], zero) +
               shuffle<6, 7, 8, 9, 10, 11, 12, 13>(down[0], zero));
    }
    float* out = density + cell * 2;
    as<V>(out + kLanes + 2) = above;
    as<V>(out + 2) = shuffle<7, 6, 5, 4, 3, 2, 1, 0>(below, zero);
  }
};

} // namespace d2it
