// The forward kernel of deform_conv for compute capability 9.0, in bfloat16 and float16: the work
// of deform_conv_fwd.cuh with warps of three kinds.
//
//   8 warps that multiply   gather and blend samples straight into the left operand of wgmma, which
//                           may be registers; then they store the outputs
//   1 thread that copies    lets the panels of weights arrive, each block of the cluster one half
//                           of a panel for both
//   3 warps that stage      prepare where the samples of the next tile are, while the others
//   multiply
//
// Blocks stay for several tiles. The blocks of a cluster have neighbouring tiles of one job, so
// that they need the same weights at the same time.
#pragma once

#include "../tile/wgmma_tile.cuh"
#include "deform_conv_fwd_finish.cuh"

namespace dyhead::cuda {

#if defined(DYHEAD_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The warps that multiply.
struct WgmmaThreads {
  DYHEAD_DEVICE static void sync() { named_barrier_sync(1, kTileThreads); }
};

using WgmmaSums = WgmmaTile<1, kWgmmaCols>;

// Samples of one stretch of channels, for the tile that they belong to.
struct WgmmaSamples {
  StagedSample<float> samples[kMaxTapsAtOnce * kWgmmaRows];
  int32_t pixels[kWgmmaRows];  // index in the map, or -1
  FwdPlace at;
};
static_assert(sizeof(WgmmaSamples) == kWgmmaSamplesBytes);

// A phase ends when all have arrived: the bytes of a panel; the warps of all blocks that have
// multiplied with it; the warps that stage samples; the warps that have read them.
struct WgmmaBarriers {
  MBarrier panel_full[kWgmmaStages], panel_empty[kWgmmaStages];
  MBarrier samples_full[2], samples_empty[2];
};

// The index of a buffer in a ring, and the parity of its current phase.
template <int kBuffers>
struct RingPlace {
  int buffer = 0;
  unsigned parity = 0;

  DYHEAD_DEVICE void advance() {
    if (++buffer < kBuffers) return;
    buffer = 0;
    parity ^= 1;
  }
};

template <class T>
class WgmmaForward {
 public:
  DYHEAD_DEVICE explicit WgmmaForward(const DeformFwdKernelParams& p)
      : p_(p),
        launch_(p.launch),
        panels_(dynamic_shared<std::byte>(0, kWgmmaStages * kWgmmaPanelBytes)),
        samples_(dynamic_shared<WgmmaSamples>(kWgmmaStages * kWgmmaPanelBytes, 2)),
        barriers_(dynamic_shared<WgmmaBarriers>(
            kWgmmaStages * kWgmmaPanelBytes + 2 * sizeof(WgmmaSamples), 1)) {}

  DYHEAD_DEVICE void run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kWgmmaStages; ++i) {
        mbarrier_init(&barriers_->panel_full[i], 1);
        mbarrier_init(&barriers_->panel_empty[i], kClusterBlocks * kTileWarps);
      }
      for (int i = 0; i < 2; ++i) {
        mbarrier_init(&barriers_->samples_full[i], kStagingThreads / kWarpSize);
        mbarrier_init(&barriers_->samples_empty[i], kTileWarps);
      }
      fence_mbarrier_init();
    }
    cluster_sync();
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    if (warp < kTileWarps) {
      take_registers<216>();
      multiply();
    } else {
      give_registers<72>();
      if (warp > kTileWarps) {
        stage(static_cast<int>(threadIdx.x) - kTileThreads - kWarpSize);
      } else if (threadIdx.x % kWarpSize == 0) {
        copy();
      }
      __syncwarp();
    }
    // The other block of the cluster may still copy to this one, and arrive at its barriers.
    cluster_sync();
  }

 private:
  static constexpr int kStagingThreads = kWgmmaThreads - kTileThreads - kWarpSize;
  static constexpr int kUnit = 16 / static_cast<int>(sizeof(T));
  static constexpr int kStepUnits = kWgmmaDepth / kUnit;

  // What this block computes of an item: a tile or, of shared tiles, some taps.
  DYHEAD_DEVICE FwdPlace place_of(int32_t item) const {
    const auto rank = static_cast<int32_t>(cluster_rank());
    const int all_columns = launch_.shape.groups * p_.panels.column_panels;
    const int32_t shared = item < p_.split.whole ? -1 : (item - p_.split.whole) / p_.split.parts;
    const int32_t index = shared < 0 ? item : p_.split.whole + shared;
    FwdPlace at;
    at.shared = shared < 0 ? -1 : shared * kClusterBlocks + rank;
    at.part = shared < 0 ? 0 : (item - p_.split.whole) % p_.split.parts;
    at.column = index % all_columns;
    at.tile = index / all_columns * kClusterBlocks + rank;
    at.place = find_tile(launch_, at.tile);
    // A job with an odd number of tiles has one more, without pixels.
    const auto images = static_cast<int32_t>(launch_.shape.images);
    if (at.place.image == images) {
      at.place.image = images - 1;
      at.place.tile = launch_.tiles[at.place.job].per_image;
    }
    return at;
  }

  // Calls use(at) for what this block computes of each item of its cluster.
  template <class Use>
  DYHEAD_DEVICE void for_each_item(Use&& use) const {
    const auto clusters = static_cast<int32_t>(gridDim.x / kClusterBlocks);
    for (auto item = static_cast<int32_t>(blockIdx.x / kClusterBlocks); item < p_.items;
         item += clusters) {
      use(place_of(item));
    }
  }

  // Calls use(term, stretch, step) for all stretches of channels; `step` is the first one in the
  // panels.
  template <class Use>
  DYHEAD_DEVICE void for_each_stretch(const FwdPlace& at, Use&& use) const {
    const DeformJob& job = launch_.jobs[at.place.job];
    const int group = at.column / p_.panels.column_panels;
    const int group_channels = static_cast<int>(launch_.shape.channels) / launch_.shape.groups;
    for (int t = job.first_term; t < job.first_term + job.terms; ++t) {
      int step = 0;
      int channel = group * group_channels;
      while (channel < (group + 1) * group_channels) {
        const ChannelStretch stretch = stretch_from(p_, group, channel);
        use(launch_.terms[t], stretch, step);
        step += stretch.steps;
        channel = stretch.last;
      }
    }
  }

  // ---- the thread that copies ----

  DYHEAD_DEVICE void copy() {
    constexpr unsigned kHalf = kWgmmaPanelBytes / kClusterBlocks;
    constexpr unsigned kAllBlocks = (1u << kClusterBlocks) - 1;
    const unsigned half = cluster_rank() * kHalf;
    RingPlace<kWgmmaStages> ring;
    for_each_item([&](const FwdPlace& at) {
      const FwdTaps taps = taps_of_part(p_, at);
      for_each_stretch(
          at, [&](const DeformLaunchTerm& term, const ChannelStretch& stretch, int first_step) {
            for (int step = first_step; step < first_step + stretch.steps; ++step) {
              const std::byte* from =
                  static_cast<const std::byte*>(p_.packed) + half +
                  p_.panels.index(launch_.shape, term.weight, at.column, step, taps.first) *
                      static_cast<int64_t>(kWgmmaPanelBytes);
#pragma unroll 1
              for (int tap = taps.first; tap < taps.last; ++tap) {
                // All warps of both blocks have multiplied with what was there.
                mbarrier_wait(&barriers_->panel_empty[ring.buffer], ring.parity ^ 1);
                MBarrier* full = &barriers_->panel_full[ring.buffer];
                mbarrier_arrive_expect(full, kWgmmaPanelBytes);
                bulk_copy(panels_ + ring.buffer * kWgmmaPanelBytes + half, from, kHalf, full,
                          kAllBlocks);
                from += kWgmmaPanelBytes;
                ring.advance();
              }
            }
          });
    });
  }

  // ---- the warps that stage ----

  DYHEAD_DEVICE void stage(int thread) {
    RingPlace<2> ring;
    for_each_item([&](const FwdPlace& at) {
      const FwdTaps taps = taps_of_part(p_, at);
      for_each_stretch(at, [&](const DeformLaunchTerm& term, const ChannelStretch& stretch, int) {
        WgmmaSamples& to = samples_[ring.buffer];
        mbarrier_wait(&barriers_->samples_empty[ring.buffer], ring.parity ^ 1);
        // All threads write the same, and read it where they need it: they have few registers.
        to.at = at;
        const TilePlace& place = to.at.place;
        for (int row = thread; row < kWgmmaRows; row += kStagingThreads) {
          to.pixels[row] = tile_pixel(launch_, place, row, kWgmmaRows).index;
        }
        const TapSampler<float> sampler =
            tap_sampler<float>(launch_, p_.predictions, p_.gates, place, term);
        stage_samples(launch_, place, sampler, stretch.deform_group, taps.first,
                      taps.last - taps.first, kWgmmaRows, sample_stride<T, true>(launch_.shape),
                      to.samples, thread, kStagingThreads);
        __syncwarp();
        if (thread % kWarpSize == 0) mbarrier_arrive(&barriers_->samples_full[ring.buffer]);
        ring.advance();
      });
    });
  }

  // ---- the warps that multiply ----

  DYHEAD_DEVICE void multiply() {
    RingPlace<2> ring;
    RingPlace<kWgmmaStages> panels;
    const auto release = [&] {
      __syncwarp();
      if (WgmmaSums::lane() == 0) mbarrier_arrive(&barriers_->samples_empty[ring.buffer]);
      ring.advance();
    };
    for_each_item([&](const FwdPlace& at) {
      const FwdTaps taps = taps_of_part(p_, at);
      WgmmaSums sums;
      sums.clear();
      bool holds = false;
      for_each_stretch(at, [&](const DeformLaunchTerm& term, const ChannelStretch& stretch, int) {
        if (holds) release();
        holds = true;
        mbarrier_wait(&barriers_->samples_full[ring.buffer], ring.parity);
        const MapShape& map = launch_.sources[term.source].map;
        const int64_t first = (map.first_row + at.place.image * map.pixels()) *
                                  static_cast<int64_t>(launch_.shape.channels) +
                              stretch.first;
        multiply_stretch(samples_[ring.buffer], static_cast<const T*>(p_.source) + first,
                         stretch.steps, taps.last - taps.first, panels, sums);
      });
      WgmmaSamples& samples = samples_[ring.buffer];
      if (at.place.tile < launch_.tiles[at.place.job].per_image) {
        FwdFinish<T, WgmmaSums, kWgmmaRows, kWgmmaCols, WgmmaThreads>(
            p_, samples.at, samples.pixels, reinterpret_cast<std::byte*>(samples.samples), sums)
            .run();
      }
      release();
    });
  }

  // The main loop. A step of 64 channels has two halves, of two products each. While the products
  // of one are under way, the next half is blended, and the loads of the one after it begin.
  DYHEAD_DEVICE void multiply_stretch(const WgmmaSamples& staged, const T* source, int steps,
                                      int taps, RingPlace<kWgmmaStages>& panels, WgmmaSums& sums) {
    const StagedSample<float>* row = staged.samples + sums.row(0);
    const auto* units = reinterpret_cast<const uint4*>(source) + sums.lane() % 4;
    int tap = 0;
    const uint4* from[2][4];  // where the corners of both rows are
    Vec<float, 4> weight[2];  // of the corners
    UnitWords words[2][4];    // the loads that are under way
    uint32_t left[2][2][4];   // of the products of each half

    const auto locate = [&] {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const StagedSample<float>& sample = row[tap * kWgmmaRows + 8 * r];
        const Vec<uint32_t, 4> at = load_vec<4>(sample.at);
        weight[r] = load_vec<4>(sample.weight);
        // As StagedSample says.
        const bool has_first = at[2] <= at[3], has_others = at[1] <= at[3];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          from[r][i] = ((i == 0 ? has_first : has_others) ? units : kZeroUnits) + at[i];
        }
      }
    };
    const auto load = [&](int half) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[r][i] = load_vec_readonly<4>(
              reinterpret_cast<const uint32_t*>(from[r][i] + half * (kStepUnits / 2)));
        }
      }
    };
    const auto blend = [&](uint32_t (&to)[2][4]) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          float low = 0.0f, high = 0.0f;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack2<T>(words[r][i][w]);
            low += weight[r][i] * pair.x;
            high += weight[r][i] * pair.y;
          }
          // As wgmma_channel() says.
          to[w / 2][w % 2 * 2 + r] = pack2<T>(low, high);
        }
      }
    };
    const auto advance = [&] {
      if (++tap < taps) return;
      tap = 0;
      units += kStepUnits;
    };
    const auto product = [&](int half) {
      const std::byte* panel = panels_ + panels.buffer * kWgmmaPanelBytes;
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        wgmma_m64n256k16<T>(sums.acc[0], left[half][i], wgmma_operand(panel, 64 * half + 32 * i),
                            true);
      }
      wgmma_commit();
      // The products before these are through.
      wgmma_wait<1>();
    };
    const auto release = [&](int buffer) {
      if (sums.lane() != 0) return;
      MBarrier* empty = &barriers_->panel_empty[buffer];
      mbarrier_arrive(empty);
      mbarrier_arrive_at(empty, cluster_rank() ^ 1);
    };

    locate();
    load(0);
    blend(left[0]);
    load(1);
    int previous = -1;
    for (int i = steps * taps; i > 0; --i) {
      const bool more = i > 1;
      mbarrier_wait(&barriers_->panel_full[panels.buffer], panels.parity);
      product(0);
      if (previous >= 0) release(previous);
      blend(left[1]);
      if (more) {
        advance();
        locate();
        load(0);
      }
      product(1);
      if (more) {
        blend(left[0]);
        load(1);
      }
      previous = panels.buffer;
      panels.advance();
    }
    wgmma_wait_all(sums.acc[0]);
    release(previous);
  }

  const DeformFwdKernelParams& p_;
  const DeformLaunch& launch_;
  std::byte* panels_;
  WgmmaSamples* samples_;
  WgmmaBarriers* barriers_;
};

#endif  // sm_90a

template <class T>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    deform_fwd_wgmma_kernel([[maybe_unused]] const __grid_constant__ DeformFwdKernelParams p) {
#if defined(DYHEAD_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  WgmmaForward<T>(p).run();
#elif defined(__CUDA_ARCH__)
  __trap();  // the host launches it on compute capability 9.0 only
#endif
}

template <class Op>
DeformFwdKernel DeformFwdWgmmaKernels<Op>::choose() {
  return deform_fwd_wgmma_kernel<Op>;
}

}  // namespace dyhead::cuda
