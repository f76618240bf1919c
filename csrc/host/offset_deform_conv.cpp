#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "deform_call.h"
#include "wanted.h"

namespace dyhead {
namespace {

// The work of the deformable jobs, as read_deform_call. The offset convolution keeps the size of
// its maps, so prediction maps have the sizes of the first source maps.
DeformCall read_jobs(const Tensor& source, const Tensor* predictions,
                     const std::vector<Tensor>& weights, const DeformTables& tables) {
  DeformCall t = read_deform_call(source, predictions, weights, tables);
  const auto same_size = [](const MapShape& a, const MapShape& b) {
    return a.height == b.height && a.width == b.width;
  };
  STD_TORCH_CHECK(
      t.predictions.size() <= t.sources.size() &&
          std::equal(t.predictions.begin(), t.predictions.end(), t.sources.begin(), same_size),
      "expected prediction maps of the sizes of the first source maps");
  return t;
}

DeformWeights read_offset_weights(const DeformShape& s, const Tensor& weight,
                                  const std::optional<Tensor>& bias, const Tensor& source) {
  std::vector<Tensor> biases;
  if (bias.has_value()) biases.push_back(*bias);
  return read_deform_weights(s, {weight}, biases, source, {"offset_weight", "offset_bias"});
}

// Returns predictions, out, mean, var and up_mean.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> offset_deform_conv_fwd(
    const Tensor& source, const Tensor& offset_weight, const std::optional<Tensor>& offset_bias,
    const std::vector<Tensor>& weights, const std::optional<std::vector<Tensor>>& bias,
    int64_t images, const IntList& source_sizes, const IntList& prediction_sizes,
    const IntList& out_sizes, const IntList& up_sizes, const IntList& geometry,
    const IntList& terms, const IntList& jobs, bool mask_logits, bool allow_tf32) {
  Call call(source);
  const DeformCall deform = read_jobs(source, nullptr, weights,
                                      {images, source_sizes, prediction_sizes, out_sizes, up_sizes,
                                       geometry, terms, jobs, mask_logits});
  const DeformCall offsets = offset_conv_call(deform);
  const DeformWeights offset_matrix =
      read_offset_weights(offsets.shape, offset_weight, offset_bias, source);
  const DeformWeights matrices =
      read_deform_weights(deform.shape, weights, bias.value_or(std::vector<Tensor>{}), source);
  // In their order: the jobs read what the offset convolution predicts.
  std::vector<DeformFwdParams> calls(2);
  for (DeformFwdParams& params : calls) {
    params.source = source.const_data_ptr();
    params.allow_tf32 = allow_tf32;
  }
  DeformFwdParams& predict = calls[0];
  predict.call = &offsets;
  predict.weights = &offset_matrix;
  predict.out_in_compute_dtype = true;
  const Tensor predictions = allocate_results(offsets, source, predict).out;
  DeformFwdParams& read = calls[1];
  read.call = &deform;
  read.weights = &matrices;
  read.predictions = predict.out;
  read.moments = true;
  const auto [out, mean, var, up_mean] = allocate_results(deform, source, read);
  run_deform_conv_fwd(calls, call);
  return {predictions, out, mean, var, up_mean};
}

// Returns the gradients of source, offset_weight, offset_bias, weights and bias, as far as wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> offset_deform_conv_bwd(
    const Tensor& grad_out, const std::optional<Tensor>& grad_mean,
    const std::optional<Tensor>& grad_var, const std::optional<Tensor>& grad_up_mean,
    const Tensor& source, const Tensor& offset_weight, const std::vector<Tensor>& weights,
    const Tensor& predictions, const Tensor& out, const Tensor& mean, int64_t images,
    const IntList& source_sizes, const IntList& prediction_sizes, const IntList& out_sizes,
    const IntList& up_sizes, const IntList& geometry, const IntList& terms, const IntList& jobs,
    bool mask_logits, const IntList& wanted_results, bool allow_tf32, bool deterministic) {
  Call call(source);
  const DeformCall deform = read_jobs(source, &predictions, weights,
                                      {images, source_sizes, prediction_sizes, out_sizes, up_sizes,
                                       geometry, terms, jobs, mask_logits});
  const DeformCall offsets = offset_conv_call(deform);
  const DeformShape& s = deform.shape;
  const DeformShape& o = offsets.shape;
  const DeformWeights offset_matrix = read_offset_weights(o, offset_weight, {}, source);
  const DeformWeights matrices = read_deform_weights(s, weights, {}, source);
  const ScalarType compute = compute_type_of(source);
  Wanted wanted(wanted_results, 5);
  // In their order: the offset convolution starts from the gradient that its readers give it.
  std::vector<DeformBwdParams> calls(2);
  for (DeformBwdParams& params : calls) {
    params.source = source.const_data_ptr();
    params.deterministic = deterministic;
    params.allow_tf32 = allow_tf32;
  }
  DeformBwdParams& read = calls[0];
  read.call = &deform;
  read.weights = &matrices;
  read.predictions = predictions.const_data_ptr();
  read_gradients({grad_out, grad_mean, grad_var, grad_up_mean, out, mean}, source, read);
  DeformBwdParams& predict = calls[1];
  predict.call = &offsets;
  predict.weights = &offset_matrix;
  predict.out_in_compute_dtype = true;
  const Tensor grad_source = wanted.allocate(0, false, source, {deform.source_rows, s.channels},
                                             source.scalar_type(), read.grad_source);
  predict.grad_source = read.grad_source;
  const Tensor grad_offset_weight =
      wanted.allocate(1, false, source, {o.out_channels, o.channels, o.kernel_h, o.kernel_w},
                      compute, predict.grad_weights);
  const Tensor grad_offset_bias =
      wanted.allocate(2, false, source, {o.out_channels}, compute, predict.grad_bias);
  const Tensor grad_weights = wanted.allocate(
      3, false, source,
      {deform.weights, s.out_channels, s.channels / s.groups, s.kernel_h, s.kernel_w}, compute,
      read.grad_weights);
  const Tensor grad_bias =
      wanted.allocate(4, false, source, {deform.weights, s.out_channels}, compute, read.grad_bias);
  std::optional<Tensor> grad_predictions;
  if (wanted[0] || wanted[1] || wanted[2]) {
    grad_predictions =
        torch::stable::new_empty(source, {deform.prediction_rows, s.prediction_columns()}, compute);
    read.grad_predictions = grad_predictions->mutable_data_ptr();
    predict.grad_out = read.grad_predictions;
  } else {
    calls.pop_back();
  }
  run_deform_conv_bwd(calls, call);
  return {grad_source, grad_offset_weight, grad_offset_bias, grad_weights, grad_bias};
}

}  // namespace
}  // namespace dyhead

DYHEAD_SCHEMAS(m) {
  // A plain convolution that predicts offsets and masks, and the deformable jobs that read them.
  // The prediction maps are those of the first source maps, in their order, sizes and all; kernel,
  // padding and dilation are the jobs' own. Returns the predictions [Q, 3 D K], of the compute
  // type, then what deform_conv_fwd returns with moments.
  m.def(
      "offset_deform_conv_fwd(Tensor source, Tensor offset_weight, Tensor? offset_bias, "
      "Tensor[] weights, Tensor[]? bias, SymInt images, SymInt[] source_sizes, "
      "SymInt[] prediction_sizes, SymInt[] out_sizes, SymInt[] up_sizes, int[] geometry, "
      "int[] terms, int[] jobs, bool mask_logits, bool allow_tf32) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
  // Returns the gradients of source, offset_weight, offset_bias, weights and bias; all but the
  // first have the compute type, and those of weights and bias are stacked. `wanted` has 1 or 0
  // for each (csrc/host/wanted.h).
  m.def(
      "offset_deform_conv_bwd(Tensor grad_out, Tensor? grad_mean, Tensor? grad_var, "
      "Tensor? grad_up_mean, Tensor source, Tensor offset_weight, Tensor[] weights, "
      "Tensor predictions, Tensor out, Tensor mean, SymInt images, SymInt[] source_sizes, "
      "SymInt[] prediction_sizes, SymInt[] out_sizes, SymInt[] up_sizes, int[] geometry, "
      "int[] terms, int[] jobs, bool mask_logits, int[] wanted, bool allow_tf32, "
      "bool deterministic) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

DYHEAD_REGISTER(m) {
  m.impl("offset_deform_conv_fwd", TORCH_BOX(&dyhead::offset_deform_conv_fwd));
  m.impl("offset_deform_conv_bwd", TORCH_BOX(&dyhead::offset_deform_conv_bwd));
}
