// Cutting a call of deform_conv into launches, tiles and panels of weights: host code.
#pragma once

#include <algorithm>
#include <vector>

#include "../context.h"
#include "deform_conv.h"

namespace dyhead::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether a block may have so much dynamic shared memory, beside the little static memory that the
// kernels have.
inline bool fits(size_t shared_bytes, const DeviceLimits& device) {
  constexpr size_t kStatic = 1024;
  return shared_bytes + kStatic <= device.shared_bytes;
}

inline DeformTiles tiles_of(const DeformJob& job, int rows) {
  const int patch_height = rows / kPatchWidth;
  const int64_t patches_x = ceil_div(job.out.width, kPatchWidth);
  const int64_t patches = patches_x * ceil_div(job.out.height, patch_height);
  const int64_t stretches = ceil_div(job.out.pixels(), rows);
  const bool patched = patches <= stretches + stretches / 8;
  return {0, static_cast<int32_t>(patched ? patches : stretches),
          static_cast<int32_t>(patched ? patches_x : 0)};
}

inline int64_t count_tiles(const DeformTables& tables, int rows) {
  int64_t tiles = 0;
  for (const DeformJob& job : tables.jobs) {
    tiles += tables.shape.images * tiles_of(job, rows).per_image;
  }
  return tiles;
}

// The tile of the forward kernel. Narrow outputs get narrow tiles; IEEE arithmetic, which is slow
// beside the blending, blends again for every 128 columns. 128 rows use each weight that is read
// twice as often as 64, but few tiles leave processors idle in the last round.
//
// Example: one 800 x 1344 image on 132 processors. 128 rows: 281 tiles, so 3 rounds where 2.13
// would do. 64 rows: 545 tiles of 0.55 of the time, 5 rounds, 2.75. So 64 rows. With 8 images: 18
// rounds against 34 x 0.55 = 18.7, so 128 rows.
inline DeformTiling forward_tiling(const DeformTables& tables, DeformMath math, bool vectors,
                                   const DeviceLimits& device) {
  constexpr double kCostOf64Rows = 0.55;
  const int64_t outputs = tables.shape.out_channels / tables.shape.groups;
  const bool tensor = math != DeformMath::kFloat32 && math != DeformMath::kFloat64;
  if (!vectors || math == DeformMath::kFloat64 || outputs <= 32) return {128, 32, vectors};
  if (!tensor || outputs <= 128) return {128, 128, true};
  const auto rounds = [&](int rows) {
    return static_cast<double>(ceil_div(count_tiles(tables, rows), device.processors));
  };
  const bool large =
      fits(forward_shared_bytes(128, 256, sizeof(Corners<float>), kMaxTapsAtOnce), device);
  return {large && rounds(128) <= kCostOf64Rows * rounds(64) ? 128 : 64, 256, true};
}

// The most steps of `most` channels that a group has.
inline int32_t max_channel_steps(const DeformShape& s, int32_t most) {
  int32_t max_steps = 0;
  for (int32_t group = 0; group < s.groups; ++group) {
    const int32_t end = static_cast<int32_t>((group + 1) * (s.channels / s.groups));
    int32_t steps = 0;
    for (int32_t c = end - static_cast<int32_t>(s.channels / s.groups); c < end; ++steps) {
      c = channel_step(s, group, c, most).last;
    }
    max_steps = std::max(max_steps, steps);
  }
  return max_steps;
}

// Panels of the forward's weights: columns are output channels, the depth is input channels.
inline DeformPanels forward_panels(const DeformShape& s, int32_t cols, int32_t depth) {
  return {cols, static_cast<int32_t>(ceil_div(s.out_channels / s.groups, cols)),
          max_channel_steps(s, depth), depth};
}

// Panels of the backward's: columns are input channels, the depth is output channels.
inline DeformPanels backward_panels(const DeformShape& s, int32_t cols, int32_t depth) {
  return {cols, max_channel_steps(s, cols),
          static_cast<int32_t>(ceil_div(s.out_channels / s.groups, depth)), depth};
}

// All launches of a call for tiles of `rows` pixels; empty if one job alone does not fit into a
// table.
inline std::vector<DeformTable> deform_launches(const DeformTables& tables, int rows) {
  std::vector<DeformTable> launches;
  const auto start = [&](size_t job) {
    DeformTable table{};
    table.shape = tables.shape;
    table.all_sources = static_cast<int32_t>(tables.sources.size());
    table.first_job = static_cast<int32_t>(job);
    return table;
  };
  DeformTable table = start(0);
  // Adds a job, or leaves the table as it is and returns false.
  const auto add = [&](const DeformJob& job) {
    DeformTable next = table;
    if (next.job_count == kMaxJobs || next.term_count + job.terms > kMaxTerms) return false;
    DeformJob& added = next.jobs[next.job_count] = job;
    added.first_term = next.term_count;
    for (int32_t t = job.first_term; t < job.first_term + job.terms; ++t) {
      const DeformTerm& term = tables.terms[t];
      int16_t source = 0;
      while (source < next.source_count && next.sources[source].index != term.source) ++source;
      if (source == next.source_count) {
        if (source == kMaxSources) return false;
        next.sources[next.source_count++] = {tables.sources[term.source], term.source};
      }
      next.terms[next.term_count++] = {source, static_cast<int16_t>(term.weight)};
    }
    DeformTiles& tiles = next.tiles_of[next.job_count] = tiles_of(job, rows);
    tiles.first = next.tiles;
    next.tiles += tables.shape.images * tiles.per_image;
    ++next.job_count;
    table = next;
    return true;
  };
  for (size_t j = 0; j < tables.jobs.size(); ++j) {
    if (add(tables.jobs[j])) continue;
    if (table.job_count > 0) launches.push_back(table);
    table = start(j);
    if (!add(tables.jobs[j])) return {};
  }
  launches.push_back(table);
  return launches;
}

}  // namespace dyhead::cuda
