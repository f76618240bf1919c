// The arguments of a deform_conv call, forward and backward, and where its taps read; shared by the
// CPU and the CUDA kernels.
#pragma once

#include <span>
#include <vector>

#include "deform_jobs.h"
#include "sampling.h"

namespace dyhead {

class Context;

// The weight matrices [C_out, C / groups, kh, kw], and a bias [C_out] for each or no biases.
struct DeformWeights {
  std::vector<const void*> matrices, bias;
  DType dtype;  // of all of them: the compute type or, on CUDA, the source's
};

struct DeformFwdParams {
  const DeformCall* call;
  const DeformWeights* weights;  // a job adds the bias of its first term
  const void* source;            // [R, C]
  const void* predictions;       // [Q, 3 D K]
  const void* gates;             // [N, sources] or null: each scales a source map
  void* out;                     // [S, C_out]
  bool out_in_compute_dtype;     // out has the compute type
  bool moments;                  // whether to compute the next three, [J, N, C_out] each
  void* mean;
  void* var;        // biased
  void* up_mean;    // the mean after upsampling
  bool allow_tf32;  // float32 products on CUDA may round their operands to TF32
};

struct DeformBwdParams {
  const DeformCall* call;
  const DeformWeights* weights;
  const void* source;
  const void* predictions;
  const void* gates;
  const void* grad_out;       // [S, C_out]
  bool out_in_compute_dtype;  // grad_out has the compute type
  bool moments;               // whether there are gradients of the moments: the next five
  const void* out;            // [S, C_out]
  const void* mean;           // [J, N, C_out]
  const void* grad_mean;      // [J, N, C_out]
  const void* grad_var;       // [J, N, C_out]
  const void* grad_up_mean;   // [J, N, C_out]
  bool deterministic;         // the same bits in every run, even if that is slower
  // Null where not wanted.
  void* grad_source;       // [R, C]
  void* grad_predictions;  // [Q, 3 D K]
  void* grad_weights;      // [W, C_out, C / groups, kh, kw], of the compute type
  void* grad_bias;         // [W, C_out]
  void* grad_gates;        // [N, sources]
  bool allow_tf32;         // as forward
};

// The kernels of a library; see csrc/host/device.h. Both run calls of one source in turn: those of
// the forward may read what those before them computed, and those of the backward may start from
// such gradients. They have one grad_source, or all of them none: it is the sum of what they give,
// in the compute type, and rounded once.
void run_deform_conv_fwd(std::span<const DeformFwdParams> calls, Context& context);
void run_deform_conv_bwd(std::span<const DeformBwdParams> calls, Context& context);

// The predictions for one tap: its offset, and its mask before the sigmoid.
template <class F>
struct TapValues {
  F dy, dx, mask;
};

// Where the taps of one term of a job read in one image, and with which weights.
template <class F>
struct TapSampler {
  const DeformShape& shape;
  const DeformJob& job;
  const MapShape& source;
  const F* predictions;  // the image's first prediction row
  F gate;

  // Index of value i of a tap's TapValues in `predictions`. Not for plain jobs, which have none.
  DYHEAD_HD int64_t place(int i, int32_t deform_group, int32_t tap, const OutputPixel& at) const {
    const int32_t k = deform_group * shape.taps() + tap;
    if (i == 2) return prediction_index(shape, job, job.mask_rule, shape.offset_columns(), k, at);
    return prediction_index(shape, job, job.offset_rule, 0, 2 * k + i, at);
  }

  DYHEAD_HD F predicted_mask(int32_t deform_group, int32_t tap, const OutputPixel& at) const {
    return job.plain() ? F(1) : predictions[place(2, deform_group, tap, at)];
  }

  DYHEAD_HD TapValues<F> predicted(int32_t deform_group, int32_t tap, const OutputPixel& at) const {
    const F mask = predicted_mask(deform_group, tap, at);
    if (job.plain()) return {F(0), F(0), mask};
    const F dy = predictions[place(0, deform_group, tap, at)];
    const F dx = predictions[place(1, deform_group, tap, at)];
    return {dy, dx, mask};
  }

  // The factor of a sample: mask times gate. If before_gate is not null, the mask alone is stored
  // there.
  DYHEAD_HD F modulation(F predicted_mask, F* before_gate = nullptr) const {
    const bool logit = shape.mask_logits && !job.plain();
    const F mask = logit ? F(1) / (F(1) + std::exp(-predicted_mask)) : predicted_mask;
    if (before_gate != nullptr) *before_gate = mask;
    return mask * gate;
  }

  DYHEAD_HD F modulation(int32_t deform_group, int32_t tap, const OutputPixel& at,
                         F* before_gate = nullptr) const {
    return modulation(predicted_mask(deform_group, tap, at), before_gate);
  }

  DYHEAD_HD SamplePoint<F> point(F dy, F dx, int32_t tap, const OutputPixel& at) const {
    const int32_t y = at.y * job.stride_h - shape.pad_h + tap / shape.kernel_w * shape.dilation_h;
    const int32_t x = at.x * job.stride_w - shape.pad_w + tap % shape.kernel_w * shape.dilation_w;
    if (job.plain()) {
      const bool inside = y >= 0 && y < source.height && x >= 0 && x < source.width;
      if (!inside) return {F(0), F(0), 0, 0, false};
      return {F(0), F(0), y, x, true};
    }
    return locate(y, dy, x, dx, source.height, source.width);
  }

  DYHEAD_HD SamplePoint<F> point(int32_t deform_group, int32_t tap, const OutputPixel& at) const {
    const TapValues<F> v = predicted(deform_group, tap, at);
    return point(v.dy, v.dx, tap, at);
  }

  // The corners of `p`, with the modulation folded into their weights.
  DYHEAD_HD Corners<F> corners(const SamplePoint<F>& p, F predicted_mask) const {
    const F scale = modulation(predicted_mask);
    if (job.plain()) {
      const int32_t pixel = p.inside ? p.top * source.width + p.left : -1;
      return {{scale, F(0), F(0), F(0)}, {pixel, -1, -1, -1}};
    }
    return corners_of(p, source.height, source.width, scale);
  }

  DYHEAD_HD Corners<F> corners(const SamplePoint<F>& p, int32_t deform_group, int32_t tap,
                               const OutputPixel& at) const {
    return corners(p, predicted_mask(deform_group, tap, at));
  }
};

}  // namespace dyhead
