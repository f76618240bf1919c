// The CUDA kernels of dynamic_relu, forward and backward: one launch each.
//
// `blocks_per_image` blocks share each image. Each of them sums a range of pixels. The last one to
// arrive turns the sums into the coefficients (forward) or the gradient of the mean (backward),
// while the others wait on the image's counter. Then each maps its own range, which is still in the
// L2 cache if the image is small enough. Sums are added in a fixed order, so results are
// deterministic. Gradients that are not wanted are null; without that of the rows, no block waits
// or maps.
#pragma once

#include <algorithm>

#include "../../common/dynamic_relu.h"
#include "../tile/launch.cuh"

namespace dyhead::cuda {

inline constexpr int kDynamicReluThreads = 256;

struct DynamicReluGrid {
  int blocks_per_image;
  int images_in_flight;
  bool cooperative;  // blocks may wait for each other, so all must be resident at once
};

// Blocks for 64 pixels each, if the device holds that many for all images at once; at most 256 per
// image, since the last block adds up the sums of all. Example: 2 images of 100 x 168 pixels, 1056
// resident blocks: min(263, 528, 256) = 256 blocks per image, 2 images in flight. 1000 regions of 7
// x 7: 1 block each, no waiting.
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

// Memory that the kernels need beside their tensors, allocated by the caller.
struct DynamicReluWorkspace {
  void* partial;      // [N, blocks_per_image, C] forward, [N, blocks_per_image, 4, C] backward
  void* grad_mean;    // [N, C], backward only
  unsigned* arrived;  // [N], zeros
};

// How many blocks of the kernel the current device holds at once, for dynamic_relu_grid.
int dynamic_relu_fwd_resident(const DynamicReluFwdParams& params);
int dynamic_relu_bwd_resident(const DynamicReluBwdParams& params);

cudaError_t launch_dynamic_relu_fwd(const DynamicReluFwdParams& params, const DynamicReluGrid& grid,
                                    const DynamicReluWorkspace& workspace, cudaStream_t stream);
cudaError_t launch_dynamic_relu_bwd(const DynamicReluBwdParams& params, const DynamicReluGrid& grid,
                                    const DynamicReluWorkspace& workspace, cudaStream_t stream);

}  // namespace dyhead::cuda
