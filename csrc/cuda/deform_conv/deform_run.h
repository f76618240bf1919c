// From the parameters of a deform_conv call to its launches: host code that asks its caller for
// workspaces, so that the operator and the emulation's tests run the same.
#pragma once

#include "deform_conv_bwd.h"
#include "deform_plan.h"

namespace dyhead::cuda {

// Why a call cannot run, or null. Kept apart from cudaError_t, whose names would not help.
inline const char* deform_problem(const DeformTables& tables) {
  constexpr int64_t kMaxTiles = 1 << 29;
  const int64_t channels = tables.shape.channels + tables.shape.out_channels;
  if (channels > (1 << 24)) return "expected at most 2^24 channels";
  if (tables.shape.images > (1 << 24)) return "expected at most 2^24 images";
  for (const MapShape& map : tables.sources) {
    if (map.pixels() * tables.shape.channels * element_bytes(tables.shape.dtype) >> 36) {
      return "expected source maps of less than 64 GiB per image";
    }
  }
  if (tables.weights > (1 << 15) - 1) return "expected at most 2^15 - 1 matrices of weights";
  // Tiles have 64 rows or more, panels 32 columns or more.
  const int64_t panels =
      tables.shape.groups * ceil_div(tables.shape.out_channels / tables.shape.groups, 32);
  if (count_tiles(tables, 64) > kMaxTiles / panels) return "expected at most 2^29 tiles";
  if (deform_launches(tables, 64).empty()) {
    return "expected jobs of at most 128 terms on 32 different source maps";
  }
  return nullptr;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

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
                                const DeformPanels& panels, bool transposed, DeformMath math,
                                void* packed, void* packed_bias,
                                std::initializer_list<DeformZeros> zeros, cudaStream_t stream) {
  DeformPackParams params{};
  params.transposed = transposed;
  params.shape = s;
  params.panels = panels;
  params.dtype = weights.dtype;
  params.math = math;
  params.packed = packed;
  params.packed_bias = packed_bias;
  std::copy(zeros.begin(), zeros.end(), params.zeros);
  const int32_t count = static_cast<int32_t>(weights.matrices.size());
  for (int32_t first = 0; first < count; first += kMaxMatrices) {
    params.first_matrix = first;
    params.matrices = std::min(kMaxMatrices, count - first);
    for (int32_t i = 0; i < params.matrices; ++i) {
      params.weights[i] = weights.matrices[first + i];
      params.bias[i] = packed_bias == nullptr ? nullptr : weights.bias[first + i];
    }
    if (cudaError_t error = launch_deform_pack(params, stream); error != cudaSuccess) return error;
    std::fill(std::begin(params.zeros), std::end(params.zeros), DeformZeros{});
  }
  return cudaSuccess;
}

// How many taps a kernel of `shared_bytes(taps)` has samples of at a time, 0 if it does not fit.
template <class SharedBytes>
int32_t taps_at_once(SharedBytes&& shared_bytes, const DeviceLimits& device) {
  for (int32_t taps : {kMaxTapsAtOnce, kFewTapsAtOnce}) {
    if (fits(shared_bytes(taps), device)) return taps;
  }
  return 0;
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
  const size_t corners =
      s.dtype == DType::kFloat64 ? sizeof(Corners<double>) : sizeof(Corners<float>);
  params.taps_at_once = taps_at_once(
      [&](int taps) { return forward_shared_bytes(tiling.rows, tiling.cols, corners, taps); },
      device);
  if (params.taps_at_once == 0) return cudaErrorInvalidConfiguration;
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
    int64_t max_tiles = 0;
    for (const DeformTable& table : launches) max_tiles = std::max<int64_t>(max_tiles, table.tiles);
    params.partial = allocate(max_tiles * 3 * s.out_channels * compute_bytes(s.dtype));
    const int64_t counters = maps * s.groups * panels.column_panels;
    params.arrived = static_cast<unsigned*>(allocate(counters * 4));
    arrived = {params.arrived, counters};
    // Those of jobs without pixels stay zero.
    const int64_t words = maps * s.out_channels * compute_bytes(s.dtype) / 4;
    mean = {p.mean, words};
    var = {p.var, words};
    up_mean = {p.up_mean, words};
  }
  if (cudaError_t error = pack_weights(s, *p.weights, panels, false, math, packed, packed_bias,
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

// Chunks of output channels that the input kernel keeps: all of a group, or equal parts of what
// fits. Example: 256 outputs in float32 are 8 chunks of 32; where 5 fit shared memory, 4 and 4.
inline int32_t resident_chunks(const DeformShape& s, int32_t chunks, int32_t taps,
                               const DeviceLimits& device) {
  int32_t most = chunks;
  while (most > 1 && !fits(input_shared_bytes(most, compute_bytes(s.dtype), taps), device)) --most;
  return static_cast<int32_t>(ceil_div(chunks, ceil_div(chunks, most)));
}

// Rows of derivatives: one for each output pixel of each term that has predictions.
inline int64_t use_rows(const DeformTable& table, int64_t (&first)[kMaxJobs]) {
  int64_t rows = 0;
  for (int32_t j = 0; j < table.job_count; ++j) {
    first[j] = rows;
    if (table.jobs[j].plain()) continue;
    rows += table.jobs[j].terms * table.shape.images * table.jobs[j].out.pixels();
  }
  return rows;
}

// An upper bound, as a power of two, of how many values are added to one value of grad_source.
inline int32_t sum_bits(const DeformTables& tables, int64_t times) {
  const DeformShape& s = tables.shape;
  int64_t samples = 1;
  for (const DeformJob& job : tables.jobs) {
    samples += job.out.pixels() * job.terms * s.taps() * s.deform_groups;
  }
  int32_t bits = 0;
  while (bits < 62 && (int64_t{1} << bits) < samples * times) ++bits;
  return bits;
}

// All gradients but that of the weights. Writes to `rows`, [S, C_out] of the source's type, the
// gradient of the outputs with that of their moments.
template <class Allocate>
cudaError_t run_deform_bwd_input(const DeformBwdParams& p, void* rows, bool allow_tf32,
                                 const DeviceLimits& device, Allocate&& allocate,
                                 cudaStream_t stream) {
  const DeformTables& tables = *p.tables;
  const DeformShape& s = tables.shape;
  const DeformMath math = deform_math(s.dtype, allow_tf32);
  const int64_t wide = compute_bytes(s.dtype);
  const DeformPanels panels = backward_panels(s, kBwdCols, panel_depth(math));
  const int64_t elements = tables.source_rows * s.channels;
  const bool fixed = p.deterministic;
  const bool direct = !fixed && element_bytes(s.dtype) == wide;  // sums are the gradient itself

  void* packed = allocate(panels.bytes(s, tables.weights));
  const int64_t sum_words = elements * (!fixed ? wide / 4 : s.dtype == DType::kFloat64 ? 4 : 2);
  void* sums = direct ? p.grad_source : allocate(sum_words * 4);
  auto* largest = static_cast<unsigned*>(allocate(8));
  const auto words = [&](const void* memory, int64_t values) {
    return memory == nullptr ? 0 : values * wide / 4;
  };
  const int64_t all_sources = static_cast<int64_t>(tables.sources.size());
  cudaError_t error =
      pack_weights(s, *p.weights, panels, true, math, packed, nullptr,
                   {{sums, sum_words},
                    {p.grad_predictions,
                     words(p.grad_predictions, tables.prediction_rows * s.prediction_columns())},
                    {p.grad_gates, words(p.grad_gates, s.images * all_sources)},
                    {p.grad_bias, words(p.grad_bias, tables.weights * s.out_channels)},
                    {largest, 2}},
                   stream);

  // Launches follow each other, so they share the memory of their tiles.
  const std::vector<DeformTable> launches = deform_launches(tables, kBwdRows);
  int64_t max_tiles = 0, max_uses = 0;
  int64_t first[kMaxJobs];
  for (const DeformTable& table : launches) {
    max_tiles = std::max<int64_t>(max_tiles, table.tiles);
    max_uses = std::max(max_uses, use_rows(table, first));
  }
  int32_t max_terms = 0;
  for (const DeformJob& job : tables.jobs) max_terms = std::max(max_terms, job.terms);
  void* derivatives = allocate(max_uses * s.prediction_columns() * wide);
  void* bias_partial =
      p.grad_bias == nullptr ? nullptr : allocate(max_tiles * s.out_channels * wide);
  void* gate_partial = p.grad_gates == nullptr ? nullptr : allocate(max_tiles * max_terms * wide);

  DeformBwdInputParams input{};
  input.panels = panels;
  input.taps_at_once = taps_at_once(
      [&](int taps) { return input_shared_bytes(1, static_cast<size_t>(wide), taps); }, device);
  if (input.taps_at_once == 0) return cudaErrorInvalidConfiguration;
  input.chunks = resident_chunks(s, panels.steps, input.taps_at_once, device);
  input.row_vectors =
      aligned(rows) && s.out_channels / s.groups % (16 / element_bytes(s.dtype)) == 0;
  input.source = p.source;
  input.predictions = p.predictions;
  input.gates = p.gates;
  input.packed = packed;
  input.rows = rows;
  input.sums = sums;
  input.largest = largest;
  input.sum_bits = sum_bits(tables, s.groups * ceil_div(panels.steps, input.chunks));
  input.derivatives = derivatives;
  input.gate_partial = gate_partial;
  input.max_terms = max_terms;
  const bool vectors = reads_vectors(s, p.source);
  const auto run = [&](Scatter scatter) {
    input.scatter = scatter;
    for (const DeformTable& table : launches) {
      input.table = table;
      use_rows(table, input.use_first);
      const DeformBwdRowsParams row_params{
          table, p.grad_out,  p.wide_out,  p.moments,  math == DeformMath::kTf32,
          p.out, p.mean,      p.grad_mean, p.grad_var, p.grad_up_mean,
          rows,  bias_partial};
      if (error == cudaSuccess) error = launch_deform_bwd_rows(row_params, stream);
      if (error == cudaSuccess) error = launch_deform_bwd_input(input, math, vectors, stream);
      if (scatter == Scatter::kMeasure) continue;
      DeformBwdGatherParams gather{};
      gather.table = table;
      gather.derivatives = derivatives;
      std::copy(std::begin(input.use_first), std::end(input.use_first), gather.use_first);
      gather.bias_partial = bias_partial;
      gather.gate_partial = gate_partial;
      gather.max_terms = max_terms;
      gather.grad_predictions = p.grad_predictions;
      gather.grad_bias = p.grad_bias;
      gather.grad_gates = p.grad_gates;
      if (error == cudaSuccess) {
        error = launch_deform_bwd_gather(gather, static_cast<int32_t>(tables.weights), stream);
      }
    }
  };
  if (fixed) run(Scatter::kMeasure);
  run(fixed ? Scatter::kFixed : Scatter::kSum);
  if (!direct && error == cudaSuccess) {
    error = launch_deform_bwd_finish(
        {s.dtype, fixed, sums, largest, input.sum_bits, elements, p.grad_source}, stream);
  }
  return error;
}

}  // namespace dyhead::cuda
