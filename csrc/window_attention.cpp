// Attention inside windows on CPU (D2iT, Eq. 10): softmax(q k^T * scale + bias) v over the tokens that exist.
//
// The work is cut into a window of one head at a time. Its rows are gathered into dense matrices, only those
// of tokens: what a window costs follows the square of its tokens, whatever its size. Matrices are padded to
// whole vectors, and all products go through one small kernel whose sums stay in registers: here in float32,
// for bfloat16 where the CPU multiplies it in window_attention_bfloat16.h. Scores exist for kQueries queries
// at a time, so that they stay in the L2 cache; the backward computes them again.
//
// The gradient of the bias is added up in float32 over runs of windows that depend on the shapes alone, then
// over those runs in their order: the same bits for any number of threads.
#include "window_attention_bfloat16.h"
#include "window_attention_cpu.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>

namespace {

// tokens x width, width x tokens, and queries x tokens.
class FloatScratch : public Scratch {
 public:
  using Scratch::Scratch;
  Matrix rows() { return matrix(problem().n, problem().width); }
  Matrix columns() { return matrix(problem().width, problem().n); }
  Matrix pairs() { return matrix(std::min<int64_t>(problem().n, kQueries), problem().n); }
};

#ifdef D2IT_HAS_PAIRS
// Whether the products are those of bfloat16.
bool in_pairs(ScalarType dtype) { return dtype == ScalarType::BFloat16 && d2it::pairs::available(); }
#endif

// ----------------------------------------------------------------------------------------------------
// Forward

class ForwardInFloats {
 public:
  explicit ForwardInFloats(const Forward& work) : work_(work), scratch_(work.p) {}

  // One head of a window that has tokens.
  void attend(const Window& window, int64_t h) {
    const Problem& p = work_.p;
    const Access& access = work_.access;
    const int64_t tokens = window.tokens, at = window.index;
    const int32_t* rows = window.rows.data();
    access.read(work_.q, work_.q.first(at, h), rows, tokens, p.width, b_q);
    access.read(work_.k, work_.k.first(at, h), rows, tokens, p.width, b_k);
    access.read(work_.v, work_.v.first(at, h), rows, tokens, p.width, b_v);
    transpose(b_k, round_up(tokens, kWide), p.width, b_kt);
    const Bias bias = window.bias(p, h);
    float inverse_sums[kQueries];
    for (int64_t i = 0; i < tokens; i += kQueries) {
      const int64_t queries = std::min<int64_t>(kQueries, tokens - i);
      multiply({b_q.row(i), b_q.pitch, 1}, b_kt, queries, tokens, p.width, scores, false);
      softmax(scores, i, queries, tokens, p.scale, bias, inverse_sums);
      multiply({scores.data, scores.pitch, 1}, b_v, queries, p.width, tokens, b_out, false);
      access.write(work_.out, work_.out.first(at, h), rows + i, queries, p.width, b_out, inverse_sums, 1.0f);
    }
  }

 private:
  const Forward& work_;
  FloatScratch scratch_;
  Matrix b_q = scratch_.rows(), b_k = scratch_.rows(), b_v = scratch_.rows(), b_out = scratch_.rows();
  Matrix b_kt = scratch_.columns(), scores = scratch_.pairs();
};

// Windows of units begin .. end: unit u is window u % W of the heads from u / W * heads_together on.
template <typename Arithmetic>
void run_units(const Forward& work, int64_t begin, int64_t end) {
  const Problem& p = work.p;
  Arithmetic arithmetic(work);
  Window window(p);
  const int64_t together = p.heads_together();
  for (int64_t unit = begin; unit < end; ++unit) {
    window.move_to(p, unit % p.windows);
    const int64_t first_head = unit / p.windows * together;
    for (int64_t h = first_head; window.tokens && h < std::min(first_head + together, p.heads); ++h)
      arithmetic.attend(window, h);
  }
}

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
  auto* run = run_units<ForwardInFloats>;
#ifdef D2IT_HAS_PAIRS
  if (in_pairs(q.scalar_type())) run = run_units<ForwardInPairs>;
#endif
  const int64_t units = p.windows * ((p.heads + p.heads_together() - 1) / p.heads_together());
  torch::stable::parallel_for(0, units, p.windows_per_thread(2 * p.heads_together()),
                              [&](int64_t begin, int64_t end) { run(work, begin, end); });
  return true;
}

// ----------------------------------------------------------------------------------------------------
// Backward

class BackwardInFloats {
 public:
  explicit BackwardInFloats(const Backward& work) : work_(work), scratch_(work.p) {}

  // One head of a window that has tokens. sum, fresh: see softmax_backward.
  void attend(const Window& window, int64_t h, float* sum, bool fresh) {
    const Problem& p = work_.p;
    const Access& access = work_.access;
    const int64_t tokens = window.tokens, at = window.index;
    const int32_t* rows = window.rows.data();
    access.read(work_.q, work_.q.first(at, h), rows, tokens, p.width, b_q);
    access.read(work_.k, work_.k.first(at, h), rows, tokens, p.width, b_k);
    access.read(work_.v, work_.v.first(at, h), rows, tokens, p.width, b_v);
    access.read(work_.grad, work_.grad.first(at, h), rows, tokens, p.width, b_grad);
    transpose(b_k, round_up(tokens, kWide), p.width, b_kt);
    transpose(b_v, round_up(tokens, kWide), p.width, b_vt);
    const Bias bias = window.bias(p, h);
    float inverse_sums[kQueries];
    for (int64_t i = 0; i < tokens; i += kQueries) {
      const int64_t queries = std::min<int64_t>(kQueries, tokens - i);
      const bool add = i > 0;
      multiply({b_q.row(i), b_q.pitch, 1}, b_kt, queries, tokens, p.width, weights, false);
      softmax(weights, i, queries, tokens, p.scale, bias, inverse_sums);
      multiply_rows(b_grad, i, queries, p.width, inverse_sums);
      multiply({weights.data, 1, weights.pitch}, {b_grad.row(i), b_grad.pitch}, tokens, p.width, queries,
               b_dv, add);
      multiply({b_grad.row(i), b_grad.pitch, 1}, b_vt, queries, tokens, p.width, ds, false);
      softmax_backward(weights, ds, i, queries, tokens, inverse_sums, bias, sum, fresh);
      multiply({ds.data, ds.pitch, 1}, b_k, queries, p.width, tokens, b_dq, false);
      multiply({ds.data, 1, ds.pitch}, {b_q.row(i), b_q.pitch}, tokens, p.width, queries, b_dk, add);
      access.write(work_.dq, work_.dq.first(at, h), rows + i, queries, p.width, b_dq, nullptr, p.scale);
    }
    access.write(work_.dk, work_.dk.first(at, h), rows, tokens, p.width, b_dk, nullptr, p.scale);
    access.write(work_.dv, work_.dv.first(at, h), rows, tokens, p.width, b_dv, nullptr, 1.0f);
  }

 private:
  const Backward& work_;
  FloatScratch scratch_;
  Matrix b_q = scratch_.rows(), b_k = scratch_.rows(), b_v = scratch_.rows(), b_grad = scratch_.rows();
  Matrix b_dq = scratch_.rows(), b_dk = scratch_.rows(), b_dv = scratch_.rows();
  Matrix b_kt = scratch_.columns(), b_vt = scratch_.columns();
  Matrix weights = scratch_.pairs(), ds = scratch_.pairs();
};

// Tasks begin .. end: a run of the windows of one residue modulo bias_windows, of the heads taken together.
template <typename Arithmetic>
void run_tasks(const Backward& work, int64_t begin, int64_t end) {
  const Problem& p = work.p;
  Arithmetic arithmetic(work);
  Window window(p);
  const int64_t together = p.heads_together(), matrix = p.n * p.n, runs = work.runs;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t run = task % runs, residue = task / runs % p.bias_windows;
    const int64_t first_head = task / runs / p.bias_windows * together;
    const int64_t last_head = std::min(first_head + together, p.heads);
    const int64_t repeats = (p.windows - residue + p.bias_windows - 1) / p.bias_windows;
    float* own = work.sums ? work.sums + (run * p.bias_windows + residue) * p.heads * matrix : nullptr;
    bool fresh = own; // no window has been added yet
    const auto clear = [&] {
      std::memset(own + first_head * matrix, 0, (last_head - first_head) * matrix * sizeof(float));
      fresh = false;
    };
    for (int64_t r = repeats * run / runs; r < repeats * (run + 1) / runs; ++r) {
      window.move_to(p, r * p.bias_windows + residue);
      if (fresh && window.tokens < p.n) clear();
      for (int64_t h = first_head; window.tokens && h < last_head; ++h)
        arithmetic.attend(window, h, own ? own + h * matrix : nullptr, fresh);
      fresh = false;
    }
    if (fresh) clear();
  }
}

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
                Heads(dv, p.packed)};
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
  auto* run = run_tasks<BackwardInFloats>;
#ifdef D2IT_HAS_PAIRS
  if (in_pairs(q.scalar_type())) run = run_tasks<BackwardInPairs>;
#endif
  torch::stable::parallel_for(0, tasks, p.windows_per_thread(5 * p.heads_together()) / windows_per_task + 1,
                              [&](int64_t begin, int64_t end) { run(work, begin, end); });
  if (to && !direct) add_runs(work, to);
  return true;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
}
