// The CUDA kernels of block_coefficients: one launch forward, two backward.
//
// Forward, a level and image have a few blocks. Each of them computes all up to the hidden layer,
// which takes less time than waiting for another block, and its own rows of the last layer, which
// has most of the weights. Backward, a level and image have one block; a second kernel adds up the
// parameters' gradients over levels, jobs and images, with a thread for each of their values. All
// sums are in a fixed order: results are deterministic.
#pragma once

#include "../../common/block_coefficients.h"
#include "../tile/launch.cuh"

namespace dyhead::cuda {

inline constexpr int kBlockCoefficientsThreads = 512;

// Dynamic shared memory of a block: with 256 channels, 16 groups and 3 branches 1.7 KB forward and
// 7.6 KB backward, in float32.
size_t block_coefficients_fwd_shared_bytes(const BlockCoefficientsShape& shape);
size_t block_coefficients_bwd_shared_bytes(const BlockCoefficientsShape& shape);

cudaError_t launch_block_coefficients_fwd(const BlockCoefficientsFwdParams& params,
                                          cudaStream_t stream);
cudaError_t launch_block_coefficients_bwd(const BlockCoefficientsBwdParams& params,
                                          cudaStream_t stream);

}  // namespace dyhead::cuda
