#include "deform_conv_bwd.h"
#include "deform_conv_math.cuh"

namespace dyhead::cuda {

cudaError_t launch_deform_bwd_input(const DeformBwdInputParams& params, DeformMath math,
                                    bool vectors, bool wgmma, cudaStream_t stream) {
  if (params.launch.tile_count == 0) return cudaSuccess;
  const DeformBwdInputKernel kernel = dispatch_math(math, [&](auto op) -> DeformBwdInputKernel {
    using Op = decltype(op);
    if constexpr (is_half_v<Op>) {
      if (wgmma) return DeformBwdInputWgmmaKernels<Op>::choose();
    }
    return DeformBwdInputKernels<Op>::choose(params.tile_rows, vectors);
  });
  if (kernel == nullptr) return cudaErrorInvalidValue;
  const LaunchConfig config{
      .grid = dim3(static_cast<unsigned>(params.launch.tile_count)),
      .block = dim3(kTileThreads),
      .shared_bytes = input_shared_bytes(params.launch.shape.dtype, params.tile_rows, params.chunks,
                                         params.taps_at_once),
      .stream = stream,
  };
  return launch(kernel, config, params);
}

}  // namespace dyhead::cuda
