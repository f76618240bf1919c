// bfloat16 columns for the dot-product instruction of AVX512-BF16: blended in float32, rounded
// once, multiplied in pairs and accumulated in float32. All but the forward's columns is that of
// AVX-512.
#include <immintrin.h>

#include <cstring>

#include "vector_kernels.h"

namespace dyhead::cpu {
namespace {

constexpr int kTileRows = 12;
constexpr int kTileVectors = 2;
constexpr int kLanes = 16;

typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));

[[gnu::always_inline]] inline __m512 load(const bfloat16* p) {
  Halves bits;
  std::memcpy(&bits, p, sizeof bits);
  return (__m512)(__builtin_convertvector(bits, Words) << 16);
}

template <int kCount>
[[gnu::always_inline]] inline void blend_row(const ExistingCorners<bfloat16>& corners,
                                             int64_t channels, bfloat16* out) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    __m512 value = _mm512_set1_ps(corners.others);
    for (int i = 0; i < kCount; ++i) {
      value = _mm512_fmadd_ps(_mm512_set1_ps(corners.weight[i]), load(corners.from[i] + c), value);
    }
    const __m256bh rounded = _mm512_cvtneps_pbh(value);
    std::memcpy(out + c, &rounded, sizeof rounded);
  }
  for (; c < channels; ++c) {
    float value = corners.others;
    for (int i = 0; i < kCount; ++i) value += corners.weight[i] * to_compute(corners.from[i][c]);
    out[c] = float_to_bfloat16(value);
  }
}

void blend_columns(const bfloat16* source, int64_t stride, int64_t channels,
                   const Corners<float>* samples, int64_t rows, void* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const ExistingCorners<bfloat16> corners = existing_corners(samples[r], source, stride);
    bfloat16* row = static_cast<bfloat16*>(out) + r * out_stride;
    switch (corners.count) {
      case 4:
        blend_row<4>(corners, channels, row);
        break;
      case 2:
        blend_row<2>(corners, channels, row);
        break;
      case 1:
        blend_row<1>(corners, channels, row);
        break;
      default:
        blend_row<0>(corners, channels, row);
    }
  }
}

[[gnu::always_inline]] inline void gemm_tile(const bfloat16* a, int64_t row_stride,
                                             const bfloat16* b, float* c, int64_t c_stride,
                                             int64_t k) {
  __m512 acc[kTileRows][kTileVectors];
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      acc[r][v] = _mm512_loadu_ps(c + r * c_stride + v * kLanes);
    }
  }
  for (int64_t i = 0; i < k; i += 2) {
    __m512bh panel[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) {
      std::memcpy(&panel[v], b + i * kTileVectors * kLanes + v * 2 * kLanes, sizeof panel[v]);
    }
    for (int r = 0; r < kTileRows; ++r) {
      int pair;
      std::memcpy(&pair, a + r * row_stride + i, sizeof pair);
      const __m512i both = _mm512_set1_epi32(pair);
      for (int v = 0; v < kTileVectors; ++v) {
        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], (__m512bh)both, panel[v]);
      }
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      _mm512_storeu_ps(c + r * c_stride + v * kLanes, acc[r][v]);
    }
  }
}

void gemm(const void* a, int64_t row_stride, int64_t, const void* b, float* c, int64_t c_stride,
          int64_t rows, int64_t cols, int64_t k) {
  constexpr int kCols = kTileVectors * kLanes;
  for (int64_t n = 0; n < cols; n += kCols) {
    for (int64_t m = 0; m < rows; m += kTileRows) {
      gemm_tile(static_cast<const bfloat16*>(a) + m * row_stride, row_stride,
                static_cast<const bfloat16*>(b) + n * k, c + m * c_stride + n, c_stride, k);
    }
  }
}

}  // namespace

const DeformKernels<bfloat16>& bf16_avx512bf16() {
  static const DeformKernels<bfloat16> kernels = {bf16_avx512.gemm,
                                                  {kTileRows, kTileVectors * kLanes, 2, gemm},
                                                  blend_columns,
                                                  bf16_avx512.blend_compute,
                                                  bf16_avx512.project_back};
  return kernels;
}

}  // namespace dyhead::cpu
