#include "../tile/primitives.cuh"
#include "deform_conv_bwd.h"

namespace dyhead::cuda {
namespace {

constexpr int kGatherThreads = 256;

DYHEAD_DEVICE bool same_map(const MapShape& a, const MapShape& b) {
  return a.first_row == b.first_row && a.height == b.height && a.width == b.width;
}

// Whether a job reads value k of prediction pixel q; if so, sets which of its values and output
// pixels that is.
DYHEAD_DEVICE bool reader_of(const DeformJob& job, ReadRule rule, int32_t values, int32_t k,
                             int64_t q, int32_t& output_k, int64_t& output_pixel) {
  output_k = k;
  output_pixel = q;
  if (rule == ReadRule::kCrop) {
    const Division at = divide(q, job.predictions.width);
    output_pixel = at.quotient * job.out.width + at.remainder;
    return at.quotient < job.out.height && at.remainder < job.out.width;
  }
  if (rule == ReadRule::kFlat) {
    const int64_t i = k * job.predictions.pixels() + q;
    const int64_t size = job.out.pixels();
    if (i >= values * size) return false;
    const Division at = divide(i, size);
    output_k = static_cast<int32_t>(at.quotient);
    output_pixel = at.remainder;
  }
  return true;
}

// Adds the contributions of the jobs that read a map of predictions, in the order of the jobs. Only
// the map's first job does this.
template <class F>
DYHEAD_DEVICE void gather_predictions(const DeformBwdGatherParams& p, int owner) {
  const DeformLaunch& launch = p.launch;
  const DeformShape& s = launch.shape;
  const MapShape& map = launch.jobs[owner].predictions;
  const int32_t columns = s.prediction_columns();
  const int64_t count = s.images * map.pixels() * columns;
  F* grad = static_cast<F*>(p.grad_predictions) + map.first_row * columns;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kGatherThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x; i < count;
       i += threads) {
    const Division place = divide(i, columns);
    const int32_t column = static_cast<int32_t>(place.remainder);
    const Division row = divide(place.quotient, map.pixels());
    const int64_t image = row.quotient;
    const int64_t q = row.remainder;
    const bool is_mask = column >= s.offset_columns();
    const int32_t first_column = is_mask ? s.offset_columns() : 0;
    const int32_t values = is_mask ? columns - first_column : s.offset_columns();
    F sum = F(0);
    for (int j = owner; j < launch.job_count; ++j) {
      const DeformJob& job = launch.jobs[j];
      if (job.plain() || !same_map(job.predictions, map)) continue;
      int32_t k;
      int64_t pixel;
      if (!reader_of(job, is_mask ? job.mask_rule : job.offset_rule, values, column - first_column,
                     q, k, pixel)) {
        continue;
      }
      for (int32_t t = 0; t < job.terms; ++t) {
        const int64_t use = p.use_first[j] + (t * s.images + image) * job.out.pixels() + pixel;
        sum += static_cast<const F*>(p.derivatives)[use * columns + first_column + k];
      }
    }
    grad[i] += sum;
  }
}

template <class F>
__global__ void __launch_bounds__(kGatherThreads)
    gather_predictions_kernel(const __grid_constant__ DeformBwdGatherParams p) {
  const int owner = static_cast<int>(blockIdx.y);
  if (p.launch.jobs[owner].plain()) return;
  for (int j = 0; j < owner; ++j) {
    const DeformJob& job = p.launch.jobs[j];
    if (!job.plain() && same_map(job.predictions, p.launch.jobs[owner].predictions)) return;
  }
  gather_predictions<F>(p, owner);
}

// A block sums 32 channels of the bias of one matrix; each warp sums a part of the tiles.
template <class F>
__global__ void __launch_bounds__(1024)
    gather_bias_kernel(const __grid_constant__ DeformBwdGatherParams p) {
  constexpr int kWarps = 32;
  DYHEAD_SHARED(F, sums, kWarps * kWarpSize);
  const DeformLaunch& launch = p.launch;
  const int64_t channels = launch.shape.out_channels;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  const int matrix = static_cast<int>(blockIdx.y);
  F total = F(0);
  for (int j = 0; j < launch.job_count; ++j) {
    if (launch.terms[launch.jobs[j].first_term].weight != matrix) continue;
    const DeformTiles& tiles = launch.tiles[j];
    const int64_t count = tiles.per_image * launch.shape.images;
    const int64_t first = count * warp / kWarps;
    const int64_t last = count * (warp + 1) / kWarps;
    F sum = F(0);
    if (channel < channels) {
      const F* partial = static_cast<const F*>(p.bias_partial) + tiles.first * channels + channel;
#pragma unroll 8
      for (int64_t i = first; i < last; ++i) sum += partial[i * channels];
    }
    sums[warp * kWarpSize + lane] = sum;
    __syncthreads();
    if (warp == 0) {
      for (int w = 0; w < kWarps; ++w) total += sums[w * kWarpSize + lane];
    }
    __syncthreads();
  }
  if (warp == 0 && channel < channels) {
    static_cast<F*>(p.grad_bias)[matrix * channels + channel] += total;
  }
}

// A block sums the gate gradient of one image and source, over all tiles of the terms that read it.
template <class F>
__global__ void __launch_bounds__(kGatherThreads)
    gather_gates_kernel(const __grid_constant__ DeformBwdGatherParams p) {
  constexpr int kWarps = kGatherThreads / kWarpSize;
  DYHEAD_SHARED(F, sums, kWarps);
  const DeformLaunch& launch = p.launch;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t image = blockIdx.x;
  const int source = static_cast<int>(blockIdx.y);  // index in the launch
  F sum = F(0);
  for (int j = 0; j < launch.job_count; ++j) {
    const DeformJob& job = launch.jobs[j];
    const DeformTiles& tiles = launch.tiles[j];
    for (int t = 0; t < job.terms; ++t) {
      if (launch.terms[job.first_term + t].source != source) continue;
      for (int i = thread; i < tiles.per_image; i += kGatherThreads) {
        const int64_t tile = tiles.first + image * tiles.per_image + i;
        sum += static_cast<const F*>(p.gate_partial)[tile * p.max_terms + t];
      }
    }
  }
  sum = warp_sum(sum);
  if (thread % kWarpSize == 0) sums[thread / kWarpSize] = sum;
  __syncthreads();
  if (thread == 0) {
    F total = F(0);
    for (int w = 0; w < kWarps; ++w) total += sums[w];
    const int64_t at = image * launch.all_sources + launch.sources[source].index;
    static_cast<F*>(p.grad_gates)[at] += total;
  }
}

template <class F>
cudaError_t gather(const DeformBwdGatherParams& p, int32_t matrices, cudaStream_t stream) {
  const auto images = static_cast<unsigned>(p.launch.shape.images);
  const auto jobs = static_cast<unsigned>(p.launch.job_count);
  constexpr unsigned kBlocks = 256;
  cudaError_t error = cudaSuccess;
  bool predicted = false;
  for (int j = 0; j < p.launch.job_count; ++j) predicted = predicted || !p.launch.jobs[j].plain();
  if (predicted && p.grad_predictions != nullptr) {
    error =
        launch(gather_predictions_kernel<F>,
               {.grid = dim3(kBlocks, jobs), .block = dim3(kGatherThreads), .stream = stream}, p);
  }
  if (error == cudaSuccess && p.bias_partial != nullptr) {
    const auto parts = static_cast<unsigned>((p.launch.shape.out_channels + 31) / 32);
    error = launch(gather_bias_kernel<F>,
                   {.grid = dim3(parts, static_cast<unsigned>(matrices)),
                    .block = dim3(1024),
                    .stream = stream},
                   p);
  }
  if (error == cudaSuccess && p.gate_partial != nullptr) {
    error = launch(gather_gates_kernel<F>,
                   {.grid = dim3(images, static_cast<unsigned>(p.launch.source_count)),
                    .block = dim3(kGatherThreads),
                    .stream = stream},
                   p);
  }
  return error;
}

}  // namespace

cudaError_t launch_deform_bwd_gather(const DeformBwdGatherParams& params, int32_t matrices,
                                     cudaStream_t stream) {
  if (params.launch.tile_count == 0) return cudaSuccess;
  return params.launch.shape.dtype == DType::kFloat64 ? gather<double>(params, matrices, stream)
                                                      : gather<float>(params, matrices, stream);
}

}  // namespace dyhead::cuda
