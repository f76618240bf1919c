// The small middle step of a pyramid block: the arguments of its kernels and the arithmetic of one
// value, shared by the CPU and the CUDA kernels.
//
// Branch j of a level has, per image and channel, the mean m, the biased variance v and the mean
// after upsampling u of its output y. Normalisation, gate and average are affine per channel:
//
//   mu, rstd   mean over the channels of the group, and 1 / sqrt of the variance over all its
//              values: mean(v) + mean((m - mu)^2) + eps
//   a y + b    the normalised branch: a = weight rstd, b = bias - a mu; a u + b is its mean
//   gate       hsigmoid(relu(sum_c gate_weight (a u + b) + gate_bias)), hsigmoid = relu6(x + 3) / 6
//   z          sum_j scale_j y_j + shift, with scale_j = share_j a_j, shift = sum_j share_j b_j and
//              share_j = gate_j / branches of the level
//
// From the mean of z, sum_j share_j (a_j u_j + b_j), the layers of the dynamic ReLU
// (dynamic_relu.h) give its coefficients. No pixel is touched.
#pragma once

#include <cmath>
#include <cstdint>

#include "dynamic_relu.h"

namespace dyhead {

class Context;

inline constexpr int32_t kMaxCoefficientJobs = 128;  // kernels get the tables by value
inline constexpr int32_t kMaxNorms = 8;

struct BlockCoefficientsShape {
  int64_t images;    // N
  int32_t levels;    // L
  int32_t jobs;      // J
  int32_t max_jobs;  // of one level
  int32_t channels;  // C
  int32_t groups;    // G
  int32_t hidden;    // H
  int32_t norms;     // B, the kinds of branches, each with a normalisation of its own
  DType dtype;       // of all but the parameters: float64 or float32
  double eps;        // forward only

  DYHEAD_HD int32_t group_width() const { return channels / groups; }
  // Saved by the forward for each job and image: mu [G], rstd [G], the logit of the gate.
  DYHEAD_HD int32_t norm_values() const { return 2 * groups + 1; }
  // Saved for each level and image: the mean of z [C], the hidden layer [H], the logits [4 C].
  DYHEAD_HD int32_t layer_values() const { return 5 * channels + hidden; }
};

struct BlockCoefficientsTables {
  int16_t first[kMaxCoefficientJobs + 1];  // level l has jobs order[first[l]], ... up to, not
  int16_t order[kMaxCoefficientJobs];      // including, order[first[l + 1]]
  int16_t norm[kMaxCoefficientJobs];       // by job
};

// A parameter, in the type in which its module stores it.
struct Parameter {
  const void* data;
  DType dtype;
};

struct BlockCoefficientsParameters {
  Parameter norm_weight[kMaxNorms];  // [C] each
  Parameter norm_bias[kMaxNorms];    // [C] each
  Parameter gate_weight;             // [C]
  Parameter gate_bias;               // [1], forward only
  Parameter fc1_weight;              // [H, C]
  Parameter fc1_bias;                // [H], forward only
  Parameter fc2_weight;              // [4 C, H]
  Parameter fc2_bias;                // [4 C], forward only
};

struct BlockCoefficientsFwdParams {
  BlockCoefficientsShape shape;
  BlockCoefficientsTables tables;
  BlockCoefficientsParameters parameters;
  const void* mean;     // [J, N, C]
  const void* var;      // [J, N, C]
  const void* up_mean;  // [J, N, C]
  void* scale;          // [J, N, C]
  void* shift;          // [L, N, C]
  void* coefficients;   // [L, N, 4, C]: a1, b1, a2, b2
  void* norms;          // [J, N, norm_values()]
  void* layers;         // [L, N, layer_values()]
};

struct BlockCoefficientsBwdParams {
  BlockCoefficientsShape shape;
  BlockCoefficientsTables tables;
  BlockCoefficientsParameters parameters;
  const void* grad_scale;         // [J, N, C]
  const void* grad_shift;         // [L, N, C]
  const void* grad_coefficients;  // [L, N, 4, C]
  const void* mean;               // [J, N, C]
  const void* up_mean;            // [J, N, C]
  const void* norms;              // [J, N, norm_values()]
  const void* layers;             // [L, N, layer_values()]
  void* workspace;                // BlockCoefficientsPartials
  void* grad_mean;                // [J, N, C]; null where not wanted, as all below
  void* grad_var;                 // [J, N, C]
  void* grad_up_mean;             // [J, N, C]
  void* grad_norm_weight;         // [B, C]
  void* grad_norm_bias;           // [B, C]
  void* grad_gate_weight;         // [C]
  void* grad_gate_bias;           // [1]
  void* grad_fc1_weight;          // [H, C]
  void* grad_fc1_bias;            // [H]
  void* grad_fc2_weight;          // [4 C, H]
  void* grad_fc2_bias;            // [4 C]
};

// The kernels of a library; see csrc/host/device.h.
void run_block_coefficients_fwd(const BlockCoefficientsFwdParams& params, Context& context);
void run_block_coefficients_bwd(const BlockCoefficientsBwdParams& params, Context& context);

// Intermediate results of the backward: its first step writes them, its second sums them into the
// parameters' gradients.
template <class F>
struct BlockCoefficientsPartials {
  F* logits;       // [L, N, 4 C], gradients
  F* hidden;       // [L, N, H], gradients before the ReLU
  F* norm_weight;  // [J, N, C], contributions to the parameters' gradients, as below
  F* norm_bias;    // [J, N, C]
  F* gate_weight;  // [J, N, C]
  F* gate;         // [J, N]

  DYHEAD_HD static BlockCoefficientsPartials in(void* workspace, const BlockCoefficientsShape& s) {
    F* logits = static_cast<F*>(workspace);
    F* hidden = logits + s.levels * s.images * 4 * s.channels;
    F* norm_weight = hidden + s.levels * s.images * s.hidden;
    const int64_t size = s.jobs * s.images * s.channels;
    return {logits,
            hidden,
            norm_weight,
            norm_weight + size,
            norm_weight + 2 * size,
            norm_weight + 3 * size};
  }

  static int64_t size(const BlockCoefficientsShape& s) {
    return s.images * (s.levels * (4 * int64_t{s.channels} + s.hidden) +
                       s.jobs * (3 * int64_t{s.channels} + 1));
  }
};

template <class F>
DYHEAD_HD F load_parameter(const Parameter& p, int64_t i) {
  switch (p.dtype) {
    case DType::kFloat64:
      return static_cast<F>(static_cast<const double*>(p.data)[i]);
    case DType::kBFloat16:
      return static_cast<F>(to_compute(static_cast<const bfloat16*>(p.data)[i]));
    case DType::kFloat16:
      return static_cast<F>(to_compute(static_cast<const float16*>(p.data)[i]));
    default:
      return static_cast<F>(static_cast<const float*>(p.data)[i]);
  }
}

// ---- one channel of a branch --------------------------------------------------------------------

template <class F>
struct GroupMoments {
  F mean, rstd;
};

// a y + b, computed as a (y - mu) + bias: y and mu may be much larger than their difference.
template <class F>
struct NormAffine {
  F a, bias, mean;

  // What a branch adds to its level's shift. From the scale as rounded, and in float64: scale and
  // shift are each as large as y, and what they make of it is not.
  DYHEAD_HD double shift(F share, F scale) const {
    return static_cast<double>(share) * static_cast<double>(bias) -
           static_cast<double>(scale) * static_cast<double>(mean);
  }
  DYHEAD_HD F at(F y) const { return a * (y - mean) + bias; }
};

template <class F>
DYHEAD_HD NormAffine<F> norm_affine(F weight, F bias, const GroupMoments<F>& group) {
  return {weight * group.rstd, bias, group.mean};
}

template <class F>
DYHEAD_HD F scale_gate(F logit) {
  // NaN fails all comparisons and propagates.
  const F shifted = (logit < F(0) ? F(0) : logit) + F(3);
  return (shifted > F(6) ? F(6) : shifted) / F(6);
}

// d(gate) / d(logit): 0 at both corners, as in torch.
template <class F>
DYHEAD_HD F scale_gate_slope(F logit) {
  return logit > F(0) && logit + F(3) < F(6) ? F(1) / F(6) : F(0);
}

// The incoming gradients of one channel of a branch: of its scale, of its level's shift and of the
// mean of z; and what follows from them for the gradients of a and bias, with a share of 1.
template <class F>
struct ChannelGrads {
  F scale, shift, mean_z;

  DYHEAD_HD F of_a(const NormAffine<F>& k, F up_mean) const {
    return (scale - k.mean * shift) + mean_z * (up_mean - k.mean);
  }
  DYHEAD_HD F of_bias() const { return shift + mean_z; }
  // The channel's contribution to the gradient of the branch's share.
  DYHEAD_HD F of_share(const NormAffine<F>& k, F up_mean) const {
    return of_a(k, up_mean) * k.a + of_bias() * k.bias;
  }
};

// The gradients passed on to the normalisation.
template <class F>
struct AffineGrads {
  F a, bias, up_mean;
};

// `pooled` is the gradient of the mean a u + b that the gate was computed from.
template <class F>
DYHEAD_HD AffineGrads<F> affine_grads(const ChannelGrads<F>& grads, const NormAffine<F>& k, F share,
                                      F pooled, F up_mean) {
  return {share * grads.of_a(k, up_mean) + pooled * (up_mean - k.mean),
          share * grads.of_bias() + pooled, (share * grads.mean_z + pooled) * k.a};
}

// From the gradients of a group's mean and rstd, summed over its channels, to those of the moments
// of its `width` channels.
template <class F>
struct MomentGrads {
  F var;        // of every v
  F from_mean;  // of every m, through mu
  F mean;       // mu

  DYHEAD_HD F of_mean(F m) const { return from_mean + F(2) * (m - mean) * var; }
};

template <class F>
DYHEAD_HD MomentGrads<F> moment_grads(const GroupMoments<F>& group, F grad_mean, F grad_rstd,
                                      int32_t width) {
  const F cubed = group.rstd * group.rstd * group.rstd;
  return {F(-0.5) * grad_rstd * cubed / static_cast<F>(width), grad_mean / static_cast<F>(width),
          group.mean};
}

}  // namespace dyhead
