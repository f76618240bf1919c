// Merges the moments of the tiles of a job and image: the last of kMergedTiles neighbouring tiles
// to finish merges theirs, and the last of these groups merges the groups. So no block walks
// through many tiles while the device waits for it, and the order of the sums is the same in every
// run.
#pragma once

#include "../dynamic_relu/dynamic_relu.cuh"
#include "deform_conv.cuh"

namespace dyhead::cuda {

// Of one channel, over some pixels.
template <class F>
struct Moments {
  F count, mean;
  F second;         // the sum of squares around the mean
  F up, up_weight;  // the weighted sum of the differences from the mean; the sum of the weights
};

// Those of `parts` [count, deform_moments(channels)], by Chan's formula: nothing cancels. Means are
// merged as differences from the first one, since they may be much larger than those.
template <class F>
DYHEAD_DEVICE Moments<F> merge_moments(const F* parts, int32_t count, int64_t channels,
                                       int channel) {
  const F origin = parts[channel];
  Moments<F> sum{};
#pragma unroll 4
  for (int32_t i = 0; i < count; ++i) {
    const F* all = parts + i * deform_moments(channels);
    const F* part = all + channel;
    const F difference = part[0] - origin;
    const F up_weight = all[3 * channels];
    const F added = all[3 * channels + 1];
    const F delta = difference - sum.mean;
    const F share = added / (sum.count + added);
    sum.mean += delta * share;
    sum.second += part[channels] + delta * delta * share * sum.count;
    sum.up += part[2 * channels] + up_weight * difference;
    sum.up_weight += up_weight;
    sum.count += added;
  }
  sum.up -= sum.up_weight * sum.mean;
  sum.mean += origin;
  return sum;
}

// Called by all blocks after they have written the moments of their tiles, for output channels
// [first, last). `column` is the block's index among those of its tile. kTileThreads threads call
// it, which meet by Threads::sync().
template <class F, class Threads>
DYHEAD_DEVICE void merge_tiles(const DeformFwdKernelParams& p, const TilePlace& place,
                               int32_t column, int first, int last) {
  const DeformLaunch& launch = p.launch;
  const DeformTiles& tiles = launch.tiles[place.job];
  const int64_t channels = launch.shape.out_channels;
  const int64_t values = deform_moments(channels);
  const int64_t all_columns = static_cast<int64_t>(launch.shape.groups) * p.panels.column_panels;
  const int64_t map = place.job * launch.shape.images + place.image;  // of the launch
  const int64_t map_of_call = launch.first_job * launch.shape.images + map;
  const int64_t first_tile = tiles.first + static_cast<int64_t>(place.image) * tiles.per_image;
  const int64_t first_group = deform_first_group(first_tile, map);
  const int32_t groups = (tiles.per_image + kMergedTiles - 1) / kMergedTiles;
  const int32_t group = place.tile / kMergedTiles;
  const int32_t left = tiles.per_image - group * kMergedTiles;
  const int32_t in_group = left < kMergedTiles ? left : kMergedTiles;
  F* merged = static_cast<F*>(p.merged) + first_group * values;

  const auto finish = [&](int channel, const Moments<F>& sum) {
    const int64_t at = map_of_call * channels + channel;
    static_cast<F*>(p.mean)[at] = sum.mean;
    static_cast<F*>(p.var)[at] = sum.second / sum.count;
    static_cast<F*>(p.up_mean)[at] = sum.mean + sum.up;
  };
  if (!arrive_is_last<Threads>(p.groups_arrived + (first_group + group) * all_columns + column,
                               in_group)) {
    return;
  }
  const F* of_tiles =
      static_cast<const F*>(p.partial) + (first_tile + group * kMergedTiles) * values;
  for (int c = first + tile_thread(); c < last; c += kTileThreads) {
    const Moments<F> sum = merge_moments(of_tiles, in_group, channels, c);
    if (groups == 1) {
      finish(c, sum);
      continue;
    }
    F* to = merged + group * values;
    to[c] = sum.mean;
    to[channels + c] = sum.second;
    to[2 * channels + c] = sum.up;
    // All blocks of the group write the same.
    if (c == first) {
      to[3 * channels] = sum.up_weight;
      to[3 * channels + 1] = sum.count;
    }
  }
  if (groups == 1 ||
      !arrive_is_last<Threads>(p.arrived + map_of_call * all_columns + column, groups))
    return;
  for (int c = first + tile_thread(); c < last; c += kTileThreads) {
    finish(c, merge_moments<F>(merged, groups, channels, c));
  }
}

}  // namespace dyhead::cuda
