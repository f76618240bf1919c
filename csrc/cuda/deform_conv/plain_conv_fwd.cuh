// The forward kernel of plain 3x3 convolutions with few outputs, such as the one that predicts
// offsets and masks; takes_plain_kernel (deform_conv_tiling.h) says which calls it computes.
//
// A tile is a patch of 8 x 16 output pixels by up to 32 output channels of one group. It reads a
// halo, a patch of 10 x 18 source pixels: asynchronous copies bring 128 bytes of each pixel's
// channels into shared memory, once for all nine taps. A fragment of 16 neighbouring pixels of a
// halo row is loaded once for the three output rows that it is part of, and multiplied with the
// weights of the three taps of a kernel column. Nothing goes through registers in between, except
// that TF32 must be rounded.
//
// The eight warps are two halves of the patch by four slices of the depth: a quarter of each 128
// bytes. The sums of the slices are added up at the end.
#pragma once

#include "deform_conv.cuh"

namespace dyhead::cuda {

// Patches as tile_pixel cuts them, and the source pixels that their taps read.
inline constexpr int kPatchHeight = kPlainRows / kPatchWidth;
inline constexpr int kHaloWidth = kPatchWidth + kPlainTaps - 1;
static_assert(kPlainHalo == kHaloWidth * (kPatchHeight + kPlainTaps - 1));

template <class Op>
class PlainTile {
 public:
  using T = typename Operand<Op>::Storage;

  DYHEAD_DEVICE PlainTile(const DeformFwdKernelParams& p, int32_t tile)
      : p_(p), at_(shared_place()), shared_(dynamic_shared<std::byte>()) {
    const DeformLaunch& launch = p.launch;
    if (threadIdx.x == 0) {
      at_.group = tile % launch.shape.groups;
      at_.place = find_tile(launch, tile / launch.shape.groups);
      const int32_t patches_x = launch.tiles[at_.place.job].patches_x;
      at_.y = at_.place.tile / patches_x * kPatchHeight;
      at_.x = at_.place.tile % patches_x * kPatchWidth;
    }
    __syncthreads();
    const MapShape& map = source();
    const int units = static_cast<int>(launch.shape.channels) / kUnit;
    for (int row = tile_thread(); row < kPlainHalo; row += kTileThreads) {
      const int32_t y = at_.y - launch.shape.pad_h + row / kHaloWidth;
      const int32_t x = at_.x - launch.shape.pad_w + row % kHaloWidth;
      const bool inside = y >= 0 && y < map.height && x >= 0 && x < map.width;
      at_.units[row] = inside ? static_cast<uint32_t>(y * map.width + x) * units : kOutside;
    }
    __syncthreads();
  }

  DYHEAD_DEVICE void run() {
    const DeformShape& s = p_.launch.shape;
    const int depth = p_.panels.depth;
    const int group_channels = static_cast<int>(s.channels) / s.groups;
    const int thread = tile_thread();
    // Of the units that this thread copies.
    const int first = thread % kUnits * kUnit;
    int left = group_channels - first;
    const T* channels = static_cast<const T*>(p_.source) +
                        (source().first_row + at_.place.image * source().pixels()) * s.channels +
                        at_.group * group_channels + first;
    const std::byte* panels = static_cast<const std::byte*>(p_.packed) +
                              p_.panels.index(s, term().weight, at_.group, 0, 0) * kPanel;
    std::byte* halo = shared_;
    std::byte* weights = shared_ + 2 * kHalo;
    // Per step of the depth three kernel columns, each with its panels. Those of the next column,
    // and a third of the next step's halo, arrive during the products.
    for (int part = 0; part < kPlainTaps; ++part) copy_halo(halo, channels, left, part);
    copy_panels(weights, panels);
    const int steps = (group_channels + depth - 1) / depth;
    int halo_buffer = 0, weights_buffer = 0;
    for (int step = 0; step < steps; ++step) {
      const bool more = step + 1 < steps;
      channels += depth;
      left -= depth;
#pragma unroll
      for (int dx = 0; dx < kPlainTaps; ++dx) {
        cp_async_wait_all();
        if (dx == 0) round_halo(halo + halo_buffer * kHalo);
        // Both operands are ready; the buffers of the previous column are free.
        __syncthreads();
        const std::byte* b = weights + weights_buffer * kColumn;
        weights_buffer ^= 1;
        if (more) copy_halo(halo + (halo_buffer ^ 1) * kHalo, channels, left, dx);
        if (dx + 1 < kPlainTaps) {
          copy_panels(weights + weights_buffer * kColumn, panels + (dx + 1) * kPanel);
        } else if (more) {
          panels += kPlainTaps * kPlainTaps * kPanel;
          copy_panels(weights + weights_buffer * kColumn, panels);
        }
        multiply(halo + halo_buffer * kHalo, b, dx);
      }
      halo_buffer ^= 1;
    }
    // Other threads may still read the buffers.
    __syncthreads();
    finish();
  }

 private:
  static constexpr int kHalo = kPlainHalo * kRowBytes;
  static constexpr int kPanel = kPlainCols * kRowBytes;
  static constexpr int kColumn = kPlainTaps * kPanel;
  static constexpr int kUnit = Operand<Op>::kUnit;
  static constexpr uint32_t kOutside = ~0u;
  // A warp's part of the product: half of the patch's rows, and a quarter of the depth.
  static constexpr int kSlices = kSteps;
  static constexpr int kHeight = kPatchHeight * kSlices / kTileWarps;
  static constexpr int kN = kPlainCols / 8;
  static_assert(Operand<Op>::kTensor);
  static_assert(kPatchWidth == 16, "a row of the patch is a fragment");
  static_assert(kPlainSharedBytes == 2 * (kHalo + kColumn));
  static_assert(kPlainSharedBytes >= sizeof(float) * kSlices * kPlainRows * kPlainCols);

  struct Place {
    TilePlace place;
    int32_t group, y, x;  // y, x: of the patch's first pixel
    // The source pixels' first units in an image's map, of which there are fewer than 2^32.
    uint32_t units[kPlainHalo];
  };

  DYHEAD_DEVICE static Place& shared_place() {
    DYHEAD_SHARED(Place, place, 1);
    return place[0];
  }

  DYHEAD_DEVICE const DeformJob& job() const { return p_.launch.jobs[at_.place.job]; }
  DYHEAD_DEVICE const DeformLaunchTerm& term() const { return p_.launch.terms[job().first_term]; }
  DYHEAD_DEVICE const MapShape& source() const { return p_.launch.sources[term().source].map; }

  // Byte offset of a 16-byte unit in a halo. What the eight lanes of a load read are neighbours in
  // x, so the units are permuted by x.
  DYHEAD_DEVICE static int halo_offset(int row, int x, int unit) {
    return row * kRowBytes + ((unit ^ (x & 7)) << 4);
  }

  // Calls f(row) for the halo's rows of which this thread copies a unit, in three parts.
  template <class F>
  DYHEAD_DEVICE static void for_rows(int part, F&& f) {
    constexpr int kRows = kTileThreads / kUnits;  // at once
    constexpr int kTimes = (kPlainHalo + kRows - 1) / kRows / kPlainTaps;
    static_assert(kTimes * kPlainTaps * kRows >= kPlainHalo);
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      const int row = (part * kTimes + i) * kRows + tile_thread() / kUnits;
      if (row < kPlainHalo) f(row);
    }
  }

  // Starts copying a third of a halo: the `left` channels from `from` on, which points to a channel
  // of the map's first pixel. Pixels outside the map and channels beyond the last one become zero.
  DYHEAD_DEVICE void copy_halo(std::byte* to, const T* from, int left, int part) {
    const int unit = tile_thread() % kUnits;
    for_rows(part, [&](int row) {
      const uint32_t first = at_.units[row];
      const bool exists = first != kOutside && left > 0;
      const T* at = from + (exists ? uint64_t{first} * kUnit : 0);
      cp_async_zfill<16>(to + halo_offset(row, row % kHaloWidth, unit), at, exists ? 16 : 0);
    });
  }

  // Rounds what this thread has copied.
  DYHEAD_DEVICE void round_halo(std::byte* halo) {
    if constexpr (std::is_same_v<Op, Tf32>) {
      const int unit = tile_thread() % kUnits;
      for (int part = 0; part < kPlainTaps; ++part) {
        for_rows(part, [&](int row) {
          auto* at = reinterpret_cast<float*>(halo + halo_offset(row, row % kHaloWidth, unit));
          store_vec(at, Operand<Op>::unit(load_vec<kUnit>(at).data));
        });
      }
    }
  }

  // Starts copying the panels of a kernel column.
  DYHEAD_DEVICE static void copy_panels(std::byte* to, const std::byte* from) {
#pragma unroll
    for (int dy = 0; dy < kPlainTaps; ++dy) {
      load_panel<kPlainCols>(to + dy * kPanel, from + dy * kPlainTaps * kPanel);
    }
  }

  DYHEAD_DEVICE static int lane() { return tile_thread() % kWarpSize; }
  DYHEAD_DEVICE static int warp() { return tile_thread() / kWarpSize; }
  DYHEAD_DEVICE static int slice() { return warp() % kSlices; }
  DYHEAD_DEVICE static int first_y() { return warp() / kSlices * kHeight; }

  // Adds the products of a kernel column.
  DYHEAD_DEVICE void multiply(const std::byte* halo, const std::byte* panels, int dx) {
    uint32_t right[kPlainTaps][kN][2];
    const std::byte* b_row =
        panels + unit_offset(lane() / 16 * 8 + lane() % 8, 2 * slice() + lane() / 8 % 2);
#pragma unroll
    for (int dy = 0; dy < kPlainTaps; ++dy) {
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t both[4];
        ldmatrix(both, b_row + dy * kPanel + 8 * n * kRowBytes);
        right[dy][n][0] = both[0];
        right[dy][n][1] = both[1];
        right[dy][n + 1][0] = both[2];
        right[dy][n + 1][1] = both[3];
      }
    }
    const int x = dx + lane() % 16;
    const std::byte* a_row =
        halo + halo_offset(first_y() * kHaloWidth + x, x, 2 * slice() + lane() / 16);
#pragma unroll
    for (int row = 0; row < kHeight + kPlainTaps - 1; ++row) {
      uint32_t left[4];
      ldmatrix(left, a_row + row * kHaloWidth * kRowBytes);
#pragma unroll
      for (int dy = 0; dy < kPlainTaps; ++dy) {
        const int y = row - dy;
        if (y < 0 || y >= kHeight) continue;
#pragma unroll
        for (int n = 0; n < kN; ++n) cuda::multiply<Op>(acc_[y][n], left, right[dy][n]);
      }
    }
  }

  // Index of a pair of sums in shared memory: [kSlices][kPlainRows][kPlainCols]. Columns are
  // permuted so that neither stores of fragments nor loads of rows conflict.
  DYHEAD_DEVICE static int sum_index(int slice, int row, int column) {
    return (slice * kPlainRows + row) * kPlainCols + (column ^ ((row & 3) << 3));
  }

  // Adds up the slices and the bias, and stores the tile: a lane has a column, a warp a row.
  DYHEAD_DEVICE void finish() {
    auto* sums = reinterpret_cast<float*>(shared_);
#pragma unroll
    for (int y = 0; y < kHeight; ++y) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = (first_y() + y) * kPatchWidth + 8 * i + lane() / 4;
          const Vec<float, 2> pair{{acc_[y][n][2 * i], acc_[y][n][2 * i + 1]}};
          store_vec(sums + sum_index(slice(), row, 8 * n + lane() % 4 * 2), pair);
        }
      }
    }
    __syncthreads();
    if constexpr (is_half_v<T>) {
      if (!p_.out_in_compute_dtype) return store(sums, static_cast<T*>(p_.out));
    }
    store(sums, static_cast<float*>(p_.out));
  }

  template <class Out>
  DYHEAD_DEVICE void store(const float* sums, Out* out) {
    static_assert(kPlainCols == kWarpSize && kPatchHeight == kTileWarps);
    const DeformShape& s = p_.launch.shape;
    const MapShape& map = job().out;
    const int group_outputs = static_cast<int>(s.out_channels) / s.groups;
    const int column = at_.group * group_outputs + lane();
    const int y = at_.y + warp();
    if (lane() >= group_outputs || y >= map.height) return;
    const float bias =
        p_.packed_bias == nullptr
            ? 0.0f
            : static_cast<const float*>(p_.packed_bias)[term().weight * s.out_channels + column];
    const int64_t first =
        map.first_row + at_.place.image * map.pixels() + int64_t{y} * map.width + at_.x;
    out += first * s.out_channels + column;
    const int width = map.width - at_.x;
#pragma unroll
    for (int x = 0; x < kPatchWidth; ++x) {
      float sum = bias;
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        sum += sums[sum_index(i, warp() * kPatchWidth + x, lane())];
      }
      if (x < width) out[x * s.out_channels] = from_compute<Out>(sum);
    }
  }

  const DeformFwdKernelParams& p_;
  Place& at_;
  std::byte* shared_;  // two halos and two columns of panels, then the slices' sums
  float acc_[kHeight][kN][4] = {};
};

template <class Op>
__global__ void __launch_bounds__(kTileThreads, 2)
    plain_fwd_kernel(const __grid_constant__ DeformFwdKernelParams p) {
  PlainTile<Op>(p, static_cast<int32_t>(blockIdx.x)).run();
}

template <class Op>
DeformFwdKernel PlainFwdKernels<Op>::choose() {
  return plain_fwd_kernel<Op>;
}

}  // namespace dyhead::cuda
