// Which tensor-core instructions deform_conv may use, forward and backward to the input: host code.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace dyhead::cuda {

// Whether DYHEAD_CUDA_MMA, of this value or null, asks for wgmma on a device of this compute
// capability. `built`: whether the library has code for sm_90a.
//
// `auto` is `mma` until wgmma has run on a GPU and was faster there.
inline bool wants_wgmma(const char* setting, int major, int minor, bool built) {
  const std::string_view value = setting == nullptr ? "" : setting;
  if (value.empty() || value == "auto" || value == "mma") return false;
  if (value != "wgmma") {
    throw std::runtime_error("expected DYHEAD_CUDA_MMA to be auto, mma or wgmma, got '" +
                             std::string(value) + "'");
  }
  if (major != 9 || minor != 0) {
    throw std::runtime_error(
        "expected a GPU of compute capability 9.0 for DYHEAD_CUDA_MMA=wgmma, got " +
        std::to_string(major) + "." + std::to_string(minor) +
        "; unset DYHEAD_CUDA_MMA or set it to auto");
  }
  if (!built) {
    throw std::runtime_error(
        "expected a library with code for sm_90a for DYHEAD_CUDA_MMA=wgmma; build it with 90a in "
        "DYHEAD_CUDA_ARCHS, or unset DYHEAD_CUDA_MMA");
  }
  return true;
}

}  // namespace dyhead::cuda
