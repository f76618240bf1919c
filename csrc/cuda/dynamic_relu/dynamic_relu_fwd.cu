#include "dynamic_relu.cuh"

namespace dyhead::cuda {
namespace {

struct FwdKernelParams {
  DynamicReluFwdParams call;
  DynamicReluWorkspace workspace;
};

template <class T, int V>
struct FwdShared {
  using F = compute_t<T>;
  static constexpr size_t kScratch = sizeof(F) * V * kDynamicReluThreads;

  static size_t bytes(const DynamicReluShape& s) {
    return kScratch + sizeof(F) * static_cast<size_t>(s.channels + s.hidden);
  }
};

// Runs in one block: computes the mean from the sums of all blocks, then both layers.
template <class T, int V>
DYHEAD_DEVICE void write_logits(const FwdKernelParams& p, int64_t n) {
  using F = compute_t<T>;
  const DynamicReluShape& s = p.call.shape;
  const int channels = static_cast<int>(s.channels);
  const int hidden = static_cast<int>(s.hidden);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int blocks = static_cast<int>(gridDim.x);
  F* mean = dynamic_shared<F>(FwdShared<T, V>::kScratch, channels);
  F* layer = dynamic_shared<F>(FwdShared<T, V>::kScratch + sizeof(F) * channels, hidden);

  const F* partial = static_cast<const F*>(p.workspace.partial) + n * blocks * channels;
  for (int c = thread; c < channels; c += kDynamicReluThreads) {
    mean[c] = sum_blocks(partial, blocks, channels, c) / static_cast<F>(s.pixels);
    static_cast<F*>(p.call.mean)[n * channels + c] = mean[c];
  }
  __syncthreads();

  const F* fc1_weight = static_cast<const F*>(p.call.fc1_weight);
  for (int j = warp; j < hidden; j += kDynamicReluWarps) {
    F value = F(0);
    for (int c = lane; c < channels; c += kWarpSize) {
      value += fc1_weight[static_cast<int64_t>(j) * channels + c] * mean[c];
    }
    value = warp_sum(value) + static_cast<const F*>(p.call.fc1_bias)[j];
    value = value < F(0) ? F(0) : value;
    if (lane == 0) {
      layer[j] = value;
      static_cast<F*>(p.call.hidden)[n * hidden + j] = value;
    }
  }
  __syncthreads();

  const F* fc2_weight = static_cast<const F*>(p.call.fc2_weight);
  for (int i = warp; i < 4 * channels; i += kDynamicReluWarps) {
    F value = F(0);
    for (int j = lane; j < hidden; j += kWarpSize) {
      value += fc2_weight[static_cast<int64_t>(i) * hidden + j] * layer[j];
    }
    value = warp_sum(value) + static_cast<const F*>(p.call.fc2_bias)[i];
    if (lane == 0) static_cast<F*>(p.call.logits)[n * 4 * channels + i] = value;
  }
}

template <class T, int V>
DYHEAD_DEVICE void map_stretch(const FwdKernelParams& p, int64_t n, const Stretch& stretch) {
  using F = compute_t<T>;
  const DynamicReluShape& s = p.call.shape;
  const int channels = static_cast<int>(s.channels);
  const F* logits = static_cast<const F*>(p.call.logits) + n * 4 * channels;
  const T* rows = static_cast<const T*>(p.call.rows) + n * s.pixels * channels;
  T* out = static_cast<T*>(p.call.out) + n * s.pixels * channels;
  const RowTiling tiling = row_tiling<kDynamicReluThreads>(channels / V);
  for (int vector = tiling.lane; vector < channels / V; vector += tiling.lanes) {
    DynamicReluCoefficients<F> k[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      k[i] = dynamic_relu_coefficients(logits, vector * V + i, channels, s.hard_sigmoid);
    }
#pragma unroll 2
    for (int64_t pixel = stretch.first + tiling.row; pixel < stretch.last; pixel += tiling.rows) {
      const int64_t at = pixel * channels + vector * V;
      const Vec<T, V> x = load_vec_readonly<V>(rows + at);
      Vec<T, V> y;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        y[i] = from_compute<T>(dynamic_relu_value(k[i], to_compute(x[i])));
      }
      store_vec_global(out + at, y);
    }
  }
}

// Blocks per multiprocessor that the compiler leaves registers for: with eight channels a thread
// keeps 32 coefficients, and left to itself the compiler spills one of them for a third block.
constexpr int fwd_blocks(int vector) { return vector == 1 ? 4 : vector == 8 ? 2 : 3; }

template <class T, int V>
__global__ void __launch_bounds__(kDynamicReluThreads, fwd_blocks(V))
    dynamic_relu_fwd_kernel(FwdKernelParams p) {
  using F = compute_t<T>;
  const DynamicReluShape& s = p.call.shape;
  const int channels = static_cast<int>(s.channels);
  const int blocks = static_cast<int>(gridDim.x);
  const int block = static_cast<int>(blockIdx.x);
  F* scratch = dynamic_shared<F>(0, V * kDynamicReluThreads);
  const Stretch stretch = stretch_of(s.pixels, blocks, block);

  for (int64_t n = blockIdx.y; n < s.images; n += gridDim.y) {
    const T* rows = static_cast<const T*>(p.call.rows) + n * s.pixels * channels;
    F* partial = static_cast<F*>(p.workspace.partial) + (n * blocks + block) * channels;
    sum_stretch<1, V>(stretch, channels, scratch, partial,
                      [&](int64_t pixel, int channel, F(&sums)[1][V]) {
                        const Vec<T, V> x = load_vec_readonly<V>(rows + pixel * channels + channel);
#pragma unroll
                        for (int i = 0; i < V; ++i) sums[0][i] += to_compute(x[i]);
                      });
    unsigned* arrived = p.workspace.arrived + n;
    if (arrive_is_last(arrived, blocks)) {
      write_logits<T, V>(p, n);
      publish(arrived);
    }
    wait_published(arrived, blocks);
    map_stretch<T, V>(p, n, stretch);
  }
}

}  // namespace

int dynamic_relu_fwd_resident(const DynamicReluFwdParams& params) {
  return select_vectors(params.shape.dtype, params.shape.channels, {params.rows, params.out},
                        [&](auto zero, auto vector) {
                          using T = decltype(zero);
                          return max_active_blocks(dynamic_relu_fwd_kernel<T, vector()>,
                                                   kDynamicReluThreads,
                                                   FwdShared<T, vector()>::bytes(params.shape));
                        });
}

cudaError_t launch_dynamic_relu_fwd(const DynamicReluFwdParams& params, const DynamicReluGrid& grid,
                                    const DynamicReluWorkspace& workspace, cudaStream_t stream) {
  if (params.shape.images == 0) return cudaSuccess;
  return select_vectors(params.shape.dtype, params.shape.channels, {params.rows, params.out},
                        [&](auto zero, auto vector) {
                          using T = decltype(zero);
                          const LaunchConfig config{
                              .grid = dim3(grid.blocks_per_image, grid.images_in_flight),
                              .block = dim3(kDynamicReluThreads),
                              .shared_bytes = FwdShared<T, vector()>::bytes(params.shape),
                              .stream = stream,
                              .cooperative = grid.cooperative,
                          };
                          return launch(dynamic_relu_fwd_kernel<T, vector()>, config,
                                        {params, workspace});
                        });
}

}  // namespace dyhead::cuda

namespace dyhead {

void run_dynamic_relu_fwd(const DynamicReluFwdParams& params, Context& context) {
  cuda::run_dynamic_relu(params, context, cuda::dynamic_relu_fwd_resident(params), 1,
                         cuda::launch_dynamic_relu_fwd);
}

}  // namespace dyhead
