#include <limits>

#include "block_coefficients.cuh"

namespace dyhead::cuda {
namespace {

constexpr int kSumThreads = 256;

// Which gradients are wanted, by what they need.
DYHEAD_HD bool wants_norms(const BlockCoefficientsBwdParams& p) {
  return p.grad_mean != nullptr || p.grad_var != nullptr || p.grad_up_mean != nullptr ||
         p.grad_norm_weight != nullptr || p.grad_norm_bias != nullptr ||
         p.grad_gate_weight != nullptr;
}
DYHEAD_HD bool wants_mean_z(const BlockCoefficientsBwdParams& p) {
  return wants_norms(p) || p.grad_gate_bias != nullptr;
}
DYHEAD_HD bool wants_fc1(const BlockCoefficientsBwdParams& p) {
  return p.grad_fc1_weight != nullptr || p.grad_fc1_bias != nullptr;
}
DYHEAD_HD bool wants_fc2(const BlockCoefficientsBwdParams& p) {
  return p.grad_fc2_weight != nullptr || p.grad_fc2_bias != nullptr;
}

// result[i] = value, if the result is wanted.
template <class F>
DYHEAD_DEVICE void set(void* result, int64_t i, F value) {
  if (result != nullptr) static_cast<F*>(result)[i] = value;
}

// The shared memory of a block of the first kernel.
template <class F>
struct BwdShared {
  F* grad_logits;       // [4 C]
  F* grad_hidden;       // [H]
  F* grad_mean_z;       // [C]
  F* grad_gate_logits;  // [jobs of the level]
  F* scratch;           // [threads]

  static size_t bytes(const BlockCoefficientsShape& s) {
    return sizeof(F) * (5 * static_cast<size_t>(s.channels) + s.hidden + s.max_jobs +
                        kBlockCoefficientsThreads);
  }

  DYHEAD_DEVICE static BwdShared get(const BlockCoefficientsShape& s) {
    const size_t hidden = 4 * static_cast<size_t>(s.channels);
    const size_t mean_z = hidden + s.hidden;
    const size_t gates = mean_z + s.channels;
    const size_t scratch = gates + s.max_jobs;
    return {dynamic_shared<F>(0, hidden), dynamic_shared<F>(sizeof(F) * hidden, s.hidden),
            dynamic_shared<F>(sizeof(F) * mean_z, s.channels),
            dynamic_shared<F>(sizeof(F) * gates, s.max_jobs),
            dynamic_shared<F>(sizeof(F) * scratch, kBlockCoefficientsThreads)};
  }
};

// Backward through both layers, to the mean of z.
template <class F>
DYHEAD_DEVICE void differentiate_layers(const BlockCoefficientsBwdParams& p, int64_t at,
                                        const BlockCoefficientsPartials<F>& partials,
                                        const BwdShared<F>& shared) {
  const BlockCoefficientsShape& s = p.shape;
  const int outputs = 4 * s.channels;
  const F* hidden = static_cast<const F*>(p.layers) + at * s.layer_values() + s.channels;
  const F* logits = hidden + s.hidden;
  const F* grad_coefficients = static_cast<const F*>(p.grad_coefficients) + at * outputs;
  for (int i = static_cast<int>(threadIdx.x); i < outputs; i += kBlockCoefficientsThreads) {
    const F grad = grad_coefficients[i] * dynamic_relu_slope(logits[i], i / s.channels, true);
    shared.grad_logits[i] = grad;
    if (wants_fc2(p)) partials.logits[at * outputs + i] = grad;
  }
  if (!wants_mean_z(p) && !wants_fc1(p)) return;
  __syncthreads();
  multiply_columns(p.parameters.fc2_weight, outputs, s.hidden, shared.grad_logits, shared.scratch,
                   [&](int j, F grad) {
                     grad = hidden[j] > F(0) ? grad : F(0);
                     shared.grad_hidden[j] = grad;
                     if (wants_fc1(p)) partials.hidden[at * s.hidden + j] = grad;
                   });
  if (!wants_mean_z(p)) return;
  multiply_columns(p.parameters.fc1_weight, s.hidden, s.channels, shared.grad_hidden,
                   shared.scratch, [&](int c, F grad) { shared.grad_mean_z[c] = grad; });
}

// The data of job k that the threads of a block need.
template <class F>
struct Branch {
  const BlockCoefficientsBwdParams& p;
  const F* grad_mean_z;
  const F* grad_shift;
  const F* grad_scale;
  const F* up_mean;
  const F* norms;
  int64_t place;  // index of the job and image
  int norm;
  F branches;

  DYHEAD_DEVICE Branch(const BlockCoefficientsBwdParams& params, const LevelJobs& jobs, int64_t at,
                       int k, const F* grad_mean)
      : p(params),
        grad_mean_z(grad_mean),
        grad_shift(static_cast<const F*>(p.grad_shift) + at * p.shape.channels),
        place(jobs.place(p.shape, p.tables, k)),
        norm(p.tables.norm[jobs.job(p.tables, k)]),
        branches(static_cast<F>(jobs.count)) {
    grad_scale = static_cast<const F*>(p.grad_scale) + place * p.shape.channels;
    up_mean = static_cast<const F*>(p.up_mean) + place * p.shape.channels;
    norms = static_cast<const F*>(p.norms) + place * p.shape.norm_values();
  }

  DYHEAD_DEVICE F logit() const { return norms[2 * p.shape.groups]; }
  DYHEAD_DEVICE ChannelGrads<F> grads(int c) const {
    return {grad_scale[c], grad_shift[c], grad_mean_z[c]};
  }
  DYHEAD_DEVICE NormAffine<F> affine(int c) const {
    return channel_affine(p.shape, p.parameters, norm, norms, c);
  }
};

// The gradient of the logit of each gate; one warp for each job.
template <class F>
DYHEAD_DEVICE void differentiate_gates(const BlockCoefficientsBwdParams& p, const LevelJobs& jobs,
                                       int64_t at, const BlockCoefficientsPartials<F>& partials,
                                       const BwdShared<F>& shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int k = warp; k < jobs.count; k += kBlockCoefficientsWarps) {
    const Branch<F> branch(p, jobs, at, k, shared.grad_mean_z);
    F sum = F(0);
#pragma unroll 4
    for (int c = lane; c < p.shape.channels; c += kWarpSize) {
      sum += branch.grads(c).of_share(branch.affine(c), branch.up_mean[c]);
    }
    sum = warp_sum(sum) / branch.branches * scale_gate_slope(branch.logit());
    if (lane == 0) {
      shared.grad_gate_logits[k] = sum;
      if (p.grad_gate_bias != nullptr) partials.gate[branch.place] = sum;
    }
  }
}

// The gradients of the moments, and the job's contributions to those of the parameters; one warp
// for each group of each job.
template <class F>
DYHEAD_DEVICE void differentiate_norms(const BlockCoefficientsBwdParams& p, const LevelJobs& jobs,
                                       int64_t at, const BlockCoefficientsPartials<F>& partials,
                                       const BwdShared<F>& shared) {
  const BlockCoefficientsShape& s = p.shape;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int width = s.group_width();
  for (int i = warp; i < jobs.count * s.groups; i += kBlockCoefficientsWarps) {
    const int group = i % s.groups;
    const Branch<F> branch(p, jobs, at, i / s.groups, shared.grad_mean_z);
    const GroupMoments<F> moments = group_moments(s, branch.norms, group);
    const F share = scale_gate(branch.logit()) / branch.branches;
    const F grad_logit = shared.grad_gate_logits[i / s.groups];
    const int first = group * width;
    const int64_t place = branch.place * s.channels;
    F grad_mean = F(0);
    F grad_rstd = F(0);
    for (int c = first + lane; c < first + width; c += kWarpSize) {
      const NormAffine<F> affine = branch.affine(c);
      const F up_mean = branch.up_mean[c];
      const F pooled = grad_logit * load_parameter<F>(p.parameters.gate_weight, c);
      const AffineGrads<F> grad = affine_grads(branch.grads(c), affine, share, pooled, up_mean);
      grad_mean -= grad.bias * affine.a;
      grad_rstd += grad.a * load_parameter<F>(p.parameters.norm_weight[branch.norm], c);
      if (p.grad_norm_weight != nullptr) {
        partials.norm_weight[place + c] = grad.a * moments.rstd;
      }
      if (p.grad_norm_bias != nullptr) partials.norm_bias[place + c] = grad.bias;
      if (p.grad_gate_weight != nullptr) {
        partials.gate_weight[place + c] = grad_logit * affine.at(up_mean);
      }
      set(p.grad_up_mean, place + c, grad.up_mean);
    }
    if (p.grad_mean == nullptr && p.grad_var == nullptr) continue;
    const MomentGrads<F> grad =
        moment_grads(moments, warp_sum(grad_mean), warp_sum(grad_rstd), width);
    for (int c = first + lane; c < first + width; c += kWarpSize) {
      set(p.grad_mean, place + c, grad.of_mean(static_cast<const F*>(p.mean)[place + c]));
      set(p.grad_var, place + c, grad.var);
    }
  }
}

template <class F>
__global__ void __launch_bounds__(kBlockCoefficientsThreads, 1)
    block_coefficients_bwd_kernel(BlockCoefficientsBwdParams p) {
  const int64_t at = blockIdx.x;
  const LevelJobs jobs = LevelJobs::of(p.shape, p.tables, at);
  const auto partials = BlockCoefficientsPartials<F>::in(p.workspace, p.shape);
  const BwdShared<F> shared = BwdShared<F>::get(p.shape);
  differentiate_layers(p, at, partials, shared);
  if (!wants_mean_z(p)) return;
  differentiate_gates(p, jobs, at, partials, shared);
  if (!wants_norms(p)) return;
  __syncthreads();
  differentiate_norms(p, jobs, at, partials, shared);
}

// The sum over rows of left[row * left_stride] * right[row * right_stride]. In float64: the number
// of rows has no bound, and there is hardly any other work.
template <class F>
DYHEAD_DEVICE F sum_products(const F* left, int64_t left_stride, const F* right,
                             int64_t right_stride, int64_t rows) {
  double sum = 0;
#pragma unroll 8
  for (int64_t row = 0; row < rows; ++row) {
    sum += static_cast<double>(left[row * left_stride]) * right[row * right_stride];
  }
  return static_cast<F>(sum);
}

template <class F>
DYHEAD_DEVICE double sum_rows(const F* values, int64_t stride, int64_t rows) {
  double sum = 0;
#pragma unroll 8
  for (int64_t row = 0; row < rows; ++row) sum += values[row * stride];
  return sum;
}

// Value i of [B, C]: the sum of values [J, N, C] over the images and the jobs of its normalisation.
template <class F>
DYHEAD_DEVICE F sum_jobs(const BlockCoefficientsBwdParams& p, const F* values, int64_t i) {
  const BlockCoefficientsShape& s = p.shape;
  double sum = 0;
  for (int j = 0; j < s.jobs; ++j) {
    if (p.tables.norm[j] != i / s.channels) continue;
    sum += sum_rows(values + j * s.images * s.channels + i % s.channels, s.channels, s.images);
  }
  return static_cast<F>(sum);
}

// The number of values in the wanted gradients of parameters, which are numbered consecutively.
int64_t parameter_values(const BlockCoefficientsBwdParams& p) {
  const BlockCoefficientsShape& s = p.shape;
  const auto values = [](const void* grad, int64_t size) { return grad != nullptr ? size : 0; };
  const int64_t channels = s.channels;
  return values(p.grad_fc2_weight, 4 * channels * s.hidden) +
         values(p.grad_fc1_weight, channels * s.hidden) + values(p.grad_fc2_bias, 4 * channels) +
         values(p.grad_fc1_bias, s.hidden) + values(p.grad_norm_weight, s.norms * channels) +
         values(p.grad_norm_bias, s.norms * channels) + values(p.grad_gate_weight, channels) +
         values(p.grad_gate_bias, 1);
}

template <class F>
__global__ void __launch_bounds__(kSumThreads)
    block_coefficients_bwd_sum_kernel(BlockCoefficientsBwdParams p) {
  const BlockCoefficientsShape& s = p.shape;
  const auto partials = BlockCoefficientsPartials<F>::in(p.workspace, s);
  const int64_t rows = s.levels * s.images;
  const int64_t branches = s.jobs * s.images;
  const int outputs = 4 * s.channels;
  const F* mean_z = static_cast<const F*>(p.layers);
  const F* hidden = mean_z + s.channels;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  // Whether i is one of the next `size` values; if not, i becomes its index in those that follow. A
  // gradient that is not wanted has none.
  const auto within = [&](const void* grad, int64_t size) {
    if (grad == nullptr) return false;
    const bool found = i < size;
    if (!found) i -= size;
    return found;
  };
  if (within(p.grad_fc2_weight, static_cast<int64_t>(outputs) * s.hidden)) {
    static_cast<F*>(p.grad_fc2_weight)[i] = sum_products(
        partials.logits + i / s.hidden, outputs, hidden + i % s.hidden, s.layer_values(), rows);
  } else if (within(p.grad_fc1_weight, static_cast<int64_t>(s.hidden) * s.channels)) {
    static_cast<F*>(p.grad_fc1_weight)[i] =
        sum_products(partials.hidden + i / s.channels, s.hidden, mean_z + i % s.channels,
                     s.layer_values(), rows);
  } else if (within(p.grad_fc2_bias, outputs)) {
    static_cast<F*>(p.grad_fc2_bias)[i] =
        static_cast<F>(sum_rows(partials.logits + i, outputs, rows));
  } else if (within(p.grad_fc1_bias, s.hidden)) {
    static_cast<F*>(p.grad_fc1_bias)[i] =
        static_cast<F>(sum_rows(partials.hidden + i, s.hidden, rows));
  } else if (within(p.grad_norm_weight, static_cast<int64_t>(s.norms) * s.channels)) {
    static_cast<F*>(p.grad_norm_weight)[i] = sum_jobs(p, partials.norm_weight, i);
  } else if (within(p.grad_norm_bias, static_cast<int64_t>(s.norms) * s.channels)) {
    static_cast<F*>(p.grad_norm_bias)[i] = sum_jobs(p, partials.norm_bias, i);
  } else if (within(p.grad_gate_weight, s.channels)) {
    static_cast<F*>(p.grad_gate_weight)[i] =
        static_cast<F>(sum_rows(partials.gate_weight + i, s.channels, branches));
  } else if (within(p.grad_gate_bias, 1)) {
    static_cast<F*>(p.grad_gate_bias)[i] = static_cast<F>(sum_rows(partials.gate, 1, branches));
  }
}

template <class F>
cudaError_t launch_as(const BlockCoefficientsBwdParams& params, cudaStream_t stream) {
  const BlockCoefficientsShape& s = params.shape;
  const int64_t blocks = s.levels * s.images;
  const int64_t sum_blocks = (parameter_values(params) + kSumThreads - 1) / kSumThreads;
  constexpr int64_t kMaxBlocks = std::numeric_limits<int>::max();
  if (blocks > kMaxBlocks || sum_blocks > kMaxBlocks) return cudaErrorInvalidValue;
  if (blocks > 0 && (wants_mean_z(params) || wants_fc1(params) || wants_fc2(params))) {
    const LaunchConfig config{
        .grid = dim3(static_cast<unsigned>(blocks)),
        .block = dim3(kBlockCoefficientsThreads),
        .shared_bytes = BwdShared<F>::bytes(s),
        .stream = stream,
    };
    const cudaError_t error = launch(block_coefficients_bwd_kernel<F>, config, params);
    if (error != cudaSuccess) return error;
  }
  if (sum_blocks == 0) return cudaSuccess;
  const LaunchConfig config{
      .grid = dim3(static_cast<unsigned>(sum_blocks)),
      .block = dim3(kSumThreads),
      .stream = stream,
  };
  return launch(block_coefficients_bwd_sum_kernel<F>, config, params);
}

}  // namespace

size_t block_coefficients_bwd_shared_bytes(const BlockCoefficientsShape& s) {
  return s.dtype == DType::kFloat64 ? BwdShared<double>::bytes(s) : BwdShared<float>::bytes(s);
}

cudaError_t launch_block_coefficients_bwd(const BlockCoefficientsBwdParams& params,
                                          cudaStream_t stream) {
  return params.shape.dtype == DType::kFloat64 ? launch_as<double>(params, stream)
                                               : launch_as<float>(params, stream);
}

}  // namespace dyhead::cuda

namespace dyhead {

void run_block_coefficients_bwd(const BlockCoefficientsBwdParams& params, Context& context) {
  context.check_shared_memory(cuda::block_coefficients_bwd_shared_bytes(params.shape));
  context.check(cuda::launch_block_coefficients_bwd(params, context.stream()));
}

}  // namespace dyhead
