// The gradient of the input, and the derivatives of all samples. The rows of a use are cut into
// parts. A part's samples lie in a window of its source map's rows, and parts whose windows overlap
// belong to different waves, which run one after the other: so a part adds to the sums without
// asking anybody, and in an order that only the data decide.
#include "deform_conv_bwd.h"

namespace dyhead::cpu {
namespace {

constexpr int64_t kSliceChannels = 64;          // of a product, whose result the L1 cache holds
constexpr int64_t kBlockRows = 48;              // of a product, for the same reason
constexpr int64_t kPartRows = 4 * kChunkRows;   // more would leave too few parts
constexpr int64_t kDerivativeBytes = 24 << 20;  // of the slices' derivatives held at a time
constexpr int64_t kClearedValues = 1 << 16;     // of one task

// Rows [first, first + rows) of a use of one image.
struct Part {
  size_t use;
  int64_t image, first, rows;
  int32_t top, bottom;  // rows [top, bottom) of the source map have all corners of its samples
};

// W^T of each slice as the product reads it, zero where a panel or a pair is not full:
// [weight][slice][tap][panel of channels][k / pairs][tile_cols][pairs], k = C_out / groups.
template <class T>
class PackedTransposes {
  using F = compute_t<T>;

 public:
  PackedTransposes(const BackwardCall<T>& call, const GemmKernel<F>& gemm,
                   const std::vector<Slice>& slices)
      : call_(call), gemm_(gemm), slices_(slices), k_(round_up(call.group_outputs, gemm.pairs)) {
    offsets_.assign(1, 0);
    for (const Slice& slice : slices) {
      offsets_.push_back(offsets_.back() + call.s.taps() * tap_bytes(slice));
    }
    bytes_ = std::make_unique_for_overwrite<std::byte[]>(call.tables.weights * offsets_.back());
    if (gemm.pairs == 2) {
      pack<bfloat16>();
    } else {
      pack<F>();
    }
  }

  int64_t k() const { return k_; }
  int64_t cols(const Slice& slice) const { return round_up(slice.count, gemm_.tile_cols); }
  const std::byte* at(int64_t weight, int64_t slice, int64_t tap) const {
    return bytes_.get() + weight * offsets_.back() + offsets_[slice] +
           tap * tap_bytes(slices_[slice]);
  }

 private:
  int64_t tap_bytes(const Slice& slice) const { return k_ * cols(slice) * call_.element_bytes; }

  template <class E>
  void pack() {
    constexpr int64_t kPairs = std::is_same_v<E, bfloat16> ? 2 : 1;
    constexpr int64_t kOutputs = 32;  // of one task
    const DeformShape& s = call_.s;
    const int64_t slices = static_cast<int64_t>(slices_.size());
    const int64_t channels = s.channels / s.groups, taps = s.taps(), tile = gemm_.tile_cols;
    const int64_t blocks = ceil_div(k_, kOutputs);
    parallel_for_each(call_.tables.weights * slices * blocks, [&](int64_t task) {
      const int64_t first = task % blocks * kOutputs;
      const int64_t last = std::min(first + kOutputs, k_);
      const int64_t weight = task / blocks / slices, index = task / blocks % slices;
      const Slice& slice = slices_[index];
      E* to = reinterpret_cast<E*>(bytes_.get() + weight * offsets_.back() + offsets_[index]);
      const F* from = static_cast<const F*>(call_.p.weights->matrices[weight]) +
                      slice.group * call_.group_outputs * channels * taps +
                      (slice.first - slice.group * channels) * taps;
      for (int64_t o = first; o < last; ++o) {
        for (int64_t c = 0; c < cols(slice); ++c) {
          E* at = to + c / tile * tile * k_ + (o / kPairs * tile + c % tile) * kPairs + o % kPairs;
          const bool there = o < call_.group_outputs && c < slice.count;
          const F* values = from + (o * channels + c) * taps;
          for (int64_t tap = 0; tap < taps; ++tap) {
            at[tap * k_ * cols(slice)] =
                there ? from_compute<E>(static_cast<compute_t<E>>(values[tap])) : E{};
          }
        }
      }
    });
  }

  const BackwardCall<T>& call_;
  const GemmKernel<F>& gemm_;
  const std::vector<Slice>& slices_;
  int64_t k_;
  std::vector<int64_t> offsets_;  // of a slice in one weight, in bytes
  std::unique_ptr<std::byte[]> bytes_;
};

template <class T>
class InputPass {
  using F = compute_t<T>;

 public:
  InputPass(const BackwardCall<T>& call, const SourceSums<F>& sums)
      : call_(call),
        sums_(sums),
        s_(call.s),
        gemm_(call.paired ? call.kernels.column_gemm : call.kernels.gemm),
        slices_(make_slices(s_, kSliceChannels)),
        packed_(call, gemm_, slices_) {}

  void run() {
    if (sums_.values != nullptr && sums_.first) {
      for_blocks(
          [&](int64_t first, int64_t count) { std::fill_n(sums_.values + first, count, F(0)); });
    }
    if (call_.p.grad_predictions != nullptr) {
      std::fill_n(static_cast<F*>(call_.p.grad_predictions),
                  call_.tables.prediction_rows * s_.prediction_columns(), F(0));
    }
    if (call_.p.grad_gates != nullptr) {
      std::fill_n(static_cast<F*>(call_.p.grad_gates), s_.images * call_.tables.sources.size(),
                  F(0));
    }
    if (!call_.uses.empty()) run_images();
    if constexpr (!std::is_same_v<T, F>) {
      if (sums_.values == nullptr || !sums_.last) return;
      for_blocks([&](int64_t first, int64_t count) {
        T* to = static_cast<T*>(call_.p.grad_source);
        for (int64_t i = first; i < first + count; ++i) to[i] = from_compute<T>(sums_.values[i]);
      });
    }
  }

 private:
  template <class Each>
  void for_blocks(Each&& each) const {
    const int64_t values = call_.tables.source_rows * s_.channels;
    parallel_for_each(ceil_div(values, kClearedValues), [&](int64_t i) {
      each(i * kClearedValues, std::min(kClearedValues, values - i * kClearedValues));
    });
  }

  // A few images at a time, by the size of their derivatives.
  void run_images() {
    const int64_t slices = static_cast<int64_t>(slices_.size());
    const int64_t image_bytes =
        slices * call_.use_rows * s_.taps() * 3 * static_cast<int64_t>(sizeof(F));
    int64_t together = s_.images;
    if (call_.needs_derivatives()) {
      together = std::clamp<int64_t>(kDerivativeBytes / image_bytes, 1, s_.images);
    }
    for (int64_t first = 0; first < s_.images; first += together) {
      const int64_t images = std::min(together, s_.images - first);
      if (!call_.needs_derivatives()) {
        run_waves(first, images, nullptr);
        continue;
      }
      const Derivatives<F> derivatives(images, slices, call_.use_rows, s_.taps());
      run_waves(first, images, &derivatives);
      prediction_pass(call_, slices_, derivatives, first, images);
    }
  }

  struct Scratch {
    explicit Scratch(const InputPass& pass)
        : corners(pass.s_.taps() * kChunkRows),
          points(pass.s_.taps() * kChunkRows),
          grad(kChunkRows * pass.call_.grad_stride * pass.call_.element_bytes),
          columns(kBlockRows * pass.s_.taps() * round_up(kSliceChannels, pass.gemm_.tile_cols)),
          dots(kBlockRows * pass.s_.taps() * 4) {}
    std::vector<Corners<F>> corners;     // [rows, taps]
    std::vector<SamplePoint<F>> points;  // [rows, taps]
    std::vector<std::byte> grad;         // [rows, grad_stride]
    std::vector<F> columns;              // [rows, taps, channels of a slice]
    std::vector<F> dots;                 // [rows, taps, 4]
  };

  // `derivatives` is null where none are wanted. Where there are few parts to share out, the slices
  // are, too; the sums are the same.
  void run_waves(int64_t first_image, int64_t images, const Derivatives<F>* derivatives) {
    const std::vector<std::vector<Part>> waves = make_waves(first_image, images);
    size_t parts = 0;
    for (const std::vector<Part>& wave : waves) parts += wave.size();
    const size_t wanted = 2 * waves.size() * torch::stable::get_num_threads();
    const int64_t shares = parts < wanted ? static_cast<int64_t>(slices_.size()) : 1;
    const int64_t slices = static_cast<int64_t>(slices_.size()) / shares;
    for (const std::vector<Part>& wave : waves) {
      parallel_tasks(
          static_cast<int64_t>(wave.size()) * shares, [&] { return Scratch(*this); },
          [&](int64_t task, Scratch& scratch) {
            const int64_t first = task % shares * slices;
            run_part(wave[task / shares], first, first + slices, first_image, derivatives, scratch);
          });
    }
  }

  std::vector<std::vector<Part>> make_waves(int64_t first_image, int64_t images) const {
    std::vector<Part> parts;
    for (size_t u = 0; u < call_.uses.size(); ++u) {
      if (sums_.values == nullptr && !moves(call_.uses[u])) continue;
      const int64_t pixels = call_.tables.jobs[call_.uses[u].job].out.pixels();
      for (int64_t image = first_image; image < first_image + images; ++image) {
        for (int64_t first = 0; first < pixels; first += kPartRows) {
          parts.push_back({u, image, first, std::min(kPartRows, pixels - first), 0, 0});
        }
      }
    }
    if (sums_.values == nullptr) return {parts};
    parallel_for_each(static_cast<int64_t>(parts.size()),
                      [&](int64_t i) { find_window(parts[i]); });
    // The first wave that has no part on the same rows.
    std::vector<std::vector<Part>> waves;
    for (const Part& part : parts) {
      size_t wave = 0;
      while (wave < waves.size() && overlaps(part, waves[wave])) ++wave;
      if (wave == waves.size()) waves.emplace_back();
      waves[wave].push_back(part);
    }
    return waves;
  }

  // Whether the use's samples have derivatives that are wanted. A plain job has no offsets.
  bool moves(const Use& use) const {
    if (call_.p.grad_gates != nullptr) return true;
    return call_.p.grad_predictions != nullptr && !call_.tables.jobs[use.job].plain();
  }

  int32_t source_of(const Part& part) const {
    return call_.tables.terms[call_.uses[part.use].term].source;
  }

  bool overlaps(const Part& part, const std::vector<Part>& others) const {
    return std::any_of(others.begin(), others.end(), [&](const Part& other) {
      return part.top < other.bottom && other.top < part.bottom && part.image == other.image &&
             source_of(part) == source_of(other);
    });
  }

  void find_window(Part& part) const {
    const Use& use = call_.uses[part.use];
    const TapSampler<F> taps = call_.sampler(use, part.image);
    int32_t top = taps.source.height, bottom = -1;
    for (int64_t r = part.first; r < part.first + part.rows; ++r) {
      const OutputPixel at = output_pixel(taps.job, static_cast<int32_t>(r));
      for (int32_t d = 0; d < s_.deform_groups; ++d) {
        for (int32_t tap = 0; tap < s_.taps(); ++tap) {
          const SamplePoint<F> p = taps.point(d, tap, at);
          if (!p.inside) continue;
          top = std::min(top, p.top);
          bottom = std::max(bottom, p.top + 2);
        }
      }
    }
    part.top = std::max(top, 0);
    part.bottom = std::min(bottom, taps.source.height);
  }

  // Slices [first_slice, last_slice) of a part.
  void run_part(const Part& part, int64_t first_slice, int64_t last_slice, int64_t first_image,
                const Derivatives<F>* derivatives, Scratch& scratch) const {
    const Use& use = call_.uses[part.use];
    const TapSampler<F> taps = call_.sampler(use, part.image);
    for (int64_t first = 0; first < part.rows; first += kChunkRows) {
      const DeformChunk chunk{use.job, part.image, part.first + first,
                              std::min<int64_t>(kChunkRows, part.rows - first)};
      call_.load_grad(chunk, scratch.grad.data());
      int32_t sampled = -1;
      for (int64_t i = first_slice; i < last_slice; ++i) {
        const int32_t deform_group = slices_[i].deform_group;
        if (deform_group != sampled) sample_chunk(taps, deform_group, chunk, scratch);
        sampled = deform_group;
        F* to = nullptr;
        if (moves(use)) {
          to = derivatives->at(part.image - first_image, i, use.first_row + chunk.first);
        }
        run_slice(use, chunk, i, to, scratch);
      }
    }
  }

  void sample_chunk(const TapSampler<F>& taps, int32_t deform_group, const DeformChunk& chunk,
                    Scratch& scratch) const {
    Corners<F> corners[kChunkRows];
    SamplePoint<F> points[kChunkRows];
    for (int32_t tap = 0; tap < s_.taps(); ++tap) {
      sample_rows(taps, deform_group, tap, chunk.first, chunk.rows, corners, points);
      for (int64_t r = 0; r < chunk.rows; ++r) {
        scratch.corners[r * s_.taps() + tap] = corners[r];
        scratch.points[r * s_.taps() + tap] = points[r];
      }
    }
  }

  // The samples are in `scratch`; `derivatives` may be null.
  void run_slice(const Use& use, const DeformChunk& chunk, int64_t index, F* derivatives,
                 Scratch& scratch) const {
    const Slice& slice = slices_[index];
    const DeformTerm& term = call_.tables.terms[use.term];
    const MapShape& map = call_.tables.sources[term.source];
    const T* source = call_.source_of(map, chunk.image) + slice.first;
    F* sums = nullptr;
    if (sums_.values != nullptr) {
      const int64_t row = map.first_row + chunk.image * map.pixels();
      sums = sums_.values + row * s_.channels + slice.first;
    }
    const int64_t cols = packed_.cols(slice);
    const int64_t taps = s_.taps();
    for (int64_t first = 0; first < chunk.rows; first += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, chunk.rows - first);
      const int64_t padded = round_up(rows, gemm_.tile_rows);
      const int64_t at = first * call_.grad_stride + slice.group * call_.group_outputs;
      std::fill_n(scratch.columns.begin(), padded * taps * cols, F(0));
      gemm_.run(scratch.grad.data() + at * call_.element_bytes, call_.grad_stride, 1,
                packed_.at(term.weight, index, 0), scratch.columns.data(), taps * cols, padded,
                taps * cols, packed_.k());
      auto* dots = reinterpret_cast<F(*)[4]>(scratch.dots.data());
      call_.kernels.project_back(
          source, s_.channels, slice.count, scratch.corners.data() + first * taps, rows * taps,
          scratch.columns.data(), cols, sums, derivatives == nullptr ? nullptr : dots);
      if (derivatives == nullptr) continue;
      for (int64_t i = 0; i < rows * taps; ++i) {
        const SamplePoint<F>& point = scratch.points[first * taps + i];
        F* d = derivatives + (first * taps + i) * 3;
        d[0] = sample_value(point, dots[i]);
        d[1] = sample_slope_y(point, dots[i]);
        d[2] = sample_slope_x(point, dots[i]);
      }
    }
  }

  const BackwardCall<T>& call_;
  const SourceSums<F> sums_;
  const DeformShape& s_;
  const GemmKernel<F>& gemm_;
  const std::vector<Slice> slices_;
  const PackedTransposes<T> packed_;
};

}  // namespace

template <class T>
void input_pass(const BackwardCall<T>& call, const SourceSums<compute_t<T>>& sums) {
  InputPass<T>(call, sums).run();
}

#define DYHEAD_INSTANTIATE(type) \
  template void input_pass(const BackwardCall<type>&, const SourceSums<compute_t<type>>&);
DYHEAD_FOR_EACH_TYPE(DYHEAD_INSTANTIATE)
#undef DYHEAD_INSTANTIATE

}  // namespace dyhead::cpu
