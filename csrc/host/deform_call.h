// What the operators of deformable jobs share: they read the same tables, weights and gradients.
#pragma once

#include <optional>
#include <vector>

#include "../common/deform_conv.h"
#include "device.h"
#include "maps.h"

namespace dyhead {

// The integer arguments that describe a call's work. Sizes are height and width of each map; they
// and the number of images are all of a call that a compiler may see as symbols.
struct DeformTables {
  int64_t images;
  const IntList& sources;
  const IntList& predictions;
  const IntList& outs;       // of each job
  const IntList& upsampled;  // of each job, after the upsampling that follows
  const IntList& geometry;   // the fields of geometry_field
  const IntList& terms;      // records of term_field
  const IntList& jobs;       // records of job_field
  bool mask_logits;
};

// The work of a call, after all checks. `predictions` [Q, 3 D K] may be null, where they are still
// to be made: then their maps say how many rows they have, at most as many as the source.
DeformCall read_deform_call(const Tensor& source, const Tensor* predictions,
                            const std::vector<Tensor>& weights, const DeformTables& tables);

// Pointers to matrices and biases, after a check: all of one type, the compute type or, on CUDA,
// whose kernels read half-precision weights as they are, the source's. `names`: of matrices and
// biases, for errors.
struct WeightNames {
  const char *matrices = "weights", *bias = "bias";
};
DeformWeights read_deform_weights(const DeformShape& s, const std::vector<Tensor>& weights,
                                  const std::vector<Tensor>& bias, const Tensor& source,
                                  WeightNames names = {});

// null for an absent tensor, else its data after a check of its shape.
const void* optional_data(const char* name, const std::optional<Tensor>& t,
                          std::initializer_list<int64_t> sizes, const Tensor& like);

// What a forward call returns; `params` gets the addresses. The moments are empty unless
// params.moments asks for them; `out` has the type that params.out_in_compute_dtype says.
struct DeformResults {
  Tensor out, mean, var, up_mean;
};
DeformResults allocate_results(const DeformCall& call, const Tensor& source,
                               DeformFwdParams& params);

// What a backward call gets from the forward and from autograd. The gradients of the moments are
// there all three, or none of them.
struct DeformGradients {
  const Tensor& grad_out;
  const std::optional<Tensor>&grad_mean, &grad_var, &grad_up_mean;
  const Tensor &out, &mean;
};

// Checks them against params.call, and fills `params` but for the results.
void read_gradients(const DeformGradients& given, const Tensor& source, DeformBwdParams& params);

}  // namespace dyhead
