// What the forward and the backward kernel of dynamic_relu share on the device.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "dynamic_relu.h"
#include "primitives.cuh"

namespace dyhead::cuda {

inline constexpr int kDynamicReluWarps = kDynamicReluThreads / kWarpSize;

// Threads of a block over the rows of an image: `lanes` neighbouring threads cover the vectors of a
// row (in several passes where there are more), `rows` rows at a time.
struct RowTiling {
  int lanes, rows;  // both powers of two; lanes * rows threads
  int lane, row;    // of this thread
};

DYHEAD_DEVICE RowTiling row_tiling(int vectors) {
  int lanes = 1;
  while (lanes * 2 <= vectors && lanes < kDynamicReluThreads) lanes *= 2;
  const int thread = static_cast<int>(threadIdx.x);
  return {lanes, kDynamicReluThreads / lanes, thread % lanes, thread / lanes};
}

struct Stretch {
  int64_t first, last;
};

// The pixels of block b out of `blocks`.
DYHEAD_DEVICE Stretch stretch_of(int64_t pixels, int blocks, int b) {
  const int64_t length = (pixels + blocks - 1) / blocks;
  const int64_t first = length * b < pixels ? length * b : pixels;
  return {first, first + length < pixels ? first + length : pixels};
}

// Sums K quantities per channel over a stretch of pixels: out[k * channels + c].
// accumulate(pixel, first_channel, sums[K][V]) adds one pixel's share of V channels. `scratch`
// holds K * V values per thread.
template <int K, int V, class F, class Accumulate>
DYHEAD_DEVICE void sum_stretch(const Stretch& stretch, int channels, F* scratch, F* out,
                               Accumulate&& accumulate) {
  const int vectors = channels / V;
  const RowTiling tiling = row_tiling(vectors);
  const int thread = static_cast<int>(threadIdx.x);
  for (int first = 0; first < vectors; first += tiling.lanes) {
    const int vector = first + tiling.lane;
    F sums[K][V] = {};
    if (vector < vectors) {
#pragma unroll 4
      for (int64_t p = stretch.first + tiling.row; p < stretch.last; p += tiling.rows) {
        accumulate(p, vector * V, sums);
      }
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        scratch[(k * V + i) * kDynamicReluThreads + thread] = sums[k][i];
      }
    }
    __syncthreads();
    for (int o = thread; o < K * V * tiling.lanes; o += kDynamicReluThreads) {
      const int lane = o % tiling.lanes;
      const int quantity = o / tiling.lanes;
      F total = F(0);
      for (int r = 0; r < tiling.rows; ++r) {
        total += scratch[quantity * kDynamicReluThreads + r * tiling.lanes + lane];
      }
      if (first + lane < vectors) {
        const int channel = (first + lane) * V + quantity % V;
        out[static_cast<int64_t>(quantity / V) * channels + channel] = total;
      }
    }
    __syncthreads();
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

// True in the block that arrives last, to which everything the others wrote is then visible.
DYHEAD_DEVICE bool arrive_is_last(unsigned* arrived, int blocks) {
  DYHEAD_SHARED(unsigned, order, 1);
  __syncthreads();
  if (threadIdx.x == 0) order[0] = atomic_add_acq_rel(arrived, 1);
  __syncthreads();
  return order[0] == static_cast<unsigned>(blocks) - 1;
}

// The last block, once it has written what the others wait for.
DYHEAD_DEVICE void publish(unsigned* arrived) {
  __syncthreads();
  if (threadIdx.x == 0) atomic_add_acq_rel(arrived, 1);
}

DYHEAD_DEVICE void wait_published(const unsigned* arrived, int blocks) {
  if (threadIdx.x == 0) wait_until(arrived, static_cast<unsigned>(blocks) + 1);
  __syncthreads();
}

// Selects the kernel for a call: the storage type, and 16-byte vectors where channels and pointers
// allow them. f is called with (T{}, std::integral_constant<int, V>{}).
template <class Select>
auto select_dynamic_relu(const DynamicReluShape& shape, std::initializer_list<const void*> pointers,
                         Select&& f) {
  return dispatch_dtype(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    bool aligned = shape.channels % kVector == 0;
    for (const void* p : pointers) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
    return aligned ? f(zero, std::integral_constant<int, kVector>{})
                   : f(zero, std::integral_constant<int, 1>{});
  });
}

}  // namespace dyhead::cuda
