// From the parameters of a forward of deform_conv, one call or several, to the launches: host code
// that asks its caller for workspaces, so that the operator and the emulation's tests run the same
// code.
#pragma once

#include <algorithm>

#include "deform_conv_run.h"

namespace dyhead::cuda {

// A call that is ready to be launched.
struct DeformFwdStep {
  DeformTiling tiling;
  DeformFwdKernelParams params;  // that all launches share
  std::vector<DeformLaunch> launches;
  std::vector<DeformSplit> splits;  // of each launch
  DeformPack pack;
};

// What a launch has for its blocks, or clusters: tiles, or pairs of tiles, each with a panel of
// columns.
inline int32_t fwd_items(const DeformFwdStep& step, const DeformLaunch& launch) {
  return launch.tile_count / step.tiling.together() * launch.shape.groups *
         step.params.panels.column_panels;
}

// Divides the tiles of the launches into blocks, with memory for the sums of tiles that several
// blocks share. Launches run one after the other, so they share it, but not the counters. Returns
// what is to be cleared.
template <class Allocate>
DeformZeros split_launches(DeformFwdStep& step, DeformMath math, const DeviceLimits& device,
                           Allocate&& allocate) {
  const DeformTiling& tiling = step.tiling;
  DeformFwdKernelParams& params = step.params;
  const DeformShape& s = step.pack.set.shape;
  const bool shares = !tiling.plain() && forward_shares_tiles(tiling.cols, on_tensor_cores(math));
  const int32_t together = tiling.together();
  int64_t shared_tiles = 0, max_sums = 0;
  for (const DeformLaunch& launch : step.launches) {
    const int32_t items = fwd_items(step, launch);
    const int32_t at_once = std::max(1, device.processors / together);
    const DeformSplit split = shares
                                  ? split_tiles(items, s.taps(), params.panels.steps, at_once).split
                                  : DeformSplit{items, 1};
    step.splits.push_back(split);
    shared_tiles += (items - split.whole) * together;
    max_sums = std::max<int64_t>(max_sums, (split.blocks(items) - split.whole) * together);
  }
  if (shared_tiles == 0) return {};
  params.part_sums = allocate(max_sums * tiling.rows * tiling.cols * compute_bytes(s.dtype));
  params.parts_arrived = static_cast<unsigned*>(allocate(shared_tiles * 4));
  return {params.parts_arrived, shared_tiles};
}

// Memory in which the tiles' moments wait to be merged. Returns the counters, to be cleared.
template <class Allocate>
DeformZeros allocate_moments(DeformFwdStep& step, int64_t maps, Allocate&& allocate) {
  DeformFwdKernelParams& params = step.params;
  const DeformShape& s = step.pack.set.shape;
  const int64_t all_columns = static_cast<int64_t>(s.groups) * params.panels.column_panels;
  int64_t all_groups = 0, max_groups = 0;
  for (const DeformLaunch& launch : step.launches) {
    all_groups += deform_groups_of_tiles(launch);
    max_groups = std::max(max_groups, deform_groups_of_tiles(launch));
  }
  const int64_t moments_bytes = deform_moments(s.out_channels) * compute_bytes(s.dtype);
  params.partial = allocate(max_tiles(step.launches) * moments_bytes);
  params.merged = allocate(max_groups * moments_bytes);
  const int64_t counters = (maps + all_groups) * all_columns;
  params.arrived = static_cast<unsigned*>(allocate(counters * 4));
  params.groups_arrived = params.arrived + maps * all_columns;
  return {params.arrived, counters};
}

template <class Allocate>
DeformFwdStep fwd_step(const DeformFwdParams& p, DeformMath math, const DeviceLimits& device,
                       Allocate&& allocate) {
  const DeformCall& call = *p.call;
  const DeformShape& s = call.shape;
  DeformFwdStep step{};
  const bool sums_only = p.gates == nullptr && !p.moments;
  step.tiling = forward_tiling(call, math, reads_vectors(s, p.source), sums_only, device);
  const DeformTiling& tiling = step.tiling;
  step.launches = deform_launches(call, tiling.rows, tiling.plain(), tiling.together());

  DeformFwdKernelParams& params = step.params;
  const bool wgmma = tiling.kernel == ForwardKernel::kWgmma;
  const auto shared_bytes = [&](int taps) {
    return forward_shared_bytes(tiling.rows, tiling.cols, s.dtype, taps);
  };
  params.taps_at_once = wgmma ? s.taps() : taps_at_once(shared_bytes, device);
  params.panels = forward_panels(s, tiling.cols, panel_depth(math));
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

  DeformPackSet& pack = step.pack.set;
  step.pack.weights = p.weights;
  pack.shape = s;
  pack.panels = params.panels;
  pack.dtype = p.weights->dtype;
  pack.for_wgmma = wgmma;
  pack.packed = allocate(params.panels.bytes(s, call.weights));
  if (!p.weights->bias.empty()) {
    pack.packed_bias = allocate(call.weights * s.out_channels * compute_bytes(s.dtype));
  }
  params.packed = pack.packed;
  params.packed_bias = pack.packed_bias;
  pack.zeros[0] = split_launches(step, math, device, allocate);
  if (!p.moments) return step;
  const int64_t maps = static_cast<int64_t>(call.jobs.size()) * s.images;
  pack.zeros[1] = allocate_moments(step, maps, allocate);
  // The moments of jobs without pixels stay zero.
  const int64_t words = maps * s.out_channels * compute_bytes(s.dtype) / 4;
  pack.zeros[2] = {p.mean, words};
  pack.zeros[3] = {p.var, words};
  pack.zeros[4] = {p.up_mean, words};
  return step;
}

inline cudaError_t launch_fwd_step(const DeformFwdStep& step, DeformMath math,
                                   const DeviceLimits& device, cudaStream_t stream) {
  DeformFwdKernelParams params = step.params;
  const int64_t all_columns =
      static_cast<int64_t>(step.pack.set.shape.groups) * params.panels.column_panels;
  for (size_t i = 0; i < step.launches.size(); ++i) {
    const DeformLaunch& launch = params.launch = step.launches[i];
    const int32_t items = fwd_items(step, launch);
    params.split = step.splits[i];
    params.items = params.split.blocks(items);
    if (cudaError_t error = launch_deform_fwd(params, math, step.tiling, device, stream);
        error != cudaSuccess) {
      return error;
    }
    if (params.moments) params.groups_arrived += deform_groups_of_tiles(launch) * all_columns;
    params.parts_arrived += (items - params.split.whole) * step.tiling.together();
  }
  return cudaSuccess;
}

// Runs calls on sources of one type in turn, as run_deform_conv_fwd says. `allocate(bytes)` returns
// device memory, aligned to 256 bytes, that stays valid until the launches have run.
template <class Allocate>
cudaError_t run_deform_fwd(std::span<const DeformFwdParams> calls, bool allow_tf32,
                           const DeviceLimits& device, Allocate&& allocate, cudaStream_t stream) {
  const DeformMath math = deform_math(calls.front().call->shape.dtype, allow_tf32);
  std::vector<DeformFwdStep> steps;
  std::vector<DeformPack> packs;
  for (const DeformFwdParams& p : calls) {
    if (p.call->out_rows == 0 && !p.moments) continue;
    steps.push_back(fwd_step(p, math, device, allocate));
    packs.push_back(steps.back().pack);
    if (steps.back().params.taps_at_once == 0) return cudaErrorInvalidConfiguration;
  }
  cudaError_t error = pack_weights(packs, math, stream);
  for (const DeformFwdStep& step : steps) {
    if (error == cudaSuccess) error = launch_fwd_step(step, math, device, stream);
  }
  return error;
}

}  // namespace dyhead::cuda
