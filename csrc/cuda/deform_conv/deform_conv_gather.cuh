// Samples for the forward and for the weight gradient of deform_conv: where they read is prepared
// once for each tap, and the main loops load and blend them into an operand of a tile product.
#pragma once

#include "deform_conv.cuh"

namespace dyhead::cuda {

// What corners read that lie outside the map: StagedSample. A kernel reads up to 80 bytes from
// either of the first two units on.
__device__ const uint4 kZeroUnits[6] = {};

// The two pixels that a sample reads along one axis, and their weights. Where one is beyond the
// border, the other stands for it, and each has half of its weight: so four corners always exist,
// and nothing is read that the sample does not consist of.
template <class F>
struct SampleAxis {
  F weight[2];
  int32_t at[2];
};

template <class F>
DYHEAD_DEVICE SampleAxis<F> sample_axis(int32_t first, F fraction, int32_t size) {
  const int32_t second = first + 1;
  if (first < 0) return {{fraction / F(2), fraction / F(2)}, {second, second}};
  if (second < size) return {{F(1) - fraction, fraction}, {first, second}};
  return {{(F(1) - fraction) / F(2), (F(1) - fraction) / F(2)}, {first, first}};
}

// A sample that reads nothing. Its weight is multiplied with 0, which gives NaN where the weight is
// not finite.
template <class F>
DYHEAD_DEVICE StagedSample<F> empty_sample(F weight) {
  return {{weight, F(0), F(0), F(0)}, {0, 1, 1, 0}};
}

// `stride` is how far neighbouring pixels are apart.
template <class F>
DYHEAD_DEVICE StagedSample<F> staged_sample(const TapSampler<F>& sampler, const SamplePoint<F>& p,
                                            F predicted_mask, uint32_t stride) {
  const MapShape& map = sampler.source;
  const F scale = sampler.modulation(predicted_mask);
  const auto place = [&](int32_t y, int32_t x) {
    return static_cast<uint32_t>(y * map.width + x) * stride;
  };
  if (!p.inside) return empty_sample((F(1) - p.below) * scale);
  if (sampler.job.plain()) return {{scale, F(0), F(0), F(0)}, {place(p.top, p.left), 1, 0, 0}};
  const SampleAxis<F> y = sample_axis(p.top, p.below, map.height);
  const SampleAxis<F> x = sample_axis(p.left, p.right, map.width);
  StagedSample<F> sample;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sample.weight[i] = y.weight[i / 2] * x.weight[i % 2] * scale;
    sample.at[i] = place(y.at[i / 2], x.at[i % 2]);
  }
  return sample;
}

// How far neighbouring pixels are apart for Gather.
template <class T, bool kVectors>
DYHEAD_DEVICE uint32_t sample_stride(const DeformShape& shape) {
  constexpr uint32_t kUnit = 16 / sizeof(T);
  return kVectors ? static_cast<uint32_t>(shape.channels) / kUnit : 1;
}

// Stores the samples of `taps` taps, from `first_tap` on, in samples[tap * rows + row]. `thread` is
// the caller's index among the `threads` that take part.
template <class F>
DYHEAD_DEVICE void stage_samples(const DeformLaunch& launch, const TilePlace& place,
                                 const TapSampler<F>& sampler, int deform_group, int first_tap,
                                 int taps, int rows, uint32_t stride, StagedSample<F>* samples,
                                 int thread, int threads) {
  const bool predicts = !sampler.job.plain();
  // The predictions of all of a thread's samples are under way at once, to where the samples will
  // be.
  if (predicts) {
#pragma unroll 1
    for (int i = thread; i < taps * rows; i += threads) {
      const OutputPixel at = tile_pixel(launch, place, i % rows, rows);
      if (at.index < 0) continue;
#pragma unroll 1
      for (int k = 0; k < 3; ++k) {
        const int64_t from = sampler.place(k, deform_group, first_tap + i / rows, at);
        cp_async<sizeof(F)>(&samples[i].weight[k], sampler.predictions + from);
      }
    }
    cp_async_wait_all();
  }
#pragma unroll 1
  for (int i = thread; i < taps * rows; i += threads) {
    const OutputPixel at = tile_pixel(launch, place, i % rows, rows);
    if (at.index < 0) {
      samples[i] = empty_sample(F(0));
      continue;
    }
    TapValues<F> values{F(0), F(0), F(1)};
    if (predicts) values = {samples[i].weight[0], samples[i].weight[1], samples[i].weight[2]};
    const SamplePoint<F> point = sampler.point(values.dy, values.dx, first_tap + i / rows, at);
    samples[i] = staged_sample(sampler, point, values.mask, stride);
  }
}

// One unit (16 bytes) of samples: its loads in flight, then its blended values.
template <class Op, bool kVectors>
class Gather {
 public:
  using T = typename Operand<Op>::Storage;
  using F = typename Operand<Op>::Compute;
  static constexpr int kUnit = Operand<Op>::kUnit;
  using Values = Vec<T, kUnit>;

  // Starts the loads of the first `count` channels from `source` on, which points to a channel of
  // the map's first pixel. With vectors it loads all channels of the unit, and count is not used.
  DYHEAD_DEVICE void load(const StagedSample<F>& sample, const T* source, int channels, int count) {
    const T* zeros = reinterpret_cast<const T*>(kZeroUnits);
    const Vec<uint32_t, 4> at = load_vec<4>(sample.at);
    const Vec<F, 4> weight = load_vec<4>(sample.weight);
    // As StagedSample says.
    const bool has_first = at[2] <= at[3], has_others = at[1] <= at[3];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weight_[i] = weight[i];
      const bool exists = i == 0 ? has_first : has_others;
      const T* map = exists ? source : zeros;
      if constexpr (kVectors) {
        const T* from = map + static_cast<uint64_t>(at[i]) * kUnit;
        words_[i] = load_vec_readonly<4>(reinterpret_cast<const uint32_t*>(from));
      } else {
        const T* from = exists ? map + static_cast<int64_t>(at[i]) * channels : zeros;
        Values values;
#pragma unroll
        for (int k = 0; k < kUnit; ++k) values[k] = k < count ? from[k] : T{};
        words_[i] = __builtin_bit_cast(UnitWords, values);
      }
    }
  }

  DYHEAD_DEVICE void store(std::byte* to) const {
    F sum[kUnit];
#pragma unroll
    for (int k = 0; k < kUnit; ++k) sum[k] = F(0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (is_half_v<T>) {
#pragma unroll
        for (int k = 0; k < kUnit / 2; ++k) {
          const float2 pair = unpack2<T>(words_[i][k]);
          sum[2 * k] += weight_[i] * pair.x;
          sum[2 * k + 1] += weight_[i] * pair.y;
        }
      } else {
        const auto values = __builtin_bit_cast(Values, words_[i]);
#pragma unroll
        for (int k = 0; k < kUnit; ++k) sum[k] += weight_[i] * values[k];
      }
    }
    store_vec(reinterpret_cast<T*>(to), Operand<Op>::unit(sum));
  }

 private:
  F weight_[4];
  UnitWords words_[4];
};

}  // namespace dyhead::cuda
