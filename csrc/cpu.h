// What the CPU operators share.
#pragma once

#include "check.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

// Compiles a function for plain x86-64, AVX2 and AVX-512; the loader picks one for the machine it runs on, so
// a wheel built here is fast elsewhere. What such a function calls has to be inlined into it: D2IT_INLINE.
// D2IT_CLONES_256 leaves out AVX-512: for loops over rows too short to fill its vectors, and for what is
// written out for it apart, in a function D2IT_V4 that is called where d2it::has_v4().
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define D2IT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define D2IT_CLONES_256 __attribute__((target_clones("arch=x86-64-v3", "default")))
#define D2IT_V4 __attribute__((target("arch=x86-64-v4")))
#define D2IT_HAS_V4 1 // the names of <immintrin.h> can be used in such functions
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized" // in what GCC 12's header leaves undefined on purpose
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#define D2IT_CLONES
#define D2IT_CLONES_256
#define D2IT_V4
#endif
#define D2IT_INLINE inline __attribute__((always_inline))

namespace d2it {

// Whether vectors of 64 bytes fit into a register, in functions that are D2IT_V4.
inline bool has_v4() {
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
  static const bool has = __builtin_cpu_supports("x86-64-v4");
  return has;
#else
  return false;
#endif
}

// All bits where the condition holds, none elsewhere. A loop that chooses by masks vectorises; by conditions
// it often does not, because what is under a condition may be a load or a sum that must not be taken
// otherwise.
template <typename T>
D2IT_INLINE T mask(bool condition) {
  return static_cast<T>(-static_cast<T>(condition));
}

// What takes or returns a vector is inlined, so how one is passed does not matter.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

// n values in one register, or in as many as they take; from any address.
template <typename T, int n>
struct VectorOf {
  typedef T type __attribute__((vector_size(n * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <int n>
using Floats = typename VectorOf<float, n>::type;

template <typename V>
D2IT_INLINE V& as(float* p) {
  return *reinterpret_cast<V*>(p);
}
template <typename V>
D2IT_INLINE const V& as(const float* p) {
  return *reinterpret_cast<const V*>(p);
}

// A std::vector that begins at a cache line, so that no vector at a multiple of its size crosses one.
template <typename T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(std::size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{kLine}));
  }
  void deallocate(T* p, std::size_t) { ::operator delete(p, std::align_val_t{kLine}); }
  bool operator==(const LineAllocator&) const = default;

 private:
  static constexpr std::size_t kLine = 64;
};
template <typename T>
using Lines = std::vector<T, LineAllocator<T>>;

// The entries kFrom of the vector that has b after a.
template <int... kFrom, typename V>
D2IT_INLINE V shuffle(const V& a, const V& b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, typename VectorOf<int32_t, sizeof...(kFrom)>::type{kFrom...});
#endif
}

// table[index[i]], the index as far as its lowest bits name an entry.
template <typename V, typename I>
D2IT_INLINE V lookup(const V& table, const I& index) {
#ifdef __clang__
  return __builtin_shufflevector(table, index);
#else
  return __builtin_shuffle(table, index);
#endif
}

// exp(y) for y <= 0, of Floats; 1.6e-38 from about -87 on. Relative error 2e-7.
template <typename V>
D2IT_INLINE V exp_negative(V y) {
  using Ints = typename VectorOf<int32_t, sizeof(V) / sizeof(float)>::type;
  const V least = V{} - 87.0f, bounded = y < least ? least : y;
  const V n = (bounded * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;
  const V r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  V poly = 1.9875691500e-4f * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * r * r + r + 1.0f;
  return poly * __builtin_bit_cast(V, (__builtin_convertvector(n, Ints) + 127) << 23);
}

// The 16-bit types, converted by integer operations alone so that loops over them vectorise on every machine.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

D2IT_INLINE float to_float(float v) { return v; }

D2IT_INLINE float to_float(BFloat16 v) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(v.bits) << 16);
}

D2IT_INLINE float to_float(Half v) {
  // The exponent's bias goes from 15 to 127 by a multiplication, which serves subnormals as well; infinities
  // and NaNs get the largest exponent.
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fff) << 13;
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 : 0;
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, scaled) | special | sign);
}

// The bits of a float in the second argument's type: to the nearest, ties to even; NaN stays NaN.
D2IT_INLINE uint32_t bits_as(float v, BFloat16) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const uint32_t nan = mask<uint32_t>((bits & 0x7fffffff) > 0x7f800000);
  return (rounded & ~nan) | (0x7fc0 & nan);
}

D2IT_INLINE uint32_t bits_as(float v, Half) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v), magnitude = bits & 0x7fffffff;
  // Normal: the bias goes back, the mantissa is rounded. Subnormal: a sum whose last place is 2^-24.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t small =
      __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000;
  const uint32_t is_small = mask<uint32_t>(magnitude < 0x38800000);
  const uint32_t infinite = mask<uint32_t>(magnitude >= 0x477ff000),
                 nan = mask<uint32_t>(magnitude > 0x7f800000);
  const uint32_t finite = (small & is_small) | (normal & ~is_small);
  return (finite & ~infinite) | (0x7c00 & infinite) | (0x0200 & nan) | (bits >> 16 & 0x8000);
}

// A row of n elements, `stride` apart, in float32; and back, to adjacent elements.
template <typename T>
D2IT_INLINE void widen(const T* __restrict in, int64_t stride, float* __restrict out, int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i * stride]);
  }
}

template <typename T>
D2IT_INLINE void narrow(const float* __restrict in, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i].bits = static_cast<uint16_t>(bits_as(in[i], T{}));
}

// Where the rows of (B, L, C), flat over (B, L), or of (T, C) begin, in elements.
struct RowOffsets {
  int64_t length = INT64_MAX, batch = 0, row = 0, channel = 1;

  RowOffsets() = default;
  explicit RowOffsets(const torch::stable::Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    row = tensor.stride(last - 1);
    channel = tensor.size(last) > 1 ? tensor.stride(last) : 1;
    if (last == 1) return;
    batch = tensor.stride(0);
    if (tensor.size(1) * row != batch) length = tensor.size(1); // else one stride serves all rows
  }

  int64_t of(int64_t r) const { return r < length ? r * row : r / length * batch + r % length * row; }

  bool adjacent() const { return channel == 1 && length == INT64_MAX; }
};

// An unwritten contiguous tensor on the CPU, of at most 4 dimensions. Made in Python it takes 1 to 1.5 us,
// more than small rows take to be worked on; by torch's dispatcher half as long again as by the function it
// is here.
inline torch::stable::Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef size,
                                   torch::headeronly::ScalarType dtype) {
  std::array<int64_t, 4> strides;
  int64_t stride = 1;
  for (size_t d = size.size(); d-- > 0; stride *= std::max<int64_t>(size[d], 1)) strides[d] = stride;
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(size.size(), size.data(), strides.data(), type,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return torch::stable::Tensor(made);
}

} // namespace d2it
