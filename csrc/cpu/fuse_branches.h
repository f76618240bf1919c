// How the CPU kernels of fuse_branches split the work and read branches, in both directions.
//
// A task is a few whole rows of a level's map, for one image. Upsampling is done one axis at a
// time: per row of a task the two rows of each smaller branch are blended into a line of its width,
// and per pixel two positions of that line.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/fuse_branches.h"
#include "parallel.h"
#include "vector_kernels.h"

namespace dyhead::cpu {

struct FuseTask {
  int32_t level, first, last;  // rows [first, last) of the level's map
};

// Fixed, so that sums do not depend on the number of threads.
inline std::vector<FuseTask> fuse_tasks(const FuseTables& tables) {
  constexpr int32_t kPixels = 128;
  std::vector<FuseTask> tasks;
  for (int32_t l = 0; l < static_cast<int32_t>(tables.levels.size()); ++l) {
    const MapShape& map = tables.levels[l].out;
    if (map.pixels() == 0) continue;
    const int32_t rows = static_cast<int32_t>(ceil_div(kPixels, map.width));
    for (int32_t first = 0; first < map.height; first += rows) {
      tasks.push_back({l, first, std::min(first + rows, map.height)});
    }
  }
  return tasks;
}

// A branch as its level reads it.
template <class F>
struct FuseBranch {
  MapShape map;
  bool resized;                        // whether its size is not the level's
  UpsampleMode mode;                   // if so
  std::vector<Interpolation<F>> y, x;  // if so: per row and column of a level that has pixels
};

template <class F>
std::vector<Interpolation<F>> upsampled_axis(int32_t from, int32_t to, UpsampleMode mode) {
  std::vector<Interpolation<F>> axis(to);
  for (int32_t i = 0; i < to; ++i) axis[i] = interpolate<F>(i, from, to, mode);
  return axis;
}

// By the index of their maps.
template <class F>
std::vector<FuseBranch<F>> fuse_branches(const FuseTables& tables) {
  std::vector<FuseBranch<F>> branches(tables.maps.size());
  for (const FuseLevel& level : tables.levels) {
    for (int32_t b = 0; b < level.branches; ++b) {
      FuseBranch<F>& branch = branches[level.branch[b]];
      branch.map = tables.maps[level.branch[b]];
      branch.resized = branch.map.height != level.out.height || branch.map.width != level.out.width;
      branch.mode = level.mode;
      if (!branch.resized || level.out.pixels() == 0) continue;
      branch.y = upsampled_axis<F>(branch.map.height, level.out.height, branch.mode);
      branch.x = upsampled_axis<F>(branch.map.width, level.out.width, branch.mode);
    }
  }
  return branches;
}

// What all pixels of a level and an image share; `params` are those of either direction.
template <class F, class Params>
FusedPixel<F> fused_pixel(const Params& params, int64_t level_index, int64_t image) {
  const FuseTables& t = *params.tables;
  const FuseLevel& level = t.levels[level_index];
  const int64_t at = level_index * t.images + image;
  FusedPixel<F> pixel{};
  pixel.channels = t.channels;
  for (int32_t b = 0; b < level.branches; ++b) {
    pixel.scale[b] =
        static_cast<const F*>(params.scale) + (level.branch[b] * t.images + image) * t.channels;
  }
  pixel.shift = static_cast<const F*>(params.shift) + at * t.channels;
  pixel.coefficients = static_cast<const F*>(params.coefficients) + at * 4 * t.channels;
  return pixel;
}

// Reads one level's branches for one image, row by row.
template <class T>
class FuseReader {
 public:
  using F = compute_t<T>;

  FuseReader(const FuseTables& tables, const std::vector<FuseBranch<F>>& branches, const T* y)
      : channels_(tables.channels), branches_(branches), y_(y) {
    for (std::vector<F>& v : values_) v.resize(channels_);
  }

  // To be called before the first pixel of a row.
  void start_row(const FuseLevel& level, int64_t image, int32_t y) {
    for (int32_t b = 0; b < level.branches; ++b) {
      const FuseBranch<F>& branch = branches_[level.branch[b]];
      const int64_t row_size = branch.map.width * channels_;
      const T* map = y_ + (branch.map.first_row + image * branch.map.pixels()) * channels_;
      branch_[b] = &branch;
      if (!branch.resized) {
        row_[b] = map + y * row_size;
        continue;
      }
      const Interpolation<F>& at = branch.y[y];
      if (static_cast<int64_t>(lines_[b].size()) < row_size) lines_[b].resize(row_size);
      kernels_.blend(map + at.first * row_size, map + at.second * row_size, F(1) - at.fraction,
                     at.fraction, row_size, lines_[b].data());
    }
  }

  // Channels of branch b at column x of the row; valid until the next call with the same b.
  const F* value(int32_t b, int32_t x) {
    if (branch_[b]->resized) {
      const Interpolation<F>& at = branch_[b]->x[x];
      const F* line = lines_[b].data();
      kernels_.blend_compute(line + at.first * channels_, line + at.second * channels_,
                             F(1) - at.fraction, at.fraction, channels_, values_[b].data());
    } else if constexpr (std::is_same_v<T, F>) {
      return row_[b] + x * channels_;
    } else {
      kernels_.widen(row_[b] + x * channels_, channels_, values_[b].data());
    }
    return values_[b].data();
  }

 private:
  const FuseKernels<T>& kernels_ = fuse_kernels<T>();
  int64_t channels_;
  const std::vector<FuseBranch<F>>& branches_;
  const T* y_;
  const FuseBranch<F>* branch_[kMaxBranches] = {};
  const T* row_[kMaxBranches] = {};
  std::vector<F> lines_[kMaxBranches];   // [w, C], blended along y
  std::vector<F> values_[kMaxBranches];  // [C]
};

}  // namespace dyhead::cpu
