// The CUDA kernels of dynamic_relu, forward and backward: one launch each.
//
// Each image is shared by `blocks_per_image` blocks. All of them sum a stretch of pixels; the last
// to arrive turns the sums into the coefficients (forward) or the gradient of the mean (backward);
// the others wait for it on the image's counter; then all of them map their stretch, which the L2
// cache still holds where it is small enough. Sums are added in a fixed order: results are
// deterministic.
#pragma once

#include <algorithm>

#include "../../common/dynamic_relu.h"
#include "../tile/launch.cuh"

namespace dyhead::cuda {

inline constexpr int kDynamicReluThreads = 256;

struct DynamicReluGrid {
  int blocks_per_image;
  int images_in_flight;
  bool cooperative;  // blocks wait for each other, so all must be resident
};

// Enough blocks per image for 64 pixels each, as far as the device holds them for all images at
// once; at most 256, since the last block of an image adds up what all of them leave. Example: 2
// images of 100 x 168 pixels on a device with 1056 resident blocks: min(263, 528, 256) = 256 blocks
// per image, 2 images in flight. 1000 regions of 7 x 7: 1 block each, no waiting.
inline DynamicReluGrid dynamic_relu_grid(int64_t images, int64_t pixels, int resident_blocks) {
  constexpr int64_t kPixelsPerBlock = 64;
  constexpr int64_t kMaxBlocksPerImage = 256;
  constexpr int64_t kMaxImagesInFlight = 32768;
  const int64_t wanted = (pixels + kPixelsPerBlock - 1) / kPixelsPerBlock;
  const int64_t blocks =
      std::max<int64_t>(1, std::min({wanted, resident_blocks / images, kMaxBlocksPerImage}));
  return {static_cast<int>(blocks), static_cast<int>(std::min(images, kMaxImagesInFlight)),
          blocks > 1};
}

// What the two kernels need beside their tensors, allocated by the caller.
struct DynamicReluWorkspace {
  void* partial;      // [N, blocks_per_image, C] forward, [N, blocks_per_image, 4, C] backward
  void* grad_mean;    // [N, C], backward only
  unsigned* arrived;  // [N], zero
};

// Blocks of the kernel for `params` that the current device holds: for dynamic_relu_grid.
int dynamic_relu_fwd_resident(const DynamicReluFwdParams& params);
int dynamic_relu_bwd_resident(const DynamicReluBwdParams& params);

cudaError_t launch_dynamic_relu_fwd(const DynamicReluFwdParams& params, const DynamicReluGrid& grid,
                                    const DynamicReluWorkspace& workspace, cudaStream_t stream);
cudaError_t launch_dynamic_relu_bwd(const DynamicReluBwdParams& params, const DynamicReluGrid& grid,
                                    const DynamicReluWorkspace& workspace, cudaStream_t stream);

}  // namespace dyhead::cuda
