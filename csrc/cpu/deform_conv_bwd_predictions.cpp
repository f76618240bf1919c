// Of the derivatives of all samples, what predictions and gates get.
#include "deform_conv_bwd.h"

namespace dyhead::cpu {
namespace {

constexpr int64_t kRangePixels = 1024;  // of one task

// Pixels [first, last) of one use.
struct Range {
  size_t use;
  int64_t first, last;
};

// The uses that read one map of predictions add to it in turn: wave i has the i-th of each map.
// Pixels of one use read different predictions, so that a wave's tasks own what they write.
template <class T>
std::vector<std::vector<Range>> make_waves(const BackwardCall<T>& call) {
  std::vector<std::vector<Range>> waves;
  for (size_t u = 0; u < call.uses.size(); ++u) {
    const auto map_of = [&](size_t use) {
      return call.tables.jobs[call.uses[use].job].predictions.first_row;
    };
    const DeformJob& job = call.tables.jobs[call.uses[u].job];
    if (job.plain() && call.p.grad_gates == nullptr) continue;
    size_t wave = 0;
    for (size_t before = 0; before < u && !job.plain(); ++before) {
      const bool plain = call.tables.jobs[call.uses[before].job].plain();
      wave += !plain && map_of(before) == map_of(u);
    }
    if (waves.size() <= wave) waves.resize(wave + 1);
    for (int64_t first = 0; first < job.out.pixels(); first += kRangePixels) {
      waves[wave].push_back({u, first, std::min(first + kRangePixels, job.out.pixels())});
    }
  }
  return waves;
}

// Returns what the gate of the term's source gets.
template <class T>
compute_t<T> add_range(const BackwardCall<T>& call, const std::vector<Slice>& slices,
                       const Derivatives<compute_t<T>>& derivatives, const Range& range,
                       int64_t image, int64_t local_image) {
  using F = compute_t<T>;
  const DeformShape& s = call.s;
  const Use& use = call.uses[range.use];
  const DeformJob& job = call.tables.jobs[use.job];
  const TapSampler<F> taps = call.sampler(use, image);
  const int64_t row = job.predictions.first_row + image * job.predictions.pixels();
  F* grad = nullptr;
  if (call.p.grad_predictions != nullptr) {
    grad = static_cast<F*>(call.p.grad_predictions) + row * s.prediction_columns();
  }
  F grad_gate = F(0);
  for (auto p = static_cast<int32_t>(range.first); p < range.last; ++p) {
    const OutputPixel pixel = output_pixel(job, p);
    for (int32_t d = 0; d < s.deform_groups; ++d) {
      for (int32_t tap = 0; tap < s.taps(); ++tap) {
        F value = F(0), slope_y = F(0), slope_x = F(0);
        for (size_t i = 0; i < slices.size(); ++i) {
          if (slices[i].deform_group != d) continue;
          const F* part =
              derivatives.at(local_image, static_cast<int64_t>(i), use.first_row + p) + tap * 3;
          value += part[0];
          slope_y += part[1];
          slope_x += part[2];
        }
        F mask;
        const F modulation = taps.modulation(d, tap, pixel, &mask);
        grad_gate += value * mask;
        if (job.plain() || grad == nullptr) continue;
        const int32_t k = d * s.taps() + tap;
        const auto add = [&](ReadRule rule, int32_t column, int32_t value_index, F change) {
          grad[prediction_index(s, job, rule, column, value_index, pixel)] += change;
        };
        add(job.offset_rule, 0, 2 * k, modulation * slope_y);
        add(job.offset_rule, 0, 2 * k + 1, modulation * slope_x);
        const F slope = s.mask_logits ? mask * (F(1) - mask) : F(1);
        add(job.mask_rule, s.offset_columns(), k, value * taps.gate * slope);
      }
    }
  }
  return grad_gate;
}

}  // namespace

template <class T>
void prediction_pass(const BackwardCall<T>& call, const std::vector<Slice>& slices,
                     const Derivatives<compute_t<T>>& derivatives, int64_t first_image,
                     int64_t images) {
  using F = compute_t<T>;
  const int64_t sources = static_cast<int64_t>(call.tables.sources.size());
  auto* grad_gates = static_cast<F*>(call.p.grad_gates);
  for (const std::vector<Range>& wave : make_waves(call)) {
    std::vector<F> gates(wave.size() * images);
    parallel_for_each(static_cast<int64_t>(gates.size()), [&](int64_t task) {
      const int64_t image = task % images;
      gates[task] =
          add_range(call, slices, derivatives, wave[task / images], first_image + image, image);
    });
    if (grad_gates == nullptr) continue;
    for (size_t task = 0; task < gates.size(); ++task) {
      const int64_t image = first_image + static_cast<int64_t>(task) % images;
      const Use& use = call.uses[wave[task / images].use];
      grad_gates[image * sources + call.tables.terms[use.term].source] += gates[task];
    }
  }
}

#define DYHEAD_INSTANTIATE(type)                                                      \
  template void prediction_pass(const BackwardCall<type>&, const std::vector<Slice>&, \
                                const Derivatives<compute_t<type>>&, int64_t, int64_t);
DYHEAD_FOR_EACH_TYPE(DYHEAD_INSTANTIATE)
#undef DYHEAD_INSTANTIATE

}  // namespace dyhead::cpu
