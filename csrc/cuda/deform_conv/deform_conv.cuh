// Device code that the forward and the backward kernels of deform_conv share: the pixels of a tile,
// where its taps read, and the loads of channels and weights.
#pragma once

#include "../tile/tile_gemm.cuh"
#include "deform_conv.h"

namespace dyhead::cuda {

struct TilePlace {
  int job;  // of the launch
  int32_t image;
  int32_t tile;  // of the job's map
};

DYHEAD_DEVICE TilePlace find_tile(const DeformLaunch& launch, int32_t tile) {
  int job = 0;
  while (job + 1 < launch.job_count && tile >= launch.tiles[job + 1].first) ++job;
  const int32_t within = tile - launch.tiles[job].first;
  const int32_t per_image = launch.tiles[job].per_image;
  return {job, within / per_image, within % per_image};
}

// The pixel in a row of a tile; its index is -1 beyond the map.
DYHEAD_DEVICE OutputPixel tile_pixel(const DeformLaunch& launch, const TilePlace& place, int row,
                                     int rows) {
  const DeformJob& job = launch.jobs[place.job];
  const int32_t patches_x = launch.tiles[place.job].patches_x;
  if (patches_x == 0) {
    const int64_t index = static_cast<int64_t>(place.tile) * rows + row;
    if (index >= job.out.pixels()) return {-1, 0, 0};
    return output_pixel(job, static_cast<int32_t>(index));
  }
  const int32_t y = place.tile / patches_x * (rows / kPatchWidth) + row / kPatchWidth;
  const int32_t x = place.tile % patches_x * kPatchWidth + row % kPatchWidth;
  if (y >= job.out.height || x >= job.out.width) return {-1, 0, 0};
  return {y * job.out.width + x, y, x};
}

// How many rows of a tile are pixels of the map.
DYHEAD_DEVICE int tile_pixels(const DeformLaunch& launch, int job_index, int32_t tile, int rows) {
  const DeformJob& job = launch.jobs[job_index];
  const int32_t patches_x = launch.tiles[job_index].patches_x;
  if (patches_x == 0) {
    const int64_t left = job.out.pixels() - static_cast<int64_t>(tile) * rows;
    return static_cast<int>(left < rows ? left : rows);
  }
  const int32_t patch_height = rows / kPatchWidth;
  const int32_t height = job.out.height - tile / patches_x * patch_height;
  const int32_t width = job.out.width - tile % patches_x * kPatchWidth;
  return (height < patch_height ? height : patch_height) *
         (width < kPatchWidth ? width : kPatchWidth);
}

template <class F>
DYHEAD_DEVICE TapSampler<F> tap_sampler(const DeformLaunch& launch, const void* predictions,
                                        const void* gates, const TilePlace& place,
                                        const DeformLaunchTerm& term) {
  const DeformJob& job = launch.jobs[place.job];
  const DeformSource& source = launch.sources[term.source];
  const int64_t row = job.predictions.first_row + place.image * job.predictions.pixels();
  const int64_t at = static_cast<int64_t>(place.image) * launch.all_sources + source.index;
  const F gate = gates == nullptr ? F(1) : static_cast<const F*>(gates)[at];
  return {launch.shape, job, source.map,
          static_cast<const F*>(predictions) + row * launch.shape.prediction_columns(), gate};
}

// One word per register. Were they 16-bit values, the compiler would touch each of them right after
// its load, and so wait for the loads before the products.
using UnitWords = Vec<uint32_t, 4>;

// Starts the loads of one unit (16 bytes) of a pixel's channels: of those among the first `count`
// from `source` on, which points to a channel of the map's first pixel; the others become zero.
// Value k is channel k / kPiece * kSpacing + k % kPiece, with kPieces equal pieces.
template <class T, bool kVectors, int kPieces = 1, int kSpacing = 0>
DYHEAD_DEVICE UnitWords load_unit(const T* source, int32_t pixel, int channels, int count) {
  constexpr int kUnit = 16 / static_cast<int>(sizeof(T));
  UnitWords words{};
  if constexpr (kVectors) {
    // An image's map has fewer than 2^32 units (64 GiB), so the product needs no 64 bits.
    const uint32_t unit = static_cast<uint32_t>(pixel) * static_cast<uint32_t>(channels / kUnit);
    constexpr int kWords = 4 / kPieces;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (count <= piece * kSpacing) continue;
      const auto* from = reinterpret_cast<const uint32_t*>(source + piece * kSpacing) +
                         static_cast<uint64_t>(unit) * 4;
      const Vec<uint32_t, kWords> part = load_vec_readonly<kWords>(from);
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[piece * kWords + w] = part[w];
    }
  } else {
    constexpr int kPiece = kUnit / kPieces;
    const T* from = source + static_cast<int64_t>(pixel) * channels;
    Vec<T, kUnit> values;
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      const int channel = k / kPiece * kSpacing + k % kPiece;
      values[k] = channel < count ? from[channel] : T{};
    }
    words = __builtin_bit_cast(UnitWords, values);
  }
  return words;
}

// Starts copying a panel of weights into shared memory.
template <int kCols>
DYHEAD_DEVICE void load_panel(std::byte* to, const std::byte* from) {
  const int first = tile_thread() * 16;
#pragma unroll
  for (int i = 0; i < kCols * kRowBytes; i += kTileThreads * 16) {
    cp_async<16>(to + first + i, from + first + i);
  }
}

}  // namespace dyhead::cuda
