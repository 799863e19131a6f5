// Window attention on CPU: what the arithmetic in float32 and that in bfloat16 share. See
// window_attention.cpp.
#pragma once

#include "cpu.h"
#include "products.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <vector>

namespace {

using d2it::as;
using d2it::BFloat16;
using d2it::Floats;
using d2it::Half;
using d2it::kLanes;
using d2it::kWide;
using d2it::Matrix;
using d2it::multiply;
using d2it::pitch_of;
using d2it::round_up;
using d2it::transpose;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kQueries = 64;
constexpr int64_t kPairsPerThread = 1 << 19; // multiply-adds; fewer are not worth waking a thread for
constexpr int64_t kRuns = 128;               // of windows, at most, whose bias gradients are summed apart
constexpr int64_t kSumsBytes = 1 << 26;      // of all those sums
constexpr int64_t kCacheBytes = 1 << 18;     // of the biases, and of their sums, of the heads taken together
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// ----------------------------------------------------------------------------------------------------
// Softmax

// What is added to the scores of one window and head.
struct Bias {
  const float* matrix; // N x N or null
  int64_t n;
  const int32_t* positions; // of the tokens, or null where they are all there
  const uint16_t* there;    // with positions: a bit for each of 16 positions, set where there is a token
  const int64_t* segments;  // of the tokens, or null
  float* room;              // for n and a vector more
};

template <typename V>
constexpr int kLanesOf = sizeof(V) / sizeof(float);

// The lanes of a vector, by halves, down to one: with `combine(v, w)` of every pair.
template <typename V, typename F>
D2IT_INLINE float fold(const V& v, const F& combine) {
  if constexpr (kLanesOf<V> == kWide) {
    return fold(combine(as<Floats<kLanes>>((const float*)&v), as<Floats<kLanes>>((const float*)&v + kLanes)),
                combine);
  } else {
    const V a = combine(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    const V b = combine(a, __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5));
    return combine(b, __builtin_shufflevector(b, b, 1, 0, 3, 2, 5, 4, 7, 6))[0];
  }
}

template <typename V>
D2IT_INLINE float largest(const V& v) {
  return fold(v, [](const auto& x, const auto& y) __attribute__((always_inline)) { return y > x ? y : x; });
}

template <typename V>
D2IT_INLINE float total(const V& v) {
  return fold(v, [](const auto& x, const auto& y) __attribute__((always_inline)) { return x + y; });
}

#ifdef D2IT_HAS_V4
// Of a line of n the entries at the tokens' positions, closed up; into the room.
D2IT_V4 void close_up_wide(const float* line, const Bias& bias) {
  float* to = bias.room;
  for (int64_t i = 0; i < bias.n; i += kWide) {
    const __mmask16 there = bias.there[i / kWide];
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(there, _mm512_maskz_loadu_ps(there, line + i)));
    to += __builtin_popcount(there);
  }
}

// The other way: entries of tokens are added to those of a line at their positions.
D2IT_V4 void add_apart_wide(const float* row, const Bias& bias, float* line) {
  for (int64_t i = 0; i < bias.n; i += kWide) {
    const __mmask16 there = bias.there[i / kWide];
    const int count = __builtin_popcount(there);
    const __m512 added = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << count) - 1), row);
    const __m512 sum = _mm512_maskz_loadu_ps(there, line + i) + _mm512_maskz_expand_ps(there, added);
    _mm512_mask_storeu_ps(line + i, there, sum);
    row += count;
  }
}
#endif

// The biases of a query, one for each token.
template <typename V>
D2IT_INLINE const float* line_of(int64_t query, int64_t tokens, const Bias& bias) {
  if (!bias.positions) return bias.matrix + query * bias.n;
  const float* line = bias.matrix + bias.positions[query] * bias.n;
#ifdef D2IT_HAS_V4
  if constexpr (kLanesOf<V> == kWide) {
    close_up_wide(line, bias);
    return bias.room;
  }
#endif
  for (int64_t k = 0; k < tokens; ++k) bias.room[k] = line[bias.positions[k]];
  return bias.room;
}

// A row of scores, scaled and biased; returns its largest. Past the tokens it is minus infinity.
template <typename V>
D2IT_INLINE float bias_row(float* row, int64_t query, int64_t tokens, float scale, const Bias& bias) {
  constexpr int lanes = kLanesOf<V>;
  const int64_t padded = round_up(tokens, lanes);
  V most = V{} + kMinusInfinity;
  int64_t j = 0;
  if (bias.matrix) {
    const float* line = line_of<V>(query, tokens, bias);
    for (; j + lanes <= tokens; j += lanes) {
      const V score = as<V>(row + j) * scale + as<V>(line + j);
      as<V>(row + j) = score;
      most = score > most ? score : most;
    }
    for (int64_t k = j; k < tokens; ++k) row[k] = row[k] * scale + line[k];
  } else {
    for (; j + lanes <= tokens; j += lanes) {
      const V score = as<V>(row + j) *= scale;
      most = score > most ? score : most;
    }
    for (int64_t k = j; k < tokens; ++k) row[k] *= scale;
  }
  if (bias.segments) {
    const int64_t own = bias.segments[query];
    for (int64_t k = 0; k < tokens; ++k) row[k] = bias.segments[k] == own ? row[k] : kMinusInfinity;
    most = V{} + kMinusInfinity;
    j = 0;
  }
  for (int64_t k = tokens; k < padded; ++k) row[k] = kMinusInfinity;
  for (; j < padded; j += lanes) most = as<V>(row + j) > most ? as<V>(row + j) : most;
  return largest(most);
}

// Scores of queries begin .. begin + rows become exp(scale * score + bias - its row's maximum), zero past the
// tokens; inverse_sums: of the rows.
template <typename V>
D2IT_INLINE void softmax_rows(const Matrix& scores, int64_t begin, int64_t rows, int64_t tokens, float scale,
                              const Bias& bias, float* inverse_sums) {
  const int64_t padded = round_up(tokens, kLanesOf<V>);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores.row(i);
    const float most = bias_row<V>(row, begin + i, tokens, scale, bias);
    // A query that sees no key: its weights are zero, and so is what is divided by their sum.
    const float shift = most == kMinusInfinity ? 0.0f : most;
    V sums{};
    for (int64_t j = 0; j < padded; j += kLanesOf<V>) {
      const V y = as<V>(row + j) - shift;
      const V p = y < -87.0f ? V{} : d2it::exp_negative(y); // NaN stays NaN
      sums += as<V>(row + j) = p;
    }
    const float sum = total(sums);
    inverse_sums[i] = 1.0f / (sum == 0.0f ? 1.0f : sum);
  }
}

D2IT_V4 void softmax_wide(const Matrix& scores, int64_t begin, int64_t rows, int64_t tokens, float scale,
                          const Bias& bias, float* inverse_sums) {
  softmax_rows<Floats<kWide>>(scores, begin, rows, tokens, scale, bias, inverse_sums);
}
D2IT_CLONES_256 void softmax_narrow(const Matrix& scores, int64_t begin, int64_t rows, int64_t tokens,
                                    float scale, const Bias& bias, float* inverse_sums) {
  softmax_rows<Floats<kLanes>>(scores, begin, rows, tokens, scale, bias, inverse_sums);
}
constexpr auto softmax = [](auto&&... args) { (d2it::wide() ? softmax_wide : softmax_narrow)(args...); };

// Rows of a matrix, each times its factor.
D2IT_CLONES void multiply_rows(const Matrix& matrix, int64_t begin, int64_t rows, int64_t width,
                               const float* factors) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; j += kLanes) as<Floats<kLanes>>(matrix.row(begin + i) + j) *= factors[i];
}

template <typename V>
D2IT_INLINE void add_apart(const float* row, int64_t tokens, const Bias& bias, float* line) {
#ifdef D2IT_HAS_V4
  if constexpr (kLanesOf<V> == kWide) return add_apart_wide(row, bias, line);
#endif
  for (int64_t j = 0; j < tokens; ++j) line[bias.positions[j]] += row[j];
}

// ds = p * (dp - rowsum(p dp)), in the place of dp. The weights come as e = p * sum and dp divided by the
// sum, so that nothing is normalised pair by pair. ds is added to the sum of the bias's gradient, N x N, if
// there is one; or it is the sum, where that is `fresh` and all positions hold a token.
template <typename V>
D2IT_INLINE void softmax_backward_rows(const Matrix& e, const Matrix& dp, int64_t begin, int64_t rows,
                                       int64_t tokens, const float* inverse_sums, const Bias& bias,
                                       float* sum, bool fresh) {
  constexpr int lanes = kLanesOf<V>;
  const int64_t padded = round_up(tokens, lanes);
  for (int64_t i = 0; i < rows; ++i) {
    const float* weights = e.row(i);
    float* row = dp.row(i);
    V sums{};
    for (int64_t j = 0; j < padded; j += lanes) sums += as<V>(weights + j) * as<V>(row + j);
    const float delta = total(sums) * inverse_sums[i];
    for (int64_t j = 0; j < padded; j += lanes)
      as<V>(row + j) = as<V>(weights + j) * (as<V>(row + j) - delta);
    if (!sum) continue;
    if (bias.positions) {
      add_apart<V>(row, tokens, bias, sum + bias.positions[begin + i] * bias.n);
    } else if (fresh) {
      std::memcpy(sum + (begin + i) * bias.n, row, tokens * sizeof(float));
    } else {
      float* line = sum + (begin + i) * bias.n;
      int64_t j = 0;
      for (; j + lanes <= tokens; j += lanes) as<V>(line + j) += as<V>(row + j);
      for (; j < tokens; ++j) line[j] += row[j];
    }
  }
}

D2IT_V4 void softmax_backward_wide(const Matrix& e, const Matrix& dp, int64_t begin, int64_t rows,
                                   int64_t tokens, const float* inverse_sums, const Bias& bias, float* sum,
                                   bool fresh) {
  softmax_backward_rows<Floats<kWide>>(e, dp, begin, rows, tokens, inverse_sums, bias, sum, fresh);
}
D2IT_CLONES_256 void softmax_backward_narrow(const Matrix& e, const Matrix& dp, int64_t begin, int64_t rows,
                                             int64_t tokens, const float* inverse_sums, const Bias& bias,
                                             float* sum, bool fresh) {
  softmax_backward_rows<Floats<kLanes>>(e, dp, begin, rows, tokens, inverse_sums, bias, sum, fresh);
}
constexpr auto softmax_backward = [](auto&&... args) {
  (d2it::wide() ? softmax_backward_wide : softmax_backward_narrow)(args...);
};

D2IT_CLONES void add_floats(const float* __restrict from, float* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// ----------------------------------------------------------------------------------------------------
// Rows of heads

// q, k, v or a gradient: (W, N, H, D), or (T, H, D) with slots. The row of a token of a head starts at its
// token's offset + head * head.
struct Heads {
  char* data;
  int64_t window, token, head, dim; // strides in elements

  Heads(const Tensor& t, bool packed)
      : data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))),
        window(packed ? 0 : t.stride(0)),
        token(t.stride(packed ? 0 : 1)),
        head(t.stride(packed ? 1 : 2)),
        dim(t.size(packed ? 2 : 3) > 1 ? t.stride(packed ? 2 : 3) : 1) {}

  int64_t first(int64_t window_index, int64_t h) const { return window_index * window + h * head; }
};

template <typename T>
D2IT_INLINE void read_rows(const Heads& from, int64_t first, const int32_t* rows, int64_t count,
                           int64_t width, const Matrix& to) {
  const T* base = reinterpret_cast<const T*>(from.data) + first;
  for (int64_t i = 0; i < count; ++i) {
    const T* in = base + rows[i] * from.token;
    float* __restrict out = to.row(i);
    d2it::widen(in, from.dim, out, width);
  }
  // Rows up to whole vectors of them enter products and transposes: what they give is not read, but for
  // zeros.
  for (int64_t i = count; i < round_up(count, kWide); ++i) std::memset(to.row(i), 0, width * sizeof(float));
}

D2IT_INLINE void store(float v, float* to) { *to = v; }
template <typename T>
D2IT_INLINE void store(float v, T* to) {
  to->bits = static_cast<uint16_t>(d2it::bits_as(v, T{}));
}

// factors: one for each row, or null for `factor`.
template <typename T>
D2IT_INLINE void write_rows(const Heads& to, int64_t first, const int32_t* rows, int64_t count, int64_t width,
                            const Matrix& from, const float* factors, float factor) {
  T* base = reinterpret_cast<T*>(to.data) + first;
  for (int64_t i = 0; i < count; ++i) {
    T* out = base + rows[i] * to.token; // the last axis of a result is contiguous
    const float* __restrict in = from.row(i);
    const float by = factors ? factors[i] : factor;
    for (int64_t d = 0; d < width; ++d) store(in[d] * by, out + d);
  }
}

#define D2IT_ROWS(T, name)                                                                               \
  D2IT_CLONES void read_##name(const Heads& from, int64_t first, const int32_t* rows, int64_t count,     \
                               int64_t width, const Matrix& to) {                                        \
    read_rows<T>(from, first, rows, count, width, to);                                                   \
  }                                                                                                      \
  D2IT_CLONES void write_##name(const Heads& to, int64_t first, const int32_t* rows, int64_t count,      \
                                int64_t width, const Matrix& from, const float* factors, float factor) { \
    write_rows<T>(to, first, rows, count, width, from, factors, factor);                                 \
  }
D2IT_ROWS(float, floats)
D2IT_ROWS(Half, halves)
D2IT_ROWS(BFloat16, bfloats)
#undef D2IT_ROWS

// How rows of a dtype are read and written.
struct Access {
  decltype(&read_floats) read;
  decltype(&write_floats) write;

  explicit Access(ScalarType dtype) {
    switch (dtype) {
      case ScalarType::Float:
        read = read_floats, write = write_floats;
        return;
      case ScalarType::Half:
        read = read_halves, write = write_halves;
        return;
      case ScalarType::BFloat16:
        read = read_bfloats, write = write_bfloats;
        return;
      default:
        d2it::fail("window attention on CPU takes float32, float16 and bfloat16");
    }
  }
};

// ----------------------------------------------------------------------------------------------------
// The problem

struct Problem {
  int64_t windows, n, heads, width, tokens; // tokens: rows there are; windows * n where all windows are full
  bool packed;
  const int32_t* slots = nullptr; // null too where there are none of them
  int64_t slots_window = 0, slots_token = 0;
  const float* bias = nullptr; // (bias_windows, bias_heads, n, n) contiguous
  int64_t bias_windows = 1, bias_heads = 1;
  const int64_t* segments = nullptr; // (segment_windows, n) contiguous
  int64_t segment_windows = 1;
  float scale;

  Problem(const Tensor& q, const std::optional<Tensor>& bias, const std::optional<Tensor>& slots,
          const std::optional<Tensor>& segments, double scale)
      : packed(slots.has_value()), scale(static_cast<float>(scale)) {
    const int64_t head_dim = slots ? 1 : 2;
    heads = q.size(head_dim);
    width = q.size(head_dim + 1);
    windows = slots ? slots->size(0) : q.size(0);
    n = slots ? slots->size(1) : q.size(1);
    tokens = slots ? q.size(0) : windows * n;
    if (slots) {
      this->slots = static_cast<const int32_t*>(slots->const_data_ptr());
      slots_window = slots->stride(0);
      slots_token = slots->stride(1);
    }
    if (bias) {
      this->bias = static_cast<const float*>(bias->const_data_ptr());
      bias_windows = bias->size(0);
      bias_heads = bias->size(1);
    }
    if (segments) {
      this->segments = static_cast<const int64_t*>(segments->const_data_ptr());
      segment_windows = segments->size(0);
    }
  }

  bool empty() const { return windows == 0 || n == 0 || heads == 0 || width == 0; }

  // Heads that are taken through a window one after the other: as many as keep their biases in the cache.
  int64_t heads_together() const {
    return std::clamp<int64_t>(kCacheBytes / (n * n * static_cast<int64_t>(sizeof(float))), 1, heads);
  }

  // Windows of a head that are worth a thread.
  int64_t windows_per_thread(int64_t products) const {
    return kPairsPerThread / (products * n * n * width + 1) + 1;
  }
};

// The tokens of a window.
struct Window {
  int64_t index, tokens = 0;
  std::vector<int32_t> rows, positions; // rows: in the window where it is dense
  std::vector<uint16_t> there;          // see Bias
  std::vector<int64_t> segments;
  std::unique_ptr<float[]> room; // see Bias

  explicit Window(const Problem& p)
      : rows(p.n),
        positions(p.n),
        there((p.n + kWide - 1) / kWide),
        segments(p.segments ? p.n : 0),
        room(new float[p.n + kWide]) {
    for (int64_t i = 0; i < p.n; ++i) rows[i] = static_cast<int32_t>(i);
  }

  void move_to(const Problem& p, int64_t window) {
    index = window;
    tokens = p.n;
    if (p.packed) {
      tokens = 0;
      std::fill(there.begin(), there.end(), 0);
      for (int64_t i = 0; i < p.n; ++i) {
        const int32_t row = p.slots[window * p.slots_window + i * p.slots_token];
        rows[tokens] = row;
        positions[tokens] = static_cast<int32_t>(i);
        tokens += row >= 0;
        there[i / kWide] |= static_cast<uint16_t>((row >= 0) << i % kWide);
      }
    }
    if (p.segments) {
      const int64_t* ids = p.segments + window % p.segment_windows * p.n;
      for (int64_t i = 0; i < tokens; ++i) segments[i] = ids[p.packed ? positions[i] : i];
    }
  }

  Bias bias(const Problem& p, int64_t head) const {
    const int64_t matrix = index % p.bias_windows * p.bias_heads + (p.bias_heads > 1 ? head : 0);
    return {p.bias ? p.bias + matrix * p.n * p.n : nullptr, p.n,
            tokens < p.n ? positions.data() : nullptr,      there.data(),
            p.segments ? segments.data() : nullptr,         room.get()};
  }
};

// What a thread works in: matrices that live as long as this.
class Scratch {
 public:
  explicit Scratch(const Problem& p) : problem_(p) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (float* block : blocks_) ::operator delete(block, std::align_val_t{64});
  }

  const Problem& problem() const { return problem_; }

  // Zero, since products take whole vectors, and what lies in memory by chance may be slow to multiply.
  Matrix matrix(int64_t rows, int64_t columns) {
    const int64_t pitch = pitch_of(columns), bytes = round_up(rows, kWide) * pitch * sizeof(float);
    auto* data = static_cast<float*>(::operator new(bytes, std::align_val_t{64}));
    std::memset(data, 0, bytes);
    blocks_.push_back(data);
    return {data, pitch};
  }

 private:
  const Problem& problem_;
  std::vector<float*> blocks_;
};

// Which rows of a packed tensor no slot names. Empty where one names a row that is not there, or one a second
// time.
std::vector<uint8_t> unnamed_rows(const Problem& p) {
  std::vector<uint8_t> unnamed(p.tokens + 1, 1);
  for (int64_t w = 0; w < p.windows; ++w)
    for (int64_t i = 0; i < p.n; ++i) {
      const int32_t row = p.slots[w * p.slots_window + i * p.slots_token];
      if (row < 0) continue;
      if (row >= p.tokens || !unnamed[row]) return {};
      unnamed[row] = 0;
    }
  return unnamed;
}

// Zeros the rows of results, (T, H, D) each; rows of a head are contiguous.
bool clear_unnamed(const Problem& p, std::initializer_list<const Heads*> results, int64_t element) {
  if (!p.packed) return true;
  const std::vector<uint8_t> unnamed = unnamed_rows(p);
  if (unnamed.empty()) return false;
  for (int64_t row = 0; row < p.tokens; ++row)
    if (unnamed[row])
      for (const Heads* to : results)
        for (int64_t h = 0; h < p.heads; ++h)
          std::memset(to->data + (row * to->token + h * to->head) * element, 0, p.width * element);
  return true;
}

// ----------------------------------------------------------------------------------------------------
// The tensors of a call

struct Forward {
  const Problem& p;
  Access access;
  Heads q, k, v, out;
};

struct Backward {
  const Problem& p;
  Access access;
  Heads grad, q, k, v, dq, dk, dv;
  // Where the bias's gradient is wanted: (runs, bias_windows, heads, n, n).
  int64_t runs = 1;
  float* sums = nullptr;
};

} // namespace
