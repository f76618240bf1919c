// The kernel of deform_conv's weight gradient; deform_conv_bwd_weights.h describes how it works.
#pragma once

#include "../tile/tile_outer.cuh"
#include "deform_conv_bwd_weights.h"
#include "deform_conv_gather.cuh"

namespace dyhead::cuda {

// Where the samples and gradients of one step are read.
template <class Op>
struct WeightStep {
  using F = typename Operand<Op>::Compute;
  static constexpr int kDepth = Operand<Op>::kDepth;

  int64_t source;          // index in `source` at which the image's map starts
  int64_t grad;            // index in `grad_rows` at which the job's image starts
  int32_t pixels[kDepth];  // index in the job's map, or -1
  StagedSample<F> samples[kWeightCols];
};

template <class Op, int kOuts>
struct WeightsShared {
  static constexpr int kDepth = Operand<Op>::kDepth;
  // A panel of a is allocated whole, even if fewer columns are multiplied.
  static constexpr size_t kA = static_cast<size_t>(kOuts > kDepth ? kOuts : kDepth) * kRowBytes;
  static constexpr size_t kB = static_cast<size_t>(kWeightCols) * kRowBytes;
  static constexpr size_t kBytes = 2 * (kA + kB + sizeof(WeightStep<Op>));
};

// kPlain: samples are pixels of the source, so they are copied, not blended.
template <class Op, int kOuts, bool kVectors, bool kPlain>
class WeightsTile {
 public:
  static_assert(kVectors || !kPlain);
  using T = typename Operand<Op>::Storage;
  using F = typename Operand<Op>::Compute;
  using Shared = WeightsShared<Op, kOuts>;
  using Product = TileOuter<Op, kOuts, kWeightCols>;
  using Step = WeightStep<Op>;
  static constexpr int kDepth = Operand<Op>::kDepth;
  static constexpr int kUnit = Operand<Op>::kUnit;
  static constexpr int kSlots = kWeightCols / kDepth;
  static constexpr uint32_t kOutside = ~0u;

  DYHEAD_DEVICE explicit WeightsTile(const DeformBwdWeightsParams& p)
      : p_(p),
        a_(dynamic_shared<std::byte>(0, 2 * Shared::kA)),
        b_(dynamic_shared<std::byte>(2 * Shared::kA, 2 * Shared::kB)),
        steps_(dynamic_shared<Step>(2 * (Shared::kA + Shared::kB), 2)),
        work_(shared_work()) {
    if (threadIdx.x == 0) find_work();
    __syncthreads();
  }

  DYHEAD_DEVICE void run() {
    for (int i = 0; i < 2 && i < work_.tiles; ++i) {
      locate(start_step(work_.at[i], steps_[i]), work_.at[i], steps_[i]);
    }
    __syncthreads();
    if (threadIdx.x == 0 && work_.tiles > 2) {
      work_.at[0] = work_.at[1];
      advance(work_.at[0]);
    }
    multiply();
    store();
  }

 private:
  // A tile of the pixels of one job, image and term.
  struct Cursor {
    TilePlace place;
    int32_t term;    // index in the launch
    int32_t within;  // index of the tile in the job, over all images
  };

  // In shared memory, since the products need the registers.
  struct Work {
    int32_t matrix;  // index in the call
    int32_t first_out, outs;
    int64_t tiles;  // of this slice
    DeformWeightSlot slots[kSlots];
    int32_t located[kSlots];  // the first slot with the samples of this one
    Cursor at[2];  // the tiles of the next steps: at step i, at[i % 2] is that of step i + 2
  };

  DYHEAD_DEVICE static Work& shared_work() {
    DYHEAD_SHARED(Work, work, 1);
    return work[0];
  }

  DYHEAD_DEVICE void find_work() {
    const DeformShape& s = p_.launch.shape;
    const int32_t blocks = p_.columns.blocks(s);
    const auto block = static_cast<int32_t>(blockIdx.x);
    const int32_t slice = block / blocks;
    const DeformWeightPlace at = weight_place(p_.columns, block % blocks);
    const int32_t group_outputs = static_cast<int32_t>(s.out_channels) / s.groups;
    const int32_t left = group_outputs - at.out_panel * kOuts;
    work_.first_out = at.group * group_outputs + at.out_panel * kOuts;
    work_.outs = left < kOuts ? left : kOuts;
    for (int i = 0; i < kSlots; ++i) {
      const DeformWeightSlot slot =
          weight_slot(s, p_.columns, at.group, at.slot_block * kSlots + i);
      work_.slots[i] = slot;
      int located = i;
      while (located > 0 && slot.count > 0 && work_.slots[located - 1].tap == slot.tap &&
             work_.slots[located - 1].deform_group == slot.deform_group) {
        --located;
      }
      work_.located[i] = located;
    }
    int use = 0;
    while (slice >= p_.slices.first[use + 1]) ++use;
    work_.matrix = p_.slices.matrix[use];
    // Slice i of n has tiles [i T / n, (i + 1) T / n).
    const int64_t tiles = count_matrix_tiles(p_.launch, work_.matrix);
    const int32_t slices = p_.slices.first[use + 1] - p_.slices.first[use];
    const int32_t i = slice - p_.slices.first[use];
    const int64_t first = tiles * i / slices;
    work_.tiles = tiles * (i + 1) / slices - first;
    Cursor cursor{{0, 0, 0}, -1, 0};
    int64_t skipped = first;
    next_term(cursor);
    for (; skipped >= count_job_tiles(p_.launch, cursor.place.job); next_term(cursor)) {
      skipped -= count_job_tiles(p_.launch, cursor.place.job);
    }
    cursor.within = static_cast<int32_t>(skipped);
    find_place(cursor);
    work_.at[0] = cursor;
    if (work_.tiles > 1) advance(cursor);
    work_.at[1] = cursor;
  }

  // Moves to the next term that uses this matrix, of a job that has tiles; terms are in the order
  // of their jobs.
  DYHEAD_DEVICE void next_term(Cursor& cursor) const {
    do {
      ++cursor.term;
      while (cursor.term == last_term(p_.launch.jobs[cursor.place.job])) ++cursor.place.job;
    } while (p_.launch.terms[cursor.term].weight != work_.matrix ||
             count_job_tiles(p_.launch, cursor.place.job) == 0);
    cursor.within = 0;
  }

  DYHEAD_DEVICE void advance(Cursor& cursor) const {
    if (++cursor.within == count_job_tiles(p_.launch, cursor.place.job)) next_term(cursor);
    find_place(cursor);
  }

  DYHEAD_DEVICE void find_place(Cursor& cursor) const {
    const int32_t per_image = p_.launch.tiles[cursor.place.job].per_image;
    cursor.place.image = cursor.within / per_image;
    cursor.place.tile = cursor.within % per_image;
  }

  // Thread i locates sample i of a step, row i % kDepth of slot i / kDepth, unless an earlier slot
  // has the same samples.
  struct Predicted {
    TapValues<F> values;
    F gate;
  };

  DYHEAD_DEVICE bool locates() const {
    const int slot = tile_thread() / kDepth;
    return slot < kSlots && work_.located[slot] == slot;
  }
  DYHEAD_DEVICE const DeformWeightSlot& own_slot() const {
    return work_.slots[tile_thread() / kDepth];
  }

  // Starts the loads of what locate() needs, and fills in the other fields of the step.
  DYHEAD_DEVICE Predicted start_step(const Cursor& cursor, Step& step) const {
    Predicted predicted{{F(0), F(0), F(0)}, F(0)};
    if (!locates()) return predicted;
    const int thread = tile_thread();
    const DeformShape& shape = p_.launch.shape;
    const OutputPixel at = tile_pixel(p_.launch, cursor.place, thread % kDepth, kDepth);
    const TapSampler<F> sampler = tap_sampler<F>(p_.launch, p_.predictions, p_.gates, cursor.place,
                                                 p_.launch.terms[cursor.term]);
    const DeformWeightSlot& slot = own_slot();
    if (!kPlain && at.index >= 0 && slot.count > 0) {
      predicted = {sampler.predicted(slot.deform_group, slot.tap, at), sampler.gate};
    }
    if (thread < kDepth) step.pixels[thread] = at.index;
    if (thread == 0) {
      const int64_t image = cursor.place.image;
      const MapShape& map = sampler.source;
      const MapShape& out = sampler.job.out;
      step.source = (map.first_row + image * map.pixels()) * shape.channels;
      step.grad = (out.first_row + image * out.pixels()) * shape.out_channels;
    }
    // The pixel is kept where its sample will be stored, since the products need the registers.
    uint32_t (&kept)[4] = step.samples[thread].at;
    if constexpr (kPlain) {
      // The source pixel's first unit; a map has fewer than 2^32.
      kept[0] = kOutside;
      if (at.index < 0 || slot.count == 0) return predicted;
      const SamplePoint<F> point = sampler.point(F(0), F(0), slot.tap, at);
      const auto units = static_cast<uint32_t>(shape.channels) / kUnit;
      const int32_t pixel = point.top * sampler.source.width + point.left;
      if (point.inside) kept[0] = static_cast<uint32_t>(pixel) * units;
      return predicted;
    }
    kept[0] = static_cast<uint32_t>(at.index);
    kept[1] = static_cast<uint32_t>(at.y);
    kept[2] = static_cast<uint32_t>(at.x);
    return predicted;
  }

  DYHEAD_DEVICE void locate(const Predicted& predicted, const Cursor& cursor, Step& step) const {
    if (kPlain || !locates()) return;
    StagedSample<F>& sample = step.samples[tile_thread()];
    const OutputPixel at{static_cast<int32_t>(sample.at[0]), static_cast<int32_t>(sample.at[1]),
                         static_cast<int32_t>(sample.at[2])};
    const DeformWeightSlot& slot = own_slot();
    if (at.index < 0 || slot.count == 0) {
      sample = empty_sample(F(0));
      return;
    }
    const TapSampler<F> sampler{p_.launch.shape, p_.launch.jobs[cursor.place.job],
                                p_.launch.sources[p_.launch.terms[cursor.term].source].map, nullptr,
                                predicted.gate};
    const TapValues<F>& values = predicted.values;
    sample = staged_sample(sampler, sampler.point(values.dy, values.dx, slot.tap, at), values.mask,
                           sample_stride<T, kVectors>(p_.launch.shape));
  }

  // Starts the copies of a step's rows of gradients.
  DYHEAD_DEVICE void load_grad(std::byte* to, const Step& step) const {
    const int thread = tile_thread();
    const auto outs = static_cast<int>(p_.launch.shape.out_channels);
    const T* grad = static_cast<const T*>(p_.grad_rows) + step.grad + work_.first_out;
    if (p_.grad_vectors) {
      constexpr int kRowUnits = kOuts / kUnit;
      constexpr int kRows = kTileThreads / kRowUnits;  // copied by the block at a time
      const int first = thread % kRowUnits * kUnit;
      const bool inside = first < work_.outs;
      const T* from = grad + (inside ? first : 0);
#pragma unroll
      for (int row = thread / kRowUnits; row < kDepth; row += kRows) {
        const int32_t pixel = step.pixels[row];
        const int64_t index = pixel < 0 ? 0 : pixel;
        cp_async_zfill<16>(to + column_offset<Op>(row, first), from + index * outs,
                           inside & (pixel >= 0) ? 16 : 0);
      }
      return;
    }
    constexpr int kRows = kTileThreads / kOuts;
    const int out = thread % kOuts;
    const bool inside = out < work_.outs;
    const T* from = grad + (inside ? out : 0);
    const int within = out % kUnit * static_cast<int>(sizeof(T));
#pragma unroll 4
    for (int row = thread / kOuts; row < kDepth; row += kRows) {
      const int32_t pixel = step.pixels[row];
      T value{};
      if (inside && pixel >= 0) value = from[static_cast<int64_t>(pixel) * outs];
      *reinterpret_cast<T*>(to + column_offset<Op>(row, out) + within) = value;
    }
  }

  DYHEAD_DEVICE void multiply() {
    using Gathered = Gather<Op, kVectors>;
    constexpr int kItemRows = kTileThreads / kUnits;
    constexpr int kItems = kWeightCols / kItemRows;  // units blended by a thread per step
    static_assert(kItems == kSteps);
    const int thread = tile_thread();
    const int unit = thread % kUnits * kUnit;  // its first channel in a slot
    const auto channels = static_cast<int>(p_.launch.shape.channels);
    Gathered gathered;
    // Sample i of a step is row i % kDepth of slot i / kDepth, located with the first slot of its
    // tap.
    const auto located = [&](const Step& step, int sample) -> const StagedSample<F>& {
      return step.samples[work_.located[sample / kDepth] * kDepth + sample % kDepth];
    };
    const auto load_samples = [&](const Step& step, int item) {
      const int sample = item * kItemRows + thread / kUnits;
      const DeformWeightSlot& slot = work_.slots[sample / kDepth];
      // A unit beyond the last channel reads the first one instead; its columns are not stored.
      const int inside = unit < slot.count ? unit : 0;
      gathered.load(located(step, sample),
                    static_cast<const T*>(p_.source) + step.source + slot.first + inside, channels,
                    slot.count - unit);
    };
    const auto address = [&](std::byte* to, int sample) {
      return to + sample / kDepth * kPanelBytes<Op> +
             depth_offset(sample % kDepth, thread % kUnits);
    };
    const auto store_samples = [&](std::byte* to, int item) {
      gathered.store(address(to, item * kItemRows + thread / kUnits));
    };
    // Starts the copies of a plain step's samples; those outside the map are zeros.
    const auto copy_samples = [&](std::byte* to, const Step& step) {
#pragma unroll
      for (int item = 0; item < kItems; ++item) {
        const int sample = item * kItemRows + thread / kUnits;
        const DeformWeightSlot& slot = work_.slots[sample / kDepth];
        const uint32_t first = located(step, sample).at[0];
        const bool inside = first != kOutside && unit < slot.count;
        const T* from = static_cast<const T*>(p_.source) + step.source +
                        (inside ? uint64_t{first} * kUnit + slot.first + unit : 0);
        cp_async_zfill<16>(address(to, sample), from, inside ? 16 : 0);
      }
    };

    load_grad(a_, steps_[0]);
    if constexpr (kPlain) {
      copy_samples(b_, steps_[0]);
    } else {
      for (int item = 0; item < kItems; ++item) {
        load_samples(steps_[0], item);
        store_samples(b_, item);
      }
    }
    int buffer = 0;
    for (int64_t left = work_.tiles; left > 0; --left) {
      cp_async_wait_all();
      // Both operands of this step and the positions of the next step's samples are ready, and the
      // buffers of the previous step are free.
      __syncthreads();
      const std::byte* a = a_ + buffer * Shared::kA;
      const std::byte* b = b_ + buffer * Shared::kB;
      Step& freed = steps_[buffer];
      const Cursor& cursor = work_.at[buffer];
      buffer ^= 1;
      const Step& next = steps_[buffer];
      if (left > 1) load_grad(a_ + buffer * Shared::kA, next);
      if (kPlain && left > 1) copy_samples(b_ + buffer * Shared::kB, next);
      Predicted predicted{};
      if (left > 2) predicted = start_step(cursor, freed);
      if (left > 3 && thread == kTileThreads - 1) {
        work_.at[buffer] = cursor;
        advance(work_.at[buffer]);
      }
      // The loads are in flight during the products.
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (!kPlain && left > 1) load_samples(next, step);
        product_.step(a, b, step);
        if (!kPlain && left > 1) store_samples(b_ + buffer * Shared::kB, step);
      }
      if (left > 2) locate(predicted, cursor, freed);
    }
  }

  DYHEAD_DEVICE void store() {
    constexpr int kPair = Product::kPair;
    F* partial = static_cast<F*>(p_.partial) + blockIdx.x * p_.columns.values();
#pragma unroll
    for (int i = 0; i < Product::kI; ++i) {
#pragma unroll
      for (int j = 0; j < Product::kJ; j += kPair) {
        Vec<F, kPair> v;
#pragma unroll
        for (int k = 0; k < kPair; ++k) v[k] = product_.at(i, j + k);
        store_vec_global(partial + product_.row(i) * kWeightCols + product_.column(j), v);
      }
    }
  }

  const DeformBwdWeightsParams& p_;
  std::byte *a_, *b_;
  Step* steps_;
  Work& work_;
  Product product_;
};

template <class Op, int kOuts, bool kVectors, bool kPlain>
__global__ void __launch_bounds__(kTileThreads,
                                  kOuts <= 32 && kVectors && Operand<Op>::kTensor ? 2 : 1)
    deform_bwd_weights_kernel(const __grid_constant__ DeformBwdWeightsParams p) {
  WeightsTile<Op, kOuts, kVectors, kPlain>(p).run();
}

template <class Op, int kOuts, bool kVectors, bool kPlain = false>
DeformBwdWeightsKernel weights_kernel() {
  return {deform_bwd_weights_kernel<Op, kOuts, kVectors, kPlain>, WeightsShared<Op, kOuts>::kBytes};
}

template <class Op>
DeformBwdWeightsKernel DeformBwdWeightsKernels<Op>::choose(int32_t outs, bool vectors, bool plain) {
  // TF32 has to round the samples.
  if constexpr (!std::is_same_v<Op, Tf32>) {
    if (outs == 32 && plain) return weights_kernel<Op, 32, true, true>();
  }
  if (outs == 32) return vectors ? weights_kernel<Op, 32, true>() : weights_kernel<Op, 32, false>();
  if constexpr (!std::is_same_v<Op, double>) {
    if (outs == 128 && vectors) return weights_kernel<Op, 128, true>();
  }
  if constexpr (Operand<Op>::kTensor) {
    if (outs == 256 && vectors) return weights_kernel<Op, 256, true>();
  }
  return {nullptr, 0};
}

}  // namespace dyhead::cuda
