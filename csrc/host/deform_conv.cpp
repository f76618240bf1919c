#include <optional>
#include <tuple>
#include <vector>

#include "deform_call.h"
#include "wanted.h"

namespace dyhead {
namespace {

// Returns out, mean, var and up_mean.
std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv_fwd(
    const Tensor& source, const Tensor& predictions, const std::vector<Tensor>& weights,
    const std::optional<std::vector<Tensor>>& bias, const std::optional<Tensor>& gates,
    int64_t images, const IntList& source_sizes, const IntList& prediction_sizes,
    const IntList& out_sizes, const IntList& up_sizes, const IntList& geometry,
    const IntList& terms, const IntList& jobs, bool mask_logits, bool out_in_compute_dtype,
    bool moments, bool allow_tf32) {
  Call call(source);
  const DeformCall deform = read_deform_call(source, &predictions, weights,
                                             {images, source_sizes, prediction_sizes, out_sizes,
                                              up_sizes, geometry, terms, jobs, mask_logits});
  const DeformWeights matrices =
      read_deform_weights(deform.shape, weights, bias.value_or(std::vector<Tensor>{}), source);
  DeformFwdParams params{};
  params.call = &deform;
  params.weights = &matrices;
  params.source = source.const_data_ptr();
  params.predictions = predictions.const_data_ptr();
  params.gates = optional_data("gates", gates, {images, std::ssize(deform.sources)}, source);
  params.out_in_compute_dtype = out_in_compute_dtype;
  params.moments = moments;
  params.allow_tf32 = allow_tf32;
  const auto [out, mean, var, up_mean] = allocate_results(deform, source, params);
  run_deform_conv_fwd({&params, 1}, call);
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
  const DeformCall deform = read_deform_call(source, &predictions, weights,
                                             {images, source_sizes, prediction_sizes, out_sizes,
                                              up_sizes, geometry, terms, jobs, mask_logits});
  const DeformShape& s = deform.shape;
  const DeformWeights matrices = read_deform_weights(s, weights, {}, source);
  const ScalarType compute = compute_type_of(source);
  const int64_t sources = std::ssize(deform.sources);
  DeformBwdParams params{};
  params.call = &deform;
  params.weights = &matrices;
  params.source = source.const_data_ptr();
  params.predictions = predictions.const_data_ptr();
  params.gates = optional_data("gates", gates, {images, sources}, source);
  params.out_in_compute_dtype = out_in_compute_dtype;
  params.deterministic = deterministic;
  params.allow_tf32 = allow_tf32;
  read_gradients({grad_out, grad_mean, grad_var, grad_up_mean, out, mean}, source, params);
  Wanted wanted(wanted_results, 5);
  STD_TORCH_CHECK(gates.has_value() || !wanted[4],
                  "expected gates, as their gradient is wanted, got none");
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
      wanted.allocate(4, false, source, {images, sources}, compute, params.grad_gates);
  run_deform_conv_bwd({&params, 1}, call);
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
