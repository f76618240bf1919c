// pack_levels and unpack_levels on the CPU: one pass over each level, in blocks of pixels whose
// rows stay in the cache while a few channels at a time are moved.
#include "../common/pack_levels.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "context.h"
#include "parallel.h"

namespace dyhead::cpu {
namespace {

constexpr int64_t kPixels = 64;  // of a task

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

// Calls f(level, image, first pixel, pixels) for blocks that cover all levels.
template <class F>
void for_each_block(const PackParams& p, F&& f) {
  std::vector<int64_t> first_task{0};
  for (const PackLevel& level : p.levels) {
    first_task.push_back(first_task.back() + p.images * ceil_div(level.map.pixels(), kPixels));
  }
  parallel_for_each(first_task.back(), [&](int64_t task) {
    const auto after = std::upper_bound(first_task.begin(), first_task.end(), task);
    const int64_t l = after - first_task.begin() - 1;
    const PackLevel& level = p.levels[l];
    const int64_t blocks = ceil_div(level.map.pixels(), kPixels);
    const int64_t image = (task - first_task[l]) / blocks;
    const int64_t first = (task - first_task[l]) % blocks * kPixels;
    f(level, image, first, std::min(kPixels, level.map.pixels() - first));
  });
}

template <class E>
void pack(const PackParams& p) {
  for_each_block(p, [&](const PackLevel& level, int64_t image, int64_t first, int64_t count) {
    const int64_t pixels = level.map.pixels();
    const E* data = static_cast<const E*>(level.data) + image * pixels * p.channels;
    E* rows = static_cast<E*>(p.rows) + (level.map.first_row + image * pixels + first) * p.channels;
    if (level.channels_last) {
      std::copy_n(data + first * p.channels, count * p.channels, rows);
    } else {
      transpose(data + first, pixels, p.channels, count, rows, p.channels);
    }
  });
}

template <class E>
void unpack(const PackParams& p) {
  for_each_block(p, [&](const PackLevel& level, int64_t image, int64_t first, int64_t count) {
    const int64_t pixels = level.map.pixels();
    const E* rows =
        static_cast<const E*>(p.rows) + (level.map.first_row + image * pixels + first) * p.channels;
    E* data = static_cast<E*>(level.data) + image * pixels * p.channels;
    transpose(rows, p.channels, count, p.channels, data + first, pixels);
  });
}

}  // namespace
}  // namespace dyhead::cpu

namespace dyhead {

void run_pack_levels(const PackParams& params, Context&) {
  dispatch_element(params.element_bytes, [&](auto e) { cpu::pack<decltype(e)>(params); });
}

void run_unpack_levels(const PackParams& params, Context&) {
  dispatch_element(params.element_bytes, [&](auto e) { cpu::unpack<decltype(e)>(params); });
}

}  // namespace dyhead
