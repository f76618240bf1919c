// Transposes a matrix in blocks of whole vectors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

namespace dyhead::cpu {

// 16-byte vectors of kCount elements.
template <class E>
struct Lanes {
  static constexpr int kCount = 16 / sizeof(E);
  typedef E Vector __attribute__((vector_size(16)));

  // From a0, a1, ... and b0, b1, ...: a0, b0, a1, b1, ... of the lower or the upper halves.
  template <int kHalf>
  static Vector interleave(Vector a, Vector b) {
    return interleave_at<kHalf * kCount / 2>(a, b, std::make_integer_sequence<int, kCount>{});
  }

 private:
  template <int kFirst, int... kLane>
  static Vector interleave_at(Vector a, Vector b, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * kCount)...);
  }
};

// out[j * out_stride + i] = in[i * in_stride + j] for i and j below Lanes<E>::kCount, by as many
// perfect shuffles of all rows as an index has bits.
template <class E>
void transpose_square(const E* in, int64_t in_stride, E* out, int64_t out_stride) {
  using L = Lanes<E>;
  typename L::Vector rows[L::kCount], shuffled[L::kCount];
  for (int i = 0; i < L::kCount; ++i) std::memcpy(&rows[i], in + i * in_stride, sizeof rows[i]);
  for (int bit = 1; bit < L::kCount; bit *= 2) {
    for (int i = 0; i < L::kCount / 2; ++i) {
      shuffled[2 * i] = L::template interleave<0>(rows[i], rows[i + L::kCount / 2]);
      shuffled[2 * i + 1] = L::template interleave<1>(rows[i], rows[i + L::kCount / 2]);
    }
    std::copy_n(shuffled, L::kCount, rows);
  }
  for (int j = 0; j < L::kCount; ++j) std::memcpy(out + j * out_stride, &rows[j], sizeof rows[j]);
}

// out [columns, rows] from in [rows, columns].
template <class E>
void transpose(const E* in, int64_t in_stride, int64_t rows, int64_t columns, E* out,
               int64_t out_stride) {
  constexpr int64_t kSide = Lanes<E>::kCount;
  for (int64_t i = 0; i < rows; i += kSide) {
    const int64_t height = std::min(kSide, rows - i);
    int64_t j = 0;
    for (; height == kSide && j + kSide <= columns; j += kSide) {
      transpose_square(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    }
    for (; j < columns; ++j) {
      for (int64_t k = i; k < i + height; ++k) out[j * out_stride + k] = in[k * in_stride + j];
    }
  }
}

}  // namespace dyhead::cpu
