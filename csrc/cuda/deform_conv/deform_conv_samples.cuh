// The samples of a tile in the order of the pixels that they read, for the gradient of the
// features. Samples between the same four pixels (a cell) are neighbours, and a cell is followed by
// the one to its right. So threads that walk through the list add up what belongs to a pixel before
// it leaves for global memory.
#pragma once

#include "../tile/radix_sort.cuh"
#include "deform_conv.cuh"
#include "deform_conv_bwd.h"

namespace dyhead::cuda {

// Where a sample lies compared with the one before it in the list.
enum class Move : uint32_t {
  kSameCell,
  kNextCell,  // the cell to the right
  kJump,
};

// A sample of the list.
class SampleEntry {
 public:
  // key, before: of this sample and of the one before it.
  DYHEAD_DEVICE static SampleEntry of(uint32_t key, uint32_t before, int sample, bool inside,
                                      const MapShape& map) {
    const uint32_t row = static_cast<uint32_t>(map.width) + 1u;
    const int32_t below = static_cast<int32_t>(key / row);  // y and x of the lower right corner
    const int32_t right = static_cast<int32_t>(key % row);
    uint32_t corners = 0u;
    if (inside) {
      if (below > 0 && right > 0) corners |= 1u;
      if (below > 0 && right < map.width) corners |= 2u;
      if (below < map.height && right > 0) corners |= 4u;
      if (below < map.height && right < map.width) corners |= 8u;
    }
    const Move move = key == before        ? Move::kSameCell
                      : key == before + 1u ? Move::kNextCell
                                           : Move::kJump;
    SampleEntry entry{};
    entry.pixel_ = (below - 1) * map.width + right - 1;
    entry.bits_ = static_cast<uint32_t>(sample) | corners << 16 | static_cast<uint32_t>(move) << 20;
    return entry;
  }

  DYHEAD_DEVICE int sample() const { return static_cast<int>(bits_ & 0xffffu); }
  DYHEAD_DEVICE Move move() const { return static_cast<Move>(bits_ >> 20); }
  DYHEAD_DEVICE bool has(int corner) const { return bits_ >> (16 + corner) & 1u; }
  // Only if the corner exists.
  DYHEAD_DEVICE int32_t pixel(int corner, int32_t width) const {
    return pixel_ + corner / 2 * width + corner % 2;
  }

 private:
  int32_t pixel_;  // of the upper left corner, even where that does not exist
  uint32_t bits_;
};

// kRows: of the tile. Sample tap * kRows + row is that of a tap and a pixel of the tile.
template <class F, int kRows>
class SortedSamples {
 public:
  using Weights = Vec<F, 4>;

  // How many samples the list has, and how many of these are inside the map and come first.
  struct Counts {
    int32_t inside, all;
  };

  // `counts` stands in shared memory.
  DYHEAD_DEVICE SortedSamples(Weights* weights, SampleEntry* list, Counts& counts)
      : weights_(weights), list_(list), counts_(counts) {}

  // Finds and sorts the samples of `taps` taps from `first_tap` on. Those outside the map come last
  // or, without `all`, not at all. `scratch` takes two items for each sample and the counters of
  // the sort. Ends with a barrier.
  DYHEAD_DEVICE void stage(const DeformLaunch& launch, const TilePlace& place,
                           const TapSampler<F>& sampler, int deform_group, int first_tap, int taps,
                           bool all, std::byte* scratch) {
    const int samples = taps * kRows;
    auto* items = reinterpret_cast<SortItem*>(scratch);
    auto* counters = reinterpret_cast<int*>(items + 2 * samples);
    const uint32_t key_row = static_cast<uint32_t>(sampler.source.width) + 1u;
    Range range{kOutside, 0u, {0, 0}};
#pragma unroll 1
    for (int i = tile_thread(); i < samples; i += kTileThreads) {
      const OutputPixel at = tile_pixel(launch, place, i % kRows, kRows);
      uint32_t key = kNoPixel;
      if (at.index >= 0) {
        const int tap = first_tap + i / kRows;
        const SamplePoint<F> point = sampler.point(deform_group, tap, at);
        const Corners<F> corners = sampler.corners(point, deform_group, tap, at);
        Weights weights;
#pragma unroll
        for (int c = 0; c < 4; ++c) weights[c] = corners.weight[c];
        store_vec(weights_[i].data, weights);
        key = point.inside ? static_cast<uint32_t>(point.top + 1) * key_row +
                                 static_cast<uint32_t>(point.left + 1)
                           : kOutside;
        if (point.inside) range.add({key, key, {1, 1}});
        if (!point.inside && all) ++range.counts.all;
      }
      items[i] = {key, static_cast<uint32_t>(i)};
    }
    combine(range, reinterpret_cast<Range*>(counters));
    // Samples outside get keys behind the largest one, but not that of the cell to its right.
#pragma unroll 1
    for (int i = tile_thread(); i < samples; i += kTileThreads) {
      const uint32_t key = items[i].key;
      if (key >= kOutside) items[i].key = range.most + (key == kOutside ? 2u : 3u);
    }
    if (tile_thread() == 0) counts_ = range.counts;
    const uint32_t first = range.least < range.most ? range.least : range.most;
    const SortItem* sorted =
        sort_items(items, items + samples, counters, samples, first, range.most + 3u - first);
#pragma unroll 1
    for (int i = tile_thread(); i < range.counts.all; i += kTileThreads) {
      const SortItem item = sorted[i];
      const uint32_t before = i == 0 ? kNoPixel - 1u : sorted[i - 1].key;
      const bool inside = range.least <= item.key && item.key <= range.most;
      list_[i] =
          SampleEntry::of(item.key, before, static_cast<int>(item.value), inside, sampler.source);
    }
    __syncthreads();
  }

  DYHEAD_DEVICE const Counts& counts() const { return counts_; }

  // Where the samples inside are cut for the run of a walker: into equal parts, but rather between
  // cells if that is only a few samples further, as the sums of a cell that is cut leave twice.
  DYHEAD_DEVICE int start_of_run(int walker, int walkers) const {
    constexpr int kFew = 4;
    const int count = counts_.inside;
    const int start = count * walker / walkers;
    for (int i = start; i <= start + kFew; ++i) {
      if (i >= count || list_[i].move() != Move::kSameCell) return i;
    }
    return start;
  }

  DYHEAD_DEVICE SampleEntry operator[](int i) const { return list_[i]; }
  // The weights of a sample's corners, with its modulation.
  DYHEAD_DEVICE Weights weights(int sample) const { return load_vec<4>(weights_[sample].data); }

 private:
  // Keys are row * (width + 1) + column of the lower right corner, less than these.
  static constexpr uint32_t kOutside = 0xfffffffeu;
  static constexpr uint32_t kNoPixel = 0xffffffffu;  // of the tile

  // The keys of samples inside; if there are none, least > most.
  struct Range {
    uint32_t least, most;
    Counts counts;

    DYHEAD_DEVICE void add(const Range& other) {
      least = other.least < least ? other.least : least;
      most = other.most > most ? other.most : most;
      counts.inside += other.counts.inside;
      counts.all += other.counts.all;
    }
  };

  // Adds up the ranges of all threads. Starts and ends with a barrier.
  DYHEAD_DEVICE static void combine(Range& range, Range* warps) {
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      range.add({__shfl_xor_sync(kFullMask, range.least, distance),
                 __shfl_xor_sync(kFullMask, range.most, distance),
                 {__shfl_xor_sync(kFullMask, range.counts.inside, distance),
                  __shfl_xor_sync(kFullMask, range.counts.all, distance)}});
    }
    const int thread = tile_thread();
    if (thread % kWarpSize == 0) warps[thread / kWarpSize] = range;
    __syncthreads();
    range = warps[0];
    for (int w = 1; w < kTileWarps; ++w) range.add(warps[w]);
    __syncthreads();
  }

  Weights* weights_;
  SampleEntry* list_;
  Counts& counts_;
};

}  // namespace dyhead::cuda
