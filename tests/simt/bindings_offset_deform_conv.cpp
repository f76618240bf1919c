// offset_deform_conv, forward and backward.
#include <pybind11/stl.h>

#include <string>

#include "bindings.h"
#include "deform_call.h"
#include "kernels/offset_deform_conv.h"

namespace dyhead::simt {
namespace {

using cuda::DeviceLimits;

// The weights of one of the two convolutions, and the name of their type; then biases of this type.
using Weights = std::tuple<std::vector<py::array>, std::string>;

Matrices matrices_of(const Weights& weights, const std::vector<py::array>& bias = {}) {
  const auto& [matrices, dtype] = weights;
  return Matrices(matrices, bias, named_dtype(dtype));
}

// The jobs' call of source rows [R, C] and weights [C_out, C / groups, kh, kw].
DeformCall call_of(const Tables& tables, bool mask_logits, const std::string& dtype,
                   const py::array& source, const Weights& weights) {
  const std::vector<py::array>& matrices = std::get<0>(weights);
  return read_call(tables, mask_logits, named_dtype(dtype), source.shape(1),
                   matrices.at(0).shape(0), static_cast<int64_t>(matrices.size()));
}

// Predictions, output and moments. Unless `given` is None, the jobs read these predictions instead.
template <class T>
py::dict forward(const DeformCall& call, const py::array& source, const Matrices& offset_matrix,
                 const Matrices& matrices, const py::object& given,
                 const simt_test::OffsetDeformDevice& device) {
  using F = compute_t<T>;
  const DeformShape& s = call.shape;
  Matrices memory({}, {}, s.dtype);
  const auto predictions =
      DeviceArray<F>::poisoned("predictions", {call.prediction_rows, s.prediction_columns()});
  const auto out = DeviceArray<T>::poisoned("out", {call.out_rows, s.out_channels});
  const auto statistics = [&](const char* name) {
    const auto jobs = static_cast<py::ssize_t>(call.jobs.size());
    return DeviceArray<F>::poisoned(name, {jobs, s.images, s.out_channels});
  };
  const auto mean = statistics("mean");
  const auto var = statistics("var");
  const auto up_mean = statistics("up_mean");
  DeformFwdParams predict{};
  predict.source = memory.add("source", source);
  DeformFwdParams read = predict;
  predict.weights = &offset_matrix.weights;
  predict.out = predictions.data();
  predict.out_in_compute_dtype = true;
  read.call = &call;
  read.weights = &matrices.weights;
  read.predictions =
      given.is_none() ? predictions.data() : memory.add("given", given.cast<py::array>());
  read.out = out.data();
  read.moments = true;
  read.mean = mean.data();
  read.var = var.data();
  read.up_mean = up_mean.data();
  check_launch("run_offset_deform_fwd", run_offset_deform_fwd(predict, read, device));
  py::dict result;
  result["predictions"] = predictions.to_numpy();
  result["out"] = out.to_numpy();
  result["mean"] = mean.to_numpy();
  result["var"] = var.to_numpy();
  result["up_mean"] = up_mean.to_numpy();
  return result;
}

// All five gradients, of which those that are not wanted stay as they were allocated.
template <class T>
py::dict backward(const DeformCall& call, const py::array& grad_out, const py::object& grads,
                  const py::array& source, const Weights& offset_weights, const Weights& weights,
                  const py::array& predictions, const py::array& out, const py::array& mean,
                  const std::vector<bool>& wanted, bool deterministic,
                  const simt_test::OffsetDeformDevice& device) {
  using F = compute_t<T>;
  const DeformShape& s = call.shape;
  const py::ssize_t columns = s.prediction_columns();
  Matrices memory({}, {}, s.dtype);
  const Matrices offset_matrix = matrices_of(offset_weights);
  const Matrices matrices = matrices_of(weights);
  const auto grad_source = DeviceArray<T>::poisoned("grad_source", {call.source_rows, s.channels});
  const auto grad_offset_weight =
      DeviceArray<F>::poisoned("grad_offset_weight", {columns, s.channels, s.kernel_h, s.kernel_w});
  const auto grad_offset_bias = DeviceArray<F>::poisoned("grad_offset_bias", {columns});
  const auto grad_weights = DeviceArray<F>::poisoned(
      "grad_weights",
      {call.weights, s.out_channels, s.channels / s.groups, s.kernel_h, s.kernel_w});
  const auto grad_bias = DeviceArray<F>::poisoned("grad_bias", {call.weights, s.out_channels});
  const auto grad_predictions =
      DeviceArray<F>::poisoned("grad_predictions", {call.prediction_rows, columns});
  const auto address = [&](size_t result, void* data) {
    return wanted.at(result) ? data : nullptr;
  };
  DeformBwdParams predict{};
  predict.source = memory.add("source", source);
  predict.deterministic = deterministic;
  predict.grad_source = address(0, grad_source.data());
  DeformBwdParams read = predict;
  predict.weights = &offset_matrix.weights;
  predict.grad_out = grad_predictions.data();
  predict.out_in_compute_dtype = true;
  predict.grad_weights = address(1, grad_offset_weight.data());
  predict.grad_bias = address(2, grad_offset_bias.data());
  read.call = &call;
  read.weights = &matrices.weights;
  read.predictions = memory.add("predictions", predictions);
  read_gradients(grad_out, grads, out, mean, memory, read);
  if (wanted.at(0) || wanted.at(1) || wanted.at(2)) {
    read.grad_predictions = grad_predictions.data();
  }
  read.grad_weights = address(3, grad_weights.data());
  read.grad_bias = address(4, grad_bias.data());
  check_launch("run_offset_deform_bwd", run_offset_deform_bwd(predict, read, device));
  py::dict result;
  result["source"] = grad_source.to_numpy();
  result["offset_weight"] = grad_offset_weight.to_numpy();
  result["offset_bias"] = grad_offset_bias.to_numpy();
  result["weights"] = grad_weights.to_numpy();
  result["bias"] = grad_bias.to_numpy();
  return result;
}

void bind(py::module_& module) {
  py::module_ m =
      module.def_submodule("offset_deform_conv", "csrc/host/offset_deform_conv.cpp on CUDA");
  m.def(
      "forward",
      [](const std::string& dtype, const py::array& source, const Weights& offset_weights,
         const std::vector<py::array>& offset_bias, const Weights& weights,
         const std::vector<py::array>& bias, const Tables& tables, bool mask_logits,
         bool allow_tf32, const py::object& given, const DeviceLimits& limits) {
        const DeformCall call = call_of(tables, mask_logits, dtype, source, weights);
        Workspaces workspaces;
        return dispatch_dtype(call.shape.dtype, [&](auto zero) {
          return forward<decltype(zero)>(call, source, matrices_of(offset_weights, offset_bias),
                                         matrices_of(weights, bias), given,
                                         {limits, std::ref(workspaces), allow_tf32});
        });
      },
      py::arg("dtype"), py::arg("source"), py::arg("offset_weights"), py::arg("offset_bias"),
      py::arg("weights"), py::arg("bias"), py::arg("tables"), py::arg("mask_logits"), py::kw_only(),
      py::arg("allow_tf32") = false, py::arg("given"), py::arg("device"));
  m.def(
      "backward",
      [](const std::string& dtype, const py::array& grad_out, const py::object& grads,
         const py::array& source, const Weights& offset_weights, const Weights& weights,
         const py::array& predictions, const py::array& out, const py::array& mean,
         const Tables& tables, bool mask_logits, const std::vector<bool>& wanted, bool allow_tf32,
         bool deterministic, const DeviceLimits& limits) {
        const DeformCall call = call_of(tables, mask_logits, dtype, source, weights);
        Workspaces workspaces;
        return dispatch_dtype(call.shape.dtype, [&](auto zero) {
          return backward<decltype(zero)>(call, grad_out, grads, source, offset_weights, weights,
                                          predictions, out, mean, wanted, deterministic,
                                          {limits, std::ref(workspaces), allow_tf32});
        });
      },
      py::arg("dtype"), py::arg("grad_out"), py::arg("grads"), py::arg("source"),
      py::arg("offset_weights"), py::arg("weights"), py::arg("predictions"), py::arg("out"),
      py::arg("mean"), py::arg("tables"), py::arg("mask_logits"), py::arg("wanted"), py::kw_only(),
      py::arg("allow_tf32") = false, py::arg("deterministic") = false, py::arg("device"));
}

const Bindings bindings(bind);

}  // namespace
}  // namespace dyhead::simt
