#include "../../common/upsample.h"
#include "deform_conv.cuh"
#include "deform_conv_bwd.h"

namespace dyhead::cuda {
namespace {

// A block handles a tile of pixels; a thread one channel, or several.
template <class T>
__global__ void __launch_bounds__(kTileThreads, 4)
    deform_bwd_rows_kernel(const __grid_constant__ DeformBwdRowsParams p) {
  using F = compute_t<T>;
  DYHEAD_SHARED(int32_t, pixels, kMaxInputRows);
  DYHEAD_SHARED(F, up_weights, kMaxInputRows);
  const TilePlace place = find_tile(p.launch, static_cast<int32_t>(blockIdx.x));
  const DeformJob& job = p.launch.jobs[place.job];
  const int thread = tile_thread();
  if (thread < p.tile_rows) {
    const OutputPixel at = tile_pixel(p.launch, place, thread, p.tile_rows);
    pixels[thread] = at.index;
    up_weights[thread] =
        at.index < 0 || !p.moments
            ? F(0)
            : upsampled_mean_weight<F>(at.y, job.out.height, job.up_height, job.up_mode) *
                  upsampled_mean_weight<F>(at.x, job.out.width, job.up_width, job.up_mode);
  }
  __syncthreads();
  const int64_t channels = p.launch.shape.out_channels;
  const int64_t first = (job.out.first_row + place.image * job.out.pixels()) * channels;
  const int64_t map =
      (static_cast<int64_t>(p.launch.first_job + place.job) * p.launch.shape.images + place.image) *
      channels;
  const F share = F(1) / static_cast<F>(job.out.pixels());
  for (int c = thread; c < channels; c += kTileThreads) {
    F mean = F(0), constant = F(0), slope = F(0), up = F(0);
    if (p.moments) {
      mean = static_cast<const F*>(p.mean)[map + c];
      constant = share * static_cast<const F*>(p.grad_mean)[map + c];
      slope = F(2) * share * static_cast<const F*>(p.grad_var)[map + c];
      up = static_cast<const F*>(p.grad_up_mean)[map + c];
    }
    F sum = F(0);
#pragma unroll 4
    for (int row = 0; row < p.tile_rows; ++row) {
      if (pixels[row] < 0) continue;
      const int64_t at = first + pixels[row] * channels + c;
      F grad = p.out_in_compute_dtype
                   ? static_cast<const F*>(p.grad_out)[at]
                   : static_cast<F>(to_compute(static_cast<const T*>(p.grad_out)[at]));
      if (p.moments) {
        const F centred = static_cast<F>(to_compute(static_cast<const T*>(p.out)[at])) - mean;
        grad += constant + slope * centred + up * up_weights[row];
      }
      sum += grad;
      if constexpr (std::is_same_v<T, float>) {
        if (p.round_tf32) grad = __uint_as_float(to_tf32(grad));
      }
      static_cast<T*>(p.rows)[at] = from_compute<T>(grad);
    }
    if (p.bias_partial != nullptr) {
      static_cast<F*>(p.bias_partial)[static_cast<int64_t>(blockIdx.x) * channels + c] = sum;
    }
  }
}

}  // namespace

cudaError_t launch_deform_bwd_rows(const DeformBwdRowsParams& params, cudaStream_t stream) {
  if (params.launch.tile_count == 0) return cudaSuccess;
  const LaunchConfig config{.grid = dim3(static_cast<unsigned>(params.launch.tile_count)),
                            .block = dim3(kTileThreads),
                            .stream = stream};
  return dispatch_dtype(params.launch.shape.dtype, [&](auto zero) {
    return launch(deform_bwd_rows_kernel<decltype(zero)>, config, params);
  });
}

}  // namespace dyhead::cuda
