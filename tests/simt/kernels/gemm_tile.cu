#include "gemm_tile.h"

#include "cuda/tile/primitives.cuh"

namespace dyhead::simt_test {

using namespace dyhead::cuda;

// 128 threads: 2 x 2 warps of 32 x 32 outputs. The depth streams through three stages of 32.
constexpr int kTile = 64;
constexpr int kThreads = 128;
constexpr int kChunk = 32;
constexpr int kStages = 3;
// 80-byte rows: the eight 16-byte rows that ldmatrix reads at once fall into different banks.
constexpr int kPitch = kChunk + 8;
constexpr int kStageSize = kTile * kPitch;
constexpr size_t kOperandBytes = sizeof(uint16_t) * kStages * kStageSize;

template <class T>
DYHEAD_DEVICE void load_stage(T* stage, const T* source, int depth, int chunk) {
  constexpr int kVectors = kChunk / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kVectors; i += kThreads) {
    const int row = i / kVectors;
    const int column = i % kVectors * 8;
    cp_async<16>(stage + row * kPitch + column, source + row * depth + chunk * kChunk + column);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) gemm_tile_kernel(GemmTileParams<T> p) {
  T* a_stages = dynamic_shared<T>(0, kStages * kStageSize);
  T* b_stages = dynamic_shared<T>(kOperandBytes, kStages * kStageSize);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp_row = warp / 2 * 32;
  const int warp_column = warp % 2 * 32;
  const int chunks = p.depth / kChunk;

  const auto load = [&](int chunk) {
    if (chunk < chunks) {
      const int stage = chunk % kStages;
      load_stage(a_stages + stage * kStageSize, p.a, p.depth, chunk);
      load_stage(b_stages + stage * kStageSize, p.b, p.depth, chunk);
    }
    cp_async_commit();
  };
  for (int chunk = 0; chunk < kStages - 1; ++chunk) load(chunk);

  float acc[2][4][4] = {};
  for (int chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait_group<kStages - 2>();
    __syncthreads();
    load(chunk + kStages - 1);
    const T* a_stage = a_stages + chunk % kStages * kStageSize;
    const T* b_stage = b_stages + chunk % kStages * kStageSize;
    for (int k = 0; k < kChunk; k += 16) {
      uint32_t a[2][4];
      uint32_t b[2][4];
      for (int i = 0; i < 2; ++i) {
        // Matrices of a: rows 0-7 and 8-15 at k, then both at k + 8.
        const int row = warp_row + 16 * i + lane % 16;
        ldmatrix(a[i], a_stage + row * kPitch + k + lane / 16 * 8);
        // Matrices of b: columns 0-7 at k and k + 8, then columns 8-15.
        const int column = warp_column + 16 * i + lane / 16 * 8 + lane % 8;
        ldmatrix(b[i], b_stage + column * kPitch + k + lane / 8 % 2 * 8);
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
          const uint32_t fragment[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma_m16n8k16<T>(acc[i][j], a[i], fragment);
        }
      }
    }
  }

  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int row = warp_row + 16 * i + lane / 4;
      float* c = p.c + row * kTile + warp_column + 8 * j + lane % 4 * 2;
      store_vec(c, Vec<float, 2>{{acc[i][j][0], acc[i][j][1]}});
      store_vec(c + 8 * kTile, Vec<float, 2>{{acc[i][j][2], acc[i][j][3]}});
    }
  }
}

__global__ void __launch_bounds__(kWarpSize) tf32_tile_kernel(Tf32TileParams p) {
  const int g = static_cast<int>(threadIdx.x) / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  float acc[4] = {};
  for (int k = 0; k < p.depth; k += 8) {
    const float* a = p.a + g * p.depth + k + t;
    const float* b = p.b + (k + t) * 8 + g;
    const uint32_t a_fragment[4] = {to_tf32(a[0]), to_tf32(a[8 * p.depth]), to_tf32(a[4]),
                                    to_tf32(a[8 * p.depth + 4])};
    const uint32_t b_fragment[2] = {to_tf32(b[0]), to_tf32(b[4 * 8])};
    mma_m16n8k8_tf32(acc, a_fragment, b_fragment);
  }
  store_vec(p.c + g * 8 + 2 * t, Vec<float, 2>{{acc[0], acc[1]}});
  store_vec(p.c + (g + 8) * 8 + 2 * t, Vec<float, 2>{{acc[2], acc[3]}});
}

__global__ void __launch_bounds__(kWarpSize) f64_tile_kernel(F64TileParams p) {
  const int g = static_cast<int>(threadIdx.x) / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  double acc[2] = {};
  for (int k = 0; k < p.depth; k += 4) {
    mma_m8n8k4_f64(acc, p.a[g * p.depth + k + t], p.b[(k + t) * 8 + g]);
  }
  store_vec(p.c + g * 8 + 2 * t, Vec<double, 2>{{acc[0], acc[1]}});
}

template <int kMatrices>
DYHEAD_DEVICE void transpose(const uint16_t* rows, uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t registers[kMatrices];
  ldmatrix_trans(registers, rows + lane % (8 * kMatrices) * 8);
  for (int m = 0; m < kMatrices; ++m) out[m * kWarpSize + lane] = registers[m];
}

__global__ void __launch_bounds__(kWarpSize) transpose_kernel(TransposeParams p) {
  DYHEAD_SHARED(uint16_t, rows, 4 * 64);
  for (int i = static_cast<int>(threadIdx.x); i < p.matrices * 64; i += kWarpSize) {
    rows[i] = p.in[i];
  }
  __syncwarp();
  if (p.matrices == 1) {
    transpose<1>(rows, p.out);
  } else if (p.matrices == 2) {
    transpose<2>(rows, p.out);
  } else {
    transpose<4>(rows, p.out);
  }
}

template <class T>
cudaError_t launch_tile(const GemmTileParams<T>& params, cudaStream_t stream) {
  return launch(gemm_tile_kernel<T>,
                {.grid = dim3(1),
                 .block = dim3(kThreads),
                 .shared_bytes = 2 * kOperandBytes,
                 .stream = stream},
                params);
}

cudaError_t launch_gemm_tile(const GemmTileParams<bfloat16>& params, cudaStream_t stream) {
  return launch_tile(params, stream);
}

cudaError_t launch_gemm_tile(const GemmTileParams<float16>& params, cudaStream_t stream) {
  return launch_tile(params, stream);
}

cudaError_t launch_tf32_tile(const Tf32TileParams& params, cudaStream_t stream) {
  return launch(tf32_tile_kernel, {.grid = dim3(1), .block = dim3(kWarpSize), .stream = stream},
                params);
}

cudaError_t launch_f64_tile(const F64TileParams& params, cudaStream_t stream) {
  return launch(f64_tile_kernel, {.grid = dim3(1), .block = dim3(kWarpSize), .stream = stream},
                params);
}

cudaError_t launch_transpose(const TransposeParams& params, cudaStream_t stream) {
  return launch(transpose_kernel, {.grid = dim3(1), .block = dim3(kWarpSize), .stream = stream},
                params);
}

}  // namespace dyhead::simt_test
