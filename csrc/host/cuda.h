// The current device and stream, and CUDA errors as exceptions.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "tensors.h"

namespace dyhead {

// Makes the tensor's device the current one for the guard's lifetime.
inline torch::stable::accelerator::DeviceGuard device_guard(const Tensor& t) {
  return torch::stable::accelerator::DeviceGuard(t.get_device());
}

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Raises where a block of the current device cannot have `bytes` of dynamic shared memory.
inline void check_shared_memory(size_t bytes) {
  constexpr size_t kEverywhere = 48 * 1024;
  if (bytes <= kEverywhere) return;
  int device = 0;
  int most = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_TORCH_CHECK(bytes <= static_cast<size_t>(most), "expected channels whose values fit the ",
                  most, " bytes of shared memory that a block of this device has, got ", bytes,
                  " bytes; run this layer under backend(\"reference\")");
}

}  // namespace dyhead
