#include "fuse_branches.cuh"

namespace dyhead::cuda {
namespace {

// Null where a gradient is not wanted, as in FuseBranchesBwdParams.
struct BwdKernelParams {
  FuseDeviceTables tables;
  const void* grad_out;
  const void* y;
  const void* scale;
  const void* shift;
  const void* coefficients;
  void* grad_y;
  void* grad_scale;
  void* grad_shift;
  void* grad_coefficients;
  FuseBwdWorkspace workspace;
};
static_assert(sizeof(BwdKernelParams) <= kMaxParameterBytes);

// The type in which g_z is stored. It is as large as grad_y divided by the scales, which contain 1
// / standard deviation of a branch: float16 might round it to zero.
template <class T>
using grad_z_t = std::conditional_t<std::is_same_v<T, float16>, float, T>;

// Whether a wanted gradient follows from sum k of a level's blocks.
DYHEAD_DEVICE bool wants_sum(const BwdKernelParams& p, const FuseDeviceLevel& level, int k) {
  if (k >= kSumScale) return p.grad_scale != nullptr && k - kSumScale < level.branches;
  const bool of_shift = k == kSumB1 || k == kSumB2;
  return p.grad_coefficients != nullptr || (of_shift && p.grad_shift != nullptr);
}

// ---- first launch: per pixel of the levels ------------------------------------------------------

// Sums and scales leave registers for 12 warps in a multiprocessor with vectors of 8 channels, and
// for 16 with 4 or fewer.
inline constexpr int kPixelThreads = 128;
template <int V>
inline constexpr int kPixelBlocks = V > 4 ? 3 : 4;

template <class T, int V>
struct PixelPass {
  using F = compute_t<T>;
  using Kept = KeptVectors<F, V, kPixelThreads>;

  const BwdKernelParams& p;
  const FuseDeviceLevel& level;
  FuseScales<F, V> scales;
  Kept kept_curve;
  BranchReader<T, V> reader;
  // Indices in grad_out and g_z of the image's first pixel and the vector's first channel.
  int64_t out, kept;
  F sums[kFuseSums][V] = {};

  DYHEAD_DEVICE PixelPass(const BwdKernelParams& params, const FuseDeviceLevel& of, int64_t image,
                          int64_t channel, const Kept& memory)
      : p(params),
        level(of),
        scales(p.tables, level, p.scale, image, channel),
        kept_curve(memory),
        reader(p.tables, level, p.y, image, channel) {
    const int64_t pixels = image * level.out.pixels();
    out = (level.out.first_row + pixels) * p.tables.channels + channel;
    kept = (level.grad_z_row + pixels) * p.tables.channels + channel;
    const auto curve =
        FuseCurve<F, V>::load(p.tables, level, p.shift, p.coefficients, image, channel);
#pragma unroll
    for (int i = 0; i < curve.kValues; ++i) kept_curve.keep(i, curve.k[i]);
  }

  template <class Positions>
  DYHEAD_DEVICE void differentiate(const Positions& positions, const Patch& patch, int row,
                                   int column) {
    const FuseDeviceTables& t = p.tables;
    const int64_t pixel = static_cast<int64_t>(patch.y + row) * level.out.width + patch.x + column;
    const int64_t at = pixel * t.channels;
    const Vec<T, V> g = load_vec_readonly<V>(static_cast<const T*>(p.grad_out) + (out + at));
    F u[kMaxBranches][V];
    reader.read(t, level, positions, pixel, row, column, [&](int b, const F(&values)[V]) {
#pragma unroll
      for (int i = 0; i < V; ++i) u[b][i] = values[i];
    });
    Vec<F, V> gz;
    reload_memory();
#pragma unroll
    for (int part = 0; part < Kept::kParts; ++part) {
      FuseCurve<F, Kept::kPart> curve;
#pragma unroll
      for (int i = 0; i < curve.kValues; ++i) curve.k[i] = kept_curve.get(i, part);
#pragma unroll
      for (int j = 0; j < Kept::kPart; ++j) {
        const int i = part * Kept::kPart + j;
        F z = curve.shift(j);
#pragma unroll
        for (int b = 0; b < kMaxBranches; ++b) z += scales.of[b][i] * u[b][i];
        const DynamicReluCoefficients<F> relu = curve.relu(j);
        const F share = dynamic_relu_share(relu, z);
        const F first = to_compute(g[i]) * share;
        const F second = to_compute(g[i]) * (F(1) - share);
        gz[i] = first * relu.a1 + second * relu.a2;
        sums[kSumA1][i] += first * z;
        sums[kSumB1][i] += first;
        sums[kSumA2][i] += second * z;
        sums[kSumB2][i] += second;
#pragma unroll
        for (int b = 0; b < kMaxBranches; ++b) sums[kSumScale + b][i] += gz[i] * u[b][i];
      }
    }
    if (p.grad_y == nullptr) return;
#pragma unroll
    for (int b = 0; b < kMaxBranches; ++b) {
      if (b >= level.direct) continue;
      Vec<T, V> grad;
#pragma unroll
      for (int i = 0; i < V; ++i) grad[i] = from_compute<T>(scales.of[b][i] * gz[i]);
      store_vec_global(static_cast<T*>(p.grad_y) + (reader.map[b] + at), grad);
    }
    if (level.direct < level.branches) {
      Vec<grad_z_t<T>, V> rounded;
#pragma unroll
      for (int i = 0; i < V; ++i) rounded[i] = from_compute<grad_z_t<T>>(gz[i]);
      store_vec_global(static_cast<grad_z_t<T>*>(p.workspace.grad_z) + (kept + at), rounded);
    }
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kPixelThreads, kPixelBlocks<V>)
    fuse_branches_bwd_pixels_kernel(const __grid_constant__ BwdKernelParams p) {
  using F = compute_t<T>;
  const FuseDeviceTables& t = p.tables;
  const FuseDeviceLevel& level = level_of_block(t, static_cast<int>(blockIdx.x));
  const int block = static_cast<int>(blockIdx.x) - level.patches.first_block;
  const int vectors = static_cast<int>(t.channels / V);
  const RowTiling tiling = row_tiling<kPixelThreads>(vectors);
  using Positions = PatchPositions<F, kPixelThreads>;
  DYHEAD_SHARED(Interpolation<F>, shared, Positions::kCount);
  DYHEAD_SHARED(F, scratch, kFuseSums * V * kPixelThreads);  // before sums, the curves
  static_assert(FuseCurve<F, V>::kValues <= kFuseSums);
  const KeptVectors<F, V, kPixelThreads> kept_curve(scratch);
  Positions positions(shared);

  for (int64_t image = blockIdx.y; image < t.images; image += gridDim.y) {
    for (int first = 0; first < vectors; first += tiling.lanes) {
      const bool has_vector = first + tiling.lane < vectors;
      const int64_t channel = has_vector ? static_cast<int64_t>(first + tiling.lane) * V : 0;
      PixelPass<T, V> pass(p, level, image, channel, kept_curve);
      for (int32_t i = block; i < level.patches.count; i += level.patches.blocks) {
        const Patch patch = patch_of(t, level.patches, level.out, i);
        positions.compute(level, patch);
        if (!has_vector) continue;
        for_each_pixel(t, patch, tiling, [&](int row, int column) {
          pass.differentiate(positions, patch, row, column);
        });
      }
      if (p.workspace.partial == nullptr) continue;
      F* partial =
          static_cast<F*>(p.workspace.partial) +
          (level.first_partial + image * level.patches.blocks + block) * kFuseSums * t.channels;
      __syncthreads();  // the curves are no longer read
      sum_rows<kPixelThreads>(tiling, pass.sums, scratch, [&](int k, int lane, int i, F total) {
        if (first + lane < vectors && wants_sum(p, level, k)) {
          partial[k * t.channels + static_cast<int64_t>(first + lane) * V + i] = total;
        }
      });
    }
  }
}

// ---- second launch: the blocks' sums, and the upsampled branches --------------------------------

inline constexpr int kFuseWarps = kFuseThreads / kWarpSize;
inline constexpr int kSumChannels = kWarpSize;  // per block, one for each lane

// Adds the sums of kSumChannels channels over all blocks of a level: each warp adds a part of the
// blocks, then the warps are added.
template <class F>
DYHEAD_DEVICE void sum_partials(const BwdKernelParams& p, const FuseDeviceLevel& level,
                                int64_t first_channel, int64_t image, F* scratch) {
  const FuseDeviceTables& t = p.tables;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t channel = first_channel + lane;
  const bool has_channel = channel < t.channels;
  F sums[kFuseSums] = {};
  if (has_channel) {
    const F* partial =
        static_cast<const F*>(p.workspace.partial) +
        (level.first_partial + image * level.patches.blocks) * kFuseSums * t.channels + channel;
#pragma unroll 4
    for (int b = warp; b < level.patches.blocks; b += kFuseWarps) {
#pragma unroll
      for (int k = 0; k < kFuseSums; ++k) {
        if (wants_sum(p, level, k)) {
          sums[k] += partial[(static_cast<int64_t>(b) * kFuseSums + k) * t.channels];
        }
      }
    }
  }
  __syncthreads();  // the last image's sums are no longer read
#pragma unroll
  for (int k = 0; k < kFuseSums; ++k) scratch[(k * kFuseWarps + warp) * kWarpSize + lane] = sums[k];
  __syncthreads();
  const auto total_of = [&](int k) {
    F total = F(0);
#pragma unroll
    for (int w = 0; w < kFuseWarps; ++w) total += scratch[(k * kFuseWarps + w) * kWarpSize + lane];
    return total;
  };
  if (!has_channel) return;
  const int64_t row = level.index * t.images + image;
  const int64_t coefficient = row * 4 * t.channels + channel;
  if (warp < kSumScale && p.grad_coefficients != nullptr) {
    F* grad = static_cast<F*>(p.grad_coefficients) + coefficient;
    grad[warp * t.channels] = total_of(warp);
  } else if (warp >= kSumScale && warp < kFuseSums && wants_sum(p, level, warp)) {
    const int64_t scale_row = level.branch[warp - kSumScale].index * t.images + image;
    static_cast<F*>(p.grad_scale)[scale_row * t.channels + channel] = total_of(warp);
  }
  if (warp == kFuseWarps - 1 && p.grad_shift != nullptr) {
    // The sum of g_z, which is first a1 + second a2.
    static_assert(kFuseSums < kFuseWarps);
    const F* k = static_cast<const F*>(p.coefficients) + coefficient;
    static_cast<F*>(p.grad_shift)[row * t.channels + channel] =
        k[0] * total_of(kSumB1) + k[2 * t.channels] * total_of(kSumB2);
  }
}

// The rows and columns of the level that read those of a patch of an upsampled branch.
template <class F>
struct PatchReaders {
  static constexpr int kCount = 2 * kFuseMaxPatchSide;

  Readers<F>* shared;

  DYHEAD_DEVICE void compute(const FuseDeviceLevel& level, const MapShape& map,
                             const Patch& patch) const {
    __syncthreads();  // the last patch's are no longer read
    const int i = static_cast<int>(threadIdx.x);
    if (i < patch.rows) {
      shared[i] = readers_of<F>(patch.y + i, map.height, level.out.height, level.mode);
    }
    const int column = i - kFuseMaxPatchSide;
    if (column >= 0 && column < patch.columns) {
      shared[i] = readers_of<F>(patch.x + column, map.width, level.out.width, level.mode);
    }
    __syncthreads();
  }

  DYHEAD_DEVICE const Readers<F>& row(int i) const { return shared[i]; }
  DYHEAD_DEVICE const Readers<F>& column(int i) const { return shared[kFuseMaxPatchSide + i]; }
};

// grad_y of an upsampled branch: each of its pixels gets the scaled, weighted sum of g_z over the
// pixels of the level that read it.
template <class T, int V>
DYHEAD_DEVICE void gather_branch(const BwdKernelParams& p, const FuseDeviceLevel& level,
                                 const FuseDeviceBranch& branch, int block, int64_t image,
                                 const PatchReaders<compute_t<T>>& readers) {
  using F = compute_t<T>;
  const FuseDeviceTables& t = p.tables;
  const int vectors = static_cast<int>(t.channels / V);
  const RowTiling tiling = row_tiling<kFuseThreads>(vectors);
  const F* scale = static_cast<const F*>(p.scale) + (branch.index * t.images + image) * t.channels;
  const auto* grad_z = static_cast<const grad_z_t<T>*>(p.workspace.grad_z) +
                       (level.grad_z_row + image * level.out.pixels()) * t.channels;
  T* grad_y =
      static_cast<T*>(p.grad_y) + (branch.map.first_row + image * branch.map.pixels()) * t.channels;
  for (int32_t i = block; i < branch.gather.count; i += branch.gather.blocks) {
    const Patch patch = patch_of(t, branch.gather, branch.map, i);
    readers.compute(level, branch.map, patch);
    for (int vector = tiling.lane; vector < vectors; vector += tiling.lanes) {
      const int64_t channel = static_cast<int64_t>(vector) * V;
      const Vec<F, V> s = load_vec_readonly<V>(scale + channel);
      for_each_pixel(t, patch, tiling, [&](int row, int column) {
        const Readers<F> ys = readers.row(row);
        const Readers<F> xs = readers.column(column);
        F sums[V] = {};
        for (int32_t y = ys.begin; y < ys.end; ++y) {
          const int64_t line = static_cast<int64_t>(y) * level.out.width;
          F line_sums[V] = {};
#pragma unroll 2
          for (int32_t x = xs.begin; x < xs.end; ++x) {
            const F weight = xs.weight(x);
            const Vec<grad_z_t<T>, V> g =
                load_vec_readonly<V>(grad_z + (line + x) * t.channels + channel);
#pragma unroll
            for (int c = 0; c < V; ++c) line_sums[c] += weight * to_compute(g[c]);
          }
          const F weight = ys.weight(y);
#pragma unroll
          for (int c = 0; c < V; ++c) sums[c] += weight * line_sums[c];
        }
        Vec<T, V> grad;
#pragma unroll
        for (int c = 0; c < V; ++c) grad[c] = from_compute<T>(s[c] * sums[c]);
        const int64_t pixel =
            static_cast<int64_t>(patch.y + row) * branch.map.width + patch.x + column;
        store_vec_global(grad_y + pixel * t.channels + channel, grad);
      });
    }
  }
}

// The first `gather_blocks` blocks gather; the others add sums, level by level.
template <class T, int V>
__global__ void __launch_bounds__(kFuseThreads, 2)
    fuse_branches_bwd_merge_kernel(const __grid_constant__ BwdKernelParams p) {
  using F = compute_t<T>;
  const FuseDeviceTables& t = p.tables;
  DYHEAD_SHARED(Readers<F>, shared, PatchReaders<F>::kCount);
  DYHEAD_SHARED(F, scratch, kFuseSums * kFuseThreads);
  int block = static_cast<int>(blockIdx.x);
  if (block >= t.gather_blocks) {
    block -= t.gather_blocks;
    const FuseDeviceLevel& level = t.level[block % t.levels];
    const int64_t first_channel = static_cast<int64_t>(block / t.levels) * kSumChannels;
    for (int64_t image = blockIdx.y; image < t.images; image += gridDim.y) {
      sum_partials(p, level, first_channel, image, scratch);
    }
    return;
  }
  for (int l = 0; l < t.levels; ++l) {
    const FuseDeviceLevel& level = t.level[l];
    for (int b = level.direct; b < level.branches; ++b) {
      const FuseDeviceBranch& branch = level.branch[b];
      const int of_branch = block - branch.gather.first_block;
      if (of_branch < 0 || of_branch >= branch.gather.blocks) continue;
      for (int64_t image = blockIdx.y; image < t.images; image += gridDim.y) {
        gather_branch<T, V>(p, level, branch, of_branch, image, PatchReaders<F>{shared});
      }
    }
  }
}

}  // namespace

cudaError_t launch_fuse_branches_bwd(const FuseBranchesBwdParams& params,
                                     const FuseLaunches& launches,
                                     const FuseBwdWorkspace& workspace, cudaStream_t stream) {
  const FuseTables& t = *params.tables;
  const bool sums = wants_sums(params);
  if (t.images == 0 || (!sums && params.grad_y == nullptr)) return cudaSuccess;
  const auto select = [&](auto zero, auto vector) {
    using T = decltype(zero);
    for (const FuseDeviceTables& tables : launches.tables) {
      BwdKernelParams p{tables,
                        params.grad_out,
                        params.y,
                        params.scale,
                        params.shift,
                        params.coefficients,
                        params.grad_y,
                        params.grad_scale,
                        params.grad_shift,
                        params.grad_coefficients,
                        workspace};
      LaunchConfig config{.grid = fuse_grid(tables.blocks, launches),
                          .block = dim3(kPixelThreads),
                          .stream = stream};
      cudaError_t error = launch(fuse_branches_bwd_pixels_kernel<T, vector()>, config, p);
      if (error != cudaSuccess) return error;
      if (params.grad_y == nullptr) p.tables.gather_blocks = 0;
      const int64_t slices = sums ? (t.channels + kSumChannels - 1) / kSumChannels : 0;
      const int64_t blocks = p.tables.gather_blocks + tables.levels * slices;
      if (blocks == 0) continue;
      config.block = dim3(kFuseThreads);
      config.grid = fuse_grid(blocks, launches);
      error = launch(fuse_branches_bwd_merge_kernel<T, vector()>, config, p);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  };
  return select_vectors(t.dtype, t.channels,
                        {params.grad_out, params.y, params.scale, params.shift, params.coefficients,
                         params.grad_y, workspace.grad_z},
                        select);
}

}  // namespace dyhead::cuda

namespace dyhead {

void run_fuse_branches_bwd(const FuseBranchesBwdParams& params, Context& context) {
  const FuseTables& t = *params.tables;
  const cuda::FuseLaunches launches = cuda::fuse_launches(t, cuda::fuse_bwd_tiling(t.channels));
  const int64_t kept_bytes = t.dtype == DType::kFloat16 ? 4 : element_bytes(t.dtype);
  cuda::FuseBwdWorkspace workspace{};
  if (cuda::wants_sums(params)) {
    workspace.partial =
        context.allocate(launches.partials * cuda::kFuseSums * t.channels * compute_bytes(t.dtype));
  }
  if (params.grad_y != nullptr) {
    workspace.grad_z = context.allocate(launches.grad_z_rows * t.channels * kept_bytes);
  }
  context.check(cuda::launch_fuse_branches_bwd(params, launches, workspace, context.stream()));
}

}  // namespace dyhead
