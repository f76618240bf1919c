// What the passes of the backward of deformable convolutions share; deform_conv_bwd.cpp lists them.
#pragma once

#include <memory>

#include "deform_conv.h"

namespace dyhead::cpu {

// Channels [first, first + count) of the input, all in one group and one deformable group.
struct Slice {
  int64_t first, count;
  int32_t group, deform_group;
};

inline std::vector<Slice> make_slices(const DeformShape& s, int64_t most) {
  const int64_t group = s.channels / s.groups;
  const int64_t deform_group = s.channels / s.deform_groups;
  std::vector<Slice> slices;
  for (int64_t first = 0; first < s.channels;) {
    const int64_t end = std::min({first + most, (first / group + 1) * group,
                                  (first / deform_group + 1) * deform_group, s.channels});
    slices.push_back({first, end - first, static_cast<int32_t>(first / group),
                      static_cast<int32_t>(first / deform_group)});
    first = end;
  }
  return slices;
}

// One term of one job.
struct Use {
  int32_t job, term;
  int64_t first_row;  // among the rows of all uses of one image
};

// The sums of what several calls give to one source, in the compute type. The first call clears
// them, the last one rounds them to the gradient.
template <class F>
struct SourceSums {
  F* values;  // [R, C], or null where the gradient is not wanted
  bool first, last;
};

// What each sample adds to predictions and gates: its value and its slopes, multiplied with the
// gradient, for each slice of the input's channels, of a few images at a time.
template <class F>
class Derivatives {
 public:
  Derivatives(int64_t images, int64_t slices, int64_t rows, int64_t taps)
      : slices_(slices),
        rows_(rows),
        row_values_(taps * 3),
        values_(std::make_unique_for_overwrite<F[]>(images * slices * rows * row_values_)) {}

  F* at(int64_t image, int64_t slice, int64_t row) const {  // [rows, taps, 3]
    return values_.get() + ((image * slices_ + slice) * rows_ + row) * row_values_;
  }

 private:
  int64_t slices_, rows_, row_values_;
  std::unique_ptr<F[]> values_;
};

template <class T>
struct BackwardCall {
  using F = compute_t<T>;

  explicit BackwardCall(const DeformBwdParams& params);

  // Whether what each sample adds to predictions and gates is wanted.
  bool needs_derivatives() const {
    return p.grad_predictions != nullptr || p.grad_gates != nullptr;
  }

  TapSampler<F> sampler(const Use& use, int64_t image) const {
    return tap_sampler(tables, tables.jobs[use.job], tables.terms[use.term],
                       static_cast<const F*>(p.predictions), static_cast<const F*>(p.gates), image);
  }

  const T* source_of(const MapShape& map, int64_t image) const {
    return static_cast<const T*>(p.source) + (map.first_row + image * map.pixels()) * s.channels;
  }

  // The chunk's gradient of y [rows, grad_stride], the moments' included.
  void load_grad(const DeformChunk& chunk, std::byte* rows) const { load(chunk, paired, rows); }
  // The same in the compute type, whatever the products take: [rows, C_out].
  void load_grad_compute(const DeformChunk& chunk, F* rows) const {
    load(chunk, false, reinterpret_cast<std::byte*>(rows));
  }

  const DeformBwdParams& p;
  const DeformShape& s;
  const DeformCall& tables;
  const DeformKernels<T>& kernels;
  const int64_t group_outputs;
  // Whether the products take gradients, weights and columns in pairs of bfloat16. A pair must not
  // reach across groups; what comes in the compute type, as gradients of predictions do, stays in
  // it.
  const bool paired;
  const int64_t element_bytes;  // of the products' operands
  const int64_t grad_stride;
  std::vector<Use> uses;
  int64_t use_rows = 0;
  std::vector<UpsampledMeanWeights<F>> up_weights;

 private:
  void load(const DeformChunk& chunk, bool pairs, std::byte* rows) const;
};

// Gradients of source, predictions and gates.
template <class T>
void input_pass(const BackwardCall<T>& call, const SourceSums<compute_t<T>>& sums);

// Adds up derivatives of images [first_image, first_image + images).
template <class T>
void prediction_pass(const BackwardCall<T>& call, const std::vector<Slice>& slices,
                     const Derivatives<compute_t<T>>& derivatives, int64_t first_image,
                     int64_t images);

template <class T>
void weight_pass(const BackwardCall<T>& call);

// For each type that a pass is compiled for.
#define DYHEAD_FOR_EACH_TYPE(X) X(double) X(float) X(bfloat16) X(float16)

}  // namespace dyhead::cpu
