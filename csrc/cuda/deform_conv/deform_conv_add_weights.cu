#include "../tile/tile_gemm.cuh"
#include "deform_conv_bwd_weights.h"

namespace dyhead::cuda {
namespace {

constexpr int kUnit = 4;
constexpr int kRowThreads = kWeightCols / kUnit;
constexpr int kBlockRows = kTileThreads / kRowThreads;  // output channels of a block

// Adds up the slices of each weight matrix. blockIdx.y is the matrix; blockIdx.x is the block of
// columns that computed the slices and, varying fastest, the group of output channels.
template <class F>
__global__ void __launch_bounds__(kTileThreads, 4)
    deform_add_weights_kernel(const __grid_constant__ DeformAddWeightsParams p) {
  const DeformShape& s = p.shape;
  const auto matrix = static_cast<int32_t>(blockIdx.y);
  DYHEAD_SHARED(int, used, 1);
  if (threadIdx.x == 0) used[0] = -1;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < p.slices.count; i += kTileThreads) {
    if (p.slices.matrix[i] == matrix) used[0] = i;
  }
  __syncthreads();
  const int use = used[0];
  if (use < 0 && p.add) return;

  const int row_blocks = p.columns.outs / kBlockRows;
  const auto block = static_cast<int32_t>(blockIdx.x) / row_blocks;
  const int row = static_cast<int>(blockIdx.x) % row_blocks * kBlockRows +
                  static_cast<int>(threadIdx.x) / kRowThreads;
  const int column = static_cast<int>(threadIdx.x) % kRowThreads * kUnit;
  const DeformWeightPlace place = weight_place(p.columns, block);
  const int32_t group_outputs = static_cast<int32_t>(s.out_channels) / s.groups;
  const int32_t group_channels = static_cast<int32_t>(s.channels) / s.groups;
  const int32_t out = place.out_panel * p.columns.outs + row;
  const DeformWeightSlot slot = weight_slot(
      s, p.columns, place.group, place.slot_block * p.columns.slots() + column / p.columns.depth);
  const int32_t channel = column % p.columns.depth;  // in the slot
  if (out >= group_outputs || channel >= slot.count) return;

  F sum[kUnit] = {F(0), F(0), F(0), F(0)};
  if (use >= 0) {
    const int64_t stride = p.columns.blocks(s) * p.columns.values();
    const F* partial = static_cast<const F*>(p.partial) + p.slices.first[use] * stride +
                       block * p.columns.values() + row * kWeightCols + column;
    const int32_t slices = p.slices.first[use + 1] - p.slices.first[use];
#pragma unroll 4
    for (int32_t i = 0; i < slices; ++i, partial += stride) {
      const Vec<F, kUnit> part = load_vec_readonly<kUnit>(partial);
#pragma unroll
      for (int k = 0; k < kUnit; ++k) sum[k] += part[k];
    }
  }
  const int64_t output =
      matrix * s.out_channels + static_cast<int64_t>(place.group) * group_outputs + out;
  F* to =
      static_cast<F*>(p.grad_weights) +
      (output * group_channels + slot.first + channel - place.group * group_channels) * s.taps() +
      slot.tap;
#pragma unroll
  for (int k = 0; k < kUnit; ++k) {
    if (channel + k >= slot.count) break;
    F& value = to[k * static_cast<int64_t>(s.taps())];
    value = p.add ? value + sum[k] : sum[k];
  }
}

template <class F>
cudaError_t launch_add(const DeformAddWeightsParams& params, cudaStream_t stream) {
  const int32_t blocks = params.columns.blocks(params.shape) * (params.columns.outs / kBlockRows);
  if (blocks == 0 || params.matrices == 0) return cudaSuccess;
  return launch(
      deform_add_weights_kernel<F>,
      {.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(params.matrices)),
       .block = dim3(kTileThreads),
       .stream = stream},
      params);
}

}  // namespace

cudaError_t launch_deform_add_weights(const DeformAddWeightsParams& params, cudaStream_t stream) {
  return params.is_float64 ? launch_add<double>(params, stream) : launch_add<float>(params, stream);
}

}  // namespace dyhead::cuda
