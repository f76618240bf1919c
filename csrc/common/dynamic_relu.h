// Task-aware attention (dynamic ReLU, arXiv 2003.10027): the arguments of its kernels and the
// arithmetic of one value, shared by the CPU and the CUDA kernels.
//
//   logits = fc2 . relu(fc1 . mean(x) + fc1_bias) + fc2_bias, in the order a1, b1, a2, b2
//   t = 2 s(logit) - 1;  a1 = 1 + t, a2 = t, b1 = t / 2, b2 = t / 2
//   out = max(a1 x + b1, a2 x + b2)
#pragma once

#include <cmath>
#include <cstdint>

#include "dispatch.h"

namespace dyhead {

class Context;

struct DynamicReluShape {
  int64_t images;     // N
  int64_t pixels;     // P, the positions averaged over
  int64_t channels;   // C
  int64_t hidden;     // H
  DType dtype;        // of rows; all other tensors have its compute type
  bool hard_sigmoid;  // s: relu6(x + 3) / 6, else logistic
};

struct DynamicReluFwdParams {
  DynamicReluShape shape;
  const void* rows;        // [N, P, C]
  const void* fc1_weight;  // [H, C]
  const void* fc1_bias;    // [H]
  const void* fc2_weight;  // [4 C, H]
  const void* fc2_bias;    // [4 C]
  void* out;               // [N, P, C]
  void* mean;              // [N, C]
  void* hidden;            // [N, H], after its ReLU
  void* logits;            // [N, 4 C]
};

struct DynamicReluBwdParams {
  DynamicReluShape shape;
  const void* grad_out;    // [N, P, C]
  const void* rows;        // [N, P, C]
  const void* hidden;      // [N, H]
  const void* logits;      // [N, 4 C]
  const void* fc1_weight;  // [H, C]
  const void* fc2_weight;  // [4 C, H]
  void* grad_rows;         // [N, P, C]; null where not wanted, as the others on CUDA
  void* grad_logits;       // [N, 4 C]
  void* grad_hidden;       // [N, H], before its ReLU
};

// The kernels of a library, for at least one image; see csrc/host/device.h.
void run_dynamic_relu_fwd(const DynamicReluFwdParams& params, Context& context);
void run_dynamic_relu_bwd(const DynamicReluBwdParams& params, Context& context);

// t = 2 s(logit) - 1.
template <class F>
DYHEAD_HD F shifted_sigmoid(F logit, bool hard) {
  if (hard) {
    const F shifted = logit + F(3);
    // NaN fails both comparisons and propagates.
    return F(2) * ((shifted < F(0) ? F(0) : shifted > F(6) ? F(6) : shifted) / F(6)) - F(1);
  }
  return F(2) / (F(1) + std::exp(-logit)) - F(1);
}

// dt / dlogit.
template <class F>
DYHEAD_HD F shifted_sigmoid_slope(F logit, bool hard) {
  if (hard) {
    const F shifted = logit + F(3);
    return shifted > F(0) && shifted < F(6) ? F(1) / F(3) : F(0);
  }
  const F s = F(1) / (F(1) + std::exp(-logit));
  return F(2) * s * (F(1) - s);
}

// Coefficient k of a channel, in the order a1, b1, a2, b2.
template <class F>
DYHEAD_HD F dynamic_relu_coefficient(F logit, int k, bool hard) {
  const F t = shifted_sigmoid(logit, hard);
  return k == 0 ? F(1) + t : k == 2 ? t : t / F(2);
}

template <class F>
struct DynamicReluCoefficients {
  F a1, b1, a2, b2;
};

// The coefficients of channel c from one image's logits [4 C].
template <class F>
DYHEAD_HD DynamicReluCoefficients<F> dynamic_relu_coefficients(const F* logits, int64_t c,
                                                               int64_t channels, bool hard) {
  return {dynamic_relu_coefficient(logits[c], 0, hard),
          dynamic_relu_coefficient(logits[channels + c], 1, hard),
          dynamic_relu_coefficient(logits[2 * channels + c], 2, hard),
          dynamic_relu_coefficient(logits[3 * channels + c], 3, hard)};
}

// d(coefficient) / d(logit) for coefficient k of a channel; the offsets b have half the slope.
template <class F>
DYHEAD_HD F dynamic_relu_slope(F logit, int k, bool hard) {
  const F slope = shifted_sigmoid_slope(logit, hard);
  return k % 2 == 1 ? slope / F(2) : slope;
}

template <class F>
DYHEAD_HD F dynamic_relu_value(const DynamicReluCoefficients<F>& k, F x) {
  const F first = k.a1 * x + k.b1;
  const F second = k.a2 * x + k.b2;
  // NaN on either side propagates, as in torch.maximum.
  return first > second || first != first ? first : second;
}

// The share of the gradient that the first line gets: ties are split, as in torch.maximum.
template <class F>
DYHEAD_HD F dynamic_relu_share(const DynamicReluCoefficients<F>& k, F x) {
  const F first = k.a1 * x + k.b1;
  const F second = k.a2 * x + k.b2;
  return first > second ? F(1) : first < second ? F(0) : F(0.5);
}

}  // namespace dyhead
