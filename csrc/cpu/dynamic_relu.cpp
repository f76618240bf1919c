// dynamic_relu on the CPU, forward and backward.
#include "../common/dynamic_relu.h"

#include <vector>

#include "context.h"
#include "dot.h"
#include "parallel.h"

namespace dyhead::cpu {
namespace {

// Rows that one task sums or maps: fixed, so that sums do not depend on the number of threads.
constexpr int64_t kDynamicReluRows = 256;

template <class T>
void forward(const DynamicReluFwdParams& params) {
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

template <class T>
void backward(const DynamicReluBwdParams& params) {
  using F = compute_t<T>;
  const DynamicReluShape& s = params.shape;
  const auto* grad_out = static_cast<const T*>(params.grad_out);
  const auto* rows = static_cast<const T*>(params.rows);
  const auto* hidden = static_cast<const F*>(params.hidden);
  const auto* logits = static_cast<const F*>(params.logits);
  const auto* fc1_weight = static_cast<const F*>(params.fc1_weight);
  const auto* fc2_weight = static_cast<const F*>(params.fc2_weight);
  auto* grad_rows = static_cast<T*>(params.grad_rows);
  auto* grad_logits = static_cast<F*>(params.grad_logits);
  auto* grad_hidden = static_cast<F*>(params.grad_hidden);
  const int64_t channels = s.channels;
  const int64_t chunks = ceil_div(s.pixels, kDynamicReluRows);

  std::vector<DynamicReluCoefficients<F>> coefficients(s.images * channels);
  parallel_for_each(s.images, [&](int64_t n) {
    for (int64_t c = 0; c < channels; ++c) {
      coefficients[n * channels + c] =
          dynamic_relu_coefficients(logits + n * 4 * channels, c, channels, s.hard_sigmoid);
    }
  });

  // Per chunk: the gradients of a1, b1, a2 and b2, as [4, C].
  std::vector<F> partial(s.images * chunks * 4 * channels, F(0));
  parallel_for_each(s.images * chunks, [&](int64_t task) {
    const int64_t n = task / chunks;
    const int64_t first = task % chunks * kDynamicReluRows;
    const int64_t count = std::min(kDynamicReluRows, s.pixels - first);
    const int64_t start = (n * s.pixels + first) * channels;
    const DynamicReluCoefficients<F>* k = coefficients.data() + n * channels;
    F* grad_a1 = partial.data() + task * 4 * channels;
    F* grad_b1 = grad_a1 + channels;
    F* grad_a2 = grad_b1 + channels;
    F* grad_b2 = grad_a2 + channels;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < channels; ++c) {
        const F x = to_compute(rows[start + i * channels + c]);
        const F g = to_compute(grad_out[start + i * channels + c]);
        const F first_share = g * dynamic_relu_share(k[c], x);
        const F second_share = g - first_share;
        grad_a1[c] += first_share * x;
        grad_b1[c] += first_share;
        grad_a2[c] += second_share * x;
        grad_b2[c] += second_share;
      }
    }
  });

  std::vector<F> grad_mean(s.images * channels, F(0));  // already divided by P
  parallel_for_each(s.images, [&](int64_t n) {
    const F* t = logits + n * 4 * channels;
    F* gt = grad_logits + n * 4 * channels;
    F* gh = grad_hidden + n * s.hidden;
    std::fill(gt, gt + 4 * channels, F(0));
    std::fill(gh, gh + s.hidden, F(0));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const F* sum = partial.data() + (n * chunks + chunk) * 4 * channels;
      for (int64_t i = 0; i < 4 * channels; ++i) gt[i] += sum[i];
    }
    for (int64_t i = 0; i < 4 * channels; ++i) {
      gt[i] *= dynamic_relu_slope(t[i], static_cast<int>(i / channels), s.hard_sigmoid);
      for (int64_t j = 0; j < s.hidden; ++j) gh[j] += fc2_weight[i * s.hidden + j] * gt[i];
    }
    F* gm = grad_mean.data() + n * channels;
    for (int64_t j = 0; j < s.hidden; ++j) {
      if (!(hidden[n * s.hidden + j] > F(0))) gh[j] = F(0);
      if (grad_rows == nullptr) continue;
      for (int64_t c = 0; c < channels; ++c) gm[c] += fc1_weight[j * channels + c] * gh[j];
    }
    for (int64_t c = 0; c < channels; ++c) gm[c] /= static_cast<F>(s.pixels);
  });
  if (grad_rows == nullptr) return;

  parallel_for_each(s.images * chunks, [&](int64_t task) {
    const int64_t n = task / chunks;
    const int64_t first = task % chunks * kDynamicReluRows;
    const int64_t count = std::min(kDynamicReluRows, s.pixels - first);
    const int64_t start = (n * s.pixels + first) * channels;
    const DynamicReluCoefficients<F>* k = coefficients.data() + n * channels;
    const F* gm = grad_mean.data() + n * channels;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = start + i * channels + c;
        const F share = dynamic_relu_share(k[c], to_compute(rows[at]));
        const F slope = share * k[c].a1 + (F(1) - share) * k[c].a2;
        grad_rows[at] = from_compute<T>(to_compute(grad_out[at]) * slope + gm[c]);
      }
    }
  });
}

}  // namespace
}  // namespace dyhead::cpu

namespace dyhead {

void run_dynamic_relu_fwd(const DynamicReluFwdParams& params, Context&) {
  dispatch_dtype(params.shape.dtype, [&](auto zero) { cpu::forward<decltype(zero)>(params); });
}

void run_dynamic_relu_bwd(const DynamicReluBwdParams& params, Context&) {
  dispatch_dtype(params.shape.dtype, [&](auto zero) { cpu::backward<decltype(zero)>(params); });
}

}  // namespace dyhead
