#include "deform_conv_fwd.cuh"

namespace dyhead::cuda {

cudaError_t launch_deform_fwd_float64(const DeformFwdKernelParams& params,
                                      const DeformTiling& tiling, cudaStream_t stream) {
  using Op = double;
  if (!tiling.vectors) return launch_deform_fwd_tiles<Op, 128, 32, false>(params, stream);
  return launch_deform_fwd_tiles<Op, 128, 32, true>(params, stream);
}

}  // namespace dyhead::cuda
