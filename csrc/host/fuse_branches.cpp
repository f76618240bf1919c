#include "../common/fuse_branches.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "device.h"
#include "maps.h"
#include "wanted.h"

namespace dyhead {
namespace {

// Height and width of each branch map and of each level; level_branches has the fields of
// level_field for each level, where a branch that does not exist is -1.
FuseTables read_fuse_tables(const Tensor& y, const Tensor& scale, const Tensor& shift,
                            const Tensor& coefficients, int64_t images, const IntList& branch_sizes,
                            const IntList& level_sizes, const IntList& level_branches,
                            int64_t up_mode) {
  constexpr size_t kLevelFields = level_field::kFieldCount;
  STD_TORCH_CHECK(y.dim() == 2 && y.size(1) > 0, "expected y [S, C] of at least one channel, got ",
                  shape_string(y));
  FuseTables t{};
  t.images = read_images(images);
  t.channels = y.size(1);
  t.dtype = dtype_of(y);
  t.maps = read_all_maps("branch", branch_sizes, images, y.size(0));
  const std::vector<MapShape> outs =
      read_maps("level", level_sizes, images, std::numeric_limits<int64_t>::max() / 8 / t.channels);
  STD_TORCH_CHECK(!outs.empty() && level_branches.size() == kLevelFields * outs.size(), "expected ",
                  kLevelFields, " branches for each of at least one level, got ",
                  level_branches.size(), " for ", outs.size(), " levels");
  const int64_t map_count = std::ssize(t.maps);
  const int64_t level_count = std::ssize(outs);
  const ScalarType compute = compute_type_of(y);
  check_tensor("y", y, {y.size(0), t.channels}, y.scalar_type(), y);
  check_tensor("scale", scale, {map_count, images, t.channels}, compute, y);
  check_tensor("shift", shift, {level_count, images, t.channels}, compute, y);
  check_tensor("coefficients", coefficients, {level_count, images, 4, t.channels}, compute, y);

  const UpsampleMode mode = read_upsample_mode(up_mode);
  std::vector<int> uses(map_count, 0);
  for (size_t l = 0; l < outs.size(); ++l) {
    FuseLevel level{};
    level.out = outs[l];
    level.mode = mode;
    t.out_rows += images * level.out.pixels();
    const auto first = level_branches.begin() + static_cast<std::ptrdiff_t>(l * kLevelFields);
    const auto last = std::find(first, first + kLevelFields, -1);
    STD_TORCH_CHECK(
        last != first && std::count(last, first + kLevelFields, -1) == first + kLevelFields - last,
        "expected a level of 1 to ", kMaxBranches,
        " branches, then -1 for each unused "
        "one");
    for (auto index = first; index != last; ++index) {
      STD_TORCH_CHECK(*index >= 0 && *index < map_count, "expected a branch out of ", map_count,
                      " maps, got ", *index);
      const MapShape& map = t.maps[*index];
      STD_TORCH_CHECK(level.out.pixels() == 0 || map.pixels() > 0,
                      "expected a branch of pixels for a level of ", level.out.height, "x",
                      level.out.width, ", got ", map.height, "x", map.width);
      level.branch[level.branches++] = static_cast<int32_t>(*index);
      ++uses[*index];
    }
    t.levels.push_back(level);
  }
  // So that every row of y gets its gradient, and from one level.
  STD_TORCH_CHECK(std::all_of(uses.begin(), uses.end(), [](int n) { return n == 1; }),
                  "expected every branch map in exactly one level");
  return t;
}

Tensor fuse_branches_fwd(const Tensor& y, const Tensor& scale, const Tensor& shift,
                         const Tensor& coefficients, int64_t images, const IntList& branch_sizes,
                         const IntList& level_sizes, const IntList& level_branches,
                         int64_t up_mode) {
  Call call(y);
  const FuseTables tables = read_fuse_tables(y, scale, shift, coefficients, images, branch_sizes,
                                             level_sizes, level_branches, up_mode);
  const Tensor out = torch::stable::new_empty(y, {tables.out_rows, tables.channels});
  run_fuse_branches_fwd(
      {&tables, y.const_data_ptr(), scale.const_data_ptr(), shift.const_data_ptr(),
       coefficients.const_data_ptr(), out.mutable_data_ptr()},
      call);
  return out;
}

// Returns the gradients of y, scale, shift and coefficients, as far as wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor> fuse_branches_bwd(
    const Tensor& grad_out, const Tensor& y, const Tensor& scale, const Tensor& shift,
    const Tensor& coefficients, int64_t images, const IntList& branch_sizes,
    const IntList& level_sizes, const IntList& level_branches, int64_t up_mode,
    const IntList& wanted_results) {
  Call call(y);
  const FuseTables tables = read_fuse_tables(y, scale, shift, coefficients, images, branch_sizes,
                                             level_sizes, level_branches, up_mode);
  check_tensor("grad_out", grad_out, {tables.out_rows, tables.channels}, y.scalar_type(), y);
  Wanted wanted(wanted_results, 4);
  const ScalarType compute = compute_type_of(y);
  const int64_t channels = tables.channels;
  const int64_t maps = std::ssize(tables.maps), levels = std::ssize(tables.levels);
  FuseBranchesBwdParams p{&tables,
                          grad_out.const_data_ptr(),
                          y.const_data_ptr(),
                          scale.const_data_ptr(),
                          shift.const_data_ptr(),
                          coefficients.const_data_ptr(),
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};
  const Tensor grad_y =
      wanted.allocate(0, false, y, {y.size(0), channels}, y.scalar_type(), p.grad_y);
  const Tensor grad_scale =
      wanted.allocate(1, false, y, {maps, images, channels}, compute, p.grad_scale);
  const Tensor grad_shift =
      wanted.allocate(2, false, y, {levels, images, channels}, compute, p.grad_shift);
  const Tensor grad_coefficients =
      wanted.allocate(3, false, y, {levels, images, 4, channels}, compute, p.grad_coefficients);
  run_fuse_branches_bwd(p, call);
  return {grad_y, grad_scale, grad_shift, grad_coefficients};
}

}  // namespace
}  // namespace dyhead

DYHEAD_SCHEMAS(m) {
  // Upsampled branches, scaled and added, through the dynamic ReLU (csrc/common/fuse_branches.h).
  m.def(
      "fuse_branches_fwd(Tensor y, Tensor scale, Tensor shift, Tensor coefficients, "
      "SymInt images, SymInt[] branch_sizes, SymInt[] level_sizes, int[] level_branches, "
      "int up_mode) -> Tensor");
  // Returns the gradients of y, scale, shift and coefficients; `wanted` has 1 or 0 for each
  // (csrc/host/wanted.h).
  m.def(
      "fuse_branches_bwd(Tensor grad_out, Tensor y, Tensor scale, Tensor shift, "
      "Tensor coefficients, SymInt images, SymInt[] branch_sizes, SymInt[] level_sizes, "
      "int[] level_branches, int up_mode, int[] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
}

DYHEAD_REGISTER(m) {
  m.impl("fuse_branches_fwd", TORCH_BOX(&dyhead::fuse_branches_fwd));
  m.impl("fuse_branches_bwd", TORCH_BOX(&dyhead::fuse_branches_bwd));
}
