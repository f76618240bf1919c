// Host code that the forward and the backward of deform_conv share.
#pragma once

#include <initializer_list>

#include "deform_conv_tiling.h"

namespace dyhead::cuda {

// Why a call cannot run, or null. A cudaError_t could not say what to change.
inline const char* deform_problem(const DeformCall& call) {
  constexpr int64_t kMaxTiles = 1 << 29;
  const int64_t channels = call.shape.channels + call.shape.out_channels;
  if (channels > (1 << 24)) return "expected at most 2^24 channels";
  if (call.shape.images > (1 << 24)) return "expected at most 2^24 images";
  for (const MapShape& map : call.sources) {
    if (map.pixels() * call.shape.channels * element_bytes(call.shape.dtype) >> 36) {
      return "expected source maps of less than 64 GiB per image";
    }
    // The backward sorts samples by 32-bit keys (deform_conv_samples.cuh).
    if ((int64_t{1} + map.height) * (int64_t{1} + map.width) > (int64_t{1} << 32) - 8) {
      return "expected source maps of (height + 1) * (width + 1) < 2^32";
    }
  }
  if (call.weights > (1 << 15) - 1) return "expected at most 2^15 - 1 matrices of weights";
  // Tiles have at least 64 rows, panels at least 32 columns.
  const int64_t panels =
      call.shape.groups * ceil_div(call.shape.out_channels / call.shape.groups, 32);
  if (count_tiles(call, 64) > kMaxTiles / panels) return "expected at most 2^29 tiles";
  if (deform_launches(call, 64).empty()) {
    return "expected jobs of at most 128 terms on 32 different source maps";
  }
  return nullptr;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether the channels of the source allow 16-byte loads.
inline bool reads_vectors(const DeformShape& s, const void* source) {
  const int64_t unit = 16 / element_bytes(s.dtype);
  return aligned(source) && s.channels / s.groups % unit == 0 &&
         s.channels / s.deform_groups % unit == 0;
}

// Whether rows of outputs allow 16-byte stores and loads.
inline bool has_vector_outputs(const DeformShape& s, const void* out) {
  return aligned(out) && s.out_channels / s.groups % 8 == 0;
}

// Packs all weight matrices and, unless `packed_bias` is null, their biases. The first launch
// clears `zeros`.
inline cudaError_t pack_weights(const DeformShape& s, const DeformWeights& weights,
                                const DeformPanels& panels, bool transposed, DeformMath math,
                                void* packed, void* packed_bias,
                                std::initializer_list<DeformZeros> zeros, cudaStream_t stream) {
  DeformPackParams params{};
  params.transposed = transposed;
  params.shape = s;
  params.panels = panels;
  params.dtype = weights.dtype;
  params.math = math;
  params.packed = packed;
  params.packed_bias = packed_bias;
  std::copy(zeros.begin(), zeros.end(), params.zeros);
  const int32_t count = static_cast<int32_t>(weights.matrices.size());
  for (int32_t first = 0; first < count; first += kMaxMatrices) {
    params.first_matrix = first;
    params.matrices = std::min(kMaxMatrices, count - first);
    for (int32_t i = 0; i < params.matrices; ++i) {
      params.weights[i] = weights.matrices[first + i];
      params.bias[i] = packed_bias == nullptr ? nullptr : weights.bias[first + i];
    }
    if (cudaError_t error = launch_deform_pack(params, stream); error != cudaSuccess) return error;
    std::fill(std::begin(params.zeros), std::end(params.zeros), DeformZeros{});
  }
  return cudaSuccess;
}

// The max number of taps that a kernel of `shared_bytes(taps)` stages in shared memory at once; 0
// if the kernel does not fit the device.
template <class SharedBytes>
int32_t taps_at_once(SharedBytes&& shared_bytes, const DeviceLimits& device) {
  for (int32_t taps : {kMaxTapsAtOnce, kFewTapsAtOnce}) {
    if (fits(shared_bytes(taps), device)) return taps;
  }
  return 0;
}

}  // namespace dyhead::cuda
