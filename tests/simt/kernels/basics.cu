#include "basics.h"

#include "cuda/tile/primitives.cuh"

namespace dyhead::simt_test {

using namespace dyhead::cuda;

__global__ void __launch_bounds__(kBlockThreads) reverse_kernel(ReverseParams p) {
  DYHEAD_SHARED(float, row, kBlockThreads);
  const size_t start = size_t{blockIdx.x} * kBlockThreads;
  row[threadIdx.x] = p.in[start + threadIdx.x];
  if (p.with_barrier) __syncthreads();
  p.out[start + threadIdx.x] = row[kBlockThreads - 1 - threadIdx.x];
}

__global__ void warp_kernel(WarpParams p) {
  const int i = static_cast<int>(threadIdx.x);
  const unsigned mask = __ballot_sync(kFullMask, 1);
  const float x = p.in[i];
  p.shuffled[i] = __shfl_sync(mask, x, 5, p.width);
  p.shuffled[p.threads + i] = __shfl_up_sync(mask, x, 1, p.width);
  p.shuffled[2 * p.threads + i] = __shfl_down_sync(mask, x, 2, p.width);
  p.shuffled[3 * p.threads + i] = __shfl_xor_sync(mask, x, 4, p.width);
  p.shuffled[4 * p.threads + i] = warp_sum(x);
  p.votes[i] = __ballot_sync(mask, x > 0.0f);
  p.votes[p.threads + i] = static_cast<unsigned>(__any_sync(mask, x > 0.0f));
  p.votes[2 * p.threads + i] = static_cast<unsigned>(__all_sync(mask, x > 0.0f));
}

__global__ void __launch_bounds__(kBlockThreads) atomic_kernel(AtomicParams p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= p.n) return;
  const int x = p.in[i];
  const float f = static_cast<float>(x);
  atomicAdd(p.float_sum, f);
  atomicAdd(p.double_sum, static_cast<double>(x));
  atomicMin(p.extremes, x);
  atomicMax(p.extremes + 1, x);
  atomicAdd(p.sum, static_cast<unsigned long long>(x));
  red_add_v4(p.vector_sum, make_float4(f, 2.0f * f, 3.0f * f, 4.0f * f));
  while (atomicCAS(p.lock, 0u, 1u) != 0u) {
  }
  const unsigned before = p.lock[1];
  __syncwarp(1u << (threadIdx.x % kWarpSize));  // others run while the lock is held
  p.lock[1] = before + 1;
  __threadfence();
  atomicExch(p.lock, 0u);
}

__global__ void __launch_bounds__(kBlockThreads) handshake_kernel(HandshakeParams p) {
  DYHEAD_SHARED(float, warp_sums, kBlockThreads / kWarpSize);
  const float sum = warp_sum(p.in[size_t{blockIdx.x} * kBlockThreads + threadIdx.x]);
  if (threadIdx.x % kWarpSize == 0) warp_sums[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (float part : warp_sums) total += part;
  p.partial[blockIdx.x] = total;
  atomic_add_acq_rel(p.arrived, 1);
  wait_until(p.arrived, gridDim.x);
  float all = 0.0f;
  for (unsigned block = 0; block < gridDim.x; ++block) all += p.partial[block];
  p.out[blockIdx.x] = all;
}

__global__ void __launch_bounds__(kBlockThreads) async_copy_kernel(AsyncCopyParams p) {
  DYHEAD_SHARED(float4, rows, kBlockThreads);
  const unsigned i = threadIdx.x;
  cp_async_zfill<16>(&rows[i], p.in + 4 * i, 4 * p.valid);
  cp_async_commit();
  if (p.with_wait) cp_async_wait_group<0>();
  __syncthreads();
  const unsigned other = kBlockThreads - 1 - i;
  const float4 row = rows[other];
  store_vec(p.out + 4 * other, Vec<float, 4>{{row.x, row.y, row.z, row.w}});
  if (!p.with_wait) cp_async_wait_all();
}

__global__ void fault_kernel(FaultParams p) {
  DYHEAD_SHARED(float, values, 64);
  DYHEAD_SHARED(float, neighbour, 64);
  float* first = dynamic_shared<float>(0, 64);
  const unsigned i = threadIdx.x;
  const unsigned lane = i % kWarpSize;
  neighbour[i] = 0.0f;
  first[i] = 0.0f;
  float result = p.in[i];
  switch (p.fault) {
    case Fault::kNone:
      break;
    case Fault::kDivergentBarrier:
      if (i < 40) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case Fault::kBarrierAfterCollective:
      if (lane != 7) __syncwarp();
      __syncthreads();
      break;
    case Fault::kDivergentCollective:
      if (lane < 16) {
        result = __shfl_sync(kFullMask, result, 0);
      } else {
        result = static_cast<float>(__any_sync(kFullMask, result > 0.0f));
      }
      break;
    case Fault::kMaskMismatch:
      result = __shfl_sync(lane == 3 ? 0x0000ffffu : kFullMask, result, 0);
      break;
    case Fault::kNotInMask:
      __syncwarp(0x0000ffffu);
      break;
    case Fault::kNeverSignalled:
      if (i == 0) wait_until(p.flag, 1);
      __syncthreads();
      break;
    case Fault::kSpinLock:
      while (atomicCAS(p.flag, 1u, 0u) != 1u) {
      }
      break;
    case Fault::kPartialWarpMma: {
      if (lane == 31) return;
      double acc[2] = {};
      mma_m8n8k4_f64(acc, 1.0, 1.0);
      result = static_cast<float>(acc[0]);
      break;
    }
    case Fault::kUninitialisedShared:
      result = values[i];
      break;
    case Fault::kSharedOverrun:
      values[i + 1] = result;
      break;
    case Fault::kSharedUnderrun:
      (values + i)[-1] = result;
      break;
    case Fault::kDynamicOverrun:
      first[i + 1] = result;
      break;
    case Fault::kDynamicOverlap:
      dynamic_shared<float>(4 * 63, 64)[i] = result;
      break;
    case Fault::kGlobalOverrun:
      p.out[i + 1] = result;
      break;
    case Fault::kGlobalOverread:
      result = p.in[i + 1];
      break;
    case Fault::kMisalignedVector:
      result = load_vec<2>(p.in + 1)[0];
      break;
    case Fault::kMisalignedCopy:
      cp_async<16>(neighbour + 1, p.in);
      break;
    case Fault::kCopyOutsideShared:
      cp_async<16>(neighbour + 64, p.in);
      break;
    case Fault::kUnwrittenOutput:
      if (i == 63) return;
      break;
    case Fault::kForgottenCopy:
      if (i == 5) cp_async<4>(neighbour, p.in);
      break;
  }
  p.out[i] = result;
}

cudaError_t launch_reverse(const ReverseParams& params, cudaStream_t stream) {
  return launch(reverse_kernel,
                {.grid = dim3(static_cast<unsigned>(params.blocks)),
                 .block = dim3(kBlockThreads),
                 .stream = stream},
                params);
}

cudaError_t launch_warp(const WarpParams& params, cudaStream_t stream) {
  return launch(
      warp_kernel,
      {.grid = dim3(1), .block = dim3(static_cast<unsigned>(params.threads)), .stream = stream},
      params);
}

cudaError_t launch_atomic(const AtomicParams& params, cudaStream_t stream) {
  const int blocks = (params.n + kBlockThreads - 1) / kBlockThreads;
  return launch(
      atomic_kernel,
      {.grid = dim3(static_cast<unsigned>(blocks)), .block = dim3(kBlockThreads), .stream = stream},
      params);
}

cudaError_t launch_handshake(const HandshakeParams& params, cudaStream_t stream) {
  return launch(handshake_kernel,
                {.grid = dim3(static_cast<unsigned>(params.blocks)),
                 .block = dim3(kBlockThreads),
                 .stream = stream,
                 .cooperative = params.cooperative},
                params);
}

cudaError_t launch_async_copy(const AsyncCopyParams& params, cudaStream_t stream) {
  return launch(async_copy_kernel,
                {.grid = dim3(1), .block = dim3(kBlockThreads), .stream = stream}, params);
}

cudaError_t launch_fault(const FaultParams& params, cudaStream_t stream) {
  return launch(
      fault_kernel,
      {.grid = dim3(1), .block = dim3(64), .shared_bytes = 128 * sizeof(float), .stream = stream},
      params);
}

}  // namespace dyhead::simt_test
