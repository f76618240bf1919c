#include "dynamic_relu.h"

#include "../../host/cuda.h"
#include "../../host/dynamic_relu.h"

namespace dyhead::cuda {
namespace {

// Allocates what the kernel needs beside its tensors, for `quantities` sums per channel, launches
// it and raises upon an error.
template <class Params>
void run(const Params& params, const Tensor& rows, int resident, int quantities,
         cudaError_t (*launch)(const Params&, const DynamicReluGrid&, const DynamicReluWorkspace&,
                               cudaStream_t)) {
  const DynamicReluShape& s = params.shape;
  STD_TORCH_CHECK(resident > 0,
                  "expected channels whose sums fit the shared memory of a block, got ", s.channels,
                  " channels with a hidden layer of ", s.hidden,
                  "; run this layer under backend(\"reference\")");
  const ScalarType compute = compute_type_of(rows);
  const DynamicReluGrid grid = dynamic_relu_grid(s.images, s.pixels, resident);
  const Tensor partial = torch::stable::new_empty(
      rows, {s.images, grid.blocks_per_image, quantities, s.channels}, compute);
  const Tensor grad_mean = torch::stable::new_empty(rows, {s.images, s.channels}, compute);
  const Tensor arrived = torch::stable::new_zeros(rows, {s.images}, ScalarType::Int);
  const DynamicReluWorkspace workspace{partial.mutable_data_ptr(), grad_mean.mutable_data_ptr(),
                                       static_cast<unsigned*>(arrived.mutable_data_ptr())};
  STD_CUDA_CHECK(launch(params, grid, workspace, current_stream(rows)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dynamic_relu_fwd(
    const Tensor& rows, const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& fc2_weight,
    const Tensor& fc2_bias, bool hard_sigmoid) {
  const auto guard = device_guard(rows);
  const DynamicReluFwdCall call =
      prepare_dynamic_relu_fwd(rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias, hard_sigmoid);
  if (call.params.shape.images > 0) {
    run(call.params, rows, dynamic_relu_fwd_resident(call.params), 1, launch_dynamic_relu_fwd);
  }
  return call.results();
}

std::tuple<Tensor, Tensor, Tensor> dynamic_relu_bwd(const Tensor& grad_out, const Tensor& rows,
                                                    const Tensor& hidden, const Tensor& logits,
                                                    const Tensor& fc1_weight,
                                                    const Tensor& fc2_weight, bool hard_sigmoid) {
  const auto guard = device_guard(rows);
  const DynamicReluBwdCall call = prepare_dynamic_relu_bwd(grad_out, rows, hidden, logits,
                                                           fc1_weight, fc2_weight, hard_sigmoid);
  if (call.params.shape.images > 0) {
    run(call.params, rows, dynamic_relu_bwd_resident(call.params), 4, launch_dynamic_relu_bwd);
  }
  return call.results();
}

}  // namespace
}  // namespace dyhead::cuda

STABLE_TORCH_LIBRARY_IMPL(dyhead, CUDA, m) {
  m.impl("dynamic_relu_fwd", TORCH_BOX(&dyhead::cuda::dynamic_relu_fwd));
  m.impl("dynamic_relu_bwd", TORCH_BOX(&dyhead::cuda::dynamic_relu_bwd));
}
