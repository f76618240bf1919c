// The weight gradient of deform_conv on CUDA: sums of outer products of gradient rows and blended
// samples, over all output pixels whose samples a weight matrix multiplies.
//
// A block computes up to 256 output channels of a group by kWeightCols columns. A column is a
// channel at a tap; a slot is up to panel_depth() columns of one tap. A step handles one tile of
// panel_depth() output pixels. While the block multiplies, it blends the next tile's samples and
// copies the next tile's gradient rows into the other of two buffers, and fetches the predictions
// of the tile after that. The tiles are those of all jobs, terms and images that use the matrix.
// They are divided into slices, each with blocks of its own; a second kernel adds the sums of the
// slices in a fixed order. There are no atomics and no columns in memory.
#pragma once

#include "deform_conv.h"

namespace dyhead::cuda {

inline constexpr int kWeightCols = 128;  // of a block; also the samples of a step

// The weight matrices that the jobs of one launch use, and how their tiles are divided into slices.
struct DeformWeightSlices {
  int32_t count;
  int32_t first[kMaxTerms + 1];  // the first slice of each matrix
  int16_t matrix[kMaxTerms];
};

// How the blocks of one slice divide the gradient: output channels into panels of `outs` rows,
// slots into blocks of kWeightCols columns.
struct DeformWeightColumns {
  int32_t outs;         // 32, 128 or 256
  int32_t depth;        // max channels of a slot, and pixels of a tile: panel_depth()
  int32_t steps;        // max channel steps of a group: a tap has a slot for each
  int32_t out_panels;   // of a group
  int32_t slot_blocks;  // of a group

  DYHEAD_HD int32_t blocks(const DeformShape& s) const {
    return s.groups * out_panels * slot_blocks;
  }
  DYHEAD_HD int32_t slots() const { return kWeightCols / depth; }
  DYHEAD_HD int64_t values() const { return static_cast<int64_t>(outs) * kWeightCols; }
};

// The part of the gradient that a block of a slice computes.
struct DeformWeightPlace {
  int32_t group, out_panel, slot_block;
};

DYHEAD_HD int64_t count_job_tiles(const DeformLaunch& launch, int job) {
  return launch.shape.images * launch.tiles[job].per_image;
}

DYHEAD_HD int32_t last_term(const DeformJob& job) { return job.first_term + job.terms; }

// The tiles of all jobs, terms and images that use a matrix.
DYHEAD_HD int64_t count_matrix_tiles(const DeformLaunch& launch, int32_t matrix) {
  int64_t tiles = 0;
  for (int job = 0; job < launch.job_count; ++job) {
    for (int t = launch.jobs[job].first_term; t < last_term(launch.jobs[job]); ++t) {
      if (launch.terms[t].weight == matrix) tiles += count_job_tiles(launch, job);
    }
  }
  return tiles;
}

DYHEAD_HD DeformWeightPlace weight_place(const DeformWeightColumns& c, int32_t block) {
  return {block / c.slot_blocks / c.out_panels, block / c.slot_blocks % c.out_panels,
          block % c.slot_blocks};
}

struct DeformWeightSlot {
  int32_t first, count;  // channels; none beyond the last slot
  int32_t tap, deform_group;
};

// Slots are ordered [tap][channel step], so that most blocks have several slots of one tap, which
// read the same samples.
DYHEAD_HD DeformWeightSlot weight_slot(const DeformShape& s, const DeformWeightColumns& c,
                                       int32_t group, int32_t slot) {
  const int32_t group_channels = static_cast<int32_t>(s.channels) / s.groups;
  const int32_t end = (group + 1) * group_channels;
  const int32_t tap = slot / c.steps;
  if (tap >= s.taps()) return {end, 0, 0, 0};
  ChannelStep step{0, group * group_channels, 0};
  for (int32_t i = slot % c.steps; i >= 0; --i) {
    if (step.last == end) return {end, 0, 0, 0};
    step = channel_step(s, group, step.last, c.depth);
  }
  return {step.first, step.last - step.first, tap, step.deform_group};
}

struct DeformBwdWeightsParams {
  DeformLaunch launch;  // of tiles of panel_depth() pixels
  DeformWeightSlices slices;
  DeformWeightColumns columns;
  const void* source;
  const void* predictions;
  const void* gates;
  const void* grad_rows;  // [S, C_out] of the source's type; rounded to TF32 for TF32 products
  bool grad_vectors;      // whether its rows allow 16-byte loads
  void* partial;          // [slices, columns.blocks(), columns.outs, kWeightCols]
};

struct DeformAddWeightsParams {
  DeformShape shape;
  DeformWeightSlices slices;
  DeformWeightColumns columns;
  int32_t matrices;  // how many the call has
  bool is_float64;
  bool add;  // to grad_weights, which an earlier launch has already initialised
  const void* partial;
  void* grad_weights;  // [W, C_out, C / groups, kh, kw] of the compute type
};

struct DeformBwdWeightsKernel {
  void (*kernel)(DeformBwdWeightsParams);
  size_t shared_bytes;  // dynamic
};

// As DeformFwdKernels.
template <class Op>
struct DeformBwdWeightsKernels {
  // plain: whether all jobs are plain, without gates.
  static DeformBwdWeightsKernel choose(int32_t outs, bool vectors, bool plain);
};

cudaError_t launch_deform_bwd_weights(const DeformBwdWeightsParams& params, DeformMath math,
                                      bool vectors, bool plain, cudaStream_t stream);
cudaError_t launch_deform_add_weights(const DeformAddWeightsParams& params, cudaStream_t stream);

}  // namespace dyhead::cuda
