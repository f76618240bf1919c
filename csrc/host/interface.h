// The part of PyTorch's C++ interface that the sources use. From torch 2.10 on it is the stable
// ABI, so that one build serves every later torch. Older ones lack some of it: for them the same
// names stand for the classic interface, and a build serves the one minor version that it was made
// for (cmake/torch_interface.cmake chooses).
#pragma once

#if defined(DYHEAD_CLASSIC_TORCH)

#include "classic_interface.h"

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(USE_CUDA)
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

namespace dyhead {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;

#if defined(USE_CUDA)
inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

}  // namespace dyhead

#endif
