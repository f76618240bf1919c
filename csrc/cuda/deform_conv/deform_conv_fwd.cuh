// The forward kernel of deform_conv; deform_conv.h describes how it works.
#pragma once

#include "../../common/upsample.h"
#include "deform_conv_gather.cuh"
#include "deform_conv_moments.cuh"

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
    const int parts = at_.shared < 0 ? 1 : p_.split.parts;
    const int first_tap = s.taps() * at_.part / parts;
    const int last_tap = s.taps() * (at_.part + 1) / parts;
    for (int t = job.first_term; t < job.first_term + job.terms; ++t) {
      int step = 0;
      int channel = group * group_channels;
      while (channel < (group + 1) * group_channels) {
        const Stretch stretch = stretch_from(group, channel);
        for (int tap = first_tap; tap < last_tap; tap += p_.taps_at_once) {
          const int taps = last_tap - tap < p_.taps_at_once ? last_tap - tap : p_.taps_at_once;
          multiply_stretch(launch_.terms[t], stretch, step, tap, taps);
        }
        step += stretch.steps;
        channel = stretch.last;
      }
    }
    // Other threads may still read the buffers.
    __syncthreads();
    if constexpr (kShares) {
      if (at_.shared >= 0 && !add_parts(parts)) return;
    }
    finish();
  }

 private:
  // In shared memory, since the products need the registers.
  struct Place {
    TilePlace place;
    int32_t tile;
    int32_t column;         // group * column_panels + panel
    int32_t shared, part;   // index among the tiles that blocks share, or -1; this block's part
    int32_t pixels[kRows];  // index in the map, or -1
  };

  DYHEAD_DEVICE static Place& shared_place() {
    DYHEAD_SHARED(Place, place, 1);
    return place[0];
  }

  // Consecutive channel steps of one deformable group: they read the same samples.
  struct Stretch {
    int first, last, steps, deform_group;
  };

  DYHEAD_DEVICE Stretch stretch_from(int group, int channel) const {
    const int depth = p_.panels.depth;
    const ChannelStep longest =
        channel_step(launch_.shape, group, channel, static_cast<int32_t>(launch_.shape.channels));
    return {channel, longest.last, (longest.last - channel + depth - 1) / depth,
            longest.deform_group};
  }

  // The main loop, and all that a kernel with producer and consumer warps (wgmma on sm_90a) would
  // replace: samples, panels and the epilogue would stay as they are. A panel is an exact image of
  // shared memory, permuted as wgmma reads it, so one bulk copy can load it.
  DYHEAD_DEVICE void multiply_stretch(const DeformLaunchTerm& term, const Stretch& stretch,
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
                  sample_stride<T, kVectors>(launch_.shape), samples);
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

  // Where this block's thread keeps value `i` of its part, or of another one.
  DYHEAD_DEVICE F* part_sum(int part, int i) const {
    constexpr int kValues = Product::kI * Product::kJ;
    const int64_t first = (static_cast<int64_t>(at_.shared) * p_.split.parts + part) * kValues;
    return static_cast<F*>(p_.part_sums) + (first + i) * kTileThreads + tile_thread();
  }

  // Stores the sums of this block's part. The last block of a tile gets those of all parts, added
  // in their order, and returns true.
  DYHEAD_DEVICE bool add_parts(int parts) {
#pragma unroll
    for (int i = 0; i < Product::kI; ++i) {
#pragma unroll
      for (int j = 0; j < Product::kJ; ++j) {
        *part_sum(at_.part, i * Product::kJ + j) = product_.at(i, j);
      }
    }
    if (!arrive_is_last(p_.parts_arrived + at_.shared, parts)) return false;
#pragma unroll
    for (int i = 0; i < Product::kI; ++i) {
#pragma unroll
      for (int j = 0; j < Product::kJ; ++j) {
        F sum = F(0);
        for (int part = 0; part < parts; ++part) sum += *part_sum(part, i * Product::kJ + j);
        product_.at(i, j) = sum;
      }
    }
    return true;
  }

  // The columns of the tile that are output channels of its group: the first one and their number.
  struct Columns {
    int first, count;
  };

  DYHEAD_DEVICE Columns columns() const {
    const int group_outputs = static_cast<int>(launch_.shape.out_channels) / launch_.shape.groups;
    const int before = at_.column % p_.panels.column_panels * kCols;
    const int left = group_outputs - before;
    return {at_.column / p_.panels.column_panels * group_outputs + before,
            left < kCols ? left : kCols};
  }

  DYHEAD_DEVICE void finish() {
    const DeformJob& job = launch_.jobs[at_.place.job];
    const int64_t channels = launch_.shape.out_channels;
    const Columns columns = this->columns();
    if (p_.packed_bias != nullptr) {
      const F* bias = static_cast<const F*>(p_.packed_bias) +
                      launch_.terms[job.first_term].weight * channels + columns.first;
#pragma unroll
      for (int j = 0; j < Product::kJ; ++j) {
        const int column = product_.column(j);
        const F value = column < columns.count ? bias[column] : F(0);
#pragma unroll
        for (int i = 0; i < Product::kI; ++i) product_.at(i, j) += value;
      }
    }
    const int64_t first_row = job.out.first_row + at_.place.image * job.out.pixels();
    const int64_t start = first_row * channels + columns.first;
    if constexpr (is_half_v<T>) {
      if (p_.out_in_compute_dtype) {
        store_values(static_cast<F*>(p_.out) + start, columns.count);
      } else if (p_.out_vectors) {
        store_half_vectors(static_cast<T*>(p_.out) + start, columns.count);
      } else {
        store_values(static_cast<T*>(p_.out) + start, columns.count);
      }
    } else {
      store_values(static_cast<T*>(p_.out) + start, columns.count);
    }
    if (p_.moments) write_moments(columns);
  }

  template <class Out>
  DYHEAD_DEVICE void store_values(Out* out, int columns) {
    const int64_t channels = launch_.shape.out_channels;
    constexpr int kPair = Product::kPair;
#pragma unroll
    for (int i = 0; i < Product::kI; ++i) {
      const int32_t pixel = at_.pixels[product_.row(i)];
      if (pixel < 0) continue;
      Out* row = out + pixel * channels;
#pragma unroll
      for (int j = 0; j < Product::kJ; j += kPair) {
        const int column = product_.column(j);
        if (p_.out_vectors && column < columns) {
          Vec<Out, kPair> v;
#pragma unroll
          for (int k = 0; k < kPair; ++k) v[k] = from_compute<Out>(product_.at(i, j + k));
          store_vec(row + column, v);
        } else {
#pragma unroll
          for (int k = 0; k < kPair; ++k) {
            if (column + k < columns) row[column + k] = from_compute<Out>(product_.at(i, j + k));
          }
        }
      }
    }
  }

  // Four lanes hold two columns each of four neighbouring fragments of eight columns. They exchange
  // pairs so that each stores a whole fragment of 16 bytes, which fills sectors of memory instead
  // of halves of them.
  DYHEAD_DEVICE void store_half_vectors(T* out, int columns) {
    const int lane = product_.lane() % 4;
    const int64_t channels = launch_.shape.out_channels;
#pragma unroll
    for (int i = 0; i < Product::kI; ++i) {
      const int32_t pixel = at_.pixels[product_.row(i)];
#pragma unroll
      for (int j = 0; j < Product::kJ; j += 8) {
        Vec<uint32_t, 4> words;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          words[k] = pack2<T>(product_.at(i, j + 2 * k), product_.at(i, j + 2 * k + 1));
        }
        exchange(words[0], words[1], 1, lane & 1);
        exchange(words[2], words[3], 1, lane & 1);
        exchange(words[0], words[2], 2, lane & 2);
        exchange(words[1], words[3], 2, lane & 2);
        const int column = product_.first_column() + 4 * j + 8 * lane;
        if (pixel < 0 || column >= columns) continue;
        using Fragment = Vec<T, 8>;
        store_vec(out + pixel * channels + column, __builtin_bit_cast(Fragment, words));
      }
    }
  }

  // One step of a transposition: exchanges `high` of this lane with `low` of lane ^ distance.
  DYHEAD_DEVICE static void exchange(uint32_t& low, uint32_t& high, int distance, bool upper) {
    const uint32_t received = __shfl_xor_sync(kFullMask, upper ? low : high, distance);
    (upper ? low : high) = received;
  }

  // The sum over a thread's rows and over the lanes that share its columns. value(row, y) is the
  // summand of a row.
  template <class Value>
  DYHEAD_DEVICE F sum_rows(int j, Value&& value) {
    F sum = F(0);
#pragma unroll
    for (int i = 0; i < Product::kI; ++i) sum += value(product_.row(i), product_.at(i, j));
#pragma unroll
    for (int distance = Product::kFirstXor; distance < kWarpSize; distance *= 2) {
      sum += __shfl_xor_sync(kFullMask, sum, distance);
    }
    return sum;
  }

  // Writes the moments of this tile, of the values as stored, because what reads them subtracts the
  // mean: a group of one value must be exactly its own mean. Then they are merged with others.
  DYHEAD_DEVICE void write_moments(const Columns& columns) {
    constexpr int kWarps = Product::kWarpsM;
    const DeformJob& job = launch_.jobs[at_.place.job];
    const int64_t channels = launch_.shape.out_channels;
    const int thread = tile_thread();
    auto* sums = reinterpret_cast<F*>(work_);  // [2][kWarps][kCols]
    F* means = sums + 2 * kWarps * kCols;      // [kCols]; first the values of the first row
    F* up_weights = means + kCols;             // [kRows]
    F* valid = up_weights + kRows;             // [kRows]: 1 for pixels, else 0
    if (is_half_v<T> && !p_.out_in_compute_dtype) {
#pragma unroll
      for (int i = 0; i < Product::kI; ++i) {
#pragma unroll
        for (int j = 0; j < Product::kJ; ++j) {
          product_.at(i, j) = to_compute(from_compute<T>(product_.at(i, j)));
        }
      }
    }
    static_assert(sizeof(F) * ((2 * kWarps + 1) * kCols + 2 * kRows) <=
                  sizeof(StagedSample<F>) * kRows * kFewTapsAtOnce);
    for (int row = thread; row < kRows; row += kTileThreads) {
      const OutputPixel at = tile_pixel(launch_, at_.place, row, kRows);
      valid[row] = at.index < 0 ? F(0) : F(1);
      up_weights[row] =
          at.index < 0
              ? F(0)
              : upsampled_mean_weight<F>(at.y, job.out.height, job.up_height, job.up_mode) *
                    upsampled_mean_weight<F>(at.x, job.out.width, job.up_width, job.up_mode);
    }
    // A mean may be much larger than the deviations from it, so values are summed as differences
    // from one of them. The first row of a tile is a pixel.
    if (product_.row(0) == 0) {
#pragma unroll
      for (int j = 0; j < Product::kJ; ++j) means[product_.column(j)] = product_.at(0, j);
    }
    __syncthreads();
    const bool writes = product_.lane() < Product::kFirstXor;
    F* sum = sums + product_.warp_row() * kCols;
    F* up_sum = sum + kWarps * kCols;
#pragma unroll
    for (int j = 0; j < Product::kJ; ++j) {
      const F first = means[product_.column(j)];
      const F total = sum_rows(j, [&](int row, F y) { return valid[row] * (y - first); });
      if (writes) sum[product_.column(j)] = total;
    }
    __syncthreads();
    const F count = static_cast<F>(tile_pixels(launch_, at_.place.job, at_.place.tile, kRows));
    F* partial = static_cast<F*>(p_.partial) + at_.tile * deform_moments(channels);
    for (int c = thread; c < kCols; c += kTileThreads) {
      F total = F(0);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += sums[w * kCols + c];
      means[c] += total / count;
      if (c < columns.count) partial[columns.first + c] = means[c];
    }
    if (thread < kWarpSize) {
      F weight = F(0);
      for (int row = thread; row < kRows; row += kWarpSize) weight += up_weights[row];
      weight = warp_sum(weight);
      // All blocks of the tile write the same.
      if (thread == 0) {
        partial[3 * channels] = weight;
        partial[3 * channels + 1] = count;
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < Product::kJ; ++j) {
      const F mean = means[product_.column(j)];
      const F second =
          sum_rows(j, [&](int row, F y) { return valid[row] * ((y - mean) * (y - mean)); });
      const F up = sum_rows(j, [&](int row, F y) { return up_weights[row] * (y - mean); });
      if (writes) {
        sum[product_.column(j)] = second;
        up_sum[product_.column(j)] = up;
      }
    }
    __syncthreads();
    for (int c = thread; c < columns.count; c += kTileThreads) {
      F second = F(0), up = F(0);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        second += sums[w * kCols + c];
        up += sums[(kWarps + w) * kCols + c];
      }
      partial[channels + columns.first + c] = second;
      partial[2 * channels + columns.first + c] = up;
    }
    merge_tiles<F>(p_, at_.place, at_.column, columns.first, columns.first + columns.count);
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
