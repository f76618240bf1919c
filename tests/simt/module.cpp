// The Python module of the host-compiled kernels. Each operator binds its launchers in its own
// file, bindings_<op>.cpp; declare and call its function here.
#include <pybind11/pybind11.h>

#include "simt.h"

namespace dyhead::simt {

void bind_emulator(pybind11::module_& module);
void bind_block_coefficients(pybind11::module_& module);
void bind_deform_conv(pybind11::module_& module);
void bind_deform_weights(pybind11::module_& module);
void bind_dynamic_relu(pybind11::module_& module);
void bind_fuse_branches(pybind11::module_& module);
void bind_pack_levels(pybind11::module_& module);

}  // namespace dyhead::simt

PYBIND11_MODULE(dyhead_simt, module) {
  using namespace dyhead::simt;
  module.doc() = "CUDA kernels compiled for the host and run on emulated threads.";
  module.def("set_seed", &set_seed, "Seeds the order in which threads and blocks run.");
  module.def("set_resident_blocks", &set_resident_blocks,
             "Sets how many blocks a cooperative launch may have (4 at import).");
  bind_emulator(module);
  bind_block_coefficients(module);
  bind_deform_conv(module);
  bind_deform_weights(module);
  bind_dynamic_relu(module);
  bind_fuse_branches(module);
  bind_pack_levels(module);
}
