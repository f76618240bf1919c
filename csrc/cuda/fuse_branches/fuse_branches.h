// The CUDA kernels of fuse_branches: one launch forward, two backward, for all levels and images.
//
// A block works on patches of pixels of one level, so that the small maps of upsampled branches are
// re-read from the L1 cache. The level follows from the block's index and from a table that is
// passed with the launch: nothing is copied to the device or waited for. If a call has more levels
// than a table holds, it takes several launches.
//
// Backward: the first launch recomputes z. It writes g_z, the gradient of z, multiplied by their
// scale, for the branches that have the level's own size, and sums the per-channel gradients of
// each block. The second launch adds the blocks' sums in a fixed order, spread over the device, and
// gathers the gradient of the upsampled branches from g_z. There are no atomic additions, so
// results are deterministic.
//
// g_z is stored for that gather, in levels with an upsampled branch: written and read once, 4 bytes
// per value in bfloat16. Recomputing it from grad_out and all branches during the gather would read
// at least 6 bytes and compute each value up to four times.
//
// Gradients that are not wanted are null, and with them the workspace, the launch and the sums that
// only they need.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../../common/fuse_branches.h"
#include "../tile/launch.cuh"

namespace dyhead::cuda {

inline constexpr int kFuseThreads = 256;
inline constexpr int kFuseLevels = 16;  // in a table, which must fit the parameters of a kernel
inline constexpr size_t kMaxParameterBytes = 4096;
inline constexpr int kFuseMaxPatchSide = 32;

// How pixels are divided among blocks; it affects results only by rounding.
struct FuseTiling {
  int32_t width_log2, height_log2;  // of a patch; sides are at most kFuseMaxPatchSide
  int32_t max_blocks;               // per level and image
  int32_t max_images;               // at once; the y dimension of a grid is at most 65535
};

// Patches of at least 64 pixels, since a block reads 32 bytes of coefficients per channel, and of
// 16384 values, so that each of 256 threads has several vectors.
inline FuseTiling fuse_tiling(int64_t channels, int32_t max_blocks) {
  int32_t pixels_log2 = 6;
  while (pixels_log2 < 10 && channels << pixels_log2 < 16384) ++pixels_log2;
  return {(pixels_log2 + 1) / 2, pixels_log2 / 2, max_blocks, 32768};
}

// One patch per block, except in maps of more than a million patches.
inline FuseTiling fuse_fwd_tiling(int64_t channels) { return fuse_tiling(channels, 1 << 20); }
// Few blocks, since each one writes sums.
inline FuseTiling fuse_bwd_tiling(int64_t channels) { return fuse_tiling(channels, 1024); }

// A map divided into patches, shared by `blocks` blocks. 2^31 patches would be a map of more bytes
// than any device has.
struct FusePatches {
  int32_t across;  // patches in a row
  int32_t count;
  int32_t first_block, blocks;
};

struct FuseDeviceBranch {
  MapShape map;
  int32_t index;       // of the map
  FusePatches gather;  // of the map, if it is upsampled
};

struct FuseDeviceLevel {
  MapShape out;
  int32_t index;
  int32_t branches, direct;  // the `direct` branches of the level's own size come first
  UpsampleMode mode;         // of the others
  FusePatches patches;    // at least one block, which writes zero gradients if there are no pixels
  int64_t first_partial;  // index of its blocks' sums [N, blocks, kFuseSums, C]
  int64_t grad_z_row;     // first row of g_z [N, H, W], if a branch is upsampled
  FuseDeviceBranch branch[kMaxBranches];
};

// The tables of one launch.
struct FuseDeviceTables {
  int64_t images, channels;
  int32_t patch_width_log2, patch_height_log2;
  int32_t levels;
  int32_t blocks, gather_blocks;  // over all patches of levels, and of upsampled branches
  FuseDeviceLevel level[kFuseLevels];
};

// The sums that a block of the backward's first launch writes, [C] each.
enum FuseSum { kSumA1, kSumB1, kSumA2, kSumB2, kSumScale, kFuseSums = kSumScale + kMaxBranches };

// Memory that the backward needs beside its tensors; null where no wanted gradient needs it.
struct FuseBwdWorkspace {
  void* partial;  // [partials, kFuseSums, C] of the compute type, for wants_sums
  void* grad_z;   // [grad_z_rows, C], for grad_y; float32 for float16, whose range g_z may exceed
};

// Whether a gradient per channel is wanted.
inline bool wants_sums(const FuseBranchesBwdParams& p) {
  return p.grad_scale != nullptr || p.grad_shift != nullptr || p.grad_coefficients != nullptr;
}

// The launches of one call.
struct FuseLaunches {
  std::vector<FuseDeviceTables> tables;
  int64_t partials, grad_z_rows;
  int64_t images_in_flight;
};

inline FusePatches fuse_patches(const MapShape& map, const FuseTiling& tiling,
                                int32_t first_block) {
  const auto patches_of = [](int32_t size, int32_t log2) {
    return static_cast<int32_t>((static_cast<int64_t>(size) + (1 << log2) - 1) >> log2);
  };
  const int32_t across = patches_of(map.width, tiling.width_log2);
  const int64_t count = static_cast<int64_t>(patches_of(map.height, tiling.height_log2)) * across;
  const int64_t blocks = std::min<int64_t>(count, tiling.max_blocks);
  return {across, static_cast<int32_t>(count), first_block, static_cast<int32_t>(blocks)};
}

inline FuseLaunches fuse_launches(const FuseTables& t, const FuseTiling& tiling) {
  FuseLaunches launches{};
  launches.images_in_flight = std::min<int64_t>(t.images, tiling.max_images);
  for (size_t l = 0; l < t.levels.size(); ++l) {
    if (l % kFuseLevels == 0) {
      launches.tables.push_back(
          {t.images, t.channels, tiling.width_log2, tiling.height_log2, 0, 0, 0, {}});
    }
    FuseDeviceTables& table = launches.tables.back();
    FuseDeviceLevel& level = table.level[table.levels++];
    const FuseLevel& from = t.levels[l];
    level.out = from.out;
    level.index = static_cast<int32_t>(l);
    level.mode = from.mode;
    level.patches = fuse_patches(from.out, tiling, table.blocks);
    level.patches.blocks = std::max(level.patches.blocks, 1);
    table.blocks += level.patches.blocks;
    level.first_partial = launches.partials;
    launches.partials += t.images * level.patches.blocks;
    level.grad_z_row = launches.grad_z_rows;
    for (const bool direct : {true, false}) {
      for (int32_t b = 0; b < from.branches; ++b) {
        const MapShape& map = t.maps[from.branch[b]];
        const bool same = map.height == from.out.height && map.width == from.out.width;
        if (same != direct) continue;
        FuseDeviceBranch& branch = level.branch[level.branches++];
        branch = {map, from.branch[b], {}};
        if (direct) {
          ++level.direct;
        } else {
          branch.gather = fuse_patches(map, tiling, table.gather_blocks);
          table.gather_blocks += branch.gather.blocks;
        }
      }
    }
    if (level.direct < level.branches) launches.grad_z_rows += t.images * from.out.pixels();
  }
  return launches;
}

cudaError_t launch_fuse_branches_fwd(const FuseBranchesFwdParams& params,
                                     const FuseLaunches& launches, cudaStream_t stream);
cudaError_t launch_fuse_branches_bwd(const FuseBranchesBwdParams& params,
                                     const FuseLaunches& launches,
                                     const FuseBwdWorkspace& workspace, cudaStream_t stream);

}  // namespace dyhead::cuda
