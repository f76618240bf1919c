// Reads the job tables of deform_conv from lists of integers, checks every index in them, and
// allocates results; what both libraries do alike.
#pragma once

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/deform_jobs.h"
#include "tensors.h"

namespace dyhead {

using IntList = std::vector<int64_t>;

// The tables as dyhead_cuda/ops/deform_conv.py writes them:
//   geometry  images, groups, deform_groups, kernel_h, kernel_w, pad_h, pad_w, dilation_h,
//   dilation_w sources   first_row, height, width of each source map terms     source, weight of
//   each term jobs      first_row, height, width of the output map; the same of the prediction map;
//             offset_rule, mask_rule, stride_h, stride_w, first_term, terms, up_height, up_width

namespace detail {

inline MapShape read_map(const IntList& values, size_t at, int64_t images, int64_t rows,
                         const char* name) {
  const int64_t first_row = values[at];
  const int64_t height = values[at + 1];
  const int64_t width = values[at + 2];
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  // Compared without a product that could overflow.
  const bool fits = first_row >= 0 && first_row <= rows && height >= 0 && height <= kMost &&
                    width >= 0 && width <= kMost &&
                    (images == 0 || height * width <= (rows - first_row) / images);
  STD_TORCH_CHECK(fits, "expected a ", name, " map within ", rows, " rows, got rows from ",
                  first_row, " of ", images, " images of ", height, "x", width);
  return {first_row, static_cast<int32_t>(height), static_cast<int32_t>(width)};
}

inline void check_job(const DeformJob& job, const DeformTables& tables) {
  const bool same_size =
      job.out.height == job.predictions.height && job.out.width == job.predictions.width;
  for (ReadRule rule : {job.offset_rule, job.mask_rule}) {
    const bool fits = rule == ReadRule::kSame   ? same_size
                      : rule == ReadRule::kCrop ? job.out.height <= job.predictions.height &&
                                                      job.out.width <= job.predictions.width
                                                : job.out.pixels() <= job.predictions.pixels();
    STD_TORCH_CHECK(rule >= ReadRule::kSame && rule <= ReadRule::kFlat && fits,
                    "expected predictions that a map of ", job.out.height, "x", job.out.width,
                    " can read by rule ", static_cast<int>(rule), ", got ", job.predictions.height,
                    "x", job.predictions.width);
  }
  STD_TORCH_CHECK(job.stride_h > 0 && job.stride_w > 0 && job.first_term >= 0 && job.terms > 0 &&
                      job.first_term + job.terms <= static_cast<int64_t>(tables.terms.size()) &&
                      job.up_height > 0 && job.up_width > 0,
                  "expected a job of positive strides and sizes with terms in the list of ",
                  tables.terms.size());
}

}  // namespace detail

inline DeformTables read_deform_tables(const Tensor& source, const Tensor& predictions,
                                       const Tensor& weights, const IntList& geometry,
                                       const IntList& sources, const IntList& terms,
                                       const IntList& jobs, bool mask_logits) {
  constexpr size_t kJobFields = 14;
  constexpr int64_t kMostRows = int64_t{1} << 40;  // of the output: 1 TiB of single bytes
  STD_TORCH_CHECK(geometry.size() == 9 && sources.size() % 3 == 0 && terms.size() % 2 == 0 &&
                      !jobs.empty() && jobs.size() % kJobFields == 0,
                  "expected tables of 9, 3 n, 2 n and 14 n integers, got ", geometry.size(), ", ",
                  sources.size(), ", ", terms.size(), " and ", jobs.size());
  STD_TORCH_CHECK(
      source.dim() == 2 && predictions.dim() == 2 && weights.dim() == 5,
      "expected source [R, C], predictions [Q, 3 D K] and weights [W, C_out, C / groups,"
      " kh, kw], got ",
      shape_string(source), ", ", shape_string(predictions), " and ", shape_string(weights));
  DeformTables t{};
  const int64_t images = geometry[0];
  t.shape = {images,
             source.size(1),
             weights.size(1),
             static_cast<int32_t>(geometry[1]),
             static_cast<int32_t>(geometry[2]),
             static_cast<int32_t>(geometry[3]),
             static_cast<int32_t>(geometry[4]),
             static_cast<int32_t>(geometry[5]),
             static_cast<int32_t>(geometry[6]),
             static_cast<int32_t>(geometry[7]),
             static_cast<int32_t>(geometry[8]),
             mask_logits,
             dtype_of(source)};
  const DeformShape& s = t.shape;
  STD_TORCH_CHECK(images >= 0 && s.channels > 0 && s.groups > 0 && s.deform_groups > 0 &&
                      s.channels % s.groups == 0 && s.out_channels % s.groups == 0 &&
                      s.channels % s.deform_groups == 0 && s.taps() > 0,
                  "expected channels divisible by the groups, got ", s.channels, " and ",
                  s.out_channels, " channels with ", s.groups, " and ", s.deform_groups, " groups");
  t.source_rows = source.size(0);
  t.prediction_rows = predictions.size(0);
  t.weights = weights.size(0);
  const ScalarType compute = compute_type_of(source);
  check_tensor("source", source, {t.source_rows, s.channels}, source.scalar_type(), source);
  check_tensor("predictions", predictions, {t.prediction_rows, s.prediction_columns()}, compute,
               source);
  check_tensor("weights", weights,
               {t.weights, s.out_channels, s.channels / s.groups, s.kernel_h, s.kernel_w}, compute,
               source);
  int64_t covered = 0;
  for (size_t i = 0; i < sources.size(); i += 3) {
    const MapShape map = detail::read_map(sources, i, images, t.source_rows, "source");
    // Without gaps and overlaps, so that every row gets its gradient from one map.
    STD_TORCH_CHECK(map.first_row == covered, "expected source maps without gaps, got first row ",
                    map.first_row, " where ", covered, " follows");
    covered += images * map.pixels();
    t.sources.push_back(map);
  }
  STD_TORCH_CHECK(covered == t.source_rows, "expected source maps that cover all ", t.source_rows,
                  " rows, got ", covered);
  for (size_t i = 0; i < terms.size(); i += 2) {
    STD_TORCH_CHECK(terms[i] >= 0 && terms[i] < static_cast<int64_t>(t.sources.size()) &&
                        terms[i + 1] >= 0 && terms[i + 1] < t.weights,
                    "expected terms of ", t.sources.size(), " sources and ", t.weights,
                    " weights, got source ", terms[i], " and weight ", terms[i + 1]);
    t.terms.push_back({static_cast<int32_t>(terms[i]), static_cast<int32_t>(terms[i + 1])});
  }
  for (size_t i = 0; i < jobs.size(); i += kJobFields) {
    DeformJob job{};
    // Output maps lie one after the other, so that every row is written.
    STD_TORCH_CHECK(jobs[i] == t.out_rows, "expected output maps without gaps, got first row ",
                    jobs[i], " where ", t.out_rows, " follows");
    job.out = detail::read_map(jobs, i, images, kMostRows, "output");
    t.out_rows += images * job.out.pixels();
    job.predictions = detail::read_map(jobs, i + 3, images, t.prediction_rows, "prediction");
    job.offset_rule = static_cast<ReadRule>(jobs[i + 6]);
    job.mask_rule = static_cast<ReadRule>(jobs[i + 7]);
    job.stride_h = static_cast<int32_t>(jobs[i + 8]);
    job.stride_w = static_cast<int32_t>(jobs[i + 9]);
    job.first_term = static_cast<int32_t>(jobs[i + 10]);
    job.terms = static_cast<int32_t>(jobs[i + 11]);
    job.up_height = static_cast<int32_t>(jobs[i + 12]);
    job.up_width = static_cast<int32_t>(jobs[i + 13]);
    detail::check_job(job, t);
    t.jobs.push_back(job);
  }
  return t;
}

// null for an absent tensor, else its data after a check of its shape.
inline const void* optional_data(const char* name, const std::optional<Tensor>& t,
                                 std::initializer_list<int64_t> sizes, const Tensor& like) {
  if (!t.has_value()) return nullptr;
  check_tensor(name, *t, sizes, compute_type_of(like), like);
  return t->const_data_ptr();
}

}  // namespace dyhead
