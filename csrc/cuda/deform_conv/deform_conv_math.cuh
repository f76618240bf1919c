// From the kind of arithmetic, known at run time, to the operand type of a tile product.
#pragma once

#include "../tile/tile_gemm.cuh"
#include "deform_conv.h"

namespace dyhead::cuda {

// Calls f(Op{}) with the operand type that `math` names, and returns its result.
template <class F>
auto dispatch_math(DeformMath math, F&& f) {
  switch (math) {
    case DeformMath::kBFloat16:
      return f(bfloat16{});
    case DeformMath::kFloat16:
      return f(float16{});
    case DeformMath::kTf32:
      return f(Tf32{});
    case DeformMath::kFloat64:
      return f(double{});
    default:
      return f(float{});
  }
}

}  // namespace dyhead::cuda
