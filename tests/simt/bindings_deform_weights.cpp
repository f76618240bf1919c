// The weight gradient of deform_conv.
#include <pybind11/stl.h>

#include "bindings.h"
#include "cuda/deform_conv/deform_conv_bwd_weights_run.h"
#include "deform_call.h"

namespace dyhead::simt {
namespace {

using namespace dyhead::cuda;

template <class T>
py::array gradient(const DeformCall& call, const py::array& source, const py::array& predictions,
                   const py::object& gates, const py::array& grad_rows, bool allow_tf32,
                   const DeviceLimits& device) {
  using F = compute_t<T>;
  const DeformShape& s = call.shape;
  const auto x = DeviceArray<T>::copy_of("source", source);
  const auto offsets = DeviceArray<F>::copy_of("predictions", predictions);
  const auto rows = DeviceArray<T>::copy_of("grad_rows", grad_rows);
  const auto grad_weights = DeviceArray<F>::poisoned(
      "grad_weights",
      {call.weights, s.out_channels, s.channels / s.groups, s.kernel_h, s.kernel_w});
  DeformBwdParams params{};
  params.call = &call;
  params.source = x.data();
  params.predictions = offsets.data();
  std::deque<DeviceArray<F>> gate_memory;
  if (!gates.is_none()) {
    gate_memory.push_back(DeviceArray<F>::copy_of("gates", gates));
    params.gates = gate_memory.back().data();
  }
  params.grad_weights = grad_weights.data();
  Workspaces workspaces;
  check_launch("run_deform_bwd_weights", run_deform_bwd_weights(params, rows.data(), allow_tf32,
                                                                device, workspaces, nullptr));
  return grad_weights.to_numpy();
}

void bind(py::module_& module) {
  py::module_ m =
      module.def_submodule("deform_weights", "csrc/cuda/deform_conv/deform_conv_bwd_weights_run.h");
  m.def("weight_slices", &weight_slices, py::arg("tiles"), py::arg("blocks"), py::arg("resident"));
  m.def(
      "slices",
      [](const Tables& tables, const std::string& dtype, int64_t channels, int64_t out_channels,
         bool vectors, bool allow_tf32, const DeviceLimits& device) {
        const DeformCall call =
            read_call(tables, true, named_dtype(dtype), channels, out_channels, 1);
        const DeformMath math = deform_math(call.shape.dtype, allow_tf32);
        const DeformWeightColumns columns = weight_columns(call.shape, math, vectors, device);
        std::vector<std::vector<int32_t>> launches;  // slices of each matrix
        for (const DeformLaunch& launch : deform_launches(call, columns.depth)) {
          const DeformWeightSlices slices = cut_into_slices(launch, columns, device);
          launches.emplace_back();
          for (int32_t i = 0; i < slices.count; ++i) {
            launches.back().push_back(slices.first[i + 1] - slices.first[i]);
          }
        }
        return py::make_tuple(columns.outs, columns.blocks(call.shape), launches);
      },
      py::arg("tables"), py::arg("dtype"), py::arg("channels"), py::arg("out_channels"),
      py::kw_only(), py::arg("vectors") = true, py::arg("allow_tf32") = false, py::arg("device"));
  m.def(
      "gradient",
      [](const std::string& dtype_name, const py::array& source, const py::array& predictions,
         const py::object& gates, const py::array& grad_rows, int64_t weights, const Tables& tables,
         bool mask_logits, bool allow_tf32, const DeviceLimits& device) {
        const DType dtype = named_dtype(dtype_name);
        const DeformCall call =
            read_call(tables, mask_logits, dtype, source.shape(1), grad_rows.shape(1), weights);
        return dispatch_dtype(dtype, [&](auto zero) {
          return gradient<decltype(zero)>(call, source, predictions, gates, grad_rows, allow_tf32,
                                          device);
        });
      },
      py::arg("dtype"), py::arg("source"), py::arg("predictions"), py::arg("gates"),
      py::arg("grad_rows"), py::arg("weights"), py::arg("tables"), py::arg("mask_logits"),
      py::kw_only(), py::arg("allow_tf32") = false, py::arg("device"));
}

const Bindings bindings(bind);

}  // namespace
}  // namespace dyhead::simt
