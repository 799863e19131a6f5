// Stands in for csrc/cuda.h and the CUDA headers where a .cu file is compiled for the CPU
// (tests/cuda_on_cpu). Blocks run one after the other, the threads of a block take turns: each runs up to its
// next synchronisation, or to its end. So a lane that reads what another writes, and does not synchronise in
// between, reads the wrong thing. Every access is checked to be aligned to its size, as it has to be on a
// GPU; shared memory starts as ones and ends where the launch says.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "check.h"

#define __device__
#define __host__
#define __global__ static
#define __shared__ static
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
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
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

using std::max;
using std::min;
inline float __log2f(float x) { return std::log2(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }

namespace d2it {

// The threads of one block, each on a stack of its own.
class Block {
 public:
  // Runs `kernel` as every thread of a block of this size.
  void run(dim3 size, const std::function<void()>& kernel) {
    const size_t count = static_cast<size_t>(size.x) * size.y * size.z;
    while (threads_.size() < count) threads_.push_back(std::make_unique<Thread>());
    kernel_ = &kernel;
    for (size_t i = 0; i < count; ++i) start(*threads_[i]);
    for (size_t finished = 0; finished < count;) {
      for (current_ = 0; current_ < count; ++current_) {
        Thread& thread = *threads_[current_];
        if (thread.finished) continue;
        const auto i = static_cast<uint32_t>(current_);
        threadIdx = {i % size.x, i / size.x % size.y, i / size.x / size.y};
        swapcontext(&host_, &thread.context);
        if (thread.error) std::rethrow_exception(thread.error);
        finished += thread.finished;
        if (thread.finished != threads_[current_ / kWarp * kWarp]->finished)
          fail("the lanes of a warp do not synchronise alike");
      }
    }
  }

  // The current thread waits until the others of its warp are here as well.
  void synchronise() { swapcontext(&threads_[current_]->context, &host_); }

  // The sum of the lanes' values where `mask` is 0, else the value of the lane whose number differs in it.
  template <typename T>
  T exchange(T value, unsigned mask) {
    std::memcpy(threads_[current_]->value, &value, sizeof(T));
    synchronise();
    const auto of = [&](size_t thread) {
      T other;
      std::memcpy(&other, threads_[thread]->value, sizeof(T));
      return other;
    };
    T result = of(current_ ^ mask);
    if (mask == 0) {
      result = 0;
      for (size_t lane = 0; lane < kWarp; ++lane) result += of(current_ / kWarp * kWarp + lane);
    }
    synchronise();
    return result;
  }

 private:
  static constexpr size_t kWarp = 32, kStack = 1 << 17;

  struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    char value[8];
    bool finished;
    std::exception_ptr error;
  };

  void start(Thread& thread) {
    thread.finished = false;
    thread.error = nullptr;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &host_;
    makecontext(&thread.context, &Block::enter, 0);
  }

  static void enter();

  std::vector<std::unique_ptr<Thread>> threads_;
  ucontext_t host_;
  const std::function<void()>* kernel_;
  size_t current_;
};

inline thread_local Block block;
inline thread_local std::vector<float4> dynamic_shared;

inline void Block::enter() {
  Thread& thread = *block.threads_[block.current_];
  try {
    (*block.kernel_)();
  } catch (...) {
    thread.error = std::current_exception();
  }
  thread.finished = true;
}

} // namespace d2it

inline void __syncwarp() { d2it::block.synchronise(); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return d2it::block.exchange(value, mask);
}
inline int __reduce_add_sync(unsigned, int value) { return d2it::block.exchange(value, 0); }
inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}

namespace d2it {

struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor&) {}
  cudaStream_t stream = nullptr;
};

inline void check_launch(const char*) {}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}

template <typename Chunk>
void put(void* to, Chunk x) {
  std::memcpy(aligned(static_cast<Chunk*>(to)), &x, sizeof(Chunk));
}

// What `translate` makes of a launch in triple angle brackets.
inline void launch(dim3 grid, dim3 size, int shared, cudaStream_t, const std::function<void()>& kernel) {
  constexpr int kMostShared = 48 * 1024, kGuard = 16;
  if (grid.x == 0 || size.x * size.y * size.z == 0 || size.x * size.y * size.z > 1024 || shared > kMostShared)
    fail("a launch of ", grid.x, " blocks of ", size.x, " x ", size.y, " x ", size.z, " threads with ",
         shared, " bytes of shared memory");
  gridDim = grid;
  blockDim = size;
  const size_t used = (shared + sizeof(float4) - 1) / sizeof(float4);
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        dynamic_shared.assign(used + kGuard, {1, 1, 1, 1});
        block.run(size, kernel);
        for (size_t i = used; i < used + kGuard; ++i) {
          const float4& word = dynamic_shared[i];
          if (word.x != 1 || word.y != 1 || word.z != 1 || word.w != 1)
            fail("shared memory was written behind its end");
        }
      }
    }
  }
}

} // namespace d2it
