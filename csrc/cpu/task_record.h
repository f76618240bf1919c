// How long each task takes, one line for each list of tasks, for builds that record it: see
// benchmarks/measuring/threads.py.
#pragma once

#include <time.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace dyhead::cpu {

// One list of tasks that one thread works off. Its end appends to the file that DYHEAD_TASK_RECORD
// names, in nanoseconds that the process had a processor: when it began and ended, how long its
// scratch took, and how long each task.
class TaskRecord {
 public:
  // To be called after the scratch was made, and after each task.
  void lap() {
    const int64_t at = now();
    laps_.push_back(at - last_);
    last_ = at;
  }

  ~TaskRecord() {
    const char* path = std::getenv("DYHEAD_TASK_RECORD");
    std::FILE* file = path == nullptr ? nullptr : std::fopen(path, "a");
    if (file == nullptr) return;
    std::fprintf(file, "%lld %lld", static_cast<long long>(begin_), static_cast<long long>(last_));
    for (const int64_t lap : laps_) std::fprintf(file, " %lld", static_cast<long long>(lap));
    std::fprintf(file, "\n");
    std::fclose(file);
  }

 private:
  static int64_t now() {
    timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return time.tv_sec * int64_t{1000000000} + time.tv_nsec;
  }

  const int64_t begin_ = now();
  int64_t last_ = begin_;
  std::vector<int64_t> laps_;
};

}  // namespace dyhead::cpu
