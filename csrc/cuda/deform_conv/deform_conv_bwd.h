// The backward of deform_conv on CUDA, except for the weights (deform_conv_bwd_weights.h):
//
//   rows         the gradient of every output value, including that of the moments; sums for the
//                bias
//   input        a tile is 64 output pixels. For each tap and 64 channels, the gradient of the
//                samples is a product with the transposed weights. It is used at once: dotted with
//                the four corners, for the gradients of offsets, mask and gate, and scattered to
//                them with atomics. No columns are stored.
//   predictions  for each row of predictions, sums the contributions of all jobs, terms and output
//                pixels in a fixed order; likewise for gates and biases
//   finish       rounds the sums to the source's type
//
// Only the scatter depends on the order of threads. In deterministic mode the tiles run twice:
// first to find the largest finite magnitude that is scattered, then to add integers, in steps of
// 2^-k of it, whose sum is the same in any order. Values that are not finite are marked beside the
// sums that they belong to.
#pragma once

#include "deform_conv.h"

namespace dyhead::cuda {

inline constexpr int kBwdRows = 64;   // output pixels of a tile
inline constexpr int kBwdCols = 64;   // channels of a step
inline constexpr int kBwdStages = 3;  // panels of weights in flight

enum class Scatter : int32_t {
  kSum,      // floating-point atomics on `sums`
  kMeasure,  // only the largest finite magnitude, in `largest`
  kFixed,    // integer atomics on `sums`, in steps derived from `largest`
};

// The words of `largest`: the bits of a float or double and, if sums are fixed-point, the marks of
// those to which a value was added that is not finite (deform_conv_scatter.cuh).
inline constexpr int64_t kLargestWords = 2;
inline constexpr int64_t kMarkedSums = 16;  // by a word

inline int64_t largest_words(bool fixed, int64_t sums) {
  return kLargestWords + (fixed ? (sums + kMarkedSums - 1) / kMarkedSums : 0);
}

struct DeformBwdRowsParams {
  DeformLaunch launch;  // of tiles of kBwdRows rows
  const void* grad_out;
  bool out_in_compute_dtype, moments;
  bool round_tf32;  // round float32 results, which become operands of TF32 products
  const void* out;
  const void* mean;
  const void* grad_mean;
  const void* grad_var;
  const void* grad_up_mean;
  void* rows;          // [S, C_out] of the source's type
  void* bias_partial;  // [tiles, C_out] or null
};

struct DeformBwdInputParams {
  DeformLaunch launch;
  DeformPanels panels;  // columns are input channels, the depth is output channels
  int32_t chunks;       // of the depth, kept in shared memory at once
  int32_t taps_at_once;
  bool row_vectors;  // whether `rows` allows 16-byte loads
  const void* source;
  const void* predictions;
  const void* gates;
  const void* packed;
  const void* rows;
  Scatter scatter;
  void* sums;                   // [R, C]: floating-point or fixed-point (deform_conv_scatter.cuh)
  unsigned* largest;            // see largest_words
  int32_t sum_bits;             // log2 of the max number of values in one sum, rounded up
  void* derivatives;            // [uses, 3 D K], with the columns of the predictions
  void* gate_partial;           // [tiles, max_terms] or null
  int32_t max_terms;            // of a job
  int64_t use_first[kMaxJobs];  // first row of each job's first term in `derivatives`
};

struct DeformBwdGatherParams {
  DeformLaunch launch;
  const void* derivatives;
  int64_t use_first[kMaxJobs];
  const void* bias_partial;  // or null
  const void* gate_partial;  // or null
  int32_t max_terms;
  void* grad_predictions;  // the kernel adds to these three
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

// Bytes of dynamic shared memory of the input kernel.
inline size_t input_shared_bytes(int chunks, DType dtype, int taps) {
  const auto value = static_cast<size_t>(compute_bytes(dtype));
  const size_t a = static_cast<size_t>(chunks) * kBwdRows * 128;
  const size_t b = static_cast<size_t>(kBwdStages) * kBwdCols * 128;
  const size_t columns = value * kBwdRows * (kBwdCols + 8);
  // Corners: four weights and four pixels. Dots: one for each corner.
  const size_t samples = (4 * value + 16 + 4 * value) * taps * kBwdRows;
  return a + b + columns + samples;
}

using DeformBwdInputKernel = void (*)(DeformBwdInputParams);

// As DeformFwdKernels.
template <class Op>
struct DeformBwdInputKernels {
  static DeformBwdInputKernel choose(bool vectors);
};

cudaError_t launch_deform_bwd_rows(const DeformBwdRowsParams& params, cudaStream_t stream);
cudaError_t launch_deform_bwd_input(const DeformBwdInputParams& params, DeformMath math,
                                    bool vectors, cudaStream_t stream);
cudaError_t launch_deform_bwd_gather(const DeformBwdGatherParams& params, int32_t matrices,
                                     cudaStream_t stream);
cudaError_t launch_deform_bwd_finish(const DeformBwdFinishParams& params, cudaStream_t stream);

}  // namespace dyhead::cuda
