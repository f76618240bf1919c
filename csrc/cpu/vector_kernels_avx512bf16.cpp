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

// Neighbouring values are blended in two vectors: those at even places, and those at odd ones.
template <int kCount>
[[gnu::always_inline]] inline void blend_row(const ExistingCorners<bfloat16>& corners,
                                             int64_t channels, bfloat16* out) {
  const __m512i odd_places = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  // Even values first, as their conversion leaves them; the order is that of pairs again.
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  int64_t c = 0;
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
    __m512 even = _mm512_set1_ps(corners.others), odd = even;
    for (int i = 0; i < kCount; ++i) {
      const __m512 weight = _mm512_set1_ps(corners.weight[i]);
      const __m512i both = _mm512_loadu_si512(corners.from[i] + c);
      // With a mask, since g++ 12 warns of what it leaves undefined without one.
      const __m512i shifted = _mm512_maskz_slli_epi32(0xffff, both, 16);
      even = _mm512_fmadd_ps(weight, (__m512)shifted, even);
      odd = _mm512_fmadd_ps(weight, (__m512)_mm512_and_si512(both, odd_places), odd);
    }
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(out + c, _mm512_permutexvar_epi16(pairs, rounded));
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
  static const DeformKernels<bfloat16> kernels = [] {
    DeformKernels<bfloat16> with_pairs = bf16_avx512.deform;
    with_pairs.column_gemm = {kTileRows, kTileVectors * kLanes, 2, gemm};
    with_pairs.blend = blend_columns;
    return with_pairs;
  }();
  return kernels;
}

}  // namespace dyhead::cpu
