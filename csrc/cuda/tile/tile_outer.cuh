// Sums of outer products of a block's tiles in shared memory, out += a^T b, accumulated in
// registers: on tensor cores for bfloat16, float16 and TF32, on ordinary cores for IEEE float32 and
// float64.
//
// a is [kDepth, kRows] and b [kDepth, kCols], cut into panels of kDepth rows of 128 bytes. The
// 16-byte units of a row are permuted to avoid bank conflicts in stores of whole rows, in loads of
// one unit of eight rows (ldmatrix) and in loads of two units of four rows (TF32). 256 threads take
// part.
#pragma once

#include "tile_gemm.cuh"

namespace dyhead::cuda {

template <class Op>
inline constexpr int kPanelBytes = Operand<Op>::kDepth * kRowBytes;

// Byte offset of a 16-byte unit in a panel. Neighbouring rows differ in the upper bits of their
// permutation: among four rows that begin at a multiple of four, units 2i and 2i + 1 of one row
// never fall on those of another.
DYHEAD_HD int depth_offset(int row, int unit) {
  const int permutation = (row & 3) << 1 | (row >> 2 & 1);
  return row * kRowBytes + ((unit ^ permutation) << 4);
}

// Byte offset of the unit that contains `column`, over all panels.
template <class Op>
DYHEAD_HD int column_offset(int row, int column) {
  constexpr int kDepth = Operand<Op>::kDepth;
  return column / kDepth * kPanelBytes<Op> +
         depth_offset(row, column % kDepth / Operand<Op>::kUnit);
}

// How the warps divide the product.
template <int kRows, int kCols>
struct OuterWarps {
  static constexpr int kM = kRows > 64 ? kRows / 64 : 1;
  static constexpr int kN = kTileWarps / kM;
  static constexpr int kWarpRows = kRows / kM;
  static constexpr int kWarpCols = kCols / kN;
};

// The part of the product that a thread holds: rows row(i), columns column(j); kPair consecutive j
// are consecutive columns.
template <class Op, int kRows, int kCols>
class TensorOuter {
 public:
  using F = float;
  using Warps = OuterWarps<kRows, kCols>;
  static constexpr int kI = Warps::kWarpRows / 8;
  static constexpr int kJ = Warps::kWarpCols / 4;
  static constexpr int kPair = 2;
  static_assert(Warps::kWarpRows % 16 == 0 && Warps::kWarpCols % 16 == 0);

  DYHEAD_DEVICE TensorOuter() : warp_(tile_thread() / kWarpSize), lane_(tile_thread() % kWarpSize) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc_[m][n][e] = 0.0f;
      }
    }
  }

  // Adds the part of depth `step` of kSteps.
  DYHEAD_DEVICE void step(const std::byte* a, const std::byte* b, int step) {
    if constexpr (is_half_v<Op>) {
      half_step(a, b, step);
    } else {
      tf32_step(a, b, step);
    }
  }

  DYHEAD_DEVICE int row(int i) const { return first_row() + 16 * (i / 2) + i % 2 * 8 + lane_ / 4; }
  DYHEAD_DEVICE int column(int j) const {
    return first_column() + 8 * (j / 2) + lane_ % 4 * 2 + j % 2;
  }
  DYHEAD_DEVICE float& at(int i, int j) { return acc_[i / 2][j / 2][i % 2 * 2 + j % 2]; }

 private:
  static constexpr int kM = Warps::kWarpRows / 16;
  static constexpr int kN = Warps::kWarpCols / 8;

  DYHEAD_DEVICE int first_row() const { return warp_ / Warps::kN * Warps::kWarpRows; }
  DYHEAD_DEVICE int first_column() const { return warp_ % Warps::kN * Warps::kWarpCols; }

  // The address of columns that are a multiple of 16 further, within the columns of a warp. The
  // number of columns is also how the lower bits of their units differ, so exclusive or finds them
  // after the permutation.
  DYHEAD_DEVICE static const std::byte* further(const std::byte* tile, int offset, int columns) {
    constexpr int kDepth = Operand<Op>::kDepth;
    return tile + columns / kDepth * kPanelBytes<Op> +
           (offset ^ columns % kDepth / Operand<Op>::kUnit << 4);
  }

  DYHEAD_DEVICE void half_step(const std::byte* a, const std::byte* b, int step) {
    // Matrices of 8x8 are transposed as they are loaded. mma expects a's in the order (depth,
    // rows), with depth changing slowest, and b's in the order (columns, depth).
    const int row = 16 * step + lane_ % 8;
    const int matrix = lane_ / 8;
    const int a_offset = column_offset<Op>(row + matrix / 2 * 8, first_row() + matrix % 2 * 8);
    const int b_offset = column_offset<Op>(row + matrix % 2 * 8, first_column() + matrix / 2 * 8);
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ldmatrix_trans(left[m], further(a, a_offset, 16 * m));
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t right[4];
      ldmatrix_trans(right, further(b, b_offset, 8 * n));
      const uint32_t first[2] = {right[0], right[1]};
      const uint32_t second[2] = {right[2], right[3]};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply<Op>(acc_[m][n], left[m], first);
        multiply<Op>(acc_[m][n + 1], left[m], second);
      }
    }
  }

  DYHEAD_DEVICE void tf32_step(const std::byte* a, const std::byte* b, int step) {
    const auto word = [](const std::byte* p) {
      return __float_as_uint(*reinterpret_cast<const float*>(p));
    };
    const int row = 8 * step + lane_ % 4;
    const int column = lane_ / 4;
    int a_offset[2], b_offset[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int within = column % 4 * 4;
      a_offset[k] = column_offset<Op>(row + 4 * k, first_row() + column) + within;
      b_offset[k] = column_offset<Op>(row + 4 * k, first_column() + column) + within;
    }
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        left[m][r] = word(further(a, a_offset[r / 2], 16 * m + r % 2 * 8));
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const uint32_t right[2] = {word(further(b, b_offset[0], 8 * n)),
                                 word(further(b, b_offset[1], 8 * n))};
#pragma unroll
      for (int m = 0; m < kM; ++m) multiply<Op>(acc_[m][n], left[m], right);
    }
  }

  int warp_, lane_;
  float acc_[kM][kN][4];
};

// A warp's lanes are arranged 8 x 4; each holds units of consecutive rows by units of consecutive
// columns.
template <class T, int kRows, int kCols>
class SimtOuter {
 public:
  using F = T;
  using Warps = OuterWarps<kRows, kCols>;
  static constexpr int kUnit = Operand<T>::kUnit;
  static constexpr int kI = Warps::kWarpRows / 8;
  static constexpr int kJ = Warps::kWarpCols / 4;
  static constexpr int kPair = kUnit;
  static_assert(kI % kUnit == 0 && kJ % kUnit == 0);

  DYHEAD_DEVICE SimtOuter() : warp_(tile_thread() / kWarpSize), lane_(tile_thread() % kWarpSize) {
#pragma unroll
    for (int i = 0; i < kI; ++i) {
#pragma unroll
      for (int j = 0; j < kJ; ++j) acc_[i][j] = T(0);
    }
  }

  DYHEAD_DEVICE void step(const std::byte* a, const std::byte* b, int step) {
    constexpr int kStepDepth = Operand<T>::kDepth / kSteps;
    // Not unrolled: the loads of all rows would take the registers of the sums.
#pragma unroll 1
    for (int k = step * kStepDepth; k < (step + 1) * kStepDepth; ++k) {
      Vec<T, kUnit> left[kI / kUnit], right[kJ / kUnit];
#pragma unroll
      for (int i = 0; i < kI; i += kUnit) left[i / kUnit] = unit(a, k, row(i));
#pragma unroll
      for (int j = 0; j < kJ; j += kUnit) right[j / kUnit] = unit(b, k, column(j));
#pragma unroll
      for (int i = 0; i < kI; ++i) {
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
          acc_[i][j] += left[i / kUnit][i % kUnit] * right[j / kUnit][j % kUnit];
        }
      }
    }
  }

  DYHEAD_DEVICE int row(int i) const {
    return warp_ / Warps::kN * Warps::kWarpRows + (i / kUnit * 8 + lane_ / 4) * kUnit + i % kUnit;
  }
  DYHEAD_DEVICE int column(int j) const {
    return warp_ % Warps::kN * Warps::kWarpCols + (j / kUnit * 4 + lane_ % 4) * kUnit + j % kUnit;
  }
  DYHEAD_DEVICE T& at(int i, int j) { return acc_[i][j]; }

 private:
  DYHEAD_DEVICE static Vec<T, kUnit> unit(const std::byte* tile, int k, int column) {
    return load_vec<kUnit>(reinterpret_cast<const T*>(tile + column_offset<T>(k, column)));
  }

  int warp_, lane_;
  T acc_[kI][kJ];
};

template <class Op, int kRows, int kCols>
using TileOuter = std::conditional_t<Operand<Op>::kTensor, TensorOuter<Op, kRows, kCols>,
                                     SimtOuter<typename Operand<Op>::Storage, kRows, kCols>>;

}  // namespace dyhead::cuda
