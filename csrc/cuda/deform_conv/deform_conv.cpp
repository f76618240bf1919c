#include "deform_conv.h"

#include "../../host/cuda.h"
#include "../../host/deform_conv.h"
#include "deform_conv_bwd_input_run.h"
#include "deform_conv_bwd_weights_run.h"
#include "deform_conv_fwd_run.h"

namespace dyhead::cuda {
namespace {

constexpr bool kHalfWeights = true;

DeviceLimits device_limits(const Tensor& t) {
  int processors = 0;
  int shared_bytes = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, t.get_device()));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                        t.get_device()));
  return {processors, static_cast<size_t>(shared_bytes)};
}

// Workspaces from torch's allocator: given back at the end of the call, they are used again only
// after this stream's launches.
class Workspaces {
 public:
  explicit Workspaces(const Tensor& like) : like_(like) {}

  void* operator()(int64_t bytes) {
    tensors_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
    return tensors_.back().mutable_data_ptr();
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> tensors_;
};

void check_problem(const DeformCall& tables) {
  const char* problem = deform_problem(tables);
  STD_TORCH_CHECK(problem == nullptr, problem == nullptr ? "" : problem,
                  "; run this layer under backend(\"reference\")");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv_fwd(
    const Tensor& source, const Tensor& predictions, const std::vector<Tensor>& weights,
    const std::vector<Tensor>& bias, const std::optional<Tensor>& gates, const IntList& geometry,
    const IntList& sources, const IntList& terms, const IntList& jobs, bool mask_logits,
    bool wide_out, bool moments, bool allow_tf32) {
  const auto guard = device_guard(source);
  const auto run = [&](const DeformFwdParams& params) {
    check_problem(*params.call);
    STD_CUDA_CHECK(run_deform_fwd(params, allow_tf32, device_limits(source), Workspaces(source),
                                  current_stream(source)));
  };
  return deform_conv_fwd_with(run, kHalfWeights, source, predictions, weights, bias, gates,
                              geometry, sources, terms, jobs, mask_logits, wide_out, moments);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv_bwd(
    const Tensor& grad_out, const std::optional<Tensor>& grad_mean,
    const std::optional<Tensor>& grad_var, const std::optional<Tensor>& grad_up_mean,
    const Tensor& source, const Tensor& predictions, const std::vector<Tensor>& weights,
    const std::optional<Tensor>& gates, const Tensor& out, const Tensor& mean,
    const IntList& geometry, const IntList& sources, const IntList& terms, const IntList& jobs,
    bool mask_logits, bool wide_out, bool with_bias, bool allow_tf32, bool deterministic) {
  const auto guard = device_guard(source);
  const auto run = [&](const DeformBwdParams& params) {
    check_problem(*params.call);
    const DeviceLimits limits = device_limits(source);
    const cudaStream_t stream = current_stream(source);
    Workspaces workspaces(source);
    const DeformShape& s = params.call->shape;
    void* rows = workspaces(params.call->out_rows * s.out_channels * element_bytes(s.dtype));
    STD_CUDA_CHECK(run_deform_bwd_input(params, rows, allow_tf32, limits, workspaces, stream));
    STD_CUDA_CHECK(run_deform_bwd_weights(params, rows, allow_tf32, limits, workspaces, stream));
  };
  return deform_conv_bwd_with(run, kHalfWeights, grad_out, grad_mean, grad_var, grad_up_mean,
                              source, predictions, weights, gates, out, mean, geometry, sources,
                              terms, jobs, mask_logits, wide_out, with_bias, deterministic);
}

}  // namespace
}  // namespace dyhead::cuda

STABLE_TORCH_LIBRARY_IMPL(dyhead, CUDA, m) {
  m.impl("deform_conv_fwd", TORCH_BOX(&dyhead::cuda::deform_conv_fwd));
  m.impl("deform_conv_bwd", TORCH_BOX(&dyhead::cuda::deform_conv_bwd));
}
