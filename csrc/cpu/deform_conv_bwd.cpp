// Backward of any list of deformable jobs, in passes whose tasks own what they write:
//
//   input        parts of the output, in waves of parts that read no common pixel:
//                grad columns = grad_out . W^T for a slice of channels, consumed at once: scattered
//                into the input's gradient, and reduced with the corners to the derivatives of each
//                sample (deform_conv_bwd_input.cpp)
//   predictions  adds the slices' derivatives up (deform_conv_bwd_predictions.cpp)
//   weights      a task per weight matrix, tap and slice of channels: samples its columns again
//                (deform_conv_bwd_weights.cpp)
//   bias         a task per chunk, then a sum in order
#include "deform_conv_bwd.h"

#include <cstring>

#include "context.h"

namespace dyhead::cpu {

template <class T>
BackwardCall<T>::BackwardCall(const DeformBwdParams& params)
    : p(params),
      s(p.call->shape),
      tables(*p.call),
      kernels(deform_kernels<T>()),
      group_outputs(s.out_channels / s.groups),
      paired(kernels.column_gemm.pairs == 2 && !p.out_in_compute_dtype &&
             (s.groups == 1 || group_outputs % 2 == 0)),
      element_bytes(paired ? sizeof(bfloat16) : sizeof(F)),
      grad_stride(paired ? round_up(s.out_channels, 2) : s.out_channels) {
  if (s.images == 0) return;  // sizes then have no bound
  for (int32_t j = 0; j < static_cast<int32_t>(tables.jobs.size()); ++j) {
    const DeformJob& job = tables.jobs[j];
    for (int32_t t = job.first_term; t < job.first_term + job.terms; ++t) {
      if (job.out.pixels() == 0) break;
      uses.push_back({j, t, use_rows});
      use_rows += job.out.pixels();
    }
    if (p.moments) up_weights.emplace_back(job);
  }
}

template <class T>
void BackwardCall<T>::load(const DeformChunk& chunk, bool pairs, std::byte* rows) const {
  const DeformJob& job = tables.jobs[chunk.job];
  const int64_t channels = s.out_channels;
  const int64_t start = chunk.out_row(job) * channels;
  if (p.out_in_compute_dtype && !std::is_same_v<T, F>) {
    std::memcpy(rows, static_cast<const F*>(p.grad_out) + start, chunk.rows * channels * sizeof(F));
    return;
  }
  F up[kChunkRows];
  MomentGrads<T> moments{};
  if (p.moments) {
    const int64_t at = (chunk.job * s.images + chunk.image) * channels;
    for (int64_t r = 0; r < chunk.rows; ++r) up[r] = up_weights[chunk.job].at(chunk.first + r);
    moments = {static_cast<const T*>(p.out) + start,       static_cast<const F*>(p.mean) + at,
               static_cast<const F*>(p.grad_mean) + at,    static_cast<const F*>(p.grad_var) + at,
               static_cast<const F*>(p.grad_up_mean) + at, up,
               F(1) / static_cast<F>(job.out.pixels())};
  }
  const MomentGrads<T>* more = p.moments ? &moments : nullptr;
  const T* grad = static_cast<const T*>(p.grad_out) + start;
  if (pairs) {
    kernels.grad_rows(grad, more, chunk.rows, channels, rows, grad_stride);
  } else {
    kernels.grad_rows_compute(grad, more, chunk.rows, channels, reinterpret_cast<F*>(rows),
                              channels);
  }
}

namespace {

template <class T>
void bias_pass(const BackwardCall<T>& call) {
  using F = compute_t<T>;
  const std::vector<DeformChunk> chunks = deform_chunks(call.tables, call.s.images);
  const int64_t channels = call.s.out_channels;
  std::vector<F> sums(chunks.size() * channels, F(0));
  parallel_tasks(
      static_cast<int64_t>(chunks.size()), [&] { return std::vector<F>(kChunkRows * channels); },
      [&](int64_t i, std::vector<F>& grad) {
        call.load_grad_compute(chunks[i], grad.data());
        F* sum = sums.data() + i * channels;
        for (int64_t r = 0; r < chunks[i].rows; ++r) {
          for (int64_t c = 0; c < channels; ++c) sum[c] += grad[r * channels + c];
        }
      });
  auto* out = static_cast<F*>(call.p.grad_bias);
  std::fill(out, out + call.tables.weights * channels, F(0));
  for (size_t i = 0; i < chunks.size(); ++i) {
    const DeformJob& job = call.tables.jobs[chunks[i].job];
    F* to = out + call.tables.terms[job.first_term].weight * channels;
    for (int64_t c = 0; c < channels; ++c) to[c] += sums[i * channels + c];
  }
}

template <class T>
void run_calls(std::span<const DeformBwdParams> calls) {
  using F = compute_t<T>;
  const DeformBwdParams& one = calls.front();
  std::unique_ptr<F[]> memory;
  F* sums = nullptr;
  if (one.grad_source != nullptr) {
    if constexpr (std::is_same_v<T, F>) {
      sums = static_cast<F*>(one.grad_source);
    } else {
      const int64_t values = one.call->source_rows * one.call->shape.channels;
      memory = std::make_unique_for_overwrite<F[]>(values);
      sums = memory.get();
    }
  }
  for (size_t i = 0; i < calls.size(); ++i) {
    const DeformBwdParams& p = calls[i];
    const BackwardCall<T> call(p);
    if (p.grad_source != nullptr || call.needs_derivatives()) {
      input_pass<T>(call, {sums, i == 0, i + 1 == calls.size()});
    }
    if (p.grad_weights != nullptr) weight_pass(call);
    if (p.grad_bias != nullptr) bias_pass(call);
  }
}

}  // namespace

#define DYHEAD_INSTANTIATE(type) template struct BackwardCall<type>;
DYHEAD_FOR_EACH_TYPE(DYHEAD_INSTANTIATE)
#undef DYHEAD_INSTANTIATE

}  // namespace dyhead::cpu

namespace dyhead {

void run_deform_conv_bwd(std::span<const DeformBwdParams> calls, Context&) {
  dispatch_dtype(calls.front().call->shape.dtype,
                 [&](auto zero) { cpu::run_calls<decltype(zero)>(calls); });
}

}  // namespace dyhead
