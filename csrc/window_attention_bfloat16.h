// Window attention on a CPU with AVX512_BF16, of bfloat16: scores and their gradients are sums in float32 of
// the tensors' own numbers; weights and gradients of scores are rounded to bfloat16 for the products after.
//
// The softmax is that of float32, kStrip queries at a time, so that their scores stay in the L1 cache. In the
// backward the gradients of k and v take kQueries of them at a time.
#pragma once

#include "pairs.h"
#include "window_attention_cpu.h"

#ifdef D2IT_HAS_PAIRS

namespace {

using d2it::pairs::interleave;
using d2it::pairs::round_rows;
using d2it::pairs::Words;
using d2it::pairs::words;

constexpr int64_t kStrip = 16;

class WordScratch : public Scratch {
 public:
  using Scratch::Scratch;

  // tokens x width; width x tokens; and pairs of rows x columns.
  Words rows() { return as_words(matrix(problem().n, words(problem().width))); }
  Words columns() { return as_words(matrix(words(problem().width), problem().n)); }
  Words pairs(int64_t rows, int64_t columns) { return as_words(floats(words(rows), columns)); }

  Words strip() { return as_words(matrix(kStrip, words(problem().n))); }
  // In whole steps of round_rows.
  Matrix floats(int64_t rows, int64_t columns) { return matrix(rows, round_up(columns, 2 * kWide)); }

 private:
  static Words as_words(const Matrix& m) { return {reinterpret_cast<uint32_t*>(m.data), m.pitch}; }
};

// The rows of a head as they are; zeros to whole vectors of rows.
void read_words(const Heads& from, int64_t first, const Window& window, int64_t width, const Words& to) {
  const auto* base = reinterpret_cast<const uint16_t*>(from.data) + first;
  for (int64_t i = 0; i < window.tokens; ++i) {
    const uint16_t* in = base + window.rows[i] * from.token;
    if (from.dim == 1) {
      std::memcpy(to.row(i), in, width * sizeof(uint16_t));
    } else {
      for (int64_t d = 0; d < width; ++d)
        std::memcpy(reinterpret_cast<char*>(to.row(i)) + d * sizeof(uint16_t), in + d * from.dim,
                    sizeof(uint16_t));
    }
  }
  for (int64_t i = window.tokens; i < round_up(window.tokens, kWide); ++i)
    std::memset(to.row(i), 0, words(width) * sizeof(uint32_t));
}

// Rows of floats times a factor, `factors` one for each row or null for `factor`, rounded to those of a head.
D2IT_PAIRS void write_rounded(const Heads& to, int64_t first, const int32_t* rows, int64_t count,
                              int64_t width, const Matrix& from, const float* factors, float factor) {
  auto* const base = reinterpret_cast<uint16_t*>(to.data) + first;
  for (int64_t i = 0; i < count; ++i) {
    uint16_t* const out = base + rows[i] * to.token; // the last axis of a result is contiguous
    const __m512 by = _mm512_set1_ps(factors ? factors[i] : factor);
    for (int64_t d = 0; d < width; d += kWide) {
      const auto there = static_cast<__mmask16>(width - d < kWide ? (1 << (width - d)) - 1 : 0xffff);
      _mm256_mask_storeu_epi16(
          out + d, there, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(from.row(i) + d), by)));
    }
  }
}

class ForwardInPairs {
 public:
  explicit ForwardInPairs(const Forward& work) : work_(work), scratch_(work.p) {}

  void attend(const Window& window, int64_t h) {
    const Problem& p = work_.p;
    const int64_t tokens = window.tokens, at = window.index;
    read_words(work_.q, work_.q.first(at, h), window, p.width, q_);
    read_words(work_.k, work_.k.first(at, h), window, p.width, k_);
    read_words(work_.v, work_.v.first(at, h), window, p.width, v_);
    transpose(k_.bits(), round_up(tokens, kWide), words(p.width), kt_.bits());
    interleave(v_, tokens, p.width, v_pairs_);
    const Bias bias = window.bias(p, h);
    float inverse_sums[kStrip];
    for (int64_t i = 0; i < tokens; i += kStrip) {
      const int64_t queries = std::min(kStrip, tokens - i);
      d2it::pairs::multiply({q_.row(i), q_.pitch, 1}, kt_, queries, tokens, words(p.width), scores_, false);
      softmax(scores_, i, queries, tokens, p.scale, bias, inverse_sums);
      round_rows(scores_, queries, tokens, &weights_, nullptr);
      d2it::pairs::multiply({weights_.data, weights_.pitch, 1}, v_pairs_, queries, p.width, words(tokens),
                            out_, false);
      write_rounded(work_.out, work_.out.first(at, h), window.rows.data() + i, queries, p.width, out_,
                    inverse_sums, 1.0f);
    }
  }

 private:
  const Forward& work_;
  WordScratch scratch_;
  Words q_ = scratch_.rows(), k_ = scratch_.rows(), v_ = scratch_.rows();
  Words kt_ = scratch_.columns(), v_pairs_ = scratch_.pairs(work_.p.n, work_.p.width);
  Words weights_ = scratch_.strip();
  Matrix scores_ = scratch_.floats(kStrip, work_.p.n), out_ = scratch_.floats(kStrip, work_.p.width);
};

class BackwardInPairs {
 public:
  explicit BackwardInPairs(const Backward& work) : work_(work), scratch_(work.p) {
    std::fill_n(ones_, kStrip, 1.0f);
  }

  // sum: N x N, of the bias's gradient, or null; see softmax_backward.
  void attend(const Window& window, int64_t h, float* sum, bool fresh) {
    const Problem& p = work_.p;
    const int64_t tokens = window.tokens, at = window.index;
    read_words(work_.q, work_.q.first(at, h), window, p.width, q_);
    read_words(work_.k, work_.k.first(at, h), window, p.width, k_);
    read_words(work_.v, work_.v.first(at, h), window, p.width, v_);
    read_words(work_.grad, work_.grad.first(at, h), window, p.width, grad_);
    transpose(k_.bits(), round_up(tokens, kWide), words(p.width), kt_.bits());
    transpose(v_.bits(), round_up(tokens, kWide), words(p.width), vt_.bits());
    interleave(q_, tokens, p.width, q_pairs_);
    interleave(k_, tokens, p.width, k_pairs_);
    interleave(grad_, tokens, p.width, grad_pairs_);
    const Bias bias = window.bias(p, h);
    for (int64_t i = 0; i < tokens; i += kQueries) {
      const int64_t block = std::min<int64_t>(kQueries, tokens - i);
      for (int64_t j = 0; j < block; j += kStrip)
        take_strip(window, h, i, j, std::min(kStrip, block - j), bias, sum, fresh);
      d2it::pairs::multiply({weights_.data, 1, weights_.pitch}, {grad_pairs_.row(i / 2), grad_pairs_.pitch},
                            tokens, p.width, words(block), dv_, i > 0);
      d2it::pairs::multiply({ds_pairs_.data, 1, ds_pairs_.pitch}, {q_pairs_.row(i / 2), q_pairs_.pitch},
                            tokens, p.width, words(block), dk_, i > 0);
    }
    const int32_t* rows = window.rows.data();
    write_rounded(work_.dk, work_.dk.first(at, h), rows, tokens, p.width, dk_, nullptr, p.scale);
    write_rounded(work_.dv, work_.dv.first(at, h), rows, tokens, p.width, dv_, nullptr, 1.0f);
  }

 private:
  // The queries j .. j + queries of the block from `block` on: their dq, weights and gradients of scores.
  void take_strip(const Window& window, int64_t h, int64_t block, int64_t j, int64_t queries,
                  const Bias& bias, float* sum, bool fresh) {
    const Problem& p = work_.p;
    const int64_t tokens = window.tokens, i = block + j;
    float inverse_sums[kStrip];
    d2it::pairs::multiply({q_.row(i), q_.pitch, 1}, kt_, queries, tokens, words(p.width), e_, false);
    softmax(e_, i, queries, tokens, p.scale, bias, inverse_sums);
    multiply_rows(e_, 0, queries, round_up(tokens, kWide), inverse_sums);
    d2it::pairs::multiply({grad_.row(i), grad_.pitch, 1}, vt_, queries, tokens, words(p.width), dp_, false);
    const Words weights{weights_.row(j / 2), weights_.pitch}, ds_pairs{ds_pairs_.row(j / 2), ds_pairs_.pitch};
    round_rows(e_, queries, tokens, nullptr, &weights);
    softmax_backward(e_, dp_, i, queries, tokens, ones_, bias, sum, fresh);
    round_rows(dp_, queries, tokens, &ds_, &ds_pairs);
    d2it::pairs::multiply({ds_.data, ds_.pitch, 1}, k_pairs_, queries, p.width, words(tokens), dq_, false);
    write_rounded(work_.dq, work_.dq.first(window.index, h), window.rows.data() + i, queries, p.width, dq_,
                  nullptr, p.scale);
  }

  const Backward& work_;
  WordScratch scratch_;
  float ones_[kStrip];
  Words q_ = scratch_.rows(), k_ = scratch_.rows(), v_ = scratch_.rows(), grad_ = scratch_.rows();
  Words kt_ = scratch_.columns(), vt_ = scratch_.columns();
  Words q_pairs_ = scratch_.pairs(work_.p.n, work_.p.width),
        k_pairs_ = scratch_.pairs(work_.p.n, work_.p.width),
        grad_pairs_ = scratch_.pairs(work_.p.n, work_.p.width);
  Words weights_ = scratch_.pairs(kQueries, work_.p.n), ds_pairs_ = scratch_.pairs(kQueries, work_.p.n),
        ds_ = scratch_.strip();
  Matrix e_ = scratch_.floats(kStrip, work_.p.n), dp_ = scratch_.floats(kStrip, work_.p.n);
  Matrix dq_ = scratch_.floats(kStrip, work_.p.width), dk_ = scratch_.floats(work_.p.n, work_.p.width),
         dv_ = scratch_.floats(work_.p.n, work_.p.width);
};

} // namespace

#endif
