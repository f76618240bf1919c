// Sums of scattered values, by floating-point or integer atomics.
#pragma once

#include <cmath>
#include <limits>

#include "../tile/primitives.cuh"
#include "deform_conv_bwd.h"

namespace dyhead::cuda {

// Fixed-point sums. A value is rounded to a multiple of 2^-k, with k from the largest magnitude
// such that the sum of 2^sum_bits values fits 62 bits. A float64 value takes two integers, for
// coarse and for fine steps.
template <class F>
struct FixedPoint {
  static constexpr int kWords = std::is_same_v<F, double> ? 2 : 1;
  static constexpr int kFineBits = 40;
  static constexpr F kInfinity = std::numeric_limits<F>::infinity();
  static constexpr F kNaN = std::numeric_limits<F>::quiet_NaN();

  F scale;  // 2^k; NaN if no sum can be finite

  DYHEAD_DEVICE static FixedPoint of(const unsigned* largest, int32_t sum_bits) {
    const F magnitude = *reinterpret_cast<const F*>(largest);
    const F infinity = kInfinity, nan = kNaN;
    if (!(magnitude < infinity)) return {nan};
    if (magnitude == F(0)) return {F(1)};
    int exponent;
    frexp(magnitude, &exponent);  // magnitude < 2^exponent
    // Beyond these bounds the scale itself would not be a normal number.
    const int wanted = 62 - sum_bits - exponent;
    const int bound = std::is_same_v<F, double> ? 1000 : 120;
    return {ldexp(F(1), wanted < bound ? wanted : bound)};
  }

  // p points to kWords integers.
  DYHEAD_DEVICE void add(unsigned long long* p, F value) const {
    const F scaled = value * scale;
    if (!(fabs(scaled) < F(0x1p62))) return;  // the scale is NaN, and so will be the sum
    const long long whole = llrint(scaled);
    atomicAdd(p, static_cast<unsigned long long>(whole));
    if constexpr (kWords == 2) {
      const F remainder = ldexp(scaled - static_cast<F>(whole), kFineBits);
      atomicAdd(p + 1, static_cast<unsigned long long>(llrint(remainder)));
    }
  }

  DYHEAD_DEVICE F value(const long long* p) const {
    F sum = static_cast<F>(p[0]);
    if constexpr (kWords == 2) sum += ldexp(static_cast<F>(p[1]), -kFineBits);
    return sum / scale;
  }
};

DYHEAD_DEVICE void raise_to(unsigned* largest, float magnitude) {
  atomicMax(largest, __float_as_uint(magnitude));
}

DYHEAD_DEVICE void raise_to(unsigned* largest, double magnitude) {
  atomicMax(reinterpret_cast<unsigned long long*>(largest),
            __builtin_bit_cast(unsigned long long, magnitude));
}

// The larger of two magnitudes; NaN is the largest.
template <class F>
DYHEAD_DEVICE F larger(F a, F b) {
  return a > b || a != a ? a : b;
}

// The largest magnitude of a warp, in every lane.
template <class F>
DYHEAD_DEVICE F warp_largest(F magnitude) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    magnitude = larger(magnitude, __shfl_xor_sync(kFullMask, magnitude, distance));
  }
  return magnitude;
}

DYHEAD_DEVICE void add_float(float* p, float value) { red_add(p, value); }
DYHEAD_DEVICE void add_float(double* p, double value) { atomicAdd(p, value); }

}  // namespace dyhead::cuda
