// Divides a call of deform_conv into launches, tiles and panels of weights: host code.
#pragma once

#include <algorithm>
#include <vector>

#include "../context.h"
#include "deform_conv.h"

namespace dyhead::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether a block may have this much dynamic shared memory beside the small static memory of the
// kernels.
inline bool fits(size_t shared_bytes, const DeviceLimits& device) {
  constexpr size_t kStatic = 1024;
  return shared_bytes + kStatic <= device.shared_bytes;
}

// With `plain`, for the kernel of plain convolutions, which takes patches only.
inline DeformTiles cut_into_tiles(const DeformJob& job, int rows, bool plain = false) {
  const int patch_height = rows / kPatchWidth;
  const int64_t patches_x = ceil_div(job.out.width, kPatchWidth);
  const int64_t patches = patches_x * ceil_div(job.out.height, patch_height);
  const int64_t stretches = ceil_div(job.out.pixels(), rows);
  const bool patched = plain || patches <= stretches + stretches / 8;
  return {0, static_cast<int32_t>(patched ? patches : stretches),
          static_cast<int32_t>(patched ? patches_x : 0)};
}

inline int64_t count_tiles(const DeformCall& call, int rows, bool plain = false) {
  int64_t tiles = 0;
  for (const DeformJob& job : call.jobs) {
    tiles += call.shape.images * cut_into_tiles(job, rows, plain).per_image;
  }
  return tiles;
}

// The time of a tile of 64 rows, compared with 128: wavefronts of shared memory, as counted by the
// emulation for either kernel that chooses between them.
inline constexpr double kCostOf64Rows = 0.7;

// Tensor cores multiply tiles of 16 bits or TF32.
inline bool on_tensor_cores(DeformMath math) {
  return math != DeformMath::kFloat32 && math != DeformMath::kFloat64;
}

// How many patches of the kernel of plain convolutions take less time than one tile of the other:
// it has 3.8 times the wavefronts of shared memory, as counted by the emulation.
inline constexpr int kPatchesPerTile = 3;

// Whether the kernel of plain convolutions (plain_conv_fwd.cuh) computes a call. All jobs must be
// 3x3 convolutions of one map without strides and dilation, with up to 32 outputs per group, on
// tensor cores. It copies 16 bytes at a time, and its tiles are patches: on narrow maps they are
// many. `sums_only`: there are no gates, and no moments are wanted.
inline bool takes_plain_kernel(const DeformCall& call, DeformMath math, bool vectors,
                               bool sums_only, const DeviceLimits& device) {
  const DeformShape& s = call.shape;
  const auto one_map = [](const DeformJob& job) {
    return job.plain() && job.terms == 1 && job.stride_h == 1 && job.stride_w == 1;
  };
  return on_tensor_cores(math) && vectors && sums_only && s.deform_groups == 1 &&
         s.kernel_h == kPlainTaps && s.kernel_w == kPlainTaps && s.dilation_h == 1 &&
         s.dilation_w == 1 && s.out_channels / s.groups <= kPlainCols &&
         std::all_of(call.jobs.begin(), call.jobs.end(), one_map) &&
         fits(kPlainSharedBytes, device) &&
         count_tiles(call, kPlainRows, true) <= kPatchesPerTile * count_tiles(call, kPlainRows);
}

// A division of tiles into blocks, and how many steps its rounds take one after the other.
struct SplitTime {
  DeformSplit split;
  int64_t steps;
};

// Whole rounds of `at_once` blocks compute a tile each. What is left is shared by so many blocks
// that one more round takes the fewest steps: those of a block's taps, one to store its sums, and
// one to add those of each part. `steps` is how many a tap of a tile has.
//
// Example: 281 tiles on 132 processors, 9 taps of 4 steps. After two rounds 17 tiles are left. 5
// blocks each: at most 2 taps, so 8 + 1 + 5 = 14 steps instead of 36.
inline SplitTime split_tiles(int64_t tiles, int64_t taps, int64_t steps, int64_t at_once) {
  const int64_t rounds = tiles / at_once;
  const int64_t left = tiles - rounds * at_once;
  const int64_t of_rounds = rounds * taps * steps;
  SplitTime best{{static_cast<int32_t>(tiles), 1}, of_rounds + (left > 0 ? taps * steps : 0)};
  if (left == 0) return best;
  for (int64_t parts = 2; parts <= taps && parts * left <= at_once; ++parts) {
    const int64_t time = of_rounds + ceil_div(taps, parts) * steps + 1 + parts;
    if (time >= best.steps) continue;
    best = {{static_cast<int32_t>(tiles - left), static_cast<int32_t>(parts)}, time};
  }
  return best;
}

// Whether the kernel with wgmma can compute a call: all its steps must have 64 channels.
inline bool takes_wgmma_kernel(const DeformCall& call, bool vectors, const DeviceLimits& device) {
  const DeformShape& s = call.shape;
  return device.wgmma && element_bytes(s.dtype) == 2 && vectors && s.taps() <= kMaxTapsAtOnce &&
         s.channels / s.groups % kWgmmaDepth == 0 &&
         s.channels / s.deform_groups % kWgmmaDepth == 0 && s.out_channels / s.groups > 128 &&
         fits(kWgmmaSharedBytes, device);
}

// The tile of the forward kernel. Few output channels get narrow tiles. IEEE arithmetic is slow
// compared with blending, so it takes 128 columns and blends again for the next 128. With 128 rows
// each weight is used twice as often as with 64, but if tiles are few, processors are idle in the
// last round.
//
// Example: 800 x 1344 images on 132 processors. With one image, 128 rows: 281 tiles, 2 rounds and
// 17 tiles that are shared, 2 * 36 + 14 steps. 64 rows: 545 tiles, 4 rounds and 17 tiles, each step
// taking 0.7 of the time, so 0.7 * (4 * 36 + 14); 128 rows win. An image of 200 x 336: 27 or 44
// tiles, for 3 blocks each: 12 + 4 steps or 0.7 * (12 + 4), so 64 rows win.
inline DeformTiling forward_tiling(const DeformCall& call, DeformMath math, bool vectors,
                                   bool sums_only, const DeviceLimits& device) {
  if (takes_plain_kernel(call, math, vectors, sums_only, device)) {
    return {kPlainRows, kPlainCols, vectors, ForwardKernel::kPlain};
  }
  if (takes_wgmma_kernel(call, vectors, device)) {
    return {kWgmmaRows, kWgmmaCols, vectors, ForwardKernel::kWgmma};
  }
  const int64_t outputs = call.shape.out_channels / call.shape.groups;
  if (!vectors || math == DeformMath::kFloat64 || outputs <= 32) return {128, 32, vectors};
  if (!on_tensor_cores(math) || outputs <= 128) return {128, 128, true};
  const int64_t steps = ceil_div(call.shape.channels / call.shape.groups, panel_depth(math));
  const int64_t all_columns = call.shape.groups * ceil_div(outputs, 256);
  const auto time = [&](int rows) {
    const int64_t tiles = count_tiles(call, rows) * all_columns;
    return static_cast<double>(
        split_tiles(tiles, call.shape.taps(), steps, device.processors).steps);
  };
  const bool large = fits(forward_shared_bytes(128, 256, call.shape.dtype, kMaxTapsAtOnce), device);
  return {large && time(128) <= kCostOf64Rows * time(64) ? 128 : 64, 256, true};
}

// The max number of steps of up to max_channels channels in a group.
inline int32_t max_channel_steps(const DeformShape& s, int32_t max_channels) {
  int32_t max_steps = 0;
  for (int32_t group = 0; group < s.groups; ++group) {
    const int32_t end = static_cast<int32_t>((group + 1) * (s.channels / s.groups));
    int32_t steps = 0;
    for (int32_t c = end - static_cast<int32_t>(s.channels / s.groups); c < end; ++steps) {
      c = channel_step(s, group, c, max_channels).last;
    }
    max_steps = std::max(max_steps, steps);
  }
  return max_steps;
}

// Panels of the weights for the forward: columns are output channels, the depth is input channels.
inline DeformPanels forward_panels(const DeformShape& s, int32_t cols, int32_t depth) {
  return {cols, static_cast<int32_t>(ceil_div(s.out_channels / s.groups, cols)),
          max_channel_steps(s, depth), depth};
}

// Panels of the weights for the backward: columns are input channels, the depth is output channels.
inline DeformPanels backward_panels(const DeformShape& s, int32_t cols, int32_t depth) {
  return {cols, max_channel_steps(s, cols),
          static_cast<int32_t>(ceil_div(s.out_channels / s.groups, depth)), depth};
}

// All launches of a call for tiles of `rows` pixels; empty if a job does not fit into one launch.
// `together`: what the number of a job's tiles is a multiple of.
inline std::vector<DeformLaunch> deform_launches(const DeformCall& call, int rows,
                                                 bool plain = false, int32_t together = 1) {
  std::vector<DeformLaunch> launches;
  const auto start = [&](size_t job) {
    DeformLaunch launch{};
    launch.shape = call.shape;
    launch.all_sources = static_cast<int32_t>(call.sources.size());
    launch.first_job = static_cast<int32_t>(job);
    return launch;
  };
  DeformLaunch launch = start(0);
  // Adds a job; if it does not fit, leaves the launch as it is and returns false.
  const auto add = [&](const DeformJob& job) {
    DeformLaunch next = launch;
    if (next.job_count == kMaxJobs || next.term_count + job.terms > kMaxTerms) return false;
    DeformJob& added = next.jobs[next.job_count] = job;
    added.first_term = next.term_count;
    for (int32_t t = job.first_term; t < job.first_term + job.terms; ++t) {
      const DeformTerm& term = call.terms[t];
      int16_t source = 0;
      while (source < next.source_count && next.sources[source].index != term.source) ++source;
      if (source == next.source_count) {
        if (source == kMaxSources) return false;
        next.sources[next.source_count++] = {call.sources[term.source], term.source};
      }
      next.terms[next.term_count++] = {source, static_cast<int16_t>(term.weight)};
    }
    DeformTiles& tiles = next.tiles[next.job_count] = cut_into_tiles(job, rows, plain);
    tiles.first = next.tile_count;
    next.tile_count +=
        together * static_cast<int32_t>(ceil_div(call.shape.images * tiles.per_image, together));
    ++next.job_count;
    launch = next;
    return true;
  };
  for (size_t j = 0; j < call.jobs.size(); ++j) {
    if (add(call.jobs[j])) continue;
    if (launch.job_count > 0) launches.push_back(launch);
    launch = start(j);
    if (!add(call.jobs[j])) return {};
  }
  launches.push_back(launch);
  return launches;
}

// The max number of tiles in one launch of a call.
inline int64_t max_tiles(const std::vector<DeformLaunch>& launches) {
  int64_t tiles = 0;
  for (const DeformLaunch& launch : launches) tiles = std::max<int64_t>(tiles, launch.tile_count);
  return tiles;
}

}  // namespace dyhead::cuda
