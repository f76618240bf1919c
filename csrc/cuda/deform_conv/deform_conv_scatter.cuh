// Sums of scattered values, by floating-point or integer atomics.
#pragma once

#include <cmath>
#include <limits>

#include "../tile/primitives.cuh"
#include "deform_conv_bwd.h"

namespace dyhead::cuda {

template <class F>
struct NonFinite {
  static constexpr F kInfinity = std::numeric_limits<F>::infinity();
  static constexpr F kNaN = std::numeric_limits<F>::quiet_NaN();
};

template <class F>
DYHEAD_DEVICE bool is_finite(F value) {
  constexpr F kInfinity = NonFinite<F>::kInfinity;
  return fabs(value) < kInfinity;
}

// Two bits for each sum: whether +infinity and whether -infinity was added to it. NaN counts as
// both, whose sum is NaN too.
struct NonFiniteMarks {
  template <class F>
  DYHEAD_DEVICE static void add(unsigned* largest, int64_t sum, F value) {
    const unsigned bits = value > F(0) ? 1u : value < F(0) ? 2u : 3u;
    atomicOr(largest + kLargestWords + sum / kMarkedSums, bits << 2 * (sum % kMarkedSums));
  }

  // What a sum with these bits is, if any is set.
  template <class F>
  DYHEAD_DEVICE static F value(unsigned bits) {
    constexpr F kInfinity = NonFinite<F>::kInfinity;
    constexpr F kNaN = NonFinite<F>::kNaN;
    return bits == 1u ? kInfinity : bits == 2u ? -kInfinity : kNaN;
  }

  DYHEAD_DEVICE static unsigned bits(const unsigned* largest, int64_t sum) {
    return largest[kLargestWords + sum / kMarkedSums] >> 2 * (sum % kMarkedSums) & 3u;
  }
};

// Fixed-point sums of finite values. A value is rounded to a multiple of 2^-k, with k from the
// largest magnitude such that the sum of 2^sum_bits values fits 62 bits. A float64 value takes two
// integers, for coarse and for fine steps.
template <class F>
struct FixedPoint {
  static constexpr int kWords = std::is_same_v<F, double> ? 2 : 1;
  static constexpr int kFineBits = 40;

  F scale;  // 2^k

  DYHEAD_DEVICE static FixedPoint of(const unsigned* largest, int32_t sum_bits) {
    const F magnitude = *reinterpret_cast<const F*>(largest);
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

// The largest magnitude of a warp, in every lane.
template <class F>
DYHEAD_DEVICE F warp_largest(F magnitude) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const F other = __shfl_xor_sync(kFullMask, magnitude, distance);
    magnitude = magnitude > other ? magnitude : other;
  }
  return magnitude;
}

DYHEAD_DEVICE void add_float(float* p, float value) { red_add(p, value); }
DYHEAD_DEVICE void add_float(double* p, double value) { atomicAdd(p, value); }

// What threads do with the parts of grad_source that they found.
template <class F>
class ScatteredSums {
 public:
  DYHEAD_DEVICE explicit ScatteredSums(const DeformBwdInputParams& p) : p_(p) {
    if (p.scatter == Scatter::kFixed) fixed_ = FixedPoint<F>::of(p.largest, p.sum_bits);
  }

  // `sum`: index in grad_source.
  DYHEAD_DEVICE void add(int64_t sum, F value) {
    if (p_.scatter == Scatter::kSum) {
      add_float(static_cast<F*>(p_.sums) + sum, value);
    } else if (!is_finite(value)) {
      if (p_.scatter == Scatter::kFixed) NonFiniteMarks::add(p_.largest, sum, value);
    } else if (p_.scatter == Scatter::kMeasure) {
      largest_ = largest_ > fabs(value) ? largest_ : fabs(value);
    } else {
      constexpr int kWords = FixedPoint<F>::kWords;
      fixed_.add(static_cast<unsigned long long*>(p_.sums) + sum * kWords, value);
    }
  }

  // Publishes the largest finite magnitude that the threads of a warp measured.
  DYHEAD_DEVICE void finish() const {
    if (p_.scatter != Scatter::kMeasure) return;
    const F largest = warp_largest(largest_);
    if (static_cast<int>(threadIdx.x) % kWarpSize == 0) raise_to(p_.largest, largest);
  }

 private:
  const DeformBwdInputParams& p_;
  FixedPoint<F> fixed_{};
  F largest_ = F(0);
};

}  // namespace dyhead::cuda
