// Planning tokens on CPU (D2iT, section 3.2.3): which cells have a token, and in which row of the packed
// ones.
#include "cpu.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

using torch::stable::Tensor;

int32_t* ints(const Tensor& tensor) {
  return static_cast<int32_t*>(const_cast<void*>(tensor.const_data_ptr()));
}

// How a region's cells get their tokens, by the region's layout: 0 is none; without code sizes 1 is all
// cells, with them 1, 2 ... are the codes of the grains from min_grain on.
struct Layouts {
  int64_t cells; // of a region's side
  bool codes;
  std::vector<int32_t> starts; // (layouts, cells): 1 where a code starts, along either side of a region
  std::vector<int64_t> tokens; // of a region

  Layouts(int64_t cells_per_region, int64_t min_grain, const std::vector<int64_t>& code_sizes)
      : cells(cells_per_region), codes(!code_sizes.empty()), starts(cells), tokens{0} {
    if (!codes) add(1);
    for (auto grain = static_cast<size_t>(min_grain); grain < code_sizes.size(); ++grain) {
      add(code_sizes[grain]);
    }
  }

  void add(int64_t size) {
    for (int64_t x = 0; x < cells; ++x) starts.push_back(x % size == 0);
    tokens.push_back((cells / size) * (cells / size));
  }
};

// One row of regions: the layout of each, and how many have one; negative where a grain is.
D2IT_INLINE int64_t choose(const int64_t* grains, int64_t stride, int64_t min_grain, int64_t width,
                           uint8_t* __restrict wanted) {
  int64_t count = 0, signs = 0;
  for (int64_t x = 0; x < width; ++x) {
    const int64_t grain = grains[x * stride];
    wanted[x] = grain >= min_grain;
    count += grain >= min_grain;
    signs |= grain;
  }
  return signs < 0 ? signs : count;
}

D2IT_CLONES_256 int64_t choose_regions(const int64_t* grains, int64_t stride, int64_t min_grain,
                                       int64_t width, uint8_t* wanted) {
  return stride == 1 ? choose(grains, 1, min_grain, width, wanted)
                     : choose(grains, stride, min_grain, width, wanted);
}

// The same with a layout for each grain below `grains_known`; counts tokens.
int64_t choose_codes(const int64_t* grains, int64_t stride, int64_t min_grain, int64_t grains_known,
                     const Layouts& layouts, int64_t width, uint8_t* wanted) {
  int64_t count = 0;
  for (int64_t x = 0; x < width; ++x) {
    const int64_t grain = grains[x * stride];
    if (grain < 0 || grain >= grains_known) return -1;
    wanted[x] = static_cast<uint8_t>(std::max<int64_t>(grain - min_grain + 1, 0));
    count += layouts.tokens[wanted[x]];
  }
  return count;
}

struct Plan {
  const Layouts& layouts;
  int64_t window, columns, rows; // columns, rows: cells of an image
  int32_t *index, *inverse, *slots, *sample;

  // What a thread works in.
  struct Scratch {
    std::vector<int32_t> exists; // of one row of windows: 1 where a cell has a token
    std::vector<int32_t> found;  // the cells of an image that have one, and a place for those that have none

    explicit Scratch(const Plan& plan)
        : exists(plan.columns * plan.window), found(plan.rows * plan.columns + 1) {}
  };

  // Image b, whose rows are first .. last - 1. Whether a cell has a token is no branch: it would be guessed
  // wrong at the edges of every patch.
  void lay_out(const uint8_t* wanted, int64_t b, int64_t first, int64_t last, Scratch& s) const {
    const int64_t side = layouts.cells, cells = rows * columns, regions = columns / side;
    int32_t* slot = slots + b * cells;
    int32_t* const found = s.found.data();
    const auto start = static_cast<int32_t>(first);
    int32_t row = start;
    for (int64_t top = 0; top < rows; top += window) {
      int32_t* flag = s.exists.data();
      for (int64_t y = top; y < top + window; ++y) {
        const uint8_t* in_row = wanted + y / side * regions;
        if (!layouts.codes) {
          for (int64_t x = 0; x < regions; ++x) {
            for (int64_t i = 0; i < side; ++i) *flag++ = in_row[x];
          }
          continue;
        }
        const int32_t* starts = layouts.starts.data();
        for (int64_t x = 0; x < regions; ++x) {
          const int64_t layout = in_row[x] * side;
          const int32_t* exists = starts + layout * starts[layout + y % side]; // layout 0 between codes
          for (int64_t i = 0; i < side; ++i) *flag++ = exists[i];
        }
      }
      for (int64_t left = 0; left < columns; left += window) {
        for (int64_t y = 0; y < window; ++y) {
          const int64_t cell = b * cells + (top + y) * columns + left;
          const int32_t* exists = s.exists.data() + y * columns + left;
          for (int64_t x = 0; x < window; ++x) {
            const int32_t one = exists[x];
            found[row - start] = static_cast<int32_t>(cell + x);
            inverse[cell + x] = *slot++ = row | (one - 1); // -1 where there is none
            row += one;
          }
        }
      }
    }
    std::copy(found, found + (last - first), index + first);
    std::fill(sample + first, sample + last, static_cast<int32_t>(b));
  }
};

// False where a grain is below 0 or has no code size, or the tokens are more than the rows of index; nothing
// is written then.
bool plan_tokens(Tensor grain_map, int64_t cells_per_region, int64_t window, int64_t min_grain,
                 std::vector<int64_t> code_sizes, Tensor index, Tensor inverse, Tensor slots, Tensor sample,
                 Tensor count) {
  const int64_t batch = grain_map.size(0), height = grain_map.size(1), width = grain_map.size(2);
  const auto* grains = static_cast<const int64_t*>(grain_map.const_data_ptr());
  const int64_t capacity = index.size(0), cells = height * width * cells_per_region * cells_per_region;
  const int64_t images_per_thread = 16384 / std::max<int64_t>(cells, 1) + 1;

  const Layouts layouts(cells_per_region, min_grain, code_sizes);
  const auto known = static_cast<int64_t>(code_sizes.size());
  std::vector<uint8_t> wanted(batch * height * width);
  std::vector<int64_t> first(batch + 1); // the first row of every image
  bool good = true;
  for (int64_t b = 0; b < batch; ++b) {
    int64_t tokens = 0;
    for (int64_t y = 0; y < height; ++y) {
      const int64_t* const row = grains + b * grain_map.stride(0) + y * grain_map.stride(1);
      const int64_t stride = grain_map.stride(2);
      uint8_t* const in_row = &wanted[(b * height + y) * width];
      const int64_t found = known ? choose_codes(row, stride, min_grain, known, layouts, width, in_row)
                                  : choose_regions(row, stride, min_grain, width, in_row) * layouts.tokens[1];
      good &= found >= 0;
      tokens += found;
    }
    first[b + 1] = first[b] + tokens;
  }
  const int64_t total = first[batch];
  if (!good || total > capacity) return false;

  const Plan plan{layouts,
                  window,
                  width * cells_per_region,
                  height * cells_per_region,
                  ints(index),
                  ints(inverse),
                  ints(slots),
                  ints(sample)};
  torch::stable::parallel_for(0, batch, images_per_thread, [&](int64_t begin, int64_t end) {
    Plan::Scratch scratch(plan);
    for (int64_t b = begin; b < end; ++b) {
      plan.lay_out(&wanted[b * height * width], b, first[b], first[b + 1], scratch);
    }
  });
  std::fill(ints(index) + total, ints(index) + capacity, -1);
  std::fill(ints(sample) + total, ints(sample) + capacity,
            static_cast<int32_t>(std::max<int64_t>(batch - 1, 0)));
  *ints(count) = static_cast<int32_t>(total);
  return true;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(d2it_C, CPU, m) { m.impl("plan_tokens", TORCH_BOX(&plan_tokens)); }
