// The backward of deform_conv on CUDA, except for the weights (deform_conv_bwd_weights.h):
//
//   rows         the gradient of every output value, including that of the moments; sums for the
//                bias
//   input        a tile is 64 or 128 output pixels. For up to nine taps and 64 bytes of channels,
//                the gradient of the samples is a product with the transposed weights. It stays in
//                shared memory, in the type of the features, and is used at once. The samples were
//                sorted by the pixels that they read (deform_conv_samples.cuh). Four lanes walk
//                through a run of them: they dot each with its four corners, for the gradients of
//                offsets, mask and gate; and they add up what belongs to a corner in registers,
//                until the next sample reads other pixels. Only then it goes to global memory, by
//                atomics.
//   predictions  for each row of predictions, sums the contributions of all jobs, terms and output
//                pixels in a fixed order; likewise for gates and biases
//   finish       rounds the sums to the source's type
//
// Several calls on one source, such as the convolution that predicts offsets and the jobs that read
// them, share the sums of its gradient: the first one clears them, all add, and they are finished
// once.
//
// Only the scatter depends on the order of threads. In deterministic mode the tiles of all calls
// run twice: first for everything but the scatter, to find the largest finite magnitude of what
// will be scattered; then to add integers, in steps of 2^-k of it, whose sum is the same in any
// order. Values that are not finite are marked beside the sums that they belong to.
#pragma once

#include "deform_conv.h"

namespace dyhead::cuda {

inline constexpr int kMaxInputRows = 128;  // output pixels of a tile of the input kernel
inline constexpr int kFewInputRows = 64;
inline constexpr int kWalkerLanes = 4;  // which share the channels of a sample

enum class Scatter : int32_t {
  kNone,     // nobody wants the gradient of the features
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
  DeformLaunch launch;
  int32_t tile_rows;  // of its tiles
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
  int32_t tile_rows;    // of the launch's tiles
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
  void* sums;          // [R, C]: floating-point or fixed-point (deform_conv_scatter.cuh), or null
  unsigned* largest;   // see largest_words
  int32_t sum_bits;    // log2 of the max number of values in one sum, rounded up
  void* derivatives;   // [uses, 3 D K], with the columns of the predictions, or null
  void* gate_partial;  // [tiles, max_terms] or null
  int32_t max_terms;   // of a job
  int64_t use_first[kMaxJobs];  // first row of each job's first term in `derivatives`
};

struct DeformBwdGatherParams {
  DeformLaunch launch;
  const void* derivatives;  // or null
  int64_t use_first[kMaxJobs];
  const void* bias_partial;  // or null
  const void* gate_partial;  // or null
  int32_t max_terms;
  void* grad_predictions;  // the kernel adds to these three, or null
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

// Byte offsets in the dynamic shared memory of the input kernel. It starts with the gradients of
// the outputs.
struct InputLayout {
  int32_t panels;   // two slots of panels: one panel for each tap
  int32_t slot;     // bytes of a slot
  int32_t columns;  // the second slot: the gradients of the samples overwrite it
  int32_t weights, list, dots, total;

  // element, value: bytes of the type of the features and of the compute type.
  DYHEAD_HD static InputLayout of(int32_t element, int32_t value, int32_t rows, int32_t chunks,
                                  int32_t taps) {
    const int32_t samples = rows * taps;
    InputLayout at{};
    at.panels = chunks * rows * 128;
    at.slot = taps * (kStepBytes / element) * 128;
    at.columns = at.panels + at.slot;
    const int32_t columns = samples * kStepBytes;
    at.weights = at.columns + (at.slot > columns ? at.slot : columns);
    at.list = at.weights + samples * 4 * value;
    at.dots = at.list + samples * 8;
    at.total = at.dots + samples * 4 * value;
    return at;
  }
};

// The same for a type known at run time: all bytes.
inline size_t input_shared_bytes(DType dtype, int32_t rows, int32_t chunks, int32_t taps) {
  const auto element = static_cast<int32_t>(element_bytes(dtype));
  const auto value = static_cast<int32_t>(compute_bytes(dtype));
  return static_cast<size_t>(InputLayout::of(element, value, rows, chunks, taps).total);
}

using DeformBwdInputKernel = void (*)(DeformBwdInputParams);

// As DeformFwdKernels.
template <class Op>
struct DeformBwdInputKernels {
  static DeformBwdInputKernel choose(int rows, bool vectors);  // null: none has this tile
};

// The same with wgmma, for bfloat16 and float16 and tiles of kMaxInputRows.
template <class Op>
struct DeformBwdInputWgmmaKernels {
  static DeformBwdInputKernel choose();
};

cudaError_t launch_deform_bwd_rows(const DeformBwdRowsParams& params, cudaStream_t stream);
cudaError_t launch_deform_bwd_input(const DeformBwdInputParams& params, DeformMath math,
                                    bool vectors, bool wgmma, cudaStream_t stream);
cudaError_t launch_deform_bwd_gather(const DeformBwdGatherParams& params, int32_t matrices,
                                     cudaStream_t stream);
cudaError_t launch_deform_bwd_finish(const DeformBwdFinishParams& params, cudaStream_t stream);

}  // namespace dyhead::cuda
