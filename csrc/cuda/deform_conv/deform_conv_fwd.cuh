// The forward kernel of deform_conv; deform_conv.h describes how it works.
#pragma once

#include "deform_conv_fwd_finish.cuh"

namespace dyhead::cuda {

template <class Op, int kRows, int kCols>
struct FwdShared {
  using F = typename Operand<Op>::Compute;
  static constexpr size_t kA = static_cast<size_t>(kRows) * kRowBytes;
  static constexpr size_t kB = static_cast<size_t>(kCols) * kRowBytes;
};

// One tile of the forward, with the group and panel of columns that it computes.
template <class Op, int kRows, int kCols, bool kVectors>
class FwdTile {
 public:
  using T = typename Operand<Op>::Storage;
  using F = typename Operand<Op>::Compute;
  using Shared = FwdShared<Op, kRows, kCols>;
  using Product = TileProduct<Op, kRows, kCols>;
  static constexpr bool kShares = forward_shares_tiles(kCols, Operand<Op>::kTensor);

  DYHEAD_DEVICE FwdTile(const DeformFwdKernelParams& p, int32_t block)
      : p_(p),
        launch_(p.launch),
        a_(dynamic_shared<std::byte>(0, 2 * Shared::kA)),
        b_(dynamic_shared<std::byte>(2 * Shared::kA, 2 * Shared::kB)),
        work_(dynamic_shared<std::byte>(2 * (Shared::kA + Shared::kB),
                                        sizeof(StagedSample<F>) * kRows * p.taps_at_once)),
        at_(shared_place()) {
    const int all_columns = p.launch.shape.groups * p.panels.column_panels;
    if (threadIdx.x == 0) {
      const int32_t shared = kShares ? block - p.split.whole : -1;
      at_.shared = shared < 0 ? -1 : shared / p.split.parts;
      at_.part = shared < 0 ? 0 : shared % p.split.parts;
      const int32_t tile = shared < 0 ? block : p.split.whole + at_.shared;
      at_.tile = tile / all_columns;
      at_.column = tile % all_columns;
      at_.place = find_tile(p.launch, at_.tile);
    }
    __syncthreads();
    for (int row = tile_thread(); row < kRows; row += kTileThreads) {
      at_.pixels[row] = tile_pixel(launch_, at_.place, row, kRows).index;
    }
  }

  DYHEAD_DEVICE void run() {
    const DeformShape& s = launch_.shape;
    const DeformJob& job = launch_.jobs[at_.place.job];
    const int group_channels = static_cast<int>(s.channels) / s.groups;
    const int group = at_.column / p_.panels.column_panels;
    const FwdTaps all = taps_of_part(p_, at_);
    for (int t = job.first_term; t < job.first_term + job.terms; ++t) {
      int step = 0;
      int channel = group * group_channels;
      while (channel < (group + 1) * group_channels) {
        const ChannelStretch stretch = stretch_from(p_, group, channel);
        for (int tap = all.first; tap < all.last; tap += p_.taps_at_once) {
          const int taps = all.last - tap < p_.taps_at_once ? all.last - tap : p_.taps_at_once;
          multiply_stretch(launch_.terms[t], stretch, step, tap, taps);
        }
        step += stretch.steps;
        channel = stretch.last;
      }
    }
    FwdFinish<Op, Product, kRows, kCols, BlockThreads>(p_, at_, at_.pixels, work_, product_).run();
  }

 private:
  // In shared memory, since the products need the registers.
  struct Place : FwdPlace {
    int32_t pixels[kRows];  // index in the map, or -1
  };

  DYHEAD_DEVICE static Place& shared_place() {
    DYHEAD_SHARED(Place, place, 1);
    return place[0];
  }

  // The main loop. A panel is an exact image of shared memory.
  DYHEAD_DEVICE void multiply_stretch(const DeformLaunchTerm& term, const ChannelStretch& stretch,
                                      int first_step, int first_tap, int taps) {
    using Gathered = Gather<Op, kVectors>;
    constexpr int kItemRows = kTileThreads / kUnits;
    constexpr int kItems = kRows / kItemRows;  // units blended by a thread per step
    constexpr int kSpacing = kSteps / kItems;
    constexpr int kPanel = kCols * kRowBytes;
    static_assert(kItemRows % 8 == 0, "a thread's units are in rows of one permutation");
    auto* samples = reinterpret_cast<StagedSample<F>*>(work_);
    const TapSampler<F> sampler =
        tap_sampler<F>(launch_, p_.predictions, p_.gates, at_.place, term);
    stage_samples(launch_, at_.place, sampler, stretch.deform_group, first_tap, taps, kRows,
                  sample_stride<T, kVectors>(launch_.shape), samples, tile_thread(), kTileThreads);
    // The samples are staged, and the buffers of the previous stretch are free.
    __syncthreads();

    const int thread = tile_thread();
    const int row = thread / kUnits;  // of this thread's first unit
    const int unit = thread % kUnits;
    const int channels = static_cast<int>(launch_.shape.channels);
    const StagedSample<F>* thread_samples = samples + row;
    std::byte* to = a_ + unit_offset(row, unit);
    // The step whose operands are loaded next.
    int tap = 0;
    int channel = stretch.first;
    const MapShape& map = sampler.source;
    const T* source = static_cast<const T*>(p_.source) +
                      (map.first_row + at_.place.image * map.pixels()) * channels + channel +
                      unit * Gathered::kUnit;
    // How many channels there are from this thread's unit on.
    const auto left = [&] { return stretch.last - channel - unit * Gathered::kUnit; };
    // A unit beyond the last channel reads the step's first one instead. The weights there are
    // zero, and a value that is not finite reaches all outputs of its row in any case.
    const auto stay_inside = [&] {
      if (left() <= 0) source -= unit * Gathered::kUnit;
    };
    stay_inside();
    const std::byte* panel =
        static_cast<const std::byte*>(p_.packed) +
        p_.panels.index(launch_.shape, term.weight, at_.column, first_step, first_tap) * kPanel;
    int buffer = 0;
    const auto advance = [&] {
      buffer ^= 1;
      ++tap;
      panel += kPanel;
      if (tap == taps) {
        tap = 0;
        panel += (launch_.shape.taps() - taps) * kPanel;
        source += p_.panels.depth;
        channel += p_.panels.depth;
        stay_inside();
      }
    };
    load_panel<kCols>(b_, panel);
    // All loads of the first step are in flight at once, where a load is one instruction.
    constexpr int kAtOnce = kVectors ? kItems : 1;
#pragma unroll 1
    for (int item = 0; item < kItems; item += kAtOnce) {
      Gathered first[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        first[i].load(thread_samples[(item + i) * kItemRows], source, channels, left());
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) first[i].store(to + (item + i) * kItemRows * kRowBytes);
    }
    Gathered gathered;
    const auto load_samples = [&](int item) {
      gathered.load(thread_samples[tap * kRows + item * kItemRows], source, channels, left());
    };
    const auto store_samples = [&](int item) {
      gathered.store(to + buffer * Shared::kA + item * kItemRows * kRowBytes);
    };
    for (int i = stretch.steps * taps; i > 0; --i) {
      cp_async_wait_all();
      // Both operands of this step are ready; the buffers of the previous step are free.
      __syncthreads();
      const int a = buffer * static_cast<int>(Shared::kA);
      const int b = buffer * static_cast<int>(Shared::kB);
      // Were the last step a case of its own, the compiler would blend samples before the products,
      // and so wait for their loads.
      const bool more = i > 1;
      if (more) {
        advance();
        load_panel<kCols>(b_ + buffer * Shared::kB, panel);
      }
      // The loads are in flight during the products.
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (more && step % kSpacing == 0) load_samples(step / kSpacing);
        product_.step(a_, b_, step, a, b);
        if (more && (step + 1) % kSpacing == 0) store_samples(step / kSpacing);
      }
    }
  }

  const DeformFwdKernelParams& p_;
  const DeformLaunch& launch_;
  std::byte *a_, *b_;
  std::byte* work_;  // the samples in the main loop, then the sums of the moments
  Place& at_;
  Product product_;
};

template <class Op, int kRows, int kCols, bool kVectors>
__global__ void __launch_bounds__(kTileThreads, forward_blocks_at_once(kCols, Operand<Op>::kTensor))
    deform_fwd_kernel(const __grid_constant__ DeformFwdKernelParams p) {
  FwdTile<Op, kRows, kCols, kVectors>(p, static_cast<int32_t>(blockIdx.x)).run();
}

template <class Op>
DeformFwdKernel DeformFwdKernels<Op>::choose(const DeformTiling& tiling) {
  const auto is = [&](int rows, int cols, bool vectors) {
    return tiling.rows == rows && tiling.cols == cols && tiling.vectors == vectors;
  };
  if (is(128, 32, false)) return deform_fwd_kernel<Op, 128, 32, false>;
  if (is(128, 32, true)) return deform_fwd_kernel<Op, 128, 32, true>;
  if constexpr (!std::is_same_v<Op, double>) {
    if (is(128, 128, true)) return deform_fwd_kernel<Op, 128, 128, true>;
  }
  if constexpr (Operand<Op>::kTensor) {
    if (is(64, 256, true)) return deform_fwd_kernel<Op, 64, 256, true>;
    if (is(128, 256, true)) return deform_fwd_kernel<Op, 128, 256, true>;
  }
  return nullptr;
}

}  // namespace dyhead::cuda
