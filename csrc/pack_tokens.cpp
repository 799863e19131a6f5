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
constexpr int64_t kVector = 32;              // bytes
constexpr int64_t kBytesPerThread = 1 << 17; // fewer are not worth waking a thread for

// Rows whose channels are adjacent, all of them one stride apart, in bytes.
struct Lines {
  const char* data;
  int64_t stride;

  const char* at(int64_t r) const { return data + r * stride; }
};

// Rows of (B, L, C) or (T, C), flat over (B, L); or the one row, again and again.
template <typename T>
struct Rows {
  const T* data;
  d2it::RowOffsets offsets;

  explicit Rows(const T* one) : data(one) {}
  explicit Rows(const Tensor& tensor)
      : data(static_cast<const T*>(tensor.const_data_ptr())), offsets(tensor) {}

  const T* at(int64_t r) const { return data + offsets.of(r); }

  Lines lines() const {
    return {reinterpret_cast<const char*>(data), static_cast<int64_t>(offsets.row * sizeof(T))};
  }
};

// Rows begin..end of the result, the first of them at `to`. Whether a row comes from the source or the base
// is a coin toss to the branch predictor, so it is no branch.
template <typename Copy>
D2IT_INLINE void gather_each(const int32_t* rows_of, Lines source, Lines base, char* to, int64_t bytes,
                             int64_t begin, int64_t end, const Copy& copy) {
  for (int64_t r = begin; r < end; ++r, to += bytes) {
    const int64_t row = rows_of[r], from_base = row >> 63;
    const auto from_source = reinterpret_cast<int64_t>(source.data) + row * source.stride;
    const auto otherwise = reinterpret_cast<int64_t>(base.data) + r * base.stride;
    copy(to, reinterpret_cast<const char*>((from_source & ~from_base) | (otherwise & from_base)));
  }
}

// Rows of a known size. Short ones take less time than the choice: a block of them without tokens, as there
// are many where tokens are few, makes none.
template <int64_t kBytes>
void gather_bytes(const int32_t* rows_of, Lines source, Lines base, char* to, int64_t, int64_t begin,
                  int64_t end) {
  const auto copy = [](char* to, const char* from) { std::memcpy(to, from, kBytes); };
  int64_t r = begin;
  if (kBytes <= kShort && (base.stride == 0 || base.stride == kBytes)) {
    for (; r + kBlock <= end; r += kBlock, to += kBlock * kBytes) {
      int32_t all = -1;
      for (int i = 0; i < kBlock; ++i) all &= rows_of[r + i];
      if (all >= 0) {
        gather_each(rows_of, source, base, to, kBytes, r, r + kBlock, copy);
        continue;
      }
      // Row by row: a block at once would be a call, or a string instruction, which start slowly.
      for (int i = 0; i < kBlock; ++i) {
        if (base.stride)
          std::memcpy(to + i * kBytes, base.at(r + i), kBytes);
        else
          std::memset(to + i * kBytes, 0, kBytes);
      }
    }
  }
  gather_each(rows_of, source, base, to, kBytes, r, end, copy);
}

// Rows of any size. Vectors in place take 0.94 times as long as a call of memcpy a row, of 128 to 3072 bytes
// on an AMD EPYC with AVX-512.
D2IT_CLONES_256 void gather_wide(const int32_t* rows_of, Lines source, Lines base, char* to, int64_t bytes,
                                 int64_t begin, int64_t end) {
  using Vector = d2it::VectorOf<char, kVector>::type;
  const auto copy = [=](char* to, const char* from) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kVector <= bytes; i += kVector) {
      *reinterpret_cast<Vector*>(to + i) = *reinterpret_cast<const Vector*>(from + i);
    }
    if (i < bytes) std::memcpy(to + i, from + i, bytes - i);
  };
  gather_each(rows_of, source, base, to, bytes, begin, end, copy);
}

using Gather = decltype(&gather_wide);

Gather gather_of_size(int64_t bytes) {
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
      return gather_wide;
  }
}

template <typename T>
void gather(const int32_t* rows_of, int64_t stride, const Rows<T>& source, const Rows<T>& base, T* out,
            int64_t rows, int64_t channels) {
  const int64_t bytes = channels * sizeof(T);
  const Gather adjacent =
      stride == 1 && source.offsets.adjacent() && base.offsets.adjacent() ? gather_of_size(bytes) : nullptr;
  torch::stable::parallel_for(0, rows, kBytesPerThread / bytes + 1, [&](int64_t begin, int64_t end) {
    T* to = out + begin * channels;
    if (adjacent) {
      return adjacent(rows_of, source.lines(), base.lines(), reinterpret_cast<char*>(to), bytes, begin, end);
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

// out[r] = source[rows_of[r]] where rows_of[r] >= 0, else base[r]; zero where the one that is wanted is
// absent.
void gather_rows(const Tensor& rows_of, const std::optional<Tensor>& source,
                 const std::optional<Tensor>& base, const Tensor& out) {
  if (out.numel() == 0) return;
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
}

// Throws where `named`, the plan's `name`, contains a row that a source of `rows` rows does not have.
void check_rows(const Tensor& named, int64_t rows, const char* name) {
  const auto* first = static_cast<const int32_t*>(named.const_data_ptr());
  const int32_t most = largest(first, named.size(0), named.stride(0));
  if (most >= rows) d2it::fail("plan.", name, " must contain values below ", rows, ", got ", most);
}

Tensor pack_tokens(Tensor x, Tensor index) {
  Tensor packed = d2it::empty({index.size(0), x.size(2)}, x.scalar_type());
  check_rows(index, x.size(0) * x.size(1), "index");
  gather_rows(index, x, std::nullopt, packed);
  return packed;
}

Tensor unpack_tokens(std::optional<Tensor> packed, std::optional<Tensor> base, Tensor inverse, int64_t batch,
                     int64_t cells) {
  const Tensor& like = packed ? *packed : *base;
  Tensor out = d2it::empty({batch, cells, like.size(like.dim() - 1)}, like.scalar_type());
  if (packed) check_rows(inverse, packed->size(0), "inverse");
  gather_rows(inverse, packed, base, out);
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CPU, m) {
  m.impl("pack_tokens", TORCH_BOX(&pack_tokens));
  m.impl("unpack_tokens", TORCH_BOX(&unpack_tokens));
}
