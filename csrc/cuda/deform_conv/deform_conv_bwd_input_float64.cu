#include "deform_conv_bwd_input.cuh"

namespace dyhead::cuda {

cudaError_t launch_deform_bwd_input_float64(const DeformBwdInputParams& params, bool vectors,
                                            cudaStream_t stream) {
  return launch_deform_bwd_input_op<double>(params, vectors, stream);
}

}  // namespace dyhead::cuda
