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

void run_deform_conv_fwd(const DeformFwdParams& params, Context& context) {
  check_problem(*params.call);
  const auto allocate = [&](int64_t bytes) { return context.allocate(bytes); };
  context.check(cuda::run_deform_fwd(params, params.allow_tf32, context.limits(), allocate,
                                     context.stream()));
}

void run_deform_conv_bwd(const DeformBwdParams& params, Context& context) {
  check_problem(*params.call);
  const auto allocate = [&](int64_t bytes) { return context.allocate(bytes); };
  const cuda::DeviceLimits limits = context.limits();
  const DeformShape& s = params.call->shape;
  void* rows = allocate(params.call->out_rows * s.out_channels * element_bytes(s.dtype));
  context.check(cuda::run_deform_bwd_input(params, rows, params.allow_tf32, limits, allocate,
                                           context.stream()));
  if (params.grad_weights == nullptr) return;
  context.check(cuda::run_deform_bwd_weights(params, rows, params.allow_tf32, limits, allocate,
                                             context.stream()));
}

}  // namespace dyhead
