// For the linear layers of a model on a CPU: products of float32 matrices by AMX.
#include "tiles.h"

#include <optional>

namespace {

using torch::stable::Tensor;

#ifdef D2IT_HAS_TILES
const float* floats_of(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
#endif

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

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CPU, m) { m.impl("matmul", TORCH_BOX(&matmul)); }
