// Deformable convolutions on the CPU: any list of jobs, forward and backward.
//
// Forward: a task is a chunk of kChunkRows output pixels; for each term and tap it blends the
// sampled columns [rows, C] into a buffer that fits the L2 cache and multiplies them with the tap's
// packed weights. Backward: see deform_conv_bwd.cpp. Chunks and the order of all sums are fixed, so
// results do not depend on the number of threads.
#pragma once

#include <vector>

#include "../common/deform_jobs.h"
#include "parallel.h"
#include "vector_kernels.h"

namespace dyhead::cpu {

struct DeformFwdParams {
  const DeformTables* tables;
  const void* source;       // [R, C]
  const void* predictions;  // [Q, 3 D K]
  const void* weights;      // [W, C_out, C / groups, kh, kw]
  const void* bias;         // [W, C_out] or null; a job adds that of its first term
  const void* gates;        // [N, sources] or null: factor of a source map
  void* out;                // [S, C_out]
  bool wide_out;            // out has the compute type
  bool moments;             // whether to fill the next three, [J, N, C_out] each
  void* mean;
  void* var;      // biased
  void* up_mean;  // the mean once upsampled
};

struct DeformBwdParams {
  const DeformTables* tables;
  const void* source;
  const void* predictions;
  const void* weights;
  const void* gates;
  const void* grad_out;      // [S, C_out]
  bool wide_out;             // grad_out has the compute type
  bool moments;              // whether there are gradients of the moments: the next five
  const void* out;           // [S, C_out]
  const void* mean;          // [J, N, C_out]
  const void* grad_mean;     // [J, N, C_out]
  const void* grad_var;      // [J, N, C_out]
  const void* grad_up_mean;  // [J, N, C_out]
  void* grad_source;         // [R, C]
  void* grad_predictions;    // [Q, 3 D K]
  void* grad_weights;        // as weights
  void* grad_bias;           // [W, C_out] or null
  void* grad_gates;          // [N, sources] or null
};

void run_deform_fwd(const DeformFwdParams& params);
void run_deform_bwd(const DeformBwdParams& params);

// A chunk of one job's output for one image.
struct DeformChunk {
  int32_t job;
  int64_t image, first, rows;

  int64_t out_row(const DeformJob& j) const {
    return j.out.first_row + image * j.out.pixels() + first;
  }
};

inline std::vector<DeformChunk> deform_chunks(const DeformTables& tables, int64_t images) {
  std::vector<DeformChunk> chunks;
  for (int32_t j = 0; j < static_cast<int32_t>(tables.jobs.size()); ++j) {
    const int64_t pixels = tables.jobs[j].out.pixels();
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t first = 0; first < pixels; first += kChunkRows) {
        chunks.push_back({j, n, first, std::min<int64_t>(kChunkRows, pixels - first)});
      }
    }
  }
  return chunks;
}

// Weights of a pixel's share in the mean of the upsampled map: the column sums of the interpolation
// matrices, divided by the upsampled size.
template <class F>
struct UpsampledMeanWeights {
  std::vector<F> y, x;

  explicit UpsampledMeanWeights(const DeformJob& job)
      : y(axis(job.out.height, job.up_height)), x(axis(job.out.width, job.up_width)) {}

  F at(int64_t pixel) const {
    const int64_t width = static_cast<int64_t>(x.size());
    return y[pixel / width] * x[pixel % width];
  }

 private:
  static std::vector<F> axis(int32_t from, int32_t to);
};

// One tap's samples for a chunk of rows: where they are, and the modulation folded into weights.
template <class F>
struct TapSampler {
  const DeformShape& shape;
  const DeformJob& job;
  const MapShape& source;
  const F* predictions;  // the image's first prediction row
  F gate;

  F modulation(int32_t deform_group, int32_t tap, int64_t pixel, F* before_gate = nullptr) const {
    F mask = F(1);
    if (!job.plain()) {
      const int32_t k = deform_group * shape.taps() + tap;
      const F value = predictions[prediction_index(shape, job, job.mask_rule,
                                                   shape.offset_columns(), k, pixel)];
      mask = shape.mask_logits ? F(1) / (F(1) + std::exp(-value)) : value;
    }
    if (before_gate != nullptr) *before_gate = mask;
    return mask * gate;
  }

  SamplePoint<F> point(int32_t deform_group, int32_t tap, int64_t pixel) const {
    const int64_t y = pixel / job.out.width * job.stride_h - shape.pad_h +
                      static_cast<int64_t>(tap / shape.kernel_w) * shape.dilation_h;
    const int64_t x = pixel % job.out.width * job.stride_w - shape.pad_w +
                      static_cast<int64_t>(tap % shape.kernel_w) * shape.dilation_w;
    if (job.plain()) {
      const bool inside = y >= 0 && y < source.height && x >= 0 && x < source.width;
      if (!inside) return {F(0), F(0), 0, 0, false};
      return {F(0), F(0), static_cast<int32_t>(y), static_cast<int32_t>(x), true};
    }
    const int32_t k = 2 * (deform_group * shape.taps() + tap);
    const F dy = predictions[prediction_index(shape, job, job.offset_rule, 0, k, pixel)];
    const F dx = predictions[prediction_index(shape, job, job.offset_rule, 0, k + 1, pixel)];
    return locate(y, dy, x, dx, source.height, source.width);
  }

  void sample(int32_t deform_group, int32_t tap, int64_t first, int64_t rows, Corners<F>* corners,
              SamplePoint<F>* points = nullptr) const {
    for (int64_t r = 0; r < rows; ++r) {
      const SamplePoint<F> p = point(deform_group, tap, first + r);
      if (points != nullptr) points[r] = p;
      // A sample outside must stay zero even where its modulation is not finite.
      const F scale = p.inside ? modulation(deform_group, tap, first + r) : F(0);
      if (job.plain()) {
        const int32_t pixel = p.inside ? p.top * source.width + p.left : -1;
        corners[r] = {{scale, F(0), F(0), F(0)}, {pixel, -1, -1, -1}};
      } else {
        corners[r] = corners_of(p, source.height, source.width, scale);
      }
    }
  }
};

template <class F>
TapSampler<F> tap_sampler(const DeformShape& shape, const DeformTables& tables,
                          const DeformJob& job, const DeformTerm& term, const F* predictions,
                          const F* gates, int64_t image) {
  const int64_t row = job.predictions.first_row + image * job.predictions.pixels();
  const int64_t sources = static_cast<int64_t>(tables.sources.size());
  return {shape, job, tables.sources[term.source], predictions + row * shape.prediction_columns(),
          gates == nullptr ? F(1) : gates[image * sources + term.source]};
}

extern template struct UpsampledMeanWeights<float>;
extern template struct UpsampledMeanWeights<double>;

}  // namespace dyhead::cpu
