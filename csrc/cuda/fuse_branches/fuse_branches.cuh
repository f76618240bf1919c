// Device code that the forward and the backward kernels of fuse_branches share.
#pragma once

#include "../context.h"
#include "../tile/rows.cuh"
#include "fuse_branches.h"

namespace dyhead::cuda {

inline dim3 fuse_grid(int64_t blocks, const FuseLaunches& launches) {
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(launches.images_in_flight));
}

// The level that block `block` works on.
DYHEAD_DEVICE const FuseDeviceLevel& level_of_block(const FuseDeviceTables& t, int block) {
  int l = 0;
  while (l + 1 < t.levels && t.level[l + 1].patches.first_block <= block) ++l;
  return t.level[l];
}

// A patch of a map, clipped at the map's border.
struct Patch {
  int32_t y, x;  // its first pixel
  int32_t rows, columns;
};

DYHEAD_DEVICE Patch patch_of(const FuseDeviceTables& t, const FusePatches& patches,
                             const MapShape& map, int32_t index) {
  const int32_t y = index / patches.across << t.patch_height_log2;
  const int32_t x = index % patches.across << t.patch_width_log2;
  return {y, x, min(map.height - y, 1 << t.patch_height_log2),
          min(map.width - x, 1 << t.patch_width_log2)};
}

// Calls f(row, column) for each pixel of a patch that belongs to this thread.
template <class F>
DYHEAD_DEVICE void for_each_pixel(const FuseDeviceTables& t, const Patch& patch,
                                  const RowTiling& tiling, F&& f) {
  const int pixels = patch.rows << t.patch_width_log2;
  for (int i = tiling.row; i < pixels; i += tiling.rows) {
    const int column = i & ((1 << t.patch_width_log2) - 1);
    if (column < patch.columns) f(i >> t.patch_width_log2, column);
  }
}

// The positions of a patch's rows and columns in the upsampled branches of its level. In shared
// memory, or every pixel and vector would repeat the divisions.
template <class F, int kThreads>
class PatchPositions {
 public:
  static constexpr int kCount = 2 * kMaxBranches * kFuseMaxPatchSide;

  DYHEAD_DEVICE explicit PatchPositions(Interpolation<F>* shared) : shared_(shared) {}

  DYHEAD_DEVICE void compute(const FuseDeviceLevel& level, const Patch& patch) {
    if (level.direct == level.branches) return;
    __syncthreads();  // the last patch's are no longer read
    for (int i = static_cast<int>(threadIdx.x); i < kCount; i += kThreads) {
      const int position = i % kFuseMaxPatchSide;
      const int b = i / (2 * kFuseMaxPatchSide);
      if (b < level.direct || b >= level.branches) continue;
      const MapShape& map = level.branch[b].map;
      if (i / kFuseMaxPatchSide % 2 == 0) {
        if (position < patch.rows) {
          shared_[i] = interpolate<F>(patch.y + position, map.height, level.out.height, level.mode);
        }
      } else if (position < patch.columns) {
        shared_[i] = interpolate<F>(patch.x + position, map.width, level.out.width, level.mode);
      }
    }
    __syncthreads();
  }

  DYHEAD_DEVICE const Interpolation<F>& row(int b, int i) const {
    return shared_[2 * b * kFuseMaxPatchSide + i];
  }
  DYHEAD_DEVICE const Interpolation<F>& column(int b, int i) const {
    return shared_[(2 * b + 1) * kFuseMaxPatchSide + i];
  }

 private:
  Interpolation<F>* shared_;
};

// The branches of a level, in one image and for one vector of channels.
template <class T, int V>
struct BranchReader {
  using F = compute_t<T>;

  const T* y;
  int64_t map[kMaxBranches];  // index in y of its first pixel and the vector's first channel

  DYHEAD_DEVICE BranchReader(const FuseDeviceTables& t, const FuseDeviceLevel& level,
                             const void* all_maps, int64_t image, int64_t channel)
      : y(static_cast<const T*>(all_maps)) {
#pragma unroll
    for (int b = 0; b < kMaxBranches; ++b) {
      const MapShape& m = level.branch[b < level.branches ? b : 0].map;
      map[b] = (m.first_row + image * m.pixels()) * t.channels + channel;
    }
  }

  // Calls use(b, u) with the values u of branch b, one branch after the other, at one pixel of the
  // level: `pixel` is its index there, (row, column) its place in the patch. Missing branches are
  // 0.
  template <class Positions, class Use>
  DYHEAD_DEVICE void read(const FuseDeviceTables& t, const FuseDeviceLevel& level,
                          const Positions& positions, int64_t pixel, int row, int column,
                          Use&& use) const {
    // All loads of branches of the same size are issued before the first value is needed.
    Vec<T, V> direct[kMaxBranches] = {};
#pragma unroll
    for (int b = 0; b < kMaxBranches; ++b) {
      if (b < level.direct) direct[b] = load_vec_readonly<V>(y + (map[b] + pixel * t.channels));
    }
#pragma unroll
    for (int b = 0; b < kMaxBranches; ++b) {
      F u[V];
      if (b >= level.direct && b < level.branches) {
        interpolated(t, level.branch[b].map.width, y + map[b], positions.row(b, row),
                     positions.column(b, column), u);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) u[i] = to_compute(direct[b][i]);
      }
      use(b, u);
    }
  }

 private:
  DYHEAD_DEVICE static void interpolated(const FuseDeviceTables& t, int32_t width, const T* map,
                                         const Interpolation<F>& y, const Interpolation<F>& x,
                                         F (&u)[V]) {
    const T* upper = map + static_cast<int64_t>(y.first) * width * t.channels;
    const T* lower = map + static_cast<int64_t>(y.second) * width * t.channels;
    const Vec<T, V> a = load_vec_readonly<V>(upper + x.first * t.channels);
    const Vec<T, V> b = load_vec_readonly<V>(upper + x.second * t.channels);
    const Vec<T, V> c = load_vec_readonly<V>(lower + x.first * t.channels);
    const Vec<T, V> d = load_vec_readonly<V>(lower + x.second * t.channels);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const F left = (F(1) - y.fraction) * to_compute(a[i]) + y.fraction * to_compute(c[i]);
      const F right = (F(1) - y.fraction) * to_compute(b[i]) + y.fraction * to_compute(d[i]);
      u[i] = (F(1) - x.fraction) * left + x.fraction * right;
    }
  }
};

// The scales of one image and one vector of channels; 0 for a missing branch.
template <class F, int V>
struct FuseScales {
  Vec<F, V> of[kMaxBranches];

  DYHEAD_DEVICE FuseScales(const FuseDeviceTables& t, const FuseDeviceLevel& level,
                           const void* scales, int64_t image, int64_t channel)
      : of{} {
#pragma unroll
    for (int b = 0; b < kMaxBranches; ++b) {
      if (b < level.branches) {
        const int64_t row = level.branch[b].index * t.images + image;
        of[b] = load_vec_readonly<V>(static_cast<const F*>(scales) + row * t.channels + channel);
      }
    }
  }
};

// Shift and dynamic ReLU of one image and one vector of channels.
template <class F, int V>
struct FuseCurve {
  static constexpr int kValues = 5;
  Vec<F, V> k[kValues];  // the shift, a1, b1, a2, b2

  DYHEAD_DEVICE static FuseCurve load(const FuseDeviceTables& t, const FuseDeviceLevel& level,
                                      const void* shifts, const void* coefficients, int64_t image,
                                      int64_t channel) {
    const int64_t row = level.index * t.images + image;
    const F* from = static_cast<const F*>(coefficients) + row * 4 * t.channels + channel;
    FuseCurve curve;
    curve.k[0] = load_vec_readonly<V>(static_cast<const F*>(shifts) + row * t.channels + channel);
#pragma unroll
    for (int i = 0; i < 4; ++i) curve.k[1 + i] = load_vec_readonly<V>(from + i * t.channels);
    return curve;
  }

  DYHEAD_DEVICE F shift(int i) const { return k[0][i]; }
  DYHEAD_DEVICE DynamicReluCoefficients<F> relu(int i) const {
    return {k[1][i], k[2][i], k[3][i], k[4][i]};
  }
};

// Vectors of V channels that threads keep in shared memory, where they have no registers for them.
// No thread reads what another one keeps, so there is no barrier.
template <class F, int V, int kThreads>
class KeptVectors {
 public:
  static constexpr int kPart = V * sizeof(F) < 16 ? V : 16 / sizeof(F);  // channels of an access
  static constexpr int kParts = V / kPart;

  // Room for V values per vector and thread.
  DYHEAD_DEVICE explicit KeptVectors(F* shared) : own_(shared + threadIdx.x * kPart) {}

  DYHEAD_DEVICE void keep(int vector, const Vec<F, V>& values) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      Vec<F, kPart> v;
#pragma unroll
      for (int i = 0; i < kPart; ++i) v[i] = values[part * kPart + i];
      store_vec(at(vector, part), v);
    }
  }

  // Channels part * kPart and following. After reload_memory(), or the compiler moves this to where
  // there are no registers.
  DYHEAD_DEVICE Vec<F, kPart> get(int vector, int part) const {
    return load_vec<kPart>(at(vector, part));
  }

 private:
  // Neighbouring threads have neighbouring parts: no bank conflicts.
  DYHEAD_DEVICE F* at(int vector, int part) const {
    return own_ + (vector * kParts + part) * kPart * kThreads;
  }

  F* own_;
};

}  // namespace dyhead::cuda
