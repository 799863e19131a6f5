// Attention inside windows on CUDA (D2iT, Eq. 10), forward and backward, for windows of up to 256 positions
// in float16 and bfloat16: softmax(q k^T * scale + bias) v over the tokens that exist.
//
// A block has one head and walks over windows. Of a window it takes the rows that exist, closed up, so that a
// window of n tokens costs n rows of traffic and n^2 pairs, rounded up to tiles of 16. All products are
// mma.sync on tiles of 16 x 16 pairs. Windows of up to 64 positions go in groups of up to 64 rows.
#include "window_attention_backward.h"
#include "window_attention_forward.h"
#include "window_attention_groups_backward.h"
#include "window_attention_groups_forward.h"

#include <vector>

namespace {

// -------------------------------------------------------------------------------------- unnamed rows

__global__ void __launch_bounds__(kThreads) mark_named(const Problem p, uint8_t* unnamed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(p.windows) * p.n) return;
  const int row = slot_of(p, static_cast<int>(i / p.n), static_cast<int>(i % p.n));
  CUDA_KERNEL_ASSERT(row < p.tokens && "slots must name rows that are there");
  if (row >= 0 && row < p.tokens) unnamed[row] = 0;
}

template <typename T>
struct Cleared {
  Heads<T> tensors[3];
  int count;
};

// A lane looks at one row, and a warp clears those that it finds.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    clear_unnamed(const __grid_constant__ Cleared<T> to, const uint8_t* unnamed, int64_t tokens, int width) {
  const int64_t own = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int lane = threadIdx.x % kWarp;
  unsigned found = __ballot_sync(kAll, own < tokens && unnamed[own]);
  for (; found; found &= found - 1) {
    const int64_t row = own - lane + __ffs(found) - 1;
    for (int i = 0; i < to.count; ++i) {
      for (int column = lane; column < width; column += kWarp) to.tensors[i].at(0, row, 0)[column] = T{};
    }
  }
}

// ------------------------------------------------------------------------------------------------ launch

template <typename T>
Heads<T> heads_of(const Tensor& t, bool packed) {
  using Element = std::remove_const_t<T>;
  const int dims = packed ? 3 : 4;
  Heads<T> heads{static_cast<T*>(const_cast<void*>(t.const_data_ptr())),
                 packed ? 0 : t.stride(0),
                 t.stride(dims - 3),
                 t.stride(dims - 2),
                 t.stride(dims - 1),
                 false};
  if (heads.row >= int64_t{1} << 31) d2it::fail("window attention: rows lie too far apart, ", heads.row);
  // Results are written in halves of vectors.
  const int64_t unit = std::is_const_v<T> ? kPerVector : kPerVector / 2;
  const int64_t width = t.size(dims - 1);
  heads.vectors = (heads.column == 1 || width == 1) && width % unit == 0 && heads.window % unit == 0 &&
                  heads.row % unit == 0 && heads.head % unit == 0 &&
                  reinterpret_cast<uintptr_t>(heads.data) % (unit * sizeof(Element)) == 0;
  return heads;
}

Problem problem_of(const Tensor& q, const std::optional<Tensor>& bias, const std::optional<Tensor>& slots,
                   const std::optional<Tensor>& segments, double scale) {
  Problem p = {};
  const int dims = slots ? 3 : 4;
  p.heads = static_cast<int>(q.size(dims - 2));
  p.width = static_cast<int>(q.size(dims - 1));
  const int64_t windows = slots ? slots->size(0) : q.size(0);
  if (windows > std::numeric_limits<int>::max() / 2)
    d2it::fail("window attention: too many windows, ", windows);
  p.windows = static_cast<int>(windows);
  p.n = static_cast<int>(slots ? slots->size(1) : q.size(1));
  p.tokens = slots ? q.size(0) : p.n;
  if (slots) {
    p.slots = static_cast<const int32_t*>(slots->const_data_ptr());
    p.slots_window = slots->stride(0), p.slots_position = slots->stride(1);
  }
  p.bias_windows = 1;
  if (segments) {
    p.segments = static_cast<const int64_t*>(segments->const_data_ptr());
    p.segment_windows = static_cast<int>(segments->size(0));
  }
  p.run = p.n % 4 == 0 ? 4 : p.n % 2 == 0 ? 2 : 1;
  if (bias) {
    p.bias = static_cast<const float*>(bias->const_data_ptr());
    p.bias_windows = static_cast<int>(bias->size(0));
    p.bias_per_head = bias->size(1) > 1;
    while (reinterpret_cast<uintptr_t>(p.bias) % (p.run * sizeof(float)) != 0) p.run /= 2;
  }
  p.scale = static_cast<float>(scale);
  p.unit = p.scale * kLog2e;
  return p;
}

// Chunks of the windows of one bias.
int chunks_of(const Problem& p) {
  const int each = (p.windows + p.bias_windows - 1) / p.bias_windows, windows = chunk_windows(p.n);
  return (each + windows - 1) / windows;
}

// Whether the windows of a tensor are rows one behind the other, which groups take by their numbers.
template <typename T>
bool rows_of_groups(const Problem& p, const Heads<T>& heads) {
  return (p.slots || heads.window == p.n * heads.row) && heads.row < (int64_t{1} << 31) / kPerVector &&
         heads.vectors;
}

// Whether windows go in groups, with so many bytes of shared memory.
template <typename... Tensors>
bool in_groups(const Problem& p, int bytes, int most, const Tensors&... tensors) {
  return p.n <= kGroup && static_cast<int64_t>(p.windows) * p.n <= std::numeric_limits<int>::max() &&
         bytes <= most && (rows_of_groups(p, tensors) && ...);
}

unsigned blocks_of(int64_t count, const char* what) {
  if (count > std::numeric_limits<int>::max()) d2it::fail(what, ": too many blocks, ", count);
  return static_cast<unsigned>(count);
}

// Calls `function` with the least of the widths that kernels are made for.
template <typename Function>
void with_width(int width, const Function& function) {
  if (width <= 32) return function(std::integral_constant<int, 32>());
  if (width <= 64) return function(std::integral_constant<int, 64>());
  if (width <= 72) return function(std::integral_constant<int, 72>());
  if (width <= 96) return function(std::integral_constant<int, 96>());
  if (width <= 128) return function(std::integral_constant<int, 128>());
  d2it::fail("window attention on CUDA takes heads of up to 128, not ", width);
}

template <typename Function>
void with_dtype(ScalarType dtype, const Function& function) {
  if (dtype == ScalarType::Half) return function(__half());
  if (dtype == ScalarType::BFloat16) return function(__nv_bfloat16());
  d2it::fail("window attention on CUDA takes float16 and bfloat16");
}

// Zeros the rows of packed tensors that no slot names, and touches no other; `unnamed`: a byte for each row.
template <typename T>
void clear(const Problem& p, const std::vector<Tensor>& tensors, const std::optional<Tensor>& unnamed,
           cudaStream_t stream) {
  if (!p.slots || p.tokens == 0 || p.heads * p.width == 0) return;
  auto* flags = static_cast<uint8_t*>(const_cast<void*>(unnamed->const_data_ptr()));
  if (p.windows > 0 && p.n > 0) {
    const unsigned blocks =
        blocks_of((static_cast<int64_t>(p.windows) * p.n + kThreads - 1) / kThreads, "window attention");
    mark_named<<<blocks, kThreads, 0, stream>>>(p, flags);
  }
  Cleared<T> to = {};
  for (const Tensor& tensor : tensors) to.tensors[to.count++] = heads_of<T>(tensor, true);
  const unsigned blocks = blocks_of((p.tokens + kThreads - 1) / kThreads, "window attention");
  clear_unnamed<T><<<blocks, kThreads, 0, stream>>>(to, flags, p.tokens, p.heads * p.width);
}

// lse (windows, heads, n): the base-2 logarithm of every row's sum, infinite where there is no row or no key.
// unnamed: a byte for each row of packed windows, ones.
void window_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias, std::optional<Tensor> slots,
                      std::optional<Tensor> segment_ids, double scale, Tensor out, Tensor lse,
                      std::optional<Tensor> unnamed) {
  Problem p = problem_of(q, bias, slots, segment_ids, scale);
  const d2it::OnDevice device(q);
  const bool packed = slots.has_value();
  with_dtype(q.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (p.windows > 0 && p.n > 0 && q.numel() > 0) {
      with_width(p.width, [&](auto width) {
        constexpr int kWidth = width.value;
        Forward<T> f{p,
                     heads_of<const T>(q, packed),
                     heads_of<const T>(k, packed),
                     heads_of<const T>(v, packed),
                     heads_of<T>(out, packed),
                     static_cast<float*>(const_cast<void*>(lse.const_data_ptr()))};
        const int shared = group_forward_bytes<kWidth>(p.segments);
        const bool grouped = in_groups(p, shared, device.most_shared(), f.q, f.k, f.v, f.out);
        // A block starts with little: many of them, which windows of any length keep busy.
        const int64_t residues = grouped ? p.bias_windows : 1, parts = grouped ? chunks_of(p) : p.windows;
        f.p.splits =
            static_cast<int>(std::clamp<int64_t>(16 * device.processors() / (p.heads * residues), 1, parts));
        const int bytes = grouped ? shared : forward_bytes<kWidth>(p.n);
        const int threads = grouped ? kGroupThreads : kThreads;
        const auto kernel = grouped ? groups_forward<T, kWidth> : attention_forward<T, kWidth>;
        d2it::allow_shared(kernel, bytes);
        const unsigned blocks = blocks_of(f.p.splits * residues * p.heads, "window attention");
        kernel<<<blocks, threads, bytes, device.stream>>>(f);
      });
    }
    clear<T>(p, {out}, unnamed, device.stream);
  });
  d2it::check_launch("window_attention");
}

// bias: transposed, keys before queries. sums: (splits, bias_windows, heads, n, sums_pitch) float32, and
// dbias, where the bias's gradient is wanted.
void window_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias,
                               std::optional<Tensor> slots, std::optional<Tensor> segment_ids, Tensor out,
                               Tensor lse, double scale, Tensor dq, Tensor dk, Tensor dv,
                               std::optional<Tensor> sums, std::optional<Tensor> dbias,
                               std::optional<Tensor> unnamed, int64_t splits) {
  Problem p = problem_of(q, bias, slots, segment_ids, scale);
  const d2it::OnDevice device(q);
  const bool packed = slots.has_value();
  with_dtype(q.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (p.windows > 0 && p.n > 0 && q.numel() > 0) {
      with_width(p.width, [&](auto width) {
        constexpr int kWidth = width.value;
        p.splits = static_cast<int>(splits);
        Backward<T> b{p,
                      heads_of<const T>(q, packed),
                      heads_of<const T>(k, packed),
                      heads_of<const T>(v, packed),
                      heads_of<const T>(grad, packed),
                      heads_of<const T>(out, packed),
                      static_cast<const float*>(lse.const_data_ptr()),
                      heads_of<T>(dq, packed),
                      heads_of<T>(dk, packed),
                      heads_of<T>(dv, packed),
                      nullptr,
                      0,
                      0,
                      false,
                      0};
        b.vectors = b.q.vectors && b.k.vectors && b.v.vectors && b.grad.vectors && b.out.vectors;
        const int shared = group_backward_bytes<kWidth>(p.n, p.segments, sums.has_value());
        const bool grouped =
            in_groups(p, shared, device.most_shared(), b.q, b.k, b.v, b.grad, b.out, b.dq, b.dk, b.dv);
        const bool small = p.n <= kGroup;
        int bytes = grouped ? shared
                    : small ? Parts<T, kWidth, kGroup>::bytes()
                            : Parts<T, kWidth, kThreads>::bytes();
        if (sums) {
          const int row = sums_pitch(p.n) * static_cast<int>(sizeof(float));
          b.row = row, b.block = p.n * row;
          b.sums = static_cast<float*>(const_cast<void*>(sums->const_data_ptr()));
          if (!grouped) {
            b.resident = std::clamp((device.most_shared() - bytes) / row, 0, p.n);
            bytes += b.resident * row;
          }
        }
        const int threads = grouped ? kGroupThreads : kBackwardThreads;
        const auto kernel = grouped ? groups_backward<T, kWidth>
                            : small ? attention_backward<T, kWidth, kGroup>
                                    : attention_backward<T, kWidth, kThreads>;
        d2it::allow_shared(kernel, bytes);
        const unsigned blocks = blocks_of(splits * p.bias_windows * p.heads, "window attention");
        kernel<<<blocks, threads, bytes, device.stream>>>(b);
      });
      if (dbias) {
        const int64_t side = (p.n + kWarp - 1) / kWarp, matrices = dbias->size(0) * dbias->size(1);
        const unsigned blocks = blocks_of(matrices * side * side, "window attention");
        const auto* from = static_cast<const float*>(sums->const_data_ptr());
        const auto reduce = [&](auto like) {
          using Element = decltype(like);
          auto* to = static_cast<Element*>(const_cast<void*>(dbias->const_data_ptr()));
          sum_blocks<Element><<<blocks, kThreads, 0, device.stream>>>(from, to, p.bias_windows, p.heads, p.n,
                                                                      static_cast<int>(splits),
                                                                      p.bias_per_head || p.heads == 1);
        };
        if (dbias->scalar_type() == ScalarType::Float) {
          reduce(float());
        } else {
          with_dtype(dbias->scalar_type(), reduce);
        }
      }
    }
    clear<T>(p, {dq, dk, dv}, unnamed, device.stream);
  });
  d2it::check_launch("window_attention_backward");
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CUDA, m) {
  m.impl("window_attention_saved", TORCH_BOX(&window_attention));
  m.impl("window_attention_saved_backward", TORCH_BOX(&window_attention_backward));
}
