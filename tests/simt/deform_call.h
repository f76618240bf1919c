// What the bindings of deform_conv's kernels share: the operator's call, and workspaces.
#pragma once

#include <algorithm>
#include <deque>
#include <vector>

#include "common/deform_conv.h"
#include "device_array.h"
#include "host/tables.h"

namespace dyhead::simt {

using Numbers = std::vector<int64_t>;

// The call as the operator reads them, without its checks.
inline DeformCall read_call(const Numbers& geometry, const Numbers& sources, const Numbers& terms,
                            const Numbers& jobs, bool mask_logits, DType dtype, int64_t channels,
                            int64_t out_channels, int64_t weights) {
  DeformCall t{};
  const auto small = [](int64_t value) { return static_cast<int32_t>(value); };
  const auto shape = [&](size_t field) { return small(geometry.at(field)); };
  t.shape = {geometry.at(geometry_field::images),
             channels,
             out_channels,
             shape(geometry_field::groups),
             shape(geometry_field::deform_groups),
             shape(geometry_field::kernel_h),
             shape(geometry_field::kernel_w),
             shape(geometry_field::pad_h),
             shape(geometry_field::pad_w),
             shape(geometry_field::dilation_h),
             shape(geometry_field::dilation_w),
             mask_logits,
             dtype};
  t.weights = weights;
  const auto map_at = [&](const Numbers& n, size_t i) {
    return MapShape{n.at(i + map_field::first_row), small(n.at(i + map_field::height)),
                    small(n.at(i + map_field::width))};
  };
  for (size_t i = 0; i < sources.size(); i += map_field::kFieldCount) {
    t.sources.push_back(map_at(sources, i));
    t.source_rows += t.shape.images * t.sources.back().pixels();
  }
  for (size_t i = 0; i < terms.size(); i += term_field::kFieldCount) {
    t.terms.push_back(
        {small(terms.at(i + term_field::source)), small(terms.at(i + term_field::weight))});
  }
  for (size_t i = 0; i < jobs.size(); i += job_field::kFieldCount) {
    namespace field = job_field;
    t.jobs.push_back({map_at(jobs, i + field::out_first_row),
                      map_at(jobs, i + field::predictions_first_row),
                      static_cast<ReadRule>(jobs.at(i + field::offset_rule)),
                      static_cast<ReadRule>(jobs.at(i + field::mask_rule)),
                      small(jobs.at(i + field::stride_h)), small(jobs.at(i + field::stride_w)),
                      small(jobs.at(i + field::first_term)), small(jobs.at(i + field::terms)),
                      small(jobs.at(i + field::up_height)), small(jobs.at(i + field::up_width)),
                      static_cast<UpsampleMode>(jobs.at(i + field::up_mode))});
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
