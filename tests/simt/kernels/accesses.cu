#include "accesses.h"

#include "cuda/tile/primitives.cuh"

namespace dyhead::simt_test {

using namespace dyhead::cuda;

constexpr int kFloats = 4096;

template <int N>
DYHEAD_DEVICE void round_trip(float* shared, float* out, int lane, int stride) {
  store_vec(shared + N * lane * stride, Vec<float, N>{});
  __syncwarp();
  const Vec<float, N> v = load_vec<N>(shared + N * lane * stride);
  __syncwarp();
  if (v[0] != 0.0f) out[0] = v[0];
}

__global__ void __launch_bounds__(kWarpSize) accesses_kernel(AccessParams p) {
  DYHEAD_SHARED(float, shared, kFloats);
  const int lane = static_cast<int>(threadIdx.x);
  const int at = lane * p.stride;
  float sum = 0.0f;
  switch (p.pattern) {
    case Pattern::kLoad4:
      sum = p.in[at];
      break;
    case Pattern::kLoad16:
      sum = load_vec<4>(p.in + 4 * at)[3];
      break;
    case Pattern::kStore4:
      p.out[at] = 1.0f;
      break;
    case Pattern::kShared4:
      return round_trip<1>(shared, p.out, lane, p.stride);
    case Pattern::kShared8:
      return round_trip<2>(shared, p.out, lane, p.stride);
    case Pattern::kShared16:
      return round_trip<4>(shared, p.out, lane, p.stride);
    case Pattern::kSharedRow:
      for (int i = 0; i < 4; ++i) sum += shared[4 * at + i];
      break;
    case Pattern::kBroadcast:
      sum = shared[17];
      break;
    case Pattern::kLdmatrix: {
      uint32_t registers[4];
      ldmatrix(registers, shared + 4 * at);
      sum = __uint_as_float(registers[0] & registers[3]);
      break;
    }
    case Pattern::kAsync:
      cp_async<16>(shared + 4 * at, p.in + 4 * lane);
      cp_async_wait_all();
      break;
    case Pattern::kAtomic4:
      red_add(p.out + at, 1.0f);
      break;
    case Pattern::kAtomic16:
      red_add_v4(p.out + 4 * at, make_float4(1.0f, 1.0f, 1.0f, 1.0f));
      break;
    case Pattern::kUneven:
      for (int i = 0; i <= lane; ++i) sum += p.in[kWarpSize * lane + i];
      break;
    case Pattern::kTwice:
      sum = p.in[at];
      __syncwarp();
      sum += p.in[at];
      break;
    case Pattern::kMma: {
      float acc[4] = {};
      mma_m16n8k16<bfloat16>(acc, {}, {});
      sum = acc[0];
      break;
    }
  }
  // Lanes of other values than the test's would store, and be counted.
  if (sum < 0.0f) p.out[0] = sum;
}

cudaError_t launch_accesses(const AccessParams& params, cudaStream_t stream) {
  return launch(accesses_kernel, {.grid = {1}, .block = {kWarpSize}, .stream = stream}, params);
}

}  // namespace dyhead::simt_test
