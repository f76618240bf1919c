// The CUDA kernels of pack_levels and unpack_levels: one launch for all levels and images.
//
// Levels [N, C, H, W] are transposed tile by tile in shared memory, so that both sides are accessed
// contiguously; channels_last levels are copied.
#pragma once

#include <algorithm>
#include <vector>

#include "../../common/pack_levels.h"
#include "../tile/launch.cuh"

namespace dyhead::cuda {

inline constexpr int kPackThreads = 256;
inline constexpr int kPackLevels = 32;                      // in a launch
inline constexpr int kPackPixels = 64, kPackChannels = 32;  // of a tile
inline constexpr int64_t kPackCopyBytes = 16384;            // copied per tile

struct PackDeviceLevel {
  MapShape map;
  void* data;
  bool channels_last;
  int32_t first_block, blocks;
  int64_t tiles;  // in an image; a block takes every `blocks`-th
};

struct PackTables {
  int64_t images, channels;
  void* rows;
  int32_t levels, blocks;
  PackDeviceLevel level[kPackLevels];
};

// The tables of each launch. A block has more than one tile only if an image has more than
// `max_blocks` tiles.
inline std::vector<PackTables> pack_tables(const PackParams& p, int32_t max_blocks = 1 << 20) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  std::vector<PackTables> tables;
  for (const PackLevel& from : p.levels) {
    if (tables.empty() || tables.back().levels == kPackLevels) {
      tables.push_back({p.images, p.channels, p.rows, 0, 0, {}});
    }
    PackTables& table = tables.back();
    const int64_t pixels = from.map.pixels();
    const int64_t tiles = from.channels_last
                              ? ceil_div(pixels * p.channels * p.element_bytes, kPackCopyBytes)
                              : ceil_div(pixels, kPackPixels) * ceil_div(p.channels, kPackChannels);
    const int32_t blocks = static_cast<int32_t>(std::min<int64_t>(tiles, max_blocks));
    table.level[table.levels++] = {from.map,     from.data, from.channels_last,
                                   table.blocks, blocks,    tiles};
    table.blocks += blocks;
  }
  return tables;
}

cudaError_t launch_pack_levels(const PackParams& params, const std::vector<PackTables>& tables,
                               cudaStream_t stream);
cudaError_t launch_unpack_levels(const PackParams& params, const std::vector<PackTables>& tables,
                                 cudaStream_t stream);

}  // namespace dyhead::cuda
