#include "block_coefficients.h"

#include "../../host/block_coefficients.h"
#include "../../host/cuda.h"

namespace dyhead::cuda {
namespace {

void run_fwd(const BlockCoefficientsFwdParams& params, const Tensor& like) {
  check_shared_memory(block_coefficients_fwd_shared_bytes(params.shape));
  STD_CUDA_CHECK(launch_block_coefficients_fwd(params, current_stream(like)));
}

void run_bwd(const BlockCoefficientsBwdParams& params, const Tensor& like) {
  check_shared_memory(block_coefficients_bwd_shared_bytes(params.shape));
  STD_CUDA_CHECK(launch_block_coefficients_bwd(params, current_stream(like)));
}

BlockCoefficientsFwdResult block_coefficients_fwd(
    const Tensor& mean, const Tensor& var, const Tensor& up_mean, const TensorList& norm_weights,
    const TensorList& norm_biases, const Tensor& gate_weight, const Tensor& gate_bias,
    const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& fc2_weight,
    const Tensor& fc2_bias, const IntList& levels_of, const IntList& branches_of,
    int64_t num_groups, double eps) {
  const auto guard = device_guard(mean);
  return block_coefficients_fwd_with(
      [&](const BlockCoefficientsFwdParams& params) { run_fwd(params, mean); }, mean, var, up_mean,
      norm_weights, norm_biases, gate_weight, gate_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
      levels_of, branches_of, num_groups, eps);
}

BlockCoefficientsBwdResult block_coefficients_bwd(
    const Tensor& grad_scale, const Tensor& grad_shift, const Tensor& grad_coefficients,
    const Tensor& mean, const Tensor& up_mean, const Tensor& norms, const Tensor& layers,
    const TensorList& norm_weights, const TensorList& norm_biases, const Tensor& gate_weight,
    const Tensor& fc1_weight, const Tensor& fc2_weight, const IntList& levels_of,
    const IntList& branches_of, int64_t num_groups) {
  const auto guard = device_guard(mean);
  return block_coefficients_bwd_with(
      [&](const BlockCoefficientsBwdParams& params) { run_bwd(params, mean); }, grad_scale,
      grad_shift, grad_coefficients, mean, up_mean, norms, layers, norm_weights, norm_biases,
      gate_weight, fc1_weight, fc2_weight, levels_of, branches_of, num_groups);
}

}  // namespace
}  // namespace dyhead::cuda

STABLE_TORCH_LIBRARY_IMPL(dyhead, CUDA, m) {
  m.impl("block_coefficients_fwd", TORCH_BOX(&dyhead::cuda::block_coefficients_fwd));
  m.impl("block_coefficients_bwd", TORCH_BOX(&dyhead::cuda::block_coefficients_bwd));
}
