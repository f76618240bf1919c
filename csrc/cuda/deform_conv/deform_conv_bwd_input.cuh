// The kernel of the gradient of the samples; deform_conv_bwd.h describes how it works.
#pragma once

#include "deform_conv_walk.cuh"

namespace dyhead::cuda {

// The columns of a tile: a step of channels for each tap. A warp has a strip of 8 of them for each
// tap, so all warps have as many for any number of taps.
template <class Op, int kRows, class Step = InputStep<typename Operand<Op>::Storage>>
using InputColumns = TileProduct<Op, kRows, kMaxTapsAtOnce * Step::kChannels, Step::kChannels / 8>;

// The gradients of a tile's samples: the product of the gradients of the outputs and the panels of
// weights.
template <class Op, int kRows>
class InputProduct : public InputColumns<Op, kRows> {
 public:
  DYHEAD_DEVICE explicit InputProduct(int taps) : InputColumns<Op, kRows>(taps) {}

  // By each thread when its copies have landed; a barrier follows.
  DYHEAD_DEVICE static void landed() {}

  // Adds a chunk: `rows` and `panels` have landed for all threads, and all have done with the other
  // slot, which load_next() starts to fill.
  template <class Load>
  DYHEAD_DEVICE void multiply(const std::byte* rows, const std::byte* panels, int /*chunk*/,
                              Load&& load_next) {
    load_next();
#pragma unroll
    for (int part = 0; part < kSteps; ++part) this->step(rows, panels, part);
  }

  // After the last chunk.
  DYHEAD_DEVICE void finish() {}
};

// Product: InputProduct or another with its functions.
template <class Op, int kRows, bool kVectors, class Product = InputProduct<Op, kRows>>
class InputTile {
 public:
  using T = typename Operand<Op>::Storage;
  using F = typename Operand<Op>::Compute;

  DYHEAD_DEVICE explicit InputTile(const DeformBwdInputParams& p)
      : p_(p), launch_(p.launch), tile_(shared_place()) {
    if (threadIdx.x == 0) tile_.place = find_tile(p.launch, static_cast<int32_t>(blockIdx.x));
    __syncthreads();
    const int thread = tile_thread();
    if (thread < kRows) {
      tile_.pixels[thread] = tile_pixel(launch_, tile_.place, thread, kRows).index;
    }
    __syncthreads();
  }

  DYHEAD_DEVICE void run() {
    if (wants_dots() && wants_predictions()) clear_derivatives();
    F gate_sum = F(0);
    for (bool more = first_stretch(); more; more = next_stretch()) {
      if (tile_.stretch.new_rows) load_rows();
      run_stretch();
      if (!wants_dots()) continue;
      const bool ends_term = tile_.stretch.ends_term;
      gate_sum += add_derivatives();
      if (p_.gate_partial != nullptr && ends_term) {
        write_gate_sum(gate_sum);
        gate_sum = F(0);
      }
    }
  }

 private:
  using Step = InputStep<T>;
  using Samples = SortedSamples<F, kRows>;
  using SampleWeights = typename Samples::Weights;
  static constexpr int kPanel = Step::kChannels * kRowBytes;
  static constexpr int kUnit = Step::kUnit;

  // What is done at once: some taps and some chunks of the depth of one term, for consecutive
  // channels of one group and one deformable group.
  struct Stretch {
    int32_t term;
    int32_t group;
    int32_t chunk, chunks;
    ChannelStep channels;
    int32_t panel;  // of the group's first step
    int32_t tap, taps;
    bool new_rows;   // whether chunks of the gradients of the outputs must be loaded
    bool ends_term;  // whether it is the last one of its term
  };

  // In shared memory, since the products need the registers.
  struct Place {
    TilePlace place;
    Stretch stretch;
    int32_t pixels[kRows];  // index in the map, or -1
    typename Samples::Counts samples;
  };

  DYHEAD_DEVICE static Place& shared_place() {
    DYHEAD_SHARED(Place, place, 1);
    return place[0];
  }

  DYHEAD_DEVICE int group_channels() const {
    return static_cast<int>(launch_.shape.channels) / launch_.shape.groups;
  }

  DYHEAD_DEVICE bool first_stretch() const {
    if (tile_thread() == 0) {
      tile_.stretch = {};
      tile_.stretch.term = launch_.jobs[tile_.place.job].first_term;
      tile_.stretch.new_rows = true;
      complete_stretch();
    }
    __syncthreads();
    return launch_.jobs[tile_.place.job].terms > 0;
  }

  // Taps change first, then channels, chunks, groups, and terms last. All threads have done with
  // the stretch before.
  DYHEAD_DEVICE bool next_stretch() const {
    const DeformShape& s = launch_.shape;
    if (tile_thread() == 0) {
      Stretch& to = tile_.stretch;
      const int32_t part = to.chunk;
      const int32_t group = to.group;
      to.tap += to.taps;
      if (to.tap == s.taps()) {
        to.tap = 0;
        to.panel += (to.channels.last - to.channels.first + Step::kChannels - 1) / Step::kChannels;
        to.channels.first = to.channels.last;
        if (to.channels.first == (to.group + 1) * group_channels()) {
          to.panel = 0;
          to.chunk += to.chunks;
          if (to.chunk == p_.panels.steps) {
            to.chunk = 0;
            if (++to.group == s.groups) {
              to.group = 0;
              ++to.term;
            }
          }
          to.channels.first = to.group * group_channels();
        }
      }
      to.new_rows = to.chunk != part || to.group != group;
      complete_stretch();
    }
    __syncthreads();
    const DeformJob& job = launch_.jobs[tile_.place.job];
    return tile_.stretch.term < job.first_term + job.terms;
  }

  // From where a stretch begins to where it ends.
  DYHEAD_DEVICE void complete_stretch() const {
    const DeformShape& s = launch_.shape;
    Stretch& to = tile_.stretch;
    const int32_t taps_left = s.taps() - to.tap;
    const int32_t chunks_left = p_.panels.steps - to.chunk;
    to.taps = taps_left < p_.taps_at_once ? taps_left : p_.taps_at_once;
    to.chunks = chunks_left < p_.chunks ? chunks_left : p_.chunks;
    to.channels = channel_step(s, to.group, to.channels.first, static_cast<int32_t>(s.channels));
    to.ends_term = to.tap + to.taps == s.taps() && to.chunk + to.chunks == p_.panels.steps &&
                   to.channels.last == static_cast<int32_t>(s.channels);
  }

  // The arrays of dynamic shared memory. Found anew where they are used, since the products need
  // the registers.
  DYHEAD_DEVICE InputLayout layout() const {
    return InputLayout::of(sizeof(T), sizeof(F), kRows, p_.chunks, p_.taps_at_once);
  }
  // The gradients of the outputs.
  DYHEAD_DEVICE std::byte* rows() const {
    return dynamic_shared<std::byte>(0, static_cast<size_t>(layout().panels));
  }
  DYHEAD_DEVICE std::byte* slot(int chunk) const {
    const InputLayout at = layout();
    return dynamic_shared<std::byte>(static_cast<size_t>(at.panels),
                                     static_cast<size_t>(at.weights - at.panels)) +
           chunk % 2 * at.slot;
  }
  // Also scratch memory while samples are sorted.
  DYHEAD_DEVICE std::byte* columns() const { return slot(1); }
  // [taps, kRows, 4]: products of the gradients of the samples with the values at their corners.
  DYHEAD_DEVICE F* dots() const {
    return dynamic_shared<F>(static_cast<size_t>(layout().dots),
                             static_cast<size_t>(4 * p_.taps_at_once * kRows));
  }
  DYHEAD_DEVICE Samples samples() const {
    const InputLayout at = layout();
    const auto count = static_cast<size_t>(p_.taps_at_once * kRows);
    return {dynamic_shared<SampleWeights>(static_cast<size_t>(at.weights), count),
            dynamic_shared<SampleEntry>(static_cast<size_t>(at.list), count), tile_.samples};
  }

  DYHEAD_DEVICE bool wants_predictions() const {
    return p_.derivatives != nullptr && !launch_.jobs[tile_.place.job].plain();
  }
  DYHEAD_DEVICE bool wants_dots() const {
    return wants_predictions() || p_.gate_partial != nullptr;
  }

  // Starts to load the stretch's chunks of the gradients of the outputs.
  DYHEAD_DEVICE void load_rows() const {
    const Stretch& now = tile_.stretch;
    const DeformJob& job = launch_.jobs[tile_.place.job];
    const int64_t channels = launch_.shape.out_channels;
    const int group_outputs = static_cast<int>(channels) / launch_.shape.groups;
    const int64_t first_row = job.out.first_row + tile_.place.image * job.out.pixels();
    const T* grads =
        static_cast<const T*>(p_.rows) + first_row * channels + now.group * group_outputs;
    for (int i = tile_thread(); i < now.chunks * kRows * kUnits; i += kTileThreads) {
      const int unit = i % kUnits;
      const int row = i / kUnits % kRows;
      const int chunk = i / kUnits / kRows;
      const int output = (now.chunk + chunk) * p_.panels.depth + unit * kUnit;
      const int left = group_outputs - output;
      const int32_t pixel = tile_.pixels[row];
      const T* from = grads + (pixel < 0 ? 0 : pixel) * channels + (left > 0 ? output : 0);
      std::byte* to = rows() + chunk * kRows * kRowBytes + unit_offset(row, unit);
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

  // Starts to load the panels of a step of channels: those of all taps are neighbours.
  DYHEAD_DEVICE void load_panels(int panel, int chunk) const {
    const Stretch& now = tile_.stretch;
    const int column = now.group * p_.panels.column_panels + panel;
    const int64_t first = p_.panels.index(launch_.shape, launch_.terms[now.term].weight, column,
                                          now.chunk + chunk, now.tap);
    const std::byte* from = static_cast<const std::byte*>(p_.packed) + first * kPanel;
    std::byte* to = slot(chunk);
    const int bytes = now.taps * kPanel;
    for (int i = tile_thread() * 16; i < bytes; i += kTileThreads * 16) {
      cp_async<16>(to + i, from + i);
    }
    cp_async_commit();
  }

  // For all steps of channels: computes the gradient of the samples and uses it.
  DYHEAD_DEVICE void run_stretch() const {
    const Stretch& now = tile_.stretch;
    load_panels(now.panel, 0);
    const TapSampler<F> sampler =
        tap_sampler<F>(launch_, p_.predictions, p_.gates, tile_.place, launch_.terms[now.term]);
    samples().stage(launch_, tile_.place, sampler, now.channels.deform_group, now.tap, now.taps,
                    wants_dots(), columns());
    if (wants_dots()) {
      for (int i = tile_thread(); i < 4 * now.taps * kRows; i += kTileThreads) dots()[i] = F(0);
    }
    for (int step = 0; now.channels.first + step * Step::kChannels < now.channels.last; ++step) {
      Product product(now.taps);
      for (int chunk = 0; chunk < now.chunks; ++chunk) {
        cp_async_wait_all();
        Product::landed();
        // This panel has landed for all threads, and the columns are free.
        __syncthreads();
        product.multiply(rows() + chunk * kRows * kRowBytes, slot(chunk), chunk, [&] {
          if (chunk + 1 < now.chunks) load_panels(now.panel + step, chunk + 1);
        });
      }
      product.finish();
      __syncthreads();
      const int channel = now.channels.first + step * Step::kChannels;
      if (channel + Step::kChannels < now.channels.last) load_panels(now.panel + step + 1, 0);
      store_columns(product, now.taps);
      __syncthreads();
      use_columns(channel, now.channels.last - channel);
    }
    // The list, the dots and the columns are free for the next stretch.
    __syncthreads();
  }

  // channels: how many the step has, from `channel` on.
  DYHEAD_DEVICE void use_columns(int channel, int channels) const {
    const MapShape& map = launch_.sources[launch_.terms[tile_.stretch.term].source].map;
    const int64_t first_row = map.first_row + tile_.place.image * map.pixels();
    const int64_t at = first_row * launch_.shape.channels + channel;
    Walk<Op, kRows, kVectors> walk(p_, samples(), columns(), wants_dots() ? dots() : nullptr);
    if (launch_.jobs[tile_.place.job].plain()) {
      walk.template run<1>(at, map.width, channels);
    } else {
      walk.template run<4>(at, map.width, channels);
    }
  }

  DYHEAD_DEVICE void store_columns(Product& product, int taps) const {
    constexpr int kPair = Product::kPair;
#pragma unroll
    for (int j = 0; j < Product::kJ; j += kPair) {
      if (j >= taps * (Product::kJ / kMaxTapsAtOnce)) break;
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
  DYHEAD_DEVICE F add_derivatives() const {
    F gate_sum = F(0);
    const Stretch& now = tile_.stretch;
    const DeformShape& s = launch_.shape;
    const int deform_group = now.channels.deform_group;
    const TapSampler<F> sampler =
        tap_sampler<F>(launch_, p_.predictions, p_.gates, tile_.place, launch_.terms[now.term]);
    F* derivatives = nullptr;
    if (wants_predictions()) {
      derivatives = static_cast<F*>(p_.derivatives) + use_row(now.term) * s.prediction_columns();
    }
#pragma unroll 1
    for (int i = tile_thread(); i < now.taps * kRows; i += kTileThreads) {
      const OutputPixel at = tile_pixel(launch_, tile_.place, i % kRows, kRows);
      if (at.index < 0) continue;
      const int tap = now.tap + i / kRows;
      const SamplePoint<F> point = sampler.point(deform_group, tap, at);
      const Vec<F, 4> sums = load_vec<4>(dots() + 4 * i);
      const F dots[4] = {sums[0], sums[1], sums[2], sums[3]};
      F mask;
      const F modulation = sampler.modulation(deform_group, tap, at, &mask);
      const F value = sample_value(point, dots);
      gate_sum += value * mask;
      if (!wants_predictions()) continue;
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

  DYHEAD_DEVICE void write_gate_sum(F gate_sum) const {
    const int term = tile_.stretch.term - launch_.jobs[tile_.place.job].first_term;
    const F sum = warp_sum(gate_sum);
    const int thread = tile_thread();
    if (thread % kWarpSize == 0) dots()[thread / kWarpSize] = sum;
    __syncthreads();
    if (thread == 0) {
      F total = F(0);
      for (int w = 0; w < kTileWarps; ++w) total += dots()[w];
      static_cast<F*>(p_.gate_partial)[static_cast<int64_t>(blockIdx.x) * p_.max_terms + term] =
          total;
    }
    __syncthreads();
  }

  const DeformBwdInputParams& p_;
  const DeformLaunch& launch_;
  Place& tile_;
};

template <class Op, int kRows, bool kVectors>
__global__ void __launch_bounds__(kTileThreads, 1)
    deform_bwd_input_kernel(const __grid_constant__ DeformBwdInputParams p) {
  InputTile<Op, kRows, kVectors>(p).run();
}

template <class Op>
DeformBwdInputKernel DeformBwdInputKernels<Op>::choose(int rows, bool vectors) {
  if (rows == kFewInputRows) {
    return vectors ? deform_bwd_input_kernel<Op, kFewInputRows, true>
                   : deform_bwd_input_kernel<Op, kFewInputRows, false>;
  }
  if constexpr (is_half_v<typename Operand<Op>::Storage>) {
    if (rows == kMaxInputRows && vectors) return deform_bwd_input_kernel<Op, kMaxInputRows, true>;
  }
  return nullptr;
}

}  // namespace dyhead::cuda
