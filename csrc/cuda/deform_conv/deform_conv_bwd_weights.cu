#include "deform_conv_bwd_weights.h"

#include "deform_conv_math.cuh"

namespace dyhead::cuda {

cudaError_t launch_deform_bwd_weights(const DeformBwdWeightsParams& params, DeformMath math,
                                      bool vectors, bool plain, cudaStream_t stream) {
  const DeformWeightSlices& slices = params.slices;
  const int32_t blocks = slices.first[slices.count] * params.columns.blocks(params.launch.shape);
  if (blocks == 0) return cudaSuccess;
  const DeformBwdWeightsKernel chosen = dispatch_math(math, [&](auto op) {
    return DeformBwdWeightsKernels<decltype(op)>::choose(params.columns.outs, vectors, plain);
  });
  if (chosen.kernel == nullptr) return cudaErrorInvalidConfiguration;
  const LaunchConfig config{
      .grid = dim3(static_cast<unsigned>(blocks)),
      .block = dim3(kTileThreads),
      .shared_bytes = chosen.shared_bytes,
      .stream = stream,
  };
  return launch(chosen.kernel, config, params);
}

}  // namespace dyhead::cuda
