#include "fuse_branches.h"

#include "../host/fuse_branches.h"

namespace dyhead::cpu {
namespace {

Tensor fuse_branches_fwd(const Tensor& y, const Tensor& scale, const Tensor& shift,
                         const Tensor& coefficients, int64_t images,
                         const std::vector<int64_t>& maps, const std::vector<int64_t>& levels) {
  return fuse_branches_fwd_with(run_fuse_branches_fwd, y, scale, shift, coefficients, images, maps,
                                levels);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fuse_branches_bwd(
    const Tensor& grad_out, const Tensor& y, const Tensor& scale, const Tensor& shift,
    const Tensor& coefficients, int64_t images, const std::vector<int64_t>& maps,
    const std::vector<int64_t>& levels) {
  return fuse_branches_bwd_with(run_fuse_branches_bwd, grad_out, y, scale, shift, coefficients,
                                images, maps, levels);
}

}  // namespace
}  // namespace dyhead::cpu

STABLE_TORCH_LIBRARY_IMPL(dyhead, CPU, m) {
  m.impl("fuse_branches_fwd", TORCH_BOX(&dyhead::cpu::fuse_branches_fwd));
  m.impl("fuse_branches_bwd", TORCH_BOX(&dyhead::cpu::fuse_branches_bwd));
}
