// From the parameters of a backward call of deform_conv to the launches that compute the weight
// gradient: host code, as deform_conv_fwd_run.h.
#pragma once

#include <limits>

#include "deform_conv_bwd_weights.h"
#include "deform_conv_run.h"

namespace dyhead::cuda {

// Bytes of dynamic shared memory of the kernel for `outs` output channels: two buffers for both
// operands and for the positions of a step's samples.
inline size_t weights_shared_bytes(int outs) {
  constexpr size_t kStepBytes =
      16 + 64 * sizeof(int32_t) + kWeightCols * sizeof(StagedSample<float>);
  return 2 * (128 * static_cast<size_t>(outs + kWeightCols) + kStepBytes);
}

// Every sample is blended once for each panel of outputs, so panels are as wide as registers and
// shared memory allow. Reading value by value is slow in any case, so it always takes narrow
// panels.
inline DeformWeightColumns weight_columns(const DeformShape& s, DeformMath math, bool vectors,
                                          const DeviceLimits& device) {
  const int64_t outputs = s.out_channels / s.groups;
  const bool tensor = on_tensor_cores(math);
  int outs = 256;
  if (!tensor || outputs <= 128 || weights_shared_bytes(256) > device.shared_bytes) outs = 128;
  if (!vectors || outputs <= 32 || math == DeformMath::kFloat64) outs = 32;
  const int32_t depth = panel_depth(math);
  const int32_t steps = forward_panels(s, outs, depth).steps;
  const int64_t slots = static_cast<int64_t>(steps) * s.taps();
  return {outs, depth, steps, static_cast<int32_t>(ceil_div(outputs, outs)),
          static_cast<int32_t>(ceil_div(slots, kWeightCols / depth))};
}

// How many slices each matrix's tiles are divided into. No slice is longer than some length, chosen
// so that all blocks, one or two of them on a processor at a time, finish soonest. A slice costs
// kSliceTiles tiles more than it has: the time until its first samples arrive, and to write and add
// its sums. More than kMaxRounds rounds would gain little and take memory for the sums.
//
// Example: 3 matrices of 256 x 256 x 3 x 3 on 132 processors, with 360, 95 and 95 tiles. A slice is
// 18 blocks. With at most 95 tiles: 4 + 1 + 1 slices, 108 blocks, one round of 95 + 12. With at
// most 45: 8 + 3 + 3 slices, 252 blocks, two rounds of 45 + 12. So 95.
inline std::vector<int64_t> weight_slices(const std::vector<int64_t>& tiles, int64_t blocks,
                                          int64_t resident) {
  constexpr int64_t kSliceTiles = 12;
  constexpr int64_t kMaxRounds = 4;
  const int64_t longest = std::max<int64_t>(*std::max_element(tiles.begin(), tiles.end()), 1);
  int64_t best = longest;
  int64_t least = std::numeric_limits<int64_t>::max();
  // Hundreds of lengths are tried in each backward call, so nothing is stored for any of them.
  for (int64_t length = longest; length > 0; length -= 1 + length / 64) {
    int64_t all = 0;
    for (int64_t count : tiles) all += ceil_div(count, length);
    const int64_t rounds = ceil_div(all * blocks, resident);
    if (length < longest && rounds > kMaxRounds) break;
    const int64_t cost = rounds * (length + kSliceTiles);
    if (cost < least) {
      least = cost;
      best = length;
    }
  }
  std::vector<int64_t> counts;
  for (int64_t count : tiles) counts.push_back(ceil_div(count, best));
  return counts;
}

// The slices of the matrices that a launch's jobs use.
inline DeformWeightSlices cut_into_slices(const DeformLaunch& launch,
                                          const DeformWeightColumns& columns,
                                          const DeviceLimits& device) {
  DeformWeightSlices slices{};
  std::vector<int64_t> tiles;
  for (int32_t t = 0; t < launch.term_count; ++t) {
    const int16_t matrix = launch.terms[t].weight;
    const auto* end = slices.matrix + slices.count;
    if (std::find(static_cast<const int16_t*>(slices.matrix), end, matrix) != end) continue;
    slices.matrix[slices.count++] = matrix;
    tiles.push_back(count_matrix_tiles(launch, matrix));
  }
  if (tiles.empty()) return slices;
  const int64_t resident = device.processors * (columns.outs == 32 ? 2 : 1);
  const std::vector<int64_t> counts = weight_slices(tiles, columns.blocks(launch.shape), resident);
  for (int32_t i = 0; i < slices.count; ++i) {
    slices.first[i + 1] = slices.first[i] + static_cast<int32_t>(counts[i]);
  }
  return slices;
}

// Computes p.grad_weights. `grad_rows` [S, C_out], of the source's type, is the gradient of every
// output value including that of the moments, rounded to TF32 if allow_tf32 says so. `allocate` as
// in run_deform_fwd.
template <class Allocate>
cudaError_t run_deform_bwd_weights(const DeformBwdParams& p, const void* grad_rows, bool allow_tf32,
                                   const DeviceLimits& device, Allocate&& allocate,
                                   cudaStream_t stream) {
  const DeformCall& call = *p.call;
  const DeformShape& s = call.shape;
  const DeformMath math = deform_math(s.dtype, allow_tf32);
  const bool vectors = reads_vectors(s, p.source);
  const DeformWeightColumns columns = weight_columns(s, math, vectors, device);
  const bool plain = vectors && p.gates == nullptr &&
                     std::all_of(call.jobs.begin(), call.jobs.end(),
                                 [](const DeformJob& job) { return job.plain(); });
  const int64_t slice_bytes = columns.blocks(s) * columns.values() * compute_bytes(s.dtype);

  DeformBwdWeightsParams params{};
  params.columns = columns;
  params.source = p.source;
  params.predictions = p.predictions;
  params.gates = p.gates;
  params.grad_rows = grad_rows;
  params.grad_vectors = has_vector_outputs(s, grad_rows);
  DeformAddWeightsParams add{};
  add.shape = s;
  add.columns = columns;
  add.matrices = static_cast<int32_t>(call.weights);
  add.is_float64 = s.dtype == DType::kFloat64;
  add.grad_weights = p.grad_weights;
  const std::vector<DeformLaunch> launches = deform_launches(call, columns.depth);
  std::vector<DeformWeightSlices> slices;
  int32_t max_slices = 0;
  for (const DeformLaunch& launch : launches) {
    slices.push_back(cut_into_slices(launch, columns, device));
    max_slices = std::max(max_slices, slices.back().first[slices.back().count]);
  }
  // Launches run one after the other, so they share the memory of their slices.
  params.partial = allocate(max_slices * slice_bytes);
  add.partial = params.partial;
  for (size_t i = 0; i < launches.size(); ++i) {
    params.launch = launches[i];
    params.slices = add.slices = slices[i];
    if (cudaError_t error = launch_deform_bwd_weights(params, math, vectors, plain, stream);
        error != cudaSuccess) {
      return error;
    }
    add.add = i > 0;
    if (cudaError_t error = launch_deform_add_weights(add, stream); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace dyhead::cuda
