// A stable sort of items in shared memory by a block of kTileThreads threads: least significant
// digit first, so the order of equal keys stays as it was and does not depend on who runs when.
#pragma once

#include "tile_gemm.cuh"

namespace dyhead::cuda {

struct SortItem {
  uint32_t key, value;
};

inline constexpr int kDigitBits = 6;
inline constexpr int kDigits = 1 << kDigitBits;
inline constexpr int kSortCounters = kTileWarps * kDigits;

// The lanes whose digit is this lane's, among those that have one.
DYHEAD_DEVICE unsigned lanes_with(int digit, bool exists) {
  unsigned lanes = __ballot_sync(kFullMask, exists);
#pragma unroll
  for (int bit = 0; bit < kDigitBits; ++bit) {
    const bool set = digit >> bit & 1;
    const unsigned votes = __ballot_sync(kFullMask, set);
    lanes &= set ? votes : ~votes;
  }
  return lanes;
}

// counts[warp][digit] becomes the number of items before that warp's first item with that digit.
DYHEAD_DEVICE void count_before(int* counts) {
  constexpr int kPerLane = kDigits / kWarpSize;
  const int lane = tile_thread();
  if (lane >= kWarpSize) return;
  int total = 0;
#pragma unroll
  for (int d = lane * kPerLane; d < (lane + 1) * kPerLane; ++d) {
    for (int w = 0; w < kTileWarps; ++w) {
      const int count = counts[w * kDigits + d];
      counts[w * kDigits + d] = total;
      total += count;
    }
  }
  int before = total;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int other = __shfl_up_sync(kFullMask, before, distance);
    if (lane >= distance) before += other;
  }
  before -= total;
  for (int w = 0; w < kTileWarps; ++w) {
#pragma unroll
    for (int d = lane * kPerLane; d < (lane + 1) * kPerLane; ++d) counts[w * kDigits + d] += before;
  }
}

// Sorts `count` items by their keys, from `first` to `first + range`. Returns where they are:
// `items` or `spare`, which is as large. Needs kSortCounters counters. Ends with a barrier; the
// caller puts one before.
DYHEAD_DEVICE SortItem* sort_items(SortItem* items, SortItem* spare, int* counters, int count,
                                   uint32_t first, uint32_t range) {
  const int lane = tile_thread() % kWarpSize;
  const int warp = tile_thread() / kWarpSize;
  // A warp's items are consecutive, so that a digit's items stay in order.
  const int per_warp = (count + kTileThreads - 1) / kTileThreads * kWarpSize;
  const int begin = warp * per_warp;
  const int end = begin + per_warp < count ? begin + per_warp : count;
  int* counts = counters + warp * kDigits;
#pragma unroll 1
  for (int shift = 0; shift < 32 && range >> shift != 0; shift += kDigitBits) {
    for (int i = tile_thread(); i < kSortCounters; i += kTileThreads) counters[i] = 0;
    __syncthreads();
    const auto digit_of = [&](const SortItem& item) {
      return static_cast<int>((item.key - first) >> shift & (kDigits - 1u));
    };
#pragma unroll 1
    for (int base = begin; base < end; base += kWarpSize) {
      const bool exists = base + lane < end;
      const int digit = exists ? digit_of(items[base + lane]) : 0;
      const unsigned equal = lanes_with(digit, exists);
      if (exists && (equal & ((1u << lane) - 1u)) == 0u) counts[digit] += __popc(equal);
      __syncwarp();
    }
    __syncthreads();
    count_before(counters);
    __syncthreads();
#pragma unroll 1
    for (int base = begin; base < end; base += kWarpSize) {
      const bool exists = base + lane < end;
      const SortItem item = exists ? items[base + lane] : SortItem{};
      const int digit = exists ? digit_of(item) : 0;
      const unsigned equal = lanes_with(digit, exists);
      const unsigned before = equal & ((1u << lane) - 1u);
      if (exists) spare[counts[digit] + __popc(before)] = item;
      __syncwarp();
      if (exists && before == 0u) counts[digit] += __popc(equal);
      __syncwarp();
    }
    __syncthreads();
    SortItem* sorted = spare;
    spare = items;
    items = sorted;
  }
  return items;
}

}  // namespace dyhead::cuda
