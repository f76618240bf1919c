// Backward of any list of deformable jobs, in passes whose tasks own what they write:
//
//   input        a task per (source map, image, slice of channels): grad columns = grad_out . W^T
//   for
//                the slice, consumed at once: scattered into the slice of the input's gradient, and
//                reduced with the corners to the derivatives of each sample
//   predictions  a task per (prediction map, image): adds the slices' derivatives up
//   weights      a task per (weight matrix, tap, slice of channels): samples its columns again
//   bias         a task per chunk, then a sum in order
//
// Where several calls have one source, all but the last leave the gradient of the input as sums in
// the compute type.
#include <cstring>
#include <memory>

#include "deform_conv.h"

#include "context.h"

namespace dyhead::cpu {
namespace {

constexpr int64_t kInputSlice = 64;             // channels; more would leave too few tasks
constexpr int64_t kWeightSlice = 256;           // channels; the accumulator then fits the L2 cache
constexpr int64_t kDerivativeBytes = 24 << 20;  // of the slices' derivatives held at a time

// Channels [first, first + count) of the input, all in one group and one deformable group.
struct Slice {
  int64_t first, count;
  int32_t group, deform_group;
};

std::vector<Slice> make_slices(const DeformShape& s, int64_t most) {
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

// Where a call's gradient of the input goes: it adds to the sums of the calls before it, if any,
// and leaves sums for those after it, or is the last one and rounds.
template <class F>
struct Chain {
  F* sums;  // [R, C], or null for a call alone
  bool first, last;
};

template <class T>
class Backward {
  using F = compute_t<T>;

 public:
  Backward(const DeformBwdParams& p, const Chain<F>& chain)
      : p_(p),
        chain_(chain),
        s_(p.call->shape),
        tables_(*p.call),
        kernels_(deform_kernels<T>()),
        gemm_(kernels_.gemm),
        group_outputs_(s_.out_channels / s_.groups),
        input_slices_(make_slices(s_, kInputSlice)),
        weight_slices_(make_slices(s_, kWeightSlice)) {
    if (s_.images == 0) return;  // sizes then have no bound
    for (int32_t j = 0; j < static_cast<int32_t>(tables_.jobs.size()); ++j) {
      const DeformJob& job = tables_.jobs[j];
      for (int32_t t = job.first_term; t < job.first_term + job.terms; ++t) {
        if (job.out.pixels() == 0) break;
        uses_.push_back({j, t, use_rows_});
        use_rows_ += job.out.pixels();
      }
      if (p.moments) up_weights_.emplace_back(job);
    }
  }

  void run() {
    if (needs_samples()) run_samples();
    if (p_.grad_weights != nullptr) weight_pass();
    if (p_.grad_bias != nullptr) bias_pass();
  }

 private:
  // Whether what each sample adds to predictions and gates is wanted.
  bool needs_derivatives() const {
    return p_.grad_predictions != nullptr || p_.grad_gates != nullptr;
  }

  bool needs_samples() const { return p_.grad_source != nullptr || needs_derivatives(); }

  // The gradients that follow from those of the samples, a few images at a time.
  void run_samples() {
    pack_weights();
    const int64_t slices = static_cast<int64_t>(input_slices_.size());
    const int64_t image_bytes =
        slices * use_rows_ * s_.taps() * 3 * static_cast<int64_t>(sizeof(F));
    const int64_t together =
        std::max<int64_t>(1, kDerivativeBytes / std::max<int64_t>(image_bytes, 1));
    if (p_.grad_predictions != nullptr) {
      std::fill_n(static_cast<F*>(p_.grad_predictions),
                  tables_.prediction_rows * s_.prediction_columns(), F(0));
    }
    if (p_.grad_gates != nullptr) {
      std::fill_n(static_cast<F*>(p_.grad_gates), s_.images * tables_.sources.size(), F(0));
    }
    if (uses_.empty() && p_.grad_source != nullptr) {
      const std::vector<F> none(s_.channels, F(0));
      for (int64_t r = 0; r < tables_.source_rows; ++r) {
        add_to_source(r * s_.channels, none.data(), s_.channels);
      }
    }
    for (int64_t first = 0; !uses_.empty() && first < s_.images; first += together) {
      const int64_t images = std::min(together, s_.images - first);
      if (needs_derivatives()) derivatives_.resize(images * slices * use_rows_ * s_.taps() * 3);
      input_pass(first, images);
      if (needs_derivatives()) prediction_pass(first, images);
    }
    derivatives_ = {};
    packed_ = {};
  }

  struct Scratch {
    explicit Scratch(const Backward& b, int64_t width)
        : corners(kChunkRows),
          points(kChunkRows),
          grad(kChunkRows * b.s_.out_channels),
          columns(kChunkRows * width) {}
    std::vector<Corners<F>> corners;
    std::vector<SamplePoint<F>> points;
    std::vector<F> grad;     // [rows, C_out]
    std::vector<F> columns;  // [rows, width]
    std::vector<F> more;     // what one pass needs beside
  };

  // The chunk's gradient of y, the moments' included; rows beyond the chunk's are left as they are.
  void load_grad(const DeformChunk& chunk, std::vector<F>& grad) const {
    const DeformJob& job = tables_.jobs[chunk.job];
    const int64_t channels = s_.out_channels;
    const int64_t start = chunk.out_row(job) * channels;
    const int64_t count = chunk.rows * channels;
    if (p_.out_in_compute_dtype) {
      const F* from = static_cast<const F*>(p_.grad_out) + start;
      std::copy(from, from + count, grad.begin());
    } else {
      const T* from = static_cast<const T*>(p_.grad_out) + start;
      for (int64_t i = 0; i < count; ++i) grad[i] = to_compute(from[i]);
    }
    if (!p_.moments) return;
    const int64_t at = (chunk.job * s_.images + chunk.image) * channels;
    const T* y = static_cast<const T*>(p_.out) + start;
    const F* mean = static_cast<const F*>(p_.mean) + at;
    const F* grad_mean = static_cast<const F*>(p_.grad_mean) + at;
    const F* grad_var = static_cast<const F*>(p_.grad_var) + at;
    const F* grad_up = static_cast<const F*>(p_.grad_up_mean) + at;
    const F share = F(1) / static_cast<F>(job.out.pixels());
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const F up = up_weights_[chunk.job].at(chunk.first + r);
      for (int64_t c = 0; c < channels; ++c) {
        const F centred = to_compute(y[r * channels + c]) - mean[c];
        grad[r * channels + c] +=
            share * (grad_mean[c] + F(2) * centred * grad_var[c]) + up * grad_up[c];
      }
    }
  }

  TapSampler<F> sampler(const Use& use, int64_t image) const {
    return tap_sampler(tables_, tables_.jobs[use.job], tables_.terms[use.term],
                       static_cast<const F*>(p_.predictions), static_cast<const F*>(p_.gates),
                       image);
  }

  const T* source_of(const MapShape& map, int64_t image) const {
    return static_cast<const T*>(p_.source) + (map.first_row + image * map.pixels()) * s_.channels;
  }

  int64_t slice_cols(const Slice& slice) const { return round_up(slice.count, gemm_.tile_cols); }

  // W^T of each slice: [weight][slice][tap][panel of channels][C_out / groups][tile_cols].
  void pack_weights() {
    const int64_t channels = s_.channels / s_.groups;
    const int64_t taps = s_.taps();
    slice_offsets_.assign(1, 0);
    for (const Slice& slice : input_slices_) {
      slice_offsets_.push_back(slice_offsets_.back() + taps * group_outputs_ * slice_cols(slice));
    }
    packed_.assign(tables_.weights * slice_offsets_.back(), F(0));
    const int64_t slices = static_cast<int64_t>(input_slices_.size());
    parallel_for_each(tables_.weights * slices, [&](int64_t task) {
      const Slice& slice = input_slices_[task % slices];
      F* to =
          packed_.data() + task / slices * slice_offsets_.back() + slice_offsets_[task % slices];
      const F* from = static_cast<const F*>(p_.weights->matrices[task / slices]) +
                      slice.group * group_outputs_ * channels * taps +
                      (slice.first - slice.group * channels) * taps;
      for (int64_t o = 0; o < group_outputs_; ++o) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          for (int64_t c = 0; c < slice.count; ++c) {
            const int64_t panel = c / gemm_.tile_cols;
            const int64_t at = (panel * group_outputs_ + o) * gemm_.tile_cols + c % gemm_.tile_cols;
            to[tap * group_outputs_ * slice_cols(slice) + at] =
                from[(o * channels + c) * taps + tap];
          }
        }
      }
    });
  }

  F* derivatives(int64_t image, int64_t slice, int64_t row) {
    const int64_t slices = static_cast<int64_t>(input_slices_.size());
    return derivatives_.data() + ((image * slices + slice) * use_rows_ + row) * s_.taps() * 3;
  }

  void input_pass(int64_t first_image, int64_t images) {
    const int64_t slices = static_cast<int64_t>(input_slices_.size());
    const int64_t sources = static_cast<int64_t>(tables_.sources.size());
    parallel_tasks(
        images * sources * slices,
        [&] { return Scratch(*this, round_up(kInputSlice, gemm_.tile_cols)); },
        [&](int64_t task, Scratch& scratch) {
          // Maps come finest first, so the largest tasks do.
          const int32_t source = static_cast<int32_t>(task / (images * slices));
          const int64_t image = task / slices % images;
          const int64_t slice_index = task % slices;
          const Slice& slice = input_slices_[slice_index];
          const MapShape& map = tables_.sources[source];
          std::vector<F>& grad_source = scratch.more;
          grad_source.assign(map.pixels() * slice.count, F(0));
          for (const Use& use : uses_) {
            if (tables_.terms[use.term].source != source) continue;
            const int64_t pixels = tables_.jobs[use.job].out.pixels();
            for (int64_t first = 0; first < pixels; first += kChunkRows) {
              const DeformChunk chunk{use.job, first_image + image, first,
                                      std::min<int64_t>(kChunkRows, pixels - first)};
              F* to = nullptr;
              if (needs_derivatives()) to = derivatives(image, slice_index, use.first_row + first);
              input_chunk(use, chunk, slice_index, to, scratch, grad_source.data());
            }
          }
          if (p_.grad_source == nullptr) return;
          const int64_t row = map.first_row + (first_image + image) * map.pixels();
          for (int64_t p = 0; p < map.pixels(); ++p) {
            add_to_source((row + p) * s_.channels + slice.first,
                          grad_source.data() + p * slice.count, slice.count);
          }
        });
  }

  // `values`: all that this call gives to `count` values of the input's gradient, from `at` on.
  void add_to_source(int64_t at, const F* values, int64_t count) const {
    const Chain<F> chain = chain_;  // a copy, which no store to memory can change
    T* to = static_cast<T*>(p_.grad_source);
    for (int64_t i = at; i < at + count; ++i) {
      const F sum = chain.first ? values[i - at] : chain.sums[i] + values[i - at];
      if (chain.last) {
        to[i] = from_compute<T>(sum);
      } else {
        chain.sums[i] = sum;
      }
    }
  }

  // `derivatives` may be null.
  void input_chunk(const Use& use, const DeformChunk& chunk, int64_t slice_index, F* derivatives,
                   Scratch& scratch, F* grad_source) const {
    const Slice& slice = input_slices_[slice_index];
    const DeformTerm& term = tables_.terms[use.term];
    const MapShape& map = tables_.sources[term.source];
    const TapSampler<F> taps = sampler(use, chunk.image);
    const T* source = source_of(map, chunk.image) + slice.first;
    const int64_t padded = round_up(chunk.rows, gemm_.tile_rows);
    const int64_t cols = slice_cols(slice);
    const F* weights =
        packed_.data() + term.weight * slice_offsets_.back() + slice_offsets_[slice_index];
    load_grad(chunk, scratch.grad);
    F dots[kChunkRows][4];
    for (int32_t tap = 0; tap < s_.taps(); ++tap) {
      std::fill(scratch.columns.begin(), scratch.columns.begin() + padded * cols, F(0));
      gemm_.run(scratch.grad.data() + slice.group * group_outputs_, s_.out_channels, 1,
                weights + tap * group_outputs_ * cols, scratch.columns.data(), cols, padded, cols,
                group_outputs_);
      sample_rows(taps, slice.deform_group, tap, chunk.first, chunk.rows, scratch.corners.data(),
                  scratch.points.data());
      kernels_.project_back(source, s_.channels, slice.count, scratch.corners.data(), chunk.rows,
                            scratch.columns.data(), cols, grad_source, dots);
      if (derivatives == nullptr) continue;
      for (int64_t r = 0; r < chunk.rows; ++r) {
        const SamplePoint<F>& point = scratch.points[r];
        F* d = derivatives + (r * s_.taps() + tap) * 3;
        d[0] = sample_value(point, dots[r]);
        d[1] = sample_slope_y(point, dots[r]);
        d[2] = sample_slope_x(point, dots[r]);
      }
    }
  }

  // Jobs that read one prediction map are handled by one task, in order.
  void prediction_pass(int64_t first_image, int64_t images) {
    std::vector<int64_t> maps;
    for (const DeformJob& job : tables_.jobs) {
      if (job.plain() && p_.grad_gates == nullptr) continue;
      if (std::find(maps.begin(), maps.end(), job.predictions.first_row) == maps.end()) {
        maps.push_back(job.predictions.first_row);
      }
    }
    const int64_t sources = static_cast<int64_t>(tables_.sources.size());
    std::vector<F> grad_gates(maps.size() * images * sources, F(0));
    parallel_for_each(static_cast<int64_t>(maps.size()) * images, [&](int64_t task) {
      const int64_t image = task % images;
      for (const Use& use : uses_) {
        if (tables_.jobs[use.job].predictions.first_row != maps[task / images]) continue;
        add_predictions(use, first_image + image, image,
                        grad_gates[task * sources + tables_.terms[use.term].source]);
      }
    });
    if (p_.grad_gates == nullptr) return;
    auto* out = static_cast<F*>(p_.grad_gates);
    for (size_t map = 0; map < maps.size(); ++map) {
      for (int64_t i = 0; i < images * sources; ++i) {
        out[first_image * sources + i] += grad_gates[map * images * sources + i];
      }
    }
  }

  void add_predictions(const Use& use, int64_t image, int64_t local_image, F& grad_gate) {
    const DeformJob& job = tables_.jobs[use.job];
    const TapSampler<F> taps = sampler(use, image);
    const int64_t row = job.predictions.first_row + image * job.predictions.pixels();
    F* grad = nullptr;
    if (p_.grad_predictions != nullptr) {
      grad = static_cast<F*>(p_.grad_predictions) + row * s_.prediction_columns();
    }
    for (int32_t p = 0; p < static_cast<int32_t>(job.out.pixels()); ++p) {
      const OutputPixel pixel = output_pixel(job, p);
      for (int32_t d = 0; d < s_.deform_groups; ++d) {
        for (int32_t tap = 0; tap < s_.taps(); ++tap) {
          F value = F(0), slope_y = F(0), slope_x = F(0);
          for (size_t i = 0; i < input_slices_.size(); ++i) {
            if (input_slices_[i].deform_group != d) continue;
            const F* part =
                derivatives(local_image, static_cast<int64_t>(i), use.first_row + p) + tap * 3;
            value += part[0];
            slope_y += part[1];
            slope_x += part[2];
          }
          F mask;
          const F modulation = taps.modulation(d, tap, pixel, &mask);
          grad_gate += value * mask;
          if (job.plain() || p_.grad_predictions == nullptr) continue;
          const int32_t k = d * s_.taps() + tap;
          const auto add = [&](ReadRule rule, int32_t column, int32_t value_index, F change) {
            grad[prediction_index(s_, job, rule, column, value_index, pixel)] += change;
          };
          add(job.offset_rule, 0, 2 * k, modulation * slope_y);
          add(job.offset_rule, 0, 2 * k + 1, modulation * slope_x);
          const F slope = s_.mask_logits ? mask * (F(1) - mask) : F(1);
          add(job.mask_rule, s_.offset_columns(), k, value * taps.gate * slope);
        }
      }
    }
  }

  void weight_pass() {
    const int64_t slices = static_cast<int64_t>(weight_slices_.size());
    const int64_t taps = s_.taps();
    const int64_t cols = round_up(group_outputs_, gemm_.tile_cols);
    const int64_t most = std::min(kWeightSlice, s_.channels);
    // One vector more than a multiple of the cache's sets, so that a column's rows do not collide.
    const int64_t width = round_up(most, gemm_.tile_rows) + 16;
    const int64_t channels = s_.channels / s_.groups;
    parallel_tasks(
        tables_.weights * taps * slices,
        [&] {
          Scratch scratch(*this, width);
          scratch.more.resize(kChunkRows * cols + round_up(most, gemm_.tile_rows) * cols);
          return scratch;
        },
        [&](int64_t task, Scratch& scratch) {
          const int32_t weight = static_cast<int32_t>(task / (taps * slices));
          const int32_t tap = static_cast<int32_t>(task / slices % taps);
          const Slice& slice = weight_slices_[task % slices];
          const int64_t rows = round_up(slice.count, gemm_.tile_rows);
          F* packed = scratch.more.data();
          F* sum = packed + kChunkRows * cols;
          std::fill(sum, sum + rows * cols, F(0));
          for (const Use& use : uses_) {
            if (tables_.terms[use.term].weight != weight) continue;
            const MapShape& map = tables_.sources[tables_.terms[use.term].source];
            const int64_t pixels = tables_.jobs[use.job].out.pixels();
            for (int64_t image = 0; image < s_.images; ++image) {
              const TapSampler<F> at = sampler(use, image);
              for (int64_t first = 0; first < pixels; first += kChunkRows) {
                const DeformChunk chunk{use.job, image, first,
                                        std::min<int64_t>(kChunkRows, pixels - first)};
                load_grad(chunk, scratch.grad);
                pack_grad(scratch.grad.data() + slice.group * group_outputs_, chunk.rows, packed);
                sample_rows(at, slice.deform_group, tap, first, chunk.rows, scratch.corners.data());
                kernels_.blend_compute(source_of(map, image) + slice.first, s_.channels,
                                       slice.count, scratch.corners.data(), chunk.rows,
                                       scratch.columns.data(), width);
                gemm_.run(scratch.columns.data(), 1, width, packed, sum, cols, rows, cols,
                          chunk.rows);
              }
            }
          }
          F* out = static_cast<F*>(p_.grad_weights) +
                   (weight * s_.out_channels + slice.group * group_outputs_) * channels * taps +
                   (slice.first - slice.group * channels) * taps + tap;
          for (int64_t o = 0; o < group_outputs_; ++o) {
            for (int64_t c = 0; c < slice.count; ++c) {
              out[(o * channels + c) * taps] = sum[c * cols + o];
            }
          }
        });
  }

  // A group's columns of the gradient as panels [panel][rows][tile_cols]; a panel's tail is never
  // stored, so it may hold anything finite.
  void pack_grad(const F* grad, int64_t rows, F* packed) const {
    for (int64_t o = 0; o < group_outputs_; o += gemm_.tile_cols) {
      const int64_t count = std::min<int64_t>(gemm_.tile_cols, group_outputs_ - o);
      for (int64_t r = 0; r < rows; ++r) {
        F* to = packed + (o * rows + r * gemm_.tile_cols);
        std::memcpy(to, grad + r * s_.out_channels + o, count * sizeof(F));
      }
    }
  }

  void bias_pass() {
    const std::vector<DeformChunk> chunks = deform_chunks(tables_, s_.images);
    const int64_t channels = s_.out_channels;
    std::vector<F> sums(chunks.size() * channels, F(0));
    parallel_tasks(
        static_cast<int64_t>(chunks.size()), [&] { return Scratch(*this, 0); },
        [&](int64_t i, Scratch& scratch) {
          load_grad(chunks[i], scratch.grad);
          F* sum = sums.data() + i * channels;
          for (int64_t r = 0; r < chunks[i].rows; ++r) {
            for (int64_t c = 0; c < channels; ++c) sum[c] += scratch.grad[r * channels + c];
          }
        });
    auto* out = static_cast<F*>(p_.grad_bias);
    std::fill(out, out + tables_.weights * channels, F(0));
    for (size_t i = 0; i < chunks.size(); ++i) {
      const DeformJob& job = tables_.jobs[chunks[i].job];
      F* to = out + tables_.terms[job.first_term].weight * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] += sums[i * channels + c];
    }
  }

  const DeformBwdParams& p_;
  const Chain<F> chain_;
  const DeformShape& s_;
  const DeformCall& tables_;
  const DeformKernels<T>& kernels_;
  const GemmKernel<F>& gemm_;
  int64_t group_outputs_;
  std::vector<Slice> input_slices_, weight_slices_;
  std::vector<Use> uses_;
  int64_t use_rows_ = 0;
  std::vector<UpsampledMeanWeights<F>> up_weights_;
  std::vector<int64_t> slice_offsets_;
  std::vector<F> packed_, derivatives_;
};

template <class T>
void run_calls(std::span<const DeformBwdParams> calls) {
  using F = compute_t<T>;
  const DeformBwdParams& one = calls.front();
  std::unique_ptr<F[]> memory;
  F* sums = nullptr;
  if (calls.size() > 1 && one.grad_source != nullptr) {
    if constexpr (std::is_same_v<T, F>) {
      sums = static_cast<F*>(one.grad_source);
    } else {
      const int64_t values = one.call->source_rows * one.call->shape.channels;
      memory = std::make_unique_for_overwrite<F[]>(values);
      sums = memory.get();
    }
  }
  for (size_t i = 0; i < calls.size(); ++i) {
    Backward<T>(calls[i], {sums, i == 0, i + 1 == calls.size()}).run();
  }
}

}  // namespace
}  // namespace dyhead::cpu

namespace dyhead {

void run_deform_conv_bwd(std::span<const DeformBwdParams> calls, Context&) {
  dispatch_dtype(calls.front().call->shape.dtype,
                 [&](auto zero) { cpu::run_calls<decltype(zero)>(calls); });
}

}  // namespace dyhead
