// Faults that a sanitizer must find, and the same without a fault. Called by tests/sanitizers.
#include "cpu/parallel.h"

namespace {

// The sum of values[0] to values[count - 1], by several threads.
double sum_of(const float* values, int64_t count) {
  std::atomic<int64_t> sum{0};
  dyhead::cpu::parallel_for_each(count,
                                 [&](int64_t i) { sum += static_cast<int64_t>(values[i] * 1024); });
  return static_cast<double>(sum) / 1024;
}

}  // namespace

extern "C" double sound(const float* values, int64_t count) { return sum_of(values, count); }

extern "C" double overrun(const float* values, int64_t count) { return sum_of(values, count + 1); }

extern "C" double race(const float* values, int64_t count) {
  double sum = 0;  // of so many tasks that no thread is done before the next one starts
  dyhead::cpu::parallel_for_each(20000 * count, [&](int64_t i) { sum += values[i % count]; });
  return sum;
}

extern "C" double undefined(const float*, int64_t count) {
  return 1 << static_cast<int32_t>(count);
}
