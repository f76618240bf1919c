// The launchers of block_coefficients, called as the operator calls them.
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cuda/block_coefficients/block_coefficients.h"
#include "device_array.h"

namespace dyhead::simt {
namespace {

using namespace dyhead::cuda;

// A parameter's storage type and array.
using NamedArray = std::pair<std::string, py::array>;

struct Tables {
  std::vector<int> job_levels, job_branches;
  int num_groups;
};

// Parameters in emulated device memory, alive as long as this is.
class DeviceParameters {
 public:
  Parameter add(const char* name, const NamedArray& parameter) {
    const DType dtype = named_dtype(parameter.first);
    return dispatch_dtype(dtype, [&](auto zero) {
      using Array = DeviceArray<decltype(zero)>;
      const auto array = std::make_shared<Array>(Array::copy_of(name, parameter.second));
      arrays_.push_back(array);
      return Parameter{array->data(), dtype};
    });
  }

 private:
  std::vector<std::shared_ptr<void>> arrays_;
};

template <class Params>
void fill(Params& p, DeviceParameters& device, DType dtype, const py::array& mean,
          const std::vector<NamedArray>& norm_weights, const std::vector<NamedArray>& norm_biases,
          const NamedArray& gate_weight, const NamedArray& fc1_weight, const NamedArray& fc2_weight,
          const Tables& tables) {
  BlockCoefficientsShape& s = p.shape;
  s.images = mean.shape(1);
  s.jobs = static_cast<int32_t>(mean.shape(0));
  s.channels = static_cast<int32_t>(mean.shape(2));
  s.groups = tables.num_groups;
  s.hidden = static_cast<int32_t>(fc1_weight.second.shape(0));
  s.norms = static_cast<int32_t>(norm_weights.size());
  s.dtype = dtype;
  int16_t used = 0;
  while (used < s.jobs) {
    p.tables.first[s.levels] = used;
    for (int32_t j = 0; j < s.jobs; ++j) {
      if (tables.job_levels.at(j) == s.levels) p.tables.order[used++] = static_cast<int16_t>(j);
    }
    s.max_jobs = std::max(s.max_jobs, used - p.tables.first[s.levels]);
    p.tables.first[++s.levels] = used;
  }
  for (int32_t j = 0; j < s.jobs; ++j) {
    p.tables.norm[j] = static_cast<int16_t>(tables.job_branches.at(j));
  }
  for (int32_t b = 0; b < s.norms; ++b) {
    p.parameters.norm_weight[b] = device.add("norm_weight", norm_weights[b]);
    p.parameters.norm_bias[b] = device.add("norm_bias", norm_biases[b]);
  }
  p.parameters.gate_weight = device.add("gate_weight", gate_weight);
  p.parameters.fc1_weight = device.add("fc1_weight", fc1_weight);
  p.parameters.fc2_weight = device.add("fc2_weight", fc2_weight);
}

template <class F>
py::tuple forward(DType dtype, const py::array& mean, const py::array& var,
                  const py::array& up_mean, const std::vector<NamedArray>& norm_weights,
                  const std::vector<NamedArray>& norm_biases, const NamedArray& gate_weight,
                  const NamedArray& gate_bias, const NamedArray& fc1_weight,
                  const NamedArray& fc1_bias, const NamedArray& fc2_weight,
                  const NamedArray& fc2_bias, const Tables& tables, double eps) {
  BlockCoefficientsFwdParams p{};
  DeviceParameters device;
  fill(p, device, dtype, mean, norm_weights, norm_biases, gate_weight, fc1_weight, fc2_weight,
       tables);
  BlockCoefficientsShape& s = p.shape;
  s.eps = eps;
  p.parameters.gate_bias = device.add("gate_bias", gate_bias);
  p.parameters.fc1_bias = device.add("fc1_bias", fc1_bias);
  p.parameters.fc2_bias = device.add("fc2_bias", fc2_bias);
  const auto m = DeviceArray<F>::copy_of("mean", mean);
  const auto v = DeviceArray<F>::copy_of("var", var);
  const auto u = DeviceArray<F>::copy_of("up_mean", up_mean);
  const auto scale = DeviceArray<F>::poisoned("scale", {s.jobs, s.images, s.channels});
  const auto shift = DeviceArray<F>::poisoned("shift", {s.levels, s.images, s.channels});
  const auto coefficients =
      DeviceArray<F>::poisoned("coefficients", {s.levels, s.images, 4, s.channels});
  const auto norms = DeviceArray<F>::poisoned("norms", {s.jobs, s.images, s.norm_values()});
  const auto layers = DeviceArray<F>::poisoned("layers", {s.levels, s.images, s.layer_values()});
  p.mean = m.data();
  p.var = v.data();
  p.up_mean = u.data();
  p.scale = scale.data();
  p.shift = shift.data();
  p.coefficients = coefficients.data();
  p.norms = norms.data();
  p.layers = layers.data();
  check_launch("launch_block_coefficients_fwd", launch_block_coefficients_fwd(p, nullptr));
  return py::make_tuple(scale.to_numpy(), shift.to_numpy(), coefficients.to_numpy(),
                        norms.to_numpy(), layers.to_numpy());
}

template <class F>
py::tuple backward(DType dtype, const py::array& grad_scale, const py::array& grad_shift,
                   const py::array& grad_coefficients, const py::array& mean,
                   const py::array& up_mean, const py::array& norms, const py::array& layers,
                   const std::vector<NamedArray>& norm_weights,
                   const std::vector<NamedArray>& norm_biases, const NamedArray& gate_weight,
                   const NamedArray& fc1_weight, const NamedArray& fc2_weight, const Tables& tables,
                   const std::vector<int>& wanted) {
  BlockCoefficientsBwdParams p{};
  DeviceParameters device;
  fill(p, device, dtype, mean, norm_weights, norm_biases, gate_weight, fc1_weight, fc2_weight,
       tables);
  const BlockCoefficientsShape& s = p.shape;
  const auto grad_a = DeviceArray<F>::copy_of("grad_scale", grad_scale);
  const auto grad_b = DeviceArray<F>::copy_of("grad_shift", grad_shift);
  const auto grad_k = DeviceArray<F>::copy_of("grad_coefficients", grad_coefficients);
  const auto m = DeviceArray<F>::copy_of("mean", mean);
  const auto u = DeviceArray<F>::copy_of("up_mean", up_mean);
  const auto kept_norms = DeviceArray<F>::copy_of("norms", norms);
  const auto kept_layers = DeviceArray<F>::copy_of("layers", layers);
  const auto workspace =
      DeviceArray<F>::poisoned("workspace", {BlockCoefficientsPartials<F>::size(s)});
  p.grad_scale = grad_a.data();
  p.grad_shift = grad_b.data();
  p.grad_coefficients = grad_k.data();
  p.mean = m.data();
  p.up_mean = u.data();
  p.norms = kept_norms.data();
  p.layers = kept_layers.data();
  p.workspace = workspace.data();
  WantedArrays results(wanted);
  p.grad_mean = results.add<F>("grad_mean", {s.jobs, s.images, s.channels});
  p.grad_var = results.add<F>("grad_var", {s.jobs, s.images, s.channels});
  p.grad_up_mean = results.add<F>("grad_up_mean", {s.jobs, s.images, s.channels});
  p.grad_norm_weight = results.add<F>("grad_norm_weight", {s.norms, s.channels});
  p.grad_norm_bias = results.add<F>("grad_norm_bias", {s.norms, s.channels});
  p.grad_gate_weight = results.add<F>("grad_gate_weight", {s.channels});
  p.grad_gate_bias = results.add<F>("grad_gate_bias", {1});
  p.grad_fc1_weight = results.add<F>("grad_fc1_weight", {s.hidden, s.channels});
  p.grad_fc1_bias = results.add<F>("grad_fc1_bias", {s.hidden});
  p.grad_fc2_weight = results.add<F>("grad_fc2_weight", {4 * s.channels, s.hidden});
  p.grad_fc2_bias = results.add<F>("grad_fc2_bias", {4 * s.channels});
  check_launch("launch_block_coefficients_bwd", launch_block_coefficients_bwd(p, nullptr));
  return results.to_numpy().attr("values")();
}

// Calls f with a zero of the compute type that moments of this array have.
template <class Use>
py::tuple with_compute_type(const py::array& mean, Use&& use) {
  if (mean.dtype().equal(py::dtype::of<double>())) return use(double{}, DType::kFloat64);
  return use(float{}, DType::kFloat32);
}

void bind(py::module_& module) {
  py::module_ m = module.def_submodule("block_coefficients",
                                       "csrc/cuda/block_coefficients/block_coefficients.h");
  m.def("forward",
        [](const py::array& mean, const py::array& var, const py::array& up_mean,
           const std::vector<NamedArray>& norm_weights, const std::vector<NamedArray>& norm_biases,
           const NamedArray& gate_weight, const NamedArray& gate_bias, const NamedArray& fc1_weight,
           const NamedArray& fc1_bias, const NamedArray& fc2_weight, const NamedArray& fc2_bias,
           const std::vector<int>& job_levels, const std::vector<int>& job_branches, int num_groups,
           double eps) {
          return with_compute_type(mean, [&](auto zero, DType dtype) {
            return forward<decltype(zero)>(dtype, mean, var, up_mean, norm_weights, norm_biases,
                                           gate_weight, gate_bias, fc1_weight, fc1_bias, fc2_weight,
                                           fc2_bias, {job_levels, job_branches, num_groups}, eps);
          });
        });
  m.def("backward",
        [](const py::array& grad_scale, const py::array& grad_shift,
           const py::array& grad_coefficients, const py::array& mean, const py::array& up_mean,
           const py::array& norms, const py::array& layers,
           const std::vector<NamedArray>& norm_weights, const std::vector<NamedArray>& norm_biases,
           const NamedArray& gate_weight, const NamedArray& fc1_weight,
           const NamedArray& fc2_weight, const std::vector<int>& job_levels,
           const std::vector<int>& job_branches, int num_groups, const std::vector<int>& wanted) {
          return with_compute_type(mean, [&](auto zero, DType dtype) {
            return backward<decltype(zero)>(dtype, grad_scale, grad_shift, grad_coefficients, mean,
                                            up_mean, norms, layers, norm_weights, norm_biases,
                                            gate_weight, fc1_weight, fc2_weight,
                                            {job_levels, job_branches, num_groups}, wanted);
          });
        });
}

const Bindings bindings(bind);

}  // namespace
}  // namespace dyhead::simt
