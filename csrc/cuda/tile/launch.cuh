// Launching kernels, and the shared memory of a launch, on the device and in the host emulation.
// Host compilers read it too, for the runtime's types in launchers' declarations.
#pragma once

#include <cstddef>
#include <type_traits>

#if defined(DYHEAD_SIMT)
#include <source_location>

#include "simt.h"
// The emulation reports where a collective was called; the parameter does not exist on the device.
#define DYHEAD_WHERE , std::source_location where = std::source_location::current()
#else
#include <cuda_runtime.h>
#define DYHEAD_WHERE
#endif

#define DYHEAD_DEVICE __device__ __forceinline__

// A static shared array `type name[count]`, aligned for 16-byte access. Contents are undefined at
// block start (poisoned in the emulation).
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
// Arrays of one kernel must not overlap; asked for one by one, the emulation guards each of them.
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
  bool cooperative = false;  // all blocks resident at once, so that they may wait for each other
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

// More than 48 KB of shared memory, dynamic and static together, must be asked for, kernel by
// kernel. All the device offers is: launches of several threads then never lower it for each other.
template <class Params>
cudaError_t allow_shared(void (*kernel)(Params), size_t shared_bytes) {
  constexpr size_t kSurelyAllowed = 32 * 1024;
  if (shared_bytes <= kSurelyAllowed) return cudaSuccess;
  cudaFuncAttributes attributes{};
  int device = 0;
  int most = 0;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  most -= static_cast<int>(attributes.sharedSizeBytes);
  if (error != cudaSuccess || attributes.maxDynamicSharedSizeBytes >= most) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
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

// Blocks of `kernel` that the current device holds at once: the largest cooperative grid. 0 if a
// block does not fit or a query fails; launching an empty grid then returns an error.
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
    static_cast<void>(cudaGetLastError());  // the caller reports it; nobody else should
    return 0;
  }
  return processors * per_processor;
}

#endif

}  // namespace dyhead::cuda
