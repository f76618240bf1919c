#include "offset_deform_conv.h"

#include "cuda/deform_conv/deform_conv_bwd_input_run.h"
#include "cuda/deform_conv/deform_conv_bwd_weights_run.h"
#include "cuda/deform_conv/deform_conv_fwd_run.h"

namespace dyhead::simt_test {

using namespace dyhead::cuda;

cudaError_t run_offset_deform_fwd(DeformFwdParams predict, const DeformFwdParams& read,
                                  const OffsetDeformDevice& device) {
  const DeformCall offsets = offset_conv_call(*read.call);
  predict.call = &offsets;
  const DeformFwdParams calls[] = {predict, read};
  return run_deform_fwd(calls, device.allow_tf32, device.limits, device.allocate, nullptr);
}

cudaError_t run_offset_deform_bwd(DeformBwdParams predict, const DeformBwdParams& read,
                                  const OffsetDeformDevice& device) {
  const DeformCall offsets = offset_conv_call(*read.call);
  predict.call = &offsets;
  std::vector<DeformBwdCall> calls;
  for (const DeformBwdParams* p : {&read, static_cast<const DeformBwdParams*>(&predict)}) {
    if (p == &predict && read.grad_predictions == nullptr) continue;
    const DeformShape& s = p->call->shape;
    calls.push_back(
        {p, device.allocate(p->call->out_rows * s.out_channels * element_bytes(s.dtype))});
  }
  cudaError_t error =
      run_deform_bwd_input(calls, device.allow_tf32, device.limits, device.allocate, nullptr);
  for (const DeformBwdCall& call : calls) {
    if (error != cudaSuccess || call.params->grad_weights == nullptr) continue;
    error = run_deform_bwd_weights(*call.params, call.rows, device.allow_tf32, device.limits,
                                   device.allocate, nullptr);
  }
  return error;
}

}  // namespace dyhead::simt_test
