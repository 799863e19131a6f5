// Cells, groups of adjacent bins: when the density of kde_entropy comes from the moments of their pixels, and
// what a moment adds to the bins around its cell. kde_entropy_moments.h says why; CPU and CUDA share this.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

namespace d2it {

constexpr double kClosestTaps = 0.8; // sigma; with bins closer, a pixel has 16 taps or more
constexpr double kWidestCell = 0.8;  // sigma; but a cell has two bins at least
constexpr double kCellReach = 5.85;  // sigma; from either end of a cell
constexpr int kMoments = 8;          // of order 0 to 7
constexpr int kLanes = 8; // bins of a vector: what AVX2 holds; wider ones are put together on the stack there

// The cells of bins that lie `delta` sigma apart; without bins where the density comes from taps.
struct CellShape {
  int bins = 0;  // of a cell, a power of 2
  int reach = 0; // bins on either side of it that it adds to
  int taps = 0;  // bins that it adds to, filled up to whole vectors

  // farthest: no pixel adds to more bins than these on either side.
  CellShape(double delta, int count, double farthest) {
    if (delta >= kClosestTaps) return;
    bins = 2;
    while (2 * bins * delta <= kWidestCell && bins < count) bins *= 2;
    reach = static_cast<int>(std::min(farthest, std::ceil(kCellReach / delta - 0.5)));
    taps = (bins + 2 * reach + kLanes - 1) / kLanes * kLanes;
  }

  // Whether cells have two bins each and reach eight from their middle on either side.
  bool in_pairs() const { return bins == 2 && taps == 2 * kLanes; }
};

// By vectors of bins, then moments: what multiplies a moment at the bins of a cell's window, which begins
// `before` bins before the cell.
inline std::vector<float> moments_table(int cell, int taps, int before, double delta) {
  std::vector<float> table(kMoments * taps);
  const double half = cell * delta / 2;
  double cosines[kMoments][kMoments];               // Chebyshev polynomials at the roots of the next one
  double terms[kMoments][kMoments] = {{1}, {0, 1}}; // and by powers
  for (int n = 0; n < kMoments; ++n)
    for (int r = 0; r < kMoments; ++r) cosines[n][r] = std::cos(n * (r + 0.5) * M_PI / kMoments);
  for (int n = 2; n < kMoments; ++n)
    for (int k = 0; k <= n; ++k) terms[n][k] = (k ? 2 * terms[n - 1][k - 1] : 0) - terms[n - 2][k];
  for (int i = 0; i < taps; ++i) {
    const double u = (i - before - (cell - 1) / 2.0) * delta;
    double values[kMoments], by_power[kMoments] = {};
    for (int r = 0; r < kMoments; ++r) {
      const double away = u - half * cosines[1][r];
      values[r] = std::exp(-0.5 * away * away);
    }
    for (int n = 0; n < kMoments; ++n) {
      double share = 0; // of the polynomial of order n
      for (int r = 0; r < kMoments; ++r) share += values[r] * cosines[n][r];
      for (int k = 0; k <= n; ++k) by_power[k] += terms[n][k] * share * (n ? 2.0 : 1.0) / kMoments;
    }
    float* row = table.data() + i / kLanes * kMoments * kLanes + i % kLanes;
    double power = 1; // of half
    for (int k = 0; k < kMoments; ++k, power *= half)
      row[k * kLanes] = static_cast<float>(by_power[k] / power);
  }
  return table;
}

} // namespace d2it
