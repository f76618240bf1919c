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

// Maps of the sizes (height and width of each), one after the other from row 0 of a matrix: without
// gaps and overlaps, within `rows` rows.
inline std::vector<MapShape> read_maps(const char* name, const IntList& sizes, int64_t images,
                                       int64_t rows) {
  STD_TORCH_CHECK(sizes.size() % size_field::kFieldCount == 0, "expected ", name, " sizes of ",
                  static_cast<size_t>(size_field::kFieldCount), " n integers, got ", sizes.size());
  std::vector<MapShape> maps;
  int64_t first_row = 0;
  for (size_t i = 0; i < sizes.size(); i += size_field::kFieldCount) {
    const int32_t height = narrow("the height of a map", sizes[i + size_field::height], 0);
    const int32_t width = narrow("the width of a map", sizes[i + size_field::width], 0);
    const int64_t pixels = static_cast<int64_t>(height) * width;
    STD_TORCH_CHECK(pixels <= kMaxInt32, "expected maps of at most ", kMaxInt32, " pixels, got ",
                    height, "x", width);
    STD_TORCH_CHECK(images == 0 || pixels <= (rows - first_row) / images, "expected ", name,
                    " maps within ", rows, " rows, got ", images, " images of ", height, "x", width,
                    " from row ", first_row);
    maps.push_back({first_row, height, width});
    first_row += images * pixels;
  }
  return maps;
}

// The same, for maps that must cover all rows, so that every row gets its gradient from one map.
inline std::vector<MapShape> read_all_maps(const char* name, const IntList& sizes, int64_t images,
                                           int64_t rows) {
  std::vector<MapShape> maps = read_maps(name, sizes, images, rows);
  const int64_t covered = maps.empty() ? 0 : maps.back().first_row + images * maps.back().pixels();
  STD_TORCH_CHECK(covered == rows, "expected ", name, " maps that cover all ", rows, " rows, got ",
                  covered);
  return maps;
}

// A number of images.
inline int64_t read_images(int64_t images) { return narrow("images", images, 0); }

}  // namespace dyhead
