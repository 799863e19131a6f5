// GELU by tanh on CPU, and its gradient, which is summed over the rows for the bias in its input.
#include "rows.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace {

using d2it::for_blocks;
using d2it::kBlock;
using d2it::Rows;
using torch::stable::Tensor;

// x s with s = 1 / (1 + exp(-2 u)), which is (1 + tanh(u)) / 2, and u = sqrt(2 / pi) (x + 0.044715 x^3).
using V = d2it::Floats<16>;
struct Whole {}; // all lanes of a vector

struct Gelu {
  V out, slope;

  D2IT_INLINE explicit Gelu(const V& x) {
    constexpr float root = 0.7978845608028654f, cubic = 0.044715f;
    const V twice = 2 * root * (x + cubic * x * x * x);
    const V e = d2it::exp_negative(twice < 0 ? twice : -twice), per = 1 / (1 + e);
    out = x * (twice < 0 ? e * per : per);
    slope = (twice < 0 ? e * per : per) + x * (e * per * per) * (2 * root * (1 + 3 * cubic * x * x));
  }
};

// Calls work(at, lanes, ...) for every vector of n elements; the last one may have less than 16.
template <typename F>
D2IT_INLINE void for_vectors(int64_t n, const F& work) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) work(i, Whole{});
  if (i < n) work(i, static_cast<int>(n - i));
}

D2IT_INLINE V load(const float* from, Whole) { return d2it::as<V>(from); }
D2IT_INLINE V load(const float* from, int lanes) {
  V v{};
  for (int l = 0; l < lanes; ++l) v[l] = from[l];
  return v;
}
D2IT_INLINE void store(float* to, const V& v, Whole) { d2it::as<V>(to) = v; }
D2IT_INLINE void store(float* to, const V& v, int lanes) {
  for (int l = 0; l < lanes; ++l) to[l] = v[l];
}

D2IT_CLONES void gelu(const float* x, float* out, int64_t n) {
  for_vectors(n, [=](int64_t i, auto lanes)
                     __attribute__((always_inline)) { store(out + i, Gelu(load(x + i, lanes)).out, lanes); });
}

// out and sums may be absent.
D2IT_CLONES void gelu_backward(const float* grad, const float* x, float* dx, float* out, float* sums,
                               int64_t n) {
  for_vectors(n, [=](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Gelu found(load(x + i, lanes));
    const V d = load(grad + i, lanes) * found.slope;
    store(dx + i, d, lanes);
    if (out) store(out + i, found.out, lanes);
    if (sums) store(sums + i, load(sums + i, lanes) + d, lanes);
  });
}

// out = gelu(x); contiguous, x of any strides.
void gelu_of(Tensor x, Tensor out) {
  if (x.numel() == 0) return;
  const int64_t channels = x.size(x.dim() - 1);
  const Rows from(x), to(out);
  for_blocks(d2it::rows_of(x), channels, [&](int64_t begin, int64_t end) {
    std::vector<float> room(2 * channels);
    for (int64_t r = begin; r < end; ++r) {
      float* line = to.begin(r, room.data() + channels);
      gelu(from.read(r, room.data()), line, channels);
      to.store(r, line);
    }
  });
}

// dx = the gradient of x from that of gelu(x), in whose place it may be; out = gelu(x) again; dbias (C,)
// float32 = dx summed over the rows, in an order that no number of threads changes. Results are contiguous.
void gelu_backward_of(Tensor grad, Tensor x, Tensor dx, std::optional<Tensor> out,
                      std::optional<Tensor> dbias) {
  const int64_t channels = x.size(x.dim() - 1), rows = d2it::rows_of(x);
  const Rows grads(grad), from(x), to(dx);
  const std::optional<Rows> again = out ? std::optional<Rows>(*out) : std::nullopt;
  std::vector<float> sums(dbias ? (rows + kBlock - 1) / kBlock * channels : 0);
  const auto work = [&](int64_t begin, int64_t end) {
    std::vector<float> room(4 * channels);
    float *first = room.data(), *second = first + channels, *third = second + channels;
    for (int64_t r = begin; r < end; ++r) {
      float* line = to.begin(r, third);
      float* line_again = again ? again->begin(r, third + channels) : nullptr;
      gelu_backward(grads.read(r, first), from.read(r, second), line, line_again,
                    dbias ? sums.data() + r / kBlock * channels : nullptr, channels);
      to.store(r, line);
      if (again) again->store(r, line_again);
    }
  };
  if (x.numel() > 0) for_blocks(rows, channels, work);
  if (!dbias) return;
  auto* const sum = static_cast<float*>(const_cast<void*>(dbias->const_data_ptr()));
  std::fill_n(sum, channels, 0.0f);
  for (size_t i = 0; i < sums.size(); ++i) sum[i % channels] += sums[i];
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CPU, m) {
  m.impl("gelu", TORCH_BOX(&gelu_of));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward_of));
}
