// What an operator's call gives to its launches: a stream, memory, and what the device allows.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "tile/launch.cuh"

namespace dyhead {

namespace cuda {

struct DeviceLimits {
  int processors;
  size_t shared_bytes;  // dynamic shared memory that a block may have
  bool wgmma = false;   // whether kernels for compute capability 9.0 may be launched
};

}  // namespace cuda

class Context {
 public:
  virtual ~Context() = default;

  // Device memory, aligned to 256 bytes, that lasts until the call's launches are through.
  virtual void* allocate(int64_t bytes) = 0;
  virtual void* allocate_zeros(int64_t bytes) = 0;
  virtual cudaStream_t stream() const = 0;
  virtual cuda::DeviceLimits limits() const = 0;
  // Raises unless `error` is cudaSuccess.
  virtual void check(cudaError_t error) const = 0;

  // Raises where a block cannot have `bytes` of dynamic shared memory. Every device has 48 KB.
  void check_shared_memory(size_t bytes) const {
    constexpr size_t kEverywhere = 48 * 1024;
    if (bytes <= kEverywhere || bytes <= limits().shared_bytes) return;
    throw std::runtime_error(
        "expected channels whose values fit the " + std::to_string(limits().shared_bytes) +
        " bytes of shared memory that a block of this device has, got " + std::to_string(bytes) +
        " bytes; run this layer under backend(\"reference\")");
  }
};

}  // namespace dyhead
