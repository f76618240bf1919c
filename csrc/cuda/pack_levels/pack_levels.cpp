#include "pack_levels.h"

#include "../../host/cuda.h"
#include "../../host/pack_levels.h"

namespace dyhead::cuda {
namespace {

Tensor pack_levels(const std::vector<Tensor>& levels) {
  STD_TORCH_CHECK(!levels.empty(), "expected at least one level");
  const auto guard = device_guard(levels.front());
  const PackCall call = prepare_pack_levels(levels);
  STD_CUDA_CHECK(
      launch_pack_levels(call.params, pack_tables(call.params), current_stream(call.rows)));
  return call.rows;
}

std::vector<Tensor> unpack_levels(const Tensor& rows, int64_t images,
                                  const std::vector<int64_t>& maps) {
  const auto guard = device_guard(rows);
  const UnpackCall call = prepare_unpack_levels(rows, images, maps);
  STD_CUDA_CHECK(launch_unpack_levels(call.params, pack_tables(call.params), current_stream(rows)));
  return call.levels;
}

}  // namespace
}  // namespace dyhead::cuda

STABLE_TORCH_LIBRARY_IMPL(dyhead, CUDA, m) {
  m.impl("pack_levels", TORCH_BOX(&dyhead::cuda::pack_levels));
  m.impl("unpack_levels", TORCH_BOX(&dyhead::cuda::unpack_levels));
}
