// The integer tables in which operators get their maps and jobs, field by field.
// dyhead_cuda/ops/jobs.py writes them, and compares these names with its own when it is imported:
// a library that reads other tables is not used.
#pragma once

#include <cstddef>

#include "../common/deform_jobs.h"
#include "../common/fuse_branches.h"

namespace dyhead {

// clang-format off
#define DYHEAD_MAP_FIELDS(X) \
  X(first_row) X(height) X(width)
#define DYHEAD_GEOMETRY_FIELDS(X) \
  X(images) X(groups) X(deform_groups) X(kernel_h) X(kernel_w) \
  X(pad_h) X(pad_w) X(dilation_h) X(dilation_w)
#define DYHEAD_TERM_FIELDS(X) \
  X(source) X(weight)
#define DYHEAD_JOB_FIELDS(X) \
  X(out_first_row) X(out_height) X(out_width) \
  X(predictions_first_row) X(predictions_height) X(predictions_width) \
  X(offset_rule) X(mask_rule) X(stride_h) X(stride_w) X(first_term) X(terms) \
  X(up_height) X(up_width) X(up_mode)
#define DYHEAD_LEVEL_FIELDS(X) \
  X(first_row) X(height) X(width) X(branches) X(branch_0) X(branch_1) X(branch_2) X(up_mode)
// clang-format on

#define DYHEAD_ENUMERATOR(name) name,
#define DYHEAD_FIELDS(name, list)                        \
  namespace name {                                       \
  enum : size_t { list(DYHEAD_ENUMERATOR) kFieldCount }; \
  }

DYHEAD_FIELDS(map_field, DYHEAD_MAP_FIELDS)
DYHEAD_FIELDS(geometry_field, DYHEAD_GEOMETRY_FIELDS)
DYHEAD_FIELDS(term_field, DYHEAD_TERM_FIELDS)
DYHEAD_FIELDS(job_field, DYHEAD_JOB_FIELDS)
DYHEAD_FIELDS(level_field, DYHEAD_LEVEL_FIELDS)

static_assert(level_field::up_mode == level_field::branch_0 + kMaxBranches);

}  // namespace dyhead
