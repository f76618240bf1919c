// Device code that the forward and the backward kernels of dynamic_relu share.
#pragma once

#include <cstdint>

#include "../context.h"
#include "../tile/rows.cuh"
#include "dynamic_relu.h"

namespace dyhead::cuda {

inline constexpr int kDynamicReluWarps = kDynamicReluThreads / kWarpSize;

struct Stretch {
  int64_t first, last;
};

// The range of pixels of block b out of `blocks`.
DYHEAD_DEVICE Stretch stretch_of(int64_t pixels, int blocks, int b) {
  const int64_t length = (pixels + blocks - 1) / blocks;
  const int64_t first = length * b < pixels ? length * b : pixels;
  return {first, first + length < pixels ? first + length : pixels};
}

// Sums K quantities per channel over a range of pixels, to out[k * channels + c]. accumulate(pixel,
// first_channel, sums[K][V]) adds one pixel to the sums of V channels. `scratch` has room for K * V
// values per thread.
template <int K, int V, class F, class Accumulate>
DYHEAD_DEVICE void sum_stretch(const Stretch& stretch, int channels, F* scratch, F* out,
                               Accumulate&& accumulate) {
  const int vectors = channels / V;
  const RowTiling tiling = row_tiling<kDynamicReluThreads>(vectors);
  for (int first = 0; first < vectors; first += tiling.lanes) {
    const int vector = first + tiling.lane;
    F sums[K][V] = {};
    if (vector < vectors) {
#pragma unroll 4
      for (int64_t p = stretch.first + tiling.row; p < stretch.last; p += tiling.rows) {
        accumulate(p, vector * V, sums);
      }
    }
    sum_rows<kDynamicReluThreads>(tiling, sums, scratch, [&](int k, int lane, int i, F total) {
      if (first + lane < vectors) {
        out[static_cast<int64_t>(k) * channels + (first + lane) * V + i] = total;
      }
    });
  }
}

// The sum over blocks of partial[b * stride + i].
template <class F>
DYHEAD_DEVICE F sum_blocks(const F* partial, int blocks, int64_t stride, int64_t i) {
  F total = F(0);
#pragma unroll 8
  for (int b = 0; b < blocks; ++b) total += partial[b * stride + i];
  return total;
}

// True in the block that arrives last; all that the other blocks wrote is visible to it. Called by
// the threads that meet by Threads::sync(), thread 0 among them.
template <class Threads = BlockThreads>
DYHEAD_DEVICE bool arrive_is_last(unsigned* arrived, int blocks) {
  DYHEAD_SHARED(unsigned, order, 1);
  Threads::sync();
  if (threadIdx.x == 0) order[0] = atomic_add_acq_rel(arrived, 1);
  Threads::sync();
  return order[0] == static_cast<unsigned>(blocks) - 1;
}

// Called by the last block after it has written what the others wait for.
DYHEAD_DEVICE void publish(unsigned* arrived) {
  __syncthreads();
  if (threadIdx.x == 0) atomic_add_acq_rel(arrived, 1);
}

DYHEAD_DEVICE void wait_published(const unsigned* arrived, int blocks) {
  if (threadIdx.x == 0) wait_until(arrived, static_cast<unsigned>(blocks) + 1);
  __syncthreads();
}

// Allocates what a kernel needs beside its tensors, for `quantities` sums per channel, and launches
// it on the `resident` blocks that the device holds at once.
template <class Params>
void run_dynamic_relu(const Params& params, Context& context, int resident, int quantities,
                      cudaError_t (*launch)(const Params&, const DynamicReluGrid&,
                                            const DynamicReluWorkspace&, cudaStream_t)) {
  const DynamicReluShape& s = params.shape;
  if (resident <= 0) {
    throw std::runtime_error("expected channels whose sums fit the shared memory of a block, got " +
                             std::to_string(s.channels) + " channels with a hidden layer of " +
                             std::to_string(s.hidden) +
                             "; run this layer under backend(\"reference\")");
  }
  const DynamicReluGrid grid = dynamic_relu_grid(s.images, s.pixels, resident);
  const int64_t bytes = s.images * s.channels * compute_bytes(s.dtype);
  const DynamicReluWorkspace workspace{
      context.allocate(bytes * grid.blocks_per_image * quantities), context.allocate(bytes),
      static_cast<unsigned*>(context.allocate_zeros(s.images * sizeof(unsigned)))};
  context.check(launch(params, grid, workspace, context.stream()));
}

}  // namespace dyhead::cuda
