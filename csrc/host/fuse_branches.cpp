#include "../common/fuse_branches.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "device.h"
#include "maps.h"

namespace dyhead {
namespace {

// `maps` has the fields of map_field for each branch map; `levels` those of level_field for each
// level, where a branch that does not exist is -1.
FuseTables read_fuse_tables(const Tensor& y, const Tensor& scale, const Tensor& shift,
                            const Tensor& coefficients, int64_t images, const IntList& maps,
                            const IntList& levels) {
  constexpr size_t kMapFields = map_field::kFieldCount, kLevelFields = level_field::kFieldCount;
  STD_TORCH_CHECK(
      !levels.empty() && levels.size() % kLevelFields == 0 && maps.size() % kMapFields == 0,
      "expected tables of ", kMapFields, " n and ", kLevelFields, " n integers, got ", maps.size(),
      " and ", levels.size());
  STD_TORCH_CHECK(y.dim() == 2 && y.size(1) > 0, "expected y [S, C] of at least one channel, got ",
                  shape_string(y));
  FuseTables t{};
  t.images = images;
  t.channels = y.size(1);
  t.dtype = dtype_of(y);
  const int64_t map_count = static_cast<int64_t>(maps.size() / kMapFields);
  const int64_t level_count = static_cast<int64_t>(levels.size() / kLevelFields);
  const ScalarType compute = compute_type_of(y);
  check_tensor("y", y, {y.size(0), t.channels}, y.scalar_type(), y);
  check_tensor("scale", scale, {map_count, images, t.channels}, compute, y);
  check_tensor("shift", shift, {level_count, images, t.channels}, compute, y);
  check_tensor("coefficients", coefficients, {level_count, images, 4, t.channels}, compute, y);

  int64_t covered = 0;
  for (size_t i = 0; i < maps.size(); i += kMapFields) {
    t.maps.push_back(read_next_map(maps, i, images, covered, y.size(0), "branch"));
    covered += images * t.maps.back().pixels();
  }
  STD_TORCH_CHECK(covered == y.size(0), "expected branch maps that cover all ", y.size(0),
                  " rows, got ", covered);

  const int64_t max_rows = std::numeric_limits<int64_t>::max() / 8 / t.channels;
  std::vector<int> uses(map_count, 0);
  for (size_t i = 0; i < levels.size(); i += kLevelFields) {
    FuseLevel level{};
    level.out = read_next_map(levels, i, images, t.out_rows, max_rows, "level");
    t.out_rows += images * level.out.pixels();
    const int64_t count = levels[i + level_field::branches];
    STD_TORCH_CHECK(count >= 1 && count <= kMaxBranches, "expected a level of 1 to ", kMaxBranches,
                    " branches, got ", count);
    level.branches = static_cast<int32_t>(count);
    level.mode = read_upsample_mode(levels[i + level_field::up_mode]);
    for (int32_t b = 0; b < kMaxBranches; ++b) {
      const int64_t index = levels[i + level_field::branch_0 + b];
      if (b >= count) {
        STD_TORCH_CHECK(index == -1, "expected -1 for an unused branch, got ", index);
        continue;
      }
      STD_TORCH_CHECK(index >= 0 && index < map_count, "expected a branch out of ", map_count,
                      " maps, got ", index);
      const MapShape& map = t.maps[index];
      STD_TORCH_CHECK(level.out.pixels() == 0 || map.pixels() > 0,
                      "expected a branch of pixels for a level of ", level.out.height, "x",
                      level.out.width, ", got ", map.height, "x", map.width);
      level.branch[b] = static_cast<int32_t>(index);
      ++uses[index];
    }
    t.levels.push_back(level);
  }
  // So that every row of y gets its gradient, and from one level.
  STD_TORCH_CHECK(std::all_of(uses.begin(), uses.end(), [](int n) { return n == 1; }),
                  "expected every branch map in exactly one level");
  return t;
}

Tensor fuse_branches_fwd(const Tensor& y, const Tensor& scale, const Tensor& shift,
                         const Tensor& coefficients, int64_t images, const IntList& maps,
                         const IntList& levels) {
  Call call(y);
  const FuseTables tables = read_fuse_tables(y, scale, shift, coefficients, images, maps, levels);
  const Tensor out = torch::stable::new_empty(y, {tables.out_rows, tables.channels});
  run_fuse_branches_fwd(
      {&tables, y.const_data_ptr(), scale.const_data_ptr(), shift.const_data_ptr(),
       coefficients.const_data_ptr(), out.mutable_data_ptr()},
      call);
  return out;
}

// Returns the gradients of y, scale, shift and coefficients.
std::tuple<Tensor, Tensor, Tensor, Tensor> fuse_branches_bwd(
    const Tensor& grad_out, const Tensor& y, const Tensor& scale, const Tensor& shift,
    const Tensor& coefficients, int64_t images, const IntList& maps, const IntList& levels) {
  Call call(y);
  const FuseTables tables = read_fuse_tables(y, scale, shift, coefficients, images, maps, levels);
  check_tensor("grad_out", grad_out, {tables.out_rows, tables.channels}, y.scalar_type(), y);
  const Tensor grad_y = torch::stable::empty_like(y);
  const Tensor grad_scale = torch::stable::empty_like(scale);
  const Tensor grad_shift = torch::stable::empty_like(shift);
  const Tensor grad_coefficients = torch::stable::empty_like(coefficients);
  run_fuse_branches_bwd(
      {&tables, grad_out.const_data_ptr(), y.const_data_ptr(), scale.const_data_ptr(),
       shift.const_data_ptr(), coefficients.const_data_ptr(), grad_y.mutable_data_ptr(),
       grad_scale.mutable_data_ptr(), grad_shift.mutable_data_ptr(),
       grad_coefficients.mutable_data_ptr()},
      call);
  return {grad_y, grad_scale, grad_shift, grad_coefficients};
}

}  // namespace
}  // namespace dyhead

DYHEAD_SCHEMAS(m) {
  // Upsampled branches, scaled and added, through the dynamic ReLU (csrc/common/fuse_branches.h).
  m.def(
      "fuse_branches_fwd(Tensor y, Tensor scale, Tensor shift, Tensor coefficients, int images, "
      "int[] maps, int[] levels) -> Tensor");
  // Returns the gradients of y, scale, shift and coefficients.
  m.def(
      "fuse_branches_bwd(Tensor grad_out, Tensor y, Tensor scale, Tensor shift, "
      "Tensor coefficients, int images, int[] maps, int[] levels) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

DYHEAD_REGISTER(m) {
  m.impl("fuse_branches_fwd", TORCH_BOX(&dyhead::fuse_branches_fwd));
  m.impl("fuse_branches_bwd", TORCH_BOX(&dyhead::fuse_branches_bwd));
}
