// From a storage type known at run time to a template argument.
#pragma once

#include <type_traits>

#include "dtypes.h"

namespace dyhead {

enum class DType { kFloat64, kFloat32, kBFloat16, kFloat16 };

inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Bytes of the compute type, which statistics and parameters have.
inline int64_t compute_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

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
