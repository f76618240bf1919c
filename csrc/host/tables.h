// The integer tables in which operators get their sizes and jobs, field by field. Sizes of maps are
// tables of their own: they may be symbolic where a compiler traces, everything else is constant.
// dyhead_cuda/ops/jobs.py writes them, and compares these names with its own when it is imported:
// a library that reads other tables is not used.
#pragma once

#include <cstddef>

#include "../common/deform_jobs.h"
#include "../common/fuse_branches.h"

namespace dyhead {

// clang-format off
#define DYHEAD_SIZE_FIELDS(X) \
  X(height) X(width)
#define DYHEAD_GEOMETRY_FIELDS(X) \
  X(groups) X(deform_groups) X(kernel_h) X(kernel_w) \
  X(pad_h) X(pad_w) X(dilation_h) X(dilation_w)
#define DYHEAD_TERM_FIELDS(X) \
  X(source) X(weight)
#define DYHEAD_JOB_FIELDS(X) \
  X(predictions) X(offset_rule) X(mask_rule) X(stride_h) X(stride_w) X(first_term) X(terms) \
  X(up_mode)
#define DYHEAD_LEVEL_FIELDS(X) \
  X(branch_0) X(branch_1) X(branch_2)
// clang-format on

#define DYHEAD_ENUMERATOR(name) name,
#define DYHEAD_FIELDS(name, list)                        \
  namespace name {                                       \
  enum : size_t { list(DYHEAD_ENUMERATOR) kFieldCount }; \
  }

DYHEAD_FIELDS(size_field, DYHEAD_SIZE_FIELDS)
DYHEAD_FIELDS(geometry_field, DYHEAD_GEOMETRY_FIELDS)
DYHEAD_FIELDS(term_field, DYHEAD_TERM_FIELDS)
DYHEAD_FIELDS(job_field, DYHEAD_JOB_FIELDS)
DYHEAD_FIELDS(level_field, DYHEAD_LEVEL_FIELDS)

static_assert(level_field::kFieldCount == kMaxBranches);

}  // namespace dyhead
