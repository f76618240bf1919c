#include "fuse_branches.h"

#include "context.h"

namespace dyhead::cpu {
namespace {

template <class T>
class Forward {
 public:
  using F = compute_t<T>;

  explicit Forward(const FuseBranchesFwdParams& params)
      : p_(params), t_(*params.tables), branches_(fuse_branches<F>(t_)) {}

  void run() const {
    const std::vector<FuseTask> tasks = fuse_tasks(t_);
    const int64_t count = static_cast<int64_t>(tasks.size());
    parallel_tasks(
        t_.images * count,
        [&] { return FuseReader<T>(t_, branches_, static_cast<const T*>(p_.y)); },
        [&](int64_t i, FuseReader<T>& reader) { fuse(tasks[i % count], i / count, reader); });
  }

 private:
  void fuse(const FuseTask& task, int64_t image, FuseReader<T>& reader) const {
    const FuseLevel& level = t_.levels[task.level];
    const int64_t channels = t_.channels;
    FusedPixel<F> pixel = fused_pixel<F>(p_, task.level, image);
    const auto fuse_one = fuse_kernels<T>().fuse[level.branches - 1];
    const int64_t row = level.out.first_row + image * level.out.pixels() +
                        static_cast<int64_t>(task.first) * level.out.width;
    T* out = static_cast<T*>(p_.out) + row * channels;
    for (int32_t y = task.first; y < task.last; ++y) {
      reader.start_row(level, image, y);
      for (int32_t x = 0; x < level.out.width; ++x, out += channels) {
        for (int32_t b = 0; b < level.branches; ++b) pixel.branch[b] = reader.value(b, x);
        fuse_one(pixel, out);
      }
    }
  }

  const FuseBranchesFwdParams& p_;
  const FuseTables& t_;
  std::vector<FuseBranch<F>> branches_;
};

}  // namespace
}  // namespace dyhead::cpu

namespace dyhead {

void run_fuse_branches_fwd(const FuseBranchesFwdParams& params, Context&) {
  if (params.tables->images == 0) return;  // sizes then have no bound
  dispatch_dtype(params.tables->dtype,
                 [&](auto zero) { cpu::Forward<decltype(zero)>(params).run(); });
}

}  // namespace dyhead
