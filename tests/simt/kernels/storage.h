// Storage conversions and flags: the parts of the primitives that the other test kernels leave out.
#pragma once

#include "common/dtypes.h"
#include "cuda/tile/launch.cuh"

namespace dyhead::simt_test {

// One block: halves, tripled. The last warp converts and then publishes a flag that the others
// await.
template <class T>
struct StorageParams {
  const T* in;     // [n], n a multiple of 8
  T* by_value;     // [n] 3 in, through to_compute and from_compute
  T* by_pair;      // [n] 3 in, through unpack2 and pack2
  float* sum;      // [1] zero at launch: sum of in
  unsigned* flag;  // [1] zero at launch
  unsigned* seen;  // [128] the flag as each thread saw it: n
  int n;
};
cudaError_t launch_storage(const StorageParams<bfloat16>& params, cudaStream_t stream);
cudaError_t launch_storage(const StorageParams<float16>& params, cudaStream_t stream);

}  // namespace dyhead::simt_test
