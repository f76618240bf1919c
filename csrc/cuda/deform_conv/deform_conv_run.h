// Host code that the forward and the backward of deform_conv share.
#pragma once

#include <span>

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

// Weights to pack: `set` says how, but not yet by which launch.
struct DeformPack {
  DeformPackSet set;
  const DeformWeights* weights;
};

// Packs all weight matrices and, where there is memory for them, their biases. What a set clears is
// cleared by the launch of its first matrix.
inline cudaError_t pack_weights(std::span<const DeformPack> packs, DeformMath math,
                                cudaStream_t stream) {
  DeformPackParams params{};
  params.math = math;
  int32_t used = 0;  // pointers
  const auto flush = [&] {
    const cudaError_t error = params.sets == 0 ? cudaSuccess : launch_deform_pack(params, stream);
    params.sets = used = 0;
    return error;
  };
  for (const DeformPack& pack : packs) {
    const DeformWeights& weights = *pack.weights;
    const auto count = static_cast<int32_t>(weights.matrices.size());
    for (int32_t first = 0; first < count;) {
      if (params.sets == kMaxPackSets || used == kMaxMatrices) {
        if (cudaError_t error = flush(); error != cudaSuccess) return error;
      }
      DeformPackSet& set = params.set[params.sets++] = pack.set;
      if (first > 0) std::fill(std::begin(set.zeros), std::end(set.zeros), DeformZeros{});
      set.first_matrix = first;
      set.first_pointer = used;
      set.matrices = std::min(kMaxMatrices - used, count - first);
      for (int32_t end = first + set.matrices; first < end; ++first, ++used) {
        params.weights[used] = weights.matrices[first];
        params.bias[used] = set.packed_bias == nullptr ? nullptr : weights.bias[first];
      }
    }
  }
  return flush();
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
