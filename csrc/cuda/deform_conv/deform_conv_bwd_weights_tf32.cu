#include "deform_conv_bwd_weights.cuh"

namespace dyhead::cuda {

cudaError_t launch_deform_bwd_weights_tf32(const DeformBwdWeightsParams& params, bool vectors,
                                           cudaStream_t stream) {
  using Op = Tf32;
  if (!vectors) return launch_deform_bwd_weights_tiles<Op, 32, false>(params, stream);
  if (params.columns.outs == 32)
    return launch_deform_bwd_weights_tiles<Op, 32, true>(params, stream);
  if (params.columns.outs == 128)
    return launch_deform_bwd_weights_tiles<Op, 128, true>(params, stream);
  return launch_deform_bwd_weights_tiles<Op, 256, true>(params, stream);
}

}  // namespace dyhead::cuda
