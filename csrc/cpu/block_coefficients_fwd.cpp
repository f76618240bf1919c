#include "block_coefficients.h"

#include "context.h"
#include "dot.h"
#include "parallel.h"

namespace dyhead::cpu {
namespace {

template <class F>
class Forward {
 public:
  explicit Forward(const BlockCoefficientsFwdParams& params)
      : p_(params), s_(params.shape), parameters_(s_, params.parameters) {}

  void run() const {
    parallel_for_each(s_.levels * s_.images,
                      [&](int64_t i) { level(static_cast<int32_t>(i / s_.images), i); });
  }

 private:
  // `at` is the index of the level and image.
  void level(int32_t level, int64_t at) const {
    const int64_t image = at % s_.images;
    F* layers = static_cast<F*>(p_.layers) + at * s_.layer_values();
    F* mean_z = layers;
    F* shift = static_cast<F*>(p_.shift) + at * s_.channels;
    std::fill(mean_z, mean_z + s_.channels, F(0));
    std::vector<double> wide_shift(s_.channels, 0.0);
    const int32_t first = p_.tables.first[level], last = p_.tables.first[level + 1];
    for (int32_t k = first; k < last; ++k) {
      add_branch(p_.tables.order[k], image, static_cast<F>(last - first), mean_z,
                 wide_shift.data());
    }
    for (int32_t c = 0; c < s_.channels; ++c) shift[c] = static_cast<F>(wide_shift[c]);
    dynamic_relu_layers(layers, static_cast<F*>(p_.coefficients) + at * 4 * s_.channels);
  }

  void add_branch(int32_t job, int64_t image, F branches, F* __restrict mean_z,
                  double* __restrict shift) const {
    const int64_t at = job * s_.images + image;
    const F* up_mean = static_cast<const F*>(p_.up_mean) + at * s_.channels;
    F* scale = static_cast<F*>(p_.scale) + at * s_.channels;
    F* norms = static_cast<F*>(p_.norms) + at * s_.norm_values();
    normalise(at, norms);
    const F* weight = parameters_.norm_weight[p_.tables.norm[job]];
    const F* bias = parameters_.norm_bias[p_.tables.norm[job]];
    const auto affine = [&](int32_t c) {
      const int32_t g = c / s_.group_width();
      return norm_affine(weight[c], bias[c], GroupMoments<F>{norms[g], norms[s_.groups + g]});
    };
    F logit = parameters_.gate_bias[0];
    for (int32_t c = 0; c < s_.channels; ++c) {
      logit += parameters_.gate_weight[c] * affine(c).at(up_mean[c]);
    }
    norms[2 * s_.groups] = logit;
    const F share = scale_gate(logit) / branches;
    for (int32_t c = 0; c < s_.channels; ++c) {
      const NormAffine<F> k = affine(c);
      scale[c] = share * k.a;
      shift[c] += k.shift(share, scale[c]);
      mean_z[c] += share * k.at(up_mean[c]);
    }
  }

  // Mean and rstd of every group.
  void normalise(int64_t at, F* norms) const {
    const int32_t width = s_.group_width();
    const F* mean = static_cast<const F*>(p_.mean) + at * s_.channels;
    const F* var = static_cast<const F*>(p_.var) + at * s_.channels;
    for (int32_t g = 0; g < s_.groups; ++g, mean += width, var += width) {
      F sum = F(0), spread = F(0);
      // As differences, which may be much smaller than the means.
      for (int32_t c = 1; c < width; ++c) sum += mean[c] - mean[0];
      const F mu = mean[0] + sum / static_cast<F>(width);
      for (int32_t c = 0; c < width; ++c) spread += var[c] + (mean[c] - mu) * (mean[c] - mu);
      norms[g] = mu;
      norms[s_.groups + g] =
          F(1) / std::sqrt(spread / static_cast<F>(width) + static_cast<F>(s_.eps));
    }
  }

  void dynamic_relu_layers(F* layers, F* coefficients) const {
    const F* mean_z = layers;
    F* hidden = layers + s_.channels;
    F* logits = hidden + s_.hidden;
    for (int64_t j = 0; j < s_.hidden; ++j) {
      const F value = parameters_.fc1_bias[j] +
                      dot(parameters_.fc1_weight + j * s_.channels, mean_z, s_.channels);
      hidden[j] = value < F(0) ? F(0) : value;
    }
    for (int64_t i = 0; i < 4 * s_.channels; ++i) {
      logits[i] =
          parameters_.fc2_bias[i] + dot(parameters_.fc2_weight + i * s_.hidden, hidden, s_.hidden);
      coefficients[i] =
          dynamic_relu_coefficient(logits[i], static_cast<int>(i / s_.channels), true);
    }
  }

  const BlockCoefficientsFwdParams& p_;
  const BlockCoefficientsShape& s_;
  const WideParameters<F> parameters_;
};

}  // namespace
}  // namespace dyhead::cpu

namespace dyhead {

void run_block_coefficients_fwd(const BlockCoefficientsFwdParams& params, Context&) {
  if (params.shape.dtype == DType::kFloat64) return cpu::Forward<double>(params).run();
  cpu::Forward<float>(params).run();
}

}  // namespace dyhead
