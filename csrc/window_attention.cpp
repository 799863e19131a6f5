// Attention inside windows on CPU (D2iT, Eq. 10): softmax(q k^T * scale + bias) v over the tokens that exist.
//
// The work is cut into a window of one head at a time. Its rows are gathered into dense float32 matrices,
// only those of tokens: what a window costs follows the square of its tokens, whatever its size. Matrices are
// padded to whole vectors, and all products go through one small kernel whose 4 x 24 sums stay in registers.
// Scores exist for kQueries queries at a time, so that they stay in the L2 cache; the backward computes them
// again.
//
// The gradient of the bias is added up in float32 over runs of windows that depend on the shapes alone, then
// over those runs in their order: the same bits for any number of threads.
#include "cpu.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
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
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLanes = 8;
constexpr int kRows = 4;
constexpr int kDepth = 32; // products that one sum takes up before it is added to the others: see `multiply`
constexpr int kQueries = 64;
constexpr int64_t kPairsPerThread = 1 << 19; // multiply-adds; fewer are not worth waking a thread for
constexpr int64_t kRuns = 128;               // of windows, at most, whose bias gradients are summed apart
constexpr int64_t kSumsBytes = 1 << 26;      // of all those sums
constexpr int64_t kCacheBytes = 1 << 18;     // of the biases, and of their sums, of the heads taken together
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

using V = Floats<kLanes>;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Floats from one row of a matrix to the next: whole vectors, and an odd number of cache lines, since rows at
// a multiple of a power of two would share a few sets of the cache.
int64_t pitch_of(int64_t columns) {
  constexpr int64_t line = 64 / sizeof(float);
  return (round_up(columns, line) / line | 1) * line;
}

struct Matrix {
  float* data;
  int64_t pitch;
  float* row(int64_t i) const { return data + i * pitch; }
};

// ----------------------------------------------------------------------------------------------------
// Products

// kWidth vectors of columns of c (rows x ...) = or += a b; element (i, k) of a lies at a[i * a_row + k *
// a_column].
template <int kWidth>
D2IT_INLINE void multiply_columns(const float* a, int64_t a_row, int64_t a_column, const float* b,
                                  int64_t b_pitch, int64_t rows, int64_t depth, float* c, int64_t c_pitch,
                                  bool add) {
  for (int64_t i = 0; i < rows; i += kRows, a += kRows * a_row, c += kRows * c_pitch) {
    const float *in = a, *line = b;
    for (int64_t begin = 0; begin < depth; begin += kDepth) {
      V sums[kRows][kWidth] = {};
      for (int64_t k = begin; k < std::min<int64_t>(begin + kDepth, depth); ++k) {
        V v[kWidth];
        for (int j = 0; j < kWidth; ++j) v[j] = as<V>(line + j * kLanes);
        for (int r = 0; r < kRows; ++r)
          for (int j = 0; j < kWidth; ++j) sums[r][j] += in[r * a_row] * v[j];
        in += a_column, line += b_pitch;
      }
      for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kWidth; ++j) {
          V& sum = as<V>(c + r * c_pitch + j * kLanes);
          sum = add || begin ? sum + sums[r][j] : sums[r][j];
        }
    }
  }
}

// c (rows x columns) = or += a (rows x depth) b (depth x columns). Rows are taken up to a multiple of kRows,
// columns of kLanes: a and c have room for them. Sums of kDepth products each are summed: one sum over all of
// a long row would lose a bit more than the libraries' products do.
D2IT_CLONES void multiply(const float* a, int64_t a_row, int64_t a_column, const Matrix& b, int64_t rows,
                          int64_t columns, int64_t depth, const Matrix& c, bool add) {
  int64_t j = 0;
  for (; columns - j > 2 * kLanes; j += 3 * kLanes)
    multiply_columns<3>(a, a_row, a_column, b.data + j, b.pitch, rows, depth, c.data + j, c.pitch, add);
  if (columns - j > kLanes)
    multiply_columns<2>(a, a_row, a_column, b.data + j, b.pitch, rows, depth, c.data + j, c.pitch, add);
  else if (columns > j)
    multiply_columns<1>(a, a_row, a_column, b.data + j, b.pitch, rows, depth, c.data + j, c.pitch, add);
}

// out (columns x rows) = in (rows x columns), both padded to whole vectors.
D2IT_CLONES void transpose(const Matrix& in, int64_t rows, int64_t columns, const Matrix& out) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      V x[kLanes], y[kLanes];
      for (int k = 0; k < kLanes; ++k) x[k] = as<V>(in.row(i + k) + j);
      for (int k = 0; k < kLanes; k += 2) {
        y[k] = __builtin_shufflevector(x[k], x[k + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        y[k + 1] = __builtin_shufflevector(x[k], x[k + 1], 1, 9, 3, 11, 5, 13, 7, 15);
      }
      for (int k = 0; k < kLanes; k += 4)
        for (int l = k; l < k + 2; ++l) {
          x[l] = __builtin_shufflevector(y[l], y[l + 2], 0, 1, 8, 9, 4, 5, 12, 13);
          x[l + 2] = __builtin_shufflevector(y[l], y[l + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
      for (int l = 0; l < 4; ++l) {
        as<V>(out.row(j + l) + i) = __builtin_shufflevector(x[l], x[l + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        as<V>(out.row(j + l + 4) + i) = __builtin_shufflevector(x[l], x[l + 4], 4, 5, 6, 7, 12, 13, 14, 15);
      }
    }
}

// ----------------------------------------------------------------------------------------------------
// Softmax

// What is added to the scores of one window and head.
struct Bias {
  const float* matrix; // N x N or null
  int64_t n;
  const int32_t* positions; // of the tokens, or null where they are all there
  const int64_t* segments;  // of the tokens, or null
};

D2IT_INLINE float largest(V v) {
  float most = v[0];
  for (int k = 1; k < kLanes; ++k) most = v[k] > most ? v[k] : most;
  return most;
}

D2IT_INLINE float total(V v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// A row of scores, scaled and biased; returns its largest. Past the tokens it is minus infinity.
D2IT_INLINE float bias_row(float* row, int64_t query, int64_t tokens, float scale, const Bias& bias) {
  const int64_t padded = round_up(tokens, kLanes);
  V most = V{} + kMinusInfinity;
  int64_t j = 0;
  if (bias.matrix && !bias.positions && !bias.segments) {
    const float* line = bias.matrix + query * bias.n;
    for (; j + kLanes <= tokens; j += kLanes) {
      const V score = as<V>(row + j) * scale + as<V>(line + j);
      as<V>(row + j) = score;
      most = score > most ? score : most;
    }
    for (int64_t k = j; k < tokens; ++k) row[k] = row[k] * scale + line[k];
  } else if (bias.matrix && bias.positions) {
    const float* line = bias.matrix + bias.positions[query] * bias.n;
    for (int64_t k = 0; k < tokens; ++k) row[k] = row[k] * scale + line[bias.positions[k]];
  } else if (bias.matrix) {
    const float* line = bias.matrix + query * bias.n;
    for (int64_t k = 0; k < tokens; ++k) row[k] = row[k] * scale + line[k];
  } else {
    for (int64_t k = 0; k < tokens; ++k) row[k] *= scale;
  }
  if (bias.segments) {
    const int64_t own = bias.segments[query];
    for (int64_t k = 0; k < tokens; ++k) row[k] = bias.segments[k] == own ? row[k] : kMinusInfinity;
  }
  for (int64_t k = tokens; k < padded; ++k) row[k] = kMinusInfinity;
  for (; j < padded; j += kLanes) most = as<V>(row + j) > most ? as<V>(row + j) : most;
  return largest(most);
}

// Scores of queries begin .. begin + rows become exp(scale * score + bias - its row's maximum), zero past the
// tokens; inverse_sums: of the rows.
D2IT_CLONES void softmax(const Matrix& scores, int64_t begin, int64_t rows, int64_t tokens, float scale,
                         const Bias& bias, float* inverse_sums) {
  const int64_t padded = round_up(tokens, kLanes);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores.row(i);
    const float most = bias_row(row, begin + i, tokens, scale, bias);
    // A query that sees no key: its weights are zero, and so is what is divided by their sum.
    const float shift = most == kMinusInfinity ? 0.0f : most;
    V sums{};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const V y = as<V>(row + j) - shift;
      const V p = y >= -87.0f ? d2it::exp_negative(y) : y != y ? y : V{};
      sums += as<V>(row + j) = p;
    }
    const float sum = total(sums);
    inverse_sums[i] = 1.0f / (sum == 0.0f ? 1.0f : sum);
  }
}

// Rows of a matrix, each times its factor.
D2IT_CLONES void multiply_rows(const Matrix& matrix, int64_t begin, int64_t rows, int64_t width,
                               const float* factors) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; j += kLanes) as<V>(matrix.row(begin + i) + j) *= factors[i];
}

// ds = p * (dp - rowsum(p dp)), in the place of dp. The weights come as e = p * sum and dp divided by the
// sum, so that nothing is normalised pair by pair. ds is added to the sum of the bias's gradient, N x N, if
// there is one.
D2IT_CLONES void softmax_backward(const Matrix& e, const Matrix& dp, int64_t begin, int64_t rows,
                                  int64_t tokens, const float* inverse_sums, const Bias& bias, float* sum) {
  const int64_t padded = round_up(tokens, kLanes);
  for (int64_t i = 0; i < rows; ++i) {
    const float* weights = e.row(i);
    float* row = dp.row(i);
    V sums{};
    for (int64_t j = 0; j < padded; j += kLanes) sums += as<V>(weights + j) * as<V>(row + j);
    const float delta = total(sums) * inverse_sums[i];
    for (int64_t j = 0; j < padded; j += kLanes)
      as<V>(row + j) = as<V>(weights + j) * (as<V>(row + j) - delta);
    if (!sum) continue;
    if (bias.positions) {
      float* line = sum + bias.positions[begin + i] * bias.n;
      for (int64_t j = 0; j < tokens; ++j) line[bias.positions[j]] += row[j];
    } else {
      float* line = sum + (begin + i) * bias.n;
      int64_t j = 0;
      for (; j + kLanes <= tokens; j += kLanes) as<V>(line + j) += as<V>(row + j);
      for (; j < tokens; ++j) line[j] += row[j];
    }
  }
}

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
};

template <typename T>
D2IT_INLINE void read_rows(const Heads& from, int64_t first, const int32_t* rows, int64_t count,
                           int64_t width, const Matrix& to) {
  const T* base = reinterpret_cast<const T*>(from.data) + first;
  for (int64_t i = 0; i < count; ++i) {
    const T* in = base + rows[i] * from.token;
    float* __restrict out = to.row(i);
    d2it::widen(in, from.dim, out, width);
    for (int64_t d = width; d < round_up(width, kLanes); ++d) out[d] = 0;
  }
  // Rows up to whole vectors of them enter products and transposes: what they give is not read, but for
  // zeros.
  for (int64_t i = count; i < round_up(count, kLanes); ++i)
    std::memset(to.row(i), 0, round_up(width, kLanes) * sizeof(float));
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
  std::vector<int64_t> segments;

  explicit Window(const Problem& p) : rows(p.n), positions(p.n), segments(p.segments ? p.n : 0) {
    for (int64_t i = 0; i < p.n; ++i) rows[i] = static_cast<int32_t>(i);
  }

  void move_to(const Problem& p, int64_t window) {
    index = window;
    tokens = p.n;
    if (p.packed) {
      tokens = 0;
      for (int64_t i = 0; i < p.n; ++i) {
        const int32_t row = p.slots[window * p.slots_window + i * p.slots_token];
        rows[tokens] = row;
        positions[tokens] = static_cast<int32_t>(i);
        tokens += row >= 0;
      }
    }
    if (p.segments) {
      const int64_t* ids = p.segments + window % p.segment_windows * p.n;
      for (int64_t i = 0; i < tokens; ++i) segments[i] = ids[p.packed ? positions[i] : i];
    }
  }

  Bias bias(const Problem& p, int64_t head) const {
    const int64_t matrix = index % p.bias_windows * p.bias_heads + (p.bias_heads > 1 ? head : 0);
    return {p.bias ? p.bias + matrix * p.n * p.n : nullptr, p.n, tokens < p.n ? positions.data() : nullptr,
            p.segments ? segments.data() : nullptr};
  }
};

// What a thread works in: matrices for windows of n tokens.
class Scratch {
 public:
  explicit Scratch(const Problem& p) : problem_(p) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (float* block : blocks_) ::operator delete(block, std::align_val_t{64});
  }

  // tokens x width, width x tokens, and queries x tokens.
  Matrix rows() { return matrix(round_up(problem_.n, kLanes), problem_.width); }
  Matrix columns() { return matrix(round_up(problem_.width, kLanes), problem_.n); }
  Matrix pairs() { return matrix(round_up(std::min<int64_t>(problem_.n, kQueries), kRows), problem_.n); }

 private:
  Matrix matrix(int64_t rows, int64_t columns) {
    const int64_t pitch = pitch_of(columns);
    auto* data = static_cast<float*>(::operator new(rows * pitch * sizeof(float), std::align_val_t{64}));
    blocks_.push_back(data);
    return {data, pitch};
  }

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
// Forward

struct Forward {
  const Problem& p;
  Access access;
  Heads q, k, v, out;

  // Windows of units begin .. end: unit u is window u % W of the heads from u / W * heads_together on.
  void run(int64_t begin, int64_t end) const {
    Scratch scratch(p);
    const Matrix b_q = scratch.rows(), b_k = scratch.rows(), b_v = scratch.rows(), b_out = scratch.rows();
    const Matrix b_kt = scratch.columns(), scores = scratch.pairs();
    float inverse_sums[kQueries];
    Window window(p);
    const int64_t together = p.heads_together();
    for (int64_t unit = begin; unit < end; ++unit) {
      window.move_to(p, unit % p.windows);
      const int64_t tokens = window.tokens, first_head = unit / p.windows * together;
      const int32_t* rows = window.rows.data();
      for (int64_t h = first_head; tokens && h < std::min(first_head + together, p.heads); ++h) {
        access.read(q, window.index * q.window + h * q.head, rows, tokens, p.width, b_q);
        access.read(k, window.index * k.window + h * k.head, rows, tokens, p.width, b_k);
        access.read(v, window.index * v.window + h * v.head, rows, tokens, p.width, b_v);
        transpose(b_k, tokens, p.width, b_kt);
        const Bias bias = window.bias(p, h);
        for (int64_t i = 0; i < tokens; i += kQueries) {
          const int64_t queries = std::min<int64_t>(kQueries, tokens - i);
          multiply(b_q.row(i), b_q.pitch, 1, b_kt, queries, tokens, p.width, scores, false);
          softmax(scores, i, queries, tokens, p.scale, bias, inverse_sums);
          multiply(scores.data, scores.pitch, 1, b_v, queries, p.width, tokens, b_out, false);
          access.write(out, window.index * out.window + h * out.head, rows + i, queries, p.width, b_out,
                       inverse_sums, 1.0f);
        }
      }
    }
  }
};

// False where slots name a row that is not there, or one twice; nothing is written then.
bool window_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias, std::optional<Tensor> slots,
                      std::optional<Tensor> segment_ids, double scale, Tensor out) {
  const Problem p(q, bias, slots, segment_ids, scale);
  const Forward work{p,
                     Access(q.scalar_type()),
                     Heads(q, p.packed),
                     Heads(k, p.packed),
                     Heads(v, p.packed),
                     Heads(out, p.packed)};
  if (!clear_unnamed(p, {&work.out}, q.element_size())) return false;
  if (p.empty()) return true;
  const int64_t units = p.windows * ((p.heads + p.heads_together() - 1) / p.heads_together());
  torch::stable::parallel_for(0, units, p.windows_per_thread(2 * p.heads_together()),
                              [&](int64_t begin, int64_t end) { work.run(begin, end); });
  return true;
}

// ----------------------------------------------------------------------------------------------------
// Backward

struct Backward {
  const Problem& p;
  Access access;
  Heads grad, q, k, v, dq, dk, dv;
  // Where the bias's gradient is wanted: (runs, bias_windows, heads, n, n).
  int64_t runs;
  float* sums;

  // Tasks begin .. end: a run of the windows of one residue modulo bias_windows, of the heads taken together.
  void run(int64_t begin, int64_t end) const {
    Scratch scratch(p);
    const Matrix b_q = scratch.rows(), b_k = scratch.rows(), b_v = scratch.rows(), b_grad = scratch.rows();
    const Matrix b_dq = scratch.rows(), b_dk = scratch.rows(), b_dv = scratch.rows();
    const Matrix b_kt = scratch.columns(), b_vt = scratch.columns();
    const Matrix weights = scratch.pairs(), ds = scratch.pairs();
    float inverse_sums[kQueries];
    Window window(p);
    const int64_t together = p.heads_together(), matrix = p.n * p.n;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t run = task % runs, residue = task / runs % p.bias_windows;
      const int64_t first_head = task / runs / p.bias_windows * together;
      const int64_t last_head = std::min(first_head + together, p.heads);
      const int64_t repeats = (p.windows - residue + p.bias_windows - 1) / p.bias_windows;
      float* own = sums ? sums + (run * p.bias_windows + residue) * p.heads * matrix : nullptr;
      if (own) std::memset(own + first_head * matrix, 0, (last_head - first_head) * matrix * sizeof(float));
      for (int64_t r = repeats * run / runs; r < repeats * (run + 1) / runs; ++r) {
        window.move_to(p, r * p.bias_windows + residue);
        const int64_t tokens = window.tokens, at = window.index;
        const int32_t* rows = window.rows.data();
        for (int64_t h = first_head; tokens && h < last_head; ++h) {
          access.read(q, at * q.window + h * q.head, rows, tokens, p.width, b_q);
          access.read(k, at * k.window + h * k.head, rows, tokens, p.width, b_k);
          access.read(v, at * v.window + h * v.head, rows, tokens, p.width, b_v);
          access.read(grad, at * grad.window + h * grad.head, rows, tokens, p.width, b_grad);
          transpose(b_k, tokens, p.width, b_kt);
          transpose(b_v, tokens, p.width, b_vt);
          const Bias bias = window.bias(p, h);
          for (int64_t i = 0; i < tokens; i += kQueries) {
            const int64_t queries = std::min<int64_t>(kQueries, tokens - i);
            const bool add = i > 0;
            multiply(b_q.row(i), b_q.pitch, 1, b_kt, queries, tokens, p.width, weights, false);
            softmax(weights, i, queries, tokens, p.scale, bias, inverse_sums);
            multiply_rows(b_grad, i, queries, p.width, inverse_sums);
            multiply(weights.data, 1, weights.pitch, {b_grad.row(i), b_grad.pitch}, tokens, p.width, queries,
                     b_dv, add);
            multiply(b_grad.row(i), b_grad.pitch, 1, b_vt, queries, tokens, p.width, ds, false);
            softmax_backward(weights, ds, i, queries, tokens, inverse_sums, bias,
                             own ? own + h * matrix : nullptr);
            multiply(ds.data, ds.pitch, 1, b_k, queries, p.width, tokens, b_dq, false);
            multiply(ds.data, 1, ds.pitch, {b_q.row(i), b_q.pitch}, tokens, p.width, queries, b_dk, add);
            access.write(dq, at * dq.window + h * dq.head, rows + i, queries, p.width, b_dq, nullptr,
                         p.scale);
          }
          access.write(dk, at * dk.window + h * dk.head, rows, tokens, p.width, b_dk, nullptr, p.scale);
          access.write(dv, at * dv.window + h * dv.head, rows, tokens, p.width, b_dv, nullptr, 1.0f);
        }
      }
    }
  }
};

// dbias (Wb, Hb, n, n) from the sums of the runs: over runs, and over heads that share a bias, in their
// order.
void add_runs(const Backward& work, float* dbias) {
  const Problem& p = work.p;
  const int64_t matrix = p.n * p.n, shared = p.bias_heads == p.heads ? 1 : p.heads;
  torch::stable::parallel_for(0, p.bias_windows * p.bias_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* to = dbias + i * matrix;
      std::memset(to, 0, matrix * sizeof(float));
      for (int64_t run = 0; run < work.runs; ++run)
        for (int64_t h = 0; h < shared; ++h)
          add_floats(work.sums + (run * p.bias_windows * p.heads + i * shared + h) * matrix, to, matrix);
    }
  });
}

// dbias: float32, or absent where it is not needed. Returns false as the forward does.
bool window_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias,
                               std::optional<Tensor> slots, std::optional<Tensor> segment_ids, double scale,
                               Tensor dq, Tensor dk, Tensor dv, std::optional<Tensor> dbias) {
  const Problem p(q, bias, slots, segment_ids, scale);
  Backward work{p,
                Access(q.scalar_type()),
                Heads(grad, p.packed),
                Heads(q, p.packed),
                Heads(k, p.packed),
                Heads(v, p.packed),
                Heads(dq, p.packed),
                Heads(dk, p.packed),
                Heads(dv, p.packed),
                1,
                nullptr};
  if (!clear_unnamed(p, {&work.dq, &work.dk, &work.dv}, q.element_size())) return false;
  auto* to = dbias ? static_cast<float*>(const_cast<void*>(dbias->const_data_ptr())) : nullptr;
  if (p.empty()) {
    if (to) std::memset(to, 0, dbias->numel() * sizeof(float));
    return true;
  }
  const int64_t repeats = (p.windows + p.bias_windows - 1) / p.bias_windows;
  const int64_t chunks = (p.heads + p.heads_together() - 1) / p.heads_together();
  const int64_t per_run = p.bias_windows * p.heads * p.n * p.n * static_cast<int64_t>(sizeof(float));
  const int64_t wanted = std::min(repeats, kRuns / (chunks * p.bias_windows) + 1);
  work.runs = std::min(wanted, to ? std::max<int64_t>(1, kSumsBytes / per_run) : wanted);
  const bool direct = to && work.runs == 1 && p.bias_heads == p.heads;
  std::unique_ptr<float[]> held; // filled by the tasks
  if (direct) {
    work.sums = to;
  } else if (to) {
    held.reset(new float[work.runs * per_run / sizeof(float)]);
    work.sums = held.get();
  }
  const int64_t tasks = chunks * p.bias_windows * work.runs;
  const int64_t windows_per_task = std::max<int64_t>(1, repeats / work.runs);
  torch::stable::parallel_for(0, tasks, p.windows_per_thread(5 * p.heads_together()) / windows_per_task + 1,
                              [&](int64_t begin, int64_t end) { work.run(begin, end); });
  if (to && !direct) add_runs(work, to);
  return true;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
}
