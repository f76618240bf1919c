// Checks, allocates and fills the parameters of pack_levels and unpack_levels; what both libraries
// do alike.
#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "../common/pack_levels.h"
#include "maps.h"

namespace dyhead {

inline int64_t element_bytes_of(const Tensor& t) {
  const DType dtype = dtype_of(t);
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Whether t [N, C, H, W] is dense with its channels innermost.
inline bool is_channels_last(const Tensor& t) {
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) > 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

struct PackCall {
  PackParams params;
  Tensor rows;
};

inline PackCall prepare_pack_levels(const std::vector<Tensor>& levels) {
  STD_TORCH_CHECK(!levels.empty(), "expected at least one level");
  const Tensor& first = levels.front();
  STD_TORCH_CHECK(first.dim() == 4, "expected levels [N, C, H, W], got ", shape_string(first));
  PackParams params{first.size(0), first.size(1), element_bytes_of(first), nullptr, {}};
  int64_t rows = 0;
  for (const Tensor& level : levels) {
    STD_TORCH_CHECK(level.dim() == 4 && level.size(0) == params.images &&
                        level.size(1) == params.channels && level.size(2) <= kMaxInt32 &&
                        level.size(3) <= kMaxInt32,
                    "expected levels [", params.images, ", ", params.channels, ", H, W], got ",
                    shape_string(level));
    STD_TORCH_CHECK(level.scalar_type() == first.scalar_type() &&
                        level.is_cuda() == first.is_cuda() &&
                        level.get_device() == first.get_device(),
                    "expected levels of one type and on one device");
    const bool channels_last = is_channels_last(level);
    STD_TORCH_CHECK(channels_last || level.is_contiguous(),
                    "expected a level that is contiguous, in [N, C, H, W] or in channels_last; "
                    "call .contiguous() on it");
    const MapShape map{rows, static_cast<int32_t>(level.size(2)),
                       static_cast<int32_t>(level.size(3))};
    params.levels.push_back({map, const_cast<void*>(level.const_data_ptr()), channels_last});
    rows += params.images * map.pixels();
  }
  PackCall call{std::move(params), torch::stable::new_empty(first, {rows, first.size(1)})};
  call.params.rows = call.rows.mutable_data_ptr();
  return call;
}

struct UnpackCall {
  PackParams params;
  std::vector<Tensor> levels;
};

// `maps`: first_row, height, width of each level.
inline UnpackCall prepare_unpack_levels(const Tensor& rows, int64_t images, const IntList& maps) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous(), "expected contiguous rows [R, C], got ",
                  shape_string(rows));
  STD_TORCH_CHECK(maps.size() % 3 == 0, "expected a table of 3 n integers, got ", maps.size());
  STD_TORCH_CHECK(images >= 0, "expected a number of images, got ", images);
  const int64_t channels = rows.size(1);
  UnpackCall call{
      {images, channels, element_bytes_of(rows), const_cast<void*>(rows.const_data_ptr()), {}}, {}};
  for (size_t i = 0; i < maps.size(); i += 3) {
    const MapShape map = read_map(maps, i, images, rows.size(0), "level");
    call.levels.push_back(
        torch::stable::new_empty(rows, {images, channels, map.height, map.width}));
    call.params.levels.push_back({map, call.levels.back().mutable_data_ptr(), false});
  }
  return call;
}

}  // namespace dyhead
