// Products of small float32 matrices on CPU, whose sums stay in registers, for one thread.
#pragma once

#include "cpu.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace d2it {

constexpr int kLanes = 8;  // of AVX2
constexpr int kWide = 16;  // of AVX-512
constexpr int kDepth = 32; // products that one sum takes up before it is added to the others: see `multiply`

// Whether functions on vectors of kWide floats are the ones to call.
inline bool wide() { return has_v4(); }

template <int n>
using Constant = std::integral_constant<int, n>;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Floats from one row of a matrix to the next: whole vectors, and an odd number of cache lines, since rows at
// a multiple of a power of two would share a few sets of the cache.
inline int64_t pitch_of(int64_t columns) {
  constexpr int64_t line = 64 / sizeof(float);
  return (round_up(columns, line) / line | 1) * line;
}

struct Matrix {
  float* data;
  int64_t pitch;
  float* row(int64_t i) const { return data + i * pitch; }
};

// The left side of a product: element (i, k) lies at data[i * row + k * column].
struct Left {
  const float* data;
  int64_t row, column;
};

// The rows i .. i + kRows of kWidth vectors of columns of c = or += a b.
template <typename Vector, int kRows, int kWidth>
D2IT_INLINE void multiply_tile(const float* a, int64_t a_row, int64_t a_column, const float* b,
                               int64_t b_pitch, int64_t depth, float* c, int64_t c_pitch, bool add) {
  constexpr int lanes = sizeof(Vector) / sizeof(float);
  Vector sums[kRows][kWidth] = {};
  for (int64_t k = 0; k < depth; ++k, a += a_column, b += b_pitch) {
    Vector v[kWidth];
    for (int j = 0; j < kWidth; ++j) v[j] = as<Vector>(b + j * lanes);
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < kWidth; ++j) sums[r][j] += a[r * a_row] * v[j];
  }
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kWidth; ++j) {
      Vector& sum = as<Vector>(c + r * c_pitch + j * lanes);
      sum = add ? sum + sums[r][j] : sums[r][j];
    }
}

// kWidth vectors of columns of c. What a few rows of b are multiplied by comes from the L2 cache, they
// themselves from the L1 cache.
template <typename Vector, int kRows, int kWidth>
D2IT_INLINE void multiply_columns(const Left& a, const float* b, int64_t b_pitch, int64_t rows, int64_t depth,
                                  float* c, int64_t c_pitch, bool add) {
  for (int64_t k = 0; k < depth; k += kDepth)
    for (int64_t i = 0; i < rows; i += kRows)
      multiply_tile<Vector, kRows, kWidth>(a.data + i * a.row + k * a.column, a.row, a.column,
                                           b + k * b_pitch, b_pitch, std::min<int64_t>(kDepth, depth - k),
                                           c + i * c_pitch, c_pitch, add || k);
}

// c (rows x columns) = or += a (rows x depth) b (depth x columns). Rows are taken up to a multiple of kLanes,
// columns to whole vectors: a and c have room for them. Sums of kDepth products each are summed: one sum over
// all of a long row would lose a bit more than the libraries' products do.
D2IT_V4 inline void multiply_wide(const Left& a, const Matrix& b, int64_t rows, int64_t columns,
                                  int64_t depth, const Matrix& c, bool add) {
  using Vector = Floats<kWide>;
  int64_t j = 0, left = (columns + kWide - 1) / kWide;
  const auto take = [&](auto height, auto width) __attribute__((always_inline)) {
    multiply_columns<Vector, height, width>(a, b.data + j, b.pitch, rows, depth, c.data + j, c.pitch, add);
    j += width * kWide, left -= width;
  };
  while (left) {
    if (left == 5)
      take(Constant<4>(), Constant<5>());
    else if (left >= 4 && left != 6)
      take(Constant<4>(), Constant<4>());
    else if (left >= 3)
      take(Constant<8>(), Constant<3>());
    else if (left == 2)
      take(Constant<8>(), Constant<2>());
    else
      take(Constant<8>(), Constant<1>());
  }
}

D2IT_CLONES_256 static void multiply_narrow(const Left& a, const Matrix& b, int64_t rows, int64_t columns,
                                            int64_t depth, const Matrix& c, bool add) {
  int64_t j = 0;
  const auto take = [&](auto width) __attribute__((always_inline)) {
    multiply_columns<Floats<kLanes>, 4, width>(a, b.data + j, b.pitch, rows, depth, c.data + j, c.pitch, add);
    j += width * kLanes;
  };
  while (columns - j > 2 * kLanes) take(Constant<3>());
  if (columns - j > kLanes)
    take(Constant<2>());
  else if (columns > j)
    take(Constant<1>());
}

constexpr auto multiply = [](const Left& a, const Matrix& b, auto&&... rest) {
  (wide() ? multiply_wide : multiply_narrow)(a, b, rest...);
};

// out (columns x rows) = in (rows x columns), both padded to whole vectors.
D2IT_CLONES static void transpose(const Matrix& in, int64_t rows, int64_t columns, const Matrix& out) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      using V = Floats<kLanes>;
      V x[kLanes], y[kLanes];
      for (int k = 0; k < kLanes; ++k) x[k] = as<V>(in.row(i + k) + j);
      for (int k = 0; k < kLanes; k += 2) {
        y[k] = __builtin_shufflevector(x[k], x[k + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        y[k + 1] = __builtin_shufflevector(x[k], x[k + 1], 1, 9, 3, 11, 5, 13, 7, 15);
      }
      for (int k = 0; k < kLanes; k += 4)
        for (int l = k; l < k + 2; ++l) {
          x[l] = __builtin_shufflevector(y[l], y[l + 2], 0, 1, 8, 9, 4, 5, 12, 13);
          x[l + 2] = __builtin_shufflevector(y[l], y[l + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
      for (int l = 0; l < 4; ++l) {
        as<V>(out.row(j + l) + i) = __builtin_shufflevector(x[l], x[l + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        as<V>(out.row(j + l + 4) + i) = __builtin_shufflevector(x[l], x[l + 4], 4, 5, 6, 7, 12, 13, 14, 15);
      }
    }
}

} // namespace d2it
