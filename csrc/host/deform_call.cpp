#include "deform_call.h"

#include <algorithm>

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

// The shape that all jobs share.
DeformShape read_deform_shape(const Tensor& source, const std::vector<Tensor>& weights,
                              const DeformTables& tables) {
  const IntList& geometry = tables.geometry;
  STD_TORCH_CHECK(geometry.size() == geometry_field::kFieldCount, "expected a geometry of ",
                  static_cast<size_t>(geometry_field::kFieldCount), " integers, got ",
                  geometry.size());
  STD_TORCH_CHECK(!weights.empty(), "expected at least one matrix of weights, got none");
  STD_TORCH_CHECK(source.dim() == 2 && weights[0].dim() == 4,
                  "expected source [R, C] and weights [C_out, C / groups, kh, kw], got ",
                  shape_string(source), " and ", shape_string(weights[0]));
  namespace field = geometry_field;
  constexpr int64_t kMaxTaps = 1 << 10;  // along one side of a kernel
  const DeformShape s{read_images(tables.images),
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
                      tables.mask_logits,
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

// The job at jobs[at], which has the fields of job_field.
DeformJob read_job(const DeformCall& t, const IntList& jobs, size_t at, const MapShape& out,
                   const MapShape& upsampled) {
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
  STD_TORCH_CHECK(job.plain() ? map == -1 : map >= 0 && map < std::ssize(t.predictions),
                  "expected a prediction map out of ", t.predictions.size(),
                  ", and -1 for a plain convolution, got ", map);
  if (!job.plain()) job.predictions = t.predictions[map];
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

// Predictions that are still to be made have at most the rows of the source.
void read_predictions(DeformCall& t, const Tensor* predictions, const Tensor& source,
                      const IntList& sizes) {
  const int64_t images = t.shape.images;
  if (predictions == nullptr) {
    t.predictions = read_maps("prediction", sizes, images, t.source_rows);
    for (const MapShape& map : t.predictions) t.prediction_rows += images * map.pixels();
    return;
  }
  STD_TORCH_CHECK(predictions->dim() == 2, "expected predictions [Q, 3 D K], got ",
                  shape_string(*predictions));
  t.prediction_rows = predictions->size(0);
  check_tensor("predictions", *predictions, {t.prediction_rows, t.shape.prediction_columns()},
               compute_type_of(source), source);
  t.predictions = read_all_maps("prediction", sizes, images, t.prediction_rows);
}

}  // namespace

DeformCall read_deform_call(const Tensor& source, const Tensor* predictions,
                            const std::vector<Tensor>& weights, const DeformTables& tables) {
  DeformCall t{};
  t.shape = read_deform_shape(source, weights, tables);
  t.source_rows = source.size(0);
  t.weights = static_cast<int64_t>(weights.size());
  check_tensor("source", source, {t.source_rows, t.shape.channels}, source.scalar_type(), source);
  constexpr int64_t kMaxRows = std::numeric_limits<int64_t>::max() / 8;
  const int64_t images = t.shape.images;
  t.sources = read_all_maps("source", tables.sources, images, t.source_rows);
  t.terms = read_terms(tables.terms, std::ssize(t.sources), t.weights);
  read_predictions(t, predictions, source, tables.predictions);
  const auto outs = read_maps("output", tables.outs, images, kMaxRows / t.shape.out_channels);
  const auto upsampled = read_maps("upsampled", tables.upsampled, 0, kMaxRows);
  const IntList& jobs = tables.jobs;
  STD_TORCH_CHECK(!jobs.empty() && jobs.size() % job_field::kFieldCount == 0, "expected jobs of ",
                  static_cast<size_t>(job_field::kFieldCount), " n integers, at least one, got ",
                  jobs.size());
  const size_t count = jobs.size() / job_field::kFieldCount;
  STD_TORCH_CHECK(outs.size() == count && upsampled.size() == count,
                  "expected the sizes of the outputs, and those after upsampling, of ", count,
                  " jobs, got ", outs.size(), " and ", upsampled.size());
  for (size_t j = 0; j < count; ++j) {
    t.jobs.push_back(read_job(t, jobs, j * job_field::kFieldCount, outs[j], upsampled[j]));
    t.out_rows += images * outs[j].pixels();
  }
  return t;
}

DeformWeights read_deform_weights(const DeformShape& s, const std::vector<Tensor>& weights,
                                  const std::vector<Tensor>& bias, const Tensor& source,
                                  WeightNames names) {
  const ScalarType type = kIsCuda && weights[0].scalar_type() == source.scalar_type()
                              ? source.scalar_type()
                              : compute_type_of(source);
  STD_TORCH_CHECK(bias.empty() || bias.size() == weights.size(), "expected no bias or ",
                  weights.size(), ", got ", bias.size());
  DeformWeights read{{}, {}, dtype_of(weights[0])};
  for (const Tensor& matrix : weights) {
    check_tensor(names.matrices, matrix,
                 {s.out_channels, s.channels / s.groups, s.kernel_h, s.kernel_w}, type, source);
    read.matrices.push_back(matrix.const_data_ptr());
  }
  for (const Tensor& one : bias) {
    check_tensor(names.bias, one, {s.out_channels}, type, source);
    read.bias.push_back(one.const_data_ptr());
  }
  return read;
}

const void* optional_data(const char* name, const std::optional<Tensor>& t,
                          std::initializer_list<int64_t> sizes, const Tensor& like) {
  if (!t.has_value()) return nullptr;
  check_tensor(name, *t, sizes, compute_type_of(like), like);
  return t->const_data_ptr();
}

DeformResults allocate_results(const DeformCall& call, const Tensor& source,
                               DeformFwdParams& params) {
  STD_TORCH_CHECK(!(params.out_in_compute_dtype && params.moments),
                  "expected moments of an output of the source's type");
  const DeformShape& s = call.shape;
  const ScalarType compute = compute_type_of(source);
  const int64_t jobs = params.moments ? static_cast<int64_t>(call.jobs.size()) : 0;
  const auto statistics = [&](void*& data) {
    const Tensor t = torch::stable::new_empty(source, {jobs, s.images, s.out_channels}, compute);
    data = t.mutable_data_ptr();
    return t;
  };
  const Tensor out =
      torch::stable::new_empty(source, {call.out_rows, s.out_channels},
                               params.out_in_compute_dtype ? compute : source.scalar_type());
  params.out = out.mutable_data_ptr();
  const Tensor mean = statistics(params.mean);
  const Tensor var = statistics(params.var);
  const Tensor up_mean = statistics(params.up_mean);
  return {out, mean, var, up_mean};
}

void read_gradients(const DeformGradients& given, const Tensor& source, DeformBwdParams& params) {
  const DeformCall& call = *params.call;
  const DeformShape& s = call.shape;
  const ScalarType out_type =
      params.out_in_compute_dtype ? compute_type_of(source) : source.scalar_type();
  check_tensor("grad_out", given.grad_out, {call.out_rows, s.out_channels}, out_type, source);
  check_tensor("out", given.out, {call.out_rows, s.out_channels}, out_type, source);
  params.moments = given.grad_mean.has_value();
  STD_TORCH_CHECK(params.moments == given.grad_var.has_value() &&
                      params.moments == given.grad_up_mean.has_value(),
                  "expected the gradients of all three moments, or of none");
  params.grad_out = given.grad_out.const_data_ptr();
  params.out = given.out.const_data_ptr();
  if (!params.moments) return;
  const auto statistics = {static_cast<int64_t>(call.jobs.size()), s.images, s.out_channels};
  check_tensor("mean", given.mean, statistics, compute_type_of(source), source);
  params.mean = given.mean.const_data_ptr();
  params.grad_mean = optional_data("grad_mean", given.grad_mean, statistics, source);
  params.grad_var = optional_data("grad_var", given.grad_var, statistics, source);
  params.grad_up_mean = optional_data("grad_up_mean", given.grad_up_mean, statistics, source);
}

}  // namespace dyhead
