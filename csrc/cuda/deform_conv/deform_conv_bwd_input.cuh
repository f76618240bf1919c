// The kernel of the gradient of the samples; deform_conv_bwd.h describes how it works.
#pragma once

#include "deform_conv_walk.cuh"

namespace dyhead::cuda {

template <class Op, bool kVectors, int kRows>
class InputTile {
 public:
  using T = typename Operand<Op>::Storage;
  using F = typename Operand<Op>::Compute;

  DYHEAD_DEVICE explicit InputTile(const DeformBwdInputParams& p)
      : p_(p),
        launch_(p.launch),
        at_(InputLayout::of(sizeof(T), sizeof(F), kRows, p.chunks, p.taps_at_once)),
        rows_(dynamic_shared<std::byte>(0, at_.panels)),
        panels_(dynamic_shared<std::byte>(at_.panels, at_.weights - at_.panels)),
        dots_(dynamic_shared<F>(at_.dots, 4 * p.taps_at_once * kRows)),
        samples_(dynamic_shared<SampleWeights>(at_.weights, p.taps_at_once * kRows),
                 dynamic_shared<SampleEntry>(at_.list, p.taps_at_once * kRows)),
        sums_(p),
        tile_(shared_place()) {
    if (threadIdx.x == 0) tile_.place = find_tile(p.launch, static_cast<int32_t>(blockIdx.x));
    __syncthreads();
    const int thread = tile_thread();
    if (thread < kRows) {
      tile_.pixels[thread] = tile_pixel(launch_, tile_.place, thread, kRows).index;
    }
    __syncthreads();
  }

  DYHEAD_DEVICE void run() {
    const DeformShape& s = launch_.shape;
    const DeformJob& job = launch_.jobs[tile_.place.job];
    const int group_channels = static_cast<int>(s.channels) / s.groups;
    const int depth_chunks = p_.panels.steps;
    const bool wants_predictions = p_.derivatives != nullptr && !job.plain();
    wants_dots_ =
        p_.scatter != Scatter::kMeasure && (wants_predictions || p_.gate_partial != nullptr);
    if (wants_dots_ && wants_predictions) clear_derivatives();
    for (int t = job.first_term; t < job.first_term + job.terms; ++t) {
      F gate_sum = F(0);
      for (int group = 0; group < s.groups; ++group) {
        for (int chunk = 0; chunk < depth_chunks; chunk += p_.chunks) {
          const int chunks = depth_chunks - chunk < p_.chunks ? depth_chunks - chunk : p_.chunks;
          load_rows(group, chunk, chunks);
          int panel = 0;
          int channel = group * group_channels;
          while (channel < (group + 1) * group_channels) {
            const ChannelStep longest =
                channel_step(s, group, channel, static_cast<int32_t>(s.channels));
            const int steps = (longest.last - channel + Step::kChannels - 1) / Step::kChannels;
            for (int tap = 0; tap < s.taps(); tap += p_.taps_at_once) {
              const int taps = s.taps() - tap < p_.taps_at_once ? s.taps() - tap : p_.taps_at_once;
              run_stretch(t, group, {channel, longest.last, longest.deform_group}, panel, tap, taps,
                          chunk, chunks);
              if (wants_dots_) gate_sum += add_derivatives(t, longest.deform_group, tap, taps);
            }
            panel += steps;
            channel = longest.last;
          }
        }
      }
      if (wants_dots_ && p_.gate_partial != nullptr) {
        write_gate_sum(t - job.first_term, gate_sum);
      }
    }
    if (p_.scatter == Scatter::kMeasure) sums_.publish_largest();
  }

 private:
  using Step = InputStep<T>;
  using Samples = SortedSamples<F, kRows>;
  using SampleWeights = typename Samples::Weights;
  // A strip of 8 columns for each tap and warp, so all warps have as many for any number of taps.
  static constexpr int kWarpsN = Step::kChannels / 8;
  using Product = TileProduct<Op, kRows, kMaxTapsAtOnce * Step::kChannels, kWarpsN>;
  static constexpr int kPanel = Step::kChannels * kRowBytes;
  static constexpr int kUnit = Step::kUnit;

  // In shared memory, since the products need the registers.
  struct Place {
    TilePlace place;
    int32_t pixels[kRows];  // index in the map, or -1
  };

  DYHEAD_DEVICE static Place& shared_place() {
    DYHEAD_SHARED(Place, place, 1);
    return place[0];
  }

  // Starts to load the gradients of `chunks` chunks of a group's outputs.
  DYHEAD_DEVICE void load_rows(int group, int first_chunk, int chunks) {
    const DeformJob& job = launch_.jobs[tile_.place.job];
    const int64_t channels = launch_.shape.out_channels;
    const int group_outputs = static_cast<int>(channels) / launch_.shape.groups;
    const int64_t first_row = job.out.first_row + tile_.place.image * job.out.pixels();
    const T* rows = static_cast<const T*>(p_.rows) + first_row * channels + group * group_outputs;
    __syncthreads();  // the products with the previous rows are done
    for (int i = tile_thread(); i < chunks * kRows * kUnits; i += kTileThreads) {
      const int unit = i % kUnits;
      const int row = i / kUnits % kRows;
      const int chunk = i / kUnits / kRows;
      const int output = (first_chunk + chunk) * p_.panels.depth + unit * kUnit;
      const int left = group_outputs - output;
      const int32_t pixel = tile_.pixels[row];
      const T* from = rows + (pixel < 0 ? 0 : pixel) * channels + (left > 0 ? output : 0);
      std::byte* to = rows_ + chunk * kRows * kRowBytes + unit_offset(row, unit);
      if (p_.row_vectors) {
        cp_async_zfill<16>(to, from, pixel < 0 || left <= 0 ? 0 : 16);
      } else {
        Vec<T, kUnit> values;
#pragma unroll
        for (int k = 0; k < kUnit; ++k) values[k] = pixel < 0 || k >= left ? T{} : from[k];
        store_vec(reinterpret_cast<T*>(to), values);
      }
    }
    cp_async_commit();
  }

  // For all steps of channels of a stretch and some taps: computes the gradient of the samples and
  // uses it.
  DYHEAD_DEVICE void run_stretch(int term_index, int group, const ChannelStep& stretch,
                                 int first_panel, int first_tap, int taps, int first_chunk,
                                 int chunks) {
    const DeformShape& s = launch_.shape;
    const DeformLaunchTerm& term = launch_.terms[term_index];
    // Panels of all taps are neighbours.
    const auto load = [&](int panel, int chunk) {
      const int64_t first = p_.panels.index(s, term.weight, group * p_.panels.column_panels + panel,
                                            first_chunk + chunk, first_tap);
      const std::byte* from = static_cast<const std::byte*>(p_.packed) + first * kPanel;
      std::byte* to = slot(chunk);
      for (int i = tile_thread() * 16; i < taps * kPanel; i += kTileThreads * 16) {
        cp_async<16>(to + i, from + i);
      }
      cp_async_commit();
    };
    load(first_panel, 0);
    const TapSampler<F> sampler =
        tap_sampler<F>(launch_, p_.predictions, p_.gates, tile_.place, term);
    samples_.stage(launch_, tile_.place, sampler, stretch.deform_group, first_tap, taps, columns());
    if (wants_dots_) {
      for (int i = tile_thread(); i < 4 * taps * kRows; i += kTileThreads) dots_[i] = F(0);
    }
    const MapShape& map = sampler.source;
    const int64_t first = (map.first_row + tile_.place.image * map.pixels()) * s.channels;
    Walk<Op, kVectors, kRows> walk(p_, samples_, columns(), dots_, wants_dots_, sums_);
    int panel = first_panel;
    for (int channel = stretch.first; channel < stretch.last; channel += Step::kChannels) {
      Product product(taps);
      for (int chunk = 0; chunk < chunks; ++chunk) {
        cp_async_wait_all();
        // This panel has landed for all threads, and the other slot and the columns are free.
        __syncthreads();
        if (chunk + 1 < chunks) load(panel, chunk + 1);
        const std::byte* a = rows_ + chunk * kRows * kRowBytes;
        const std::byte* b = slot(chunk);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) product.step(a, b, step);
      }
      __syncthreads();
      ++panel;
      if (channel + Step::kChannels < stretch.last) load(panel, 0);
      store_columns(product, taps);
      __syncthreads();
      const int left = stretch.last - channel;
      if (launch_.jobs[tile_.place.job].plain()) {
        walk.template run<1>(first + channel, map.width, left);
      } else {
        walk.template run<4>(first + channel, map.width, left);
      }
    }
    // The list, the dots and the columns are free for the next stretch.
    __syncthreads();
  }

  DYHEAD_DEVICE std::byte* slot(int chunk) const { return panels_ + chunk % 2 * at_.slot; }
  DYHEAD_DEVICE std::byte* columns() const { return slot(1); }

  DYHEAD_DEVICE void store_columns(Product& product, int taps) {
    constexpr int kPair = Product::kPair;
#pragma unroll
    for (int j = 0; j < Product::kJ; j += kPair) {
      if (j >= taps * kPair) break;
      const int column = product.column(j);
      const int tap = column / Step::kChannels;
      const int unit = column % Step::kChannels / kUnit;
#pragma unroll
      for (int i = 0; i < Product::kI; ++i) {
        const int sample = tap * kRows + product.row(i);
        T* to = reinterpret_cast<T*>(column_unit<kRows>(columns(), sample, unit)) + column % kUnit;
        if constexpr (is_half_v<T>) {
          *reinterpret_cast<uint32_t*>(to) = pack2<T>(product.at(i, j), product.at(i, j + 1));
        } else {
          Vec<T, kPair> values;
#pragma unroll
          for (int k = 0; k < kPair; ++k) values[k] = product.at(i, j + k);
          store_vec(to, values);
        }
      }
    }
  }

  // The first row of a term's derivatives for this image.
  DYHEAD_DEVICE int64_t use_row(int term_index) const {
    const DeformJob& job = launch_.jobs[tile_.place.job];
    const int64_t terms_before = term_index - job.first_term;
    return p_.use_first[tile_.place.job] +
           (terms_before * launch_.shape.images + tile_.place.image) * job.out.pixels();
  }

  DYHEAD_DEVICE void clear_derivatives() const {
    const DeformJob& job = launch_.jobs[tile_.place.job];
    const int columns = launch_.shape.prediction_columns();
    for (int t = job.first_term; t < job.first_term + job.terms; ++t) {
      F* derivatives = static_cast<F*>(p_.derivatives) + use_row(t) * columns;
      for (int i = tile_thread(); i < kRows * columns; i += kTileThreads) {
        const int32_t pixel = tile_.pixels[i / columns];
        if (pixel >= 0) derivatives[static_cast<int64_t>(pixel) * columns + i % columns] = F(0);
      }
    }
    __syncthreads();
  }

  // Turns the dots of a stretch into the derivatives of its taps. Returns this thread's part of the
  // gradient of the gate.
  DYHEAD_DEVICE F add_derivatives(int term_index, int deform_group, int first_tap, int taps) const {
    F gate_sum = F(0);
    const DeformShape& s = launch_.shape;
    const DeformJob& job = launch_.jobs[tile_.place.job];
    const TapSampler<F> sampler =
        tap_sampler<F>(launch_, p_.predictions, p_.gates, tile_.place, launch_.terms[term_index]);
    const bool wants_predictions = p_.derivatives != nullptr && !job.plain();
    F* derivatives = nullptr;
    if (wants_predictions) {
      derivatives = static_cast<F*>(p_.derivatives) + use_row(term_index) * s.prediction_columns();
    }
#pragma unroll 1
    for (int i = tile_thread(); i < taps * kRows; i += kTileThreads) {
      const OutputPixel at = tile_pixel(launch_, tile_.place, i % kRows, kRows);
      if (at.index < 0) continue;
      const int tap = first_tap + i / kRows;
      const SamplePoint<F> point = sampler.point(deform_group, tap, at);
      if (!point.inside) continue;
      const Vec<F, 4> sums = load_vec<4>(dots_ + 4 * i);
      const F dots[4] = {sums[0], sums[1], sums[2], sums[3]};
      F mask;
      const F modulation = sampler.modulation(deform_group, tap, at, &mask);
      const F value = sample_value(point, dots);
      gate_sum += value * mask;
      if (!wants_predictions) continue;
      const int k = deform_group * s.taps() + tap;
      F* row = derivatives + static_cast<int64_t>(at.index) * s.prediction_columns();
      row[2 * k] += modulation * sample_slope_y(point, dots);
      row[2 * k + 1] += modulation * sample_slope_x(point, dots);
      const F slope = s.mask_logits ? mask * (F(1) - mask) : F(1);
      row[s.offset_columns() + k] += value * sampler.gate * slope;
    }
    __syncthreads();  // the dots are free for the next stretch
    return gate_sum;
  }

  DYHEAD_DEVICE void write_gate_sum(int term, F gate_sum) {
    const F sum = warp_sum(gate_sum);
    const int thread = tile_thread();
    if (thread % kWarpSize == 0) dots_[thread / kWarpSize] = sum;
    __syncthreads();
    if (thread == 0) {
      F total = F(0);
      for (int w = 0; w < kTileWarps; ++w) total += dots_[w];
      static_cast<F*>(p_.gate_partial)[static_cast<int64_t>(blockIdx.x) * p_.max_terms + term] =
          total;
    }
    __syncthreads();
  }

  const DeformBwdInputParams& p_;
  const DeformLaunch& launch_;
  InputLayout at_;
  std::byte* rows_;    // the gradients of the outputs
  std::byte* panels_;  // two slots; the second one is also that of the columns
  F* dots_;            // [taps, kRows, 4]: products of the samples' gradients with their corners
  Samples samples_;
  ScatteredSums<F> sums_;
  bool wants_dots_ = false;
  Place& tile_;
};

template <class Op, bool kVectors, int kRows>
__global__ void __launch_bounds__(kTileThreads)
    deform_bwd_input_kernel(const __grid_constant__ DeformBwdInputParams p) {
  InputTile<Op, kVectors, kRows>(p).run();
}

template <class Op>
DeformBwdInputKernel DeformBwdInputKernels<Op>::choose(int rows, bool vectors) {
  if (rows == kFewInputRows) {
    return vectors ? deform_bwd_input_kernel<Op, true, kFewInputRows>
                   : deform_bwd_input_kernel<Op, false, kFewInputRows>;
  }
  if constexpr (is_half_v<typename Operand<Op>::Storage>) {
    if (rows == kMaxInputRows && vectors) return deform_bwd_input_kernel<Op, true, kMaxInputRows>;
  }
  return nullptr;
}

}  // namespace dyhead::cuda
