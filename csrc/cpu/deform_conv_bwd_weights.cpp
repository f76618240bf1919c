// The gradient of the weights: columns^T . grad_out of all chunks that use a weight. The gradients
// of a round of chunks are packed once, for all taps and slices of channels. Tasks sample their
// columns again instead of storing them. Sums wait for the last round, and for those of other parts
// of the chunks. Where products take pairs of bfloat16, they are grad_out^T . columns: the
// gradients are what is read along the rows then, and the columns lie in panels.
#include "deform_conv_bwd.h"
#include "transpose.h"

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
        gemm_(call.paired ? call.kernels.column_gemm : call.kernels.gemm),
        slices_(make_slices(s_, kSliceChannels)),
        // Sums over more rows pass through the tiles less often.
        item_rows_(call.paired ? 2 * kChunkRows : kChunkRows),
        outputs_(round_up(call.group_outputs, call.paired ? gemm_.tile_rows : gemm_.tile_cols)),
        channels_(round_up(std::min(kSliceChannels, s_.channels),
                           call.paired ? gemm_.tile_cols : gemm_.tile_rows)),
        // One vector more than a multiple of the cache's sets, so that rows do not collide.
        width_(channels_ + 16),
        sum_values_(channels_ * outputs_) {
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
          for (int64_t first = 0; first < pixels; first += item_rows_) {
            items_.push_back({&use, {use.job, image, first, std::min(item_rows_, pixels - first)}});
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
  // Rows of one use.
  struct Item {
    const Use* use;
    DeformChunk chunk;
  };

  struct Scratch {
    explicit Scratch(const WeightPass& pass)
        : corners(pass.item_rows_),
          columns(pass.item_rows_ * pass.width_ * pass.call_.element_bytes) {}
    std::vector<Corners<F>> corners;
    std::vector<std::byte> columns;  // [rows, width], or panels
  };

  int64_t group_bytes() const { return item_rows_ * outputs_ * call_.element_bytes; }
  int64_t item_bytes() const { return s_.groups * group_bytes(); }

  // As [item][group] and there, for pairs, [outputs][rows], otherwise [panel][rows][tile_cols].
  void pack_gradients(int64_t first, int64_t last) {
    parallel_tasks(
        last - first,
        [&] {
          return std::vector<std::byte>(item_rows_ * call_.grad_stride * call_.element_bytes);
        },
        [&](int64_t i, std::vector<std::byte>& grad) {
          const DeformChunk& chunk = items_[first + i].chunk;
          for (int64_t r = 0; r < chunk.rows; r += kChunkRows) {
            const DeformChunk part{chunk.job, chunk.image, chunk.first + r,
                                   std::min<int64_t>(kChunkRows, chunk.rows - r)};
            call_.load_grad(part, grad.data() + r * call_.grad_stride * call_.element_bytes);
          }
          for (int32_t g = 0; g < s_.groups; ++g) {
            std::byte* to = packed_.get() + i * item_bytes() + g * group_bytes();
            if (call_.paired) {
              pack_outputs(reinterpret_cast<const uint16_t*>(grad.data()) + g * call_.group_outputs,
                           chunk.rows, reinterpret_cast<uint16_t*>(to));
            } else {
              pack_panels(reinterpret_cast<const F*>(grad.data()) + g * call_.group_outputs,
                          chunk.rows, reinterpret_cast<F*>(to));
            }
          }
        });
  }

  void pack_panels(const F* grad, int64_t rows, F* packed) const {
    for (int64_t o = 0; o < outputs_; o += gemm_.tile_cols) {
      const int64_t count = std::min<int64_t>(gemm_.tile_cols, call_.group_outputs - o);
      for (int64_t r = 0; r < rows; ++r) {
        F* to = packed + o * rows + r * gemm_.tile_cols;
        std::copy_n(grad + r * call_.grad_stride + o, count, to);
        std::fill(to + count, to + gemm_.tile_cols, F(0));
      }
    }
  }

  // The last row of an odd number is paired with zeros.
  void pack_outputs(const uint16_t* grad, int64_t rows, uint16_t* packed) const {
    transpose(grad, call_.grad_stride, rows, call_.group_outputs, packed, item_rows_);
    for (int64_t o = 0; rows % 2 != 0 && o < call_.group_outputs; ++o) {
      packed[o * item_rows_ + rows] = 0;
    }
    std::fill(packed + call_.group_outputs * item_rows_, packed + outputs_ * item_rows_,
              uint16_t{0});
  }

  // [channels, outputs], for pairs [outputs, channels].
  F* sum(int64_t part, int64_t weight, int64_t slice, int64_t tap) const {
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
    const std::byte* grad = packed + slice.group * group_bytes();
    std::byte* columns = scratch.columns.data();
    if (call_.paired) {
      const int64_t rows = round_up(chunk.rows, 2);
      call_.kernels.blend_rows(source, s_.channels, slice.count, scratch.corners.data(), chunk.rows,
                               columns, rows * gemm_.tile_cols);
      gemm_.run(grad, item_rows_, 1, columns, sum, channels_, outputs_,
                round_up(slice.count, gemm_.tile_cols), rows);
    } else {
      call_.kernels.blend_compute(source, s_.channels, slice.count, scratch.corners.data(),
                                  chunk.rows, reinterpret_cast<F*>(columns), width_);
      gemm_.run(columns, 1, width_, grad, sum, outputs_, round_up(slice.count, gemm_.tile_rows),
                outputs_, chunk.rows);
    }
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
            const F value = found[call_.paired ? o * channels_ + c : c * outputs_ + o];
            F& to = out[(o * channels + c) * taps];
            to = empty ? value : to + value;
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
  const int64_t item_rows_, outputs_, channels_, width_, sum_values_;
  int64_t tap_groups_, parts_;
  std::vector<Item> items_;             // those of a weight follow each other
  std::vector<int64_t> weight_starts_;  // [weights + 1], into items_
  std::vector<bool> begun_;             // [weights, parts]: whether there are sums
  std::unique_ptr<std::byte[]> packed_;
  std::unique_ptr<F[]> sums_;  // [parts, weights, slices, taps], see sum()
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
