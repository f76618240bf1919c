// Products of bfloat16 pairs on the tile registers of AMX. All else is that of AVX512-BF16.
#include <immintrin.h>

#include <algorithm>

#include "vector_kernels.h"

namespace dyhead::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileCols = 32;  // of two registers
constexpr int kStep = 32;      // values of k in a register
constexpr int kLanes = 16;

// The registers' shapes: sums in 0 to 3, rows of a in 4 and 5, columns of b in 6 and 7.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16};

  // For products over `step` values, an even number of at most kStep.
  explicit TileShapes(int step) {
    for (int i = 4; i < 8; ++i) {
      row_bytes[i] = static_cast<uint16_t>(i < 6 ? step * 2 : 64);
      rows[i] = static_cast<uint8_t>(i < 6 ? 16 : step / 2);
    }
  }
};

// Rows of one or two registers.
template <int kRegisters>
[[gnu::always_inline]] inline void gemm_tile(const bfloat16* a, int64_t a_stride, const bfloat16* b,
                                             float* c, int64_t c_stride, int64_t k) {
  constexpr int64_t kPairRow = kTileCols * 2 * sizeof(bfloat16);
  const int64_t a_bytes = a_stride * static_cast<int64_t>(sizeof(bfloat16));
  const int64_t c_bytes = c_stride * static_cast<int64_t>(sizeof(float));
  float* lower = c + kTileRows * c_stride;
  _tile_loadd(0, c, c_bytes);
  _tile_loadd(1, c + kLanes, c_bytes);
  if constexpr (kRegisters == 2) {
    _tile_loadd(2, lower, c_bytes);
    _tile_loadd(3, lower + kLanes, c_bytes);
  }
  for (int64_t i = 0; i < k; i += kStep) {
    _tile_loadd(6, b + i * kTileCols, kPairRow);
    _tile_loadd(7, b + i * kTileCols + 2 * kLanes, kPairRow);
    _tile_loadd(4, a + i, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kRegisters == 2) {
      _tile_loadd(5, a + kTileRows * a_stride + i, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + kLanes, c_bytes);
  if constexpr (kRegisters == 2) {
    _tile_stored(2, lower, c_bytes);
    _tile_stored(3, lower + kLanes, c_bytes);
  }
}

// Values [first, last) of k: a multiple of kStep, or fewer.
void multiply(const bfloat16* a, int64_t a_stride, const bfloat16* b, float* c, int64_t c_stride,
              int64_t rows, int64_t cols, int64_t k, int64_t first, int64_t last) {
  if (first == last) return;
  const TileShapes shapes(static_cast<int>(std::min<int64_t>(last - first, kStep)));
  _tile_loadconfig(&shapes);
  for (int64_t m = 0; m < rows; m += 2 * kTileRows) {
    for (int64_t n = 0; n < cols; n += kTileCols) {
      const bfloat16* from = a + m * a_stride + first;
      const bfloat16* panel = b + n * k + first * kTileCols;
      float* to = c + m * c_stride + n;
      if (rows - m == kTileRows) {
        gemm_tile<1>(from, a_stride, panel, to, c_stride, last - first);
      } else {
        gemm_tile<2>(from, a_stride, panel, to, c_stride, last - first);
      }
    }
  }
  _tile_release();
}

void gemm(const void* a, int64_t row_stride, int64_t, const void* b, float* c, int64_t c_stride,
          int64_t rows, int64_t cols, int64_t k) {
  const auto* columns = static_cast<const bfloat16*>(a);
  const auto* panels = static_cast<const bfloat16*>(b);
  const int64_t whole = k / kStep * kStep;
  multiply(columns, row_stride, panels, c, c_stride, rows, cols, k, 0, whole);
  multiply(columns, row_stride, panels, c, c_stride, rows, cols, k, whole, k);
}

}  // namespace

const DeformKernels<bfloat16>& bf16_amx() {
  static const DeformKernels<bfloat16> kernels = [] {
    DeformKernels<bfloat16> with_tiles = bf16_avx512bf16();
    with_tiles.column_gemm = {kTileRows, kTileCols, 2, gemm};
    with_tiles.sums_parts = true;
    return with_tiles;
  }();
  return kernels;
}

}  // namespace dyhead::cpu
