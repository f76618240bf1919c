// What a forward kernel of deform_conv does with the sums of a tile: adds those of the blocks that
// share it, adds the bias, stores the outputs and writes their moments.
#pragma once

#include "../../common/upsample.h"
#include "deform_conv_gather.cuh"
#include "deform_conv_moments.cuh"

namespace dyhead::cuda {

// The tile that a block computes, with its group and panel of columns. A block without a tile has
// no pixels.
struct FwdPlace {
  TilePlace place;
  int32_t tile;
  int32_t column;        // group * column_panels + panel
  int32_t shared, part;  // index among the tiles that blocks share, or -1; this block's part
};

// Taps [first, last) of a tile that one of `parts` blocks computes.
struct FwdTaps {
  int first, last;
};

DYHEAD_DEVICE FwdTaps taps_of_part(const DeformFwdKernelParams& p, const FwdPlace& at) {
  const int parts = at.shared < 0 ? 1 : p.split.parts;
  const int taps = p.launch.shape.taps();
  return {taps * at.part / parts, taps * (at.part + 1) / parts};
}

// Consecutive channel steps of one deformable group: they read the same samples.
struct ChannelStretch {
  int first, last, steps, deform_group;
};

DYHEAD_DEVICE ChannelStretch stretch_from(const DeformFwdKernelParams& p, int group, int channel) {
  const int depth = p.panels.depth;
  const ChannelStep longest =
      channel_step(p.launch.shape, group, channel, static_cast<int32_t>(p.launch.shape.channels));
  return {channel, longest.last, (longest.last - channel + depth - 1) / depth,
          longest.deform_group};
}

// Called by kTileThreads threads, whose sums are in `product` (TileProduct, for example); they meet
// by Threads::sync(). pixels[row] is the index in the map, or -1. `work` is shared memory of the
// samples, which no thread reads any more.
template <class Op, class Product, int kRows, int kCols, class Threads>
class FwdFinish {
 public:
  using T = typename Operand<Op>::Storage;
  using F = typename Operand<Op>::Compute;
  static constexpr bool kShares = forward_shares_tiles(kCols, Operand<Op>::kTensor);

  DYHEAD_DEVICE FwdFinish(const DeformFwdKernelParams& p, const FwdPlace& at, const int32_t* pixels,
                          std::byte* work, Product& product)
      : p_(p), launch_(p.launch), at_(at), pixels_(pixels), work_(work), product_(product) {}

  DYHEAD_DEVICE void run() {
    // Other threads may still read the samples.
    Threads::sync();
    if constexpr (kShares) {
      if (at_.shared >= 0 && !add_parts(p_.split.parts)) return;
    }
    finish();
  }

 private:
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
    if (!arrive_is_last<Threads>(p_.parts_arrived + at_.shared, parts)) return false;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
#pragma unroll
      for (int i = 0; i < Product::kI; ++i) {
#pragma unroll
        for (int j = 0; j < Product::kJ; ++j) {
          const F sum = part == 0 ? F(0) : product_.at(i, j);
          product_.at(i, j) = sum + *part_sum(part, i * Product::kJ + j);
        }
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
      const int32_t pixel = pixels_[product_.row(i)];
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
      const int32_t pixel = pixels_[product_.row(i)];
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

  // Sums over the rows of a warp, in which row r counts as often as weights[r] says. value(j, y) is
  // the summand of a thread's column j. Lanes that share columns exchange halves of their sums
  // until each has some columns alone, for which it calls write(column, sum).
  template <class Value, class Write>
  DYHEAD_DEVICE void sum_rows(const F* weights, Value&& value, Write&& write) {
    F of_row[Product::kI];
#pragma unroll
    for (int i = 0; i < Product::kI; ++i) of_row[i] = weights[product_.row(i)];
    constexpr int kPart = Product::kJ < 32 ? Product::kJ : 32;
    constexpr int kLanes = kWarpSize / Product::kFirstXor;
    static_assert(Product::kJ % kPart == 0 && kPart % kLanes == 0);
#pragma unroll
    for (int first = 0; first < Product::kJ; first += kPart) {
      F sums[kPart];
#pragma unroll
      for (int j = 0; j < kPart; ++j) {
        sums[j] = F(0);
#pragma unroll
        for (int i = 0; i < Product::kI; ++i) {
          sums[j] += of_row[i] * value(first + j, product_.at(i, first + j));
        }
      }
      int own = first;
#pragma unroll
      for (int distance = kWarpSize / 2; distance >= Product::kFirstXor; distance /= 2) {
        const int half = kPart * distance / kWarpSize;
        const bool upper = (product_.lane() & distance) != 0;
        own += upper ? half : 0;
#pragma unroll
        for (int j = 0; j < kPart / 2; ++j) {
          if (j >= half) break;
          const F given = upper ? sums[j] : sums[j + half];
          const F kept = upper ? sums[j + half] : sums[j];
          sums[j] = kept + __shfl_xor_sync(kFullMask, given, distance);
        }
      }
#pragma unroll
      for (int j = 0; j < kPart / kLanes; ++j) write(product_.column(own + j), sums[j]);
    }
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
    if constexpr (is_half_v<T>) {
      // Under a condition, ptxas takes the sums to be read while wgmma still adds to them.
#pragma unroll
      for (int i = 0; i < Product::kI; ++i) {
#pragma unroll
        for (int j = 0; j < Product::kJ; ++j) {
          const F rounded = to_compute(from_compute<T>(product_.at(i, j)));
          product_.at(i, j) = p_.out_in_compute_dtype ? product_.at(i, j) : rounded;
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
    Threads::sync();
    F* sum = sums + product_.warp_row() * kCols;
    F* up_sum = sum + kWarps * kCols;
    const auto difference = [&](int j, F y) { return y - means[product_.column(j)]; };
    sum_rows(valid, difference, [&](int column, F total) { sum[column] = total; });
    Threads::sync();
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
    Threads::sync();
    const auto square = [&](int j, F y) { return difference(j, y) * difference(j, y); };
    sum_rows(valid, square, [&](int column, F total) { sum[column] = total; });
    sum_rows(up_weights, difference, [&](int column, F total) { up_sum[column] = total; });
    Threads::sync();
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
    merge_tiles<F, Threads>(p_, at_.place, at_.column, columns.first,
                            columns.first + columns.count);
  }

  const DeformFwdKernelParams& p_;
  const DeformLaunch& launch_;
  const FwdPlace& at_;
  const int32_t* pixels_;
  std::byte* work_;
  Product& product_;
};

}  // namespace dyhead::cuda
