// Stands in for csrc/cuda.h and the CUDA headers where a .cu file is compiled for the CPU
// (tests/cuda_on_cpu): the threads of a launch run one after the other, so it serves kernels whose threads do
// not talk to each other. Every access is checked to be aligned to its size, as it has to be on a GPU.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "check.h"

#define __device__
#define __host__
#define __global__ static
#define __grid_constant__
#define __launch_bounds__(...)
#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) \
  if (!(condition)) d2it::fail("device-side assertion: " #condition)

struct dim3 {
  uint32_t x, y, z;
  dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
using cudaStream_t = void*;

inline thread_local dim3 blockIdx, blockDim, gridDim;
inline thread_local struct {
  uint32_t x, y, z;
} threadIdx;

template <typename T>
T* aligned(T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T) != 0)
    d2it::fail("misaligned access of ", sizeof(T), " bytes");
  return pointer;
}

template <typename T>
T __ldg(const T* pointer) {
  T value;
  std::memcpy(static_cast<void*>(&value), aligned(pointer), sizeof(T));
  return value;
}

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
inline float __half2float(__half x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }

namespace d2it {

struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor&) {}
  cudaStream_t stream = nullptr;
};

inline void check_launch(const char*) {}

template <typename Chunk>
void put(void* to, Chunk x) {
  std::memcpy(aligned(static_cast<Chunk*>(to)), &x, sizeof(Chunk));
}

// kernel<<<grid, block, shared, stream>>>(...), as cuda_on_cpu.py rewrites it.
template <typename Kernel>
void launch(dim3 grid, dim3 block, int, cudaStream_t, Kernel kernel) {
  if (grid.x == 0 || block.x * block.y * block.z == 0 || block.x * block.y * block.z > 1024) {
    fail("a launch of ", grid.x, " blocks of ", block.x, " x ", block.y, " x ", block.z, " threads");
  }
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
        for (threadIdx.z = 0; threadIdx.z < block.z; ++threadIdx.z)
          for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
            for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel();
}

} // namespace d2it
