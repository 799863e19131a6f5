// What the CUDA operators share.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include "check.h"

// Lives in libtorch_cuda. Weak, so that this library also loads where torch has no CUDA; nothing here is
// called there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** stream);

namespace d2it {

// Makes a tensor's device the current one while it lives; `stream` is the stream torch uses there.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream == nullptr ||
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != TORCH_SUCCESS) {
      fail("torch gave no CUDA stream for device ", tensor.get_device_index());
    }
    this->stream = static_cast<cudaStream_t>(stream);
  }

  int processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // Bytes of shared memory that a block can have.
  int most_shared() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  cudaStream_t stream;

 private:
  static int attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess)
      fail("CUDA gave no attribute ", static_cast<int>(which), " of device ", device);
    return value;
  }

  torch::stable::accelerator::DeviceGuard guard_;
};

// Lets a kernel have more shared memory than the 48 KB that every launch may.
template <typename Kernel>
void allow_shared(Kernel* kernel, int bytes) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) fail(bytes, " bytes of shared memory: ", cudaGetErrorString(error));
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) fail(kernel, ": ", cudaGetErrorString(error));
}

// 2^x, to 2 units in the last place; 0 where that is subnormal.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x, hidden from the optimiser: what is computed from it is computed where it is used, and not kept.
__device__ inline unsigned opaque(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <typename T>
__device__ inline T* opaque(T* x) {
  asm volatile("" : "+l"(x));
  return x;
}

// Stores. The wide ones are in assembly: the compiler splits a vector whose parts it has chosen one by one.
__device__ inline void put(void* to, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
__device__ inline void put(void* to, uint2 x) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(x.x), "r"(x.y) : "memory");
}
// The same where it is wanted, without a branch.
__device__ inline void put(void* to, uint2 x, bool wanted) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %3, 0;\n"
      "@wanted st.global.v2.b32 [%0], {%1, %2};\n}" ::"l"(to),
      "r"(x.x), "r"(x.y), "r"(static_cast<int>(wanted))
      : "memory");
}
__device__ inline void put(void* to, unsigned int x, bool wanted) {
  if (wanted) *static_cast<unsigned int*>(to) = x;
}
__device__ inline void put(void* to, unsigned int x) { *static_cast<unsigned int*>(to) = x; }
__device__ inline void put(void* to, unsigned short x) { *static_cast<unsigned short*>(to) = x; }

} // namespace d2it
