// Tensor-core tiles: the shapes that the project's matrix kernels are made of.
#pragma once

#include "common/dtypes.h"
#include "cuda/tile/launch.cuh"

namespace dyhead::simt_test {

// c = a b^T, one block: 64 x 64 from 16-bit operands, accumulated in float32.
template <class T>
struct GemmTileParams {
  const T* a;  // [64, depth]
  const T* b;  // [64, depth]
  float* c;    // [64, 64]
  int depth;   // a multiple of 32
};
cudaError_t launch_gemm_tile(const GemmTileParams<bfloat16>& params, cudaStream_t stream);
cudaError_t launch_gemm_tile(const GemmTileParams<float16>& params, cudaStream_t stream);

// c = a b, one warp: 16 x 8 through TF32.
struct Tf32TileParams {
  const float* a;  // [16, depth]
  const float* b;  // [depth, 8]
  float* c;        // [16, 8]
  int depth;       // a multiple of 8
};
cudaError_t launch_tf32_tile(const Tf32TileParams& params, cudaStream_t stream);

// c = a b, one warp: 8 x 8 in float64.
struct F64TileParams {
  const double* a;  // [8, depth]
  const double* b;  // [depth, 8]
  double* c;        // [8, 8]
  int depth;        // a multiple of 4
};
cudaError_t launch_f64_tile(const F64TileParams& params, cudaStream_t stream);

// out = the transpose of in, one warp, by ldmatrix_trans on `matrices` 8x8 matrices.
struct TransposeParams {
  const uint16_t* in;  // [matrices, 8, 8]
  uint32_t* out;       // [matrices, 8, 4] pairs of neighbouring columns
  int matrices;        // 1, 2 or 4
};
cudaError_t launch_transpose(const TransposeParams& params, cudaStream_t stream);

}  // namespace dyhead::simt_test
