#include "fuse_branches.h"

#include "../../host/cuda.h"
#include "../../host/fuse_branches.h"

namespace dyhead::cuda {
namespace {

Tensor fuse_branches_fwd(const Tensor& y, const Tensor& scale, const Tensor& shift,
                         const Tensor& coefficients, int64_t images,
                         const std::vector<int64_t>& maps, const std::vector<int64_t>& levels) {
  const auto guard = device_guard(y);
  const auto run = [&](const FuseBranchesFwdParams& params) {
    const FuseTables& t = *params.tables;
    const FuseLaunches launches = fuse_launches(t, fuse_fwd_tiling(t.channels));
    STD_CUDA_CHECK(launch_fuse_branches_fwd(params, launches, current_stream(y)));
  };
  return fuse_branches_fwd_with(run, y, scale, shift, coefficients, images, maps, levels);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fuse_branches_bwd(
    const Tensor& grad_out, const Tensor& y, const Tensor& scale, const Tensor& shift,
    const Tensor& coefficients, int64_t images, const std::vector<int64_t>& maps,
    const std::vector<int64_t>& levels) {
  const auto guard = device_guard(y);
  const auto run = [&](const FuseBranchesBwdParams& params) {
    const FuseTables& t = *params.tables;
    const FuseLaunches launches = fuse_launches(t, fuse_bwd_tiling(t.channels));
    const Tensor partial = torch::stable::new_empty(
        scale, {launches.partials, kFuseSums, t.channels}, compute_type_of(y));
    const ScalarType kept_type =
        y.scalar_type() == ScalarType::Half ? ScalarType::Float : y.scalar_type();
    const Tensor grad_z =
        torch::stable::new_empty(y, {launches.grad_z_rows, t.channels}, kept_type);
    const FuseBwdWorkspace workspace{partial.mutable_data_ptr(), grad_z.mutable_data_ptr()};
    STD_CUDA_CHECK(launch_fuse_branches_bwd(params, launches, workspace, current_stream(y)));
  };
  return fuse_branches_bwd_with(run, grad_out, y, scale, shift, coefficients, images, maps, levels);
}

}  // namespace
}  // namespace dyhead::cuda

STABLE_TORCH_LIBRARY_IMPL(dyhead, CUDA, m) {
  m.impl("fuse_branches_fwd", TORCH_BOX(&dyhead::cuda::fuse_branches_fwd));
  m.impl("fuse_branches_bwd", TORCH_BOX(&dyhead::cuda::fuse_branches_bwd));
}
