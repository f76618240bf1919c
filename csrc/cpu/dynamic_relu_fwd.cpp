#include <vector>

#include "dot.h"
#include "dynamic_relu.h"
#include "parallel.h"

namespace dyhead::cpu {
namespace {

template <class T>
void run(const DynamicReluFwdParams& params) {
  using F = compute_t<T>;
  const DynamicReluShape& s = params.shape;
  const auto* rows = static_cast<const T*>(params.rows);
  const auto* fc1_weight = static_cast<const F*>(params.fc1_weight);
  const auto* fc1_bias = static_cast<const F*>(params.fc1_bias);
  const auto* fc2_weight = static_cast<const F*>(params.fc2_weight);
  const auto* fc2_bias = static_cast<const F*>(params.fc2_bias);
  auto* out = static_cast<T*>(params.out);
  auto* mean = static_cast<F*>(params.mean);
  auto* hidden = static_cast<F*>(params.hidden);
  auto* logits = static_cast<F*>(params.logits);
  const int64_t channels = s.channels;
  const int64_t chunks = ceil_div(s.pixels, kDynamicReluRows);

  std::vector<F> partial(s.images * chunks * channels, F(0));
  parallel_for_each(s.images * chunks, [&](int64_t task) {
    const int64_t first = task % chunks * kDynamicReluRows;
    const int64_t count = std::min(kDynamicReluRows, s.pixels - first);
    const T* x = rows + (task / chunks * s.pixels + first) * channels;
    F* sum = partial.data() + task * channels;
    for (int64_t i = 0; i < count; ++i, x += channels) {
      for (int64_t c = 0; c < channels; ++c) sum[c] += to_compute(x[c]);
    }
  });

  std::vector<DynamicReluCoefficients<F>> coefficients(s.images * channels);
  parallel_for_each(s.images, [&](int64_t n) {
    F* m = mean + n * channels;
    F* h = hidden + n * s.hidden;
    F* t = logits + n * 4 * channels;
    std::fill(m, m + channels, F(0));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const F* sum = partial.data() + (n * chunks + chunk) * channels;
      for (int64_t c = 0; c < channels; ++c) m[c] += sum[c];
    }
    for (int64_t c = 0; c < channels; ++c) m[c] /= static_cast<F>(s.pixels);
    for (int64_t j = 0; j < s.hidden; ++j) {
      const F value = fc1_bias[j] + dot(fc1_weight + j * channels, m, channels);
      h[j] = value < F(0) ? F(0) : value;
    }
    for (int64_t i = 0; i < 4 * channels; ++i) {
      t[i] = fc2_bias[i] + dot(fc2_weight + i * s.hidden, h, s.hidden);
    }
    for (int64_t c = 0; c < channels; ++c) {
      coefficients[n * channels + c] = dynamic_relu_coefficients(t, c, channels, s.hard_sigmoid);
    }
  });

  parallel_for_each(s.images * chunks, [&](int64_t task) {
    const int64_t n = task / chunks;
    const int64_t first = task % chunks * kDynamicReluRows;
    const int64_t count = std::min(kDynamicReluRows, s.pixels - first);
    const int64_t start = (n * s.pixels + first) * channels;
    const DynamicReluCoefficients<F>* k = coefficients.data() + n * channels;
    for (int64_t i = 0; i < count; ++i) {
      const T* x = rows + start + i * channels;
      T* y = out + start + i * channels;
      for (int64_t c = 0; c < channels; ++c) {
        y[c] = from_compute<T>(dynamic_relu_value(k[c], to_compute(x[c])));
      }
    }
  });
}

}  // namespace

void run_dynamic_relu_fwd(const DynamicReluFwdParams& params) {
  dispatch_dtype(params.shape.dtype, [&](auto zero) { run<decltype(zero)>(params); });
}

}  // namespace dyhead::cpu
