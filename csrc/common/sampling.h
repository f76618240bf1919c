// Where a tap of a deformable convolution reads: location, bounds, corners and bilinear weights.
// Shared by forward and backward, CPU and CUDA.
//
// The map is 0 outside, and that 0 takes part in the arithmetic: it is multiplied with the weight
// of its corner and with the modulation, as every value is. So an infinite or NaN modulation gives
// NaN there, too. A position that is not finite has NaN for its fractions, so that the sample's
// value and its derivatives are NaN, though it reads nothing.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"

namespace dyhead {

// A sample inside the image is at (top + below, left + right), 0 <= below, right < 1. Corners are
// numbered (top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1). Outside, the
// fractions are 0, or NaN where the offset is not finite.
template <class F>
struct SamplePoint {
  F below, right;
  int32_t top, left;
  bool inside;
};

// The sample at (base_y + dy, base_x + dx). Valid samples have -1 < y < height and -1 < x < width.
// NaN and infinity fail these comparisons, and only a valid coordinate is converted to an integer.
// The fraction is computed from the offset alone: adding the pixel's position first would lose
// digits.
template <class F>
DYHEAD_HD SamplePoint<F> locate(int32_t base_y, F dy, int32_t base_x, F dx, int32_t height,
                                int32_t width) {
  const F y = static_cast<F>(base_y) + dy;
  const F x = static_cast<F>(base_x) + dx;
  const bool inside =
      y > F(-1) && y < static_cast<F>(height) && x > F(-1) && x < static_cast<F>(width);
  if (!inside) {
    const F lost = F(0) * dy + F(0) * dx;  // NaN where one of them is not finite
    return {lost, lost, 0, 0, false};
  }
  const F whole_y = std::floor(dy);
  const F whole_x = std::floor(dx);
  // The whole part alone may exceed 32 bits where its sum with the base does not.
  const auto top = static_cast<int32_t>(base_y + static_cast<int64_t>(whole_y));
  const auto left = static_cast<int32_t>(base_x + static_cast<int64_t>(whole_x));
  return {dy - whole_y, dx - whole_x, top, left, true};
}

// Whether corner i lies in the image.
template <class F>
DYHEAD_HD bool corner_exists(const SamplePoint<F>& p, int i, int32_t height, int32_t width) {
  const int32_t y = p.top + i / 2;
  const int32_t x = p.left + i % 2;
  return p.inside && y >= 0 && y < height && x >= 0 && x < width;
}

template <class F>
struct Corners {
  F weight[4];
  // y * width + x, or -1 where the corner does not exist: it must not be read, and its value is 0.
  int32_t pixel[4];
};

// The sample's value is the sum of weight[i] * value(pixel[i]); `scale` (the modulation) is folded
// into the weights. Corners that do not exist keep their weights, for their product with 0.
template <class F>
DYHEAD_HD Corners<F> corners_of(const SamplePoint<F>& p, int32_t height, int32_t width, F scale) {
  Corners<F> c;
  for (int i = 0; i < 4; ++i) {
    const F weight_y = i / 2 ? p.below : F(1) - p.below;
    const F weight_x = i % 2 ? p.right : F(1) - p.right;
    c.weight[i] = weight_y * weight_x * scale;
    c.pixel[i] = corner_exists(p, i, height, width) ? (p.top + i / 2) * width + p.left + i % 2 : -1;
  }
  return c;
}

// A sample's value and its derivatives, from one number for each corner: its value, or its inner
// product with the gradient. A corner that does not exist has the value 0.
template <class F>
DYHEAD_HD F sample_value(const SamplePoint<F>& p, const F (&corner)[4]) {
  return (F(1) - p.below) * ((F(1) - p.right) * corner[0] + p.right * corner[1]) +
         p.below * ((F(1) - p.right) * corner[2] + p.right * corner[3]);
}

template <class F>
DYHEAD_HD F sample_slope_y(const SamplePoint<F>& p, const F (&corner)[4]) {
  return (F(1) - p.right) * (corner[2] - corner[0]) + p.right * (corner[3] - corner[1]);
}

template <class F>
DYHEAD_HD F sample_slope_x(const SamplePoint<F>& p, const F (&corner)[4]) {
  return (F(1) - p.below) * (corner[1] - corner[0]) + p.below * (corner[3] - corner[2]);
}

}  // namespace dyhead
