// Launches kernels and gives them shared memory, on the device and in the host emulation. Host
// compilers read it too, since launchers are declared with the runtime's types.
#pragma once

#include <cstddef>
#include <type_traits>

#if defined(DYHEAD_SIMT)
#include <source_location>

#include "simt.h"
// The source location that the emulation reports for a collective; the parameter does not exist on
// the device.
#define DYHEAD_WHERE , std::source_location where = std::source_location::current()
#else
#include <cuda_runtime.h>
#define DYHEAD_WHERE
#endif

#define DYHEAD_DEVICE __device__ __forceinline__

// A static shared array `type name[count]`, aligned for 16-byte access. Its contents are undefined
// when a block starts (poisoned in the emulation).
#if defined(DYHEAD_SIMT)
#define DYHEAD_SHARED(type, name, count)                                                    \
  type(&name)[count] = []() -> type(&)[count] {                                             \
    static const char key = 0;                                                              \
    return *static_cast<type(*)[count]>(                                                    \
        ::dyhead::simt::static_shared(&key, #name, sizeof(type) * (count), alignof(type))); \
  }()
#else
#define DYHEAD_SHARED(type, name, count) \
  __shared__ alignas(alignof(type) > 16 ? alignof(type) : 16) type name[count]
#endif

namespace dyhead::cuda {

// `count` elements at `byte_offset` of the launch's dynamic shared memory (base aligned to 1024).
// The arrays of a kernel must not overlap. Requested one by one, each is guarded by the emulation.
template <class T>
DYHEAD_DEVICE T* dynamic_shared(size_t byte_offset, [[maybe_unused]] size_t count) {
#if defined(DYHEAD_SIMT)
  return static_cast<T*>(simt::dynamic_shared(byte_offset, sizeof(T) * count));
#else
  extern __shared__ __align__(1024) unsigned char dyhead_dynamic_shared[];
  return reinterpret_cast<T*>(dyhead_dynamic_shared + byte_offset);
#endif
}

// All of the launch's dynamic shared memory.
template <class T>
DYHEAD_DEVICE T* dynamic_shared() {
#if defined(DYHEAD_SIMT)
  return static_cast<T*>(simt::dynamic_shared(0, simt::dynamic_shared_bytes()));
#else
  return dynamic_shared<T>(0, 0);
#endif
}

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;  // dynamic shared memory
  cudaStream_t stream = nullptr;
  bool cooperative = false;  // all blocks are resident at once, so they may wait for each other
};

#if defined(DYHEAD_SIMT)

template <class Params>
cudaError_t launch(void (*kernel)(Params), const LaunchConfig& config,
                   const std::type_identity_t<Params>& params DYHEAD_WHERE) {
  static_assert(std::is_trivially_copyable_v<Params>);
  struct Call {
    void (*kernel)(Params);
    const Params& params;
  } call{kernel, params};
  return simt::launch({.grid = config.grid,
                       .block = config.block,
                       .shared_bytes = config.shared_bytes,
                       .cooperative = config.cooperative,
                       .kernel = reinterpret_cast<const void*>(kernel),
                       .run_thread =
                           [](const void* opaque) {
                             const Call& self = *static_cast<const Call*>(opaque);
                             self.kernel(self.params);
                           },
                       .call = &call,
                       .where = where});
}

template <class Params>
int max_active_blocks(void (*)(Params), int /*threads*/, size_t /*shared_bytes*/) {
  return simt::resident_blocks();
}

#else

namespace detail {

// A kernel must opt in to more than 48 KB of shared memory, dynamic and static together. It opts in
// to all that the device offers, so that concurrent launches never lower the limit for each other.
template <class Params>
cudaError_t allow_shared(void (*kernel)(Params), size_t shared_bytes) {
  constexpr size_t kSurelyAllowed = 32 * 1024;
  if (shared_bytes <= kSurelyAllowed) return cudaSuccess;
  cudaFuncAttributes attributes{};
  int device = 0;
  int max_bytes = 0;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&max_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  max_bytes -= static_cast<int>(attributes.sharedSizeBytes);
  if (error != cudaSuccess || attributes.maxDynamicSharedSizeBytes >= max_bytes) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_bytes);
}

}  // namespace detail

// Launches kernel(params) and returns the launch error.
template <class Params>
cudaError_t launch(void (*kernel)(Params), const LaunchConfig& config,
                   const std::type_identity_t<Params>& params) {
  static_assert(std::is_trivially_copyable_v<Params>);
  if (cudaError_t error = detail::allow_shared(kernel, config.shared_bytes); error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t native{};
  native.gridDim = config.grid;
  native.blockDim = config.block;
  native.dynamicSmemBytes = config.shared_bytes;
  native.stream = config.stream;
  native.attrs = &cooperative;
  native.numAttrs = config.cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&native, kernel, params);
}

// How many blocks of `kernel` the current device holds at once: the largest cooperative grid. 0 if
// a block does not fit or a query fails; launching an empty grid then returns an error.
template <class Params>
int max_active_blocks(void (*kernel)(Params), int threads, size_t shared_bytes) {
  int device = 0;
  int processors = 0;
  int per_processor = 0;
  if (detail::allow_shared(kernel, shared_bytes) != cudaSuccess ||
      cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads,
                                                    shared_bytes) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // the caller reports it; no later call should
    return 0;
  }
  return processors * per_processor;
}

#endif

}  // namespace dyhead::cuda
