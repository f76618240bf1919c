// The sums that a thread of a block's two warpgroups holds of products with wgmma (hopper.cuh).
#pragma once

#include "hopper.cuh"
#include "tile_gemm.cuh"

namespace dyhead::cuda {

// Sums of a tile of 128 rows by kParts * kCols columns, with the names of TensorTile: a warpgroup
// has 64 rows, and each of its warps 16. A product has kCols columns.
template <int kParts, int kCols>
class WgmmaTile {
 public:
  static constexpr int kI = 2;
  static constexpr int kJ = kParts * kCols / 4;
  static constexpr int kFirstXor = 4;
  static constexpr int kPair = 2;
  static constexpr int kWarpsM = kTileWarps;

  DYHEAD_DEVICE static int warp_row() { return tile_thread() / kWarpSize; }
  DYHEAD_DEVICE static int lane() { return tile_thread() % kWarpSize; }
  DYHEAD_DEVICE static int first_column() { return 0; }
  DYHEAD_DEVICE static int row(int i) { return 16 * warp_row() + 8 * i + lane() / 4; }
  DYHEAD_DEVICE static int column(int j) { return 8 * (j / 2) + lane() % 4 * 2 + j % 2; }
  DYHEAD_DEVICE float& at(int i, int j) {
    constexpr int kPartJ = kJ / kParts;
    return acc[j / kPartJ][4 * (j % kPartJ / 2) + 2 * i + j % 2];
  }

  DYHEAD_DEVICE void clear() {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) acc[part][i] = 0.0f;
    }
  }

  float acc[kParts][kCols / 2];  // of the products
};

}  // namespace dyhead::cuda
