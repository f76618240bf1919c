// The gradient of the weights: columns^T . grad_out of all chunks that use a weight. The gradients
// of a round of chunks are packed once, for all taps and slices of channels. Tasks sample their
// columns again instead of storing them. Sums wait for the last round, and for those of other parts
// of the chunks.
#include "deform_conv_bwd.h"

namespace dyhead::cpu {
namespace {

constexpr int64_t kSliceChannels = 96;       // whole tiles of rows and whole vectors
constexpr int64_t kGradientBytes = 8 << 20;  // of packed gradients held at a time
constexpr int64_t kTaskBytes = 320 << 10;    // of a task's sums: the L2 cache holds more beside
constexpr int64_t kSumBytes = 8 << 20;       // of the sums of all parts but the first
constexpr int64_t kMostParts = 16;

template <class T>
class WeightPass {
  using F = compute_t<T>;

 public:
  explicit WeightPass(const BackwardCall<T>& call)
      : call_(call),
        s_(call.s),
        gemm_(call.paired ? call.kernels.row_gemm : call.kernels.gemm),
        slices_(make_slices(s_, kSliceChannels)),
        cols_(round_up(call.group_outputs, gemm_.tile_cols)),
        rows_(round_up(std::min(kSliceChannels, s_.channels), gemm_.tile_rows)),
        // One vector more than a multiple of the cache's sets, so that rows do not collide.
        width_(rows_ + 16),
        sum_values_(rows_ * cols_) {
    const int64_t sum_bytes = sum_values_ * static_cast<int64_t>(sizeof(F));
    tap_groups_ = ceil_div(s_.taps(), std::clamp<int64_t>(kTaskBytes / sum_bytes, 1, s_.taps()));
    const int64_t all = call.tables.weights * std::ssize(slices_) * s_.taps() * sum_bytes;
    parts_ = std::min(1 + kSumBytes / std::max<int64_t>(all, 1), kMostParts);
    for (int32_t w = 0; w < call.tables.weights; ++w) {
      weight_starts_.push_back(static_cast<int64_t>(items_.size()));
      for (const Use& use : call.uses) {
        if (call.tables.terms[use.term].weight != w) continue;
        const int64_t pixels = call.tables.jobs[use.job].out.pixels();
        for (int64_t image = 0; image < s_.images; ++image) {
          for (int64_t first = 0; first < pixels; first += kChunkRows) {
            items_.push_back(
                {&use, {use.job, image, first, std::min<int64_t>(kChunkRows, pixels - first)}});
          }
        }
      }
    }
    weight_starts_.push_back(static_cast<int64_t>(items_.size()));
  }

  void run() {
    const int64_t items = std::ssize(items_);
    const int64_t rounds = ceil_div(items, std::max<int64_t>(kGradientBytes / item_bytes(), 1));
    const int64_t together = rounds == 0 ? 1 : ceil_div(items, rounds);
    packed_ = std::make_unique_for_overwrite<std::byte[]>(std::min(together, items) * item_bytes());
    sums_ = std::make_unique_for_overwrite<F[]>(parts_ * call_.tables.weights *
                                                std::ssize(slices_) * s_.taps() * sum_values_);
    begun_.assign(parts_ * call_.tables.weights, false);
    for (int64_t first = 0; first < items; first += together) {
      const int64_t last = std::min(first + together, items);
      pack_gradients(first, last);
      multiply(first, last);
    }
    packed_ = {};
    store();
  }

 private:
  // A chunk of the rows of one use.
  struct Item {
    const Use* use;
    DeformChunk chunk;
  };

  struct Scratch {
    explicit Scratch(const WeightPass& pass)
        : corners(kChunkRows), columns(kChunkRows * pass.width_ * pass.call_.element_bytes) {}
    std::vector<Corners<F>> corners;
    std::vector<std::byte> columns;  // as row_gemm reads them
  };

  int64_t group_bytes() const { return kChunkRows * cols_ * call_.element_bytes; }
  int64_t item_bytes() const { return s_.groups * group_bytes(); }

  // As [item][group][panel][rows / pairs][tile_cols][pairs].
  void pack_gradients(int64_t first, int64_t last) {
    parallel_tasks(
        last - first,
        [&] {
          return std::vector<std::byte>(kChunkRows * call_.grad_stride * call_.element_bytes);
        },
        [&](int64_t i, std::vector<std::byte>& grad) {
          const DeformChunk& chunk = items_[first + i].chunk;
          call_.load_grad(chunk, grad.data());
          for (int32_t g = 0; g < s_.groups; ++g) {
            std::byte* to = packed_.get() + i * item_bytes() + g * group_bytes();
            if (call_.paired) {
              pack_pairs(reinterpret_cast<const uint16_t*>(grad.data()) + g * call_.group_outputs,
                         chunk.rows, reinterpret_cast<uint16_t*>(to));
            } else {
              pack_rows(reinterpret_cast<const F*>(grad.data()) + g * call_.group_outputs,
                        chunk.rows, reinterpret_cast<F*>(to));
            }
          }
        });
  }

  void pack_rows(const F* grad, int64_t rows, F* packed) const {
    for (int64_t o = 0; o < cols_; o += gemm_.tile_cols) {
      const int64_t count = std::min<int64_t>(gemm_.tile_cols, call_.group_outputs - o);
      for (int64_t r = 0; r < rows; ++r) {
        F* to = packed + o * rows + r * gemm_.tile_cols;
        std::copy_n(grad + r * call_.grad_stride + o, count, to);
        std::fill(to + count, to + gemm_.tile_cols, F(0));
      }
    }
  }

  // The last row of an odd number is paired with zeros.
  void pack_pairs(const uint16_t* grad, int64_t rows, uint16_t* packed) const {
    const std::vector<uint16_t> zeros(gemm_.tile_cols);
    for (int64_t o = 0; o < cols_; o += gemm_.tile_cols) {
      const int64_t count = std::min<int64_t>(gemm_.tile_cols, call_.group_outputs - o);
      for (int64_t r = 0; r < rows; r += 2) {
        uint16_t* to = packed + o * round_up(rows, 2) + r * gemm_.tile_cols;
        const uint16_t* even = grad + r * call_.grad_stride + o;
        const uint16_t* odd = r + 1 < rows ? even + call_.grad_stride : zeros.data();
        for (int64_t c = 0; c < count; ++c) {
          to[2 * c] = even[c];
          to[2 * c + 1] = odd[c];
        }
        std::fill(to + 2 * count, to + 2 * gemm_.tile_cols, uint16_t{0});
      }
    }
  }

  F* sum(int64_t part, int64_t weight, int64_t slice, int64_t tap) const {  // [rows, cols]
    const int64_t slices = std::ssize(slices_);
    const int64_t at = ((part * call_.tables.weights + weight) * slices + slice) * s_.taps() + tap;
    return sums_.get() + at * sum_values_;
  }

  // Items [first, last), whose gradients are packed. A task has some taps of one slice, for one
  // part of a weight's items; a single tap where that leaves too few tasks. The sums are the same.
  void multiply(int64_t first, int64_t last) {
    const int64_t slices = std::ssize(slices_);
    const int64_t first_weight = weight_of(first);
    const int64_t weights = weight_of(last - 1) - first_weight + 1;
    const int64_t wanted = 2 * static_cast<int64_t>(torch::stable::get_num_threads());
    const bool enough = weights * parts_ * slices * tap_groups_ >= wanted;
    const int64_t groups = enough ? tap_groups_ : s_.taps();
    const auto range = [&](int64_t weight, int64_t part) {
      const int64_t begin = std::max(first, weight_starts_[weight]);
      const int64_t count =
          std::max<int64_t>(std::min(last, weight_starts_[weight + 1]) - begin, 0);
      return std::pair(begin + count * part / parts_, begin + count * (part + 1) / parts_);
    };
    parallel_tasks(
        weights * parts_ * groups * slices, [&] { return Scratch(*this); },
        [&](int64_t task, Scratch& scratch) {
          const int64_t slice = task % slices, group = task / slices % groups;
          const int64_t part = task / (slices * groups) % parts_;
          const int64_t weight = first_weight + task / (slices * groups * parts_);
          const auto [begin, end] = range(weight, part);
          if (begin == end) return;
          const int64_t first_tap = s_.taps() * group / groups;
          const int64_t last_tap = s_.taps() * (group + 1) / groups;
          if (!begun_[weight * parts_ + part]) {
            std::fill(sum(part, weight, slice, first_tap),
                      sum(part, weight, slice, last_tap - 1) + sum_values_, F(0));
          }
          for (int64_t i = begin; i < end; ++i) {
            for (int64_t tap = first_tap; tap < last_tap; ++tap) {
              add_item(items_[i], packed_.get() + (i - first) * item_bytes(), slices_[slice],
                       static_cast<int32_t>(tap), scratch, sum(part, weight, slice, tap));
            }
          }
        });
    for (int64_t weight = first_weight; weight < first_weight + weights; ++weight) {
      for (int64_t part = 0; part < parts_; ++part) {
        const auto [begin, end] = range(weight, part);
        if (begin < end) begun_[weight * parts_ + part] = true;
      }
    }
  }

  int64_t weight_of(int64_t item) const {
    return call_.tables.terms[items_[item].use->term].weight;
  }

  void add_item(const Item& item, const std::byte* packed, const Slice& slice, int32_t tap,
                Scratch& scratch, F* sum) const {
    const DeformChunk& chunk = item.chunk;
    const MapShape& map = call_.tables.sources[call_.tables.terms[item.use->term].source];
    const T* source = call_.source_of(map, chunk.image) + slice.first;
    sample_rows(call_.sampler(*item.use, chunk.image), slice.deform_group, tap, chunk.first,
                chunk.rows, scratch.corners.data());
    if (call_.paired) {
      call_.kernels.blend_rows(source, s_.channels, slice.count, scratch.corners.data(), chunk.rows,
                               scratch.columns.data(), width_);
    } else {
      call_.kernels.blend_compute(source, s_.channels, slice.count, scratch.corners.data(),
                                  chunk.rows, reinterpret_cast<F*>(scratch.columns.data()), width_);
    }
    gemm_.run(scratch.columns.data(), 1, width_, packed + slice.group * group_bytes(), sum, cols_,
              round_up(slice.count, gemm_.tile_rows), cols_, round_up(chunk.rows, gemm_.pairs));
  }

  // Adds the parts up, in order.
  void store() const {
    const int64_t channels = s_.channels / s_.groups, taps = s_.taps();
    const int64_t slices = std::ssize(slices_);
    parallel_for_each(call_.tables.weights * slices * taps, [&](int64_t task) {
      const int64_t tap = task % taps, index = task / taps % slices, weight = task / taps / slices;
      const Slice& slice = slices_[index];
      F* out = static_cast<F*>(call_.p.grad_weights) +
               (weight * s_.out_channels + slice.group * call_.group_outputs) * channels * taps +
               (slice.first - slice.group * channels) * taps + tap;
      bool empty = true;
      for (int64_t part = 0; part < parts_; ++part) {
        if (!begun_[weight * parts_ + part]) continue;
        const F* found = sum(part, weight, index, tap);
        for (int64_t o = 0; o < call_.group_outputs; ++o) {
          for (int64_t c = 0; c < slice.count; ++c) {
            F& to = out[(o * channels + c) * taps];
            to = empty ? found[c * cols_ + o] : to + found[c * cols_ + o];
          }
        }
        empty = false;
      }
      for (int64_t i = 0; empty && i < call_.group_outputs * slice.count; ++i) {
        out[(i / slice.count * channels + i % slice.count) * taps] = F(0);
      }
    });
  }

  const BackwardCall<T>& call_;
  const DeformShape& s_;
  const GemmKernel<F>& gemm_;
  const std::vector<Slice> slices_;
  const int64_t cols_, rows_, width_, sum_values_;
  int64_t tap_groups_, parts_;
  std::vector<Item> items_;             // those of a weight follow each other
  std::vector<int64_t> weight_starts_;  // [weights + 1], into items_
  std::vector<bool> begun_;             // [weights, parts]: whether there are sums
  std::unique_ptr<std::byte[]> packed_;
  std::unique_ptr<F[]> sums_;  // [parts, weights, slices, taps, rows, cols]
};

}  // namespace

template <class T>
void weight_pass(const BackwardCall<T>& call) {
  WeightPass<T>(call).run();
}

#define DYHEAD_INSTANTIATE(type) template void weight_pass(const BackwardCall<type>&);
DYHEAD_FOR_EACH_TYPE(DYHEAD_INSTANTIATE)
#undef DYHEAD_INSTANTIATE

}  // namespace dyhead::cpu
