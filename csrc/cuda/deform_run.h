// From the parameters of a deform_conv call to its launches: host code that asks its caller for
// workspaces, so that the operator and the emulation's tests run the same.
#pragma once

#include "deform_plan.h"

namespace dyhead::cuda {

// Why a call cannot run, or null. Kept apart from cudaError_t, whose names would not help.
inline const char* deform_problem(const DeformTables& tables) {
  constexpr int64_t kMostTiles = 1 << 30;
  const int64_t channels = tables.shape.channels + tables.shape.out_channels;
  if (channels > (1 << 24)) return "expected at most 2^24 channels";
  if (tables.shape.images > (1 << 24)) return "expected at most 2^24 images";
  if (tables.weights > (1 << 15) - 1) return "expected at most 2^15 - 1 matrices of weights";
  // Tiles have 64 rows or more, panels 32 columns or more.
  const int64_t panels =
      tables.shape.groups * ceil_div(tables.shape.out_channels / tables.shape.groups, 32);
  if (count_tiles(tables, 64) > kMostTiles / panels) return "expected at most 2^30 tiles";
  if (deform_launches(tables, 64).empty()) {
    return "expected jobs of at most 128 terms on 32 different source maps";
  }
  return nullptr;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

inline int64_t compute_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

// Whether the channels of the source can be read in 16-byte vectors.
inline bool reads_vectors(const DeformShape& s, const void* source) {
  const int64_t unit = 16 / element_bytes(s.dtype);
  return aligned(source) && s.channels / s.groups % unit == 0 &&
         s.channels / s.deform_groups % unit == 0;
}

// Whether rows of outputs can be stored or read in 16-byte vectors.
inline bool has_vector_outputs(const DeformShape& s, const void* out) {
  return aligned(out) && s.out_channels / s.groups % 8 == 0;
}

// Packs all matrices, with their biases if `packed_bias` is not null; the first launch clears
// `zeros`.
inline cudaError_t pack_weights(const DeformShape& s, const DeformWeights& weights,
                                const DeformPanels& panels, DeformMath math, void* packed,
                                void* packed_bias, std::initializer_list<DeformZeros> zeros,
                                cudaStream_t stream) {
  DeformPackParams params{};
  params.shape = s;
  params.panels = panels;
  params.dtype = weights.dtype;
  params.math = math;
  params.packed = packed;
  params.packed_bias = packed_bias;
  std::copy(zeros.begin(), zeros.end(), params.zeros);
  const int32_t count = static_cast<int32_t>(weights.matrices.size());
  for (int32_t first = 0; first < count; first += kMostMatrices) {
    params.first_matrix = first;
    params.matrices = std::min(kMostMatrices, count - first);
    for (int32_t i = 0; i < params.matrices; ++i) {
      params.weights[i] = weights.matrices[first + i];
      params.bias[i] = packed_bias == nullptr ? nullptr : weights.bias[first + i];
    }
    if (cudaError_t error = launch_deform_pack(params, stream); error != cudaSuccess) return error;
    std::fill(std::begin(params.zeros), std::end(params.zeros), DeformZeros{});
  }
  return cudaSuccess;
}

// `allocate(bytes)` returns device memory, aligned to 256 bytes, that lasts until the launches are
// through.
template <class Allocate>
cudaError_t run_deform_fwd(const DeformFwdParams& p, bool allow_tf32, const DeviceLimits& device,
                           Allocate&& allocate, cudaStream_t stream) {
  const DeformTables& tables = *p.tables;
  const DeformShape& s = tables.shape;
  if (tables.out_rows == 0 && !p.moments) return cudaSuccess;
  const DeformMath math = deform_math(s.dtype, allow_tf32);
  const DeformTiling tiling = forward_tiling(tables, math, reads_vectors(s, p.source), device);
  const DeformPanels panels = forward_panels(s, tiling.cols, panel_depth(math));
  const int64_t maps = static_cast<int64_t>(tables.jobs.size()) * s.images;

  DeformFwdKernelParams params{};
  params.panels = panels;
  params.source = p.source;
  params.predictions = p.predictions;
  params.gates = p.gates;
  params.out = p.out;
  params.wide_out = p.wide_out;
  params.out_vectors = has_vector_outputs(s, p.out);
  params.moments = p.moments;
  params.mean = p.mean;
  params.var = p.var;
  params.up_mean = p.up_mean;
  void* packed = allocate(panels.bytes(s, tables.weights));
  void* packed_bias = p.weights->bias.empty()
                          ? nullptr
                          : allocate(tables.weights * s.out_channels * compute_bytes(s.dtype));
  params.packed = packed;
  params.packed_bias = packed_bias;
  const std::vector<DeformTable> launches = deform_launches(tables, tiling.rows);
  DeformZeros arrived{}, mean{}, var{}, up_mean{};
  if (p.moments) {
    // Launches follow each other, so they share the memory of their tiles.
    int64_t most_tiles = 0;
    for (const DeformTable& table : launches)
      most_tiles = std::max<int64_t>(most_tiles, table.tiles);
    params.partial = allocate(most_tiles * 3 * s.out_channels * compute_bytes(s.dtype));
    const int64_t counters = maps * s.groups * panels.column_panels;
    params.arrived = static_cast<unsigned*>(allocate(counters * 4));
    arrived = {params.arrived, counters};
    // Those of jobs without pixels stay zero.
    const int64_t words = maps * s.out_channels * compute_bytes(s.dtype) / 4;
    mean = {p.mean, words};
    var = {p.var, words};
    up_mean = {p.up_mean, words};
  }
  if (cudaError_t error = pack_weights(s, *p.weights, panels, math, packed, packed_bias,
                                       {arrived, mean, var, up_mean}, stream);
      error != cudaSuccess) {
    return error;
  }
  for (const DeformTable& table : launches) {
    params.table = table;
    if (cudaError_t error = launch_deform_fwd(params, math, tiling, stream); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace dyhead::cuda
