// Deformable convolutions on the CPU: any list of jobs, forward and backward.
//
// Forward: a task is a chunk of kChunkRows output pixels; for each term and tap it blends the
// sampled columns [rows, C] into a buffer that fits the L2 cache and multiplies them with the tap's
// packed weights. Backward: see deform_conv_bwd.cpp. Chunks and the order of all sums are fixed, so
// results do not depend on the number of threads.
#pragma once

#include <vector>

#include "../common/deform_conv.h"
#include "parallel.h"
#include "vector_kernels.h"

namespace dyhead::cpu {

// A chunk of one job's output for one image.
struct DeformChunk {
  int32_t job;
  int64_t image, first, rows;

  int64_t out_row(const DeformJob& j) const {
    return j.out.first_row + image * j.out.pixels() + first;
  }
};

inline std::vector<DeformChunk> deform_chunks(const DeformCall& tables, int64_t images) {
  std::vector<DeformChunk> chunks;
  for (int32_t j = 0; j < static_cast<int32_t>(tables.jobs.size()); ++j) {
    const int64_t pixels = tables.jobs[j].out.pixels();
    for (int64_t n = 0; pixels > 0 && n < images; ++n) {
      for (int64_t first = 0; first < pixels; first += kChunkRows) {
        chunks.push_back({j, n, first, std::min<int64_t>(kChunkRows, pixels - first)});
      }
    }
  }
  return chunks;
}

// The samples of one tap for a chunk of output pixels; `points` may be null.
template <class F>
void sample_rows(const TapSampler<F>& taps, int32_t deform_group, int32_t tap, int64_t first,
                 int64_t rows, Corners<F>* corners, SamplePoint<F>* points = nullptr) {
  OutputPixel at = output_pixel(taps.job, static_cast<int32_t>(first));
  for (int64_t r = 0; r < rows; ++r, at = next_pixel(taps.job, at)) {
    const SamplePoint<F> p = taps.point(deform_group, tap, at);
    if (points != nullptr) points[r] = p;
    corners[r] = taps.corners(p, deform_group, tap, at);
  }
}

template <class F>
TapSampler<F> tap_sampler(const DeformCall& tables, const DeformJob& job, const DeformTerm& term,
                          const F* predictions, const F* gates, int64_t image) {
  const int64_t row = job.predictions.first_row + image * job.predictions.pixels();
  const int64_t sources = static_cast<int64_t>(tables.sources.size());
  return {tables.shape, job, tables.sources[term.source],
          predictions + row * tables.shape.prediction_columns(),
          gates == nullptr ? F(1) : gates[image * sources + term.source]};
}

// Weights of a pixel's share in the mean of the upsampled map: the column sums of the interpolation
// matrices, divided by the upsampled size.
template <class F>
struct UpsampledMeanWeights {
  std::vector<F> y, x;

  // A map without pixels has none, however long its other side is.
  explicit UpsampledMeanWeights(const DeformJob& job) {
    if (job.out.pixels() == 0) return;
    y = axis(job.out.height, job.up_height, job.up_mode);
    x = axis(job.out.width, job.up_width, job.up_mode);
  }

  F at(int64_t pixel) const {
    const int64_t width = static_cast<int64_t>(x.size());
    return y[pixel / width] * x[pixel % width];
  }

 private:
  static std::vector<F> axis(int32_t from, int32_t to, UpsampleMode mode);
};

extern template struct UpsampledMeanWeights<float>;
extern template struct UpsampledMeanWeights<double>;

}  // namespace dyhead::cpu
