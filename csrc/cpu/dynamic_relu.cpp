#include "dynamic_relu.h"

#include "../host/dynamic_relu.h"

namespace dyhead::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> dynamic_relu_fwd(
    const Tensor& rows, const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& fc2_weight,
    const Tensor& fc2_bias, bool hard_sigmoid) {
  const DynamicReluFwdCall call =
      prepare_dynamic_relu_fwd(rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias, hard_sigmoid);
  run_dynamic_relu_fwd(call.params);
  return call.results();
}

std::tuple<Tensor, Tensor, Tensor> dynamic_relu_bwd(const Tensor& grad_out, const Tensor& rows,
                                                    const Tensor& hidden, const Tensor& logits,
                                                    const Tensor& fc1_weight,
                                                    const Tensor& fc2_weight, bool hard_sigmoid) {
  const DynamicReluBwdCall call = prepare_dynamic_relu_bwd(grad_out, rows, hidden, logits,
                                                           fc1_weight, fc2_weight, hard_sigmoid);
  run_dynamic_relu_bwd(call.params);
  return call.results();
}

}  // namespace
}  // namespace dyhead::cpu

STABLE_TORCH_LIBRARY_IMPL(dyhead, CPU, m) {
  m.impl("dynamic_relu_fwd", TORCH_BOX(&dyhead::cpu::dynamic_relu_fwd));
  m.impl("dynamic_relu_bwd", TORCH_BOX(&dyhead::cpu::dynamic_relu_bwd));
}
