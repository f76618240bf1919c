// The CUDA kernels of deform_conv: how a call is cut into launches and tiles, and the launchers.
//
// The operator (csrc/host) checks tensors and job tables and allocates the results. From there it
// is five calls to a main loop, forward and backward alike:
//
//   1. deform_conv.cpp                  adds the device: its limits, its stream, memory
//   2. run_deform_fwd, _bwd_input,      divides the call into launches, allocates workspaces and
//      _bwd_weights (*_run.h)           packs the weights
//   3. launch_deform_fwd, ... (*.cu)    chooses the kernel for the arithmetic and the tile
//   4. deform_fwd_kernel, ... (*.cuh)   goes through the terms and channels of a block's tile
//   5. multiply_stretch,                is the main loop: blends samples, copies and multiplies
//      run_stretch, multiply
//
// Forward: a tile is 128 or 64 output pixels of one job and image by up to 256 output channels of
// one group. For each term, a block first stores in shared memory where the taps read and with
// which weights. Then, for each 128 bytes of channels and each tap, it multiplies the samples in
// one buffer with the tap's weights while it blends the next samples into the other; weights arrive
// by asynchronous copies. Every sample is blended once, and no columns are stored. Of neighbouring
// tiles the last to finish merges their moments, and the last of these groups those of the whole
// job and image, in a fixed order.
//
// A plain convolution with few outputs, such as the one that predicts offsets, needs no blending:
// plain_conv_fwd.cuh has a kernel of its own for it.
#pragma once

#include <cstdint>
#include <vector>

#include "../../common/deform_conv.h"
#include "../context.h"
#include "../tile/launch.cuh"

namespace dyhead::cuda {

// ---- the jobs of a launch, passed by value ------------------------------------------------------

inline constexpr int kMaxSources = 32;
inline constexpr int kMaxTerms = 128;
inline constexpr int kMaxJobs = 24;

struct DeformSource {
  MapShape map;
  int32_t index;  // in the call's sources
};

struct DeformLaunchTerm {
  int16_t source, weight;  // index in this launch; index in the call
};

// How a job's map is cut into tiles: patches of (rows / kPatchWidth) x kPatchWidth pixels or, where
// that takes clearly more tiles, runs of `rows` consecutive pixels (patches_x = 0).
struct DeformTiles {
  int32_t first;  // the job's first tile in its launch
  int32_t per_image, patches_x;
};

inline constexpr int kPatchWidth = 16;
inline constexpr int32_t kMaxTapsAtOnce = 9;  // max taps staged in shared memory at once
inline constexpr int32_t kFewTapsAtOnce = 5;  // where nine do not fit

// The jobs of a call that one launch computes.
struct DeformLaunch {
  DeformShape shape;
  int32_t all_sources;  // how many the call has: the row length of the gates
  int32_t first_job;    // index in the call's jobs
  int32_t source_count, term_count, job_count;
  int32_t tile_count;
  DeformSource sources[kMaxSources];
  DeformLaunchTerm terms[kMaxTerms];
  DeformJob jobs[kMaxJobs];
  DeformTiles tiles[kMaxJobs];  // of each job
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

// Channels of a panel: as many as its rows of 128 bytes hold.
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

// The forward kernels: deform_conv_fwd.cuh, plain_conv_fwd.cuh and deform_conv_fwd_wgmma.cuh.
enum class ForwardKernel { kAny, kPlain, kWgmma };

// The tile of a kernel, and whether it reads channels in 16-byte vectors or one by one.
struct DeformTiling {
  int rows, cols;
  bool vectors;
  ForwardKernel kernel = ForwardKernel::kAny;

  bool plain() const { return kernel == ForwardKernel::kPlain; }
  // How many neighbouring tiles are computed together.
  int32_t together() const;
};

// Channels [first, last) of one step over a group's channels: at most max_channels, all of the same
// deformable group.
struct ChannelStep {
  int32_t first, last, deform_group;
};

DYHEAD_HD ChannelStep channel_step(const DeformShape& s, int32_t group, int32_t first,
                                   int32_t max_channels) {
  const int32_t channels = static_cast<int32_t>(s.channels);
  const int32_t group_end = (group + 1) * (channels / s.groups);
  const int32_t deform_channels = channels / s.deform_groups;
  const int32_t deform_group = first / deform_channels;
  int32_t last = first + max_channels;
  last = last < group_end ? last : group_end;
  const int32_t deform_end = (deform_group + 1) * deform_channels;
  return {first, last < deform_end ? last : deform_end, deform_group};
}

// The packed weights: panels of `cols` rows of 128 bytes, ordered
// [matrix][group][column panel][step of the depth][tap].
struct DeformPanels {
  int32_t cols, column_panels, steps, depth;  // depth: max values of a row

  // column: group * column_panels + panel
  DYHEAD_HD int64_t index(const DeformShape& s, int64_t matrix, int32_t column, int32_t step,
                          int32_t tap) const {
    return ((matrix * s.groups * column_panels + column) * steps + step) * s.taps() + tap;
  }
  int64_t bytes(const DeformShape& s, int64_t matrices) const {
    return index(s, matrices, 0, 0, 0) * cols * 128;
  }
};

// How the backward to the input orders the channels of a step, kStepBytes of the features' type T.
// Column `unit * kUnit + k` of a panel, and value k of a sample's unit of 16 bytes, is channel
// channel(unit, k) of the step. A lane that owns a unit has pieces of 16 bytes of the compute type,
// so what the lanes of a sample add to global memory fills sectors of 32 bytes.
inline constexpr int kStepBytes = 64;

template <class T>
struct InputStep {
  using F = compute_t<T>;
  static constexpr int kChannels = kStepBytes / static_cast<int>(sizeof(T));
  static constexpr int kUnit = 16 / static_cast<int>(sizeof(T));
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(F));
  static constexpr int kPieces = kUnit / kPiece;
  static constexpr int kSpacing = kChannels / kPieces;

  DYHEAD_HD static constexpr int channel(int unit, int k) {
    return unit * kPiece + k / kPiece * kSpacing + k % kPiece;
  }
};

// ---- launches -----------------------------------------------------------------------------------

// What one launch packs.
inline constexpr int32_t kMaxMatrices = 64;
inline constexpr int32_t kMaxPackSets = 2;

// Memory to clear, in words of 4 bytes.
struct DeformZeros {
  void* words;
  int64_t count;
};

// Weights of one call, how they are packed, and what is cleared for the call.
struct DeformPackSet {
  DeformShape shape;
  DeformPanels panels;
  DType dtype;      // of weights and bias
  bool transposed;  // for the backward: columns are input channels, the depth is output channels
  bool for_wgmma;   // the depth of a panel is in the order of wgmma_channel()
  void* packed;
  void* packed_bias;  // [W, C_out] of the compute type, or null
  DeformZeros zeros[5];
  // The matrices that a launch packs: their number, the first one's index in the call and in the
  // launch.
  int32_t matrices, first_matrix, first_pointer;
};

// The first launch packs the weights and biases of all calls, and clears counters and sums.
struct DeformPackParams {
  DeformMath math;
  int32_t sets;
  DeformPackSet set[kMaxPackSets];
  const void* weights[kMaxMatrices];
  const void* bias[kMaxMatrices];  // null where there is none
};

// A sample in shared memory, as the main loops of the forward and of the weight gradient read it.
// Corner i has weight[i], and it is at[i] strides from the map's first pixel: a stride is a pixel
// or, where channels are read in vectors, 16 bytes (deform_conv_gather.cuh). A corner that does not
// exist reads zeros instead of the map, at 0 or 1. Either all corners exist, or the first one
// alone, or none. The order of the places tells: corner 3 is before corner 1 if only the first may
// exist, and before corner 2 if that does not exist either.
template <class F>
struct alignas(16) StagedSample {
  F weight[4];
  uint32_t at[4];
};

// How the tiles of a launch, each with a panel of columns, are divided into blocks: the first
// `whole` have a block each. (With wgmma these are pairs of tiles, and clusters.) The others would
// leave most of the processors idle in the last round, so `parts` blocks share each of them: each
// takes some of the taps, and the last one adds up.
struct DeformSplit {
  int32_t whole, parts;

  DYHEAD_HD int32_t blocks(int32_t tiles) const { return whole + (tiles - whole) * parts; }
};

struct DeformFwdKernelParams {
  DeformLaunch launch;
  DeformPanels panels;
  const void* source;
  const void* predictions;
  const void* gates;
  const void* packed;
  const void* packed_bias;
  void* out;
  bool out_in_compute_dtype, moments;
  int32_t taps_at_once;
  bool out_vectors;  // whether rows of the output allow 16-byte stores
  DeformSplit split;
  int32_t items;            // how many blocks, or clusters, have work
  void* part_sums;          // [tiles that are shared, split.parts, rows * cols] of the compute type
  unsigned* parts_arrived;  // [tiles that are shared], cleared
  void* partial;            // [tiles, deform_moments(C_out)]
  void* merged;             // [deform_groups_of_tiles(), deform_moments(C_out)]
  // Counters, cleared: [J, N, groups * column_panels] and
  // [deform_groups_of_tiles(), groups * column_panels], the latter for this launch alone.
  unsigned* arrived;
  unsigned* groups_arrived;
  void* mean;
  void* var;
  void* up_mean;
};

// How many values the moments of a tile are: for each channel its mean, the sum of squares around
// it and the weighted sum of the differences from it, which the upsampled mean needs; then the
// weights' sum and the number of pixels. Those of a group of tiles are the same.
DYHEAD_HD int64_t deform_moments(int64_t channels) { return 3 * channels + 2; }

// How many tiles of a job and image are merged at once (deform_conv_moments.cuh): about the root of
// how many there are in large maps, since their groups are merged next.
inline constexpr int32_t kMergedTiles = 16;

// The index of a map's first group of tiles: no two maps share one, without a sum over maps. `map`
// is the index of the job and image in the launch.
DYHEAD_HD int64_t deform_first_group(int64_t first_tile, int64_t map) {
  return first_tile / kMergedTiles + map;
}

inline int64_t deform_groups_of_tiles(const DeformLaunch& launch) {
  return deform_first_group(launch.tile_count, launch.job_count * launch.shape.images) + 1;
}

// Bytes of dynamic shared memory of the forward kernel: two buffers of both operands, and the
// samples of `taps` taps.
inline size_t forward_shared_bytes(int rows, int cols, DType dtype, int taps) {
  const size_t sample =
      dtype == DType::kFloat64 ? sizeof(StagedSample<double>) : sizeof(StagedSample<float>);
  return 2 * 128 * static_cast<size_t>(rows + cols) + sample * taps * rows;
}

// The tile of the kernel of plain convolutions (plain_conv_fwd.cuh): a patch of output pixels by
// output channels. It has a fixed number of taps in each direction, and reads a halo of source
// pixels.
inline constexpr int kPlainRows = 128;
inline constexpr int kPlainCols = 32;
inline constexpr int kPlainTaps = 3;
inline constexpr int kPlainHalo =
    (kPatchWidth + kPlainTaps - 1) * (kPlainRows / kPatchWidth + kPlainTaps - 1);

// Bytes of its dynamic shared memory: two buffers of the halo and of a kernel column's panels.
inline constexpr size_t kPlainSharedBytes =
    size_t{2 * 128} * (kPlainHalo + kPlainTaps * kPlainCols);

// The kernel with wgmma (deform_conv_fwd_wgmma.cuh): the blocks of a cluster, each with a tile,
// share the panels of weights, of which kWgmmaStages are in shared memory at once. Samples have two
// buffers.
inline constexpr int kWgmmaRows = 128;
inline constexpr int kWgmmaCols = 256;
inline constexpr int kWgmmaDepth = 64;
inline constexpr int kWgmmaThreads = 384;
inline constexpr int kClusterBlocks = 2;
inline constexpr int kWgmmaStages = 3;
inline constexpr size_t kWgmmaPanelBytes = size_t{128} * kWgmmaCols;
inline constexpr size_t kWgmmaSamplesBytes =
    kWgmmaRows * (kMaxTapsAtOnce * sizeof(StagedSample<float>) + sizeof(int32_t)) + 32;
inline constexpr size_t kWgmmaSharedBytes =
    kWgmmaStages * kWgmmaPanelBytes + 2 * kWgmmaSamplesBytes + 8 * (2 * kWgmmaStages + 2 * 2);

inline int32_t DeformTiling::together() const {
  return kernel == ForwardKernel::kWgmma ? kClusterBlocks : 1;
}

// Where value k of a panel's row is among the channels of its step, in the panels of this kernel: a
// lane of four loads 8 consecutive channels, and these are what it holds of two products.
DYHEAD_HD int32_t wgmma_channel(int32_t k) {
  const int32_t product = k / 16 % 2;
  const int32_t pair = k % 8 / 2, upper = k % 16 / 8;
  return k / 32 * 32 + 8 * pair + 4 * product + 2 * upper + k % 2;
}

// How many blocks of the forward kernel a multiprocessor is to hold at once.
constexpr int forward_blocks_at_once(int cols, bool tensor) { return cols <= 32 && tensor ? 2 : 1; }

// Whether blocks may share tiles. Kernels that leave room for a second block have no registers left
// for it.
constexpr bool forward_shares_tiles(int cols, bool tensor) {
  return forward_blocks_at_once(cols, tensor) == 1;
}

using DeformFwdKernel = void (*)(DeformFwdKernelParams);

// The forward kernels for operands Op, an argument of Operand (tile_gemm.cuh). Each Op is compiled
// in a file of its own that the build generates: see cmake/cuda_sources.cmake.
template <class Op>
struct DeformFwdKernels {
  static DeformFwdKernel choose(const DeformTiling& tiling);  // null: none has this tile
};

// The same with wgmma, for bfloat16 and float16.
template <class Op>
struct DeformFwdWgmmaKernels {
  static DeformFwdKernel choose();
};

// The same for plain convolutions, on tensor cores only.
template <class Op>
struct PlainFwdKernels {
  static DeformFwdKernel choose();
};

cudaError_t launch_deform_pack(const DeformPackParams& params, cudaStream_t stream);
cudaError_t launch_deform_fwd(const DeformFwdKernelParams& params, DeformMath math,
                              const DeformTiling& tiling, const DeviceLimits& device,
                              cudaStream_t stream);

}  // namespace dyhead::cuda
