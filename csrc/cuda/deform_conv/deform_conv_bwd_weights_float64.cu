#include "deform_conv_bwd_weights.cuh"

namespace dyhead::cuda {

cudaError_t launch_deform_bwd_weights_float64(const DeformBwdWeightsParams& params, bool vectors,
                                              cudaStream_t stream) {
  using Op = double;
  if (!vectors) return launch_deform_bwd_weights_tiles<Op, 32, false>(params, stream);
  return launch_deform_bwd_weights_tiles<Op, 32, true>(params, stream);
}

}  // namespace dyhead::cuda
