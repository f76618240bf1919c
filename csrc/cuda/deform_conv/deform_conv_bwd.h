// The backward of deform_conv on CUDA, but for the weights (deform_conv_bwd_weights.h):
//
//   rows         the gradient of every output value, with what its moments add; sums for the bias
//   input        a tile of 64 output pixels: for each tap and 64 channels, the gradient of the
//                samples is a product with the transposed weights. It is consumed where it is made:
//                dotted with the four corners for offsets, mask and gate, and scattered to them
//                with atomics. No columns are stored.
//   predictions  what each job, term and output pixel adds to its offsets and mask, gathered by
//                prediction row in a fixed order; the same of gates and biases
//   finish       sums to the source's type
//
// Only the scatter is not the same in every run. Deterministic, the tiles run twice: first for the
// largest value that is scattered, then with integer sums of it in 2^-k steps, which no order
// changes.
#pragma once

#include "deform_conv.h"

namespace dyhead::cuda {

inline constexpr int kBwdRows = 64;   // output pixels of a tile
inline constexpr int kBwdCols = 64;   // channels of a step
inline constexpr int kBwdStages = 3;  // panels of weights under way

enum class Scatter : int32_t {
  kSum,      // floating-point atomics into `sums`
  kMeasure,  // only the largest magnitude, into `largest`
  kFixed,    // integer atomics into `sums`, in steps that follow from `largest`
};

struct DeformBwdRowsParams {
  DeformTable table;  // of tiles of kBwdRows rows
  const void* grad_out;
  bool wide_out, moments;
  bool round_tf32;  // float32 results are operands of TF32 products
  const void* out;
  const void* mean;
  const void* grad_mean;
  const void* grad_var;
  const void* grad_up_mean;
  void* rows;          // [S, C_out] of the source's type
  void* bias_partial;  // [tiles, C_out] or null
};

struct DeformBwdInputParams {
  DeformTable table;
  DeformPanels panels;  // columns are input channels, the depth is output channels
  int32_t chunks;       // of depth that are resident at a time
  int32_t taps_at_once;
  bool row_vectors;  // whether `rows` can be read 16 bytes at a time
  const void* source;
  const void* predictions;
  const void* gates;
  const void* packed;
  const void* rows;
  Scatter scatter;
  void* sums;                   // [R, C]: see Sums in deform_conv_bwd_input.cuh
  unsigned* largest;            // bits of a float or double
  int32_t sum_bits;             // log2 of how many values one sum may have, rounded up
  void* derivatives;            // rows [uses, 3 D K], columns as those of the predictions
  void* gate_partial;           // [tiles, most terms] or null
  int32_t max_terms;            // of a job
  int64_t use_first[kMaxJobs];  // first row of each job's first term in `derivatives`
};

struct DeformBwdGatherParams {
  DeformTable table;
  const void* derivatives;
  int64_t use_first[kMaxJobs];
  const void* bias_partial;  // or null
  const void* gate_partial;  // or null
  int32_t max_terms;
  void* grad_predictions;  // the three are added to
  void* grad_bias;
  void* grad_gates;
};

struct DeformBwdFinishParams {
  DType dtype;
  bool fixed;
  const void* sums;
  const unsigned* largest;
  int32_t sum_bits;
  int64_t count;
  void* grad_source;
};

cudaError_t launch_deform_bwd_rows(const DeformBwdRowsParams& params, cudaStream_t stream);
cudaError_t launch_deform_bwd_input(const DeformBwdInputParams& params, DeformMath math,
                                    bool vectors, cudaStream_t stream);
cudaError_t launch_deform_bwd_gather(const DeformBwdGatherParams& params, int32_t matrices,
                                     cudaStream_t stream);
cudaError_t launch_deform_bwd_finish(const DeformBwdFinishParams& params, cudaStream_t stream);

// Bytes of dynamic shared memory of the input kernel.
inline size_t input_shared_bytes(int chunks, size_t compute_bytes, int taps) {
  const size_t a = static_cast<size_t>(chunks) * kBwdRows * 128;
  const size_t b = static_cast<size_t>(kBwdStages) * kBwdCols * 128;
  const size_t columns = compute_bytes * kBwdRows * (kBwdCols + 8);
  // Corners: four weights and four pixels. Dots: one for each corner.
  const size_t samples = (4 * compute_bytes + 16 + 4 * compute_bytes) * taps * kBwdRows;
  return a + b + columns + samples;
}

cudaError_t launch_deform_bwd_input_bfloat16(const DeformBwdInputParams&, bool, cudaStream_t);
cudaError_t launch_deform_bwd_input_float16(const DeformBwdInputParams&, bool, cudaStream_t);
cudaError_t launch_deform_bwd_input_tf32(const DeformBwdInputParams&, bool, cudaStream_t);
cudaError_t launch_deform_bwd_input_float32(const DeformBwdInputParams&, bool, cudaStream_t);
cudaError_t launch_deform_bwd_input_float64(const DeformBwdInputParams&, bool, cudaStream_t);

}  // namespace dyhead::cuda
