#include "deform_conv_bwd.h"
#include "deform_sums.cuh"

namespace dyhead::cuda {
namespace {

constexpr int kGatherThreads = 256;

DYHEAD_DEVICE bool same_map(const MapShape& a, const MapShape& b) {
  return a.first_row == b.first_row && a.height == b.height && a.width == b.width;
}

// Whether a job reads value k of prediction pixel q, and then for which value and output pixel.
DYHEAD_DEVICE bool reader_of(const DeformJob& job, ReadRule rule, int32_t values, int32_t k,
                             int64_t q, int32_t& output_k, int64_t& output_pixel) {
  output_k = k;
  output_pixel = q;
  if (rule == ReadRule::kCrop) {
    const Division at = divide(q, job.predictions.width);
    output_pixel = at.quotient * job.out.width + at.rest;
    return at.quotient < job.out.height && at.rest < job.out.width;
  }
  if (rule == ReadRule::kFlat) {
    const int64_t i = k * job.predictions.pixels() + q;
    const int64_t size = job.out.pixels();
    if (i >= values * size) return false;
    const Division at = divide(i, size);
    output_k = static_cast<int32_t>(at.quotient);
    output_pixel = at.rest;
  }
  return true;
}

// The jobs of a map of predictions add to it in their order. A map is done by its first job.
template <class F>
DYHEAD_DEVICE void gather_predictions(const DeformBwdGatherParams& p, int owner) {
  const DeformTable& table = p.table;
  const DeformShape& s = table.shape;
  const MapShape& map = table.jobs[owner].predictions;
  const int32_t columns = s.prediction_columns();
  const int64_t count = s.images * map.pixels() * columns;
  F* grad = static_cast<F*>(p.grad_predictions) + map.first_row * columns;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kGatherThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x; i < count;
       i += threads) {
    const Division place = divide(i, columns);
    const int32_t column = static_cast<int32_t>(place.rest);
    const Division row = divide(place.quotient, map.pixels());
    const int64_t image = row.quotient;
    const int64_t q = row.rest;
    const bool is_mask = column >= s.offset_columns();
    const int32_t first_column = is_mask ? s.offset_columns() : 0;
    const int32_t values = is_mask ? columns - first_column : s.offset_columns();
    F sum = F(0);
    for (int j = owner; j < table.job_count; ++j) {
      const DeformJob& job = table.jobs[j];
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
  if (p.table.jobs[owner].plain()) return;
  for (int j = 0; j < owner; ++j) {
    const DeformJob& job = p.table.jobs[j];
    if (!job.plain() && same_map(job.predictions, p.table.jobs[owner].predictions)) return;
  }
  gather_predictions<F>(p, owner);
}

// A block sums 32 channels of the bias of one job: each warp a stretch of its tiles.
template <class F>
__global__ void __launch_bounds__(1024)
    gather_bias_kernel(const __grid_constant__ DeformBwdGatherParams p) {
  constexpr int kWarps = 32;
  DYHEAD_SHARED(F, sums, kWarps * kWarpSize);
  const DeformTable& table = p.table;
  const int64_t channels = table.shape.out_channels;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  const int matrix = static_cast<int>(blockIdx.y);
  F total = F(0);
  for (int j = 0; j < table.job_count; ++j) {
    if (table.terms[table.jobs[j].first_term].weight != matrix) continue;
    const DeformTiles& tiles = table.tiles_of[j];
    const int64_t count = tiles.per_image * table.shape.images;
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

// A block sums the gate of one image and source over all tiles of the terms that read it.
template <class F>
__global__ void __launch_bounds__(kGatherThreads)
    gather_gates_kernel(const __grid_constant__ DeformBwdGatherParams p) {
  constexpr int kWarps = kGatherThreads / kWarpSize;
  DYHEAD_SHARED(F, sums, kWarps);
  const DeformTable& table = p.table;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t image = blockIdx.x;
  const int source = static_cast<int>(blockIdx.y);  // of the launch
  F sum = F(0);
  for (int j = 0; j < table.job_count; ++j) {
    const DeformJob& job = table.jobs[j];
    const DeformTiles& tiles = table.tiles_of[j];
    for (int t = 0; t < job.terms; ++t) {
      if (table.terms[job.first_term + t].source != source) continue;
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
    const int64_t at = image * table.all_sources + table.sources[source].index;
    static_cast<F*>(p.grad_gates)[at] += total;
  }
}

template <class F>
cudaError_t gather(const DeformBwdGatherParams& p, int32_t matrices, cudaStream_t stream) {
  const DeformTable& table = p.table;
  const auto images = static_cast<unsigned>(table.shape.images);
  const auto jobs = static_cast<unsigned>(table.job_count);
  constexpr unsigned kBlocks = 256;
  cudaError_t error = cudaSuccess;
  bool predicted = false;
  for (int j = 0; j < table.job_count; ++j) predicted = predicted || !table.jobs[j].plain();
  if (predicted) {
    error =
        launch(gather_predictions_kernel<F>,
               {.grid = dim3(kBlocks, jobs), .block = dim3(kGatherThreads), .stream = stream}, p);
  }
  if (error == cudaSuccess && p.bias_partial != nullptr) {
    const auto parts = static_cast<unsigned>((table.shape.out_channels + 31) / 32);
    error = launch(gather_bias_kernel<F>,
                   {.grid = dim3(parts, static_cast<unsigned>(matrices)),
                    .block = dim3(1024),
                    .stream = stream},
                   p);
  }
  if (error == cudaSuccess && p.gate_partial != nullptr) {
    error = launch(gather_gates_kernel<F>,
                   {.grid = dim3(images, static_cast<unsigned>(table.source_count)),
                    .block = dim3(kGatherThreads),
                    .stream = stream},
                   p);
  }
  return error;
}

template <class T>
__global__ void __launch_bounds__(kGatherThreads, 4)
    finish_kernel(const __grid_constant__ DeformBwdFinishParams p) {
  using F = compute_t<T>;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kGatherThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x;
  T* out = static_cast<T*>(p.grad_source);
  if (p.fixed) {
    const auto fixed = FixedPoint<F>::of(p.largest, p.sum_bits);
    const auto* sums = static_cast<const long long*>(p.sums);
    for (int64_t i = first; i < p.count; i += threads) {
      out[i] = from_compute<T>(fixed.value(sums + i * FixedPoint<F>::kWords));
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

cudaError_t launch_deform_bwd_gather(const DeformBwdGatherParams& params, int32_t matrices,
                                     cudaStream_t stream) {
  if (params.table.tiles == 0) return cudaSuccess;
  return params.table.shape.dtype == DType::kFloat64 ? gather<double>(params, matrices, stream)
                                                     : gather<float>(params, matrices, stream);
}

cudaError_t launch_deform_bwd_finish(const DeformBwdFinishParams& params, cudaStream_t stream) {
  if (params.count == 0) return cudaSuccess;
  constexpr int64_t kMaxBlocks = 2048;
  const int64_t blocks = (params.count + kGatherThreads - 1) / kGatherThreads;
  const LaunchConfig config{
      .grid = dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks)),
      .block = dim3(kGatherThreads),
      .stream = stream};
  return dispatch_dtype(params.dtype, [&](auto zero) {
    return launch(finish_kernel<decltype(zero)>, config, params);
  });
}

cudaError_t launch_deform_bwd_input(const DeformBwdInputParams& params, DeformMath math,
                                    bool vectors, cudaStream_t stream) {
  switch (math) {
    case DeformMath::kBFloat16:
      return launch_deform_bwd_input_bfloat16(params, vectors, stream);
    case DeformMath::kFloat16:
      return launch_deform_bwd_input_float16(params, vectors, stream);
    case DeformMath::kTf32:
      return launch_deform_bwd_input_tf32(params, vectors, stream);
    case DeformMath::kFloat64:
      return launch_deform_bwd_input_float64(params, vectors, stream);
    default:
      return launch_deform_bwd_input_float32(params, vectors, stream);
  }
}

}  // namespace dyhead::cuda
