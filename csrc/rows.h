// Rows of channels of a tensor on CPU, of any strides, read and written in float32.
#pragma once

#include "cpu.h"

#include <algorithm>
#include <cstdint>

namespace d2it {
namespace { // of each file its own: what is compiled for several machines cannot be shared

constexpr int64_t kBlock = 64;                  // rows
constexpr int64_t kElementsPerThread = 1 << 15; // fewer are not worth waking a thread for

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

D2IT_CLONES void widen_row(const float* in, int64_t stride, float* out, int64_t n) {
  d2it::widen(in, stride, out, n);
}
D2IT_CLONES void widen_row(const Half* in, int64_t stride, float* out, int64_t n) {
  d2it::widen(in, stride, out, n);
}
D2IT_CLONES void widen_row(const BFloat16* in, int64_t stride, float* out, int64_t n) {
  d2it::widen(in, stride, out, n);
}
D2IT_CLONES void narrow_row(const float* in, Half* out, int64_t n) { d2it::narrow(in, out, n); }
D2IT_CLONES void narrow_row(const float* in, BFloat16* out, int64_t n) { d2it::narrow(in, out, n); }

// The rows of (B, L, C), flat over (B, L), or of (T, C).
class Rows {
 public:
  explicit Rows(const Tensor& tensor)
      : data_(const_cast<void*>(tensor.const_data_ptr())),
        dtype_(tensor.scalar_type()),
        channels_(tensor.size(tensor.dim() - 1)),
        offsets_(tensor) {}

  // Row r in float32: where it lies, or converted into `room`.
  const float* read(int64_t r, float* room) const {
    const int64_t at = offsets_.of(r);
    switch (dtype_) {
      case ScalarType::Float:
        if (offsets_.channel == 1) return static_cast<const float*>(data_) + at;
        widen_row(static_cast<const float*>(data_) + at, offsets_.channel, room, channels_);
        break;
      case ScalarType::Half:
        widen_row(static_cast<const Half*>(data_) + at, offsets_.channel, room, channels_);
        break;
      default:
        widen_row(static_cast<const BFloat16*>(data_) + at, offsets_.channel, room, channels_);
    }
    return room;
  }

  // Where row r of a contiguous result is worked out: in place, or in `room`, from where store() takes it.
  float* begin(int64_t r, float* room) const {
    return dtype_ == ScalarType::Float ? static_cast<float*>(data_) + r * channels_ : room;
  }
  void store(int64_t r, const float* room) const {
    if (dtype_ == ScalarType::Half) {
      narrow_row(room, static_cast<Half*>(data_) + r * channels_, channels_);
    } else if (dtype_ == ScalarType::BFloat16) {
      narrow_row(room, static_cast<BFloat16*>(data_) + r * channels_, channels_);
    }
  }

 private:
  void* data_;
  ScalarType dtype_;
  int64_t channels_;
  d2it::RowOffsets offsets_;
};

// Calls work(begin, end) for ranges of rows that begin at whole blocks.
template <typename F>
void for_blocks(int64_t rows, int64_t channels, const F& work) {
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  torch::stable::parallel_for(
      0, blocks, kElementsPerThread / (kBlock * channels) + 1,
      [&](int64_t begin, int64_t end) { work(begin * kBlock, std::min(end * kBlock, rows)); });
}

} // namespace
} // namespace d2it
