#include "deform_conv_math.cuh"

namespace dyhead::cuda {

cudaError_t launch_deform_fwd(const DeformFwdKernelParams& params, DeformMath math,
                              const DeformTiling& tiling, const DeviceLimits& device,
                              cudaStream_t stream) {
  if (params.items == 0) return cudaSuccess;
  const DeformFwdKernel kernel = dispatch_math(math, [&](auto op) -> DeformFwdKernel {
    using Op = decltype(op);
    if constexpr (Operand<Op>::kTensor) {
      if (tiling.kernel == ForwardKernel::kPlain) return PlainFwdKernels<Op>::choose();
    }
    if constexpr (is_half_v<Op>) {
      if (tiling.kernel == ForwardKernel::kWgmma) return DeformFwdWgmmaKernels<Op>::choose();
    }
    return DeformFwdKernels<Op>::choose(tiling);
  });
  if (kernel == nullptr) return cudaErrorInvalidConfiguration;
  LaunchConfig config{
      .grid = dim3(static_cast<unsigned>(params.items)),
      .block = dim3(kTileThreads),
      .stream = stream,
  };
  switch (tiling.kernel) {
    case ForwardKernel::kPlain:
      config.shared_bytes = kPlainSharedBytes;
      break;
    case ForwardKernel::kWgmma:
      // Blocks stay for all tiles.
      config.cluster = kClusterBlocks;
      config.grid.x =
          kClusterBlocks * static_cast<unsigned>(std::min(
                               params.items, std::max(1, device.processors / kClusterBlocks)));
      config.block = dim3(kWgmmaThreads);
      config.shared_bytes = kWgmmaSharedBytes;
      break;
    case ForwardKernel::kAny:
      config.shared_bytes = forward_shared_bytes(tiling.rows, tiling.cols,
                                                 params.launch.shape.dtype, params.taps_at_once);
      break;
  }
  return launch(kernel, config, params);
}

}  // namespace dyhead::cuda
