// adaLN on CPU (DiT, section 3.2): normalise and modulate, gate and add, both in one, and their gradients.
//
// Rows are worked on in float32, one after the other. A row that lies so in memory is read where it is,
// others are converted into a line that stays in the L1 cache. The gradients of the parameters are sums over
// the rows of an image: taken over each run of rows of one image inside a block, then over the runs in their
// order, so they are the same for any number of threads.
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using d2it::as;
using d2it::for_blocks;
using d2it::kBlock;
using d2it::Rows;
using d2it::rows_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLanes = 8;
using V = d2it::Floats<kLanes>;

// ----------------------------------------------------------------------------------------------------
// Rows

// A parameter's row of the image at hand.
class Parameter {
 public:
  Parameter(const Rows& rows, int64_t channels) : rows_(rows), room_(channels) {}

  const float* of(int64_t image) {
    if (image != image_) values_ = rows_.read(image_ = image, room_.data());
    return values_;
  }

 private:
  const Rows& rows_;
  std::vector<float> room_;
  const float* values_ = nullptr;
  int64_t image_ = -1;
};

// The image of every row: row / length, or the one that `sample` names, which has to be one of `count`.
class Images {
 public:
  Images(const Tensor& x, const std::optional<Tensor>& sample, int64_t count) : length_(x.size(x.dim() - 2)) {
    if (!sample) return;
    const int64_t rows = sample->size(0), stride = sample->stride(0);
    of_.resize(rows);
    bool good = true;
    const auto copy = [&](const auto* in) {
      for (int64_t r = 0; r < rows; ++r) {
        of_[r] = in[r * stride];
        good &= static_cast<uint64_t>(of_[r]) < static_cast<uint64_t>(count);
      }
    };
    sample->scalar_type() == ScalarType::Int ? copy(static_cast<const int32_t*>(sample->const_data_ptr()))
                                             : copy(static_cast<const int64_t*>(sample->const_data_ptr()));
    if (!good) d2it::fail("sample must name images 0..", count - 1);
  }

  int64_t of(int64_t row) const { return of_.empty() ? row / length_ : of_[row]; }

 private:
  int64_t length_;
  std::vector<int64_t> of_;
};

// ----------------------------------------------------------------------------------------------------
// Sums over the rows of an image

// The elements of a contiguous float32 tensor.
float* floats_of(const Tensor& tensor) {
  return static_cast<float*>(const_cast<void*>(tensor.const_data_ptr()));
}

D2IT_CLONES void add(const float* __restrict in, float* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += in[i];
}

// Of the rows of one image in one block: a line of channels for each parameter.
struct Run {
  int64_t image;
  std::vector<float> sums;
};

class Runs {
 public:
  Runs(int64_t rows, int64_t channels, int64_t lines)
      : blocks_((rows + kBlock - 1) / kBlock), channels_(channels), lines_(lines) {}

  // The sums that row r goes to. Rows of a block come in order, from one thread.
  float* of(int64_t r, int64_t image) {
    std::vector<Run>& runs = blocks_[r / kBlock];
    if (runs.empty() || runs.back().image != image) {
      runs.push_back({image, std::vector<float>(lines_ * channels_)});
    }
    return runs.back().sums.data();
  }

  // Line `line` of the runs, added up in order into (images, channels) float32.
  void add_up(int64_t line, const Tensor& to) const {
    std::fill_n(floats_of(to), to.numel(), 0.0f);
    for_each([&](const Run& run) {
      add(run.sums.data() + line * channels_, floats_of(to) + run.image * channels_, channels_);
    });
  }

  // The same of all images, on top of what is in (channels,) float32.
  void add_up_all(int64_t line, const Tensor& to) const {
    for_each([&](const Run& run) { add(run.sums.data() + line * channels_, floats_of(to), channels_); });
  }

 private:
  template <typename F>
  void for_each(const F& work) const {
    for (const std::vector<Run>& runs : blocks_) {
      for (const Run& run : runs) work(run);
    }
  }

  std::vector<std::vector<Run>> blocks_;
  int64_t channels_, lines_;
};

// ----------------------------------------------------------------------------------------------------
// One row. What is handed to `sum` gives the value of a vector, or of an element where no whole vector is
// left.

template <typename F>
D2IT_INLINE float sum(int64_t n, const F& value) {
  V parts[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) parts[j] += value(V{}, i + j * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) parts[0] += value(V{}, i);
  const V all = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  float total = 0;
  for (int j = 0; j < kLanes; ++j) total += all[j];
  for (; i < n; ++i) total += value(0.0f, i);
  return total;
}

struct Moments {
  float mean, per_deviation;

  D2IT_INLINE Moments(const float* x, int64_t n, float eps) {
    const auto value = [=](auto of, int64_t i)
                           __attribute__((always_inline)) { return as<decltype(of)>(x + i); };
    const float middle = mean = sum(n, value) / n;
    const auto squared = [=](auto of, int64_t i) __attribute__((always_inline)) {
      const auto d = as<decltype(of)>(x + i) - middle;
      return d * d;
    };
    per_deviation = 1.0f / std::sqrt(sum(n, squared) / n + eps);
  }
};

D2IT_CLONES void modulate(const float* __restrict x, const float* __restrict shift,
                          const float* __restrict scale, float eps, float* __restrict out,
                          float* __restrict stats, int64_t n) {
  const Moments m(x, n, eps);
  stats[0] = m.mean;
  stats[1] = m.per_deviation;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = (x[i] - m.mean) * m.per_deviation * (1.0f + scale[i]) + shift[i];
  }
}

// With y the normalised row and g = grad * (1 + scale): dx = (g - mean(g) - y * mean(g * y)) / deviation.
// g and y are kept, y where dx will be: worked out again, they might be rounded otherwise. Mean and
// 1 / deviation are those that the forward found.
D2IT_CLONES void modulate_backward(const float* __restrict grad, const float* __restrict x,
                                   const float* __restrict scale, const float* __restrict stats,
                                   float* __restrict g, float* __restrict dx, float* __restrict dshift,
                                   float* __restrict dscale, int64_t n) {
  const float mean = stats[0], per_deviation = stats[1];
  for (int64_t i = 0; i < n; ++i) {
    const float y = (x[i] - mean) * per_deviation;
    dshift[i] += grad[i];
    dscale[i] += grad[i] * y;
    g[i] = grad[i] * (1.0f + scale[i]);
    dx[i] = y;
  }
  const auto of_g = [=](auto of, int64_t i)
                        __attribute__((always_inline)) { return as<decltype(of)>(g + i); };
  const auto of_gy = [=](auto of, int64_t i) __attribute__((always_inline)) {
    return as<decltype(of)>(g + i) * as<decltype(of)>(dx + i);
  };
  const float mean_g = sum(n, of_g) / n, mean_gy = sum(n, of_gy) / n;
  for (int64_t i = 0; i < n; ++i) dx[i] = (g[i] - mean_g - dx[i] * mean_gy) * per_deviation;
}

D2IT_CLONES void gate_and_add(const float* __restrict x, const float* __restrict branch,
                              const float* __restrict gate, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] + gate[i] * branch[i];
}

D2IT_CLONES void gate_backward(const float* __restrict grad, const float* __restrict branch,
                               const float* __restrict gate, float* __restrict dbranch,
                               float* __restrict dgate, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    dgate[i] += grad[i] * branch[i];
    dbranch[i] = grad[i] * gate[i];
  }
}

// ----------------------------------------------------------------------------------------------------
// Operators. Results are contiguous, the gradients of parameters float32. They throw where a sample names no
// image.

Tensor unwritten_like(const Tensor& tensor) { return d2it::empty(tensor.sizes(), tensor.scalar_type()); }

Tensor floats_like(const Tensor& parameter) { return d2it::empty(parameter.sizes(), ScalarType::Float); }

// The gradient of a bias, 0 so far; (0,) without one.
Tensor zeros_for(const std::optional<Tensor>& bias, const Tensor& branch) {
  if (!bias) return d2it::empty({0}, branch.scalar_type());
  Tensor dbias = floats_like(*bias);
  std::fill_n(floats_of(dbias), dbias.numel(), 0.0f);
  return dbias;
}

// Room for mean and 1 / deviation of the rows.
Tensor stats_of(const Tensor& x) { return d2it::empty({rows_of(x), 2}, ScalarType::Float); }

std::tuple<Tensor, Tensor> adaln_modulate(Tensor x, Tensor shift, Tensor scale, std::optional<Tensor> sample,
                                          double eps) {
  const Images images(x, sample, scale.size(0));
  Tensor out = unwritten_like(x), stats = stats_of(x);
  if (out.numel() == 0) return {out, stats};
  const int64_t channels = x.size(x.dim() - 1);
  const Rows from(x), to(out), shifts(shift), scales(scale);
  float* const moments = floats_of(stats);
  for_blocks(rows_of(x), channels, [&](int64_t begin, int64_t end) {
    std::vector<float> room(2 * channels);
    Parameter shift_of(shifts, channels), scale_of(scales, channels);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t image = images.of(r);
      float* line = to.begin(r, room.data() + channels);
      modulate(from.read(r, room.data()), shift_of.of(image), scale_of.of(image), static_cast<float>(eps),
               line, moments + 2 * r, channels);
      to.store(r, line);
    }
  });
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor> adaln_modulate_backward(Tensor grad, Tensor x, Tensor stats, Tensor scale,
                                                           std::optional<Tensor> sample) {
  const Images images(x, sample, scale.size(0));
  Tensor dx = unwritten_like(x), dshift = floats_like(scale), dscale = floats_like(scale);
  if (scale.numel() == 0) return {dx, dshift, dscale};
  const int64_t channels = x.size(x.dim() - 1), rows = rows_of(x);
  const Rows grads(grad), from(x), to(dx), scales(scale);
  const float* const moments = floats_of(stats);
  Runs runs(rows, channels, 2);
  for_blocks(rows, channels, [&](int64_t begin, int64_t end) {
    std::vector<float> room(4 * channels);
    Parameter scale_of(scales, channels);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t image = images.of(r);
      float* sums = runs.of(r, image);
      float* line = to.begin(r, room.data() + 2 * channels);
      modulate_backward(grads.read(r, room.data()), from.read(r, room.data() + channels), scale_of.of(image),
                        moments + 2 * r, room.data() + 3 * channels, line, sums, sums + channels, channels);
      to.store(r, line);
    }
  });
  runs.add_up(0, dshift);
  runs.add_up(1, dscale);
  return {dx, dshift, dscale};
}

Tensor gated_residual(Tensor x, Tensor branch, Tensor gate, std::optional<Tensor> sample) {
  const Images images(x, sample, gate.size(0));
  Tensor out = unwritten_like(x);
  if (out.numel() == 0) return out;
  const int64_t channels = x.size(x.dim() - 1);
  const Rows from(x), branches(branch), to(out), gates(gate);
  for_blocks(rows_of(x), channels, [&](int64_t begin, int64_t end) {
    std::vector<float> room(3 * channels);
    Parameter gate_of(gates, channels);
    for (int64_t r = begin; r < end; ++r) {
      float* line = to.begin(r, room.data() + 2 * channels);
      gate_and_add(from.read(r, room.data()), branches.read(r, room.data() + channels),
                   gate_of.of(images.of(r)), line, channels);
      to.store(r, line);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_backward(Tensor grad, Tensor branch, Tensor gate,
                                                           std::optional<Tensor> bias,
                                                           std::optional<Tensor> sample) {
  const Images images(branch, sample, gate.size(0));
  Tensor dbranch = unwritten_like(branch), dgate = floats_like(gate), dbias = zeros_for(bias, branch);
  if (gate.numel() == 0) return {dbranch, dgate, dbias};
  const int64_t channels = branch.size(branch.dim() - 1), rows = rows_of(branch);
  const Rows grads(grad), branches(branch), to(dbranch), gates(gate);
  Runs runs(rows, channels, bias ? 2 : 1);
  for_blocks(rows, channels, [&](int64_t begin, int64_t end) {
    std::vector<float> room(3 * channels);
    Parameter gate_of(gates, channels);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t image = images.of(r);
      float* sums = runs.of(r, image);
      float* line = to.begin(r, room.data() + 2 * channels);
      gate_backward(grads.read(r, room.data()), branches.read(r, room.data() + channels), gate_of.of(image),
                    line, sums, channels);
      if (bias) add(line, sums + channels, channels);
      to.store(r, line);
    }
  });
  runs.add_up(0, dgate);
  if (bias) runs.add_up_all(1, dbias);
  return {dbranch, dgate, dbias};
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_modulate(Tensor x, Tensor branch, Tensor gate, Tensor shift,
                                                           Tensor scale, std::optional<Tensor> sample,
                                                           double eps) {
  const Images images(x, sample, scale.size(0));
  Tensor total = unwritten_like(x), out = unwritten_like(x), stats = stats_of(x);
  if (out.numel() == 0) return {total, out, stats};
  const int64_t channels = x.size(x.dim() - 1);
  const Rows from(x), branches(branch), totals(total), to(out), gates(gate), shifts(shift), scales(scale);
  float* const moments = floats_of(stats);
  for_blocks(rows_of(x), channels, [&](int64_t begin, int64_t end) {
    std::vector<float> room(3 * channels);
    Parameter gate_of(gates, channels), shift_of(shifts, channels), scale_of(scales, channels);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t image = images.of(r);
      float* line = totals.begin(r, room.data() + 2 * channels);
      gate_and_add(from.read(r, room.data()), branches.read(r, room.data() + channels), gate_of.of(image),
                   line, channels);
      totals.store(r, line);
      const float* stored = totals.read(r, room.data()); // as it was rounded
      line = to.begin(r, room.data() + 2 * channels);
      modulate(stored, shift_of.of(image), scale_of.of(image), static_cast<float>(eps), line, moments + 2 * r,
               channels);
      to.store(r, line);
    }
  });
  return {total, out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_modulate_backward(
    Tensor grad_total, Tensor grad, Tensor total, Tensor stats, Tensor branch, Tensor gate, Tensor scale,
    std::optional<Tensor> bias, std::optional<Tensor> sample) {
  const Images images(total, sample, scale.size(0));
  Tensor dx = unwritten_like(total), dbranch = unwritten_like(branch);
  Tensor dgate = floats_like(gate), dshift = floats_like(scale), dscale = floats_like(scale);
  Tensor dbias = zeros_for(bias, branch);
  if (scale.numel() == 0) return {dx, dbranch, dgate, dshift, dscale, dbias};
  const int64_t channels = total.size(total.dim() - 1), rows = rows_of(total);
  const Rows grads(grad), grads_total(grad_total), from(total), branches(branch), gates(gate), scales(scale);
  const Rows to(dx), to_branch(dbranch);
  const float* const moments = floats_of(stats);
  Runs runs(rows, channels, bias ? 4 : 3);
  for_blocks(rows, channels, [&](int64_t begin, int64_t end) {
    std::vector<float> room(5 * channels);
    float *first = room.data(), *second = first + channels, *third = second + channels;
    Parameter gate_of(gates, channels), scale_of(scales, channels);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t image = images.of(r);
      float* sums = runs.of(r, image);
      float* line = to.begin(r, third + channels);
      modulate_backward(grads.read(r, first), from.read(r, second), scale_of.of(image), moments + 2 * r,
                        third, line, sums, sums + channels, channels);
      add(grads_total.read(r, first), line, channels);
      float* line_branch = to_branch.begin(r, third);
      gate_backward(line, branches.read(r, second), gate_of.of(image), line_branch, sums + 2 * channels,
                    channels);
      if (bias) add(line_branch, sums + 3 * channels, channels);
      to_branch.store(r, line_branch);
      to.store(r, line);
    }
  });
  runs.add_up(0, dshift);
  runs.add_up(1, dscale);
  runs.add_up(2, dgate);
  if (bias) runs.add_up_all(3, dbias);
  return {dx, dbranch, dgate, dshift, dscale, dbias};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CPU, m) {
  m.impl("adaln_modulate", TORCH_BOX(&adaln_modulate));
  m.impl("adaln_modulate_backward", TORCH_BOX(&adaln_modulate_backward));
  m.impl("gated_residual", TORCH_BOX(&gated_residual));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward));
  m.impl("gated_residual_modulate", TORCH_BOX(&gated_residual_modulate));
  m.impl("gated_residual_modulate_backward", TORCH_BOX(&gated_residual_modulate_backward));
}
