#include <limits>

#include "block_coefficients.cuh"

namespace dyhead::cuda {
namespace {

// Rows of the last layer per block: 256 channels take 4 blocks.
constexpr int kSliceRows = 256;

int slices_of(const BlockCoefficientsShape& s) {
  return (4 * s.channels + kSliceRows - 1) / kSliceRows;
}

struct FwdKernelParams {
  BlockCoefficientsFwdParams call;
  int slices;
};

// The shared memory of a block.
template <class F>
struct FwdShared {
  F* norms;   // [jobs of the level, norm_values()]
  F* mean_z;  // [C]
  F* hidden;  // [H]

  static size_t bytes(const BlockCoefficientsShape& s) {
    return sizeof(F) * (static_cast<size_t>(s.max_jobs) * s.norm_values() + s.channels + s.hidden);
  }

  DYHEAD_DEVICE static FwdShared get(const BlockCoefficientsShape& s) {
    const size_t norms = static_cast<size_t>(s.max_jobs) * s.norm_values();
    return {dynamic_shared<F>(0, norms), dynamic_shared<F>(sizeof(F) * norms, s.channels),
            dynamic_shared<F>(sizeof(F) * (norms + s.channels), s.hidden)};
  }
};

// Mean and rstd of each group of each job; one warp for each.
template <class F>
DYHEAD_DEVICE void normalise(const BlockCoefficientsFwdParams& p, const LevelJobs& jobs, F* norms) {
  const BlockCoefficientsShape& s = p.shape;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int width = s.group_width();
  for (int i = warp; i < jobs.count * s.groups; i += kBlockCoefficientsWarps) {
    const int k = i / s.groups;
    const int group = i % s.groups;
    const int64_t first =
        jobs.place(s, p.tables, k) * s.channels + static_cast<int64_t>(group) * width;
    const F* mean = static_cast<const F*>(p.mean) + first;
    const F* var = static_cast<const F*>(p.var) + first;
    F sum = F(0);
    // As differences, which may be much smaller than the means.
    for (int c = lane; c < width; c += kWarpSize) sum += mean[c] - mean[0];
    const F mu = mean[0] + warp_sum(sum) / static_cast<F>(width);
    F spread = F(0);
    for (int c = lane; c < width; c += kWarpSize) {
      spread += var[c] + (mean[c] - mu) * (mean[c] - mu);
    }
    spread = warp_sum(spread) / static_cast<F>(width);
    if (lane == 0) {
      norms[k * s.norm_values() + group] = mu;
      norms[k * s.norm_values() + s.groups + group] =
          F(1) / std::sqrt(spread + static_cast<F>(s.eps));
    }
  }
}

// The logit of the gate of each job; one warp for each.
template <class F>
DYHEAD_DEVICE void gate_logits(const BlockCoefficientsFwdParams& p, const LevelJobs& jobs,
                               F* norms) {
  const BlockCoefficientsShape& s = p.shape;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int k = warp; k < jobs.count; k += kBlockCoefficientsWarps) {
    const int norm = p.tables.norm[jobs.job(p.tables, k)];
    const F* up_mean = static_cast<const F*>(p.up_mean) + jobs.place(s, p.tables, k) * s.channels;
    F* values = norms + k * s.norm_values();
    F sum = F(0);
#pragma unroll 4
    for (int c = lane; c < s.channels; c += kWarpSize) {
      sum += load_parameter<F>(p.parameters.gate_weight, c) *
             channel_affine(s, p.parameters, norm, values, c).at(up_mean[c]);
    }
    sum = warp_sum(sum);
    if (lane == 0) values[2 * s.groups] = sum + load_parameter<F>(p.parameters.gate_bias, 0);
  }
}

// The mean of z; the first block of a level also writes scale, shift and what the backward needs.
template <class F>
DYHEAD_DEVICE void combine(const BlockCoefficientsFwdParams& p, const LevelJobs& jobs, int64_t at,
                           bool first_block, const FwdShared<F>& shared) {
  const BlockCoefficientsShape& s = p.shape;
  const int thread = static_cast<int>(threadIdx.x);
  for (int c = thread; c < s.channels; c += kBlockCoefficientsThreads) {
    F mean_z = F(0);
    double shift = 0;
    for (int k = 0; k < jobs.count; ++k) {
      const int norm = p.tables.norm[jobs.job(p.tables, k)];
      const int64_t place = jobs.place(s, p.tables, k) * s.channels + c;
      const F* norms = shared.norms + k * s.norm_values();
      const F share = scale_gate(norms[2 * s.groups]) / static_cast<F>(jobs.count);
      const NormAffine<F> affine = channel_affine(s, p.parameters, norm, norms, c);
      mean_z += share * affine.at(static_cast<const F*>(p.up_mean)[place]);
      if (!first_block) continue;
      const F scale = share * affine.a;
      static_cast<F*>(p.scale)[place] = scale;
      shift += affine.shift(share, scale);
    }
    shared.mean_z[c] = mean_z;
    if (first_block) {
      static_cast<F*>(p.shift)[at * s.channels + c] = static_cast<F>(shift);
      static_cast<F*>(p.layers)[at * s.layer_values() + c] = mean_z;
    }
  }
  if (!first_block) return;
  for (int i = thread; i < jobs.count * s.norm_values(); i += kBlockCoefficientsThreads) {
    const int64_t place = jobs.place(s, p.tables, i / s.norm_values());
    static_cast<F*>(p.norms)[place * s.norm_values() + i % s.norm_values()] = shared.norms[i];
  }
}

template <class F>
__global__ void __launch_bounds__(kBlockCoefficientsThreads, 1)
    block_coefficients_fwd_kernel(FwdKernelParams params) {
  const BlockCoefficientsFwdParams& p = params.call;
  const BlockCoefficientsShape& s = p.shape;
  const int64_t at = blockIdx.x / params.slices;
  const int slice = static_cast<int>(blockIdx.x) % params.slices;
  const bool first_block = slice == 0;
  const LevelJobs jobs = LevelJobs::of(s, p.tables, at);
  const FwdShared<F> shared = FwdShared<F>::get(s);

  normalise(p, jobs, shared.norms);
  __syncthreads();
  gate_logits(p, jobs, shared.norms);
  __syncthreads();
  combine(p, jobs, at, first_block, shared);
  __syncthreads();

  F* layers = static_cast<F*>(p.layers) + at * s.layer_values();
  multiply_rows(p.parameters.fc1_weight, s.channels, shared.mean_z, 0, s.hidden,
                [&](int j, F value) {
                  value += load_parameter<F>(p.parameters.fc1_bias, j);
                  value = value < F(0) ? F(0) : value;
                  shared.hidden[j] = value;
                  if (first_block) layers[s.channels + j] = value;
                });
  __syncthreads();
  F* coefficients = static_cast<F*>(p.coefficients) + at * 4 * s.channels;
  const int first = slice * kSliceRows;
  const int last = min(first + kSliceRows, 4 * s.channels);
  multiply_rows(p.parameters.fc2_weight, s.hidden, shared.hidden, first, last, [&](int i, F logit) {
    logit += load_parameter<F>(p.parameters.fc2_bias, i);
    layers[s.channels + s.hidden + i] = logit;
    coefficients[i] = dynamic_relu_coefficient(logit, i / s.channels, true);
  });
}

template <class F>
cudaError_t launch_as(const BlockCoefficientsFwdParams& params, cudaStream_t stream) {
  const BlockCoefficientsShape& s = params.shape;
  const FwdKernelParams kernel_params{params, slices_of(s)};
  const int64_t blocks = s.levels * s.images * kernel_params.slices;
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;
  const LaunchConfig config{
      .grid = dim3(static_cast<unsigned>(blocks)),
      .block = dim3(kBlockCoefficientsThreads),
      .shared_bytes = FwdShared<F>::bytes(s),
      .stream = stream,
  };
  return launch(block_coefficients_fwd_kernel<F>, config, kernel_params);
}

}  // namespace

size_t block_coefficients_fwd_shared_bytes(const BlockCoefficientsShape& s) {
  return s.dtype == DType::kFloat64 ? FwdShared<double>::bytes(s) : FwdShared<float>::bytes(s);
}

cudaError_t launch_block_coefficients_fwd(const BlockCoefficientsFwdParams& params,
                                          cudaStream_t stream) {
  if (params.shape.images == 0) return cudaSuccess;
  return params.shape.dtype == DType::kFloat64 ? launch_as<double>(params, stream)
                                               : launch_as<float>(params, stream);
}

}  // namespace dyhead::cuda

namespace dyhead {

void run_block_coefficients_fwd(const BlockCoefficientsFwdParams& params, Context& context) {
  context.check_shared_memory(cuda::block_coefficients_fwd_shared_bytes(params.shape));
  context.check(cuda::launch_block_coefficients_fwd(params, context.stream()));
}

}  // namespace dyhead
