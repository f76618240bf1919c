// The device that a library is for. The .cpp files of this folder are compiled into both libraries:
// each checks an operator's arguments, allocates its results, calls the kernels (run_<operator>,
// which csrc/cpu and csrc/cuda define alike) and registers the operator. The schemas, which are the
// same for every device, are the CPU library's; it is loaded first.
#pragma once

#include "tensors.h"

#if defined(USE_CUDA)

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <vector>

#include "../cuda/context.h"

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
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like_.get_device(), &stream));
    return static_cast<cudaStream_t>(stream);
  }

  cuda::DeviceLimits limits() const override {
    int processors = 0;
    int shared_bytes = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, like_.get_device()));
    check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                 like_.get_device()));
    return {processors, static_cast<size_t>(shared_bytes)};
  }

  void check(cudaError_t error) const override { STD_CUDA_CHECK(error); }

 private:
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
