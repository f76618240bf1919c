// What csrc/cuda/tile/launch.cuh computes before a launch.
#include "bindings.h"
#include "cuda/tile/launch.cuh"

namespace dyhead::simt {
namespace {

namespace py = pybind11;

void bind(py::module_& module) {
  py::module_ m = module.def_submodule("launch", "csrc/cuda/tile/launch.cuh");
  py::class_<cuda::ProcessorShare>(m, "ProcessorShare")
      .def(py::init([](int threads, int registers, int shared_bytes, int blocks) {
             return cuda::ProcessorShare{threads, registers, shared_bytes, blocks};
           }),
           py::arg("threads"), py::arg("registers"), py::arg("shared_bytes"),
           py::arg("blocks") = 1);
  m.def("carveout_percent", &cuda::carveout_percent, py::arg("block"), py::arg("all"),
        py::arg("reserved_bytes"));
}

const Bindings bindings(bind);

}  // namespace
}  // namespace dyhead::simt
