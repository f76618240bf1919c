#include "deform_conv_fwd.cuh"

namespace dyhead::cuda {

cudaError_t launch_deform_fwd_float32(const DeformFwdKernelParams& params,
                                      const DeformTiling& tiling, cudaStream_t stream) {
  using Op = float;
  if (!tiling.vectors) return launch_deform_fwd_tiles<Op, 128, 32, false>(params, stream);
  if (tiling.cols == 32) return launch_deform_fwd_tiles<Op, 128, 32, true>(params, stream);
  return launch_deform_fwd_tiles<Op, 128, 128, true>(params, stream);
}

}  // namespace dyhead::cuda
