// Products of matrices of bfloat16 on a CPU with AVX512_BF16, for one thread, with sums in float32.
//
// vdpbf16ps adds to each of 16 sums the products of two pairs. So 32 bits, a word, hold two numbers that are
// neighbours along the depth of a product, the earlier one in the lower half: a row of words is a row of
// bfloat16 in the left side of a product; in the right side it is two rows of them, interleaved.
#pragma once

#include "products.h"

#include <array>
#include <cstdint>

#ifdef D2IT_HAS_V4
#define D2IT_HAS_PAIRS 1
#define D2IT_PAIRS __attribute__((target("arch=x86-64-v4,avx512bf16")))
#define D2IT_PAIRS_INLINE inline __attribute__((always_inline, target("arch=x86-64-v4,avx512bf16")))
#endif

namespace d2it::pairs {

#ifdef D2IT_HAS_PAIRS

// Whether functions that are D2IT_PAIRS run on this machine.
inline bool available() {
  static const bool has = __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
  return has;
}

constexpr int kTileRows = 8;

// How many words hold n numbers.
inline int64_t words(int64_t n) { return (n + 1) / 2; }

struct Words {
  uint32_t* data;
  int64_t pitch;
  uint32_t* row(int64_t i) const { return data + i * pitch; }
  // The same bits, to be moved and not computed with.
  Matrix bits() const { return {reinterpret_cast<float*>(data), pitch}; }
};

// The left side of a product: word (i, k) lies at data[i * row + k * column].
struct Left {
  const uint32_t* data;
  int64_t row, column;
};

template <int kWidth>
D2IT_PAIRS_INLINE void multiply_tile(const Left& a, const uint32_t* b, int64_t b_pitch, int64_t depth,
                                     float* c, int64_t c_pitch, bool add) {
  __m512 sums[kTileRows][kWidth];
  for (int r = 0; r < kTileRows; ++r)
    for (int j = 0; j < kWidth; ++j)
      sums[r][j] = add ? _mm512_loadu_ps(c + r * c_pitch + j * kWide) : _mm512_setzero_ps();
  const uint32_t* from = a.data;
  for (int64_t k = 0; k < depth; ++k, from += a.column, b += b_pitch) {
    __m512i v[kWidth];
    for (int j = 0; j < kWidth; ++j) v[j] = _mm512_loadu_si512(b + j * kWide);
    for (int r = 0; r < kTileRows; ++r) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(from[r * a.row]));
      for (int j = 0; j < kWidth; ++j) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], (__m512bh)x, (__m512bh)v[j]);
    }
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int j = 0; j < kWidth; ++j) _mm512_storeu_ps(c + r * c_pitch + j * kWide, sums[r][j]);
}

// c (rows x columns) = or += a b, `depth` words deep. Rows are taken up to a multiple of kTileRows, columns
// to whole vectors: a and c have room for them.
D2IT_PAIRS inline void multiply(const Left& a, const Words& b, int64_t rows, int64_t columns, int64_t depth,
                                const Matrix& c, bool add) {
  for (int64_t j = 0; j < columns; j += 2 * kWide)
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const Left from{a.data + i * a.row, a.row, a.column};
      if (columns - j > kWide)
        multiply_tile<2>(from, b.data + j, b.pitch, depth, c.row(i) + j, c.pitch, add);
      else
        multiply_tile<1>(from, b.data + j, b.pitch, depth, c.row(i) + j, c.pitch, add);
    }
}

// Columns 0 .. 32 of two rows of bfloat16, interleaved, to two vectors of words.
D2IT_PAIRS_INLINE void store_interleaved(__m512i upper, __m512i lower, uint32_t* to) {
  static constexpr auto order = [] {
    std::array<uint16_t, 32> of{};
    for (int i = 0; i < 32; ++i) of[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    return of;
  }();
  const __m512i first = _mm512_loadu_si512(order.data());
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(upper, first, lower));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(upper, second, lower));
}

// Row i of `to` is the rows 2 i and 2 i + 1 of bfloat16, up to `count` of them and the next if that is odd.
// Columns, and those below too, are taken in steps of 32.
D2IT_PAIRS inline void interleave(const Words& from, int64_t count, int64_t columns, const Words& to) {
  for (int64_t i = 0; i < words(count); ++i)
    for (int64_t j = 0; j < columns; j += 32)
      store_interleaved(_mm512_loadu_si512(from.row(2 * i) + j / 2),
                        _mm512_loadu_si512(from.row(2 * i + 1) + j / 2), to.row(i) + j);
}

// Rows of floats, rounded: side by side in `rows`, in pairs of rows interleaved in `pairs`, where there are
// such.
D2IT_PAIRS inline void round_rows(const Matrix& from, int64_t count, int64_t columns, const Words* rows,
                                  const Words* pairs) {
  const auto read = [](const float* row) __attribute__((always_inline, target("arch=x86-64-v4,avx512bf16"))) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + kWide), _mm512_loadu_ps(row));
  };
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t j = 0; j < columns; j += 2 * kWide) {
      const __m512i upper = read(from.row(i) + j);
      const __m512i lower = i + 1 < count ? read(from.row(i + 1) + j) : _mm512_setzero_si512();
      if (rows) {
        _mm512_storeu_si512(rows->row(i) + j / 2, upper);
        _mm512_storeu_si512(rows->row(i + 1) + j / 2, lower);
      }
      if (pairs) store_interleaved(upper, lower, pairs->row(i / 2) + j);
    }
}

#endif

} // namespace d2it::pairs
