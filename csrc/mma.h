// Matrix products of a warp (mma.sync), the fragments that they take, and copies into shared memory that a
// thread does not wait for. From sm_80 on.
//
// Elements are of 16 bits, two to a register. With g = lane / 4 and t = lane % 4 a lane holds
//   a (16 x 16)  a[0]: row g, columns 2t and 2t + 1; a[1]: row g + 8; a[2], a[3]: the same, 8 columns on
//   b (16 x 8)   b[0]: rows 2t and 2t + 1 of column g; b[1]: 8 rows on
//   c (16 x 8)   c[0], c[1]: row g, columns 2t and 2t + 1; c[2], c[3]: row g + 8, in float32
// so two neighbouring c, rounded, are an a. A product of depth 8 takes a[0], a[1] and b[0] alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace d2it {

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// A place in shared memory by its address there, which takes half the registers of a pointer, and of which
// the compiler makes no pointer again.
template <typename T>
struct Place {
  uint32_t address;

  __device__ explicit Place(const T* p) : address(shared_address(p)) {}
  __device__ explicit Place(uint32_t address) : address(address) {}
  __device__ Place operator+(int elements) const {
    return Place(address + elements * static_cast<int>(sizeof(T)));
  }
};
template <typename T>
__device__ inline uint32_t shared_address(Place<T> place) {
  return place.address;
}

// Four words from a place, a pointer, and one word into it.
__device__ inline float4 load_four(Place<float> from) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(from.address)
               : "memory");
  return x;
}
__device__ inline uint4 load_four(Place<uint32_t> from) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from.address)
               : "memory");
  return x;
}
__device__ inline char* load_pointer(Place<uint32_t> from) {
  char* x;
  asm volatile("ld.shared.b64 %0, [%1];" : "=l"(x) : "r"(from.address) : "memory");
  return x;
}
__device__ inline void store_one(Place<uint32_t> to, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to.address), "r"(x) : "memory");
}

// Four 8 x 8 matrices: lane l gives row l % 8 of matrix l / 8, 16 bytes aligned to their size, and receives
// of every matrix row g, columns 2t and 2t + 1. Transposed: rows 2t and 2t + 1 of column g.
template <typename P>
__device__ inline void load_matrices(uint32_t (&x)[4], P row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row)));
}
template <typename P>
__device__ inline void load_matrices_transposed(uint32_t (&x)[4], P row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row)));
}
// Two: lanes 16 and up give a row as well, which is not read.
template <typename P>
__device__ inline void load_matrices(uint32_t (&x)[2], P row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(x[0]), "=r"(x[1])
               : "r"(shared_address(row)));
}
template <typename P>
__device__ inline void load_matrices_transposed(uint32_t (&x)[2], P row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(x[0]), "=r"(x[1])
               : "r"(shared_address(row)));
}

// c = a b, of depth 16, and c += a b, of depth 16 and of depth 8.
template <typename T>
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[2], uint32_t b);

#define D2IT_MMA(T, name)                                                                                   \
  template <>                                                                                               \
  __device__ inline void multiply<T>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {     \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                     \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"                 \
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));                \
  }                                                                                                         \
  template <>                                                                                               \
  __device__ inline void multiply_add<T>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                     \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                     \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                           \
  }                                                                                                         \
  template <>                                                                                               \
  __device__ inline void multiply_add<T>(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {               \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." name "." name                                      \
                 ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                                 \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(b));                                                           \
  }
D2IT_MMA(__half, "f16")
D2IT_MMA(__nv_bfloat16, "bf16")
#undef D2IT_MMA

// Floats, rounded: two into a register, the first in its lower half, and one.
template <typename T>
__device__ inline uint32_t pack(float first, float second);
template <>
__device__ inline uint32_t pack<__half>(float first, float second) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(second), "f"(first));
  return x;
}
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float first, float second) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(second), "f"(first));
  return x;
}
template <typename T>
__device__ inline T to(float x);
template <>
__device__ inline float to<float>(float x) {
  return x;
}
template <>
__device__ inline __half to<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 to<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// 16 bytes into shared memory, or zeros where there is nothing to copy, by the threads that are to; 4 bytes.
__device__ inline void copy_async(void* to, const void* from, bool there, bool wanted = true) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %3, 0;\n"
      "@wanted cp.async.cg.shared.global [%0], [%1], 16, %2;\n}" ::"r"(shared_address(to)),
      "l"(from), "r"(there ? 16 : 0), "r"(static_cast<int>(wanted))
      : "memory");
}
template <typename T>
__device__ inline void copy_async(T* to, const T* from) {
  static_assert(sizeof(T) == 4);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// The copies since the last of these calls are a group; waits until at most kGroups of the thread's own are
// under way.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

} // namespace d2it
