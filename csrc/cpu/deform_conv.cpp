#include "deform_conv.h"

#include "../host/deform_conv.h"

namespace dyhead::cpu {
namespace {

constexpr bool kHalfWeights = false;

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv_fwd(
    const Tensor& source, const Tensor& predictions, const std::vector<Tensor>& weights,
    const std::vector<Tensor>& bias, const std::optional<Tensor>& gates, const IntList& geometry,
    const IntList& sources, const IntList& terms, const IntList& jobs, bool mask_logits,
    bool wide_out, bool moments, bool /*allow_tf32*/) {
  return deform_conv_fwd_with(run_deform_fwd, kHalfWeights, source, predictions, weights, bias,
                              gates, geometry, sources, terms, jobs, mask_logits, wide_out,
                              moments);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv_bwd(
    const Tensor& grad_out, const std::optional<Tensor>& grad_mean,
    const std::optional<Tensor>& grad_var, const std::optional<Tensor>& grad_up_mean,
    const Tensor& source, const Tensor& predictions, const std::vector<Tensor>& weights,
    const std::optional<Tensor>& gates, const Tensor& out, const Tensor& mean,
    const IntList& geometry, const IntList& sources, const IntList& terms, const IntList& jobs,
    bool mask_logits, bool wide_out, bool with_bias, bool /*allow_tf32*/, bool deterministic) {
  return deform_conv_bwd_with(run_deform_bwd, kHalfWeights, grad_out, grad_mean, grad_var,
                              grad_up_mean, source, predictions, weights, gates, out, mean,
                              geometry, sources, terms, jobs, mask_logits, wide_out, with_bias,
                              deterministic);
}

}  // namespace
}  // namespace dyhead::cpu

STABLE_TORCH_LIBRARY_IMPL(dyhead, CPU, m) {
  m.impl("deform_conv_fwd", TORCH_BOX(&dyhead::cpu::deform_conv_fwd));
  m.impl("deform_conv_bwd", TORCH_BOX(&dyhead::cpu::deform_conv_bwd));
}
