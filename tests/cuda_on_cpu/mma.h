// Stands in for csrc/mma.h: products of a warp, whose lanes hold the fragments that they hold on a GPU, and
// copies that arrive when they are waited for.
#pragma once

namespace d2it {

// Hot in what is compiled without optimisation.
#define D2IT_HOT __attribute__((optimize("O2")))

template <int kCount>
D2IT_HOT void load_matrices_from(uint32_t (&x)[kCount], const void* row, bool transposed) {
  const auto warp = block.share(row);
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (uint32_t i = 0; i < kCount; ++i) {
    const auto element = [&](uint32_t r, uint32_t c) -> uint32_t {
      const auto* from = warp.template at<const uint16_t*>(8 * i + r);
      if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("a row of a matrix is misaligned");
      return from[c];
    };
    x[i] = transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                      : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
  }
}

// An address is the distance from the beginning of shared memory.
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - reinterpret_cast<char*>(dynamic_shared.data()));
}
template <typename T>
struct Place {
  uint32_t address;

  explicit Place(const T* p) : address(shared_address(p)) {}
  explicit Place(uint32_t address) : address(address) {}
  Place operator+(int elements) const { return Place(address + elements * static_cast<int>(sizeof(T))); }
};
template <typename T>
uint32_t shared_address(Place<T> place) {
  return place.address;
}
inline const void* pointer_to(const void* p) { return p; }
template <typename T>
T* pointer_to(Place<T> place) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(dynamic_shared.data()) + place.address);
}

template <typename T>
auto load_four(Place<T> from) {
  using Four = std::conditional_t<std::is_same_v<T, float>, float4, uint4>;
  return *aligned(reinterpret_cast<Four*>(pointer_to(from)));
}
inline char* load_pointer(Place<uint32_t> from) { return *aligned(reinterpret_cast<char**>(pointer_to(from))); }
inline void store_one(Place<uint32_t> to, uint32_t x) { *aligned(pointer_to(to)) = x; }

template <int kCount, typename P>
void load_matrices(uint32_t (&x)[kCount], P row) {
  load_matrices_from(x, pointer_to(row), false);
}
template <int kCount, typename P>
void load_matrices_transposed(uint32_t (&x)[kCount], P row) {
  load_matrices_from(x, pointer_to(row), true);
}

template <typename T>
D2IT_HOT float float_of(uint32_t x, uint32_t which);
template <>
D2IT_HOT inline float float_of<__nv_bfloat16>(uint32_t x, uint32_t which) {
  return std::bit_cast<float>(which ? x & 0xffff0000u : x << 16);
}
template <>
D2IT_HOT inline float float_of<__half>(uint32_t x, uint32_t which) {
  return static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(x >> 16 * which)));
}

struct Fragments {
  uint32_t a[4], b[2];
};

template <typename T>
D2IT_HOT void multiply_fragments(float (&c)[4], const Fragments& own, int depth) {
  const auto warp = block.share(own);
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (uint32_t k = 0; k < static_cast<uint32_t>(depth); ++k) {
      const auto& a = warp.template at<Fragments>(row % 8 * 4 + k % 8 / 2);
      const auto& b = warp.template at<Fragments>(column * 4 + k % 8 / 2);
      c[i] += float_of<T>(a.a[row / 8 + k / 8 * 2], k % 2) * float_of<T>(b.b[k / 8], k % 2);
    }
  }
}
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_fragments<T>(c, {{a[0], a[1], a[2], a[3]}, {b0, b1}}, 16);
}
template <typename T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  c[0] = c[1] = c[2] = c[3] = 0;
  multiply_add<T>(c, a, b0, b1);
}
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  multiply_fragments<T>(c, {{a[0], a[1]}, {b}}, 8);
}

template <typename T>
T to(float x) {
  return x;
}
template <typename T>
uint32_t pack(float first, float second) {
  const T pair[2] = {first, second};
  return std::bit_cast<uint32_t>(pair);
}

inline void copy_async(void* to, const void* from, bool there, bool wanted = true) {
  if (!wanted) return;
  block.copy_later({aligned(static_cast<uint4*>(to)), there ? aligned(static_cast<const uint4*>(from)) : nullptr, 16});
}
template <typename T>
void copy_async(T* to, const T* from) { block.copy_later({aligned(to), aligned(from), 4}); }
inline void commit_copies() { block.commit_copies(); }
template <int kGroups>
void wait_for_copies() {
  block.wait_for_copies(kGroups);
}

} // namespace d2it
