// Describes deformable work: maps in matrices of rows, and a list of jobs over them.
//
// A job computes one output map for every image. For each of its terms, the taps (3x3 or kernel_h x
// kernel_w) of a source map are sampled at the positions that the job's predictions give, and
// multiplied with the term's weights; the job adds up its terms. The pyramid block has a job with
// one term for each branch and level; the paper's spatial attention has a job for each target
// level, with a term for each level; a plain convolution is one job.
#pragma once

#include <cstdint>
#include <vector>

#include "dispatch.h"
#include "division.h"
#include "upsample.h"

namespace dyhead {

// Pixel p of image n is row first_row + n * height * width + p of its matrix.
struct MapShape {
  int64_t first_row;
  int32_t height, width;

  DYHEAD_HD int64_t pixels() const { return static_cast<int64_t>(height) * width; }
};

// How a job's output pixel finds its prediction on a map of another size:
//   Same  the same pixel of a map of the same size
//   Crop  the same y and x: the map's upper left part
//   Flat  the first K * h * w values of the map's [K, H, W], read as [K, h, w]
//   None  it has none: offsets are 0 and the mask is 1, a plain convolution
#define DYHEAD_READ_RULES(X) X(Same) X(Crop) X(Flat) X(None)

#define DYHEAD_READ_RULE(name) k##name,
enum class ReadRule : int32_t { DYHEAD_READ_RULES(DYHEAD_READ_RULE) };
#undef DYHEAD_READ_RULE

struct DeformTerm {
  int32_t source;  // index of a source map
  int32_t weight;  // index of a weight matrix
};

struct DeformJob {
  DYHEAD_HD bool plain() const { return offset_rule == ReadRule::kNone; }

  MapShape out;
  MapShape predictions;
  ReadRule offset_rule, mask_rule;
  int32_t stride_h, stride_w;
  int32_t first_term, terms;
  int32_t up_height, up_width;  // size after the upsampling that follows, for the mean there
  UpsampleMode up_mode;
};

struct DeformShape {
  int64_t images, channels, out_channels;
  int32_t groups, deform_groups;
  int32_t kernel_h, kernel_w, pad_h, pad_w, dilation_h, dilation_w;
  bool mask_logits;  // the mask still needs its sigmoid
  DType dtype;       // of source and output rows; all other tensors have its compute type

  DYHEAD_HD int32_t taps() const { return kernel_h * kernel_w; }
  // Columns of the predictions: offsets (dy, dx per tap and deformable group), then the mask.
  DYHEAD_HD int32_t offset_columns() const { return 2 * deform_groups * taps(); }
  DYHEAD_HD int32_t prediction_columns() const { return 3 * deform_groups * taps(); }
};

// The work of one call.
struct DeformCall {
  DeformShape shape;
  std::vector<MapShape> sources, predictions;
  std::vector<DeformTerm> terms;
  std::vector<DeformJob> jobs;
  int64_t weights, source_rows, prediction_rows, out_rows;
};

// The plain convolution that predicts the offsets and masks of another call, all map by map:
// prediction map i is that of source map i. Kernel, padding and dilation are the other call's.
inline DeformCall offset_conv_call(const DeformCall& reader) {
  DeformCall t{};
  t.shape = reader.shape;
  t.shape.out_channels = reader.shape.prediction_columns();
  t.shape.groups = t.shape.deform_groups = 1;
  t.sources = reader.sources;
  t.weights = 1;
  t.source_rows = reader.source_rows;
  t.out_rows = reader.prediction_rows;
  for (const MapShape& map : reader.predictions) {
    const auto i = static_cast<int32_t>(t.jobs.size());
    t.terms.push_back({i, 0});
    t.jobs.push_back({map, {}, ReadRule::kNone, ReadRule::kNone, 1, 1, i, 1, 1, 1, {}});
  }
  return t;
}

// Pixel index = y * width + x of a job's output map.
struct OutputPixel {
  int32_t index, y, x;
};

DYHEAD_HD OutputPixel output_pixel(const DeformJob& job, int32_t index) {
  return {index, index / job.out.width, index % job.out.width};
}

DYHEAD_HD OutputPixel next_pixel(const DeformJob& job, const OutputPixel& at) {
  if (at.x + 1 < job.out.width) return {at.index + 1, at.y, at.x + 1};
  return {at.index + 1, at.y + 1, 0};
}

// Index of value k of an output pixel, relative to the first value of the image's predictions. The
// value is one of a block of columns that starts at `first_column` of the prediction rows.
DYHEAD_HD int64_t prediction_index(const DeformShape& shape, const DeformJob& job, ReadRule rule,
                                   int32_t first_column, int32_t k, const OutputPixel& at) {
  int64_t pixel = at.index;
  if (rule == ReadRule::kCrop) {
    pixel = static_cast<int64_t>(at.y) * job.predictions.width + at.x;
  } else if (rule == ReadRule::kFlat) {
    const Division place = divide(k * job.out.pixels() + at.index, job.predictions.pixels());
    k = static_cast<int32_t>(place.quotient);
    pixel = place.remainder;
  }
  return pixel * shape.prediction_columns() + first_column + k;
}

}  // namespace dyhead
