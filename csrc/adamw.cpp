// AdamW on CPU (Loshchilov and Hutter 2019, Algorithm 2): the norm of all gradients in one pass over them,
// then parameters, moments and averages of the parameters in one pass over all of these. A float32 parameter
// that is the master of a bfloat16 weight is rounded to it there, by the gradient of that weight.
//
// Tensors are cut into chunks, which threads share out. Sums are taken chunk by chunk and added up in order,
// so they are the same for any number of threads. The update takes pieces of a chunk that are in the L1 cache
// for all of its loops also where every tensor begins at the same place of a page, as large ones do: then
// they share a few sets of the cache. Within a piece a core looks ahead from loop to loop.
#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace {

using torch::stable::Tensor;

constexpr int64_t kChunk = 2048;         // elements
constexpr int64_t kPiece = 64;           // of a chunk
constexpr int64_t kChunksPerThread = 16; // fewer are not worth waking a thread for

using d2it::BFloat16;

template <typename T>
T* values_of(const Tensor& tensor) {
  return static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

float* floats_of(const Tensor& tensor) { return values_of<float>(tensor); }

bool is_bf16(const Tensor& tensor) { return tensor.scalar_type() == torch::headeronly::ScalarType::BFloat16; }

// The chunks of a list of tensors, numbered from the first tensor on.
class Chunks {
 public:
  explicit Chunks(const std::vector<Tensor>& tensors) : first_{0} {
    for (const Tensor& tensor : tensors) {
      sizes_.push_back(tensor.numel());
      first_.push_back(first_.back() + (sizes_.back() + kChunk - 1) / kChunk);
    }
  }

  int64_t count() const { return first_.back(); }

  // Calls work(chunk, tensor, begin of the chunk in it, its elements) for every chunk, from several threads.
  template <typename F>
  void for_each(const F& work) const {
    torch::stable::parallel_for(0, count(), kChunksPerThread, [&](int64_t begin, int64_t end) {
      int64_t t = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        while (chunk >= first_[t + 1]) ++t;
        const int64_t at = (chunk - first_[t]) * kChunk;
        work(chunk, t, at, std::min(kChunk, sizes_[t] - at));
      }
    });
  }

 private:
  std::vector<int64_t> first_, sizes_;
};

// ----------------------------------------------------------------------------------------------------
// One chunk

// Each of 64 sums takes every 64th element; four are added up in float32, the rest in float64.
D2IT_CLONES double square_sum(const float* in, int64_t n) {
  using V = d2it::Floats<16>;
  V parts[4] = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (int j = 0; j < 4; ++j) {
      const V x = d2it::as<V>(in + i + 16 * j);
      parts[j] += x * x;
    }
  }
  const V all = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  double total = 0;
  for (int j = 0; j < 16; ++j) total += all[j];
  for (; i < n; ++i) total += static_cast<double>(in[i]) * in[i];
  return total;
}

template <typename T>
D2IT_INLINE void scale(const T* __restrict in, float factor, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = d2it::to_float(in[i]) * factor;
}

// As of the same numbers in float32.
D2IT_CLONES double square_sum(const BFloat16* in, int64_t n) {
  float wide[kChunk];
  d2it::widen(in, 1, wide, n);
  return square_sum(wide, n);
}

// to + weight * (from - to), from the nearer end as torch.lerp takes it.
D2IT_INLINE void average(float* __restrict to, const float* __restrict from, float weight, int64_t n) {
  if (weight < 0.5f) {
    for (int64_t i = 0; i < n; ++i) to[i] = to[i] + weight * (from[i] - to[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i] + (weight - 1.0f) * (from[i] - to[i]);
  }
}

// The numbers of a step, rounded as torch.optim.AdamW rounds them.
struct Step {
  float kept;        // 1 - lr * weight_decay
  float mean_weight; // 1 - beta1
  float beta2, square_weight;
  float size; // -lr / (1 - beta1^t)
  float root; // sqrt(1 - beta2^t)
  float eps;
};

// What follows rounds as torch.optim.AdamW(fused=True) does: with AVX2 the second moment takes the squares in
// a fused multiply-add, whose addend is rounded before; weights take none. So these are loops of their own,
// over what lies in the L1 cache.
D2IT_INLINE void decay(float* __restrict x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

D2IT_INLINE void add_squares(float* __restrict v, const float* __restrict g, float weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) v[i] = v[i] + weight * g[i] * g[i];
}

// Of the decayed weights: were the decay a part of this loop, a fused multiply-add would take its product.
D2IT_INLINE void move(const Step& s, float* __restrict p, const float* __restrict m,
                      const float* __restrict v, int64_t n) {
  const float size = s.size, root = s.root, eps = s.eps;
  for (int64_t i = 0; i < n; ++i) p[i] += size * m[i] / (std::sqrt(v[i]) / root + eps);
}

// Where a chunk of a parameter, and of all that belongs to it, begins. Gradients are of one of the two types;
// what the parameters are rounded to is null where the network computes with them as they are.
struct Place {
  float* parameters = nullptr;
  BFloat16* rounded = nullptr;
  const float* gradients = nullptr;
  const BFloat16* gradients16 = nullptr;
  float *means = nullptr, *squares = nullptr;
  std::vector<float*> averages;
};

// A chunk's step, piece by piece; `numbers` is null where the averages alone change.
D2IT_CLONES void update(const Step* numbers, float of_gradients, const Place& place,
                        const std::vector<double>& shares, int64_t size) {
  for (int64_t at = 0; at < size; at += kPiece) {
    const int64_t n = std::min(kPiece, size - at);
    float* const p = place.parameters + at;
    if (numbers) {
      float room[kPiece];
      const float* g = room;
      if (place.gradients16) {
        scale(place.gradients16 + at, of_gradients, room, n);
      } else if (of_gradients != 1.0f) {
        scale(place.gradients + at, of_gradients, room, n);
      } else {
        g = place.gradients + at;
      }
      float *const m = place.means + at, *const v = place.squares + at;
      average(m, g, numbers->mean_weight, n);
      decay(v, numbers->beta2, n);
      add_squares(v, g, numbers->square_weight, n);
      decay(p, numbers->kept, n);
      move(*numbers, p, m, v, n);
      if (place.rounded) d2it::narrow(p, place.rounded + at, n);
    }
    for (size_t a = 0; a < shares.size(); ++a) {
      average(place.averages[a] + at, p, static_cast<float>(shares[a]), n);
    }
  }
}

// ----------------------------------------------------------------------------------------------------
// Operators. Tensors are dense, those of one parameter laid out alike.

// total: 0-dim float64.
void square_sum_of_tensors(std::vector<Tensor> tensors, Tensor total) {
  const Chunks chunks(tensors);
  std::vector<double> sums(chunks.count());
  chunks.for_each([&](int64_t chunk, int64_t t, int64_t at, int64_t n) {
    sums[chunk] = is_bf16(tensors[t]) ? square_sum(values_of<BFloat16>(tensors[t]) + at, n)
                                      : square_sum(floats_of(tensors[t]) + at, n);
  });
  double all = 0;
  for (const double sum : sums) all += sum;
  *static_cast<double*>(const_cast<void*>(total.const_data_ptr())) = all;
}

// weights: the parameters themselves, or what they are rounded to, in bfloat16. gradients: of either type.
// steps: 0-dim float32, one for each parameter. averages: as many lists of parameters, one after the other,
// as there are shares. Where found_inf is not zero, the averages alone change.
void adamw(std::vector<Tensor> parameters, std::vector<Tensor> weights, std::vector<Tensor> gradients,
           std::vector<Tensor> means, std::vector<Tensor> squares, std::vector<Tensor> steps,
           std::vector<Tensor> averages, std::optional<Tensor> factor, Tensor found_inf, double lr,
           double beta1, double beta2, double eps, double weight_decay, std::vector<double> shares) {
  const int64_t count = parameters.size();
  const bool skip = *floats_of(found_inf) != 0.0f;
  const float of_gradients = factor ? *floats_of(*factor) : 1.0f;
  std::vector<Step> numbers(count);
  for (int64_t i = 0; i < count && !skip; ++i) {
    float* const step = floats_of(steps[i]);
    *step += 1.0f;
    const double bias1 = 1 - std::pow(beta1, *step), bias2 = 1 - std::pow(beta2, *step);
    numbers[i] = {.kept = static_cast<float>(1 - lr * weight_decay),
                  .mean_weight = static_cast<float>(1 - beta1),
                  .beta2 = static_cast<float>(beta2),
                  .square_weight = static_cast<float>(1 - beta2),
                  .size = static_cast<float>(-(lr / bias1)),
                  .root = static_cast<float>(std::sqrt(bias2)),
                  .eps = static_cast<float>(eps)};
  }
  Chunks(parameters).for_each([&](int64_t, int64_t t, int64_t at, int64_t n) {
    Place place;
    place.parameters = floats_of(parameters[t]) + at;
    if (!skip) {
      if (is_bf16(weights[t])) place.rounded = values_of<BFloat16>(weights[t]) + at;
      if (is_bf16(gradients[t])) {
        place.gradients16 = values_of<BFloat16>(gradients[t]) + at;
      } else {
        place.gradients = floats_of(gradients[t]) + at;
      }
      place.means = floats_of(means[t]) + at;
      place.squares = floats_of(squares[t]) + at;
    }
    for (size_t a = 0; a < shares.size(); ++a) {
      place.averages.push_back(floats_of(averages[a * count + t]) + at);
    }
    update(skip ? nullptr : &numbers[t], of_gradients, place, shares, n);
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CPU, m) {
  m.impl("square_sum", TORCH_BOX(&square_sum_of_tensors));
  m.impl("adamw", TORCH_BOX(&adamw));
}
