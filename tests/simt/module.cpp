// The Python module of the host-compiled kernels. Each operator binds its launchers in a file of
// its own, bindings_<operator>.cpp, which registers itself.
#include <vector>

#include "bindings.h"
#include "simt.h"

namespace dyhead::simt {
namespace {

// Inside a function: the objects of other files may register before this file's would exist.
std::vector<Bind>& registered() {
  static std::vector<Bind> binds;
  return binds;
}

}  // namespace

Bindings::Bindings(Bind bind) { registered().push_back(bind); }

}  // namespace dyhead::simt

PYBIND11_MODULE(dyhead_simt, module) {
  using namespace dyhead::simt;
  module.doc() = "CUDA kernels compiled for the host and run on emulated threads.";
  module.def("set_seed", &set_seed, "Seeds the order in which threads and blocks run.");
  module.def("set_resident_blocks", &set_resident_blocks,
             "Sets how many blocks a cooperative launch may have (4 at import).");
  for (Bind bind : registered()) bind(module);
}
