#include "deform_conv.h"

#include <optional>
#include <tuple>

#include "../host/deform_conv.h"

namespace dyhead::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv_fwd(
    const Tensor& source, const Tensor& predictions, const Tensor& weights,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& gates, const IntList& geometry,
    const IntList& sources, const IntList& terms, const IntList& jobs, bool mask_logits,
    bool wide_out, bool moments) {
  const DeformTables tables =
      read_deform_tables(source, predictions, weights, geometry, sources, terms, jobs, mask_logits);
  const DeformShape& s = tables.shape;
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
  params.tables = &tables;
  params.source = source.const_data_ptr();
  params.predictions = predictions.const_data_ptr();
  params.weights = weights.const_data_ptr();
  params.bias = optional_data("bias", bias, {tables.weights, s.out_channels}, source);
  params.gates = optional_data("gates", gates,
                               {s.images, static_cast<int64_t>(tables.sources.size())}, source);
  params.out = out.mutable_data_ptr();
  params.wide_out = wide_out;
  params.moments = moments;
  params.mean = mean.mutable_data_ptr();
  params.var = var.mutable_data_ptr();
  params.up_mean = up_mean.mutable_data_ptr();
  run_deform_fwd(params);
  return {out, mean, var, up_mean};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv_bwd(
    const Tensor& grad_out, const std::optional<Tensor>& grad_mean,
    const std::optional<Tensor>& grad_var, const std::optional<Tensor>& grad_up_mean,
    const Tensor& source, const Tensor& predictions, const Tensor& weights,
    const std::optional<Tensor>& gates, const Tensor& out, const Tensor& mean,
    const IntList& geometry, const IntList& sources, const IntList& terms, const IntList& jobs,
    bool mask_logits, bool wide_out, bool with_bias) {
  const DeformTables tables =
      read_deform_tables(source, predictions, weights, geometry, sources, terms, jobs, mask_logits);
  const DeformShape& s = tables.shape;
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
  const Tensor grad_weights = torch::stable::empty_like(weights);
  const Tensor grad_bias =
      torch::stable::new_empty(source, {with_bias ? tables.weights : 0, s.out_channels}, compute);
  const Tensor grad_gates =
      torch::stable::new_empty(source, {gates.has_value() ? s.images : 0, source_count}, compute);
  DeformBwdParams params{};
  params.tables = &tables;
  params.source = source.const_data_ptr();
  params.predictions = predictions.const_data_ptr();
  params.weights = weights.const_data_ptr();
  params.gates = optional_data("gates", gates, {s.images, source_count}, source);
  params.grad_out = grad_out.const_data_ptr();
  params.out = out.const_data_ptr();
  params.wide_out = wide_out;
  params.moments = moments;
  params.mean = mean.const_data_ptr();
  const auto statistics = {job_count, s.images, s.out_channels};
  params.grad_mean = optional_data("grad_mean", grad_mean, statistics, source);
  params.grad_var = optional_data("grad_var", grad_var, statistics, source);
  params.grad_up_mean = optional_data("grad_up_mean", grad_up_mean, statistics, source);
  params.grad_source = grad_source.mutable_data_ptr();
  params.grad_predictions = grad_predictions.mutable_data_ptr();
  params.grad_weights = grad_weights.mutable_data_ptr();
  params.grad_bias = with_bias ? grad_bias.mutable_data_ptr() : nullptr;
  params.grad_gates = gates.has_value() ? grad_gates.mutable_data_ptr() : nullptr;
  run_deform_bwd(params);
  return {grad_source, grad_predictions, grad_weights, grad_bias, grad_gates};
}

}  // namespace
}  // namespace dyhead::cpu

STABLE_TORCH_LIBRARY_IMPL(dyhead, CPU, m) {
  m.impl("deform_conv_fwd", TORCH_BOX(&dyhead::cpu::deform_conv_fwd));
  m.impl("deform_conv_bwd", TORCH_BOX(&dyhead::cpu::deform_conv_bwd));
}
