// Products of float32 matrices by the tiles of AMX, which multiply bfloat16 and add in float32.
//
// A float32 is the sum of three bfloat16: 24 bits of mantissa are three times eight. Of the nine products of
// two such sums the six largest are taken; those left out are below 2^-25 of the product, half a unit of its
// last place. Tiles take six times as long for that, and are still several times as fast as AVX-512.
#pragma once

#include "cpu.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#ifdef D2IT_HAS_V4
#define D2IT_HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#define D2IT_TILES __attribute__((target("arch=x86-64-v4,amx-tile,amx-bf16")))
#define D2IT_TILES_INLINE inline __attribute__((always_inline, target("arch=x86-64-v4,amx-tile,amx-bf16")))
#endif

namespace d2it::tiles {

constexpr int64_t kSide = 16;          // rows of a tile, and columns of a tile of results
constexpr int64_t kDepth = 32;         // bfloat16 in a row of a tile
constexpr int64_t kPlanes = 3;         // bfloat16 that make up a float32
constexpr int64_t kWords = kSide * 16; // 32-bit words in a tile
constexpr int64_t kBlock = 2 * kSide;  // rows and columns of a block of results: two tiles by two
constexpr int64_t kMostDepth = 512;    // of the sums that are taken at a time
constexpr int64_t kMostLeft = 1 << 18; // numbers of the left side that are split at a time: 1.5 MB of the L2
constexpr int64_t kStep = 2 * kPlanes * kWords; // words of a block, kDepth deep

// Whether the machine has such tiles and the system lets this process use them.
inline bool available() {
#ifdef D2IT_HAS_TILES
  static const bool has = [] {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
#else
  return false;
#endif
}

// One side of a product: element (line, k) lies at data[line * of_line + k * of_k]; one of the strides is 1.
struct Side {
  const float* data;
  int64_t lines, of_line, of_k;
};

#ifdef D2IT_HAS_TILES

// Word i of plane p holds x0[i] in its lower half and x1[i] in its upper one, each rounded to bfloat16 after
// the planes before were subtracted. What is left for the last plane has eight bits at most.
D2IT_TILES_INLINE void split(__m512 x0, __m512 x1, __m512i planes[kPlanes]) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000)), half = _mm512_set1_epi32(0x8000);
  for (int p = 0; p < kPlanes; ++p) {
    __m512i bits0 = _mm512_castps_si512(x0), bits1 = _mm512_castps_si512(x1);
    if (p + 1 < kPlanes) {
      bits0 = _mm512_add_epi32(bits0, half), bits1 = _mm512_add_epi32(bits1, half);
      x0 = _mm512_sub_ps(x0, _mm512_castsi512_ps(_mm512_and_epi32(bits0, upper)));
      x1 = _mm512_sub_ps(x1, _mm512_castsi512_ps(_mm512_and_epi32(bits1, upper)));
    }
    // (bits1 & upper) | (bits0 >> 16)
    planes[p] = _mm512_ternarylogic_epi32(upper, bits1, _mm512_srli_epi32(bits0, 16), 0xea);
  }
}

D2IT_TILES_INLINE void transpose(__m512i rows[kSide]) {
  __m512i t[kSide];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

D2IT_TILES_INLINE __mmask16 first(int64_t n) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(n, 0, 16)) - 1);
}

// The planes of 16 lines from `line` on and of 32 k from `k` on, as tiles to_0, to_0 + stride, ...: word j of
// row i is (line i, k j and j + 16) in a tile for the left side, (line j, k i and i + 16) for the right one.
D2IT_TILES inline void split_tile(const Side& side, int64_t line, int64_t k, int64_t end, bool right,
                                  uint32_t* to, int64_t stride) {
  const bool along = side.of_k == 1; // vectors of k; else of lines
  const int64_t lines = std::min(kSide, side.lines - line), depth = std::min(kDepth, end - k);
  const float* from = side.data + line * side.of_line + k * side.of_k;
  __m512i planes[kPlanes][kSide];
  for (int64_t i = 0; i < kSide; ++i) {
    __m512 x0, x1;
    if (along) {
      const bool there = i < lines;
      const float* row = from + (there ? i * side.of_line : 0);
      x0 = _mm512_maskz_loadu_ps(first(there ? depth : 0), row);
      x1 = _mm512_maskz_loadu_ps(first(there ? depth - 16 : 0), row + 16);
    } else {
      const __mmask16 mask = first(lines);
      x0 = _mm512_maskz_loadu_ps(i < depth ? mask : 0, from + (i < depth ? i * side.of_k : 0));
      x1 = _mm512_maskz_loadu_ps(i + 16 < depth ? mask : 0,
                                 from + (i + 16 < depth ? (i + 16) * side.of_k : 0));
    }
    __m512i found[kPlanes];
    split(x0, x1, found);
    for (int p = 0; p < kPlanes; ++p) planes[p][i] = found[p];
  }
  for (int p = 0; p < kPlanes; ++p) {
    if (along == right) transpose(planes[p]);
    for (int64_t i = 0; i < kSide; ++i) _mm512_store_si512(to + p * stride + i * 16, planes[p][i]);
  }
}

// Block `block` of a side, between the k's `k` and `until`.
inline void split_block(const Side& side, int64_t block, int64_t k, int64_t until, bool right, uint32_t* to) {
  for (; k < until; k += kDepth, to += kStep) {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t line = block * kBlock + half * kSide;
      if (line < side.lines) {
        split_tile(side, line, k, until, right, to + half * kWords, 2 * kWords);
      } else {
        for (int64_t p = 0; p < kPlanes; ++p) std::fill_n(to + (2 * p + half) * kWords, kWords, 0u);
      }
    }
  }
}

struct alignas(64) Layout {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
// In memory: GCC 12 takes _tile_loadconfig to read eight bytes, and would leave a local's others unwritten.
inline const volatile Layout kLayout{
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Tiles 0 .. 3 are a block of results, 4 and 5 what they get from the left side, 6 and 7 from the right one.
D2IT_TILES_INLINE void load_left(const uint32_t* plane) {
  _tile_loadd(4, plane, 64);
  _tile_loadd(5, plane + kWords, 64);
}

D2IT_TILES_INLINE void load_right(const uint32_t* plane) {
  _tile_loadd(6, plane, 64);
  _tile_loadd(7, plane + kWords, 64);
}

D2IT_TILES_INLINE void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// A block of results, rows `pitch` floats apart: = or += the sum of the products of two split blocks.
D2IT_TILES inline void multiply_block(const uint32_t* a, const uint32_t* b, int64_t steps, float* c,
                                      int64_t pitch, bool add) {
  const int64_t bytes = pitch * sizeof(float);
  float* const lower = c + kSide * pitch;
  if (add) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + kSide, bytes);
    _tile_loadd(2, lower, bytes);
    _tile_loadd(3, lower + kSide, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const auto planes_of = [](const uint32_t* side, int p) { return side + 2 * p * kWords; };
  for (int64_t step = 0; step < steps; ++step, a += kStep, b += kStep) {
    load_right(planes_of(b, 2));
    load_left(planes_of(a, 0));
    add_products();
    load_right(planes_of(b, 1));
    add_products();
    load_left(planes_of(a, 1));
    add_products();
    load_right(planes_of(b, 0));
    add_products();
    load_left(planes_of(a, 2));
    add_products();
    load_left(planes_of(a, 0));
    add_products();
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + kSide, bytes);
  _tile_stored(2, lower, bytes);
  _tile_stored(3, lower + kSide, bytes);
}

// Memory for the split sides, kept from call to call: fresh pages would take longer than the splitting.
class Room {
 public:
  uint32_t* of(int64_t words) {
    if (words > words_) {
      data_.reset(static_cast<uint32_t*>(std::aligned_alloc(64, words * sizeof(uint32_t))));
      words_ = words;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(uint32_t* data) const { std::free(data); }
  };
  std::unique_ptr<uint32_t, Free> data_;
  int64_t words_ = 0;
};

// The part of a product whose left side is split, in blocks of `steps`, and whose sums go from `k` to
// `until`.
struct Part {
  const uint32_t* left;
  Side right;
  int64_t rows, k, until, steps;
  const float* bias; // what a row begins with; null: zero, or with k what is there
  float* out;
  int64_t pitch;
};

// Columns `begin` .. `end` of blocks, each of whose right sides is split when its turn comes.
D2IT_TILES inline void multiply_columns(const Part& part, int64_t begin, int64_t end) {
  static thread_local Room rooms;
  uint32_t* const right = rooms.of(part.steps * kStep);
  alignas(64) float room[kBlock * kBlock];
  _tile_loadconfig(const_cast<const Layout*>(&kLayout));
  for (int64_t j = begin; j < end; ++j) {
    const int64_t n = std::min(kBlock, part.right.lines - j * kBlock);
    split_block(part.right, j, part.k, part.until, true, right);
    for (int64_t i = 0; i * kBlock < part.rows; ++i) {
      const int64_t m = std::min(kBlock, part.rows - i * kBlock);
      float* const out = part.out + i * kBlock * part.pitch + j * kBlock;
      const bool whole = m == kBlock && n == kBlock;
      float* const to = whole ? out : room;
      const int64_t pitch = whole ? part.pitch : kBlock;
      const float* const bias = part.bias ? part.bias + j * kBlock : nullptr;
      for (int64_t r = 0; r < m && (bias || (part.k && !whole)); ++r) {
        std::copy_n(bias ? bias : out + r * part.pitch, n, to + r * pitch);
      }
      multiply_block(part.left + i * part.steps * kStep, right, part.steps, to, pitch, bias || part.k);
      for (int64_t r = 0; r < m && !whole; ++r) std::copy_n(room + r * kBlock, n, out + r * part.pitch);
    }
  }
  _tile_release();
}

// `total` cut into the fewest equal pieces of `most` at most: how long one is, in whole units.
inline int64_t piece(int64_t total, int64_t most, int64_t unit) {
  const int64_t pieces = (total + most - 1) / most;
  return (total + pieces * unit - 1) / (pieces * unit) * unit;
}

// out (left.lines x right.lines, rows `pitch` apart) = the sums over k < depth of left (i, k) right (j, k),
// plus bias[j] where there is one.
inline void multiply(const Side& left, const Side& right, int64_t depth, const float* bias, float* out,
                     int64_t pitch) {
  static thread_local Room room;
  const int64_t deep = piece(depth, kMostDepth, kDepth), high = piece(left.lines, kMostLeft / deep, kBlock);
  for (int64_t k = 0; k < depth; k += deep) {
    const int64_t until = std::min(k + deep, depth), steps = (until - k + kDepth - 1) / kDepth;
    for (int64_t row = 0; row < left.lines; row += high) {
      const Side rows{left.data + row * left.of_line, std::min(high, left.lines - row), left.of_line,
                      left.of_k};
      const int64_t blocks = (rows.lines + kBlock - 1) / kBlock;
      uint32_t* const split = room.of(blocks * steps * kStep);
      torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          split_block(rows, i, k, until, false, split + i * steps * kStep);
      });
      const Part part{split, right, rows.lines, k, until, steps, k ? nullptr : bias, out + row * pitch,
                      pitch};
      torch::stable::parallel_for(0, (right.lines + kBlock - 1) / kBlock, 1,
                                  [&](int64_t begin, int64_t end) { multiply_columns(part, begin, end); });
    }
  }
}

#endif

} // namespace d2it::tiles
