// The schemas of every C++ operator. Each operator's own file holds its implementation and registers it for
// its device. Python (d2it/ops) defines what autograd and torch.compile see. It also allocates the results,
// but for the operators that are mostly called with few rows and on the CPU alone: to allocate theirs in C++
// takes half the time. One that checks values returns whether they are valid, or throws where it returns its
// results.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(d2it_C, m) {
  m.def("neighbor_copy(Tensor[] latents, Tensor grain_map, Tensor(a!) out) -> bool");
  m.def("neighbor_copy_backward(Tensor grad, Tensor grain_map, Tensor(a!)[] grads) -> ()");
  m.def(
      "kde_entropy(Tensor images, Tensor? thresholds, int region_size, int num_bins, float low, float high, "
      "float sigma, bool normalize, float slack, Tensor(a!) entropy, Tensor(b!)? grains) -> bool");
  m.def("pack_tokens(Tensor x, Tensor index) -> Tensor");
  m.def("unpack_tokens(Tensor? packed, Tensor? base, Tensor inverse, int batch, int cells) -> Tensor");
  m.def(
      "plan_tokens(Tensor grain_map, int cells_per_region, int window, int min_grain, int[] code_sizes, "
      "Tensor(a!) index, Tensor(b!) inverse, Tensor(c!) slots, Tensor(d!) sample, Tensor(e!) count) -> bool");
  m.def(
      "adaln_modulate(Tensor x, Tensor shift, Tensor scale, Tensor? sample, float eps) -> (Tensor, Tensor)");
  m.def(
      "adaln_modulate_backward(Tensor grad, Tensor x, Tensor stats, Tensor scale, Tensor? sample) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("gated_residual(Tensor x, Tensor branch, Tensor gate, Tensor? sample) -> Tensor");
  m.def(
      "gated_residual_backward(Tensor grad, Tensor branch, Tensor gate, Tensor? bias, Tensor? sample) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "gated_residual_modulate(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, Tensor? "
      "sample, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gated_residual_modulate_backward(Tensor grad_total, Tensor grad, Tensor total, Tensor stats, Tensor "
      "branch, Tensor gate, Tensor scale, Tensor? bias, Tensor? sample) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "window_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? slots, Tensor? segment_ids, "
      "float scale, Tensor(a!) out) -> bool");
  m.def(
      "window_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? slots, "
      "Tensor? segment_ids, float scale, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias) -> "
      "bool");
  m.def(
      "window_attention_saved(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? slots, Tensor? "
      "segment_ids, "
      "float scale, Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? unnamed) -> ()");
  m.def(
      "window_attention_saved_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? "
      "slots, "
      "Tensor? segment_ids, Tensor out, Tensor lse, float scale, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) "
      "dv, "
      "Tensor(d!)? sums, Tensor(e!)? dbias, Tensor(f!)? unnamed, int splits) -> ()");
  m.def("matmul(Tensor a, Tensor b, Tensor? bias, Tensor(a!) out) -> bool");
  m.def("gelu(Tensor x, Tensor(a!) out) -> ()");
  m.def("gelu_backward(Tensor grad, Tensor x, Tensor(a!) dx, Tensor(b!)? out, Tensor(c!)? dbias) -> ()");
  m.def("square_sum(Tensor[] tensors, Tensor(a!) total) -> ()");
  m.def(
      "adamw(Tensor(a!)[] parameters, Tensor(b!)[] weights, Tensor[] gradients, Tensor(c!)[] means, "
      "Tensor(d!)[] squares, Tensor(e!)[] steps, Tensor(f!)[] averages, Tensor? factor, Tensor found_inf, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, float[] shares) -> ()");
}
