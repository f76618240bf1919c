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
constexpr int kPanel = kTileVectors * kLanes;

[[gnu::always_inline]] inline __m512 load(const bfloat16* p) {
  __m256i bits;
  std::memcpy(&bits, p, sizeof bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

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
      even = _mm512_fmadd_ps(weight, (__m512)_mm512_slli_epi32(both, 16), even);
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
  for (int64_t n = 0; n < cols; n += kPanel) {
    for (int64_t m = 0; m < rows; m += kTileRows) {
      gemm_tile(static_cast<const bfloat16*>(a) + m * row_stride, row_stride,
                static_cast<const bfloat16*>(b) + n * k, c + m * c_stride + n, c_stride, k);
    }
  }
}

// --- The backward's
// -------------------------------------------------------------------------------

// Of the words of two rows, that of a channel.
[[gnu::always_inline]] inline uint32_t* word_of(int64_t c, uint32_t* row, int64_t panel_stride) {
  return row + c / kPanel * panel_stride + c % kPanel;
}

// Words hold the values of two rows side by side. The first of them, in the lower halves, is
// written before the second is added. From channel c on.
template <int kCount, bool kSecond>
[[gnu::always_inline]] inline void blend_half(const ExistingCorners<bfloat16>& corners, int64_t c,
                                              int64_t channels, uint32_t* row,
                                              int64_t panel_stride) {
  for (; c + kLanes <= channels; c += kLanes) {
    __m512 value = _mm512_set1_ps(corners.others);
    for (int i = 0; i < kCount; ++i) {
      value = _mm512_fmadd_ps(_mm512_set1_ps(corners.weight[i]), load(corners.from[i] + c), value);
    }
    __m512i words = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value));
    uint32_t* out = word_of(c, row, panel_stride);
    if (kSecond) words = _mm512_or_si512(_mm512_loadu_si512(out), _mm512_slli_epi32(words, 16));
    _mm512_storeu_si512(out, words);
  }
  for (; c < channels; ++c) {
    float value = corners.others;
    for (int i = 0; i < kCount; ++i) value += corners.weight[i] * to_compute(corners.from[i][c]);
    const uint32_t bits = float_to_bfloat16(value).bits;
    uint32_t& out = *word_of(c, row, panel_stride);
    out = kSecond ? out | bits << 16 : bits;
  }
}

template <bool kSecond>
void blend_half(const ExistingCorners<bfloat16>& corners, int64_t first, int64_t channels,
                uint32_t* row, int64_t panel_stride) {
  switch (corners.count) {
    case 4:
      return blend_half<4, kSecond>(corners, first, channels, row, panel_stride);
    case 2:
      return blend_half<2, kSecond>(corners, first, channels, row, panel_stride);
    case 1:
      return blend_half<1, kSecond>(corners, first, channels, row, panel_stride);
    default:
      blend_half<0, kSecond>(corners, first, channels, row, panel_stride);
  }
}

// Where two rows of bfloat16, each converted as its values at even and at odd places, have the
// values of 32 words: those of the even places of both rows come first.
struct WordPlaces {
  alignas(64) uint16_t place[2][32];

  constexpr WordPlaces() : place{} {
    for (int i = 0; i < 64; ++i) {
      const int channel = i / 2, row = i % 2;
      place[i / 32][i % 32] = static_cast<uint16_t>(channel % 2 * 32 + row * 16 + channel / 2);
    }
  }
};
constexpr WordPlaces kWordPlaces;

// Two rows with all their corners; returns the first channel that is left.
int64_t blend_two(const ExistingCorners<bfloat16>& first, const ExistingCorners<bfloat16>& second,
                  int64_t channels, uint32_t* row, int64_t panel_stride) {
  const __m512i odd_places = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i low = _mm512_load_si512(kWordPlaces.place[0]);
  const __m512i high = _mm512_load_si512(kWordPlaces.place[1]);
  int64_t c = 0;
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
    __m512 even[2], odd[2];
    for (int i = 0; i < 2; ++i) {
      const ExistingCorners<bfloat16>& corners = i == 0 ? first : second;
      even[i] = odd[i] = _mm512_setzero_ps();
      for (int j = 0; j < 4; ++j) {
        const __m512 weight = _mm512_set1_ps(corners.weight[j]);
        const __m512i both = _mm512_loadu_si512(corners.from[j] + c);
        even[i] = _mm512_fmadd_ps(weight, (__m512)_mm512_slli_epi32(both, 16), even[i]);
        odd[i] = _mm512_fmadd_ps(weight, (__m512)_mm512_and_si512(both, odd_places), odd[i]);
      }
    }
    const __m512i evens = (__m512i)_mm512_cvtne2ps_pbh(even[1], even[0]);
    const __m512i odds = (__m512i)_mm512_cvtne2ps_pbh(odd[1], odd[0]);
    uint32_t* out = word_of(c, row, panel_stride);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(evens, low, odds));
    _mm512_storeu_si512(out + kLanes, _mm512_permutex2var_epi16(evens, high, odds));
  }
  return c;
}

void blend_rows(const bfloat16* source, int64_t stride, int64_t channels,
                const Corners<float>* samples, int64_t rows, void* out, int64_t panel_stride) {
  uint32_t* row = static_cast<uint32_t*>(out);
  const int64_t words = panel_stride / 2;
  for (int64_t r = 0; r < rows; r += 2, row += kPanel) {
    const ExistingCorners<bfloat16> first = existing_corners(samples[r], source, stride);
    if (r + 1 == rows) {
      blend_half<false>(first, 0, channels, row, words);
      break;
    }
    const ExistingCorners<bfloat16> second = existing_corners(samples[r + 1], source, stride);
    int64_t c = 0;
    if (first.count == 4 && second.count == 4) c = blend_two(first, second, channels, row, words);
    blend_half<false>(first, c, channels, row, words);
    blend_half<true>(second, c, channels, row, words);
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
                            2.0f * centred * _mm512_loadu_ps(m.grad_var + c));
        value += m.up_weights[r] * _mm512_loadu_ps(m.grad_up_mean + c);
      }
      const __m256bh rounded = _mm512_cvtneps_pbh(value);
      std::memcpy(to + c, &rounded, sizeof rounded);
    }
    for (; c < channels; ++c) {
      float value = to_compute(from[c]);
      if (moments != nullptr) {
        const MomentGrads<bfloat16>& m = *moments;
        const float centred = to_compute(m.y[r * channels + c]) - m.mean[c];
        value += m.share * (m.grad_mean[c] + 2.0f * centred * m.grad_var[c]);
        value += m.up_weights[r] * m.grad_up_mean[c];
      }
      to[c] = float_to_bfloat16(value);
    }
    for (; c < out_stride; ++c) to[c] = bfloat16{0};
  }
}

}  // namespace

const DeformKernels<bfloat16>& bf16_avx512bf16() {
  static const DeformKernels<bfloat16> kernels = [] {
    DeformKernels<bfloat16> with_pairs = bf16_avx512.deform;
    with_pairs.column_gemm = {kTileRows, kPanel, 2, gemm};
    with_pairs.blend = blend_columns;
    with_pairs.grad_rows = grad_rows;
    with_pairs.blend_rows = blend_rows;
    return with_pairs;
  }();
  return kernels;
}

}  // namespace dyhead::cpu
