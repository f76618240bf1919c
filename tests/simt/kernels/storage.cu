#include "storage.h"

#include "cuda/tile/primitives.cuh"

namespace dyhead::simt_test {

using namespace dyhead::cuda;

constexpr int kThreads = 128;
constexpr int kVector = 8;

template <class T>
DYHEAD_DEVICE float convert(const StorageParams<T>& p, int start) {
  const Vec<T, kVector> in = load_vec_readonly<kVector>(p.in + start);
  Vec<T, kVector> out;
  float sum = 0.0f;
  for (int j = 0; j < kVector; ++j) {
    const float x = to_compute(in[j]);
    sum += x;
    out[j] = from_compute<T>(3.0f * x);
  }
  store_vec(p.by_value + start, out);
  for (int j = 0; j < kVector; j += 2) {
    const uint32_t pair = static_cast<uint32_t>(in[j].bits) | uint32_t{in[j + 1].bits} << 16;
    const float2 x = unpack2<T>(pair);
    const uint32_t tripled = pack2<T>(3.0f * x.x, 3.0f * x.y);
    p.by_pair[start + j] = T{static_cast<uint16_t>(tripled & 0xffffu)};
    p.by_pair[start + j + 1] = T{static_cast<uint16_t>(tripled >> 16)};
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) storage_kernel(StorageParams<T> p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (threadIdx.x >= kThreads - kWarpSize) {
    float sum = 0.0f;
    for (int i = lane * kVector; i < p.n; i += kWarpSize * kVector) sum += convert(p, i);
    red_add(p.sum, sum);
    __syncwarp();
    if (lane == 0) store_release(p.flag, static_cast<unsigned>(p.n));
  }
  wait_until(p.flag, static_cast<unsigned>(p.n));
  p.seen[threadIdx.x] = load_acquire(p.flag);
}

template <class T>
cudaError_t launch_typed(const StorageParams<T>& params, cudaStream_t stream) {
  return launch(storage_kernel<T>, {.grid = dim3(1), .block = dim3(kThreads), .stream = stream},
                params);
}

cudaError_t launch_storage(const StorageParams<bfloat16>& params, cudaStream_t stream) {
  return launch_typed(params, stream);
}

cudaError_t launch_storage(const StorageParams<float16>& params, cudaStream_t stream) {
  return launch_typed(params, stream);
}

}  // namespace dyhead::simt_test
