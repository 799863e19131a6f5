// For the linear layers of a model on a CPU: products of float32 matrices by AMX, and GELU between two of
// them.
#include "tiles.h"

#include <optional>

namespace {

using torch::stable::Tensor;

const float* floats_of(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

// out (M, N) = a (M, K) b (K, N) + bias (N,), of matrices whose rows or columns are contiguous; out and bias
// are. False where the machine has no tiles: nothing is written then.
bool matmul(Tensor a, Tensor b, std::optional<Tensor> bias, Tensor out) {
  if (!d2it::tiles::available()) return false;
#ifdef D2IT_HAS_TILES
  const d2it::tiles::Side left{floats_of(a), a.size(0), a.stride(0), a.stride(1)};
  const d2it::tiles::Side right{floats_of(b), b.size(1), b.stride(1), b.stride(0)};
  d2it::tiles::multiply(left, right, a.size(1), bias ? floats_of(*bias) : nullptr,
                        static_cast<float*>(const_cast<void*>(out.const_data_ptr())), out.size(1));
#endif
  return true;
}

// ----------------------------------------------------------------------------------------------------
// GELU by tanh: x s with s = 1 / (1 + exp(-2 u)), which is (1 + tanh(u)) / 2, and u = sqrt(2 / pi) (x +
// 0.044715 x^3).

using V = d2it::Floats<16>;
struct Whole {}; // all lanes of a vector
constexpr int64_t kChunk = 1 << 14;

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

D2IT_CLONES void gelu_backward(float* grad, const float* x, float* out, int64_t n) {
  for_vectors(n, [=](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Gelu found(load(x + i, lanes));
    store(out + i, found.out, lanes);
    store(grad + i, load(grad + i, lanes) * found.slope, lanes);
  });
}

float* written(const Tensor& tensor) {
  return static_cast<float*>(const_cast<void*>(tensor.const_data_ptr()));
}

// out = gelu(x); contiguous.
void gelu_of(Tensor x, Tensor out) {
  torch::stable::parallel_for(0, x.numel(), kChunk, [&](int64_t begin, int64_t end) {
    gelu(floats_of(x) + begin, written(out) + begin, end - begin);
  });
}

// grad = the gradient of x, where it was that of gelu(x), and out = gelu(x) again; contiguous.
void gelu_backward_of(Tensor grad, Tensor x, Tensor out) {
  torch::stable::parallel_for(0, x.numel(), kChunk, [&](int64_t begin, int64_t end) {
    gelu_backward(written(grad) + begin, floats_of(x) + begin, written(out) + begin, end - begin);
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CPU, m) {
  m.impl("matmul", TORCH_BOX(&matmul));
  m.impl("gelu", TORCH_BOX(&gelu_of));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward_of));
}
