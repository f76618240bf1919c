// Checks of tensors that arrive through the dispatcher. Python has checked what users pass; these
// keep a direct call of torch.ops.dyhead from reading out of bounds.
#pragma once

#include <initializer_list>
#include <sstream>
#include <string>

#include "../common/dispatch.h"
#include "interface.h"

namespace dyhead {

using torch::stable::Tensor;

inline std::string shape_string(std::initializer_list<int64_t> sizes) {
  std::ostringstream text;
  text << '[';
  for (const int64_t* size = sizes.begin(); size != sizes.end(); ++size) {
    text << (size == sizes.begin() ? "" : ", ") << *size;
  }
  text << ']';
  return text.str();
}

inline std::string shape_string(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << ']';
  return text.str();
}

// Raises unless `t` is contiguous, of the given shape and type, and on the device of `like`.
inline void check_tensor(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes,
                         ScalarType type, const Tensor& like) {
  bool fits = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) fits = fits && t.size(d++) == size;
  STD_TORCH_CHECK(fits, "expected ", name, " ", shape_string(sizes), ", got ", shape_string(t));
  STD_TORCH_CHECK(t.is_contiguous(), "expected a contiguous ", name, "; call .contiguous() on it");
  STD_TORCH_CHECK(t.scalar_type() == type, "expected ", name, " of the type ", toString(type),
                  ", got ", toString(t.scalar_type()));
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device() == like.get_device(), "expected ",
                  name, " on the device of the rows");
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16, got ",
                      toString(t.scalar_type()));
  }
}

// The type that statistics and parameters have where the rows have the type of `t`.
inline ScalarType compute_type_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace dyhead
