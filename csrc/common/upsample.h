// Bilinear upsampling with align_corners=True, one axis at a time.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace dyhead {

// Output position i of `to` reads positions `first` and `second` of `from` with weights 1 -
// fraction and fraction.
template <class F>
struct Interpolation {
  int32_t first, second;
  F fraction;
};

template <class F>
DYHEAD_HD Interpolation<F> interpolate(int32_t i, int32_t from, int32_t to) {
  if (to <= 1 || from <= 1) return {0, 0, F(0)};
  // The position is i (from - 1) / (to - 1): whole numbers give its fraction without rounding
  // error.
  const int64_t position = static_cast<int64_t>(i) * (from - 1);
  const int32_t first = static_cast<int32_t>(position / (to - 1));
  const F fraction = static_cast<F>(position % (to - 1)) / static_cast<F>(to - 1);
  return {first, first + 1 < from ? first + 1 : first, fraction};
}

}  // namespace dyhead
