// bfloat16 columns for the dot-product instruction of AVX512-BF16: blended in float32, rounded
// once, multiplied in pairs and accumulated in float32; and the same for the gradients of the
// backward. What computes in float32 is that of AVX-512.
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

// Pair i of row r lies at a + r * row_stride + i * pair_stride.
[[gnu::always_inline]] inline void gemm_tile(const bfloat16* a, int64_t row_stride,
                                             int64_t pair_stride, const bfloat16* b, float* c,
                                             int64_t c_stride, int64_t k) {
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
      std::memcpy(&pair, a + r * row_stride + i / 2 * pair_stride, sizeof pair);
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
      gemm_tile(static_cast<const bfloat16*>(a) + m * row_stride, row_stride, 2,
                static_cast<const bfloat16*>(b) + n * k, c + m * c_stride + n, c_stride, k);
    }
  }
}

// --- The backward's
// -------------------------------------------------------------------------------

void row_gemm(const void* a, int64_t, int64_t k_stride, const void* b, float* c, int64_t c_stride,
              int64_t rows, int64_t cols, int64_t k) {
  constexpr int kCols = kTileVectors * kLanes;
  for (int64_t n = 0; n < cols; n += kCols) {
    for (int64_t m = 0; m < rows; m += kTileRows) {
      gemm_tile(static_cast<const bfloat16*>(a) + 2 * m, 2, 2 * k_stride,
                static_cast<const bfloat16*>(b) + n * k, c + m * c_stride + n, c_stride, k);
    }
  }
}

// Words hold the values of two rows side by side. The first of them, in the lower halves, is
// written before the second is added.
template <int kCount, bool kSecond>
[[gnu::always_inline]] inline void blend_half(const ExistingCorners<bfloat16>& corners,
                                              int64_t channels, uint32_t* out) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    __m512 value = _mm512_set1_ps(corners.others);
    for (int i = 0; i < kCount; ++i) {
      value = _mm512_fmadd_ps(_mm512_set1_ps(corners.weight[i]), load(corners.from[i] + c), value);
    }
    __m512i words = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value));
    if (kSecond) {
      words = _mm512_or_si512(_mm512_loadu_si512(out + c), _mm512_slli_epi32(words, 16));
    }
    _mm512_storeu_si512(out + c, words);
  }
  for (; c < channels; ++c) {
    float value = corners.others;
    for (int i = 0; i < kCount; ++i) value += corners.weight[i] * to_compute(corners.from[i][c]);
    const uint32_t bits = float_to_bfloat16(value).bits;
    out[c] = kSecond ? out[c] | bits << 16 : bits;
  }
}

template <bool kSecond>
void blend_half(const ExistingCorners<bfloat16>& corners, int64_t channels, uint32_t* out) {
  switch (corners.count) {
    case 4:
      return blend_half<4, kSecond>(corners, channels, out);
    case 2:
      return blend_half<2, kSecond>(corners, channels, out);
    case 1:
      return blend_half<1, kSecond>(corners, channels, out);
    default:
      blend_half<0, kSecond>(corners, channels, out);
  }
}

void blend_rows(const bfloat16* source, int64_t stride, int64_t channels,
                const Corners<float>* samples, int64_t rows, void* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const ExistingCorners<bfloat16> corners = existing_corners(samples[r], source, stride);
    uint32_t* row = static_cast<uint32_t*>(out) + r / 2 * out_stride;
    if (r % 2 == 0) {
      blend_half<false>(corners, channels, row);
    } else {
      blend_half<true>(corners, channels, row);
    }
  }
}

void grad_rows(const bfloat16* grad, const MomentGrads<bfloat16>* moments, int64_t rows,
               int64_t channels, void* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const bfloat16* from = grad + r * channels;
    bfloat16* to = static_cast<bfloat16*>(out) + r * out_stride;
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      __m512 value = load(from + c);
      if (moments != nullptr) {
        const MomentGrads<bfloat16>& m = *moments;
        const __m512 centred = load(m.y + r * channels + c) - _mm512_loadu_ps(m.mean + c);
        value += m.share * (_mm512_loadu_ps(m.grad_mean + c) +
                            2.0f * centred * _mm512_loadu_ps(m.grad_var + c)) +
                 m.up_weights[r] * _mm512_loadu_ps(m.grad_up_mean + c);
      }
      const __m256bh rounded = _mm512_cvtneps_pbh(value);
      std::memcpy(to + c, &rounded, sizeof rounded);
    }
    for (; c < channels; ++c) {
      float value = to_compute(from[c]);
      if (moments != nullptr) {
        const MomentGrads<bfloat16>& m = *moments;
        const float centred = to_compute(m.y[r * channels + c]) - m.mean[c];
        value += m.share * (m.grad_mean[c] + 2.0f * centred * m.grad_var[c]) +
                 m.up_weights[r] * m.grad_up_mean[c];
      }
      to[c] = float_to_bfloat16(value);
    }
    for (; c < out_stride; ++c) to[c] = bfloat16{0};
  }
}

}  // namespace

const DeformKernels<bfloat16>& bf16_avx512bf16() {
  static const DeformKernels<bfloat16> kernels = {bf16_avx512.gemm,
                                                  {kTileRows, kTileVectors * kLanes, 2, gemm},
                                                  blend_columns,
                                                  bf16_avx512.blend_compute,
                                                  bf16_avx512.project_back,
                                                  grad_rows,
                                                  bf16_avx512.grad_rows_compute,
                                                  {kTileRows, kTileVectors * kLanes, 2, row_gemm},
                                                  blend_rows};
  return kernels;
}

}  // namespace dyhead::cpu
