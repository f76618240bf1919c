// Bilinear upsampling with align_corners=True, one axis at a time.
#pragma once

#include <cstdint>

#include "division.h"

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
  const Division division = divide(position, to - 1);
  const int32_t first = static_cast<int32_t>(division.quotient);
  const F fraction = static_cast<F>(division.rest) / static_cast<F>(to - 1);
  return {first, first + 1 < from ? first + 1 : first, fraction};
}

// The sum of the weights with which all output positions read position p, divided by their number:
// p's share in the mean of the upsampled axis.
template <class F>
DYHEAD_HD F upsampled_mean_weight(int32_t p, int32_t from, int32_t to) {
  if (from <= 1 || to <= 1) return p == 0 ? F(1) : F(0);
  if (from == to) return F(1) / static_cast<F>(to);
  // Positions i with i (from - 1) / (to - 1) within 1 of p.
  const int64_t scale = to - 1;
  const auto begin = static_cast<int32_t>(p == 0 ? 0 : ((p - 1) * scale + from - 2) / (from - 1));
  const auto end = static_cast<int32_t>(p + 1 >= from ? scale : (p + 1) * scale / (from - 1));
  F sum = F(0);
  for (int32_t i = begin; i <= end; ++i) {
    const Interpolation<F> at = interpolate<F>(i, from, to);
    if (at.first == p) sum += F(1) - at.fraction;
    if (at.second == p) sum += at.fraction;
  }
  return sum / static_cast<F>(to);
}

}  // namespace dyhead
