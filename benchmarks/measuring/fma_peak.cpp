// What the units of this processor multiply at most: fused multiply-adds on registers.
//
//   fma_peak float32|float64|bfloat16 THREADS MILLISECONDS
//
// prints TFLOP/s: the best of many short runs of each thread, added up. Nothing is loaded or
// stored, and there are enough independent sums to fill every unit for its whole latency.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kSums = 12;  // two units of latency 4 or 5 need 10; 16 registers hold 12 and a factor
constexpr int kRounds = 20000;

using Clock = std::chrono::steady_clock;

template <class T>
struct Fma {
  typedef T Vector __attribute__((vector_size(kBytes)));
  static constexpr double kFlop = 2.0 * kBytes / sizeof(T);
  static void add(Vector& sum, const Vector& a) { sum = sum * a + a; }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16, added in float32.
struct FmaOfPairs {
  using Vector = __m512bh;
  static constexpr double kFlop = 2.0 * 32;
  static void add(__m512& sum, const Vector& a) { sum = _mm512_dpbf16_ps(sum, a, a); }
};
#endif

template <class F, class Sum = typename F::Vector>
double once() {
  typename F::Vector factor = {};
  asm volatile("" : "+m"(factor));
  Sum sums[kSums] = {};
  const auto begin = Clock::now();
  for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) F::add(sums[i], factor);
  }
  const std::chrono::duration<double> seconds = Clock::now() - begin;
  for (auto& sum : sums) asm volatile("" : : "m"(sum));  // used, as far as the compiler knows
  return F::kFlop * kSums * kRounds / seconds.count();
}

#if defined(HAS_TILES)
bool may_use_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Pairs of bfloat16 on matrix registers of 16 rows of 64 bytes.
double once_on_tiles() {
  struct alignas(64) {
    unsigned char palette = 1, start_row = 0, reserved[14] = {};
    unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  _tile_loadconfig(&shapes);
  const auto begin = Clock::now();
  for (int round = 0; round < kRounds; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  const std::chrono::duration<double> seconds = Clock::now() - begin;
  _tile_release();
  return 2.0 * 16 * 16 * 32 * 4 * kRounds / seconds.count();
}
#endif

double best(double (*once)(), int threads, double milliseconds) {
  std::vector<double> rates(threads, 0.0);
  std::vector<std::thread> running;
  const auto end = Clock::now() + std::chrono::duration<double, std::milli>(milliseconds);
  for (int t = 0; t < threads; ++t) {
    running.emplace_back([&rates, t, end, once] {
      while (Clock::now() < end) rates[t] = std::max(rates[t], once());
    });
  }
  double sum = 0;
  for (int t = 0; t < threads; ++t) {
    running[t].join();
    sum += rates[t];
  }
  return sum / 1e12;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return std::fprintf(stderr, "usage: fma_peak TYPE THREADS MILLISECONDS\n"), 2;
  const int threads = std::atoi(argv[2]);
  const double milliseconds = std::atof(argv[3]);
  if (!std::strcmp(argv[1], "float32")) {
    std::printf("%.6f\n", best(once<Fma<float>>, threads, milliseconds));
  } else if (!std::strcmp(argv[1], "float64")) {
    std::printf("%.6f\n", best(once<Fma<double>>, threads, milliseconds));
#if defined(HAS_TILES)
  } else if (!std::strcmp(argv[1], "bfloat16") && may_use_tiles()) {
    std::printf("%.6f\n", best(once_on_tiles, threads, milliseconds));
#endif
#if defined(__AVX512BF16__)
  } else if (!std::strcmp(argv[1], "bfloat16")) {
    std::printf("%.6f\n", best(once<FmaOfPairs, __m512>, threads, milliseconds));
#endif
  } else {
    return std::fprintf(stderr, "no multiply-add of %s here\n", argv[1]), 3;  // as fma.py expects
  }
}
