// The forward and the backward of deform_conv as csrc/cuda/deform_conv/deform_conv.cpp runs them.
#include <pybind11/stl.h>

#include <deque>
#include <optional>
#include <string>

#include "bindings.h"
#include "cuda/deform_conv/deform_conv_bwd_input_run.h"
#include "cuda/deform_conv/deform_conv_fwd_run.h"
#include "cuda/mma_choice.h"
#include "deform_call.h"

namespace dyhead::simt {
namespace {

using namespace dyhead::cuda;

template <class T>
py::dict forward(DeformCall call, int64_t far, const py::array& source,
                 const py::array& predictions, const Matrices& matrices, const py::object& gates,
                 bool out_in_compute_dtype, bool moments, bool allow_tf32,
                 const DeviceLimits& device) {
  using F = compute_t<T>;
  const DeformShape& s = call.shape;
  const auto x = DeviceArray<T>::copy_of("source", source);
  const auto offsets = DeviceArray<F>::copy_of("predictions", predictions);
  const auto jobs = static_cast<py::ssize_t>(moments ? call.jobs.size() : 0);
  const auto statistics = [&](const char* name) {
    return DeviceArray<F>::poisoned(name, {jobs, s.images, s.out_channels});
  };
  const auto mean = statistics("mean");
  const auto var = statistics("var");
  const auto up_mean = statistics("up_mean");
  const auto out = DeviceArray<T>::poisoned("out", {call.out_rows, s.out_channels});
  const auto wide = DeviceArray<F>::poisoned("out", {call.out_rows, s.out_channels});
  DeformFwdParams params{};
  params.call = &call;
  params.weights = &matrices.weights;
  // Rows that start at row `far` of a matrix whose first rows nobody may touch.
  for (MapShape& map : call.sources) map.first_row += far;
  for (DeformJob& job : call.jobs) {
    job.out.first_row += far;
    job.predictions.first_row += far;
  }
  params.source = x.data() - far * s.channels;
  params.predictions = offsets.data() - far * s.prediction_columns();
  std::deque<DeviceArray<F>> gate_memory;
  if (!gates.is_none()) {
    gate_memory.push_back(DeviceArray<F>::copy_of("gates", gates));
    params.gates = gate_memory.back().data();
  }
  const int64_t before = far * s.out_channels;
  params.out =
      out_in_compute_dtype ? static_cast<void*>(wide.data() - before) : out.data() - before;
  params.out_in_compute_dtype = out_in_compute_dtype;
  params.moments = moments;
  params.mean = mean.data();
  params.var = var.data();
  params.up_mean = up_mean.data();
  Workspaces workspaces;
  check_launch("run_deform_fwd",
               run_deform_fwd({&params, 1}, allow_tf32, device, workspaces, nullptr));
  py::dict result;
  if (out_in_compute_dtype) {
    result["out"] = wide.to_numpy();
  } else {
    result["out"] = out.to_numpy();
  }
  result["mean"] = mean.to_numpy();
  result["var"] = var.to_numpy();
  result["up_mean"] = up_mean.to_numpy();
  return result;
}

// All but the gradient of the weights.
template <class T>
py::dict backward(const DeformCall& call, const py::array& grad_out, const py::object& grads,
                  const py::array& source, const py::array& predictions, const Matrices& matrices,
                  const py::object& gates, const py::array& out, const py::array& mean,
                  bool out_in_compute_dtype, bool with_bias, bool allow_tf32, bool deterministic,
                  bool with_source, bool with_predictions, const DeviceLimits& device) {
  using F = compute_t<T>;
  const DeformShape& s = call.shape;
  Matrices memory({}, {}, s.dtype);
  const auto x = DeviceArray<T>::copy_of("source", source);
  const auto offsets = DeviceArray<F>::copy_of("predictions", predictions);
  const auto sources = static_cast<py::ssize_t>(call.sources.size());
  const auto grad_source = DeviceArray<T>::poisoned("grad_source", {x.shape(0), x.shape(1)});
  const auto grad_predictions =
      DeviceArray<F>::poisoned("grad_predictions", {offsets.shape(0), offsets.shape(1)});
  const auto grad_bias = DeviceArray<F>::poisoned("grad_bias", {call.weights, s.out_channels});
  const auto grad_gates = DeviceArray<F>::poisoned("grad_gates", {s.images, sources});
  const auto rows = DeviceArray<T>::poisoned("rows", {call.out_rows, s.out_channels});
  DeformBwdParams params{};
  params.call = &call;
  params.weights = &matrices.weights;
  params.source = x.data();
  params.predictions = offsets.data();
  params.gates = gates.is_none() ? nullptr : memory.add("gates", gates);
  params.out_in_compute_dtype = out_in_compute_dtype;
  read_gradients(grad_out, grads, out, mean, memory, params);
  params.deterministic = deterministic;
  params.grad_source = with_source ? grad_source.data() : nullptr;
  params.grad_predictions = with_predictions ? grad_predictions.data() : nullptr;
  params.grad_bias = with_bias ? grad_bias.data() : nullptr;
  params.grad_gates = gates.is_none() ? nullptr : grad_gates.data();
  Workspaces workspaces;
  const DeformBwdCall one{&params, rows.data()};
  check_launch("run_deform_bwd_input",
               run_deform_bwd_input({&one, 1}, allow_tf32, device, workspaces, nullptr));
  py::dict result;
  result["rows"] = rows.to_numpy();
  if (with_source) result["source"] = grad_source.to_numpy();
  if (with_predictions) result["predictions"] = grad_predictions.to_numpy();
  if (with_bias) result["bias"] = grad_bias.to_numpy();
  if (!gates.is_none()) result["gates"] = grad_gates.to_numpy();
  return result;
}

void bind(py::module_& module) {
  py::module_ m = module.def_submodule("deform_conv", "csrc/cuda/deform_conv/");
  py::class_<DeviceLimits>(m, "DeviceLimits")
      .def(py::init([](int processors, size_t shared_bytes, bool wgmma) {
             return DeviceLimits{processors, shared_bytes, wgmma};
           }),
           py::arg("processors"), py::arg("shared_bytes"), py::arg("wgmma") = false);
  m.def(
      "tiling",
      [](const Tables& tables, const std::string& dtype, int64_t channels, int64_t out_channels,
         bool vectors, bool sums_only, bool allow_tf32, const DeviceLimits& device) {
        const DeformCall call =
            read_call(tables, true, named_dtype(dtype), channels, out_channels, 1);
        const DeformMath math = deform_math(call.shape.dtype, allow_tf32);
        const DeformTiling tiling = forward_tiling(call, math, vectors, sums_only, device);
        std::vector<std::pair<int, int>> launches;  // jobs and tiles of each
        for (const DeformLaunch& launch :
             deform_launches(call, tiling.rows, tiling.plain(), tiling.together())) {
          launches.emplace_back(launch.job_count, launch.tile_count);
        }
        return py::make_tuple(tiling.rows, tiling.cols, launches);
      },
      py::arg("tables"), py::arg("dtype"), py::arg("channels"), py::arg("out_channels"),
      py::kw_only(), py::arg("vectors") = true, py::arg("sums_only") = true,
      py::arg("allow_tf32") = false, py::arg("device"));
  m.def("wants_wgmma", &wants_wgmma, py::arg("setting"), py::arg("major"), py::arg("minor"),
        py::arg("built"));
  m.def(
      "takes_plain_kernel",
      [](const Tables& tables, const std::string& dtype, int64_t channels, int64_t out_channels,
         bool vectors, bool sums_only, bool allow_tf32, const DeviceLimits& device) {
        const DeformCall call =
            read_call(tables, true, named_dtype(dtype), channels, out_channels, 1);
        const DeformMath math = deform_math(call.shape.dtype, allow_tf32);
        return takes_plain_kernel(call, math, vectors, sums_only, device);
      },
      py::arg("tables"), py::arg("dtype"), py::arg("channels"), py::arg("out_channels"),
      py::kw_only(), py::arg("vectors") = true, py::arg("sums_only") = true,
      py::arg("allow_tf32") = false, py::arg("device"));
  m.def(
      "split_tiles",
      [](int64_t tiles, int64_t taps, int64_t steps, int64_t at_once) {
        const SplitTime time = split_tiles(tiles, taps, steps, at_once);
        return py::make_tuple(time.split.whole, time.split.parts, time.steps);
      },
      py::arg("tiles"), py::kw_only(), py::arg("taps"), py::arg("steps"), py::arg("at_once"));
  m.def(
      "problem",
      [](const Tables& tables, const std::string& dtype, int64_t channels,
         int64_t out_channels) -> std::optional<std::string> {
        const char* problem =
            deform_problem(read_call(tables, true, named_dtype(dtype), channels, out_channels, 1));
        return problem == nullptr ? std::nullopt : std::optional<std::string>(problem);
      },
      py::arg("tables"), py::arg("dtype"), py::arg("channels"), py::arg("out_channels"));
  m.def(
      "input_tiling",  // rows of a tile, and whether the kernel is that with wgmma
      [](const Tables& tables, const std::string& dtype, int64_t channels, int64_t out_channels,
         bool vectors, const DeviceLimits& device) {
        const DeformCall call =
            read_call(tables, true, named_dtype(dtype), channels, out_channels, 1);
        const DeformMath math = deform_math(call.shape.dtype, false);
        const int32_t rows = input_tile_rows(call, input_panels(call.shape, math), vectors, device);
        return py::make_tuple(rows, takes_wgmma_input_kernel(call.shape, rows, device));
      },
      py::arg("tables"), py::arg("dtype"), py::arg("channels"), py::arg("out_channels"),
      py::kw_only(), py::arg("vectors") = true, py::arg("device"));
  m.def(
      "forward",
      [](const std::string& dtype_name, const py::array& source, const py::array& predictions,
         const std::vector<py::array>& weights, const std::vector<py::array>& bias,
         const std::string& weights_dtype, const py::object& gates, const Tables& tables,
         bool mask_logits, bool out_in_compute_dtype, bool moments, bool allow_tf32, int64_t far,
         const DeviceLimits& device) {
        const DType dtype = named_dtype(dtype_name);
        const DeformCall call =
            read_call(tables, mask_logits, dtype, source.shape(1), weights.at(0).shape(0),
                      static_cast<int64_t>(weights.size()));
        const Matrices matrices(weights, bias, named_dtype(weights_dtype));
        return dispatch_dtype(dtype, [&](auto zero) {
          return forward<decltype(zero)>(call, far, source, predictions, matrices, gates,
                                         out_in_compute_dtype, moments, allow_tf32, device);
        });
      },
      py::arg("dtype"), py::arg("source"), py::arg("predictions"), py::arg("weights"),
      py::arg("bias"), py::arg("weights_dtype"), py::arg("gates"), py::arg("tables"),
      py::arg("mask_logits"), py::arg("out_in_compute_dtype"), py::arg("moments"), py::kw_only(),
      py::arg("allow_tf32") = false, py::arg("far") = 0, py::arg("device"));
  m.def(
      "backward",
      [](const std::string& dtype_name, const py::array& grad_out, const py::object& grads,
         const py::array& source, const py::array& predictions,
         const std::vector<py::array>& weights, const std::string& weights_dtype,
         const py::object& gates, const py::array& out, const py::array& mean, const Tables& tables,
         bool mask_logits, bool out_in_compute_dtype, bool with_bias, bool allow_tf32,
         bool deterministic, bool with_source, bool with_predictions, const DeviceLimits& device) {
        const DType dtype = named_dtype(dtype_name);
        const DeformCall call =
            read_call(tables, mask_logits, dtype, source.shape(1), weights.at(0).shape(0),
                      static_cast<int64_t>(weights.size()));
        const Matrices matrices(weights, {}, named_dtype(weights_dtype));
        return dispatch_dtype(dtype, [&](auto zero) {
          return backward<decltype(zero)>(call, grad_out, grads, source, predictions, matrices,
                                          gates, out, mean, out_in_compute_dtype, with_bias,
                                          allow_tf32, deterministic, with_source, with_predictions,
                                          device);
        });
      },
      py::arg("dtype"), py::arg("grad_out"), py::arg("grads"), py::arg("source"),
      py::arg("predictions"), py::arg("weights"), py::arg("weights_dtype"), py::arg("gates"),
      py::arg("out"), py::arg("mean"), py::arg("tables"), py::arg("mask_logits"),
      py::arg("out_in_compute_dtype"), py::kw_only(), py::arg("with_bias"),
      py::arg("allow_tf32") = false, py::arg("deterministic") = false,
      py::arg("with_source") = true, py::arg("with_predictions") = true, py::arg("device"));
}

const Bindings bindings(bind);

}  // namespace
}  // namespace dyhead::simt
