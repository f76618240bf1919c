// From the parameters of a forward call of deform_conv to its launches: host code that asks its
// caller for workspaces, so that the operator and the emulation's tests run the same code.
#pragma once

#include <algorithm>

#include "deform_conv_run.h"

namespace dyhead::cuda {

// `allocate(bytes)` returns device memory, aligned to 256 bytes, that stays valid until the
// launches have run.
template <class Allocate>
cudaError_t run_deform_fwd(const DeformFwdParams& p, bool allow_tf32, const DeviceLimits& device,
                           Allocate&& allocate, cudaStream_t stream) {
  const DeformCall& call = *p.call;
  const DeformShape& s = call.shape;
  if (call.out_rows == 0 && !p.moments) return cudaSuccess;
  const DeformMath math = deform_math(s.dtype, allow_tf32);
  const bool sums_only = p.gates == nullptr && !p.moments;
  const DeformTiling tiling =
      forward_tiling(call, math, reads_vectors(s, p.source), sums_only, device);
  const DeformPanels panels = forward_panels(s, tiling.cols, panel_depth(math));

  DeformFwdKernelParams params{};
  params.taps_at_once = taps_at_once(
      [&](int taps) { return forward_shared_bytes(tiling.rows, tiling.cols, s.dtype, taps); },
      device);
  if (params.taps_at_once == 0) return cudaErrorInvalidConfiguration;
  params.panels = panels;
  params.source = p.source;
  params.predictions = p.predictions;
  params.gates = p.gates;
  params.out = p.out;
  params.out_in_compute_dtype = p.out_in_compute_dtype;
  params.out_vectors = has_vector_outputs(s, p.out);
  params.moments = p.moments;
  params.mean = p.mean;
  params.var = p.var;
  params.up_mean = p.up_mean;
  void* packed = allocate(panels.bytes(s, call.weights));
  void* packed_bias = p.weights->bias.empty()
                          ? nullptr
                          : allocate(call.weights * s.out_channels * compute_bytes(s.dtype));
  params.packed = packed;
  params.packed_bias = packed_bias;
  const std::vector<DeformLaunch> launches = deform_launches(call, tiling.rows, tiling.plain);
  const int64_t all_columns = static_cast<int64_t>(s.groups) * panels.column_panels;
  // Launches run one after the other, so they share the memory of sums, but not the counters.
  const bool shares = !tiling.plain && forward_shares_tiles(tiling.cols, on_tensor_cores(math));
  std::vector<DeformSplit> splits;
  int64_t shared_tiles = 0, max_sums = 0;
  for (const DeformLaunch& launch : launches) {
    const auto tiles = static_cast<int32_t>(launch.tile_count * all_columns);
    const DeformSplit split =
        shares ? split_tiles(tiles, s.taps(), panels.steps, device.processors).split
               : DeformSplit{tiles, 1};
    splits.push_back(split);
    shared_tiles += tiles - split.whole;
    max_sums = std::max<int64_t>(max_sums, split.blocks(tiles) - split.whole);
  }
  DeformZeros parts_arrived{}, arrived{}, mean{}, var{}, up_mean{};
  if (shared_tiles > 0) {
    params.part_sums = allocate(max_sums * tiling.rows * tiling.cols * compute_bytes(s.dtype));
    params.parts_arrived = static_cast<unsigned*>(allocate(shared_tiles * 4));
    parts_arrived = {params.parts_arrived, shared_tiles};
  }
  if (p.moments) {
    int64_t all_groups = 0, max_groups = 0;
    for (const DeformLaunch& launch : launches) {
      all_groups += deform_groups_of_tiles(launch);
      max_groups = std::max(max_groups, deform_groups_of_tiles(launch));
    }
    const int64_t moments_bytes = deform_moments(s.out_channels) * compute_bytes(s.dtype);
    params.partial = allocate(max_tiles(launches) * moments_bytes);
    params.merged = allocate(max_groups * moments_bytes);
    const int64_t maps = static_cast<int64_t>(call.jobs.size()) * s.images;
    const int64_t counters = (maps + all_groups) * all_columns;
    params.arrived = static_cast<unsigned*>(allocate(counters * 4));
    params.groups_arrived = params.arrived + maps * all_columns;
    arrived = {params.arrived, counters};
    // The moments of jobs without pixels stay zero.
    const int64_t words = maps * s.out_channels * compute_bytes(s.dtype) / 4;
    mean = {p.mean, words};
    var = {p.var, words};
    up_mean = {p.up_mean, words};
  }
  cudaError_t error = pack_weights(s, *p.weights, panels, false, math, packed, packed_bias,
                                   {parts_arrived, arrived, mean, var, up_mean}, stream);
  for (size_t i = 0; i < launches.size() && error == cudaSuccess; ++i) {
    params.launch = launches[i];
    params.split = splits[i];
    error = launch_deform_fwd(params, math, tiling, stream);
    if (p.moments) params.groups_arrived += deform_groups_of_tiles(launches[i]) * all_columns;
    params.parts_arrived += launches[i].tile_count * all_columns - splits[i].whole;
  }
  return error;
}

}  // namespace dyhead::cuda
