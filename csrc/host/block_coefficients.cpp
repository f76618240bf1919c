#include "../common/block_coefficients.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "device.h"
#include "maps.h"
#include "wanted.h"

namespace dyhead {
namespace {

using TensorList = std::vector<Tensor>;

// A parameter may be of any floating type.
Parameter read_parameter(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes,
                         const Tensor& like) {
  check_tensor(name, t, sizes, t.scalar_type(), like);
  return {t.const_data_ptr(), dtype_of(t)};
}

// Sorts the jobs by level.
BlockCoefficientsTables read_coefficient_tables(BlockCoefficientsShape& s,
                                                const IntList& job_levels,
                                                const IntList& job_branches) {
  STD_TORCH_CHECK(!job_levels.empty() && job_levels.size() == job_branches.size(),
                  "expected a level and a branch for each of at least one job, got ",
                  job_levels.size(), " levels and ", job_branches.size(), " branches");
  STD_TORCH_CHECK(job_levels.size() <= kMaxCoefficientJobs, "expected at most ",
                  kMaxCoefficientJobs, " jobs, got ", job_levels.size(),
                  "; call this for some of the levels at a time");
  s.jobs = static_cast<int32_t>(job_levels.size());
  s.levels = 1 + narrow("a level", *std::max_element(job_levels.begin(), job_levels.end()), 0,
                        kMaxCoefficientJobs - 1);
  BlockCoefficientsTables t{};
  int16_t used = 0;
  for (int32_t level = 0; level < s.levels; ++level) {
    t.first[level] = used;
    for (int32_t j = 0; j < s.jobs; ++j) {
      if (job_levels[j] == level) t.order[used++] = static_cast<int16_t>(j);
    }
    STD_TORCH_CHECK(used > t.first[level], "expected a job of every level, got none of level ",
                    level, " out of ", s.levels);
    s.max_jobs = std::max(s.max_jobs, used - t.first[level]);
  }
  t.first[s.levels] = used;
  STD_TORCH_CHECK(used == s.jobs, "expected levels that are not negative");
  for (int32_t j = 0; j < s.jobs; ++j) {
    t.norm[j] = static_cast<int16_t>(narrow("a branch", job_branches[j], 0, s.norms - 1));
  }
  return t;
}

// Checks what both directions read and fills it into their parameters.
template <class Params>
void fill_block_coefficients(Params& p, const Tensor& mean, const Tensor& up_mean,
                             const TensorList& norm_weights, const TensorList& norm_biases,
                             const Tensor& gate_weight, const Tensor& fc1_weight,
                             const Tensor& fc2_weight, const IntList& job_levels,
                             const IntList& job_branches, int64_t num_groups) {
  constexpr int64_t kMaxWidth = 1 << 24;  // of a layer: products of two and offsets fit
  STD_TORCH_CHECK(mean.dim() == 3, "expected mean [J, N, C], got ", shape_string(mean));
  STD_TORCH_CHECK(
      mean.scalar_type() == ScalarType::Double || mean.scalar_type() == ScalarType::Float,
      "expected a mean of the type float64 or float32, got ", toString(mean.scalar_type()));
  STD_TORCH_CHECK(fc1_weight.dim() == 2, "expected fc1_weight [H, C], got ",
                  shape_string(fc1_weight));
  BlockCoefficientsShape& s = p.shape;
  s.images = mean.size(1);
  s.channels = narrow("channels", mean.size(2), 1, kMaxWidth);
  s.groups = narrow("num_groups", num_groups, 1);
  s.hidden = narrow("the width of the hidden layer", fc1_weight.size(0), 1, kMaxWidth);
  s.norms = narrow("the number of normalisations", static_cast<int64_t>(norm_weights.size()), 1,
                   kMaxNorms);
  s.dtype = dtype_of(mean);
  STD_TORCH_CHECK(s.channels % s.groups == 0, "expected channels divisible by num_groups, got ",
                  s.channels, " channels and ", s.groups, " groups");
  STD_TORCH_CHECK(norm_biases.size() == norm_weights.size(), "expected as many norm_biases as ",
                  norm_weights.size(), " norm_weights, got ", norm_biases.size());
  p.tables = read_coefficient_tables(s, job_levels, job_branches);

  const ScalarType type = mean.scalar_type();
  check_tensor("mean", mean, {s.jobs, s.images, s.channels}, type, mean);
  check_tensor("up_mean", up_mean, {s.jobs, s.images, s.channels}, type, mean);
  BlockCoefficientsParameters& q = p.parameters;
  for (int32_t b = 0; b < s.norms; ++b) {
    q.norm_weight[b] = read_parameter("a norm_weight", norm_weights[b], {s.channels}, mean);
    q.norm_bias[b] = read_parameter("a norm_bias", norm_biases[b], {s.channels}, mean);
  }
  q.gate_weight = read_parameter("gate_weight", gate_weight, {s.channels}, mean);
  q.fc1_weight = read_parameter("fc1_weight", fc1_weight, {s.hidden, s.channels}, mean);
  q.fc2_weight = read_parameter("fc2_weight", fc2_weight, {4 * s.channels, s.hidden}, mean);
  p.mean = mean.const_data_ptr();
  p.up_mean = up_mean.const_data_ptr();
}

using BlockCoefficientsFwdResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using BlockCoefficientsBwdResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                              Tensor, Tensor, Tensor, Tensor, Tensor>;

// Returns scale, shift, coefficients, norms and layers.
BlockCoefficientsFwdResult block_coefficients_fwd(
    const Tensor& mean, const Tensor& var, const Tensor& up_mean, const TensorList& norm_weights,
    const TensorList& norm_biases, const Tensor& gate_weight, const Tensor& gate_bias,
    const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& fc2_weight,
    const Tensor& fc2_bias, const IntList& job_levels, const IntList& job_branches,
    int64_t num_groups, double eps) {
  Call call(mean);
  BlockCoefficientsFwdParams p{};
  fill_block_coefficients(p, mean, up_mean, norm_weights, norm_biases, gate_weight, fc1_weight,
                          fc2_weight, job_levels, job_branches, num_groups);
  BlockCoefficientsShape& s = p.shape;
  s.eps = eps;
  check_tensor("var", var, {s.jobs, s.images, s.channels}, mean.scalar_type(), mean);
  p.var = var.const_data_ptr();
  p.parameters.gate_bias = read_parameter("gate_bias", gate_bias, {1}, mean);
  p.parameters.fc1_bias = read_parameter("fc1_bias", fc1_bias, {s.hidden}, mean);
  p.parameters.fc2_bias = read_parameter("fc2_bias", fc2_bias, {4 * s.channels}, mean);
  BlockCoefficientsFwdResult results{
      torch::stable::empty_like(mean),
      torch::stable::new_empty(mean, {s.levels, s.images, s.channels}),
      torch::stable::new_empty(mean, {s.levels, s.images, 4, s.channels}),
      torch::stable::new_empty(mean, {s.jobs, s.images, s.norm_values()}),
      torch::stable::new_empty(mean, {s.levels, s.images, s.layer_values()})};
  p.scale = std::get<0>(results).mutable_data_ptr();
  p.shift = std::get<1>(results).mutable_data_ptr();
  p.coefficients = std::get<2>(results).mutable_data_ptr();
  p.norms = std::get<3>(results).mutable_data_ptr();
  p.layers = std::get<4>(results).mutable_data_ptr();
  run_block_coefficients_fwd(p, call);
  return results;
}

// Returns the gradients of mean, var, up_mean, of all norm weights [B, C] and biases [B, C], and of
// the other parameters, as far as wanted.
BlockCoefficientsBwdResult block_coefficients_bwd(
    const Tensor& grad_scale, const Tensor& grad_shift, const Tensor& grad_coefficients,
    const Tensor& mean, const Tensor& up_mean, const Tensor& norms, const Tensor& layers,
    const TensorList& norm_weights, const TensorList& norm_biases, const Tensor& gate_weight,
    const Tensor& fc1_weight, const Tensor& fc2_weight, const IntList& job_levels,
    const IntList& job_branches, int64_t num_groups, const IntList& wanted_results) {
  Call call(mean);
  BlockCoefficientsBwdParams p{};
  fill_block_coefficients(p, mean, up_mean, norm_weights, norm_biases, gate_weight, fc1_weight,
                          fc2_weight, job_levels, job_branches, num_groups);
  const BlockCoefficientsShape& s = p.shape;
  const ScalarType type = mean.scalar_type();
  check_tensor("grad_scale", grad_scale, {s.jobs, s.images, s.channels}, type, mean);
  check_tensor("grad_shift", grad_shift, {s.levels, s.images, s.channels}, type, mean);
  check_tensor("grad_coefficients", grad_coefficients, {s.levels, s.images, 4, s.channels}, type,
               mean);
  check_tensor("norms", norms, {s.jobs, s.images, s.norm_values()}, type, mean);
  check_tensor("layers", layers, {s.levels, s.images, s.layer_values()}, type, mean);
  p.grad_scale = grad_scale.const_data_ptr();
  p.grad_shift = grad_shift.const_data_ptr();
  p.grad_coefficients = grad_coefficients.const_data_ptr();
  p.norms = norms.const_data_ptr();
  p.layers = layers.const_data_ptr();
  const Tensor workspace =
      torch::stable::new_empty(mean, {BlockCoefficientsPartials<double>::size(s)});
  p.workspace = workspace.mutable_data_ptr();
  Wanted wanted(wanted_results, std::tuple_size_v<BlockCoefficientsBwdResult>);
  size_t result = 0;
  // Initialisers in braces are evaluated in order.
  const auto empty = [&](void*& data, std::initializer_list<int64_t> sizes) {
    return wanted.allocate(result++, false, mean, sizes, type, data);
  };
  BlockCoefficientsBwdResult results{empty(p.grad_mean, {s.jobs, s.images, s.channels}),
                                     empty(p.grad_var, {s.jobs, s.images, s.channels}),
                                     empty(p.grad_up_mean, {s.jobs, s.images, s.channels}),
                                     empty(p.grad_norm_weight, {s.norms, s.channels}),
                                     empty(p.grad_norm_bias, {s.norms, s.channels}),
                                     empty(p.grad_gate_weight, {s.channels}),
                                     empty(p.grad_gate_bias, {1}),
                                     empty(p.grad_fc1_weight, {s.hidden, s.channels}),
                                     empty(p.grad_fc1_bias, {s.hidden}),
                                     empty(p.grad_fc2_weight, {4 * s.channels, s.hidden}),
                                     empty(p.grad_fc2_bias, {4 * s.channels})};
  run_block_coefficients_bwd(p, call);
  return results;
}

}  // namespace
}  // namespace dyhead

DYHEAD_SCHEMAS(m) {
  // From the moments of a block's branches to what fuse_branches takes
  // (csrc/common/block_coefficients.h). Parameters of any floating type, everything else in the
  // compute type. Returns scale, shift and coefficients, and for the backward norms [J, N, 2 G + 1]
  // and layers [L, N, 5 C + H].
  m.def(
      "block_coefficients_fwd(Tensor mean, Tensor var, Tensor up_mean, Tensor[] norm_weights, "
      "Tensor[] norm_biases, Tensor gate_weight, Tensor gate_bias, Tensor fc1_weight, "
      "Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, int[] job_levels, int[] job_branches, "
      "int num_groups, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Returns the gradients of mean, var, up_mean, of all norm_weights and norm_biases, stacked, and
  // of the other parameters in the order above, all in the compute type. `wanted` has 1 or 0 for
  // each (csrc/host/wanted.h).
  m.def(
      "block_coefficients_bwd(Tensor grad_scale, Tensor grad_shift, Tensor grad_coefficients, "
      "Tensor mean, Tensor up_mean, Tensor norms, Tensor layers, Tensor[] norm_weights, "
      "Tensor[] norm_biases, Tensor gate_weight, Tensor fc1_weight, Tensor fc2_weight, "
      "int[] job_levels, int[] job_branches, int num_groups, int[] wanted) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

DYHEAD_REGISTER(m) {
  m.impl("block_coefficients_fwd", TORCH_BOX(&dyhead::block_coefficients_fwd));
  m.impl("block_coefficients_bwd", TORCH_BOX(&dyhead::block_coefficients_bwd));
}
