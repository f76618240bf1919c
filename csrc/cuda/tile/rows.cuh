// How the threads of a block share the rows and channels of a matrix.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../../common/dispatch.h"
#include "primitives.cuh"

namespace dyhead::cuda {

// `lanes` neighbouring threads cover the vectors of a row (in several passes where there are more),
// `rows` rows at a time.
struct RowTiling {
  int lanes, rows;  // both powers of two; lanes * rows threads
  int lane, row;    // of this thread
};

template <int kThreads>
DYHEAD_DEVICE RowTiling row_tiling(int vectors) {
  int lanes = 1;
  while (lanes * 2 <= vectors && lanes < kThreads) lanes *= 2;
  const int thread = static_cast<int>(threadIdx.x);
  return {lanes, kThreads / lanes, thread % lanes, thread / lanes};
}

// Sums, over the rows of a tiling and in a fixed order, the K quantities of V channels that each
// thread holds, and calls write(k, lane, i, total) for channel i of a lane's vector: neighbouring
// threads have neighbouring channels, so that what they write fills sectors. `scratch` has room for
// K * V values per thread, and is aligned to 16 bytes.
template <int kThreads, int K, int V, class F, class Write>
DYHEAD_DEVICE void sum_rows(const RowTiling& tiling, const F (&sums)[K][V], F* scratch,
                            Write&& write) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    Vec<F, V> own;
#pragma unroll
    for (int i = 0; i < V; ++i) own[i] = sums[k][i];
    store_vec(scratch + (k * kThreads + thread) * V, own);
  }
  __syncthreads();
  const int channels = V * tiling.lanes;
  for (int o = thread; o < K * channels; o += kThreads) {
    const int k = o / channels;
    const int channel = o % channels;
    F total = F(0);
    for (int r = 0; r < tiling.rows; ++r) {
      total += scratch[k * kThreads * V + r * channels + channel];
    }
    write(k, channel / V, channel % V, total);
  }
  __syncthreads();
}

// Calls f(T{}, std::integral_constant<int, V>{}), where V values are 16 bytes if the channels and
// pointers allow such accesses, else V = 1.
template <class Select>
auto select_vectors(DType dtype, int64_t channels, std::initializer_list<const void*> pointers,
                    Select&& f) {
  return dispatch_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    bool aligned = channels % kVector == 0;
    for (const void* p : pointers) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
    return aligned ? f(zero, std::integral_constant<int, kVector>{})
                   : f(zero, std::integral_constant<int, 1>{});
  });
}

}  // namespace dyhead::cuda
