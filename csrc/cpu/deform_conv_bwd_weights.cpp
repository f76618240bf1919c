// The gradient of the weights: columns^T . grad_out of all chunks that use a weight. The gradients
// of a round of chunks are packed once, for all taps and slices of channels. Tasks sample their
// columns again instead of storing them.
#include <cstring>

#include "deform_conv_bwd.h"

namespace dyhead::cpu {
namespace {

constexpr int64_t kSliceChannels = 96;        // whole tiles of rows and whole vectors
constexpr int64_t kGradientBytes = 24 << 20;  // of packed gradients held at a time

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
        // One vector more than a multiple of the cache's sets, so that rows do not collide.
        width_(round_up(std::min(kSliceChannels, s_.channels), gemm_.tile_rows) + 16) {
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
    const int64_t size = call_.group_outputs * (s_.channels / s_.groups) * s_.taps() * s_.groups;
    for (int64_t w = 0; w < call_.tables.weights; ++w) {
      if (weight_starts_[w] < weight_starts_[w + 1]) continue;
      std::fill_n(static_cast<F*>(call_.p.grad_weights) + w * size, size, F(0));
    }
    const int64_t items = static_cast<int64_t>(items_.size());
    const int64_t rounds = ceil_div(items, std::max<int64_t>(kGradientBytes / item_bytes(), 1));
    if (rounds == 0) return;
    const int64_t together = ceil_div(items, rounds);
    packed_ = std::make_unique_for_overwrite<std::byte[]>(together * item_bytes());
    for (int64_t first = 0; first < items; first += together) {
      const int64_t last = std::min(first + together, items);
      pack_gradients(first, last);
      multiply(first, last);
    }
  }

 private:
  // A chunk of the rows of one use.
  struct Item {
    const Use* use;
    DeformChunk chunk;
  };

  struct Scratch {
    explicit Scratch(const WeightPass& pass)
        : corners(kChunkRows),
          columns(kChunkRows * pass.width_ * pass.call_.element_bytes),
          sum(round_up(kSliceChannels, pass.gemm_.tile_rows) * pass.cols_) {}
    std::vector<Corners<F>> corners;
    std::vector<std::byte> columns;  // as row_gemm reads them
    std::vector<F> sum;              // [channels of a slice, cols]
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

  // Items [first, last), whose gradients are packed.
  void multiply(int64_t first, int64_t last) const {
    const int64_t slices = static_cast<int64_t>(slices_.size()), taps = s_.taps();
    const auto weight_of = [&](int64_t item) {
      return static_cast<int64_t>(call_.tables.terms[items_[item].use->term].weight);
    };
    const int64_t first_weight = weight_of(first);
    const int64_t weights = weight_of(last - 1) - first_weight + 1;
    parallel_tasks(
        weights * taps * slices, [&] { return Scratch(*this); },
        [&](int64_t task, Scratch& scratch) {
          const int64_t weight = first_weight + task / (taps * slices);
          const auto tap = static_cast<int32_t>(task / slices % taps);
          const Slice& slice = slices_[task % slices];
          const int64_t begin = std::max(first, weight_starts_[weight]);
          const int64_t end = std::min(last, weight_starts_[weight + 1]);
          if (begin >= end) return;
          std::fill(scratch.sum.begin(), scratch.sum.end(), F(0));
          for (int64_t i = begin; i < end; ++i) {
            add_item(items_[i], packed_.get() + (i - first) * item_bytes(), slice, tap, scratch);
          }
          store(weight, slice, tap, begin == weight_starts_[weight], scratch.sum.data());
        });
  }

  void add_item(const Item& item, const std::byte* packed, const Slice& slice, int32_t tap,
                Scratch& scratch) const {
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
    gemm_.run(scratch.columns.data(), 1, width_, packed + slice.group * group_bytes(),
              scratch.sum.data(), cols_, round_up(slice.count, gemm_.tile_rows), cols_,
              round_up(chunk.rows, gemm_.pairs));
  }

  // `sum` [channels of the slice, cols] is stored, or added to what earlier rounds found.
  void store(int64_t weight, const Slice& slice, int32_t tap, bool is_first, const F* sum) const {
    const int64_t channels = s_.channels / s_.groups, taps = s_.taps();
    F* out = static_cast<F*>(call_.p.grad_weights) +
             (weight * s_.out_channels + slice.group * call_.group_outputs) * channels * taps +
             (slice.first - slice.group * channels) * taps + tap;
    for (int64_t o = 0; o < call_.group_outputs; ++o) {
      for (int64_t c = 0; c < slice.count; ++c) {
        F& to = out[(o * channels + c) * taps];
        to = is_first ? sum[c * cols_ + o] : to + sum[c * cols_ + o];
      }
    }
  }

  const BackwardCall<T>& call_;
  const DeformShape& s_;
  const GemmKernel<F>& gemm_;
  const std::vector<Slice> slices_;
  const int64_t cols_, width_;
  std::vector<Item> items_;             // those of a weight follow each other
  std::vector<int64_t> weight_starts_;  // [weights + 1], into items_
  std::unique_ptr<std::byte[]> packed_;
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
