#include "deform_conv_scatter.cuh"

namespace dyhead::cuda {
namespace {

constexpr int kFinishThreads = 256;

// Rounds the sums of grad_source to its type.
template <class T>
__global__ void __launch_bounds__(kFinishThreads, 4)
    deform_bwd_finish_kernel(const __grid_constant__ DeformBwdFinishParams p) {
  using F = compute_t<T>;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kFinishThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  T* out = static_cast<T*>(p.grad_source);
  if (p.fixed) {
    const auto fixed = FixedPoint<F>::of(p.largest, p.sum_bits);
    const auto* sums = static_cast<const long long*>(p.sums);
    for (int64_t i = first; i < p.count; i += threads) {
      const unsigned marks = NonFiniteMarks::bits(p.largest, i);
      const F sum = fixed.value(sums + i * FixedPoint<F>::kWords);
      out[i] = from_compute<T>(marks == 0u ? sum : NonFiniteMarks::value<F>(marks));
    }
    return;
  }
  const F* sums = static_cast<const F*>(p.sums);
  constexpr int kVector = 4;
  const int64_t vectors = reinterpret_cast<uintptr_t>(out) % 16 == 0 ? p.count / kVector : 0;
  for (int64_t i = first; i < vectors; i += threads) {
    const Vec<F, kVector> values = load_vec<kVector>(sums + i * kVector);
    Vec<T, kVector> rounded;
#pragma unroll
    for (int k = 0; k < kVector; ++k) rounded[k] = from_compute<T>(values[k]);
    store_vec(out + i * kVector, rounded);
  }
  for (int64_t i = vectors * kVector + first; i < p.count; i += threads) {
    out[i] = from_compute<T>(sums[i]);
  }
}

}  // namespace

cudaError_t launch_deform_bwd_finish(const DeformBwdFinishParams& params, cudaStream_t stream) {
  if (params.count == 0) return cudaSuccess;
  constexpr int64_t kMaxBlocks = 2048;
  const int64_t blocks = (params.count + kFinishThreads - 1) / kFinishThreads;
  const LaunchConfig config{
      .grid = dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks)),
      .block = dim3(kFinishThreads),
      .stream = stream};
  return dispatch_dtype(params.dtype, [&](auto zero) {
    return launch(deform_bwd_finish_kernel<decltype(zero)>, config, params);
  });
}

}  // namespace dyhead::cuda
