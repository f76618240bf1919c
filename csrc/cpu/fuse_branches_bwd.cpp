// Backward, image by image: with g_z the gradient of z at a pixel,
//
//   1. per task: z anew; the sums over its pixels for all that is per channel; grad_y of branches
//      that have the level's size; and for smaller ones the transposed interpolation along x, into
//      a line of the branch's width per row of the level
//   2. per channel: the tasks' sums, added in order
//   3. per row of a smaller branch: the lines of the level's rows that read it, weighted, are
//   grad_y
//
// No gradient is scattered by two tasks to one place, and the lines are all that is kept of g_z.
#include <memory>

#include "fuse_branches.h"

#include "context.h"

namespace dyhead::cpu {
namespace {

template <class T>
class Backward {
 public:
  using F = compute_t<T>;

  explicit Backward(const FuseBranchesBwdParams& params)
      : p_(params),
        t_(*params.tables),
        branches_(fuse_branches<F>(t_)),
        tasks_(fuse_tasks(t_)),
        first_line_(branches_.size()),
        sums_(std::make_unique_for_overwrite<F[]>(tasks_.size() * kFuseSums * t_.channels)) {
    int64_t size = 0;
    for (const FuseLevel& level : t_.levels) {
      for (int32_t b = 0; b < level.branches; ++b) {
        const int32_t j = level.branch[b];
        const FuseBranch<F>& branch = branches_[j];
        if (!branch.resized || p_.grad_y == nullptr || branch.map.pixels() == 0) continue;
        first_line_[j] = size;
        size += static_cast<int64_t>(branch.y.size()) * branch.map.width * t_.channels;
        for (int32_t y = 0; y < branch.map.height; ++y) resized_rows_.push_back({j, y});
      }
    }
    lines_ = std::make_unique_for_overwrite<F[]>(size);
  }

  void run() const {
    for (int64_t image = 0; image < t_.images; ++image) {
      parallel_tasks(
          static_cast<int64_t>(tasks_.size()), [&] { return Scratch(*this); },
          [&](int64_t i, Scratch& scratch) { pixel_pass(i, image, scratch); });
      parallel_for_each(static_cast<int64_t>(t_.levels.size()),
                        [&](int64_t level) { sum_pass(level, image); });
      parallel_tasks(
          static_cast<int64_t>(resized_rows_.size()), [&] { return std::vector<F>(t_.channels); },
          [&](int64_t i, std::vector<F>& sum) {
            resized_pass(resized_rows_[i].branch, resized_rows_[i].y, image, sum.data());
          });
    }
  }

 private:
  struct Scratch {
    FuseReader<T> reader;
    std::vector<F> grad_z;  // [C]

    explicit Scratch(const Backward& b)
        : reader(b.t_, b.branches_, static_cast<const T*>(b.p_.y)), grad_z(b.t_.channels) {}
  };

  struct BranchRow {
    int32_t branch, y;
  };

  const F* scale(int32_t branch, int64_t image) const {
    return static_cast<const F*>(p_.scale) + (branch * t_.images + image) * t_.channels;
  }

  T* grad_y(int32_t branch, int64_t image, int32_t y) const {
    const MapShape& map = branches_[branch].map;
    const int64_t row = map.first_row + image * map.pixels() + static_cast<int64_t>(y) * map.width;
    return static_cast<T*>(p_.grad_y) + row * t_.channels;
  }

  F* line(int32_t branch, int32_t y) const {
    return lines_.get() + first_line_[branch] +
           static_cast<int64_t>(y) * branches_[branch].map.width * t_.channels;
  }

  void pixel_pass(int64_t task_index, int64_t image, Scratch& scratch) const {
    const FuseTask& task = tasks_[task_index];
    const FuseLevel& level = t_.levels[task.level];
    const int64_t channels = t_.channels;
    FusedPixel<F> pixel = fused_pixel<F>(p_, task.level, image);
    const auto differentiate = kernels_.differentiate[level.branches - 1];
    const int64_t row = level.out.first_row + image * level.out.pixels() +
                        static_cast<int64_t>(task.first) * level.out.width;
    const T* grad_out = static_cast<const T*>(p_.grad_out) + row * channels;
    F* sums = sums_.get() + task_index * kFuseSums * channels;
    std::fill(sums, sums + kFuseSums * channels, F(0));
    for (int32_t y = task.first; y < task.last; ++y) {
      scratch.reader.start_row(level, image, y);
      for (int32_t b = 0; b < level.branches; ++b) {
        const FuseBranch<F>& branch = branches_[level.branch[b]];
        if (!branch.resized || p_.grad_y == nullptr) continue;
        F* to = line(level.branch[b], y);
        std::fill(to, to + branch.map.width * channels, F(0));
      }
      for (int32_t x = 0; x < level.out.width; ++x, grad_out += channels) {
        for (int32_t b = 0; b < level.branches; ++b) pixel.branch[b] = scratch.reader.value(b, x);
        F* grad_z = scratch.grad_z.data();
        differentiate(pixel, grad_out, grad_z, sums);
        if (p_.grad_y == nullptr) continue;
        for (int32_t b = 0; b < level.branches; ++b) {
          const FuseBranch<F>& branch = branches_[level.branch[b]];
          if (branch.resized) {
            const Interpolation<F>& position = branch.x[x];
            F* to = line(level.branch[b], y);
            kernels_.add_scaled(grad_z, F(1) - position.fraction, channels,
                                to + position.first * channels);
            kernels_.add_scaled(grad_z, position.fraction, channels,
                                to + position.second * channels);
          } else {
            kernels_.multiply(grad_z, pixel.scale[b], channels,
                              grad_y(level.branch[b], image, y) + x * channels);
          }
        }
      }
    }
  }

  void sum_pass(int64_t level_index, int64_t image) const {
    const FuseLevel& level = t_.levels[level_index];
    const int64_t channels = t_.channels;
    const int64_t at = level_index * t_.images + image;
    F* to[kFuseSums];
    const auto place = [&](void* result, int64_t index) {
      return result == nullptr ? nullptr : static_cast<F*>(result) + index * channels;
    };
    for (int i = 0; i < 4; ++i) to[i] = place(p_.grad_coefficients, at * 4 + i);
    to[kShift] = place(p_.grad_shift, at);
    for (int32_t b = 0; b < level.branches; ++b) {
      to[kScale + b] = place(p_.grad_scale, level.branch[b] * t_.images + image);
    }
    for (int i = 0; i < kScale + level.branches; ++i) {
      if (to[i] == nullptr) continue;
      std::fill(to[i], to[i] + channels, F(0));
      for (size_t task = 0; task < tasks_.size(); ++task) {
        if (tasks_[task].level != level_index) continue;
        kernels_.add_scaled(sums_.get() + (task * kFuseSums + i) * channels, F(1), channels, to[i]);
      }
    }
  }

  void resized_pass(int32_t branch_index, int32_t y, int64_t image, F* sum) const {
    const FuseBranch<F>& branch = branches_[branch_index];
    const int64_t channels = t_.channels;
    const F* s = scale(branch_index, image);
    T* out = grad_y(branch_index, image, y);
    const int32_t height = static_cast<int32_t>(branch.y.size());
    const Readers<F> readers = readers_of<F>(y, branch.map.height, height, branch.mode);
    for (int32_t x = 0; x < branch.map.width; ++x, out += channels) {
      std::fill(sum, sum + channels, F(0));
      for (int32_t i = readers.begin; i < readers.end; ++i) {
        kernels_.add_scaled(line(branch_index, i) + x * channels, readers.weight(i), channels, sum);
      }
      kernels_.multiply(sum, s, channels, out);
    }
  }

  const FuseBranchesBwdParams& p_;
  const FuseTables& t_;
  const FuseKernels<T>& kernels_ = fuse_kernels<T>();
  std::vector<FuseBranch<F>> branches_;
  std::vector<FuseTask> tasks_;
  std::vector<int64_t> first_line_;  // by branch, in `lines_`
  std::vector<BranchRow> resized_rows_;
  std::unique_ptr<F[]> sums_;   // [tasks, kFuseSums, C]
  std::unique_ptr<F[]> lines_;  // per branch of another size: [H, w, C]
};

}  // namespace
}  // namespace dyhead::cpu

namespace dyhead {

void run_fuse_branches_bwd(const FuseBranchesBwdParams& params, Context&) {
  if (params.tables->images == 0) return;  // sizes then have no bound
  dispatch_dtype(params.tables->dtype,
                 [&](auto zero) { cpu::Backward<decltype(zero)>(params).run(); });
}

}  // namespace dyhead
