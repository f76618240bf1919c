// Reads maps and small numbers from the lists of integers in which tables arrive, without a product
// or a conversion that could overflow.
#pragma once

#include <limits>
#include <vector>

#include "tables.h"
#include "tensors.h"

namespace dyhead {

using IntList = std::vector<int64_t>;

inline constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// `value` as an int32, at least `least` and at most `most`.
inline int32_t narrow(const char* name, int64_t value, int64_t least, int64_t most = kMaxInt32) {
  STD_TORCH_CHECK(value >= least && value <= most, "expected ", name, " from ", least, " to ", most,
                  ", got ", value);
  return static_cast<int32_t>(value);
}

inline UpsampleMode read_upsample_mode(int64_t value) {
  constexpr int64_t kLast = static_cast<int64_t>(UpsampleMode::kNearest);
  return static_cast<UpsampleMode>(narrow("an upsampling mode", value, 0, kLast));
}

// The map (first_row, height, width) at `values[at]`, within `rows` rows.
inline MapShape read_map(const IntList& values, size_t at, int64_t images, int64_t rows,
                         const char* name) {
  const int64_t first_row = values[at + map_field::first_row];
  const int32_t height = narrow("the height of a map", values[at + map_field::height], 0);
  const int32_t width = narrow("the width of a map", values[at + map_field::width], 0);
  const int64_t pixels = static_cast<int64_t>(height) * width;
  STD_TORCH_CHECK(pixels <= kMaxInt32, "expected maps of at most ", kMaxInt32, " pixels, got ",
                  height, "x", width);
  STD_TORCH_CHECK(
      first_row >= 0 && first_row <= rows && (images == 0 || pixels <= (rows - first_row) / images),
      "expected a ", name, " map within ", rows, " rows, got rows from ", first_row, " of ", images,
      " images of ", height, "x", width);
  return {first_row, height, width};
}

// The same for a map that must start at `first_row`, so that maps have no gaps and no overlaps.
inline MapShape read_next_map(const IntList& values, size_t at, int64_t images, int64_t first_row,
                              int64_t rows, const char* name) {
  STD_TORCH_CHECK(values[at] == first_row, "expected ", name, " maps without gaps, got first row ",
                  values[at], " where ", first_row, " follows");
  return read_map(values, at, images, rows, name);
}

}  // namespace dyhead
