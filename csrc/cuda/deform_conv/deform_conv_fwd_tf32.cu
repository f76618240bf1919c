#include "deform_conv_fwd.cuh"

namespace dyhead::cuda {

cudaError_t launch_deform_fwd_tf32(const DeformFwdKernelParams& params, const DeformTiling& tiling,
                                   cudaStream_t stream) {
  using Op = Tf32;
  if (!tiling.vectors) return launch_deform_fwd_tiles<Op, 128, 32, false>(params, stream);
  if (tiling.cols == 32) return launch_deform_fwd_tiles<Op, 128, 32, true>(params, stream);
  if (tiling.cols == 128) return launch_deform_fwd_tiles<Op, 128, 128, true>(params, stream);
  if (tiling.rows == 64) return launch_deform_fwd_tiles<Op, 64, 256, true>(params, stream);
  return launch_deform_fwd_tiles<Op, 128, 256, true>(params, stream);
}

}  // namespace dyhead::cuda
