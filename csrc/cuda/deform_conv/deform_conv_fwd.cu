#include "deform_conv_math.cuh"

namespace dyhead::cuda {

cudaError_t launch_deform_fwd(const DeformFwdKernelParams& params, DeformMath math,
                              const DeformTiling& tiling, cudaStream_t stream) {
  const DeformShape& s = params.launch.shape;
  const int32_t tiles = params.launch.tile_count * s.groups * params.panels.column_panels;
  if (tiles == 0) return cudaSuccess;
  const DeformFwdKernel kernel = dispatch_math(math, [&](auto op) {
    using Op = decltype(op);
    if constexpr (Operand<Op>::kTensor) {
      if (tiling.plain) return PlainFwdKernels<Op>::choose();
    }
    return DeformFwdKernels<Op>::choose(tiling);
  });
  if (kernel == nullptr) return cudaErrorInvalidConfiguration;
  const LaunchConfig config{
      .grid = dim3(static_cast<unsigned>(params.split.blocks(tiles))),
      .block = dim3(kTileThreads),
      .shared_bytes = tiling.plain ? kPlainSharedBytes
                                   : forward_shared_bytes(tiling.rows, tiling.cols, s.dtype,
                                                          params.taps_at_once),
      .stream = stream,
  };
  return launch(kernel, config, params);
}

}  // namespace dyhead::cuda
