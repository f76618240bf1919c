// Launches kernels and gives them shared memory, on the device and in the host emulation. Host
// compilers read it too, since launchers are declared with the runtime's types.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <tuple>
#include <type_traits>

#if defined(DYHEAD_SIMT)
#include <source_location>

#include "simt.h"
// The source location that the emulation reports for a collective; the parameter does not exist on
// the device.
#define DYHEAD_WHERE , DYHEAD_WHERE_ONLY
#define DYHEAD_WHERE_ONLY std::source_location where = std::source_location::current()
#else
#include <cuda_runtime.h>
#define DYHEAD_WHERE
#define DYHEAD_WHERE_ONLY
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
  unsigned cluster = 1;      // neighbouring blocks along x that share a cluster
};

// What a block takes from the multiprocessor that it runs on, or what all of its blocks have.
struct ProcessorShare {
  int threads;
  int registers;  // of a thread, or of all
  int shared_bytes;
  int blocks = 1;
};

// The part of a multiprocessor's shared memory, in percent, that its resident blocks use: as many
// as threads, registers and shared memory allow. The rest is better used as L1 cache. With each
// block comes a little memory that is `reserved_bytes` for the system.
inline int carveout_percent(ProcessorShare block, const ProcessorShare& all, int reserved_bytes) {
  const auto up = [](int64_t value, int64_t step) { return (value + step - 1) / step; };
  const int64_t bytes = block.shared_bytes + reserved_bytes;
  const int64_t registers = int64_t{8} * up(block.registers, 8) * block.threads;
  int64_t blocks = std::min(all.blocks, all.threads / block.threads);
  if (registers > 0) blocks = std::min(blocks, all.registers / registers);
  if (bytes > 0) blocks = std::min(blocks, all.shared_bytes / bytes);
  blocks = std::max<int64_t>(blocks, 1);
  return static_cast<int>(std::min<int64_t>(100, up(100 * blocks * bytes, all.shared_bytes)));
}

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
                       .cluster = config.cluster,
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

// Divides the memory of a multiprocessor between shared memory and L1 as the kernel needs it; left
// to itself, the driver guesses. Once per kernel, device and size of its shared memory, of which
// the largest part stays: concurrent launches never lower it for each other.
template <class Params>
cudaError_t prefer_carveout(void (*kernel)(Params), int threads, size_t shared_bytes) {
  using Key = std::tuple<const void*, int, size_t>;
  static std::mutex mutex;
  static std::set<Key> prepared;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  const Key key(reinterpret_cast<const void*>(kernel), device, shared_bytes);
  if (prepared.contains(key)) return cudaSuccess;
  cudaFuncAttributes attributes{};
  error = cudaFuncGetAttributes(&attributes, kernel);
  const auto limit = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
    return value;
  };
  const ProcessorShare all{.threads = limit(cudaDevAttrMaxThreadsPerMultiProcessor),
                           .registers = limit(cudaDevAttrMaxRegistersPerMultiprocessor),
                           .shared_bytes = limit(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                           .blocks = limit(cudaDevAttrMaxBlocksPerMultiprocessor)};
  const int reserved = limit(cudaDevAttrReservedSharedMemoryPerBlock);
  if (error != cudaSuccess) return error;
  const ProcessorShare block{
      .threads = threads,
      .registers = attributes.numRegs,
      .shared_bytes = static_cast<int>(attributes.sharedSizeBytes + shared_bytes)};
  const int percent = carveout_percent(block, all, reserved);
  if (percent > attributes.preferredShmemCarveout) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, percent);
  }
  if (error == cudaSuccess) prepared.insert(key);
  return error;
}

template <class Params>
cudaError_t prepare(void (*kernel)(Params), int threads, size_t shared_bytes) {
  const cudaError_t error = allow_shared(kernel, shared_bytes);
  return error == cudaSuccess ? prefer_carveout(kernel, threads, shared_bytes) : error;
}

}  // namespace detail

// Launches kernel(params) and returns the launch error.
template <class Params>
cudaError_t launch(void (*kernel)(Params), const LaunchConfig& config,
                   const std::type_identity_t<Params>& params) {
  static_assert(std::is_trivially_copyable_v<Params>);
  const dim3 block = config.block;
  const int threads = static_cast<int>(block.x * block.y * block.z);
  const cudaError_t error = detail::prepare(kernel, threads, config.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (config.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (config.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {config.cluster, 1, 1};
  }
  cudaLaunchConfig_t native{};
  native.gridDim = config.grid;
  native.blockDim = block;
  native.dynamicSmemBytes = config.shared_bytes;
  native.stream = config.stream;
  native.attrs = attributes;
  native.numAttrs = count;
  return cudaLaunchKernelEx(&native, kernel, params);
}

// How many blocks of `kernel` the current device holds at once: the largest cooperative grid. 0 if
// a block does not fit or a query fails; launching an empty grid then returns an error.
template <class Params>
int max_active_blocks(void (*kernel)(Params), int threads, size_t shared_bytes) {
  int device = 0;
  int processors = 0;
  int per_processor = 0;
  if (detail::prepare(kernel, threads, shared_bytes) != cudaSuccess ||
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
