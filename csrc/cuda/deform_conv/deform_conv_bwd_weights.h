// The weight gradient of deform_conv on CUDA: sums of outer products of rows of gradients and
// blended samples, over all output pixels whose samples a matrix of weights multiplies.
//
// A block computes up to 256 output channels of a group by kWeightCols columns; a column is a
// channel at a tap, and columns come in slots of one tap and up to panel_depth() channels. Step by
// step it blends the samples of a tile of panel_depth() output pixels at its slots into one of two
// buffers, and copies the tile's gradient rows there, while it multiplies those of the step before;
// where the samples of the step after that lie is fetched meanwhile, too. The tiles are those of
// all jobs, terms and images that use the matrix. They are shared out to several blocks, their
// slices, whose sums a second kernel adds in a fixed order: no atomics, no columns in memory.
#pragma once

#include "deform_conv.h"

namespace dyhead::cuda {

inline constexpr int kWeightCols = 128;  // of a block, and samples of a step

// The matrices that the jobs of one launch use, and the slices of their tiles.
struct DeformWeightSlices {
  int32_t count;
  int32_t first[kMaxTerms + 1];  // of each matrix's slices among all of them
  int16_t matrix[kMaxTerms];
};

// What the blocks of one slice compute: output channels in panels of `outs` rows, slots in blocks
// of kWeightCols columns.
struct DeformWeightColumns {
  int32_t outs;         // 32, 128 or 256
  int32_t depth;        // channels of a slot at most, and pixels of a tile: panel_depth()
  int32_t out_panels;   // of a group
  int32_t slot_blocks;  // of a group

  DYHEAD_HD int32_t blocks(const DeformShape& s) const {
    return s.groups * out_panels * slot_blocks;
  }
  DYHEAD_HD int32_t slots() const { return kWeightCols / depth; }
  DYHEAD_HD int64_t values() const { return static_cast<int64_t>(outs) * kWeightCols; }
};

// Which of a slice's blocks this is.
struct DeformWeightPlace {
  int32_t group, out_panel, slot_block;
};

DYHEAD_HD int64_t job_tiles(const DeformTable& table, int job) {
  return table.shape.images * table.tiles_of[job].per_image;
}

DYHEAD_HD int32_t last_term(const DeformJob& job) { return job.first_term + job.terms; }

// Of all jobs, terms and images that use a matrix.
DYHEAD_HD int64_t matrix_tiles(const DeformTable& table, int32_t matrix) {
  int64_t tiles = 0;
  for (int job = 0; job < table.job_count; ++job) {
    for (int t = table.jobs[job].first_term; t < last_term(table.jobs[job]); ++t) {
      if (table.terms[t].weight == matrix) tiles += job_tiles(table, job);
    }
  }
  return tiles;
}

DYHEAD_HD DeformWeightPlace weight_place(const DeformWeightColumns& c, int32_t block) {
  return {block / c.slot_blocks / c.out_panels, block / c.slot_blocks % c.out_panels,
          block % c.slot_blocks};
}

struct DeformWeightSlot {
  int32_t first, count;  // channels, none beyond the last slot
  int32_t tap, deform_group;
};

// Slots are in order of [channel step][tap].
DYHEAD_HD DeformWeightSlot weight_slot(const DeformShape& s, int32_t group, int32_t slot,
                                       int32_t depth) {
  const int32_t group_channels = static_cast<int32_t>(s.channels) / s.groups;
  const int32_t end = (group + 1) * group_channels;
  ChannelStep step{0, group * group_channels, 0};
  for (int32_t i = slot / s.taps(); i >= 0; --i) {
    if (step.last == end) return {end, 0, 0, 0};
    step = channel_step(s, group, step.last, depth);
  }
  return {step.first, step.last - step.first, slot % s.taps(), step.deform_group};
}

struct DeformBwdWeightsParams {
  DeformTable table;  // of tiles of panel_depth() pixels
  DeformWeightSlices slices;
  DeformWeightColumns columns;
  const void* source;
  const void* predictions;
  const void* gates;
  const void* grad_rows;  // [S, C_out] of the source's type; rounded to TF32 for TF32 products
  bool grad_vectors;      // whether its rows can be read 16 bytes at a time
  void* partial;          // [slices, columns.blocks(), columns.outs, kWeightCols]
};

struct DeformAddWeightsParams {
  DeformShape shape;
  DeformWeightSlices slices;
  DeformWeightColumns columns;
  int32_t matrices;  // of the call
  bool wide;         // float64
  bool add;          // to what earlier launches left there, which is at least zeros
  const void* partial;
  void* grad_weights;  // [W, C_out, C / groups, kh, kw] of the compute type
};

cudaError_t launch_deform_add_weights(const DeformAddWeightsParams& params, cudaStream_t stream);
cudaError_t launch_deform_bwd_weights(const DeformBwdWeightsParams& params, DeformMath math,
                                      bool vectors, cudaStream_t stream);

// Those of one kind of arithmetic each, for launch_deform_bwd_weights.
cudaError_t launch_deform_bwd_weights_bfloat16(const DeformBwdWeightsParams&, bool, cudaStream_t);
cudaError_t launch_deform_bwd_weights_float16(const DeformBwdWeightsParams&, bool, cudaStream_t);
cudaError_t launch_deform_bwd_weights_tf32(const DeformBwdWeightsParams&, bool, cudaStream_t);
cudaError_t launch_deform_bwd_weights_float32(const DeformBwdWeightsParams&, bool, cudaStream_t);
cudaError_t launch_deform_bwd_weights_float64(const DeformBwdWeightsParams&, bool, cudaStream_t);

}  // namespace dyhead::cuda
