// Accesses whose costs are known, to test the counters.
#pragma once

#include <cstdint>

#include "cuda/tile/launch.cuh"

namespace dyhead::simt_test {

// What one warp does; strides are in units of what a lane accesses.
enum class Pattern {
  kLoad4,      // lane i loads the float at i * stride
  kLoad16,     // the four floats at 4 * i * stride, as a vector
  kStore4,     // as kLoad4
  kShared4,    // stores and loads floats in shared memory
  kShared8,    // pairs
  kShared16,   // fours
  kSharedRow,  // loads four floats one by one, which a device's compiler joins
  kBroadcast,  // loads one float of shared memory
  kLdmatrix,   // four matrices, rows of 16 * stride bytes
  kAsync,      // copies 16 bytes, stride in shared memory
  kAtomic4,    // adds as kLoad4
  kAtomic16,   // adds as kLoad16
  kUneven,     // lane i loads i + 1 neighbouring floats of its row of 32
  kTwice,      // kLoad4, twice from the same place
  kMma,        // one m16n8k16 product
};

struct AccessParams {
  const float* in;  // [4096]
  float* out;       // [4096]
  Pattern pattern;
  int stride;
};
cudaError_t launch_accesses(const AccessParams& params, cudaStream_t stream);

}  // namespace dyhead::simt_test
