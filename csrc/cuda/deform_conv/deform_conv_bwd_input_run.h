// From the parameters of a backward of deform_conv, one call or several on one source, to the
// launches that compute all gradients but that of the weights: host code, as deform_conv_fwd_run.h.
#pragma once

#include "deform_conv_bwd.h"
#include "deform_conv_run.h"

namespace dyhead::cuda {

// Chunks of output channels that the input kernel keeps in shared memory: all of a group or, where
// they do not fit, equal parts. Example: 256 outputs in float32 are 8 chunks of 32; if 5 fit, 4
// and 4.
inline int32_t resident_chunks(const DeformShape& s, int32_t chunks, int32_t rows, int32_t taps,
                               const DeviceLimits& device) {
  int32_t max_chunks = chunks;
  while (max_chunks > 1 && !fits(input_shared_bytes(s.dtype, rows, max_chunks, taps), device)) {
    --max_chunks;
  }
  return static_cast<int32_t>(ceil_div(chunks, ceil_div(chunks, max_chunks)));
}

// Panels of the weights for the input kernel.
inline DeformPanels input_panels(const DeformShape& s, DeformMath math) {
  const auto step_channels = static_cast<int32_t>(kStepBytes / element_bytes(s.dtype));
  return backward_panels(s, step_channels, panel_depth(math));
}

// The output pixels of a tile. With 128 rather than 64, more samples of a tile share their pixels,
// and each panel of weights is used twice as often. But the gradients of all outputs must fit, and
// if tiles are few, processors are idle in the last round.
inline int32_t input_tile_rows(const DeformCall& call, const DeformPanels& panels, bool vectors,
                               const DeviceLimits& device) {
  const DeformShape& s = call.shape;
  const bool half = element_bytes(s.dtype) == 2;
  const int32_t taps = std::min(kMaxTapsAtOnce, s.taps());
  const size_t bytes = input_shared_bytes(s.dtype, kMaxInputRows, panels.steps, taps);
  if (!half || !vectors || !fits(bytes, device)) return kFewInputRows;
  const auto rounds = [&](int rows) {
    return static_cast<double>(ceil_div(count_tiles(call, rows), device.processors));
  };
  return rounds(kMaxInputRows) <= kCostOf64Rows * rounds(kFewInputRows) ? kMaxInputRows
                                                                        : kFewInputRows;
}

// Whether the kernel with wgmma computes a call with tiles of so many pixels. It has only 128,
// which only calls in 16 bits with vectors of channels have, and always nine taps at once, which
// fit beside 128 pixels.
inline bool takes_wgmma_input_kernel(const DeformShape& s, int32_t tile_rows,
                                     const DeviceLimits& device) {
  return device.wgmma && tile_rows == kMaxInputRows && s.taps() == kMaxTapsAtOnce;
}

// How many rows of derivatives a launch has: one for each output pixel of each term that has
// predictions. first[j] is the first row of job j.
inline int64_t use_rows(const DeformLaunch& launch, int64_t (&first)[kMaxJobs]) {
  int64_t rows = 0;
  for (int32_t j = 0; j < launch.job_count; ++j) {
    first[j] = rows;
    if (launch.jobs[j].plain()) continue;
    rows += launch.jobs[j].terms * launch.shape.images * launch.jobs[j].out.pixels();
  }
  return rows;
}

// A bound on how many values a call adds to one value of grad_source. `times`: how often its input
// kernel walks through a sample.
inline int64_t most_summands(const DeformCall& call, int64_t times) {
  const DeformShape& s = call.shape;
  int64_t samples = 1;
  for (const DeformJob& job : call.jobs) {
    samples += job.out.pixels() * job.terms * s.taps() * s.deform_groups;
  }
  return samples * times;
}

// The sums of grad_source, to which all calls add.
struct DeformBwdSums {
  void* values;  // grad_source itself where that has the compute type; null where nobody wants it
  int64_t words;
  unsigned* largest;
  int64_t largest_words;
  int32_t bits;  // log2, rounded up, of a bound on how many values are added to one
};

// What a call needs beside its tensors. Launches run one after the other, so they share the memory
// of their tiles.
struct DeformBwdWorkspaces {
  void* packed;        // the weights
  void* derivatives;   // null without grad_predictions
  void* bias_partial;  // null without grad_bias
  void* gate_partial;  // null without grad_gates
  int32_t max_terms;   // of a job
};

// Whether somebody wants what the input kernel computes.
inline bool wants_samples(const DeformBwdParams& p) {
  return p.grad_source != nullptr || p.grad_predictions != nullptr || p.grad_gates != nullptr;
}

inline bool sums_in_place(const DeformBwdParams& p) {
  const DType dtype = p.call->shape.dtype;
  return !p.deterministic && element_bytes(dtype) == compute_bytes(dtype);
}

template <class Allocate>
DeformBwdSums allocate_bwd_sums(const DeformBwdParams& p, Allocate&& allocate) {
  DeformBwdSums sums{};
  if (p.grad_source == nullptr) return sums;
  const DeformShape& s = p.call->shape;
  const int64_t values = p.call->source_rows * s.channels;
  // Integer sums of float64 values are two words of 8 bytes each.
  const int64_t fixed_bytes = s.dtype == DType::kFloat64 ? 16 : 8;
  sums.words = values * (p.deterministic ? fixed_bytes : compute_bytes(s.dtype)) / 4;
  sums.values = sums_in_place(p) ? p.grad_source : allocate(sums.words * 4);
  sums.largest_words = largest_words(p.deterministic, values);
  sums.largest = static_cast<unsigned*>(allocate(sums.largest_words * 4));
  return sums;
}

template <class Allocate>
DeformBwdWorkspaces allocate_bwd_workspaces(const DeformBwdParams& p, const DeformPanels& panels,
                                            const std::vector<DeformLaunch>& launches,
                                            Allocate&& allocate) {
  const DeformCall& call = *p.call;
  const DeformShape& s = call.shape;
  const int64_t value_bytes = compute_bytes(s.dtype);
  int64_t max_uses = 0;
  int64_t first[kMaxJobs];
  for (const DeformLaunch& launch : launches) {
    max_uses = std::max(max_uses, use_rows(launch, first));
  }
  DeformBwdWorkspaces w{};
  for (const DeformJob& job : call.jobs) w.max_terms = std::max(w.max_terms, job.terms);
  w.packed = allocate(panels.bytes(s, call.weights));
  if (p.grad_predictions != nullptr) {
    w.derivatives = allocate(max_uses * s.prediction_columns() * value_bytes);
  }
  const int64_t tiles = max_tiles(launches);
  if (p.grad_bias != nullptr) w.bias_partial = allocate(tiles * s.out_channels * value_bytes);
  if (p.grad_gates != nullptr) w.gate_partial = allocate(tiles * w.max_terms * value_bytes);
  return w;
}

// The weights to pack, and everything to clear that later launches add to: `sums` among it.
inline DeformPack bwd_pack(const DeformBwdParams& p, const DeformPanels& panels,
                           const DeformBwdWorkspaces& w, const DeformBwdSums& sums) {
  const DeformCall& call = *p.call;
  const DeformShape& s = call.shape;
  const auto zeros = [&](void* memory, int64_t values) -> DeformZeros {
    return {memory, memory == nullptr ? 0 : values * compute_bytes(s.dtype) / 4};
  };
  const auto sources = static_cast<int64_t>(call.sources.size());
  DeformPackSet set{};
  set.shape = s;
  set.panels = panels;
  set.dtype = p.weights->dtype;
  set.transposed = true;
  set.packed = w.packed;
  set.zeros[0] = {sums.values, sums.words};
  set.zeros[1] = {sums.largest, sums.largest_words};
  set.zeros[2] = zeros(p.grad_predictions, call.prediction_rows * s.prediction_columns());
  set.zeros[3] = zeros(p.grad_gates, s.images * sources);
  set.zeros[4] = zeros(p.grad_bias, call.weights * s.out_channels);
  return {set, p.weights};
}

// The parameters that all launches of the input kernel share; taps_at_once is 0 if the kernel does
// not fit the device.
inline DeformBwdInputParams bwd_input_params(const DeformBwdParams& p, const DeformPanels& panels,
                                             const DeformBwdWorkspaces& w, const void* rows,
                                             int32_t tile_rows, const DeviceLimits& device) {
  const DeformShape& s = p.call->shape;
  DeformBwdInputParams input{};
  input.tile_rows = tile_rows;
  input.panels = panels;
  // Rather fewer taps at once than fewer chunks: for each further part of the chunks the kernel
  // walks through the samples again.
  for (const int32_t chunks : {panels.steps, 1}) {
    if (input.taps_at_once != 0) break;
    const auto bytes = [&](int32_t taps) {
      return input_shared_bytes(s.dtype, tile_rows, chunks, std::min(taps, s.taps()));
    };
    input.taps_at_once = std::min(taps_at_once(bytes, device), s.taps());
  }
  input.chunks = resident_chunks(s, panels.steps, tile_rows, input.taps_at_once, device);
  input.row_vectors =
      aligned(rows) && s.out_channels / s.groups % (16 / element_bytes(s.dtype)) == 0;
  input.source = p.source;
  input.predictions = p.predictions;
  input.gates = p.gates;
  input.packed = w.packed;
  input.rows = rows;
  input.derivatives = w.derivatives;
  input.gate_partial = w.gate_partial;
  input.max_terms = w.max_terms;
  return input;
}

// Adds what the tiles of one launch left in the workspaces to the gradients of predictions, biases
// and gates.
inline cudaError_t gather_launch(const DeformBwdParams& p, const DeformBwdWorkspaces& w,
                                 const DeformBwdInputParams& input, cudaStream_t stream) {
  DeformBwdGatherParams gather{};
  gather.launch = input.launch;
  gather.derivatives = w.derivatives;
  std::copy(std::begin(input.use_first), std::end(input.use_first), gather.use_first);
  gather.bias_partial = w.bias_partial;
  gather.gate_partial = w.gate_partial;
  gather.max_terms = w.max_terms;
  gather.grad_predictions = p.grad_predictions;
  gather.grad_bias = p.grad_bias;
  gather.grad_gates = p.grad_gates;
  return launch_deform_bwd_gather(gather, static_cast<int32_t>(p.call->weights), stream);
}

// A call, with room for the gradient of its outputs including that of their moments: [S, C_out] of
// the source's type, which the gradient of the weights starts from.
struct DeformBwdCall {
  const DeformBwdParams* params;
  void* rows;
};

// A call that is ready to be launched.
struct DeformBwdStep {
  DeformBwdCall call;
  DeformMath math;
  std::vector<DeformLaunch> launches;
  DeformPanels panels;
  DeformBwdWorkspaces workspaces;
  DeformBwdInputParams input;  // that all launches share
  bool wgmma;                  // whether the input kernel is that with wgmma
};

template <class Allocate>
DeformBwdStep bwd_step(const DeformBwdCall& call, bool allow_tf32, const DeviceLimits& device,
                       Allocate&& allocate) {
  const DeformBwdParams& p = *call.params;
  const DeformShape& s = p.call->shape;
  DeformBwdStep step{call, deform_math(s.dtype, allow_tf32), {}, {}, {}, {}, false};
  step.panels = input_panels(s, step.math);
  const int32_t tile_rows =
      input_tile_rows(*p.call, step.panels, reads_vectors(s, p.source), device);
  step.launches = deform_launches(*p.call, tile_rows);
  step.workspaces = allocate_bwd_workspaces(p, step.panels, step.launches, allocate);
  step.input = bwd_input_params(p, step.panels, step.workspaces, call.rows, tile_rows, device);
  step.wgmma = takes_wgmma_input_kernel(s, tile_rows, device);
  return step;
}

inline cudaError_t launch_rows(const DeformBwdStep& step, const DeformLaunch& launch,
                               cudaStream_t stream) {
  const DeformBwdParams& p = *step.call.params;
  DeformBwdRowsParams grads{};
  grads.launch = launch;
  grads.tile_rows = step.input.tile_rows;
  grads.grad_out = p.grad_out;
  grads.out_in_compute_dtype = p.out_in_compute_dtype;
  grads.moments = p.moments;
  grads.round_tf32 = step.math == DeformMath::kTf32;
  grads.out = p.out;
  grads.mean = p.mean;
  grads.grad_mean = p.grad_mean;
  grads.grad_var = p.grad_var;
  grads.grad_up_mean = p.grad_up_mean;
  grads.rows = step.call.rows;
  grads.bias_partial = step.workspaces.bias_partial;
  return launch_deform_bwd_rows(grads, stream);
}

// All launches of a call once. A second time, with Scatter::kFixed, nothing is left to do but to
// scatter.
inline cudaError_t run_bwd_pass(const DeformBwdStep& step, Scatter scatter, cudaStream_t stream) {
  const DeformBwdParams& p = *step.call.params;
  const bool again = scatter == Scatter::kFixed;
  const bool vectors = reads_vectors(p.call->shape, p.source);
  DeformBwdInputParams input = step.input;
  input.scatter = scatter;
  if (again) input.derivatives = input.gate_partial = nullptr;
  for (const DeformLaunch& launch : step.launches) {
    input.launch = launch;
    use_rows(launch, input.use_first);
    cudaError_t error = again ? cudaSuccess : launch_rows(step, launch, stream);
    if (error == cudaSuccess && wants_samples(p)) {
      error = launch_deform_bwd_input(input, step.math, vectors, step.wgmma, stream);
    }
    if (error == cudaSuccess && !again) error = gather_launch(p, step.workspaces, input, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Fills the wanted gradients but those of the weights, and the rows, of calls as they are described
// at run_deform_conv_bwd. `allocate` as in run_deform_fwd.
template <class Allocate>
cudaError_t run_deform_bwd_input(std::span<const DeformBwdCall> calls, bool allow_tf32,
                                 const DeviceLimits& device, Allocate&& allocate,
                                 cudaStream_t stream) {
  const DeformBwdParams& first = *calls.front().params;
  DeformBwdSums sums = allocate_bwd_sums(first, allocate);
  std::vector<DeformBwdStep> steps;
  int64_t summands = 0;
  for (const DeformBwdCall& call : calls) {
    steps.push_back(bwd_step(call, allow_tf32, device, allocate));
    const DeformBwdStep& step = steps.back();
    if (step.input.taps_at_once == 0) return cudaErrorInvalidConfiguration;
    const int64_t parts = ceil_div(step.panels.steps, step.input.chunks);
    summands += most_summands(*call.params->call, call.params->call->shape.groups * parts);
  }
  while (sums.bits < 62 && (int64_t{1} << sums.bits) < summands) ++sums.bits;

  std::vector<DeformPack> packs;
  for (DeformBwdStep& step : steps) {
    step.input.sums = sums.values;
    step.input.largest = sums.largest;
    step.input.sum_bits = sums.bits;
    packs.push_back(bwd_pack(*step.call.params, step.panels, step.workspaces,
                             packs.empty() ? sums : DeformBwdSums{}));
  }
  cudaError_t error = pack_weights(packs, steps.front().math, stream);
  const auto pass = [&](Scatter scatter) {
    for (size_t i = 0; i < steps.size() && error == cudaSuccess; ++i) {
      error = run_bwd_pass(steps[i], scatter, stream);
    }
  };
  const bool scatters = first.grad_source != nullptr;
  if (!scatters) pass(Scatter::kNone);
  if (scatters) pass(first.deterministic ? Scatter::kMeasure : Scatter::kSum);
  if (scatters && first.deterministic) pass(Scatter::kFixed);
  if (error != cudaSuccess || !scatters || sums_in_place(first)) return error;
  const DeformCall& call = *first.call;
  return launch_deform_bwd_finish(
      {call.shape.dtype, first.deterministic, sums.values, sums.largest, sums.bits,
       call.source_rows * call.shape.channels, first.grad_source},
      stream);
}

}  // namespace dyhead::cuda
