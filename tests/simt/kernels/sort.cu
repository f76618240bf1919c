#include "sort.h"

#include "cuda/tile/radix_sort.cuh"

namespace dyhead::simt_test {

using namespace dyhead::cuda;

__global__ void __launch_bounds__(kTileThreads) sort_kernel(SortParams p) {
  const size_t bytes = sizeof(SortItem) * static_cast<size_t>(p.count);
  auto* items = dynamic_shared<SortItem>(0, static_cast<size_t>(p.count));
  auto* spare = dynamic_shared<SortItem>(bytes, static_cast<size_t>(p.count));
  auto* counters = dynamic_shared<int>(2 * bytes, kSortCounters);
  for (int i = tile_thread(); i < p.count; i += kTileThreads) {
    items[i] = {p.keys[i], static_cast<uint32_t>(i)};
  }
  __syncthreads();
  const SortItem* sorted = sort_items(items, spare, counters, p.count, p.first, p.range);
  for (int i = tile_thread(); i < p.count; i += kTileThreads) p.order[i] = sorted[i].value;
}

cudaError_t launch_sort(const SortParams& params, cudaStream_t stream) {
  const size_t items = 2 * sizeof(SortItem) * static_cast<size_t>(params.count);
  return launch(sort_kernel,
                {.grid = dim3(1),
                 .block = dim3(kTileThreads),
                 .shared_bytes = items + sizeof(int) * kSortCounters,
                 .stream = stream},
                params);
}

}  // namespace dyhead::simt_test
