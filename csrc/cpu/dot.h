// The inner product of two vectors, summed in a fixed order that compilers can vectorise.
#pragma once

#include <cstdint>

namespace dyhead::cpu {

template <class F>
F dot(const F* a, const F* b, int64_t count) {
  constexpr int kLanes = 16;
  F sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  F total = F(0);
  for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

}  // namespace dyhead::cpu
