#include <cstring>
#include <memory>

#include "context.h"
#include "deform_conv.h"

namespace dyhead::cpu {

template <class F>
std::vector<F> UpsampledMeanWeights<F>::axis(int32_t from, int32_t to, UpsampleMode mode) {
  std::vector<F> weights(from);
  for (int32_t i = 0; i < from; ++i) weights[i] = upsampled_mean_weight<F>(i, from, to, mode);
  return weights;
}

template struct UpsampledMeanWeights<float>;
template struct UpsampledMeanWeights<double>;

namespace {

// The weights as the column GEMM reads them: [weight][group][tap][panel][k /
// pairs][tile_cols][pairs], zero where a panel or a pair is not full. Of pairs of bfloat16, `part`
// 0 is the rounded weights, and part i what parts before it leave of them.
template <class F>
class PackedWeights {
 public:
  PackedWeights(const DeformFwdParams& p, const GemmKernel<F>& gemm, int part)
      : s_(p.call->shape),
        gemm_(gemm),
        part_(part),
        k_(round_up(s_.channels / s_.groups, gemm.pairs)),
        cols_(round_up(s_.out_channels / s_.groups, gemm.tile_cols)),
        element_(gemm.pairs == 2 ? sizeof(bfloat16) : sizeof(F)),
        bytes_(std::make_unique_for_overwrite<std::byte[]>(p.call->weights * s_.groups * s_.taps() *
                                                           tap_bytes())) {
    if (gemm.pairs == 2) {
      pack<bfloat16>(*p.weights);
    } else {
      pack<F>(*p.weights);
    }
  }

  int64_t k() const { return k_; }
  int64_t cols() const { return cols_; }
  const void* at(int64_t weight, int64_t group, int64_t tap) const {
    return bytes_.get() + ((weight * s_.groups + group) * s_.taps() + tap) * tap_bytes();
  }

 private:
  int64_t tap_bytes() const { return k_ * cols_ * element_; }

  template <class E>
  E part_of(F value) const {
    auto rest = static_cast<compute_t<E>>(value);
    for (int i = 0; i < part_; ++i) rest -= to_compute(from_compute<E>(rest));
    return from_compute<E>(rest);
  }

  static void prefetch(const F* values, int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(F);
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(values + i);
  }

  // A task is a panel of all taps. Values that are neighbours in a weight matrix are far apart in
  // the panel, in lines that fall on the same sets of a cache. So a block of channels is put in
  // order in a buffer that the L1 cache holds, and copied from there.
  template <class E>
  void pack(const DeformWeights& weights) {
    constexpr int64_t kBufferBytes = 24 * 1024;
    constexpr int64_t kPairs = std::is_same_v<E, bfloat16> ? 2 : 1;
    const int64_t tile = gemm_.tile_cols, taps = s_.taps();
    const int64_t channels = s_.channels / s_.groups, outputs = s_.out_channels / s_.groups;
    const int64_t panels = cols_ / tile;
    const int64_t fitting = kBufferBytes / (taps * tile * element_) / kPairs * kPairs;
    const int64_t block = std::clamp(fitting, kPairs, k_);
    parallel_tasks(
        static_cast<int64_t>(weights.matrices.size()) * s_.groups * panels,
        [&] { return std::vector<E>(taps * block * tile); },
        [&](int64_t task, std::vector<E>& buffer) {
          const int64_t matrix = task / panels;
          const int64_t first = task % panels * tile;
          const int64_t last = std::min(first + tile, outputs);
          const F* from = static_cast<const F*>(weights.matrices[matrix / s_.groups]) +
                          matrix % s_.groups * outputs * channels * taps;
          std::byte* panel = bytes_.get() + matrix * taps * tap_bytes() + first * k_ * element_;
          for (int64_t c = 0; c < k_; c += block) {
            const int64_t padded = std::min(block, k_ - c);
            const int64_t count = std::min(padded, channels - c);
            if (last - first < tile || count < padded) std::fill(buffer.begin(), buffer.end(), E{});
            for (int64_t o = first; o < last; ++o) {
              const F* row = from + (o * channels + c) * taps;
              if (o + 1 < last) prefetch(row + channels * taps, count * taps);
              for (int64_t i = 0; i < count; ++i) {
                E* to = buffer.data() + (i / kPairs * tile + o - first) * kPairs + i % kPairs;
                for (int64_t tap = 0; tap < taps; ++tap) {
                  to[tap * block * tile] = part_of<E>(row[i * taps + tap]);
                }
              }
            }
            for (int64_t tap = 0; tap < taps; ++tap) {
              std::memcpy(panel + tap * tap_bytes() + c * tile * element_,
                          buffer.data() + tap * block * tile, padded * tile * element_);
            }
          }
        });
  }

  const DeformShape& s_;
  const GemmKernel<F>& gemm_;
  const int part_;
  int64_t k_, cols_, element_;
  std::unique_ptr<std::byte[]> bytes_;
};

// Mean, biased variance and upsampled mean per channel; chunks are merged with Chan's formula. A
// mean may be much larger than the deviations from it: values are summed as differences from one of
// them, and the means of chunks as differences from the first chunk's.
template <class F>
struct Moments {
  F* mean;
  F* second;   // centred, not divided by the count
  F* up_mean;  // sum of the centred values times their weights

  static Moments of(std::vector<F>& buffer, int64_t index, int64_t channels) {
    F* start = buffer.data() + index * 3 * channels;
    return {start, start + channels, start + 2 * channels};
  }
};

template <class T>
class Forward {
  using F = compute_t<T>;

 public:
  explicit Forward(const DeformFwdParams& p)
      : p_(p),
        s_(p.call->shape),
        kernels_(deform_kernels<T>()),
        paired_parts_(choose_parts()),
        gemm_(paired_parts_ > 0 ? kernels_.column_gemm : kernels_.gemm),
        column_bytes_(paired_parts_ > 0 ? sizeof(bfloat16) : sizeof(F)),
        column_stride_(round_up(s_.channels, 2)),
        out_stride_(s_.groups * round_up(s_.out_channels / s_.groups, gemm_.tile_cols)) {
    for (int part = 0; part < std::max(paired_parts_, 1); ++part)
      packed_.emplace_back(p, gemm_, part);
    if (!p.moments) return;
    for (const DeformJob& job : p.call->jobs) up_weights_.emplace_back(job);
  }

  void run() {
    const std::vector<DeformChunk> chunks = deform_chunks(*p_.call, s_.images);

    std::vector<F> moments(p_.moments ? chunks.size() * 3 * s_.out_channels : 0);
    parallel_tasks(
        static_cast<int64_t>(chunks.size()), [&] { return Scratch(*this); },
        [&](int64_t i, Scratch& scratch) {
          compute(chunks[i], scratch);
          finish(chunks[i], scratch, p_.moments ? &moments : nullptr, i);
        });
    if (p_.moments) merge(chunks, moments);
  }

 private:
  struct Scratch {
    explicit Scratch(const Forward& f)
        : corners(kChunkRows),
          columns(kChunkRows * f.column_stride_ * f.column_bytes_ + sizeof(F)),
          out(kChunkRows * f.out_stride_) {}
    std::vector<Corners<F>> corners;
    std::vector<std::byte> columns;
    std::vector<F> out;
  };

  // Into how many parts weights are cut for products of pairs of bfloat16; 0: there are none. Pairs
  // must not reach across groups. What a call wants in the compute type is computed in it:
  // predicted offsets would move samples by the rounding of the weights. But a plain convolution
  // has columns that need no rounding, and three parts of a weight add up to it.
  int choose_parts() const {
    const bool fit = s_.groups == 1 || s_.channels / s_.groups % 2 == 0;
    if (kernels_.column_gemm.pairs == 1 || !fit) return 0;
    if (!p_.out_in_compute_dtype) return 1;
    return kernels_.sums_parts && plain() ? 3 : 0;
  }

  // Whether every column is the source's value.
  bool plain() const {
    const std::vector<DeformJob>& jobs = p_.call->jobs;
    return p_.gates == nullptr &&
           std::all_of(jobs.begin(), jobs.end(), [](const DeformJob& job) { return job.plain(); });
  }

  void blend(const T* source, int64_t channels, const Corners<F>* corners, int64_t rows,
             std::byte* columns) const {
    if (paired_parts_ > 0) {
      kernels_.blend(source, s_.channels, channels, corners, rows, columns, column_stride_);
    } else {
      kernels_.blend_compute(source, s_.channels, channels, corners, rows,
                             reinterpret_cast<F*>(columns), column_stride_);
    }
  }

  void compute(const DeformChunk& chunk, Scratch& scratch) const {
    const DeformCall& tables = *p_.call;
    const DeformJob& job = tables.jobs[chunk.job];
    const int64_t deform_channels = s_.channels / s_.deform_groups;
    std::fill(scratch.out.begin(), scratch.out.end(), F(0));
    for (int32_t t = job.first_term; t < job.first_term + job.terms; ++t) {
      const DeformTerm& term = tables.terms[t];
      const MapShape& map = tables.sources[term.source];
      const T* source = static_cast<const T*>(p_.source) +
                        (map.first_row + chunk.image * map.pixels()) * s_.channels;
      const TapSampler<F> sampler =
          tap_sampler(tables, job, term, static_cast<const F*>(p_.predictions),
                      static_cast<const F*>(p_.gates), chunk.image);
      for (int32_t tap = 0; tap < s_.taps(); ++tap) {
        for (int32_t d = 0; d < s_.deform_groups; ++d) {
          sample_rows(sampler, d, tap, chunk.first, chunk.rows, scratch.corners.data());
          blend(source + d * deform_channels, deform_channels, scratch.corners.data(), chunk.rows,
                scratch.columns.data() + d * deform_channels * column_bytes_);
        }
        for (const PackedWeights<F>& packed : packed_) {
          multiply(packed, chunk.rows, term.weight, tap, scratch);
        }
      }
    }
  }

  void multiply(const PackedWeights<F>& packed, int64_t rows, int64_t weight, int64_t tap,
                Scratch& scratch) const {
    const int64_t group_bytes = s_.channels / s_.groups * column_bytes_;
    for (int32_t g = 0; g < s_.groups; ++g) {
      gemm_.run(scratch.columns.data() + g * group_bytes, column_stride_, 1,
                packed.at(weight, g, tap), scratch.out.data() + g * packed.cols(), out_stride_,
                round_up(rows, gemm_.tile_rows), packed.cols(), packed.k());
    }
  }

  // Adds the bias, stores the rows and takes their moments: of the values as stored, because what
  // reads them subtracts the mean. A group of one value must be exactly its own mean.
  void finish(const DeformChunk& chunk, Scratch& scratch, std::vector<F>* moments,
              int64_t index) const {
    const DeformJob& job = p_.call->jobs[chunk.job];
    const int64_t channels = s_.out_channels;
    const int64_t group_outputs = channels / s_.groups;
    const std::vector<const void*>& biases = p_.weights->bias;
    const F* bias = biases.empty()
                        ? nullptr
                        : static_cast<const F*>(biases[p_.call->terms[job.first_term].weight]);
    const int64_t start = chunk.out_row(job) * channels;
    F* y = scratch.out.data();
    for (int64_t r = 0; s_.groups > 1 && r < chunk.rows; ++r) {
      // Packs the groups together, in place: they only move to the front.
      for (int32_t g = 1; g < s_.groups; ++g) {
        const F* from = y + r * out_stride_ + g * packed_.front().cols();
        std::copy(from, from + group_outputs, y + r * out_stride_ + g * group_outputs);
      }
    }
    if (p_.out_in_compute_dtype) {
      kernels_.store_compute(y, out_stride_, chunk.rows, channels, bias,
                             static_cast<F*>(p_.out) + start);
    } else {
      kernels_.store(y, out_stride_, chunk.rows, channels, bias, static_cast<T*>(p_.out) + start);
    }
    if (moments == nullptr) return;
    F up_weights[kChunkRows];
    for (int64_t r = 0; r < chunk.rows; ++r) {
      up_weights[r] = up_weights_[chunk.job].at(chunk.first + r);
    }
    const Moments<F> m = Moments<F>::of(*moments, index, channels);
    kernels_.moments(y, out_stride_, chunk.rows, channels, up_weights, m.mean, m.second, m.up_mean);
  }

  // A task is some channels of a map.
  void merge(const std::vector<DeformChunk>& chunks, std::vector<F>& moments) const {
    constexpr int64_t kMergedChannels = 64;
    const int64_t channels = s_.out_channels;
    const int64_t count = static_cast<int64_t>(p_.call->jobs.size()) * s_.images * channels;
    for (void* all : {p_.mean, p_.var, p_.up_mean}) std::fill_n(static_cast<F*>(all), count, F(0));
    std::vector<size_t> first_chunks;  // of each map that has pixels
    for (size_t i = 0; i < chunks.size(); ++i) {
      if (chunks[i].first == 0) first_chunks.push_back(i);
    }
    const int64_t slices = ceil_div(channels, kMergedChannels);
    parallel_for_each(static_cast<int64_t>(first_chunks.size()) * slices, [&](int64_t task) {
      const int64_t first = task % slices * kMergedChannels;
      merge_map(chunks, first_chunks[task / slices], moments, first,
                std::min(first + kMergedChannels, channels));
    });
  }

  // Channels [begin, end) of the map whose first chunk this is.
  void merge_map(const std::vector<DeformChunk>& chunks, size_t first_chunk,
                 std::vector<F>& moments, int64_t begin, int64_t end) const {
    const DeformChunk& head = chunks[first_chunk];
    const int64_t channels = s_.out_channels;
    const int64_t pixels = p_.call->jobs[head.job].out.pixels();
    const int64_t at = (head.job * s_.images + head.image) * channels;
    F* mean = static_cast<F*>(p_.mean) + at;
    F* var = static_cast<F*>(p_.var) + at;
    F* up_mean = static_cast<F*>(p_.up_mean) + at;
    const auto part_of = [&](size_t i) {
      return Moments<F>::of(moments, static_cast<int64_t>(i), channels);
    };
    // First the differences of the means from those of the first chunk.
    const Moments<F> origin = part_of(first_chunk);
    const size_t last_chunk = first_chunk + ceil_div(pixels, kChunkRows);
    for (size_t i = first_chunk; i < last_chunk; ++i) {
      const DeformChunk& chunk = chunks[i];
      const Moments<F> part = part_of(i);
      const F share = static_cast<F>(chunk.rows) / static_cast<F>(chunk.first + chunk.rows);
      F weight = F(0);
      for (int64_t r = 0; r < chunk.rows; ++r) {
        weight += up_weights_[chunk.job].at(chunk.first + r);
      }
      for (int64_t c = begin; c < end; ++c) {
        const F difference = part.mean[c] - origin.mean[c];
        const F delta = difference - mean[c];
        mean[c] += delta * share;
        var[c] += part.second[c] + delta * delta * share * static_cast<F>(chunk.first);
        up_mean[c] += part.up_mean[c] + weight * difference;
      }
    }
    for (int64_t c = begin; c < end; ++c) {
      mean[c] += origin.mean[c];
      up_mean[c] += origin.mean[c];
      var[c] /= static_cast<F>(pixels);
    }
  }

  const DeformFwdParams& p_;
  const DeformShape& s_;
  const DeformKernels<T>& kernels_;
  const int paired_parts_;
  const GemmKernel<F>& gemm_;
  const int64_t column_bytes_, column_stride_, out_stride_;
  std::vector<PackedWeights<F>> packed_;  // of each part
  std::vector<UpsampledMeanWeights<F>> up_weights_;
};

}  // namespace
}  // namespace dyhead::cpu

namespace dyhead {

void run_deform_conv_fwd(std::span<const DeformFwdParams> calls, Context&) {
  for (const DeformFwdParams& params : calls) {
    if (params.call->shape.images == 0) continue;  // sizes then have no bound
    dispatch_dtype(params.call->shape.dtype,
                   [&](auto zero) { cpu::Forward<decltype(zero)>(params).run(); });
  }
}

}  // namespace dyhead
