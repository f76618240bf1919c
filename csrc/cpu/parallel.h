// Work split that does not depend on the number of threads, so that results do not either.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#if defined(DYHEAD_SANITIZE_THREAD)
#include <thread>
#include <vector>
#elif defined(DYHEAD_RECORD_TASKS)
#include "task_record.h"
#endif

#include "../host/interface.h"

namespace dyhead::cpu {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Calls f(i, scratch) for every i in [0, count), in order of i but on whichever of torch's threads
// is free; each thread makes its own scratch once.
template <class MakeScratch, class F>
void parallel_tasks(int64_t count, MakeScratch&& make_scratch, F&& f) {
  if (count == 0) return;
#if defined(DYHEAD_RECORD_TASKS)
  TaskRecord record;
  auto scratch = make_scratch();
  record.lap();
  for (int64_t i = 0; i < count; ++i) {
    f(i, scratch);
    record.lap();
  }
#else
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    auto scratch = make_scratch();
    for (int64_t i = next++; i < count; i = next++) f(i, scratch);
  };
#if defined(DYHEAD_SANITIZE_THREAD)
  // ThreadSanitizer knows how these wait for each other; torch's OpenMP it does not.
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < std::min<int64_t>(count, 4); ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
#else
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(); });
#endif
#endif
}

template <class F>
void parallel_for_each(int64_t count, F&& f) {
  parallel_tasks(count, [] { return 0; }, [&](int64_t i, int) { f(i); });
}

}  // namespace dyhead::cpu
