// From a storage type known at run time to a template argument.
#pragma once

#include <type_traits>

#include "dtypes.h"

namespace dyhead {

enum class DType { kFloat64, kFloat32, kBFloat16, kFloat16 };

// Calls f(T{}) with the storage type T that `dtype` names, and returns its result.
template <class F>
auto dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(bfloat16{});
    case DType::kFloat16:
      return f(float16{});
    default:
      return f(float{});
  }
}

}  // namespace dyhead
