// Reads the job tables of deform_conv from lists of integers, checks every index in them, and
// allocates results; what both libraries do alike.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/deform_conv.h"
#include "maps.h"

namespace dyhead {

// The tables as dyhead_cuda/ops/deform_conv.py writes them:
//   geometry  images, groups, deform_groups, kernel_h, kernel_w, pad_h, pad_w, dilation_h,
//             dilation_w
//   sources   first_row, height, width of each source map
//   terms     source, weight of each term
//   jobs      first_row, height, width of the output map; the same of the prediction map;
//             offset_rule, mask_rule, stride_h, stride_w, first_term, terms, up_height, up_width

namespace detail {

inline void check_rule(const DeformJob& job, ReadRule rule) {
  const MapShape& out = job.out;
  const MapShape& from = job.predictions;
  bool fits = false;
  switch (rule) {
    case ReadRule::kSame:
      fits = out.height == from.height && out.width == from.width;
      break;
    case ReadRule::kCrop:
      fits = out.height <= from.height && out.width <= from.width;
      break;
    case ReadRule::kFlat:
      fits = out.pixels() <= from.pixels();
      break;
    case ReadRule::kNone:
      fits = job.offset_rule == job.mask_rule;
      break;
  }
  STD_TORCH_CHECK(fits, "expected predictions that a map of ", out.height, "x", out.width,
                  " can read by rule ", static_cast<int>(rule), ", got ", from.height, "x",
                  from.width);
}

// Jobs either share a prediction map or read others: the gradients of a map are one task's.
inline void check_disjoint_predictions(const DeformCall& t) {
  std::vector<MapShape> maps;
  for (const DeformJob& job : t.jobs) {
    if (job.predictions.pixels() > 0) maps.push_back(job.predictions);
  }
  std::sort(maps.begin(), maps.end(),
            [](const MapShape& a, const MapShape& b) { return a.first_row < b.first_row; });
  for (size_t i = 1; i < maps.size(); ++i) {
    const MapShape& a = maps[i - 1];
    const MapShape& b = maps[i];
    const bool same = a.first_row == b.first_row && a.height == b.height && a.width == b.width;
    STD_TORCH_CHECK(same || a.first_row + t.shape.images * a.pixels() <= b.first_row,
                    "expected prediction maps that are equal or apart, got maps from rows ",
                    a.first_row, " and ", b.first_row);
  }
}

}  // namespace detail

inline DeformCall read_deform_tables(const Tensor& source, const Tensor& predictions,
                                     const std::vector<Tensor>& weights, const IntList& geometry,
                                     const IntList& sources, const IntList& terms,
                                     const IntList& jobs, bool mask_logits) {
  constexpr size_t kJobFields = 14;
  STD_TORCH_CHECK(geometry.size() == 9 && sources.size() % 3 == 0 && terms.size() % 2 == 0 &&
                      !jobs.empty() && jobs.size() % kJobFields == 0,
                  "expected tables of 9, 3 n, 2 n and 14 n integers, got ", geometry.size(), ", ",
                  sources.size(), ", ", terms.size(), " and ", jobs.size());
  STD_TORCH_CHECK(!weights.empty(), "expected at least one matrix of weights, got none");
  STD_TORCH_CHECK(source.dim() == 2 && predictions.dim() == 2 && weights[0].dim() == 4,
                  "expected source [R, C], predictions [Q, 3 D K] and weights [C_out, C / groups, "
                  "kh, kw], got ",
                  shape_string(source), ", ", shape_string(predictions), " and ",
                  shape_string(weights[0]));
  constexpr int64_t kMaxStep = 1 << 20;  // strides, paddings and dilations: products fit
  DeformCall t{};
  const int64_t images = narrow("images", geometry[0], 0);
  t.shape = {images,
             source.size(1),
             weights[0].size(0),
             narrow("groups", geometry[1], 1),
             narrow("deform_groups", geometry[2], 1),
             narrow("kernel_h", geometry[3], 1, 1 << 10),
             narrow("kernel_w", geometry[4], 1, 1 << 10),
             narrow("pad_h", geometry[5], 0, kMaxStep),
             narrow("pad_w", geometry[6], 0, kMaxStep),
             narrow("dilation_h", geometry[7], 1, kMaxStep),
             narrow("dilation_w", geometry[8], 1, kMaxStep),
             mask_logits,
             dtype_of(source)};
  const DeformShape& s = t.shape;
  STD_TORCH_CHECK(s.channels > 0 && s.out_channels > 0 && s.channels % s.groups == 0 &&
                      s.out_channels % s.groups == 0 && s.channels % s.deform_groups == 0,
                  "expected channels divisible by the groups, got ", s.channels, " and ",
                  s.out_channels, " channels with ", s.groups, " and ", s.deform_groups, " groups");
  t.source_rows = source.size(0);
  t.prediction_rows = predictions.size(0);
  t.weights = static_cast<int64_t>(weights.size());
  const ScalarType compute = compute_type_of(source);
  check_tensor("source", source, {t.source_rows, s.channels}, source.scalar_type(), source);
  check_tensor("predictions", predictions, {t.prediction_rows, s.prediction_columns()}, compute,
               source);
  int64_t covered = 0;
  for (size_t i = 0; i < sources.size(); i += 3) {
    // Without gaps and overlaps, so that every row gets its gradient from one map.
    const MapShape map = read_next_map(sources, i, images, covered, t.source_rows, "source");
    covered += images * map.pixels();
    t.sources.push_back(map);
  }
  STD_TORCH_CHECK(covered == t.source_rows, "expected source maps that cover all ", t.source_rows,
                  " rows, got ", covered);
  for (size_t i = 0; i < terms.size(); i += 2) {
    STD_TORCH_CHECK(terms[i] >= 0 && terms[i] < static_cast<int64_t>(t.sources.size()) &&
                        terms[i + 1] >= 0 && terms[i + 1] < t.weights,
                    "expected terms of ", t.sources.size(), " sources and ", t.weights,
                    " weights, got source ", terms[i], " and weight ", terms[i + 1]);
    t.terms.push_back({static_cast<int32_t>(terms[i]), static_cast<int32_t>(terms[i + 1])});
  }
  const int64_t max_rows = std::numeric_limits<int64_t>::max() / 8 / s.out_channels;
  for (size_t i = 0; i < jobs.size(); i += kJobFields) {
    DeformJob job{};
    job.out = read_next_map(jobs, i, images, t.out_rows, max_rows, "output");
    t.out_rows += images * job.out.pixels();
    job.predictions = read_map(jobs, i + 3, images, t.prediction_rows, "prediction");
    job.offset_rule = static_cast<ReadRule>(narrow("offset_rule", jobs[i + 6], 0, 3));
    job.mask_rule = static_cast<ReadRule>(narrow("mask_rule", jobs[i + 7], 0, 3));
    job.stride_h = narrow("stride_h", jobs[i + 8], 1, kMaxStep);
    job.stride_w = narrow("stride_w", jobs[i + 9], 1, kMaxStep);
    job.first_term = narrow("first_term", jobs[i + 10], 0);
    job.terms = narrow("terms", jobs[i + 11], 1);
    job.up_height = narrow("up_height", jobs[i + 12], 1, kMaxStep);
    job.up_width = narrow("up_width", jobs[i + 13], 1, kMaxStep);
    STD_TORCH_CHECK(
        static_cast<int64_t>(job.first_term) + job.terms <= static_cast<int64_t>(t.terms.size()),
        "expected terms within the list of ", t.terms.size(), ", got ", job.terms, " from ",
        job.first_term);
    const auto last = [](int32_t size, int32_t stride, int32_t kernel, int32_t dilation) {
      return static_cast<int64_t>(size) * stride + static_cast<int64_t>(kernel) * dilation;
    };
    STD_TORCH_CHECK(last(job.out.height, job.stride_h, s.kernel_h, s.dilation_h) <= kMaxInt32 &&
                        last(job.out.width, job.stride_w, s.kernel_w, s.dilation_w) <= kMaxInt32,
                    "expected taps whose positions fit 32 bits, got an output of ", job.out.height,
                    "x", job.out.width, " with strides ", job.stride_h, " and ", job.stride_w);
    detail::check_rule(job, job.offset_rule);
    detail::check_rule(job, job.mask_rule);
    t.jobs.push_back(job);
  }
  detail::check_disjoint_predictions(t);
  return t;
}

// Pointers to matrices and biases, after a check: all of one type, the compute type or, where the
// kernels take `half_weights`, the source's.
inline DeformWeights read_deform_weights(const DeformShape& s, const std::vector<Tensor>& weights,
                                         const std::vector<Tensor>& bias, bool half_weights,
                                         const Tensor& source) {
  const ScalarType type = half_weights && weights[0].scalar_type() == source.scalar_type()
                              ? source.scalar_type()
                              : compute_type_of(source);
  STD_TORCH_CHECK(bias.empty() || bias.size() == weights.size(), "expected no bias or ",
                  weights.size(), ", got ", bias.size());
  DeformWeights read{{}, {}, dtype_of(weights[0])};
  for (const Tensor& matrix : weights) {
    check_tensor("weights", matrix, {s.out_channels, s.channels / s.groups, s.kernel_h, s.kernel_w},
                 type, source);
    read.matrices.push_back(matrix.const_data_ptr());
  }
  for (const Tensor& one : bias) {
    check_tensor("bias", one, {s.out_channels}, type, source);
    read.bias.push_back(one.const_data_ptr());
  }
  return read;
}

// null for an absent tensor, else its data after a check of its shape.
inline const void* optional_data(const char* name, const std::optional<Tensor>& t,
                                 std::initializer_list<int64_t> sizes, const Tensor& like) {
  if (!t.has_value()) return nullptr;
  check_tensor(name, *t, sizes, compute_type_of(like), like);
  return t->const_data_ptr();
}

// Checks, allocates and calls run(const DeformFwdParams&). Returns out, mean, var and up_mean.
template <class Run>
std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv_fwd_with(
    Run&& run, bool half_weights, const Tensor& source, const Tensor& predictions,
    const std::vector<Tensor>& weights, const std::vector<Tensor>& bias,
    const std::optional<Tensor>& gates, const IntList& geometry, const IntList& sources,
    const IntList& terms, const IntList& jobs, bool mask_logits, bool wide_out, bool moments) {
  const DeformCall tables =
      read_deform_tables(source, predictions, weights, geometry, sources, terms, jobs, mask_logits);
  const DeformShape& s = tables.shape;
  const DeformWeights matrices = read_deform_weights(s, weights, bias, half_weights, source);
  const ScalarType compute = compute_type_of(source);
  const int64_t job_count = moments ? static_cast<int64_t>(tables.jobs.size()) : 0;
  const auto statistics = [&] {
    return torch::stable::new_empty(source, {job_count, s.images, s.out_channels}, compute);
  };
  STD_TORCH_CHECK(!(wide_out && moments), "expected moments of an output of the source's type");
  const Tensor out = torch::stable::new_empty(source, {tables.out_rows, s.out_channels},
                                              wide_out ? compute : source.scalar_type());
  const Tensor mean = statistics();
  const Tensor var = statistics();
  const Tensor up_mean = statistics();
  DeformFwdParams params{};
  params.call = &tables;
  params.weights = &matrices;
  params.source = source.const_data_ptr();
  params.predictions = predictions.const_data_ptr();
  params.gates = optional_data("gates", gates,
                               {s.images, static_cast<int64_t>(tables.sources.size())}, source);
  params.out = out.mutable_data_ptr();
  params.out_in_compute_dtype = wide_out;
  params.moments = moments;
  params.mean = mean.mutable_data_ptr();
  params.var = var.mutable_data_ptr();
  params.up_mean = up_mean.mutable_data_ptr();
  run(params);
  return {out, mean, var, up_mean};
}

// The same, of DeformBwdParams. Returns the gradients of source, predictions, weights, bias and
// gates.
template <class Run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv_bwd_with(
    Run&& run, bool half_weights, const Tensor& grad_out, const std::optional<Tensor>& grad_mean,
    const std::optional<Tensor>& grad_var, const std::optional<Tensor>& grad_up_mean,
    const Tensor& source, const Tensor& predictions, const std::vector<Tensor>& weights,
    const std::optional<Tensor>& gates, const Tensor& out, const Tensor& mean,
    const IntList& geometry, const IntList& sources, const IntList& terms, const IntList& jobs,
    bool mask_logits, bool wide_out, bool with_bias, bool deterministic) {
  const DeformCall tables =
      read_deform_tables(source, predictions, weights, geometry, sources, terms, jobs, mask_logits);
  const DeformShape& s = tables.shape;
  const DeformWeights matrices = read_deform_weights(s, weights, {}, half_weights, source);
  const ScalarType compute = compute_type_of(source);
  const int64_t job_count = static_cast<int64_t>(tables.jobs.size());
  const int64_t source_count = static_cast<int64_t>(tables.sources.size());
  const ScalarType out_type = wide_out ? compute : source.scalar_type();
  check_tensor("grad_out", grad_out, {tables.out_rows, s.out_channels}, out_type, source);
  check_tensor("out", out, {tables.out_rows, s.out_channels}, out_type, source);
  const bool moments = grad_mean.has_value();
  STD_TORCH_CHECK(moments == grad_var.has_value() && moments == grad_up_mean.has_value(),
                  "expected the gradients of all three moments, or of none");
  if (moments) {
    check_tensor("mean", mean, {job_count, s.images, s.out_channels}, compute, source);
  }
  const Tensor grad_source = torch::stable::empty_like(source);
  const Tensor grad_predictions = torch::stable::empty_like(predictions);
  const Tensor grad_weights = torch::stable::new_empty(
      source, {tables.weights, s.out_channels, s.channels / s.groups, s.kernel_h, s.kernel_w},
      compute);
  const Tensor grad_bias =
      torch::stable::new_empty(source, {with_bias ? tables.weights : 0, s.out_channels}, compute);
  const Tensor grad_gates =
      torch::stable::new_empty(source, {gates.has_value() ? s.images : 0, source_count}, compute);
  DeformBwdParams params{};
  params.call = &tables;
  params.weights = &matrices;
  params.source = source.const_data_ptr();
  params.predictions = predictions.const_data_ptr();
  params.gates = optional_data("gates", gates, {s.images, source_count}, source);
  params.grad_out = grad_out.const_data_ptr();
  params.out = out.const_data_ptr();
  params.out_in_compute_dtype = wide_out;
  params.moments = moments;
  params.mean = moments ? mean.const_data_ptr() : nullptr;
  const auto statistics = {job_count, s.images, s.out_channels};
  params.grad_mean = optional_data("grad_mean", grad_mean, statistics, source);
  params.grad_var = optional_data("grad_var", grad_var, statistics, source);
  params.grad_up_mean = optional_data("grad_up_mean", grad_up_mean, statistics, source);
  params.deterministic = deterministic;
  params.grad_source = grad_source.mutable_data_ptr();
  params.grad_predictions = grad_predictions.mutable_data_ptr();
  params.grad_weights = grad_weights.mutable_data_ptr();
  params.grad_bias = with_bias ? grad_bias.mutable_data_ptr() : nullptr;
  params.grad_gates = gates.has_value() ? grad_gates.mutable_data_ptr() : nullptr;
  run(params);
  return {grad_source, grad_predictions, grad_weights, grad_bias, grad_gates};
}

}  // namespace dyhead
