// Matrix products of a block's tiles in shared memory, out += a b^T, accumulated in registers: on
// tensor cores for bfloat16, float16 and TF32, on ordinary cores for IEEE float32 and float64.
//
// a is [kRows, 128 bytes] and b [kCols, 128 bytes], row by row. The 16-byte units of a row are
// permuted so that neither stores of whole rows nor loads of one unit of eight rows have bank
// conflicts. 256 threads take part.
#pragma once

#include "primitives.cuh"

namespace dyhead::cuda {

inline constexpr int kTileThreads = 256;
inline constexpr int kTileWarps = kTileThreads / kWarpSize;
inline constexpr int kRowBytes = 128;
inline constexpr int kUnits = 8;  // of 16 bytes, per row
inline constexpr int kSteps = 4;  // in which a row's depth is multiplied

// The thread index, with a bound that the compiler knows; else it would emit signed divisions.
DYHEAD_DEVICE int tile_thread() { return static_cast<int>(threadIdx.x % kTileThreads); }

// An operand: how values are stored in shared memory, and the type in which they are computed.
template <class T>
struct Operand {
  using Storage = T;
  using Compute = compute_t<T>;
  static constexpr bool kTensor = is_half_v<T>;
  static constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));  // of a tile
  static constexpr int kUnit = 16 / static_cast<int>(sizeof(T));
  using Unit = Vec<T, kUnit>;

  DYHEAD_DEVICE static Unit unit(const Compute (&values)[kUnit]) {
    if constexpr (is_half_v<T>) {
      Vec<uint32_t, kUnit / 2> words;
#pragma unroll
      for (int i = 0; i < kUnit / 2; ++i) words[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
      return __builtin_bit_cast(Unit, words);
    } else {
      Vec<T, kUnit> v;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) v[i] = values[i];
      return v;
    }
  }
};

// float32 values rounded to TF32 for the tensor cores.
struct Tf32 {};

template <>
struct Operand<Tf32> {
  using Storage = float;
  using Compute = float;
  static constexpr bool kTensor = true;
  static constexpr int kDepth = 32;
  static constexpr int kUnit = 4;

  DYHEAD_DEVICE static Vec<float, kUnit> unit(const float (&values)[kUnit]) {
    Vec<float, kUnit> v;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = __uint_as_float(to_tf32(values[i]));
    return v;
  }
};

// Byte offset of a 16-byte unit in a tile.
DYHEAD_HD int unit_offset(int row, int unit) { return row * kRowBytes + ((unit ^ (row & 7)) << 4); }

template <class Op>
DYHEAD_DEVICE void multiply(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Op, Tf32>) {
    mma_m16n8k8_tf32(acc, a, b);
  } else {
    mma_m16n8k16<Op>(acc, a, b);
  }
}

// How many warps share the columns of a tile: a warp takes 64 columns of a wide tile, else 32.
constexpr int warps_across(int cols) { return cols >= 128 ? cols / 64 : cols / 32; }

// Which part of a tile a warp multiplies. A tile may have fewer columns than kCols: then a warp
// takes `strips` times 8 of them, with the first strip of its own after the last one of the warp
// before.
template <int kRows, int kCols, int kWarpsN = warps_across(kCols)>
class TileWarps {
 public:
  static constexpr int kWarpsM = kTileWarps / kWarpsN;
  static constexpr int kWarpRows = kRows / kWarpsM;
  static constexpr int kWarpCols = kCols / kWarpsN;
  static constexpr int kStrips = kWarpCols / 8;

  DYHEAD_DEVICE explicit TileWarps(int strips) : strips_(strips) {}

  DYHEAD_DEVICE int warp_row() const { return warp_ / kWarpsN; }
  DYHEAD_DEVICE int first_row() const { return warp_row() * kWarpRows; }
  DYHEAD_DEVICE int first_column() const { return warp_ % kWarpsN * (8 * strips_); }
  DYHEAD_DEVICE int lane() const { return lane_; }
  DYHEAD_DEVICE int strips() const { return strips_; }

 private:
  int warp_ = tile_thread() / kWarpSize;
  int lane_ = tile_thread() % kWarpSize;
  int strips_;
};

// The part of the product that a thread holds: rows row(i), columns column(j). Lanes whose numbers
// differ only in bits kFirstXor and above hold the same columns; kPair consecutive j are
// consecutive columns.
template <class Op, int kRows, int kCols, int kWarpsN>
class TensorTile : public TileWarps<kRows, kCols, kWarpsN> {
 public:
  using F = float;
  using Warps = TileWarps<kRows, kCols, kWarpsN>;
  using Warps::first_column, Warps::first_row, Warps::lane, Warps::warp_row, Warps::strips;
  static constexpr int kI = Warps::kWarpRows / 8;
  static constexpr int kJ = Warps::kWarpCols / 4;
  static constexpr int kFirstXor = 4;
  static constexpr int kPair = 2;
  static_assert(Warps::kWarpRows % 16 == 0 && Warps::kWarpCols % 8 == 0);

  DYHEAD_DEVICE explicit TensorTile(int strips = Warps::kStrips) : Warps(strips) { clear(); }

  DYHEAD_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc_[m][n][e] = 0.0f;
      }
    }
  }

  // Adds the part of depth `step` of kSteps. The tiles begin `a_tile` bytes behind a and `b_tile`
  // bytes behind b, which are multiples of kRowBytes.
  DYHEAD_DEVICE void step(const std::byte* a, const std::byte* b, int step, int a_tile = 0,
                          int b_tile = 0) {
    // Bytes at which this lane's rows of the first fragments begin. In other fragments they are a
    // multiple of eight rows further, which leaves the permutation unchanged. A step has two units
    // of a row, so exclusive or finds those of any step from those of the first one.
    const int units = unit_offset(0, 2 * step);
    const int a_first =
        a_tile + opaque(first_row() * kRowBytes + unit_offset(lane() % 16, lane() / 16));
    const int b_first = b_tile + opaque(first_column() * kRowBytes +
                                        unit_offset(lane() / 16 * 8 + lane() % 8, lane() / 8 % 2));
    const std::byte* a_row = a + (a_first ^ units);
    const std::byte* b_row = b + (b_first ^ units);
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ldmatrix(left[m], a_row + 16 * m * kRowBytes);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      if (n >= strips()) break;
      if (n + 1 < kN && n + 1 < strips()) {
        uint32_t right[4];
        ldmatrix(right, b_row + 8 * n * kRowBytes);
        const uint32_t first[2] = {right[0], right[1]};
        const uint32_t second[2] = {right[2], right[3]};
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          multiply<Op>(acc_[m][n], left[m], first);
          multiply<Op>(acc_[m][n + 1 < kN ? n + 1 : n], left[m], second);
        }
      } else {
        uint32_t right[2];
        ldmatrix(right, b_row + 8 * n * kRowBytes);
#pragma unroll
        for (int m = 0; m < kM; ++m) multiply<Op>(acc_[m][n], left[m], right);
      }
    }
  }

  DYHEAD_DEVICE int row(int i) const { return first_row() + 16 * (i / 2) + i % 2 * 8 + lane() / 4; }
  DYHEAD_DEVICE int column(int j) const {
    return first_column() + 8 * (j / 2) + lane() % 4 * 2 + j % 2;
  }
  DYHEAD_DEVICE float& at(int i, int j) { return acc_[i / 2][j / 2][i % 2 * 2 + j % 2]; }

 private:
  static constexpr int kM = Warps::kWarpRows / 16;
  static constexpr int kN = Warps::kStrips;

  float acc_[kM][kN][4];
};

template <class T, int kRows, int kCols, int kWarpsN>
class SimtTile : public TileWarps<kRows, kCols, kWarpsN> {
 public:
  using F = T;
  using Warps = TileWarps<kRows, kCols, kWarpsN>;
  using Warps::first_column, Warps::first_row, Warps::lane, Warps::warp_row, Warps::strips;
  static constexpr int kI = Warps::kWarpRows / 4;
  static constexpr int kJ = Warps::kStrips;
  static constexpr int kFirstXor = 8;
  static constexpr int kPair = 1;

  DYHEAD_DEVICE explicit SimtTile(int strips = Warps::kStrips) : Warps(strips) { clear(); }

  DYHEAD_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kI; ++i) {
#pragma unroll
      for (int j = 0; j < kJ; ++j) acc_[i][j] = T(0);
    }
  }

  DYHEAD_DEVICE void step(const std::byte* a, const std::byte* b, int step, int a_tile = 0,
                          int b_tile = 0) {
    constexpr int kUnit = Operand<T>::kUnit;
    // Not unrolled: the loads of all units would take the registers of the sums.
#pragma unroll 1
    for (int unit = 2 * step; unit < 2 * step + kUnits / kSteps; ++unit) {
      Vec<T, kUnit> left[kI];
#pragma unroll
      for (int i = 0; i < kI; ++i) {
        left[i] =
            load_vec<kUnit>(reinterpret_cast<const T*>(a + a_tile + unit_offset(row(i), unit)));
      }
#pragma unroll
      for (int j = 0; j < kJ; ++j) {
        if (j >= strips()) break;
        const Vec<T, kUnit> right =
            load_vec<kUnit>(reinterpret_cast<const T*>(b + b_tile + unit_offset(column(j), unit)));
#pragma unroll
        for (int i = 0; i < kI; ++i) {
#pragma unroll
          for (int k = 0; k < kUnit; ++k) acc_[i][j] += left[i][k] * right[k];
        }
      }
    }
  }

  DYHEAD_DEVICE int row(int i) const { return first_row() + 4 * i + lane() / 8; }
  DYHEAD_DEVICE int column(int j) const { return first_column() + 8 * j + lane() % 8; }
  DYHEAD_DEVICE T& at(int i, int j) { return acc_[i][j]; }

 private:
  T acc_[kI][kJ];
};

template <class Op, int kRows, int kCols, int kWarpsN = warps_across(kCols)>
using TileProduct =
    std::conditional_t<Operand<Op>::kTensor, TensorTile<Op, kRows, kCols, kWarpsN>,
                       SimtTile<typename Operand<Op>::Storage, kRows, kCols, kWarpsN>>;

}  // namespace dyhead::cuda
