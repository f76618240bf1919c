// The names of torch's stable interface that the sources use, as names of its classic one. The
// sources are written for the former; see interface.h.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>

#undef STD_TORCH_CHECK  // newer releases have it here, too, and with the file in its message
#define STD_TORCH_CHECK TORCH_CHECK
#define STABLE_TORCH_LIBRARY_FRAGMENT TORCH_LIBRARY_FRAGMENT
#define STABLE_TORCH_LIBRARY_IMPL TORCH_LIBRARY_IMPL
#define TORCH_BOX TORCH_FN

namespace torch::stable {

using Tensor = at::Tensor;

inline Tensor new_empty(const Tensor& like, c10::IntArrayRef sizes,
                        std::optional<c10::ScalarType> type = std::nullopt) {
  return like.new_empty(sizes, like.options().dtype(type));
}

inline Tensor new_zeros(const Tensor& like, c10::IntArrayRef sizes, c10::ScalarType type) {
  return like.new_zeros(sizes, like.options().dtype(type));
}

inline Tensor empty_like(const Tensor& like) { return like.new_empty(like.sizes()); }

inline uint32_t get_num_threads() { return static_cast<uint32_t>(at::get_num_threads()); }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  at::parallel_for(begin, end, grain, f);
}

namespace detail {
using StableLibrary = torch::Library;
}

}  // namespace torch::stable

namespace dyhead {

using c10::ScalarType;
using c10::toString;

}  // namespace dyhead

#if defined(USE_CUDA)

#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#define STD_CUDA_CHECK C10_CUDA_CHECK

namespace torch::stable::accelerator {

// The device of an index among those of CUDA.
class DeviceGuard {
 public:
  explicit DeviceGuard(c10::DeviceIndex index) : guard_({c10::kCUDA, index}) {}

 private:
  c10::DeviceGuard guard_;
};

}  // namespace torch::stable::accelerator

namespace dyhead {

inline cudaStream_t current_stream(int32_t device) {
  return c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device));
}

}  // namespace dyhead

#endif
