#include "../common/deform_conv.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "device.h"
#include "maps.h"
#include "wanted.h"

namespace dyhead {
namespace {

constexpr int64_t kMaxStep = 1 << 20;  // strides, paddings and dilations: products fit

void check_rule(const DeformJob& job, ReadRule rule) {
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

// The shape that all jobs share; `geometry` has the fields of geometry_field.
DeformShape read_deform_shape(const Tensor& source, const Tensor& predictions,
                              const std::vector<Tensor>& weights, int64_t images,
                              const IntList& geometry, bool mask_logits) {
  STD_TORCH_CHECK(geometry.size() == geometry_field::kFieldCount, "expected a geometry of ",
                  static_cast<size_t>(geometry_field::kFieldCount), " integers, got ",
                  geometry.size());
  STD_TORCH_CHECK(!weights.empty(), "expected at least one matrix of weights, got none");
  STD_TORCH_CHECK(source.dim() == 2 && predictions.dim() == 2 && weights[0].dim() == 4,
                  "expected source [R, C], predictions [Q, 3 D K] and weights [C_out, C / groups, "
                  "kh, kw], got ",
                  shape_string(source), ", ", shape_string(predictions), " and ",
                  shape_string(weights[0]));
  namespace field = geometry_field;
  constexpr int64_t kMaxTaps = 1 << 10;  // along one side of a kernel
  const DeformShape s{read_images(images),
                      source.size(1),
                      weights[0].size(0),
                      narrow("groups", geometry[field::groups], 1),
                      narrow("deform_groups", geometry[field::deform_groups], 1),
                      narrow("kernel_h", geometry[field::kernel_h], 1, kMaxTaps),
                      narrow("kernel_w", geometry[field::kernel_w], 1, kMaxTaps),
                      narrow("pad_h", geometry[field::pad_h], 0, kMaxStep),
                      narrow("pad_w", geometry[field::pad_w], 0, kMaxStep),
                      narrow("dilation_h", geometry[field::dilation_h], 1, kMaxStep),
                      narrow("dilation_w", geometry[field::dilation_w], 1, kMaxStep),
                      mask_logits,
                      dtype_of(source)};
  STD_TORCH_CHECK(s.channels > 0 && s.out_channels > 0 && s.channels % s.groups == 0 &&
                      s.out_channels % s.groups == 0 && s.channels % s.deform_groups == 0,
                  "expected channels divisible by the groups, got ", s.channels, " and ",
                  s.out_channels, " channels with ", s.groups, " and ", s.deform_groups, " groups");
  return s;
}

std::vector<DeformTerm> read_terms(const IntList& terms, int64_t sources, int64_t weights) {
  STD_TORCH_CHECK(terms.size() % term_field::kFieldCount == 0, "expected terms of ",
                  static_cast<size_t>(term_field::kFieldCount), " n integers, got ", terms.size());
  std::vector<DeformTerm> read;
  for (size_t i = 0; i < terms.size(); i += term_field::kFieldCount) {
    const int64_t source = terms[i + term_field::source];
    const int64_t weight = terms[i + term_field::weight];
    STD_TORCH_CHECK(source >= 0 && source < sources && weight >= 0 && weight < weights,
                    "expected terms of ", sources, " sources and ", weights,
                    " weights, got source ", source, " and weight ", weight);
    read.push_back({static_cast<int32_t>(source), static_cast<int32_t>(weight)});
  }
  return read;
}

// The sizes of a call's maps: height and width of each. They and the number of images are all of a
// call that a compiler may see as symbols.
struct DeformSizes {
  int64_t images;
  const IntList& sources;
  const IntList& predictions;
  const IntList& outs;       // of each job
  const IntList& upsampled;  // of each job, after the upsampling that follows
};

// The job at jobs[at], which has the fields of job_field.
DeformJob read_job(const DeformCall& t, const IntList& jobs, size_t at, const MapShape& out,
                   const MapShape& upsampled, const std::vector<MapShape>& predictions) {
  namespace field = job_field;
  const DeformShape& s = t.shape;
  const auto number = [&](const char* name, size_t index, int64_t least, int64_t most) {
    return narrow(name, jobs[at + index], least, most);
  };
  constexpr int64_t kLastRule = static_cast<int64_t>(ReadRule::kNone);
  DeformJob job{};
  job.out = out;
  job.offset_rule = static_cast<ReadRule>(number("offset_rule", field::offset_rule, 0, kLastRule));
  job.mask_rule = static_cast<ReadRule>(number("mask_rule", field::mask_rule, 0, kLastRule));
  const int64_t map = jobs[at + field::predictions];
  STD_TORCH_CHECK(job.plain() ? map == -1 : map >= 0 && map < std::ssize(predictions),
                  "expected a prediction map out of ", predictions.size(),
                  ", and -1 for a plain convolution, got ", map);
  if (!job.plain()) job.predictions = predictions[map];
  job.stride_h = number("stride_h", field::stride_h, 1, kMaxStep);
  job.stride_w = number("stride_w", field::stride_w, 1, kMaxStep);
  job.first_term = number("first_term", field::first_term, 0, kMaxInt32);
  job.terms = number("terms", field::terms, 1, kMaxInt32);
  // Where nothing is, a mean is divided by 1.
  job.up_height = narrow("the height after upsampling", std::max(upsampled.height, 1), 1, kMaxStep);
  job.up_width = narrow("the width after upsampling", std::max(upsampled.width, 1), 1, kMaxStep);
  job.up_mode = read_upsample_mode(jobs[at + field::up_mode]);
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
  check_rule(job, job.offset_rule);
  check_rule(job, job.mask_rule);
  return job;
}

DeformCall read_deform_call(const Tensor& source, const Tensor& predictions,
                            const std::vector<Tensor>& weights, const DeformSizes& sizes,
                            const IntList& geometry, const IntList& terms, const IntList& jobs,
                            bool mask_logits) {
  DeformCall t{};
  t.shape = read_deform_shape(source, predictions, weights, sizes.images, geometry, mask_logits);
  t.source_rows = source.size(0);
  t.prediction_rows = predictions.size(0);
  t.weights = static_cast<int64_t>(weights.size());
  check_tensor("source", source, {t.source_rows, t.shape.channels}, source.scalar_type(), source);
  check_tensor("predictions", predictions, {t.prediction_rows, t.shape.prediction_columns()},
               compute_type_of(source), source);
  constexpr int64_t kMaxRows = std::numeric_limits<int64_t>::max() / 8;
  const int64_t images = t.shape.images;
  t.sources = read_all_maps("source", sizes.sources, images, t.source_rows);
  t.terms = read_terms(terms, std::ssize(t.sources), t.weights);
  const auto prediction_maps =
      read_all_maps("prediction", sizes.predictions, images, t.prediction_rows);
  const auto outs = read_maps("output", sizes.outs, images, kMaxRows / t.shape.out_channels);
  const auto upsampled = read_maps("upsampled", sizes.upsampled, 0, kMaxRows);
  STD_TORCH_CHECK(!jobs.empty() && jobs.size() % job_field::kFieldCount == 0, "expected jobs of ",
                  static_cast<size_t>(job_field::kFieldCount), " n integers, at least one, got ",
                  jobs.size());
  const size_t count = jobs.size() / job_field::kFieldCount;
  STD_TORCH_CHECK(outs.size() == count && upsampled.size() == count,
                  "expected the sizes of the outputs, and those after upsampling, of ", count,
                  " jobs, got ", outs.size(), " and ", upsampled.size());
  for (size_t j = 0; j < count; ++j) {
    t.jobs.push_back(
        read_job(t, jobs, j * job_field::kFieldCount, outs[j], upsampled[j], prediction_maps));
    t.out_rows += images * outs[j].pixels();
  }
  return t;
}

// Pointers to matrices and biases, after a check: all of one type, the compute type or, on CUDA,
// whose kernels read half-precision weights as they are, the source's.
DeformWeights read_deform_weights(const DeformShape& s, const std::vector<Tensor>& weights,
                                  const std::vector<Tensor>& bias, const Tensor& source) {
  const ScalarType type = kIsCuda && weights[0].scalar_type() == source.scalar_type()
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
const void* optional_data(const char* name, const std::optional<Tensor>& t,
                          std::initializer_list<int64_t> sizes, const Tensor& like) {
  if (!t.has_value()) return nullptr;
  check_tensor(name, *t, sizes, compute_type_of(like), like);
  return t->const_data_ptr();
}

// Returns out, mean, var and up_mean.
std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv_fwd(
    const Tensor& source, const Tensor& predictions, const std::vector<Tensor>& weights,
    const std::optional<std::vector<Tensor>>& bias, const std::optional<Tensor>& gates,
    int64_t images, const IntList& source_sizes, const IntList& prediction_sizes,
    const IntList& out_sizes, const IntList& up_sizes, const IntList& geometry,
    const IntList& terms, const IntList& jobs, bool mask_logits, bool out_in_compute_dtype,
    bool moments, bool allow_tf32) {
  Call call(source);
  const DeformCall deform = read_deform_call(
      source, predictions, weights, {images, source_sizes, prediction_sizes, out_sizes, up_sizes},
      geometry, terms, jobs, mask_logits);
  const DeformShape& s = deform.shape;
  const DeformWeights matrices =
      read_deform_weights(s, weights, bias.value_or(std::vector<Tensor>{}), source);
  const ScalarType compute = compute_type_of(source);
  const int64_t job_count = moments ? static_cast<int64_t>(deform.jobs.size()) : 0;
  const auto statistics = [&] {
    return torch::stable::new_empty(source, {job_count, s.images, s.out_channels}, compute);
  };
  STD_TORCH_CHECK(!(out_in_compute_dtype && moments),
                  "expected moments of an output of the source's type");
  const Tensor out =
      torch::stable::new_empty(source, {deform.out_rows, s.out_channels},
                               out_in_compute_dtype ? compute : source.scalar_type());
  const Tensor mean = statistics();
  const Tensor var = statistics();
  const Tensor up_mean = statistics();
  DeformFwdParams params{};
  params.call = &deform;
  params.weights = &matrices;
  params.source = source.const_data_ptr();
  params.predictions = predictions.const_data_ptr();
  params.gates = optional_data("gates", gates,
                               {s.images, static_cast<int64_t>(deform.sources.size())}, source);
  params.out = out.mutable_data_ptr();
  params.out_in_compute_dtype = out_in_compute_dtype;
  params.moments = moments;
  params.mean = mean.mutable_data_ptr();
  params.var = var.mutable_data_ptr();
  params.up_mean = up_mean.mutable_data_ptr();
  params.allow_tf32 = allow_tf32;
  run_deform_conv_fwd(params, call);
  return {out, mean, var, up_mean};
}

// Returns the gradients of source, predictions, weights, bias and gates, as far as wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv_bwd(
    const Tensor& grad_out, const std::optional<Tensor>& grad_mean,
    const std::optional<Tensor>& grad_var, const std::optional<Tensor>& grad_up_mean,
    const Tensor& source, const Tensor& predictions, const std::vector<Tensor>& weights,
    const std::optional<Tensor>& gates, const Tensor& out, const Tensor& mean, int64_t images,
    const IntList& source_sizes, const IntList& prediction_sizes, const IntList& out_sizes,
    const IntList& up_sizes, const IntList& geometry, const IntList& terms, const IntList& jobs,
    bool mask_logits, bool out_in_compute_dtype, const IntList& wanted_results, bool allow_tf32,
    bool deterministic) {
  Call call(source);
  const DeformCall deform = read_deform_call(
      source, predictions, weights, {images, source_sizes, prediction_sizes, out_sizes, up_sizes},
      geometry, terms, jobs, mask_logits);
  const DeformShape& s = deform.shape;
  const DeformWeights matrices = read_deform_weights(s, weights, {}, source);
  const ScalarType compute = compute_type_of(source);
  const int64_t job_count = static_cast<int64_t>(deform.jobs.size());
  const int64_t source_count = static_cast<int64_t>(deform.sources.size());
  const ScalarType out_type = out_in_compute_dtype ? compute : source.scalar_type();
  check_tensor("grad_out", grad_out, {deform.out_rows, s.out_channels}, out_type, source);
  check_tensor("out", out, {deform.out_rows, s.out_channels}, out_type, source);
  const bool moments = grad_mean.has_value();
  STD_TORCH_CHECK(moments == grad_var.has_value() && moments == grad_up_mean.has_value(),
                  "expected the gradients of all three moments, or of none");
  if (moments) {
    check_tensor("mean", mean, {job_count, s.images, s.out_channels}, compute, source);
  }
  Wanted wanted(wanted_results, 5);
  STD_TORCH_CHECK(gates.has_value() || !wanted[4],
                  "expected gates, as their gradient is wanted, got none");
  DeformBwdParams params{};
  const Tensor grad_source = wanted.allocate(0, false, source, {deform.source_rows, s.channels},
                                             source.scalar_type(), params.grad_source);
  const Tensor grad_predictions =
      wanted.allocate(1, false, source, {deform.prediction_rows, s.prediction_columns()}, compute,
                      params.grad_predictions);
  const Tensor grad_weights = wanted.allocate(
      2, false, source,
      {deform.weights, s.out_channels, s.channels / s.groups, s.kernel_h, s.kernel_w}, compute,
      params.grad_weights);
  const Tensor grad_bias = wanted.allocate(3, false, source, {deform.weights, s.out_channels},
                                           compute, params.grad_bias);
  const Tensor grad_gates =
      wanted.allocate(4, false, source, {s.images, source_count}, compute, params.grad_gates);
  params.call = &deform;
  params.weights = &matrices;
  params.source = source.const_data_ptr();
  params.predictions = predictions.const_data_ptr();
  params.gates = optional_data("gates", gates, {s.images, source_count}, source);
  params.grad_out = grad_out.const_data_ptr();
  params.out = out.const_data_ptr();
  params.out_in_compute_dtype = out_in_compute_dtype;
  params.moments = moments;
  params.mean = moments ? mean.const_data_ptr() : nullptr;
  const auto statistics = {job_count, s.images, s.out_channels};
  params.grad_mean = optional_data("grad_mean", grad_mean, statistics, source);
  params.grad_var = optional_data("grad_var", grad_var, statistics, source);
  params.grad_up_mean = optional_data("grad_up_mean", grad_up_mean, statistics, source);
  params.deterministic = deterministic;
  params.allow_tf32 = allow_tf32;
  run_deform_conv_bwd(params, call);
  return {grad_source, grad_predictions, grad_weights, grad_bias, grad_gates};
}

}  // namespace
}  // namespace dyhead

DYHEAD_SCHEMAS(m) {
  // Any list of deformable jobs (csrc/common/deform_jobs.h). Returns the output rows and, where
  // `moments` is set, mean, biased variance and upsampled mean per job, image and channel. The rows
  // have the source's type, or the compute type where `out_in_compute_dtype` is set.
  m.def(
      "deform_conv_fwd(Tensor source, Tensor predictions, Tensor[] weights, Tensor[]? bias, "
      "Tensor? gates, SymInt images, SymInt[] source_sizes, SymInt[] prediction_sizes, "
      "SymInt[] out_sizes, SymInt[] up_sizes, int[] geometry, int[] terms, int[] jobs, "
      "bool mask_logits, bool out_in_compute_dtype, bool moments, bool allow_tf32) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
  // Returns the gradients of source, predictions, weights, bias and gates; those of weights and
  // bias are stacked and of the compute type. `wanted` has 1 or 0 for each (csrc/host/wanted.h).
  m.def(
      "deform_conv_bwd(Tensor grad_out, Tensor? grad_mean, Tensor? grad_var, "
      "Tensor? grad_up_mean, Tensor source, Tensor predictions, Tensor[] weights, Tensor? gates, "
      "Tensor out, Tensor mean, SymInt images, SymInt[] source_sizes, "
      "SymInt[] prediction_sizes, SymInt[] out_sizes, SymInt[] up_sizes, int[] geometry, "
      "int[] terms, int[] jobs, bool mask_logits, bool out_in_compute_dtype, int[] wanted, "
      "bool allow_tf32, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

DYHEAD_REGISTER(m) {
  m.impl("deform_conv_fwd", TORCH_BOX(&dyhead::deform_conv_fwd));
  m.impl("deform_conv_bwd", TORCH_BOX(&dyhead::deform_conv_bwd));
}
