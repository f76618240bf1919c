// A walk through the sorted samples of a tile, for one step of channels: sums what their gradients
// add to each pixel, and dots them with the values of their corners.
#pragma once

#include "deform_conv_samples.cuh"
#include "deform_conv_scatter.cuh"

namespace dyhead::cuda {

// The gradients of a tile's samples for one step of channels: kStepBytes for each, in units of 16
// bytes whose order follows from the row, so that neither the stores of fragments nor the loads of
// walkers that are one row apart have bank conflicts.
template <int kRows>
DYHEAD_DEVICE std::byte* column_unit(std::byte* columns, int sample, int unit) {
  const int row = sample % kRows;
  return columns + sample * kStepBytes + ((unit ^ (row >> 1 & 3)) << 4);
}

// kWalkerLanes lanes, a walker, take a run of the list. A lane owns a unit of the channels, and
// keeps the values of the corners of the walker's cell and the sums of what was added to them. In
// the next cell to the right the right corners become the left ones; the sums of corners that are
// left behind go to global memory.
template <class Op, int kRows, bool kVectors>
class Walk {
 public:
  using T = typename Operand<Op>::Storage;
  using F = typename Operand<Op>::Compute;
  using Samples = SortedSamples<F, kRows>;

  // dots: [samples, 4], to which each sample's products with its corners are added, or null.
  DYHEAD_DEVICE Walk(const DeformBwdInputParams& p, const Samples& samples, std::byte* columns,
                     F* dots)
      : p_(p), samples_(samples), columns_(columns), dots_(dots), scattered_(p) {}

  // `at`: the index of the step's first channel at the map's first pixel; kCorners: 1 if all
  // samples are whole pixels, else 4.
  template <int kCorners>
  DYHEAD_DEVICE void run(int64_t at, int32_t width, int channels) {
    const int walker = tile_thread() / kWalkerLanes;
    const int unit = tile_thread() % kWalkerLanes;
    const int begin = samples_.start_of_run(walker, kWalkers);
    const int end = samples_.start_of_run(walker + 1, kWalkers);
    const int first = Step::channel(unit, 0);
    const int left = channels - first;
    const auto stride = static_cast<int>(p_.launch.shape.channels);
    F sums[kCorners][kUnit];
    UnitWords values[kCorners], ahead[kCorners];
#pragma unroll
    for (int c = 0; c < kCorners; ++c) {
      clear(sums[c]);
      values[c] = ahead[c] = UnitWords{};
    }
    const auto load = [&](const SampleEntry& entry, int corner) {
      if (dots_ == nullptr || !entry.has(corner)) return UnitWords{};
      return load_unit<T, kVectors, Step::kPieces, Step::kSpacing>(
          static_cast<const T*>(p_.source) + at + first, entry.pixel(corner, width), stride, left);
    };
    SampleEntry entry{};
    if (begin < end) {
      entry = samples_[begin];
#pragma unroll
      for (int c = 0; c < kCorners; ++c) values[c] = load(entry, c);
    }
    // All lanes of a warp take as many rounds, as the sums of the dots need all of them.
#pragma unroll 1
    for (int i = begin; __any_sync(kFullMask, i < end); ++i) {
      const bool active = i < end;
      const bool last = i + 1 >= end;
      const SampleEntry next = last ? SampleEntry{} : samples_[i + 1];
      const Move move = last ? Move::kJump : next.move();
      const bool to_right = move == Move::kNextCell;
      // The values of the next cell arrive while this sample is added.
      if (active && !last && move != Move::kSameCell) {
#pragma unroll
        for (int c = 0; c < kCorners; ++c) {
          if (c % 2 == 1 || !to_right || kCorners == 1) ahead[c] = load(next, c);
        }
      }
      const int sample = entry.sample();
      F dots[kCorners];
#pragma unroll
      for (int c = 0; c < kCorners; ++c) dots[c] = F(0);
      if (active) add_sample(sample, unit, sums, values, dots);
      if (dots_ != nullptr) add_dots(dots, active ? sample : -1);
      if (!active || move == Move::kSameCell) {
        if (active) entry = next;
        continue;
      }
#pragma unroll
      for (int c = 0; c < kCorners; ++c) {
        const bool stays = c % 2 == 1 && to_right;
        if (!stays && entry.has(c) && left > 0) {
          const int64_t pixel = entry.pixel(c, width);
          leave(at + first + pixel * stride, sums[c], left);
        }
      }
#pragma unroll
      for (int c = 0; c < kCorners; c += 2) {
        constexpr bool kPair = kCorners > 1;
        const int right = kPair ? c + 1 : c;
        const bool handed_on = kPair && to_right;
#pragma unroll
        for (int k = 0; k < kUnit; ++k) sums[c][k] = handed_on ? sums[right][k] : F(0);
        values[c] = handed_on ? values[right] : ahead[c];
        if (kPair) {
          clear(sums[right]);
          values[right] = ahead[right];
        }
      }
      entry = next;
    }
    scattered_.finish();
    if (dots_ != nullptr) add_outside<kCorners>(unit);
  }

 private:
  using Step = InputStep<T>;
  static constexpr int kUnit = Step::kUnit;
  static constexpr int kWalkers = kTileThreads / kWalkerLanes;

  // Outside the map values are 0, and their products with gradients that are not finite are NaN.
  template <int kCorners>
  DYHEAD_DEVICE void add_outside(int unit) const {
    const auto [inside, all] = samples_.counts();
#pragma unroll 1
    for (int i = inside + tile_thread() / kWalkerLanes; __any_sync(kFullMask, i < all);
         i += kWalkers) {
      const int sample = i < all ? samples_[i].sample() : -1;
      F zero = F(0);
      if (sample >= 0) {
        F grad[kUnit];
        unpack(column(sample, unit), grad);
#pragma unroll
        for (int k = 0; k < kUnit; ++k) zero += F(0) * grad[k];
      }
      F dots[kCorners];
#pragma unroll
      for (int c = 0; c < kCorners; ++c) dots[c] = zero;
      add_dots(dots, sample);
    }
  }

  DYHEAD_DEVICE UnitWords column(int sample, int unit) const {
    return load_vec<4>(
        reinterpret_cast<const uint32_t*>(column_unit<kRows>(columns_, sample, unit)));
  }

  DYHEAD_DEVICE static void clear(F (&values)[kUnit]) {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) values[k] = F(0);
  }

  template <int kCorners>
  DYHEAD_DEVICE void add_sample(int sample, int unit, F (&sums)[kCorners][kUnit],
                                const UnitWords (&values)[kCorners], F (&dots)[kCorners]) const {
    F grad[kUnit];
    unpack(column(sample, unit), grad);
    const auto weights = samples_.weights(sample);
#pragma unroll
    for (int c = 0; c < kCorners; ++c) {
#pragma unroll
      for (int k = 0; k < kUnit; ++k) sums[c][k] += weights[c] * grad[k];
    }
    if (dots_ == nullptr) return;
#pragma unroll
    for (int c = 0; c < kCorners; ++c) {
      F value[kUnit];
      unpack(values[c], value);
#pragma unroll
      for (int k = 0; k < kUnit; ++k) dots[c] += value[k] * grad[k];
    }
  }

  DYHEAD_DEVICE static void unpack(const UnitWords& words, F (&values)[kUnit]) {
    if constexpr (is_half_v<T>) {
#pragma unroll
      for (int k = 0; k < kUnit / 2; ++k) {
        const float2 pair = unpack2<T>(words[k]);
        values[2 * k] = pair.x;
        values[2 * k + 1] = pair.y;
      }
    } else {
      const auto unpacked = __builtin_bit_cast(Values, words);
#pragma unroll
      for (int k = 0; k < kUnit; ++k) values[k] = unpacked[k];
    }
  }

  // Adds the walker's sums to those of a sample, or nothing if it is -1. In each round of shuffles
  // a lane keeps half of its sums and hands the other half to its partner.
  DYHEAD_DEVICE void add_dots(const F (&dots)[4], int sample) const {
    const int lane = tile_thread() % kWalkerLanes;
    const bool odd = lane & 1;
    const bool upper = lane & 2;
    F two[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const F kept = odd ? dots[2 + i] : dots[i];
      two[i] = kept + __shfl_xor_sync(kFullMask, odd ? dots[i] : dots[2 + i], 1);
    }
    const F one =
        (upper ? two[1] : two[0]) + __shfl_xor_sync(kFullMask, upper ? two[0] : two[1], 2);
    if (sample >= 0) dots_[4 * sample + 2 * (lane & 1) + (lane >> 1)] += one;
  }

  DYHEAD_DEVICE void add_dots(const F (&dots)[1], int sample) const {
    F sum = dots[0];
#pragma unroll
    for (int distance = 1; distance < kWalkerLanes; distance *= 2) {
      sum += __shfl_xor_sync(kFullMask, sum, distance);
    }
    if (sample >= 0 && tile_thread() % kWalkerLanes == 0) dots_[4 * sample] += sum;
  }

  // What a pixel got goes to global memory.
  DYHEAD_DEVICE void leave(int64_t at, const F (&values)[kUnit], int left) {
    if (p_.scatter == Scatter::kNone) return;
    if constexpr (kVectors && std::is_same_v<F, float>) {
      if (p_.scatter == Scatter::kSum) {
#pragma unroll
        for (int k = 0; k < kUnit; k += 4) {
          const int channel = Step::channel(0, k);
          if (channel >= left) break;
          red_add_v4(static_cast<float*>(p_.sums) + at + channel,
                     make_float4(values[k], values[k + 1], values[k + 2], values[k + 3]));
        }
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      const int channel = Step::channel(0, k);
      if (channel < left) scattered_.add(at + channel, values[k]);
    }
  }

  using Values = Vec<T, kUnit>;

  const DeformBwdInputParams& p_;
  Samples samples_;
  std::byte* columns_;
  F* dots_;
  ScatteredSums<F> scattered_;
};

}  // namespace dyhead::cuda
