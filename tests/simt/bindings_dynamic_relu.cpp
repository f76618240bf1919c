// The launchers of dynamic_relu, called as the operator calls them.
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bindings.h"
#include "cuda/dynamic_relu/dynamic_relu.h"
#include "device_array.h"

namespace dyhead::simt {
namespace {

using namespace dyhead::cuda;

// Arrays [N, P, C] travel flat. What they hold beyond N * P * C elements comes first and moves the
// array off its alignment.
template <class T>
T* skip(const DeviceArray<T>& flat, const DynamicReluShape& s) {
  return flat.data() + (flat.shape(0) - s.images * s.pixels * s.channels);
}

template <class F>
struct Workspace {
  DeviceArray<F> partial;
  DeviceArray<F> grad_mean;
  DeviceArray<unsigned> arrived;

  Workspace(const DynamicReluShape& s, const DynamicReluGrid& grid, int quantities)
      : partial(DeviceArray<F>::poisoned(
            "partial", {s.images, grid.blocks_per_image, quantities, s.channels})),
        grad_mean(DeviceArray<F>::poisoned("grad_mean", {s.images, s.channels})),
        arrived(DeviceArray<unsigned>::zeros("arrived", {s.images})) {}

  DynamicReluWorkspace pointers() const {
    return {partial.data(), grad_mean.data(), arrived.data()};
  }
};

template <class T>
py::dict forward(py::ssize_t images, py::ssize_t pixels, const py::array& rows,
                 const py::array& fc1_weight, const py::array& fc1_bias,
                 const py::array& fc2_weight, const py::array& fc2_bias, DType dtype,
                 bool hard_sigmoid, py::ssize_t skew, const std::optional<DynamicReluGrid>& grid) {
  using F = compute_t<T>;
  const auto w1 = DeviceArray<F>::copy_of("fc1_weight", fc1_weight);
  const auto b1 = DeviceArray<F>::copy_of("fc1_bias", fc1_bias);
  const auto w2 = DeviceArray<F>::copy_of("fc2_weight", fc2_weight);
  const auto b2 = DeviceArray<F>::copy_of("fc2_bias", fc2_bias);
  const auto x = DeviceArray<T>::copy_of("rows", rows);
  const DynamicReluShape shape{images, pixels, w1.shape(1), w1.shape(0), dtype, hard_sigmoid};
  const auto out = DeviceArray<T>::poisoned("out", {skew + images * pixels * shape.channels});
  const auto mean = DeviceArray<F>::poisoned("mean", {images, shape.channels});
  const auto hidden = DeviceArray<F>::poisoned("hidden", {images, shape.hidden});
  const auto logits = DeviceArray<F>::poisoned("logits", {images, 4 * shape.channels});
  const DynamicReluFwdParams params{shape,         skip(x, shape), w1.data(),        b1.data(),
                                    w2.data(),     b2.data(),      skip(out, shape), mean.data(),
                                    hidden.data(), logits.data()};
  const DynamicReluGrid used =
      grid ? *grid : dynamic_relu_grid(images, pixels, dynamic_relu_fwd_resident(params));
  const Workspace<F> workspace(shape, used, 1);
  check_launch("launch_dynamic_relu_fwd",
               launch_dynamic_relu_fwd(params, used, workspace.pointers(), nullptr));
  py::dict result;
  result["out"] = out.to_numpy();
  result["mean"] = mean.to_numpy();
  result["hidden"] = hidden.to_numpy();
  result["logits"] = logits.to_numpy();
  return result;
}

template <class T>
py::dict backward(py::ssize_t images, py::ssize_t pixels, const py::array& grad_out,
                  const py::array& rows, const py::array& hidden, const py::array& logits,
                  const py::array& fc1_weight, const py::array& fc2_weight, DType dtype,
                  bool hard_sigmoid, py::ssize_t skew, const std::optional<DynamicReluGrid>& grid,
                  const std::vector<int>& wanted) {
  using F = compute_t<T>;
  const auto w1 = DeviceArray<F>::copy_of("fc1_weight", fc1_weight);
  const auto w2 = DeviceArray<F>::copy_of("fc2_weight", fc2_weight);
  const auto h = DeviceArray<F>::copy_of("hidden", hidden);
  const auto l = DeviceArray<F>::copy_of("logits", logits);
  const auto g = DeviceArray<T>::copy_of("grad_out", grad_out);
  const auto x = DeviceArray<T>::copy_of("rows", rows);
  const DynamicReluShape shape{images, pixels, w1.shape(1), w1.shape(0), dtype, hard_sigmoid};
  DynamicReluBwdParams params{shape,     skip(g, shape), skip(x, shape), h.data(), l.data(),
                              w1.data(), w2.data(),      nullptr,        nullptr,  nullptr};
  WantedArrays results(wanted);
  params.grad_rows = results.add<T>("grad_rows", {skew + images * pixels * shape.channels}, skew);
  params.grad_logits = results.add<F>("grad_logits", {images, 4 * shape.channels});
  params.grad_hidden = results.add<F>("grad_hidden", {images, shape.hidden});
  const DynamicReluGrid used =
      grid ? *grid : dynamic_relu_grid(images, pixels, dynamic_relu_bwd_resident(params));
  const Workspace<F> workspace(shape, used, 4);
  check_launch("launch_dynamic_relu_bwd",
               launch_dynamic_relu_bwd(params, used, workspace.pointers(), nullptr));
  return results.to_numpy();
}

void bind(py::module_& module) {
  py::module_ m = module.def_submodule("dynamic_relu", "csrc/cuda/dynamic_relu/dynamic_relu.h");
  py::class_<DynamicReluGrid>(m, "Grid")
      .def(py::init([](int blocks_per_image, int images_in_flight, bool cooperative) {
             return DynamicReluGrid{blocks_per_image, images_in_flight, cooperative};
           }),
           py::arg("blocks_per_image"), py::arg("images_in_flight"), py::arg("cooperative"))
      .def_readonly("blocks_per_image", &DynamicReluGrid::blocks_per_image)
      .def_readonly("images_in_flight", &DynamicReluGrid::images_in_flight)
      .def_readonly("cooperative", &DynamicReluGrid::cooperative);
  m.def("grid", &dynamic_relu_grid, py::arg("images"), py::arg("pixels"),
        py::arg("resident_blocks"));
  m.def(
      "forward",
      [](const std::string& dtype_name, py::ssize_t images, py::ssize_t pixels,
         const py::array& rows, const py::array& fc1_weight, const py::array& fc1_bias,
         const py::array& fc2_weight, const py::array& fc2_bias, bool hard_sigmoid,
         py::ssize_t skew, const std::optional<DynamicReluGrid>& grid) {
        const DType dtype = named_dtype(dtype_name);
        return dispatch_dtype(dtype, [&](auto zero) {
          return forward<decltype(zero)>(images, pixels, rows, fc1_weight, fc1_bias, fc2_weight,
                                         fc2_bias, dtype, hard_sigmoid, skew, grid);
        });
      },
      py::arg("dtype"), py::arg("images"), py::arg("pixels"), py::arg("rows"),
      py::arg("fc1_weight"), py::arg("fc1_bias"), py::arg("fc2_weight"), py::arg("fc2_bias"),
      py::kw_only(), py::arg("hard_sigmoid"), py::arg("skew") = 0, py::arg("grid") = py::none());
  m.def(
      "backward",
      [](const std::string& dtype_name, py::ssize_t images, py::ssize_t pixels,
         const py::array& grad_out, const py::array& rows, const py::array& hidden,
         const py::array& logits, const py::array& fc1_weight, const py::array& fc2_weight,
         bool hard_sigmoid, py::ssize_t skew, const std::optional<DynamicReluGrid>& grid,
         const std::vector<int>& wanted) {
        const DType dtype = named_dtype(dtype_name);
        return dispatch_dtype(dtype, [&](auto zero) {
          return backward<decltype(zero)>(images, pixels, grad_out, rows, hidden, logits,
                                          fc1_weight, fc2_weight, dtype, hard_sigmoid, skew, grid,
                                          wanted);
        });
      },
      py::arg("dtype"), py::arg("images"), py::arg("pixels"), py::arg("grad_out"), py::arg("rows"),
      py::arg("hidden"), py::arg("logits"), py::arg("fc1_weight"), py::arg("fc2_weight"),
      py::kw_only(), py::arg("hard_sigmoid"), py::arg("skew") = 0, py::arg("grid") = py::none(),
      py::arg("wanted") = std::vector<int>(3, 1));
}

const Bindings bindings(bind);

}  // namespace
}  // namespace dyhead::simt
