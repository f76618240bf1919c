#include "dynamic_relu.cuh"

namespace dyhead::cuda {
namespace {

struct BwdKernelParams {
  DynamicReluBwdParams call;
  DynamicReluWorkspace workspace;
};

template <class T, int V>
struct BwdShared {
  using F = compute_t<T>;
  static constexpr size_t kScratch = sizeof(F) * 4 * V * kDynamicReluThreads;

  static size_t bytes(const DynamicReluShape& s) {
    return kScratch +
           sizeof(F) * static_cast<size_t>(4 * s.channels + (kDynamicReluWarps + 1) * s.hidden);
  }
};

// result[i] = value, if the result is wanted.
template <class F>
DYHEAD_DEVICE void set(void* result, int64_t i, F value) {
  if (result != nullptr) static_cast<F*>(result)[i] = value;
}

// Runs in one block: computes the gradients of the logits from the sums of all blocks, then goes
// backward through both layers, as far as a wanted gradient needs it.
template <class T, int V>
DYHEAD_DEVICE void differentiate_layers(const BwdKernelParams& p, int64_t n) {
  using F = compute_t<T>;
  const DynamicReluShape& s = p.call.shape;
  const int channels = static_cast<int>(s.channels);
  const int hidden = static_cast<int>(s.hidden);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int blocks = static_cast<int>(gridDim.x);
  size_t at = BwdShared<T, V>::kScratch;
  F* grad_logits = dynamic_shared<F>(at, 4 * channels);
  F* per_warp = dynamic_shared<F>(at += sizeof(F) * 4 * channels, kDynamicReluWarps * hidden);
  F* grad_hidden = dynamic_shared<F>(at += sizeof(F) * kDynamicReluWarps * hidden, hidden);

  const int64_t outputs = 4 * static_cast<int64_t>(channels);
  const F* partial = static_cast<const F*>(p.workspace.partial) + n * blocks * outputs;
  const F* logits = static_cast<const F*>(p.call.logits) + n * outputs;
  for (int i = thread; i < outputs; i += kDynamicReluThreads) {
    grad_logits[i] = sum_blocks(partial, blocks, outputs, i) *
                     dynamic_relu_slope(logits[i], i / channels, s.hard_sigmoid);
    set(p.call.grad_logits, n * outputs + i, grad_logits[i]);
  }
  if (p.call.grad_hidden == nullptr && p.call.grad_rows == nullptr) return;
  __syncthreads();

  const F* fc2_weight = static_cast<const F*>(p.call.fc2_weight);
  for (int j = lane; j < hidden; j += kWarpSize) {
    F value = F(0);
#pragma unroll 8
    for (int i = warp; i < outputs; i += kDynamicReluWarps) {
      value += fc2_weight[static_cast<int64_t>(i) * hidden + j] * grad_logits[i];
    }
    per_warp[warp * hidden + j] = value;
  }
  __syncthreads();
  for (int j = thread; j < hidden; j += kDynamicReluThreads) {
    F value = F(0);
    for (int w = 0; w < kDynamicReluWarps; ++w) value += per_warp[w * hidden + j];
    const bool passed = static_cast<const F*>(p.call.hidden)[n * hidden + j] > F(0);
    grad_hidden[j] = passed ? value : F(0);
    set(p.call.grad_hidden, n * hidden + j, grad_hidden[j]);
  }
  if (p.call.grad_rows == nullptr) return;
  __syncthreads();

  const F* fc1_weight = static_cast<const F*>(p.call.fc1_weight);
  for (int c = thread; c < channels; c += kDynamicReluThreads) {
    F value = F(0);
#pragma unroll 8
    for (int j = 0; j < hidden; ++j) {
      value += fc1_weight[static_cast<int64_t>(j) * channels + c] * grad_hidden[j];
    }
    static_cast<F*>(p.workspace.grad_mean)[n * channels + c] = value / static_cast<F>(s.pixels);
  }
}

template <class T, int V>
DYHEAD_DEVICE void load_coefficients(const BwdKernelParams& p, int64_t n, int channel,
                                     DynamicReluCoefficients<compute_t<T>> (&k)[V]) {
  const DynamicReluShape& s = p.call.shape;
  const auto* logits = static_cast<const compute_t<T>*>(p.call.logits) + n * 4 * s.channels;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    k[i] = dynamic_relu_coefficients(logits, channel + i, s.channels, s.hard_sigmoid);
  }
}

template <class T, int V>
DYHEAD_DEVICE void map_stretch(const BwdKernelParams& p, int64_t n, const Stretch& stretch) {
  using F = compute_t<T>;
  const DynamicReluShape& s = p.call.shape;
  const int channels = static_cast<int>(s.channels);
  const T* rows = static_cast<const T*>(p.call.rows) + n * s.pixels * channels;
  const T* grad_out = static_cast<const T*>(p.call.grad_out) + n * s.pixels * channels;
  T* grad_rows = static_cast<T*>(p.call.grad_rows) + n * s.pixels * channels;
  const F* grad_mean = static_cast<const F*>(p.workspace.grad_mean) + n * channels;
  const RowTiling tiling = row_tiling<kDynamicReluThreads>(channels / V);
  for (int vector = tiling.lane; vector < channels / V; vector += tiling.lanes) {
    DynamicReluCoefficients<F> k[V];
    load_coefficients<T, V>(p, n, vector * V, k);
    // Kept in registers: the compiler cannot know that the stores below do not change it.
    F mean[V];
#pragma unroll
    for (int i = 0; i < V; ++i) mean[i] = grad_mean[vector * V + i];
    for (int64_t pixel = stretch.first + tiling.row; pixel < stretch.last; pixel += tiling.rows) {
      const int64_t at = pixel * channels + vector * V;
      const Vec<T, V> x = load_vec_readonly<V>(rows + at);
      const Vec<T, V> g = load_vec_readonly<V>(grad_out + at);
      Vec<T, V> grad;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const F share = dynamic_relu_share(k[i], to_compute(x[i]));
        const F slope = share * k[i].a1 + (F(1) - share) * k[i].a2;
        grad[i] = from_compute<T>(to_compute(g[i]) * slope + mean[i]);
      }
      store_vec_global(grad_rows + at, grad);
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kDynamicReluThreads, 1)
    dynamic_relu_bwd_kernel(BwdKernelParams p) {
  using F = compute_t<T>;
  const DynamicReluShape& s = p.call.shape;
  const int channels = static_cast<int>(s.channels);
  const int blocks = static_cast<int>(gridDim.x);
  const int block = static_cast<int>(blockIdx.x);
  F* scratch = dynamic_shared<F>(0, 4 * V * kDynamicReluThreads);
  const Stretch stretch = stretch_of(s.pixels, blocks, block);

  for (int64_t n = blockIdx.y; n < s.images; n += gridDim.y) {
    const T* rows = static_cast<const T*>(p.call.rows) + n * s.pixels * channels;
    const T* grad_out = static_cast<const T*>(p.call.grad_out) + n * s.pixels * channels;
    F* partial = static_cast<F*>(p.workspace.partial) + (n * blocks + block) * 4 * channels;
    DynamicReluCoefficients<F> k[V];
    int loaded = -1;  // first channel of the coefficients in k
    sum_stretch<4, V>(
        stretch, channels, scratch, partial, [&](int64_t pixel, int channel, F(&sums)[4][V]) {
          if (loaded != channel) load_coefficients<T, V>(p, n, channel, k);
          loaded = channel;
          const Vec<T, V> x = load_vec_readonly<V>(rows + pixel * channels + channel);
          const Vec<T, V> g = load_vec_readonly<V>(grad_out + pixel * channels + channel);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const F value = to_compute(x[i]);
            const F first = to_compute(g[i]) * dynamic_relu_share(k[i], value);
            const F second = to_compute(g[i]) - first;
            sums[0][i] += first * value;
            sums[1][i] += first;
            sums[2][i] += second * value;
            sums[3][i] += second;
          }
        });
    unsigned* arrived = p.workspace.arrived + n;
    if (arrive_is_last(arrived, blocks)) {
      differentiate_layers<T, V>(p, n);
      publish(arrived);
    }
    if (p.call.grad_rows == nullptr) continue;
    wait_published(arrived, blocks);
    map_stretch<T, V>(p, n, stretch);
  }
}

}  // namespace

int dynamic_relu_bwd_resident(const DynamicReluBwdParams& params) {
  return select_vectors(
      params.shape.dtype, params.shape.channels, {params.rows, params.grad_out, params.grad_rows},
      [&](auto zero, auto vector) {
        using T = decltype(zero);
        return max_active_blocks(dynamic_relu_bwd_kernel<T, vector()>, kDynamicReluThreads,
                                 BwdShared<T, vector()>::bytes(params.shape));
      });
}

cudaError_t launch_dynamic_relu_bwd(const DynamicReluBwdParams& params, const DynamicReluGrid& grid,
                                    const DynamicReluWorkspace& workspace, cudaStream_t stream) {
  if (params.shape.images == 0) return cudaSuccess;
  const bool rows = params.grad_rows != nullptr;
  if (!rows && params.grad_logits == nullptr && params.grad_hidden == nullptr) return cudaSuccess;
  return select_vectors(
      params.shape.dtype, params.shape.channels, {params.rows, params.grad_out, params.grad_rows},
      [&](auto zero, auto vector) {
        using T = decltype(zero);
        const LaunchConfig config{
            .grid = dim3(grid.blocks_per_image, grid.images_in_flight),
            .block = dim3(kDynamicReluThreads),
            .shared_bytes = BwdShared<T, vector()>::bytes(params.shape),
            .stream = stream,
            .cooperative = grid.cooperative && rows,
        };
        return launch(dynamic_relu_bwd_kernel<T, vector()>, config, {params, workspace});
      });
}

}  // namespace dyhead::cuda

namespace dyhead {

void run_dynamic_relu_bwd(const DynamicReluBwdParams& params, Context& context) {
  cuda::run_dynamic_relu(params, context, cuda::dynamic_relu_bwd_resident(params), 4,
                         cuda::launch_dynamic_relu_bwd);
}

}  // namespace dyhead
