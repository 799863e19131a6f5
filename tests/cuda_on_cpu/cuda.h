// Stands in for csrc/cuda.h and the CUDA headers where a .cu file is compiled for the CPU
// (tests/cuda_on_cpu). Blocks run one after the other, the lanes of a warp take turns: each runs up to its
// next synchronisation, or to its end. So a lane that reads what another writes, and does not synchronise in
// between, reads the wrong thing. Every access is checked to be aligned to its size, as it has to be on a
// GPU; shared memory starts as ones and ends where the launch ends it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <setjmp.h>
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
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
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
inline float __fdividef(float x, float y) { return x / y; }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

// Bytes of shared memory that a block can have: an H100's, unless a test sets another GPU's. Kept also where no kernel
// uses any: the tests look it up by name.
extern "C" {
[[gnu::used]] inline int d2it_most_shared = 227 * 1024;
}

namespace d2it {

// The threads of one block, each on a stack of its own. Warps run one after the other, each up to a
// synchronisation of the block; the lanes of a warp take turns, each up to its next synchronisation or exchange.
class Block {
 public:
  // Runs `kernel` as every thread of a block of this size.
  void run(dim3 size, const std::function<void()>& kernel) {
    const size_t count = static_cast<size_t>(size.x) * size.y * size.z;
    while (threads_.size() < count) threads_.push_back(std::make_unique<Thread>());
    kernel_ = &kernel;
    size_ = size;
    any_[0] = any_[1] = any_[2] = false;
    for (size_t i = 0; i < count; ++i) start(*threads_[i]);
    // Warps take turns in one order and in the other: one that does not wait for another is early or late.
    for (bool forwards = true, finished = false; !finished; forwards = !forwards) {
      finished = true;
      for (size_t i = 0; i < count; i += kWarp) {
        const size_t first = forwards ? i : (count - 1) / kWarp * kWarp - i;
        if (threads_[first]->state == State::kFinished) continue;
        run_warp(first, std::min(first + kWarp, count));
        finished &= threads_[first]->state == State::kFinished;
      }
    }
  }

  // The current thread waits until the others of its warp are here as well; of its block.
  void synchronise() { leave(State::kRunning); }
  void synchronise_block() { leave(State::kWaiting); }

  // What every lane of a warp gave to share(), until the next call but one.
  struct Warp {
    Block& block;
    size_t first, slot;
    template <typename T>
    const T& at(size_t lane) const {
      return *reinterpret_cast<const T*>(block.threads_[first + lane]->shared[slot]);
    }
  };
  template <typename T>
  Warp share(const T& value) {
    static_assert(sizeof(T) <= sizeof(Thread::shared[0]));
    Thread& thread = *threads_[current_];
    const size_t slot = thread.slot;
    std::memcpy(thread.shared[slot], &value, sizeof(T));
    thread.slot = 1 - slot;
    synchronise();
    return {*this, current_ / kWarp * kWarp, slot};
  }

  // Whether any thread of the block gives true; the threads wait for each other.
  bool any(bool value) {
    const size_t slot = threads_[current_]->votes++ % 3;
    any_[slot] |= value;
    any_[(slot + 1) % 3] = false; // all have read what it was
    synchronise_block();
    return any_[slot];
  }

  struct Copy {
    void* to;
    const void* from; // null: zeros
    size_t bytes;
  };
  void copy_later(const Copy& copy) { threads_[current_]->copies.back().push_back(copy); }
  void commit_copies() { threads_[current_]->copies.emplace_back(); }
  void wait_for_copies(size_t groups) {
    auto& pending = threads_[current_]->copies;
    for (; pending.size() > groups + 1; pending.erase(pending.begin())) {
      for (const Copy& copy : pending.front()) {
        if (copy.from) {
          std::memcpy(copy.to, copy.from, copy.bytes);
        } else {
          std::memset(copy.to, 0, copy.bytes);
        }
      }
    }
  }

 private:
  static constexpr size_t kWarp = 32, kStack = 1 << 17;
  enum class State { kNew, kRunning, kWaiting, kFinished };

  struct Thread {
    ucontext_t context;
    jmp_buf resume;
    std::unique_ptr<char[]> stack{new char[kStack]};
    alignas(16) char shared[2][32];
    size_t slot, votes;
    std::vector<std::vector<Copy>> copies; // by group, the last of them open
    State state;
    std::exception_ptr error;
  };

  void start(Thread& thread) {
    thread.state = State::kNew;
    thread.error = nullptr;
    thread.slot = thread.votes = 0;
    thread.copies.assign(1, {});
  }

  // Up to the next synchronisation of the block, or to the end.
  void run_warp(size_t first, size_t end) {
    do {
      for (current_ = first; current_ < end; ++current_) {
        const auto i = static_cast<uint32_t>(current_);
        threadIdx = {i % size_.x, i / size_.x % size_.y, i / size_.x / size_.y};
        enter(*threads_[current_]);
        if (threads_[current_]->error) std::rethrow_exception(threads_[current_]->error);
        if (threads_[current_]->state != threads_[first]->state)
          fail("the lanes of a warp do not synchronise alike");
      }
    } while (threads_[first]->state == State::kRunning);
  }

  // Jumps, since a change of contexts asks the kernel for the signals.
  void enter(Thread& thread) {
    if (_setjmp(host_)) return;
    if (thread.state != State::kNew) _longjmp(thread.resume, 1);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, &Block::begin, 0);
    setcontext(&thread.context);
  }

  void leave(State state) {
    Thread& thread = *threads_[current_];
    thread.state = state;
    if (!_setjmp(thread.resume)) _longjmp(host_, 1);
  }

  static void begin();

  std::vector<std::unique_ptr<Thread>> threads_;
  jmp_buf host_;
  const std::function<void()>* kernel_;
  dim3 size_;
  size_t current_;
  bool any_[3];
};

inline thread_local Block block;
inline thread_local std::vector<float4> dynamic_shared;

inline void Block::begin() {
  try {
    (*block.kernel_)();
  } catch (...) {
    block.threads_[block.current_]->error = std::current_exception();
  }
  block.leave(State::kFinished);
}

} // namespace d2it

inline void __syncwarp() { d2it::block.synchronise(); }
inline void __syncthreads() { d2it::block.synchronise_block(); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return d2it::block.share(value).template at<T>(threadIdx.x % 32 ^ mask);
}
inline int __syncthreads_or(bool value) { return d2it::block.any(value); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return d2it::block.share(value).template at<T>(lane);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = threadIdx.x % 32;
  return d2it::block.share(value).template at<T>(lane >= distance ? lane - distance : lane);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int distance) {
  const int lane = threadIdx.x % 32;
  return d2it::block.share(value).template at<T>(lane + distance < 32 ? lane + distance : lane);
}
inline int __reduce_add_sync(unsigned, int value) {
  const auto warp = d2it::block.share(value);
  int sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += warp.at<int>(lane);
  return sum;
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const auto warp = d2it::block.share(value);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(warp.at<bool>(lane)) << lane;
  return bits;
}
inline int __ffs(unsigned x) { return x ? std::countr_zero(x) + 1 : 0; }
inline int __popc(unsigned x) { return std::popcount(x); }
template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *aligned(to);
  *to += value;
  return before;
}

namespace d2it {

struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor&) {}
  int processors() const { return 2; }
  int most_shared() const { return d2it_most_shared; }
  cudaStream_t stream = nullptr;
};

inline thread_local int allowed_shared = 0;
template <typename Kernel>
void allow_shared(Kernel*, int bytes) {
  if (bytes > d2it_most_shared) fail("a block cannot have ", bytes, " bytes of shared memory");
  allowed_shared = bytes;
}

inline void check_launch(const char*) {}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}

inline unsigned opaque(unsigned x) { return x; }
// The lanes of a warp take turns here as well, so that what was loaded before is stale where another lane stores.
template <typename T>
T* opaque(T* x) {
  block.synchronise();
  return x;
}

template <typename Chunk>
void put(void* to, Chunk x) {
  std::memcpy(aligned(static_cast<Chunk*>(to)), &x, sizeof(Chunk));
}
template <typename Chunk>
void put(void* to, Chunk x, bool wanted) {
  if (wanted) put(to, x);
}

// What `translate` makes of a launch in triple angle brackets.
inline void launch(dim3 grid, dim3 size, int shared, cudaStream_t, const std::function<void()>& kernel) {
  constexpr int kGuard = 16;
  const int most = std::max(48 * 1024, allowed_shared);
  allowed_shared = 0;
  if (grid.x == 0 || size.x * size.y * size.z == 0 || size.x * size.y * size.z > 1024 || shared > most)
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
