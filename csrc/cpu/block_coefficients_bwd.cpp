// Backward in two steps: per level and image the gradients of the moments, and the shares in those
// of the parameters; then the shares added up, in the order of levels or jobs and images, and in
// float64, since there is no bound on the images.
#include <algorithm>
#include <iterator>
#include <vector>

#include "block_coefficients.h"

#include "context.h"
#include "dot.h"
#include "parallel.h"

namespace dyhead::cpu {
namespace {

template <class F, class Sum>
void add_scaled(const F* in, Sum factor, int64_t count, Sum* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] += factor * in[i];
}

// `out` may be null.
template <class F>
void store(const double* in, int64_t count, void* out) {
  if (out == nullptr) return;
  for (int64_t i = 0; i < count; ++i) static_cast<F*>(out)[i] = static_cast<F>(in[i]);
}

template <class F>
class Backward {
 public:
  explicit Backward(const BlockCoefficientsBwdParams& params)
      : p_(params),
        s_(params.shape),
        parameters_(s_, params.parameters),
        partials_(BlockCoefficientsPartials<F>::in(params.workspace, s_)) {}

  void run() const {
    parallel_tasks(
        s_.levels * s_.images, [&] { return std::vector<F>(s_.channels); },
        [&](int64_t i, std::vector<F>& grad_mean_z) { level(i, grad_mean_z.data()); });
    const int64_t rows = s_.levels * s_.images;
    outer_products(partials_.logits, 4 * s_.channels, hidden(0), s_.hidden, rows,
                   static_cast<F*>(p_.grad_fc2_weight), static_cast<F*>(p_.grad_fc2_bias));
    outer_products(partials_.hidden, s_.hidden, mean_z(0), s_.channels, rows,
                   static_cast<F*>(p_.grad_fc1_weight), static_cast<F*>(p_.grad_fc1_bias));
    sum_jobs();
  }

 private:
  const F* mean_z(int64_t at) const {
    return static_cast<const F*>(p_.layers) + at * s_.layer_values();
  }
  const F* hidden(int64_t at) const { return mean_z(at) + s_.channels; }
  const F* logits(int64_t at) const { return hidden(at) + s_.hidden; }

  // `at` is the index of the level and image, `grad_mean_z` scratch.
  void level(int64_t at, F* grad_mean_z) const {
    const int64_t channels = s_.channels;
    const F* grad_coefficients = static_cast<const F*>(p_.grad_coefficients) + at * 4 * channels;
    F* grad_logits = partials_.logits + at * 4 * channels;
    F* grad_hidden = partials_.hidden + at * s_.hidden;
    std::fill(grad_hidden, grad_hidden + s_.hidden, F(0));
    for (int64_t i = 0; i < 4 * channels; ++i) {
      grad_logits[i] = grad_coefficients[i] *
                       dynamic_relu_slope(logits(at)[i], static_cast<int>(i / channels), true);
      add_scaled(parameters_.fc2_weight + i * s_.hidden, grad_logits[i], s_.hidden, grad_hidden);
    }
    std::fill(grad_mean_z, grad_mean_z + channels, F(0));
    for (int64_t j = 0; j < s_.hidden; ++j) {
      if (!(hidden(at)[j] > F(0))) grad_hidden[j] = F(0);
      add_scaled(parameters_.fc1_weight + j * channels, grad_hidden[j], channels, grad_mean_z);
    }
    const int64_t level = at / s_.images, image = at % s_.images;
    const int32_t first = p_.tables.first[level], last = p_.tables.first[level + 1];
    const F* grad_shift = static_cast<const F*>(p_.grad_shift) + at * channels;
    for (int32_t k = first; k < last; ++k) {
      Branch(*this, p_.tables.order[k], image, static_cast<F>(last - first), grad_shift,
             grad_mean_z)
          .run();
    }
  }

  // One job and image.
  class Branch {
   public:
    Branch(const Backward& b, int32_t job, int64_t image, F branches, const F* grad_shift,
           const F* grad_mean_z)
        : b_(b),
          s_(b.s_),
          at_(job * s_.images + image),
          first_(at_ * s_.channels),
          weight_(b.parameters_.norm_weight[b.p_.tables.norm[job]]),
          bias_(b.parameters_.norm_bias[b.p_.tables.norm[job]]),
          up_mean_(static_cast<const F*>(b.p_.up_mean) + first_),
          norms_(static_cast<const F*>(b.p_.norms) + at_ * s_.norm_values()),
          grad_scale_(static_cast<const F*>(b.p_.grad_scale) + first_),
          grad_shift_(grad_shift),
          grad_mean_z_(grad_mean_z),
          branches_(branches) {}

    void run() {
      F grad_share = F(0);
      for (int32_t c = 0; c < s_.channels; ++c) {
        grad_share += grads(c).of_share(affine(c), up_mean_[c]);
      }
      const F logit = norms_[2 * s_.groups];
      share_ = scale_gate(logit) / branches_;
      grad_logit_ = grad_share / branches_ * scale_gate_slope(logit);
      b_.partials_.gate[at_] = grad_logit_;
      for (int32_t g = 0; g < s_.groups; ++g) run_group(g);
    }

   private:
    GroupMoments<F> group(int32_t g) const { return {norms_[g], norms_[s_.groups + g]}; }

    NormAffine<F> affine(int32_t c) const {
      return norm_affine(weight_[c], bias_[c], group(c / s_.group_width()));
    }

    ChannelGrads<F> grads(int32_t c) const {
      return {grad_scale_[c], grad_shift_[c], grad_mean_z_[c]};
    }

    // One value of a result [J, N, C], if it is wanted.
    void set(void* result, int32_t c, F value) const {
      if (result != nullptr) static_cast<F*>(result)[first_ + c] = value;
    }

    void run_group(int32_t g) const {
      const GroupMoments<F> moments = group(g);
      const int32_t begin = g * s_.group_width(), end = begin + s_.group_width();
      F grad_mean = F(0), grad_rstd = F(0);
      for (int32_t c = begin; c < end; ++c) {
        const NormAffine<F> k = affine(c);
        const AffineGrads<F> grad = affine_grads(
            grads(c), k, share_, grad_logit_ * b_.parameters_.gate_weight[c], up_mean_[c]);
        grad_mean -= grad.bias * k.a;
        grad_rstd += grad.a * weight_[c];
        b_.partials_.norm_weight[first_ + c] = grad.a * moments.rstd;
        b_.partials_.norm_bias[first_ + c] = grad.bias;
        b_.partials_.gate_weight[first_ + c] = grad_logit_ * k.at(up_mean_[c]);
        set(b_.p_.grad_up_mean, c, grad.up_mean);
      }
      const MomentGrads<F> grad = moment_grads(moments, grad_mean, grad_rstd, s_.group_width());
      for (int32_t c = begin; c < end; ++c) {
        const F mean = static_cast<const F*>(b_.p_.mean)[first_ + c];
        set(b_.p_.grad_mean, c, grad.of_mean(mean));
        set(b_.p_.grad_var, c, grad.var);
      }
    }

    const Backward& b_;
    const BlockCoefficientsShape& s_;
    const int64_t at_, first_;
    const F *weight_, *bias_, *up_mean_, *norms_, *grad_scale_, *grad_shift_, *grad_mean_z_;
    const F branches_;
    F share_ = F(0), grad_logit_ = F(0);
  };

  // weight [width, inputs] = sum over rows of grads [rows, width] x values [rows, inputs], and bias
  // [width] = sum of grads; values are the layers' of each row. Results may be null.
  void outer_products(const F* grads, int64_t width, const F* values, int64_t inputs, int64_t rows,
                      F* weight, F* bias) const {
    constexpr int64_t kOutputs = 64;
    if (weight == nullptr && bias == nullptr) return;
    parallel_tasks(
        ceil_div(width, kOutputs), [&] { return std::vector<double>(inputs); },
        [&](int64_t task, std::vector<double>& sums) {
          for (int64_t i = task * kOutputs; i < std::min(width, (task + 1) * kOutputs); ++i) {
            double sum = 0;
            std::fill(sums.begin(), sums.end(), 0);
            for (int64_t row = 0; row < rows; ++row) {
              const double grad = grads[row * width + i];
              sum += grad;
              if (weight == nullptr) continue;
              add_scaled(values + row * s_.layer_values(), grad, inputs, sums.data());
            }
            if (bias != nullptr) bias[i] = static_cast<F>(sum);
            if (weight != nullptr) store<F>(sums.data(), inputs, weight + i * inputs);
          }
        });
  }

  void sum_jobs() const {
    void* const results[] = {p_.grad_norm_weight, p_.grad_norm_bias, p_.grad_gate_weight,
                             p_.grad_gate_bias};
    if (std::all_of(std::begin(results), std::end(results), [](void* p) { return p == nullptr; })) {
      return;
    }
    const int64_t channels = s_.channels;
    std::vector<double> norm_weight(s_.norms * channels), norm_bias(s_.norms * channels),
        gate_weight(channels);
    double gate_bias = 0;
    for (int32_t j = 0; j < s_.jobs; ++j) {
      const int64_t to = p_.tables.norm[j] * channels;
      for (int64_t at = j * s_.images; at < (j + 1) * s_.images; ++at) {
        const int64_t from = at * channels;
        add_scaled(partials_.norm_weight + from, 1.0, channels, norm_weight.data() + to);
        add_scaled(partials_.norm_bias + from, 1.0, channels, norm_bias.data() + to);
        add_scaled(partials_.gate_weight + from, 1.0, channels, gate_weight.data());
        gate_bias += partials_.gate[at];
      }
    }
    store<F>(norm_weight.data(), s_.norms * channels, p_.grad_norm_weight);
    store<F>(norm_bias.data(), s_.norms * channels, p_.grad_norm_bias);
    store<F>(gate_weight.data(), channels, p_.grad_gate_weight);
    store<F>(&gate_bias, 1, p_.grad_gate_bias);
  }

  const BlockCoefficientsBwdParams& p_;
  const BlockCoefficientsShape& s_;
  const WideParameters<F> parameters_;
  const BlockCoefficientsPartials<F> partials_;
};

}  // namespace
}  // namespace dyhead::cpu

namespace dyhead {

void run_block_coefficients_bwd(const BlockCoefficientsBwdParams& params, Context&) {
  if (params.shape.dtype == DType::kFloat64) return cpu::Backward<double>(params).run();
  cpu::Backward<float>(params).run();
}

}  // namespace dyhead
