// How a file bindings_<operator>.cpp adds to the Python module of the emulated kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace dyhead::simt {

using Bind = void (*)(pybind11::module_& module);

// Declared at namespace scope, as `const Bindings bindings(bind);`: the module calls `bind` when
// Python imports it.
class Bindings {
 public:
  explicit Bindings(Bind bind);
};

}  // namespace dyhead::simt
