// What the bindings of deform_conv's kernels share: the operator's call, and workspaces.
#pragma once

#include <algorithm>
#include <deque>
#include <string>
#include <tuple>
#include <vector>

#include "common/deform_conv.h"
#include "device_array.h"
#include "host/tables.h"

namespace dyhead::simt {

using Numbers = std::vector<int64_t>;

// The operator's integer arguments: images, the sizes of sources, predictions, outputs and
// upsampled outputs, then geometry, terms and jobs.
using Tables = std::tuple<int64_t, Numbers, Numbers, Numbers, Numbers, Numbers, Numbers, Numbers>;

// Maps of the given sizes, one after the other.
inline std::vector<MapShape> maps_of(const Numbers& sizes, int64_t images) {
  std::vector<MapShape> maps;
  int64_t row = 0;
  for (size_t i = 0; i < sizes.size(); i += size_field::kFieldCount) {
    maps.push_back({row, static_cast<int32_t>(sizes.at(i + size_field::height)),
                    static_cast<int32_t>(sizes.at(i + size_field::width))});
    row += images * maps.back().pixels();
  }
  return maps;
}

// The call as the operator reads it, without its checks.
inline DeformCall read_call(const Tables& tables, bool mask_logits, DType dtype, int64_t channels,
                            int64_t out_channels, int64_t weights) {
  const auto& [images, source_sizes, prediction_sizes, out_sizes, up_sizes, geometry, terms, jobs] =
      tables;
  DeformCall t{};
  const auto small = [](int64_t value) { return static_cast<int32_t>(value); };
  const Numbers& numbers = geometry;
  const auto shape = [&](size_t field) { return small(numbers.at(field)); };
  t.shape = {images,
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
  t.sources = maps_of(source_sizes, images);
  for (const MapShape& map : t.sources) t.source_rows += images * map.pixels();
  t.predictions = maps_of(prediction_sizes, images);
  for (const MapShape& map : t.predictions) t.prediction_rows += images * map.pixels();
  const std::vector<MapShape> outs = maps_of(out_sizes, images);
  for (const MapShape& map : outs) t.out_rows += images * map.pixels();
  for (size_t i = 0; i < terms.size(); i += term_field::kFieldCount) {
    t.terms.push_back(
        {small(terms.at(i + term_field::source)), small(terms.at(i + term_field::weight))});
  }
  for (size_t j = 0; j < outs.size(); ++j) {
    namespace field = job_field;
    const auto number = [&, &jobs = jobs](size_t f) { return jobs.at(j * field::kFieldCount + f); };
    const int64_t map = number(field::predictions);
    const auto up = [&, &sizes = up_sizes](size_t f) {
      return std::max(1, small(sizes.at(j * size_field::kFieldCount + f)));
    };
    t.jobs.push_back({outs[j], map < 0 ? MapShape{} : t.predictions.at(map),
                      static_cast<ReadRule>(number(field::offset_rule)),
                      static_cast<ReadRule>(number(field::mask_rule)),
                      small(number(field::stride_h)), small(number(field::stride_w)),
                      small(number(field::first_term)), small(number(field::terms)),
                      up(size_field::height), up(size_field::width),
                      static_cast<UpsampleMode>(number(field::up_mode))});
  }
  return t;
}

// Arrays of 16-bit or wider values by name of their type.
struct Matrices {
  std::deque<DeviceArray<uint8_t>> memory;
  DeformWeights weights;

  // Values travel as bytes: whether they are halves or floats, `dtype` says.
  Matrices(const std::vector<py::array>& matrices, const std::vector<py::array>& bias,
           DType dtype) {
    weights.dtype = dtype;
    for (const py::array& m : matrices) weights.matrices.push_back(add("weights", m));
    for (const py::array& b : bias) weights.bias.push_back(add("bias", b));
  }

  const void* add(const char* name, const py::array& values) {
    const auto flat = py::array::ensure(values.attr("ravel")().attr("view")("uint8"));
    memory.push_back(DeviceArray<uint8_t>::copy_of(name, flat));
    return memory.back().data();
  }
};

// What a backward starts from: the gradients of the outputs and, unless `grads` is None, of the
// three moments, then the outputs and their means.
inline void read_gradients(const py::array& grad_out, const py::object& grads, const py::array& out,
                           const py::array& mean, Matrices& memory, DeformBwdParams& params) {
  params.grad_out = memory.add("grad_out", grad_out);
  params.out = memory.add("out", out);
  params.mean = memory.add("mean", mean);
  params.moments = !grads.is_none();
  if (!params.moments) return;
  const auto moments = grads.cast<std::vector<py::array>>();
  params.grad_mean = memory.add("grad_mean", moments.at(0));
  params.grad_var = memory.add("grad_var", moments.at(1));
  params.grad_up_mean = memory.add("grad_up_mean", moments.at(2));
}

// Workspaces are poisoned, as fresh device memory is unknown.
class Workspaces {
 public:
  void* operator()(int64_t bytes) {
    const std::string name = "workspace " + std::to_string(memory_.size());
    memory_.push_back(DeviceArray<uint8_t>::poisoned(name.c_str(), {bytes}));
    return memory_.back().data();
  }

 private:
  std::deque<DeviceArray<uint8_t>> memory_;
};

}  // namespace dyhead::simt
