#include "../common/dynamic_relu.h"

#include <tuple>

#include "device.h"
#include "wanted.h"

namespace dyhead {
namespace {

DynamicReluShape dynamic_relu_shape(const Tensor& rows, const Tensor& fc1_weight,
                                    bool hard_sigmoid) {
  STD_TORCH_CHECK(rows.dim() == 3, "expected rows [N, P, C], got ", shape_string(rows));
  STD_TORCH_CHECK(rows.is_contiguous(), "expected contiguous rows; call .contiguous() on them");
  STD_TORCH_CHECK(rows.size(1) > 0 && rows.size(2) > 0,
                  "expected rows of at least one pixel and channel, got ", shape_string(rows));
  STD_TORCH_CHECK(fc1_weight.dim() == 2 && fc1_weight.size(0) > 0, "expected fc1_weight [H, ",
                  rows.size(2), "], got ", shape_string(fc1_weight));
  return {rows.size(0),       rows.size(1),   rows.size(2),
          fc1_weight.size(0), dtype_of(rows), hard_sigmoid};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dynamic_relu_fwd(
    const Tensor& rows, const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& fc2_weight,
    const Tensor& fc2_bias, bool hard_sigmoid) {
  Call call(rows);
  const DynamicReluShape shape = dynamic_relu_shape(rows, fc1_weight, hard_sigmoid);
  const ScalarType compute = compute_type_of(rows);
  const auto [n, channels, hidden] = std::tuple(shape.images, shape.channels, shape.hidden);
  check_tensor("fc1_weight", fc1_weight, {hidden, channels}, compute, rows);
  check_tensor("fc1_bias", fc1_bias, {hidden}, compute, rows);
  check_tensor("fc2_weight", fc2_weight, {4 * channels, hidden}, compute, rows);
  check_tensor("fc2_bias", fc2_bias, {4 * channels}, compute, rows);
  const Tensor out = torch::stable::empty_like(rows);
  const Tensor mean = torch::stable::new_empty(rows, {n, channels}, compute);
  const Tensor hidden_layer = torch::stable::new_empty(rows, {n, hidden}, compute);
  const Tensor logits = torch::stable::new_empty(rows, {n, 4 * channels}, compute);
  if (n > 0) {
    run_dynamic_relu_fwd(
        {shape, rows.const_data_ptr(), fc1_weight.const_data_ptr(), fc1_bias.const_data_ptr(),
         fc2_weight.const_data_ptr(), fc2_bias.const_data_ptr(), out.mutable_data_ptr(),
         mean.mutable_data_ptr(), hidden_layer.mutable_data_ptr(), logits.mutable_data_ptr()},
        call);
  }
  return {out, mean, hidden_layer, logits};
}

std::tuple<Tensor, Tensor, Tensor> dynamic_relu_bwd(const Tensor& grad_out, const Tensor& rows,
                                                    const Tensor& hidden, const Tensor& logits,
                                                    const Tensor& fc1_weight,
                                                    const Tensor& fc2_weight, bool hard_sigmoid,
                                                    const IntList& wanted_results) {
  Call call(rows);
  const DynamicReluShape shape = dynamic_relu_shape(rows, fc1_weight, hard_sigmoid);
  const ScalarType compute = compute_type_of(rows);
  const auto [n, channels, width] = std::tuple(shape.images, shape.channels, shape.hidden);
  check_tensor("grad_out", grad_out, {n, shape.pixels, channels}, rows.scalar_type(), rows);
  check_tensor("hidden", hidden, {n, width}, compute, rows);
  check_tensor("logits", logits, {n, 4 * channels}, compute, rows);
  check_tensor("fc1_weight", fc1_weight, {width, channels}, compute, rows);
  check_tensor("fc2_weight", fc2_weight, {4 * channels, width}, compute, rows);
  Wanted wanted(wanted_results, 3);
  DynamicReluBwdParams p{shape,
                         grad_out.const_data_ptr(),
                         rows.const_data_ptr(),
                         hidden.const_data_ptr(),
                         logits.const_data_ptr(),
                         fc1_weight.const_data_ptr(),
                         fc2_weight.const_data_ptr(),
                         nullptr,
                         nullptr,
                         nullptr};
  // On the CPU the others are steps on the way to the rows' gradient.
  const Tensor grad_rows =
      wanted.allocate(0, false, rows, {n, shape.pixels, channels}, rows.scalar_type(), p.grad_rows);
  const Tensor grad_logits =
      wanted.allocate(1, !kIsCuda, rows, {n, 4 * channels}, compute, p.grad_logits);
  const Tensor grad_hidden = wanted.allocate(2, !kIsCuda, rows, {n, width}, compute, p.grad_hidden);
  if (n > 0) run_dynamic_relu_bwd(p, call);
  return {grad_rows, grad_logits, grad_hidden};
}

}  // namespace
}  // namespace dyhead

DYHEAD_SCHEMAS(m) {
  // rows [N, P, C]; parameters in the compute type. Returns out, mean [N, C], hidden [N, H] and
  // logits [N, 4 C].
  m.def(
      "dynamic_relu_fwd(Tensor rows, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, "
      "Tensor fc2_bias, bool hard_sigmoid) -> (Tensor, Tensor, Tensor, Tensor)");
  // Returns the gradients of rows, of the logits [N, 4 C] and of the hidden layer before its ReLU
  // [N, H]; those of the parameters are products of these with what the forward returned. `wanted`
  // has 1 or 0 for each (csrc/host/wanted.h).
  m.def(
      "dynamic_relu_bwd(Tensor grad_out, Tensor rows, Tensor hidden, Tensor logits, "
      "Tensor fc1_weight, Tensor fc2_weight, bool hard_sigmoid, int[] wanted) -> "
      "(Tensor, Tensor, Tensor)");
}

DYHEAD_REGISTER(m) {
  m.impl("dynamic_relu_fwd", TORCH_BOX(&dyhead::dynamic_relu_fwd));
  m.impl("dynamic_relu_bwd", TORCH_BOX(&dyhead::dynamic_relu_bwd));
}
