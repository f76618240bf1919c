// The launchers of fuse_branches, called as the operator calls them.
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bindings.h"
#include "cuda/fuse_branches/fuse_branches.h"
#include "deform_call.h"

namespace dyhead::simt {
namespace {

using namespace dyhead::cuda;

// From the lists that csrc/host/tables.h describes, which are taken to be right.
FuseTables read_tables(DType dtype, int64_t images, int64_t channels, const Numbers& branch_sizes,
                       const Numbers& level_sizes, const Numbers& level_branches, int up_mode) {
  FuseTables t{};
  t.images = images;
  t.channels = channels;
  t.dtype = dtype;
  t.maps = maps_of(branch_sizes, images);
  auto index = level_branches.begin();
  for (const MapShape& out : maps_of(level_sizes, images)) {
    FuseLevel level{out, 0, {}, static_cast<UpsampleMode>(up_mode)};
    for (int b = 0; b < kMaxBranches; ++b, ++index) {
      if (*index >= 0) level.branch[level.branches++] = static_cast<int32_t>(*index);
    }
    t.out_rows += images * out.pixels();
    t.levels.push_back(level);
  }
  return t;
}

// Rows travel flat. What they hold beyond their elements comes first and moves them off alignment.
template <class T>
T* skip(const DeviceArray<T>& flat, int64_t elements) {
  return flat.data() + (flat.shape(0) - elements);
}

struct Call {
  FuseTables tables;
  std::optional<FuseTiling> tiling;
  py::ssize_t skew;
  py::array y, scale, shift, coefficients;

  py::ssize_t rows() const {
    int64_t rows = 0;
    for (const MapShape& map : tables.maps) rows += tables.images * map.pixels();
    return rows;
  }
};

template <class T>
struct Inputs {
  using F = compute_t<T>;

  DeviceArray<T> y;
  DeviceArray<F> scale, shift, coefficients;

  explicit Inputs(const Call& c)
      : y(DeviceArray<T>::copy_of("y", c.y)),
        scale(DeviceArray<F>::copy_of("scale", c.scale)),
        shift(DeviceArray<F>::copy_of("shift", c.shift)),
        coefficients(DeviceArray<F>::copy_of("coefficients", c.coefficients)) {}
};

template <class T>
py::object forward(const Call& c) {
  const FuseTables& t = c.tables;
  const Inputs<T> in(c);
  const auto out = DeviceArray<T>::poisoned("out", {c.skew + t.out_rows * t.channels});
  const FuseBranchesFwdParams params{&t,
                                     skip(in.y, c.rows() * t.channels),
                                     in.scale.data(),
                                     in.shift.data(),
                                     in.coefficients.data(),
                                     skip(out, t.out_rows * t.channels)};
  const FuseLaunches launches = fuse_launches(t, c.tiling.value_or(fuse_fwd_tiling(t.channels)));
  check_launch("launch_fuse_branches_fwd", launch_fuse_branches_fwd(params, launches, nullptr));
  return out.to_numpy();
}

template <class T>
py::dict backward(const Call& c, const py::array& grad_out, const std::vector<int>& wanted) {
  using F = compute_t<T>;
  using Kept = std::conditional_t<std::is_same_v<T, float16>, float, T>;
  const FuseTables& t = c.tables;
  const Inputs<T> in(c);
  const auto g = DeviceArray<T>::copy_of("grad_out", grad_out);
  const py::ssize_t maps = static_cast<py::ssize_t>(t.maps.size());
  const py::ssize_t levels = static_cast<py::ssize_t>(t.levels.size());
  FuseBranchesBwdParams params{&t,
                               skip(g, t.out_rows * t.channels),
                               skip(in.y, c.rows() * t.channels),
                               in.scale.data(),
                               in.shift.data(),
                               in.coefficients.data(),
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  WantedArrays results(wanted);
  params.grad_y = results.add<T>("grad_y", {c.skew + c.rows() * t.channels}, c.skew);
  params.grad_scale = results.add<F>("grad_scale", {maps, t.images, t.channels});
  params.grad_shift = results.add<F>("grad_shift", {levels, t.images, t.channels});
  params.grad_coefficients = results.add<F>("grad_coefficients", {levels, t.images, 4, t.channels});
  const FuseLaunches launches = fuse_launches(t, c.tiling.value_or(fuse_bwd_tiling(t.channels)));
  const auto partial =
      DeviceArray<F>::poisoned("partial", {launches.partials, kFuseSums, t.channels});
  const auto grad_z = DeviceArray<Kept>::poisoned("grad_z", {launches.grad_z_rows, t.channels});
  const FuseBwdWorkspace workspace{wants_sums(params) ? partial.data() : nullptr,
                                   params.grad_y != nullptr ? grad_z.data() : nullptr};
  check_launch("launch_fuse_branches_bwd",
               launch_fuse_branches_bwd(params, launches, workspace, nullptr));
  return results.to_numpy();
}

void bind(py::module_& module) {
  py::module_ m = module.def_submodule("fuse_branches", "csrc/cuda/fuse_branches/fuse_branches.h");
  m.attr("levels_per_launch") = kFuseLevels;
  py::class_<FuseTiling>(m, "Tiling")
      .def(py::init(
               [](int32_t width_log2, int32_t height_log2, int32_t max_blocks, int32_t max_images) {
                 return FuseTiling{width_log2, height_log2, max_blocks, max_images};
               }),
           py::arg("width_log2"), py::arg("height_log2"), py::arg("max_blocks"),
           py::arg("max_images") = 32768)
      .def_readonly("width_log2", &FuseTiling::width_log2)
      .def_readonly("height_log2", &FuseTiling::height_log2)
      .def_readonly("max_blocks", &FuseTiling::max_blocks);
  m.def("fwd_tiling", &fuse_fwd_tiling, py::arg("channels"));
  m.def("bwd_tiling", &fuse_bwd_tiling, py::arg("channels"));
  py::class_<Call>(m, "Call")
      .def(
          py::init([](const std::string& dtype, int64_t images, int64_t channels,
                      const Numbers& branch_sizes, const Numbers& level_sizes,
                      const Numbers& level_branches, int up_mode, const py::array& y,
                      const py::array& scale, const py::array& shift, const py::array& coefficients,
                      py::ssize_t skew, const std::optional<FuseTiling>& tiling) {
            return Call{read_tables(named_dtype(dtype), images, channels, branch_sizes, level_sizes,
                                    level_branches, up_mode),
                        tiling,
                        skew,
                        y,
                        scale,
                        shift,
                        coefficients};
          }),
          py::arg("dtype"), py::arg("images"), py::arg("channels"), py::arg("branch_sizes"),
          py::arg("level_sizes"), py::arg("level_branches"), py::arg("up_mode"), py::arg("y"),
          py::arg("scale"), py::arg("shift"), py::arg("coefficients"), py::kw_only(),
          py::arg("skew") = 0, py::arg("tiling") = py::none())
      .def("forward",
           [](const Call& c) {
             return dispatch_dtype(c.tables.dtype,
                                   [&](auto zero) { return forward<decltype(zero)>(c); });
           })
      .def(
          "backward",
          [](const Call& c, const py::array& grad_out, const std::vector<int>& wanted) {
            return dispatch_dtype(c.tables.dtype, [&](auto zero) {
              return backward<decltype(zero)>(c, grad_out, wanted);
            });
          },
          py::arg("grad_out"), py::arg("wanted") = std::vector<int>(4, 1));
}

const Bindings bindings(bind);

}  // namespace
}  // namespace dyhead::simt
