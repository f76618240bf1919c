#include "fuse_branches.cuh"

namespace dyhead::cuda {
namespace {

struct FwdKernelParams {
  FuseDeviceTables tables;
  const void* y;
  const void* scale;
  const void* shift;
  const void* coefficients;
  void* out;
};
static_assert(sizeof(FwdKernelParams) <= kMaxParameterBytes);

template <class T, int V>
__global__ void __launch_bounds__(kFuseThreads, 2)
    fuse_branches_fwd_kernel(const __grid_constant__ FwdKernelParams p) {
  using F = compute_t<T>;
  const FuseDeviceTables& t = p.tables;
  const FuseDeviceLevel& level = level_of_block(t, static_cast<int>(blockIdx.x));
  const int block = static_cast<int>(blockIdx.x) - level.patches.first_block;
  const int vectors = static_cast<int>(t.channels / V);
  const RowTiling tiling = row_tiling<kFuseThreads>(vectors);
  using Positions = PatchPositions<F, kFuseThreads>;
  DYHEAD_SHARED(Interpolation<F>, shared, Positions::kCount);
  Positions positions(shared);
  DYHEAD_SHARED(F, shifts, V * kFuseThreads);
  using Kept = KeptVectors<F, V, kFuseThreads>;
  const Kept kept_shift(shifts);

  for (int64_t image = blockIdx.y; image < t.images; image += gridDim.y) {
    for (int first = 0; first < vectors; first += tiling.lanes) {
      const bool has_vector = first + tiling.lane < vectors;
      const int64_t channel = has_vector ? static_cast<int64_t>(first + tiling.lane) * V : 0;
      const FuseScales<F, V> scales(t, level, p.scale, image, channel);
      const auto curve = FuseCurve<F, V>::load(t, level, p.shift, p.coefficients, image, channel);
      kept_shift.keep(0, curve.k[0]);
      const BranchReader<T, V> reader(t, level, p.y, image, channel);
      for (int32_t i = block; i < level.patches.count; i += level.patches.blocks) {
        const Patch patch = patch_of(t, level.patches, level.out, i);
        positions.compute(level, patch);
        if (!has_vector) continue;
        for_each_pixel(t, patch, tiling, [&](int y, int x) {
          const int64_t pixel = static_cast<int64_t>(patch.y + y) * level.out.width + patch.x + x;
          reload_memory();
          F z[V];
#pragma unroll
          for (int part = 0; part < Kept::kParts; ++part) {
            const auto shift = kept_shift.get(0, part);
#pragma unroll
            for (int c = 0; c < Kept::kPart; ++c) z[part * Kept::kPart + c] = shift[c];
          }
          reader.read(t, level, positions, pixel, y, x, [&](int b, const F(&u)[V]) {
#pragma unroll
            for (int c = 0; c < V; ++c) z[c] += scales.of[b][c] * u[c];
          });
          Vec<T, V> result;
#pragma unroll
          for (int c = 0; c < V; ++c) {
            result[c] = from_compute<T>(dynamic_relu_value(curve.relu(c), z[c]));
          }
          const int64_t row = level.out.first_row + image * level.out.pixels() + pixel;
          store_vec_global(static_cast<T*>(p.out) + (row * t.channels + channel), result);
        });
      }
    }
  }
}

}  // namespace

cudaError_t launch_fuse_branches_fwd(const FuseBranchesFwdParams& params,
                                     const FuseLaunches& launches, cudaStream_t stream) {
  const FuseTables& t = *params.tables;
  if (t.images == 0) return cudaSuccess;
  return select_vectors(
      t.dtype, t.channels, {params.y, params.scale, params.shift, params.coefficients, params.out},
      [&](auto zero, auto vector) {
        using T = decltype(zero);
        for (const FuseDeviceTables& tables : launches.tables) {
          const LaunchConfig config{.grid = fuse_grid(tables.blocks, launches),
                                    .block = dim3(kFuseThreads),
                                    .stream = stream};
          const cudaError_t error = launch(
              fuse_branches_fwd_kernel<T, vector()>, config,
              {tables, params.y, params.scale, params.shift, params.coefficients, params.out});
          if (error != cudaSuccess) return error;
        }
        return cudaSuccess;
      });
}

}  // namespace dyhead::cuda

namespace dyhead {

void run_fuse_branches_fwd(const FuseBranchesFwdParams& params, Context& context) {
  const FuseTables& t = *params.tables;
  const cuda::FuseLaunches launches = cuda::fuse_launches(t, cuda::fuse_fwd_tiling(t.channels));
  context.check(cuda::launch_fuse_branches_fwd(params, launches, context.stream()));
}

}  // namespace dyhead
