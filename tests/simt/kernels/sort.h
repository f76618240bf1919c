// The sort of items in shared memory, by itself.
#pragma once

#include <cstdint>

#include "cuda/tile/launch.cuh"

namespace dyhead::simt_test {

// order = the positions of the sorted keys, one block.
struct SortParams {
  const uint32_t* keys;  // [count]
  uint32_t* order;       // [count]
  int count;
  uint32_t first, range;  // of the keys
};
cudaError_t launch_sort(const SortParams& params, cudaStream_t stream);

}  // namespace dyhead::simt_test
