// Conversion between a pyramid's levels [N, C, H, W] and one matrix of rows: the arguments of its
// kernels, shared by the CPU and the CUDA kernels. Elements are moved, never computed with.
#pragma once

#include <cstdint>
#include <vector>

#include "deform_jobs.h"

namespace dyhead {

class Context;

struct PackLevel {
  MapShape map;        // its rows
  void* data;          // [N, C, H, W]: read to pack, written to unpack
  bool channels_last;  // stored as [N, H, W, C], so that packing is a copy; only used to pack
};

// Pixel p of image n of a level is row map.first_row + n * map.pixels() + p.
struct PackParams {
  int64_t images, channels;
  int64_t element_bytes;  // 2, 4 or 8
  void* rows;             // [R, C]: written to pack, read to unpack
  std::vector<PackLevel> levels;
};

// The kernels of a library; see csrc/host/device.h.
void run_pack_levels(const PackParams& params, Context& context);
void run_unpack_levels(const PackParams& params, Context& context);

// Calls f with a value of the unsigned integer type that has the elements' size.
template <class F>
auto dispatch_element(int64_t bytes, F&& f) {
  switch (bytes) {
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    default:
      return f(uint64_t{});
  }
}

}  // namespace dyhead
