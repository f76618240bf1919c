// The CUDA kernels of deform_conv: how a call is cut into launches and tiles, and the launchers.
//
// Forward: a tile is 128 or 64 output pixels of one job and image by up to 256 output channels of
// one group. For each of its terms a block puts where the taps read, and with which weights, into
// shared memory; then, for each 128 bytes of channels and each tap, it blends the samples of the
// step after into one of two buffers while it multiplies those of this step with the tap's weights,
// which arrive by asynchronous copies. Every sample is blended once, no columns are stored. The
// last tile of a job and image to finish merges the moments of all of them, in their order.
#pragma once

#include <cstdint>
#include <vector>

#include "../../common/deform_conv.h"
#include "../tile/launch.cuh"

namespace dyhead::cuda {

// ---- tables by value ----------------------------------------------------------------------------

inline constexpr int kMaxSources = 32;
inline constexpr int kMaxTerms = 128;
inline constexpr int kMaxJobs = 24;

struct DeformSource {
  MapShape map;
  int32_t index;  // among the call's sources
};

struct DeformTableTerm {
  int16_t source, weight;  // of this launch; of the call
};

// How a job's map is cut: into patches of (rows / kPatchWidth) x kPatchWidth pixels, or where that
// takes more tiles into stretches of `rows` pixels (patches_x = 0).
struct DeformTiles {
  int32_t first;  // the job's first tile in its launch
  int32_t per_image, patches_x;
};

inline constexpr int kPatchWidth = 16;
inline constexpr int32_t kMaxTapsAtOnce = 9;  // whose samples are in shared memory
inline constexpr int32_t kFewTapsAtOnce = 5;  // where that is too small for nine

// Those jobs of a call that one launch does.
struct DeformTable {
  DeformShape shape;
  int32_t all_sources;  // of the call: the row length of the gates
  int32_t first_job;    // among the call's jobs
  int32_t source_count, term_count, job_count;
  int32_t tiles;
  DeformSource sources[kMaxSources];
  DeformTableTerm terms[kMaxTerms];
  DeformJob jobs[kMaxJobs];
  DeformTiles tiles_of[kMaxJobs];
};

// ---- shapes of the product ----------------------------------------------------------------------

enum class DeformMath : int32_t { kBFloat16, kFloat16, kTf32, kFloat32, kFloat64 };

inline DeformMath deform_math(DType dtype, bool allow_tf32) {
  switch (dtype) {
    case DType::kBFloat16:
      return DeformMath::kBFloat16;
    case DType::kFloat16:
      return DeformMath::kFloat16;
    case DType::kFloat64:
      return DeformMath::kFloat64;
    default:
      return allow_tf32 ? DeformMath::kTf32 : DeformMath::kFloat32;
  }
}

// Channels of a panel: as many as fit its rows of 128 bytes.
inline int32_t panel_depth(DeformMath math) {
  switch (math) {
    case DeformMath::kFloat64:
      return 16;
    case DeformMath::kTf32:
    case DeformMath::kFloat32:
      return 32;
    default:
      return 64;
  }
}

// A kernel's tile, and how it reads channels: in 16-byte vectors or one by one.
struct DeformTiling {
  int rows, cols;
  bool vectors;
};

// Channels [first, last) of one step over a group's channels: at most `most`, all of one deformable
// group.
struct ChannelStep {
  int32_t first, last, deform_group;
};

DYHEAD_HD ChannelStep channel_step(const DeformShape& s, int32_t group, int32_t first,
                                   int32_t most) {
  const int32_t channels = static_cast<int32_t>(s.channels);
  const int32_t group_end = (group + 1) * (channels / s.groups);
  const int32_t deform_channels = channels / s.deform_groups;
  const int32_t deform_group = first / deform_channels;
  int32_t last = first + most;
  last = last < group_end ? last : group_end;
  const int32_t deform_end = (deform_group + 1) * deform_channels;
  return {first, last < deform_end ? last : deform_end, deform_group};
}

// The weights as the kernels multiply them: panels of `cols` rows of 128 bytes, in order of
// [matrix][group][column panel][step of the depth][tap].
struct DeformPanels {
  int32_t cols, column_panels, steps, depth;  // depth: values of a row, at most

  // column: group * column_panels + panel
  DYHEAD_HD int64_t index(const DeformShape& s, int64_t matrix, int32_t column, int32_t step,
                          int32_t tap) const {
    return ((matrix * s.groups * column_panels + column) * steps + step) * s.taps() + tap;
  }
  int64_t bytes(const DeformShape& s, int64_t matrices) const {
    return index(s, matrices, 0, 0, 0) * cols * 128;
  }
};

// ---- launches -----------------------------------------------------------------------------------

// The first launch of a call: packs the weights and biases and clears what the others count in.
inline constexpr int32_t kMaxMatrices = 64;

// Memory to clear, in words of 4 bytes.
struct DeformZeros {
  void* words;
  int64_t count;
};

struct DeformPackParams {
  DeformShape shape;
  DeformPanels panels;
  int32_t first_matrix, matrices;
  const void* weights[kMaxMatrices];
  const void* bias[kMaxMatrices];  // null where there is none
  DType dtype;                     // of weights and bias
  DeformMath math;
  void* packed;
  void* packed_bias;  // [W, C_out] of the compute type
  DeformZeros zeros[5];
  bool transposed;  // for the backward: columns are input channels, the depth is output channels
};

struct DeformFwdKernelParams {
  DeformTable table;
  DeformPanels panels;
  const void* source;
  const void* predictions;
  const void* gates;
  const void* packed;
  const void* packed_bias;
  void* out;
  bool wide_out, moments;
  int32_t taps_at_once;
  bool out_vectors;   // whether rows of the output can be stored 16 bytes at a time
  void* partial;      // [tiles, 3, C_out]
  unsigned* arrived;  // [J, N, groups * column_panels], zero
  void* mean;
  void* var;
  void* up_mean;
};

// Bytes of dynamic shared memory of the forward kernel: two buffers of both operands, and the
// samples of `taps` taps.
inline size_t forward_shared_bytes(int rows, int cols, size_t corners_bytes, int taps) {
  return 2 * 128 * static_cast<size_t>(rows + cols) + corners_bytes * taps * rows;
}

cudaError_t launch_deform_pack(const DeformPackParams& params, cudaStream_t stream);
cudaError_t launch_deform_fwd(const DeformFwdKernelParams& params, DeformMath math,
                              const DeformTiling& tiling, cudaStream_t stream);

// The launchers of one kind of arithmetic each, for launch_deform_fwd.
cudaError_t launch_deform_fwd_bfloat16(const DeformFwdKernelParams&, const DeformTiling&,
                                       cudaStream_t);
cudaError_t launch_deform_fwd_float16(const DeformFwdKernelParams&, const DeformTiling&,
                                      cudaStream_t);
cudaError_t launch_deform_fwd_tf32(const DeformFwdKernelParams&, const DeformTiling&, cudaStream_t);
cudaError_t launch_deform_fwd_float32(const DeformFwdKernelParams&, const DeformTiling&,
                                      cudaStream_t);
cudaError_t launch_deform_fwd_float64(const DeformFwdKernelParams&, const DeformTiling&,
                                      cudaStream_t);

}  // namespace dyhead::cuda
