// The kernel of the gradient of the samples; deform_conv_bwd.h describes how it works.
#pragma once

#include "deform_conv.cuh"
#include "deform_conv_bwd.h"
#include "deform_conv_scatter.cuh"

namespace dyhead::cuda {

template <class Op, bool kVectors>
class InputTile {
 public:
  using T = typename Operand<Op>::Storage;
  using F = typename Operand<Op>::Compute;
  using Product = TileProduct<Op, kBwdRows, kBwdCols>;

  DYHEAD_DEVICE explicit InputTile(const DeformBwdInputParams& p)
      : p_(p),
        launch_(p.launch),
        a_(dynamic_shared<std::byte>(0, a_bytes())),
        b_(dynamic_shared<std::byte>(a_bytes(), kBwdStages * kPanel)),
        columns_(dynamic_shared<F>(columns_at(), kBwdRows * kPitch)),
        corners_(dynamic_shared<Corners<F>>(corners_at(), p.taps_at_once * kBwdRows)),
        dots_(dynamic_shared<F>(dots_at(), 4 * p.taps_at_once * kBwdRows)),
        at_(shared_place()) {
    if (threadIdx.x == 0) at_.place = find_tile(p.launch, static_cast<int32_t>(blockIdx.x));
    __syncthreads();
    const int thread = tile_thread();
    if (thread < kBwdRows) {
      at_.pixels[thread] = tile_pixel(launch_, at_.place, thread, kBwdRows).index;
    }
    __syncthreads();
    if (p.scatter == Scatter::kFixed) fixed_ = FixedPoint<F>::of(p.largest, p.sum_bits);
  }

  DYHEAD_DEVICE void run() {
    const DeformShape& s = launch_.shape;
    const DeformJob& job = launch_.jobs[at_.place.job];
    const int group_channels = static_cast<int>(s.channels) / s.groups;
    const int depth_chunks = p_.panels.steps;
    if (p_.scatter != Scatter::kMeasure) clear_derivatives();
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
            const int steps = (longest.last - channel + kBwdCols - 1) / kBwdCols;
            for (int tap = 0; tap < s.taps(); tap += p_.taps_at_once) {
              const int taps = s.taps() - tap < p_.taps_at_once ? s.taps() - tap : p_.taps_at_once;
              run_stretch(t, group, {channel, longest.last, longest.deform_group}, panel, tap, taps,
                          chunk, chunks);
              gate_sum += add_derivatives(t, longest.deform_group, tap, taps);
            }
            panel += steps;
            channel = longest.last;
          }
        }
      }
      if (p_.gate_partial != nullptr && p_.scatter != Scatter::kMeasure) {
        write_gate_sum(t - job.first_term, gate_sum);
      }
    }
    if (p_.scatter == Scatter::kMeasure) {
      const F largest = warp_largest(largest_);
      if (tile_thread() % kWarpSize == 0) raise_to(p_.largest, largest);
    }
  }

 private:
  static constexpr int kPanel = kBwdCols * kRowBytes;
  // Rows of fragments are eight floats apart in the memory banks, so stores have no conflicts.
  static constexpr int kPitch = kBwdCols + 8;
  static constexpr int kUnit = 16 / static_cast<int>(sizeof(T));
  static constexpr int kLanes = kBwdCols / kUnit;  // sharing the channels of a row
  // A lane's channels are pieces of 16 bytes of F, so that neighbouring lanes read neighbouring
  // columns and add to whole sectors.
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(F));
  static constexpr int kPieces = kUnit / kPiece;
  static constexpr int kSpacing = kBwdCols / kPieces;
  using Values = Gather<Op, kVectors, kPieces, kSpacing>;

  // In shared memory, since the products need the registers.
  struct Place {
    TilePlace place;
    int32_t pixels[kBwdRows];  // index in the map, or -1
  };

  DYHEAD_DEVICE static Place& shared_place() {
    DYHEAD_SHARED(Place, place, 1);
    return place[0];
  }

  DYHEAD_DEVICE size_t a_bytes() const {
    return static_cast<size_t>(p_.chunks) * kBwdRows * kRowBytes;
  }
  DYHEAD_DEVICE size_t columns_at() const { return a_bytes() + kBwdStages * kPanel; }
  DYHEAD_DEVICE size_t corners_at() const { return columns_at() + sizeof(F) * kBwdRows * kPitch; }
  DYHEAD_DEVICE size_t dots_at() const {
    return corners_at() + sizeof(Corners<F>) * p_.taps_at_once * kBwdRows;
  }

  // Starts to load the gradients of `chunks` chunks of a group's outputs.
  DYHEAD_DEVICE void load_rows(int group, int first_chunk, int chunks) {
    const DeformJob& job = launch_.jobs[at_.place.job];
    const int64_t channels = launch_.shape.out_channels;
    const int group_outputs = static_cast<int>(channels) / launch_.shape.groups;
    const int64_t first_row = job.out.first_row + at_.place.image * job.out.pixels();
    const T* rows = static_cast<const T*>(p_.rows) + first_row * channels + group * group_outputs;
    __syncthreads();  // the products with the previous rows are done
    for (int i = tile_thread(); i < chunks * kBwdRows * kUnits; i += kTileThreads) {
      const int unit = i % kUnits;
      const int row = i / kUnits % kBwdRows;
      const int chunk = i / kUnits / kBwdRows;
      const int output = (first_chunk + chunk) * p_.panels.depth + unit * kUnit;
      const int left = group_outputs - output;
      const int32_t pixel = at_.pixels[row];
      const T* from = rows + (pixel < 0 ? 0 : pixel) * channels + (left > 0 ? output : 0);
      std::byte* to = a_ + chunk * kBwdRows * kRowBytes + unit_offset(row, unit);
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

  // For all steps of channels and all taps of a stretch: computes the gradient of the samples and
  // uses it.
  DYHEAD_DEVICE void run_stretch(int term_index, int group, const ChannelStep& stretch,
                                 int first_panel, int first_tap, int taps, int first_chunk,
                                 int chunks) {
    const DeformShape& s = launch_.shape;
    const DeformLaunchTerm& term = launch_.terms[term_index];
    const TapSampler<F> sampler =
        tap_sampler<F>(launch_, p_.predictions, p_.gates, at_.place, term);
    const int thread = tile_thread();
    stage_corners(launch_, at_.place, sampler, stretch.deform_group, first_tap, taps, kBwdRows,
                  corners_);
    for (int i = thread; i < 4 * taps * kBwdRows; i += kTileThreads) dots_[i] = F(0);

    const int steps = (stretch.last - stretch.first + kBwdCols - 1) / kBwdCols;
    const int total = steps * taps * chunks;
    // The next panel to load.
    int next = 0, next_chunk = 0, next_tap = 0, next_panel = first_panel;
    const auto load_next = [&] {
      if (next < total) {
        const int64_t panel =
            p_.panels.index(s, term.weight, group * p_.panels.column_panels + next_panel,
                            first_chunk + next_chunk, first_tap + next_tap);
        load_panel<kBwdCols>(b_ + next % kBwdStages * kPanel,
                             static_cast<const std::byte*>(p_.packed) + panel * kPanel);
        ++next;
        if (++next_chunk == chunks) {
          next_chunk = 0;
          if (++next_tap == taps) {
            next_tap = 0;
            ++next_panel;
          }
        }
      }
      cp_async_commit();
    };
    for (int i = 0; i < kBwdStages - 1; ++i) load_next();

    const MapShape& map = sampler.source;
    const int64_t first = (map.first_row + at_.place.image * map.pixels()) * s.channels;
    int chunk = 0, tap = 0, channel = stretch.first;
    Product product;
    for (int i = 0; i < total; ++i) {
      cp_async_wait_group<kBwdStages - 2>();
      // This panel has landed for all threads, and the previous panel and the columns are free.
      __syncthreads();
      load_next();
      const std::byte* a = a_ + chunk * kBwdRows * kRowBytes;
      const std::byte* b = b_ + i % kBwdStages * kPanel;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) product.step(a, b, step);
      if (++chunk < chunks) continue;
      chunk = 0;
#pragma unroll
      for (int k = 0; k < Product::kI; ++k) {
#pragma unroll
        for (int j = 0; j < Product::kJ; ++j) {
          columns_[product.row(k) * kPitch + product.column(j)] = product.at(k, j);
        }
      }
      product.clear();
      __syncthreads();
      consume(first + channel, stretch.last - channel, tap);
      if (++tap == taps) {
        tap = 0;
        channel += kBwdCols;
      }
    }
    cp_async_wait_all();
    __syncthreads();
  }

  // Uses the gradient of one tap's samples. `at` is the index of the first channel at the map's
  // first pixel.
  DYHEAD_DEVICE void consume(int64_t at, int channels, int tap) {
    const int thread = tile_thread();
    const int first = thread % kLanes * kPiece;
    const int left = channels - first;
    const T* source = static_cast<const T*>(p_.source) + at + first;
    const int stride = static_cast<int>(launch_.shape.channels);
#pragma unroll 1
    for (int row = thread / kLanes; row < kBwdRows; row += kTileThreads / kLanes) {
      const Corners<F>& corners = corners_[tap * kBwdRows + row];
      const bool measure = p_.scatter == Scatter::kMeasure;
      Values values;
      if (!measure) values.load(corners, source, stride, left);
      F grad[kUnit];
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const auto part = load_vec<kPiece>(columns_ + row * kPitch + piece * kSpacing + first);
#pragma unroll
        for (int k = 0; k < kPiece; ++k) grad[piece * kPiece + k] = part[k];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t pixel = corners.pixel[i];
        if (pixel < 0 || left <= 0) continue;
        const int64_t offset = static_cast<int64_t>(pixel) * stride;
        scatter(at + first + offset, corners.weight[i], grad, left);
      }
      if (measure) continue;
      F dots[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) dots[i] = values.dot(i, grad);
      add_dots(dots, tap * kBwdRows + row);
    }
  }

  DYHEAD_DEVICE void scatter(int64_t at, F weight, const F (&grad)[kUnit], int left) {
    if (p_.scatter == Scatter::kSum) {
      F* to = static_cast<F*>(p_.sums) + at;
      if constexpr (kVectors && std::is_same_v<F, float>) {
#pragma unroll
        for (int k = 0; k < kUnit; k += 4) {
          if (Values::channel(k) >= left) break;
          red_add_v4(to + Values::channel(k),
                     make_float4(weight * grad[k], weight * grad[k + 1], weight * grad[k + 2],
                                 weight * grad[k + 3]));
        }
      } else {
#pragma unroll
        for (int k = 0; k < kUnit; ++k) {
          if (Values::channel(k) < left) add_float(to + Values::channel(k), weight * grad[k]);
        }
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      const int channel = Values::channel(k);
      if (channel >= left) break;
      const F value = weight * grad[k];
      if (!is_finite(value)) {
        if (p_.scatter == Scatter::kFixed) NonFiniteMarks::add(p_.largest, at + channel, value);
      } else if (p_.scatter == Scatter::kMeasure) {
        largest_ = largest_ > fabs(value) ? largest_ : fabs(value);
      } else {
        constexpr int kWords = FixedPoint<F>::kWords;
        fixed_.add(static_cast<unsigned long long*>(p_.sums) + (at + channel) * kWords, value);
      }
    }
  }

  // Sums over the lanes of a row by halving: in each round a lane keeps half of its sums and hands
  // the other half to its partner.
  DYHEAD_DEVICE void add_dots(const F (&dots)[4], int sample) {
    const int lane = tile_thread() % kLanes;
    const bool odd = lane & 1;
    const bool upper = lane & 2;
    F two[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const F kept = odd ? dots[2 + i] : dots[i];
      two[i] = kept + __shfl_xor_sync(kFullMask, odd ? dots[i] : dots[2 + i], 1);
    }
    F one = (upper ? two[1] : two[0]) + __shfl_xor_sync(kFullMask, upper ? two[0] : two[1], 2);
#pragma unroll
    for (int distance = 4; distance < kLanes; distance *= 2) {
      one += __shfl_xor_sync(kFullMask, one, distance);
    }
    // The same lanes keep these sums at every step of channels, so no other thread writes here.
    if (lane < 4) dots_[4 * sample + 2 * (lane & 1) + (lane >> 1)] += one;
  }

  // The first row of a term's derivatives for this image.
  DYHEAD_DEVICE int64_t use_row(int term_index) const {
    const DeformJob& job = launch_.jobs[at_.place.job];
    const int64_t terms_before = term_index - job.first_term;
    return p_.use_first[at_.place.job] +
           (terms_before * launch_.shape.images + at_.place.image) * job.out.pixels();
  }

  DYHEAD_DEVICE void clear_derivatives() const {
    const DeformJob& job = launch_.jobs[at_.place.job];
    if (job.plain()) return;
    const int columns = launch_.shape.prediction_columns();
    for (int t = job.first_term; t < job.first_term + job.terms; ++t) {
      F* derivatives = static_cast<F*>(p_.derivatives) + use_row(t) * columns;
      for (int i = tile_thread(); i < kBwdRows * columns; i += kTileThreads) {
        const int32_t pixel = at_.pixels[i / columns];
        if (pixel >= 0) derivatives[static_cast<int64_t>(pixel) * columns + i % columns] = F(0);
      }
    }
    __syncthreads();
  }

  // Turns the dots of a stretch into the derivatives of its taps. Returns this thread's part of the
  // gradient of the gate.
  DYHEAD_DEVICE F add_derivatives(int term_index, int deform_group, int first_tap, int taps) const {
    F gate_sum = F(0);
    if (p_.scatter == Scatter::kMeasure) return gate_sum;
    const DeformShape& s = launch_.shape;
    const DeformJob& job = launch_.jobs[at_.place.job];
    const TapSampler<F> sampler =
        tap_sampler<F>(launch_, p_.predictions, p_.gates, at_.place, launch_.terms[term_index]);
    F* derivatives = static_cast<F*>(p_.derivatives) + use_row(term_index) * s.prediction_columns();
#pragma unroll 1
    for (int i = tile_thread(); i < taps * kBwdRows; i += kTileThreads) {
      const OutputPixel at = tile_pixel(launch_, at_.place, i % kBwdRows, kBwdRows);
      if (at.index < 0) continue;
      const int tap = first_tap + i / kBwdRows;
      const SamplePoint<F> point = sampler.point(deform_group, tap, at);
      const F dots[4] = {dots_[4 * i], dots_[4 * i + 1], dots_[4 * i + 2], dots_[4 * i + 3]};
      F mask;
      const F modulation = sampler.modulation(deform_group, tap, at, &mask);
      const F value = sample_value(point, dots);
      gate_sum += value * mask;
      if (job.plain()) continue;
      const int k = deform_group * s.taps() + tap;
      F* row = derivatives + static_cast<int64_t>(at.index) * s.prediction_columns();
      row[2 * k] += modulation * sample_slope_y(point, dots);
      row[2 * k + 1] += modulation * sample_slope_x(point, dots);
      const F slope = s.mask_logits ? mask * (F(1) - mask) : F(1);
      row[s.offset_columns() + k] += value * sampler.gate * slope;
    }
    // The corners and dots are free for the next stretch.
    __syncthreads();
    return gate_sum;
  }

  DYHEAD_DEVICE void write_gate_sum(int term, F gate_sum) {
    const F sum = warp_sum(gate_sum);
    const int thread = tile_thread();
    if (thread % kWarpSize == 0) columns_[thread / kWarpSize] = sum;
    __syncthreads();
    if (thread == 0) {
      F total = F(0);
      for (int w = 0; w < kTileWarps; ++w) total += columns_[w];
      static_cast<F*>(p_.gate_partial)[static_cast<int64_t>(blockIdx.x) * p_.max_terms + term] =
          total;
    }
    __syncthreads();
  }

  const DeformBwdInputParams& p_;
  const DeformLaunch& launch_;
  std::byte *a_, *b_;
  F* columns_;           // [kBwdRows, kPitch]: the gradient of one tap's samples
  Corners<F>* corners_;  // [taps, kBwdRows]
  F* dots_;  // [taps, kBwdRows, 4]: products of that gradient with the values at the corners
  Place& at_;
  FixedPoint<F> fixed_{};
  F largest_ = F(0);
};

template <class Op, bool kVectors>
__global__ void __launch_bounds__(kTileThreads, Operand<Op>::kTensor&& kVectors ? 2 : 1)
    deform_bwd_input_kernel(const __grid_constant__ DeformBwdInputParams p) {
  InputTile<Op, kVectors>(p).run();
}

template <class Op>
DeformBwdInputKernel DeformBwdInputKernels<Op>::choose(bool vectors) {
  return vectors ? deform_bwd_input_kernel<Op, true> : deform_bwd_input_kernel<Op, false>;
}

}  // namespace dyhead::cuda
