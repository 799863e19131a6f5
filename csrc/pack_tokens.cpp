// Packing and merging tokens on CPU (D2iT, section 3.2.3, Eqs. 7 and 9).
//
// Both are one gather: row r of the result is row rows_of[r] of the source, or, where that is
// -1, row r of the base, or zero. Every element of the result is written once, in order; no row is read
// twice.
#include "cpu.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace {

using torch::stable::Tensor;

constexpr int kBlock = 8;                    // rows
constexpr int64_t kShort = 16;               // bytes of a row
constexpr int64_t kBytesPerThread = 1 << 17; // fewer are not worth waking a thread for

// Rows of (B, L, C) or (T, C), flat over (B, L); or the one row, again and again.
template <typename T>
struct Rows {
  const T* data;
  d2it::RowOffsets offsets;

  explicit Rows(const T* one) : data(one) {}
  explicit Rows(const Tensor& tensor)
      : data(static_cast<const T*>(tensor.const_data_ptr())), offsets(tensor) {}

  const T* at(int64_t r) const { return data + offsets.of(r); }
};

// Rows whose channels are adjacent, all of them one stride apart. Whether a row comes from the source or the
// base is a coin toss to the branch predictor, so it is no branch. Short rows take less time than the choice:
// a block of them without tokens, as there are many where tokens are few, makes none. kBytes is the size of a
// row, 0 where it is not known.
template <int64_t kBytes>
void gather_bytes(const int32_t* rows_of, const char* source, int64_t source_row, const char* base,
                  int64_t base_row, char* to, int64_t row_bytes, int64_t begin, int64_t end) {
  const int64_t bytes = kBytes ? kBytes : row_bytes;
  const auto copy_rows = [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r, to += bytes) {
      const int64_t row = rows_of[r], from_base = row >> 63;
      const auto from_source = reinterpret_cast<int64_t>(source) + row * source_row;
      const auto otherwise = reinterpret_cast<int64_t>(base) + r * base_row;
      const auto* from = reinterpret_cast<const char*>((from_source & ~from_base) | (otherwise & from_base));
      std::memcpy(to, from, bytes);
    }
  };
  int64_t r = begin;
  if (kBytes && kBytes <= kShort && (base_row == 0 || base_row == bytes)) {
    for (; r + kBlock <= end; r += kBlock) {
      int32_t all = -1;
      for (int i = 0; i < kBlock; ++i) all &= rows_of[r + i];
      if (all >= 0) {
        copy_rows(r, r + kBlock);
        continue;
      }
      // Row by row: a block at once would be a call, or a string instruction, which start slowly.
      for (int i = 0; i < kBlock; ++i) {
        if (base_row)
          std::memcpy(to + i * bytes, base + (r + i) * bytes, bytes);
        else
          std::memset(to + i * bytes, 0, bytes);
      }
      to += kBlock * bytes;
    }
  }
  copy_rows(r, end);
}

using GatherBytes = decltype(&gather_bytes<0>);

GatherBytes gather_of_size(int64_t bytes) {
  switch (bytes) { // 4, 8, 12 and 16 channels of 2 and 4 bytes: latents
    case 8:
      return gather_bytes<8>;
    case 16:
      return gather_bytes<16>;
    case 24:
      return gather_bytes<24>;
    case 32:
      return gather_bytes<32>;
    case 48:
      return gather_bytes<48>;
    case 64:
      return gather_bytes<64>;
    default:
      return gather_bytes<0>;
  }
}

template <typename T>
void gather(const int32_t* rows_of, int64_t stride, const Rows<T>& source, const Rows<T>& base, T* out,
            int64_t rows, int64_t channels) {
  const int64_t bytes = channels * sizeof(T);
  const GatherBytes adjacent =
      stride == 1 && source.offsets.adjacent() && base.offsets.adjacent() ? gather_of_size(bytes) : nullptr;
  torch::stable::parallel_for(0, rows, kBytesPerThread / bytes + 1, [&](int64_t begin, int64_t end) {
    T* to = out + begin * channels;
    if (adjacent) {
      return adjacent(rows_of, reinterpret_cast<const char*>(source.data), source.offsets.row * sizeof(T),
                      reinterpret_cast<const char*>(base.data), base.offsets.row * sizeof(T),
                      reinterpret_cast<char*>(to), bytes, begin, end);
    }
    for (int64_t r = begin; r < end; ++r) {
      const int64_t row = rows_of[r * stride];
      const Rows<T>& from = row >= 0 ? source : base;
      const T* first = from.at(row >= 0 ? row : r);
      for (int64_t c = 0; c < channels; ++c) *to++ = first[c * from.offsets.channel];
    }
  });
}

template <typename T>
void gather(const Tensor& rows_of, const std::optional<Tensor>& source, const std::optional<Tensor>& base,
            const Tensor& out) {
  const int64_t channels = out.size(out.dim() - 1);
  const std::vector<T> zeros(source && base ? 0 : channels);
  const Rows<T> zero(zeros.data());
  gather<T>(static_cast<const int32_t*>(rows_of.const_data_ptr()), rows_of.stride(0),
            source ? Rows<T>(*source) : zero, base ? Rows<T>(*base) : zero,
            static_cast<T*>(const_cast<void*>(out.const_data_ptr())), rows_of.size(0), channels);
}

// The largest of `count` rows, `stride` apart; at least -1.
D2IT_CLONES int32_t largest(const int32_t* named, int64_t count, int64_t stride) {
  int32_t most = -1;
  if (stride == 1) { // a loop of its own, which is vectorised
    for (int64_t r = 0; r < count; ++r) most = std::max(most, named[r]);
  } else {
    for (int64_t r = 0; r < count; ++r) most = std::max(most, named[r * stride]);
  }
  return most;
}

// Whether every row that is named exists in a source of `rows` rows.
bool exist(const Tensor& rows_of, int64_t rows) {
  const auto* named = static_cast<const int32_t*>(rows_of.const_data_ptr());
  return largest(named, rows_of.size(0), rows_of.stride(0)) < rows;
}

// out[r] = source[rows_of[r]] where rows_of[r] >= 0, else base[r]; zero where the one that is wanted is
// absent. False where a row is named that the source does not have; nothing is written then.
bool gather_rows(Tensor rows_of, std::optional<Tensor> source, std::optional<Tensor> base, Tensor out) {
  if (out.numel() == 0) return true;
  if (source && !exist(rows_of, source->dim() == 2 ? source->size(0) : source->size(0) * source->size(1))) {
    return false;
  }
  switch (out.element_size()) {
    case 1:
      gather<uint8_t>(rows_of, source, base, out);
      break;
    case 2:
      gather<uint16_t>(rows_of, source, base, out);
      break;
    case 4:
      gather<uint32_t>(rows_of, source, base, out);
      break;
    default:
      gather<uint64_t>(rows_of, source, base, out);
  }
  return true;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CPU, m) { m.impl("gather_rows", TORCH_BOX(&gather_rows)); }
