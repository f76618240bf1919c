// The CUDA kernels of block_coefficients: one launch forward, two backward.
//
// In the forward, each level and image has a few blocks. Each of them computes everything up to the
// hidden layer, which is faster than waiting for another block, and then its own rows of the last
// layer, which has most of the weights. In the backward, each level and image has one block; a
// second kernel sums the parameters' gradients over levels, jobs and images, with one thread for
// each value. All sums are in a fixed order, so results are deterministic. Gradients that are not
// wanted are null, and what only they need is left out, whole launches too.
#pragma once

#include "../../common/block_coefficients.h"
#include "../tile/launch.cuh"

namespace dyhead::cuda {

inline constexpr int kBlockCoefficientsThreads = 512;

// Dynamic shared memory of a block. With 256 channels, 16 groups, 3 branches and float32: 1.7 KB
// forward, 7.6 KB backward.
size_t block_coefficients_fwd_shared_bytes(const BlockCoefficientsShape& shape);
size_t block_coefficients_bwd_shared_bytes(const BlockCoefficientsShape& shape);

cudaError_t launch_block_coefficients_fwd(const BlockCoefficientsFwdParams& params,
                                          cudaStream_t stream);
cudaError_t launch_block_coefficients_bwd(const BlockCoefficientsBwdParams& params,
                                          cudaStream_t stream);

}  // namespace dyhead::cuda
