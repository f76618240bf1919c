// The parameters of block_coefficients in the type that its CPU kernels compute in.
#pragma once

#include <vector>

#include "../common/block_coefficients.h"

namespace dyhead::cpu {

// What is stored in another type is copied; what a direction has no use for is null.
template <class F>
class WideParameters {
 public:
  WideParameters(const BlockCoefficientsShape& s, const BlockCoefficientsParameters& p) {
    for (int32_t b = 0; b < s.norms; ++b) {
      norm_weight[b] = widen(p.norm_weight[b], s.channels);
      norm_bias[b] = widen(p.norm_bias[b], s.channels);
    }
    gate_weight = widen(p.gate_weight, s.channels);
    gate_bias = widen(p.gate_bias, 1);
    fc1_weight = widen(p.fc1_weight, int64_t{s.hidden} * s.channels);
    fc1_bias = widen(p.fc1_bias, s.hidden);
    fc2_weight = widen(p.fc2_weight, int64_t{s.hidden} * 4 * s.channels);
    fc2_bias = widen(p.fc2_bias, 4 * s.channels);
  }

  const F* norm_weight[kMaxNorms] = {};
  const F* norm_bias[kMaxNorms] = {};
  const F *gate_weight, *gate_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;

 private:
  const F* widen(const Parameter& p, int64_t count) {
    constexpr DType kOwn = std::is_same_v<F, double> ? DType::kFloat64 : DType::kFloat32;
    if (p.data == nullptr || p.dtype == kOwn) return static_cast<const F*>(p.data);
    std::vector<F>& copy = copies_.emplace_back(count);
    for (int64_t i = 0; i < count; ++i) copy[i] = load_parameter<F>(p, i);
    return copy.data();
  }

  std::vector<std::vector<F>> copies_;
};

}  // namespace dyhead::cpu
