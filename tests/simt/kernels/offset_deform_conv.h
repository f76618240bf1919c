// Both calls of offset_deform_conv, forward and backward, as csrc/host/offset_deform_conv.cpp and
// csrc/cuda/deform_conv/deform_conv.cpp run them. A library of its own, so that bugs can be planted
// in the order of launches.
#pragma once

#include <functional>

#include "cuda/context.h"
#include "cuda/deform_conv/deform_conv_bwd.h"

namespace dyhead::simt_test {

struct OffsetDeformDevice {
  cuda::DeviceLimits limits;
  std::function<void*(int64_t)> allocate;
  bool allow_tf32;
};

// `predict`, the offset convolution, gets its `call` from that of `read`, the jobs.
cudaError_t run_offset_deform_fwd(DeformFwdParams predict, const DeformFwdParams& read,
                                  const OffsetDeformDevice& device);
cudaError_t run_offset_deform_bwd(DeformBwdParams predict, const DeformBwdParams& read,
                                  const OffsetDeformDevice& device);

}  // namespace dyhead::simt_test
