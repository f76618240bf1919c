// Reads the job tables of deform_conv from lists of integers, checks every index in them, and
// allocates results; what both libraries do alike.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "maps.h"

namespace dyhead {

// The tables as dyhead_cuda/ops/deform_conv.py writes them:
//   geometry  images, groups, deform_groups, kernel_h, kernel_w, pad_h, pad_w, dilation_h,
//   dilation_w sources   first_row, height, width of each source map terms     source, weight of
//   each term jobs      first_row, height, width of the output map; the same of the prediction map;
//             offset_rule, mask_rule, stride_h, stride_w, first_term, terms, up_height, up_width

namespace detail {

inline void check_rule(const DeformJob& job, ReadRule rule) {
  const MapShape& out = job.out;
  const MapShape& from = job.predictions;
  bool fits = false;
  switch (rule) {
    case ReadRule::kSame:
      fits = out.height == from.height && out.width == from.width;
      break;
    case ReadRule::kCrop:
      fits = out.height <= from.height && out.width <= from.width;
      break;
    case ReadRule::kFlat:
      fits = out.pixels() <= from.pixels();
      break;
    case ReadRule::kNone:
      fits = job.offset_rule == job.mask_rule;
      break;
  }
  STD_TORCH_CHECK(fits, "expected predictions that a map of ", out.height, "x", out.width,
                  " can read by rule ", static_cast<int>(rule), ", got ", from.height, "x",
                  from.width);
}

// Jobs either share a prediction map or read others: the gradients of a map are one task's.
inline void check_disjoint_predictions(const DeformTables& t) {
  std::vector<MapShape> maps;
  for (const DeformJob& job : t.jobs) {
    if (job.predictions.pixels() > 0) maps.push_back(job.predictions);
  }
  std::sort(maps.begin(), maps.end(),
            [](const MapShape& a, const MapShape& b) { return a.first_row < b.first_row; });
  for (size_t i = 1; i < maps.size(); ++i) {
    const MapShape& a = maps[i - 1];
    const MapShape& b = maps[i];
    const bool same = a.first_row == b.first_row && a.height == b.height && a.width == b.width;
    STD_TORCH_CHECK(same || a.first_row + t.shape.images * a.pixels() <= b.first_row,
                    "expected prediction maps that are equal or apart, got maps from rows ",
                    a.first_row, " and ", b.first_row);
  }
}

}  // namespace detail

inline DeformTables read_deform_tables(const Tensor& source, const Tensor& predictions,
                                       const Tensor& weights, const IntList& geometry,
                                       const IntList& sources, const IntList& terms,
                                       const IntList& jobs, bool mask_logits) {
  constexpr size_t kJobFields = 14;
  STD_TORCH_CHECK(geometry.size() == 9 && sources.size() % 3 == 0 && terms.size() % 2 == 0 &&
                      !jobs.empty() && jobs.size() % kJobFields == 0,
                  "expected tables of 9, 3 n, 2 n and 14 n integers, got ", geometry.size(), ", ",
                  sources.size(), ", ", terms.size(), " and ", jobs.size());
  STD_TORCH_CHECK(
      source.dim() == 2 && predictions.dim() == 2 && weights.dim() == 5,
      "expected source [R, C], predictions [Q, 3 D K] and weights [W, C_out, C / groups,"
      " kh, kw], got ",
      shape_string(source), ", ", shape_string(predictions), " and ", shape_string(weights));
  constexpr int64_t kMostStep = 1 << 20;  // strides, paddings and dilations: products fit
  DeformTables t{};
  const int64_t images = narrow("images", geometry[0], 0);
  t.shape = {images,
             source.size(1),
             weights.size(1),
             narrow("groups", geometry[1], 1),
             narrow("deform_groups", geometry[2], 1),
             narrow("kernel_h", geometry[3], 1, 1 << 10),
             narrow("kernel_w", geometry[4], 1, 1 << 10),
             narrow("pad_h", geometry[5], 0, kMostStep),
             narrow("pad_w", geometry[6], 0, kMostStep),
             narrow("dilation_h", geometry[7], 1, kMostStep),
             narrow("dilation_w", geometry[8], 1, kMostStep),
             mask_logits,
             dtype_of(source)};
  const DeformShape& s = t.shape;
  STD_TORCH_CHECK(s.channels > 0 && s.out_channels > 0 && s.channels % s.groups == 0 &&
                      s.out_channels % s.groups == 0 && s.channels % s.deform_groups == 0,
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
    // Without gaps and overlaps, so that every row gets its gradient from one map.
    const MapShape map = read_next_map(sources, i, images, covered, t.source_rows, "source");
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
  const int64_t most_rows = std::numeric_limits<int64_t>::max() / 8 / s.out_channels;
  for (size_t i = 0; i < jobs.size(); i += kJobFields) {
    DeformJob job{};
    job.out = read_next_map(jobs, i, images, t.out_rows, most_rows, "output");
    t.out_rows += images * job.out.pixels();
    job.predictions = read_map(jobs, i + 3, images, t.prediction_rows, "prediction");
    job.offset_rule = static_cast<ReadRule>(narrow("offset_rule", jobs[i + 6], 0, 3));
    job.mask_rule = static_cast<ReadRule>(narrow("mask_rule", jobs[i + 7], 0, 3));
    job.stride_h = narrow("stride_h", jobs[i + 8], 1, kMostStep);
    job.stride_w = narrow("stride_w", jobs[i + 9], 1, kMostStep);
    job.first_term = narrow("first_term", jobs[i + 10], 0);
    job.terms = narrow("terms", jobs[i + 11], 1);
    job.up_height = narrow("up_height", jobs[i + 12], 1, kMostStep);
    job.up_width = narrow("up_width", jobs[i + 13], 1, kMostStep);
    STD_TORCH_CHECK(
        static_cast<int64_t>(job.first_term) + job.terms <= static_cast<int64_t>(t.terms.size()),
        "expected terms within the list of ", t.terms.size(), ", got ", job.terms, " from ",
        job.first_term);
    detail::check_rule(job, job.offset_rule);
    detail::check_rule(job, job.mask_rule);
    t.jobs.push_back(job);
  }
  detail::check_disjoint_predictions(t);
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
