// The device that a library is for. The .cpp files of this folder are compiled into both libraries:
// each checks an operator's arguments, allocates its results, calls the kernels (run_<operator>,
// which csrc/cpu and csrc/cuda define alike) and registers the operator. The schemas, which are the
// same for every device, are the CPU library's; it is loaded first.
#pragma once

#include "tensors.h"

#if defined(USE_CUDA)

#include <vector>

#include "../cuda/context.h"
#include "../cuda/mma_choice.h"

#define DYHEAD_SCHEMAS(m) \
  [[maybe_unused]] static void schemas(torch::stable::detail::StableLibrary& m)
#define DYHEAD_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(dyhead, CUDA, m)

namespace dyhead {

inline constexpr bool kIsCuda = true;

// A call on the device and the current stream of a tensor, which is current for its lifetime.
class Call final : public Context {
 public:
  explicit Call(const Tensor& like) : like_(like), guard_(like.get_device()) {}

  // From torch's allocator: given back at the end of the call, memory is used again only after
  // this stream's launches.
  void* allocate(int64_t bytes) override {
    return keep(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
  }

  void* allocate_zeros(int64_t bytes) override {
    return keep(torch::stable::new_zeros(like_, {bytes}, ScalarType::Byte));
  }

  cudaStream_t stream() const override {
    return current_stream(static_cast<int32_t>(like_.get_device()));
  }

  cuda::DeviceLimits limits() const override {
    const int processors = attribute(cudaDevAttrMultiProcessorCount);
    const int shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const bool wgmma = cuda::wants_wgmma(
        std::getenv("DYHEAD_CUDA_MMA"), attribute(cudaDevAttrComputeCapabilityMajor),
        attribute(cudaDevAttrComputeCapabilityMinor), DYHEAD_HAS_SM90A != 0);
    return {processors, static_cast<size_t>(shared_bytes), wgmma};
  }

  void check(cudaError_t error) const override { STD_CUDA_CHECK(error); }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, like_.get_device()));
    return value;
  }

  void* keep(const Tensor& workspace) {
    workspaces_.push_back(workspace);
    return workspace.mutable_data_ptr();
  }

  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  std::vector<Tensor> workspaces_;
};

}  // namespace dyhead

#else

#include "../cpu/context.h"

#define DYHEAD_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(dyhead, m)
#define DYHEAD_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(dyhead, CPU, m)

namespace dyhead {

inline constexpr bool kIsCuda = false;

class Call final : public Context {
 public:
  explicit Call(const Tensor&) {}
};

}  // namespace dyhead

#endif
