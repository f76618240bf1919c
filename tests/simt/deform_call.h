// What the bindings of deform_conv's kernels share: the operator's call, and workspaces.
#pragma once

#include <algorithm>
#include <deque>
#include <vector>

#include "common/deform_conv.h"
#include "device_array.h"

namespace dyhead::simt {

using Numbers = std::vector<int64_t>;

// The call as the operator reads them, without its checks.
inline DeformCall read_call(const Numbers& geometry, const Numbers& sources, const Numbers& terms,
                            const Numbers& jobs, bool mask_logits, DType dtype, int64_t channels,
                            int64_t out_channels, int64_t weights) {
  DeformCall t{};
  const auto small = [](int64_t value) { return static_cast<int32_t>(value); };
  t.shape = {geometry[0],
             channels,
             out_channels,
             small(geometry[1]),
             small(geometry[2]),
             small(geometry[3]),
             small(geometry[4]),
             small(geometry[5]),
             small(geometry[6]),
             small(geometry[7]),
             small(geometry[8]),
             mask_logits,
             dtype};
  t.weights = weights;
  const auto map_at = [&](const Numbers& n, size_t i) {
    return MapShape{n[i], small(n[i + 1]), small(n[i + 2])};
  };
  for (size_t i = 0; i < sources.size(); i += 3) {
    t.sources.push_back(map_at(sources, i));
    t.source_rows += t.shape.images * t.sources.back().pixels();
  }
  for (size_t i = 0; i < terms.size(); i += 2) {
    t.terms.push_back({small(terms[i]), small(terms[i + 1])});
  }
  for (size_t i = 0; i < jobs.size(); i += 14) {
    t.jobs.push_back({map_at(jobs, i), map_at(jobs, i + 3), static_cast<ReadRule>(jobs[i + 6]),
                      static_cast<ReadRule>(jobs[i + 7]), small(jobs[i + 8]), small(jobs[i + 9]),
                      small(jobs[i + 10]), small(jobs[i + 11]), small(jobs[i + 12]),
                      small(jobs[i + 13])});
    const DeformJob& job = t.jobs.back();
    t.out_rows += t.shape.images * job.out.pixels();
    const int64_t read = job.predictions.first_row + t.shape.images * job.predictions.pixels();
    t.prediction_rows = std::max(t.prediction_rows, read);
  }
  return t;
}

// Workspaces are poisoned, as fresh device memory is unknown.
class Workspaces {
 public:
  void* operator()(int64_t bytes) {
    memory_.push_back(DeviceArray<uint8_t>::poisoned("workspace", {bytes}));
    return memory_.back().data();
  }

 private:
  std::deque<DeviceArray<uint8_t>> memory_;
};

}  // namespace dyhead::simt
