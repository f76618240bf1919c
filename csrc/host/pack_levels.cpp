#include "../common/pack_levels.h"

#include <vector>

#include "device.h"
#include "maps.h"

namespace dyhead {
namespace {

// Whether t [N, C, H, W] is dense with its channels innermost.
bool is_channels_last(const Tensor& t) {
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) > 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

Tensor pack_levels(const std::vector<Tensor>& levels) {
  STD_TORCH_CHECK(!levels.empty(), "expected at least one level");
  const Tensor& first = levels.front();
  Call call(first);
  STD_TORCH_CHECK(first.dim() == 4, "expected levels [N, C, H, W], got ", shape_string(first));
  PackParams params{first.size(0), first.size(1), element_bytes(dtype_of(first)), nullptr, {}};
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
  const Tensor packed = torch::stable::new_empty(first, {rows, first.size(1)});
  params.rows = packed.mutable_data_ptr();
  run_pack_levels(params, call);
  return packed;
}

// `sizes`: height and width of each level.
std::vector<Tensor> unpack_levels(const Tensor& rows, int64_t images, const IntList& sizes) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous(), "expected contiguous rows [R, C], got ",
                  shape_string(rows));
  Call call(rows);
  const int64_t channels = rows.size(1);
  PackParams params{read_images(images),
                    channels,
                    element_bytes(dtype_of(rows)),
                    const_cast<void*>(rows.const_data_ptr()),
                    {}};
  std::vector<Tensor> levels;
  for (const MapShape& map : read_all_maps("level", sizes, images, rows.size(0))) {
    levels.push_back(torch::stable::new_empty(rows, {images, channels, map.height, map.width}));
    params.levels.push_back({map, levels.back().mutable_data_ptr(), false});
  }
  run_unpack_levels(params, call);
  return levels;
}

}  // namespace
}  // namespace dyhead

DYHEAD_SCHEMAS(m) {
  // Levels [N, C, H, W], each contiguous or channels_last, as rows [R, C], one after the other.
  m.def("pack_levels(Tensor[] levels) -> Tensor");
  // Contiguous levels from their rows: height and width of each.
  m.def("unpack_levels(Tensor rows, SymInt images, SymInt[] sizes) -> Tensor[]");
}

DYHEAD_REGISTER(m) {
  m.impl("pack_levels", TORCH_BOX(&dyhead::pack_levels));
  m.impl("unpack_levels", TORCH_BOX(&dyhead::unpack_levels));
}
