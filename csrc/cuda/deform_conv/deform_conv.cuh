// What the forward and the backward kernels of deform_conv share on the device: which pixels a tile
// has, where its taps read, and the blending of samples into an operand of a tile product.
#pragma once

#include "../tile/tile_gemm.cuh"
#include "deform_conv.h"

namespace dyhead::cuda {

struct TilePlace {
  int job;  // of the launch
  int32_t image;
  int32_t tile;  // of the job's map
};

DYHEAD_DEVICE TilePlace find_tile(const DeformTable& table, int32_t tile) {
  int job = 0;
  while (job + 1 < table.job_count && tile >= table.tiles_of[job + 1].first) ++job;
  const int32_t within = tile - table.tiles_of[job].first;
  const int32_t per_image = table.tiles_of[job].per_image;
  return {job, within / per_image, within % per_image};
}

// The pixel of a row of a tile; index -1 beyond the map.
DYHEAD_DEVICE OutputPixel tile_pixel(const DeformTable& table, const TilePlace& place, int row,
                                     int rows) {
  const DeformJob& job = table.jobs[place.job];
  const int32_t patches_x = table.tiles_of[place.job].patches_x;
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

// How many of a tile's rows are pixels.
DYHEAD_DEVICE int tile_pixels(const DeformTable& table, int job_index, int32_t tile, int rows) {
  const DeformJob& job = table.jobs[job_index];
  const int32_t patches_x = table.tiles_of[job_index].patches_x;
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
DYHEAD_DEVICE TapSampler<F> tap_sampler(const DeformTable& table, const void* predictions,
                                        const void* gates, const TilePlace& place,
                                        const DeformTableTerm& term) {
  const DeformJob& job = table.jobs[place.job];
  const DeformSource& source = table.sources[term.source];
  const int64_t row = job.predictions.first_row + place.image * job.predictions.pixels();
  const int64_t at = static_cast<int64_t>(place.image) * table.all_sources + source.index;
  const F gate = gates == nullptr ? F(1) : static_cast<const F*>(gates)[at];
  return {table.shape, job, source.map,
          static_cast<const F*>(predictions) + row * table.shape.prediction_columns(), gate};
}

// Puts the corners of `taps` taps from `first_tap` on into corners[tap * rows + row].
template <class F>
DYHEAD_DEVICE void stage_corners(const DeformTable& table, const TilePlace& place,
                                 const TapSampler<F>& sampler, int deform_group, int first_tap,
                                 int taps, int rows, Corners<F>* corners) {
#pragma unroll 1
  for (int i = tile_thread(); i < taps * rows; i += kTileThreads) {
    const OutputPixel at = tile_pixel(table, place, i % rows, rows);
    if (at.index < 0) {
      corners[i] = {{F(0), F(0), F(0), F(0)}, {-1, -1, -1, -1}};
      continue;
    }
    const int tap = first_tap + i / rows;
    corners[i] = sampler.corners(sampler.point(deform_group, tap, at), deform_group, tap, at);
  }
}

// One unit (16 bytes) of samples: loads that are under way, then their blend.
template <class Op, bool kVectors>
class Gather {
 public:
  using T = typename Operand<Op>::Storage;
  using F = typename Operand<Op>::Compute;
  static constexpr int kUnit = Operand<Op>::kUnit;
  using Values = Vec<T, kUnit>;

  // The first `count` channels from `source` on, a channel of the map's first pixel; the others are
  // zero.
  DYHEAD_DEVICE void load(const Corners<F>& corners, const T* source, int channels, int count) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weight_[i] = corners.weight[i];
      const int32_t pixel = corners.pixel[i];
      words_[i] = Words{};
      if constexpr (kVectors) {
        // A map of an image has less than 2^32 units (64 GiB): the product needs no 64 bits.
        const uint32_t unit =
            static_cast<uint32_t>(pixel) * static_cast<uint32_t>(channels / kUnit);
        if (pixel >= 0 && count > 0) {
          words_[i] = load_vec_readonly<4>(reinterpret_cast<const uint32_t*>(source) +
                                           static_cast<uint64_t>(unit) * 4);
        }
      } else {
        const T* from = source + static_cast<int64_t>(pixel) * channels;
        Values values;
#pragma unroll
        for (int k = 0; k < kUnit; ++k) values[k] = pixel >= 0 && k < count ? from[k] : T{};
        words_[i] = __builtin_bit_cast(Words, values);
      }
    }
  }

  // Of the values at corner i.
  DYHEAD_DEVICE F dot(int i, const F (&other)[kUnit]) const {
    const Values values = __builtin_bit_cast(Values, words_[i]);
    F sum = F(0);
#pragma unroll
    for (int k = 0; k < kUnit; ++k) sum += to_compute(values[k]) * other[k];
    return sum;
  }

  DYHEAD_DEVICE void store(std::byte* to) const {
    F sum[kUnit];
#pragma unroll
    for (int k = 0; k < kUnit; ++k) sum[k] = F(0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (is_half_v<T>) {
#pragma unroll
        for (int k = 0; k < kUnit / 2; ++k) {
          const float2 pair = unpack2<T>(words_[i][k]);
          sum[2 * k] += weight_[i] * pair.x;
          sum[2 * k + 1] += weight_[i] * pair.y;
        }
      } else {
        const Values values = __builtin_bit_cast(Values, words_[i]);
#pragma unroll
        for (int k = 0; k < kUnit; ++k) sum[k] += weight_[i] * values[k];
      }
    }
    store_vec(reinterpret_cast<T*>(to), Operand<Op>::unit(sum));
  }

 private:
  // As words of a register each: of halves, the compiler would touch every one upon loading, and
  // so wait for the loads before the products.
  using Words = Vec<uint32_t, 4>;

  F weight_[4];
  Words words_[4];
};

// Starts the copy of a panel of weights into a tile of shared memory.
template <int kCols>
DYHEAD_DEVICE void load_panel(std::byte* to, const std::byte* from) {
  const int first = tile_thread() * 16;
#pragma unroll
  for (int i = 0; i < kCols * kRowBytes; i += kTileThreads * 16) {
    cp_async<16>(to + first + i, from + first + i);
  }
}

}  // namespace dyhead::cuda
