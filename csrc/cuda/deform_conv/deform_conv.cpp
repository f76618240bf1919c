#include "deform_conv.h"

#include "../context.h"
#include "deform_conv_bwd_input_run.h"
#include "deform_conv_bwd_weights_run.h"
#include "deform_conv_fwd_run.h"

namespace dyhead {
namespace {

void check_problem(const DeformCall& call) {
  const char* problem = cuda::deform_problem(call);
  if (problem == nullptr) return;
  throw std::runtime_error(std::string(problem) + "; run this layer under backend(\"reference\")");
}

}  // namespace

void run_deform_conv_fwd(std::span<const DeformFwdParams> calls, Context& context) {
  for (const DeformFwdParams& params : calls) check_problem(*params.call);
  const auto allocate = [&](int64_t bytes) { return context.allocate(bytes); };
  context.check(cuda::run_deform_fwd(calls, calls.front().allow_tf32, context.limits(), allocate,
                                     context.stream()));
}

void run_deform_conv_bwd(std::span<const DeformBwdParams> calls, Context& context) {
  const auto allocate = [&](int64_t bytes) { return context.allocate(bytes); };
  const cuda::DeviceLimits limits = context.limits();
  const bool allow_tf32 = calls.front().allow_tf32;
  std::vector<cuda::DeformBwdCall> with_rows;
  for (const DeformBwdParams& params : calls) {
    check_problem(*params.call);
    const DeformShape& s = params.call->shape;
    const int64_t bytes = params.call->out_rows * s.out_channels * element_bytes(s.dtype);
    with_rows.push_back({&params, allocate(bytes)});
  }
  context.check(
      cuda::run_deform_bwd_input(with_rows, allow_tf32, limits, allocate, context.stream()));
  for (const cuda::DeformBwdCall& call : with_rows) {
    if (call.params->grad_weights == nullptr) continue;
    context.check(cuda::run_deform_bwd_weights(*call.params, call.rows, allow_tf32, limits,
                                               allocate, context.stream()));
  }
}

}  // namespace dyhead
