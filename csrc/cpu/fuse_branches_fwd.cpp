#include "fuse_branches.h"

#include "context.h"

namespace dyhead::cpu {
namespace {

// One pixel of a level with kBranches branches: their values u and scales s [C].
template <int kBranches, class T, class F>
void fuse_pixel(int64_t channels, const F* u0, const F* u1, const F* u2, const F* s0, const F* s1,
                const F* s2, const F* shift, const F* coefficients, T* __restrict out) {
  for (int64_t c = 0; c < channels; ++c) {
    F z = s0[c] * u0[c] + shift[c];
    if constexpr (kBranches > 1) z += s1[c] * u1[c];
    if constexpr (kBranches > 2) z += s2[c] * u2[c];
    out[c] = from_compute<T>(dynamic_relu_value(fuse_coefficients(coefficients, c, channels), z));
  }
}

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
        [&](int64_t i, FuseReader<T>& reader) {
          const FuseTask& task = tasks[i % count];
          switch (t_.levels[task.level].branches) {
            case 1:
              return fuse<1>(task, i / count, reader);
            case 2:
              return fuse<2>(task, i / count, reader);
            default:
              return fuse<3>(task, i / count, reader);
          }
        });
  }

 private:
  template <int kBranches>
  void fuse(const FuseTask& task, int64_t image, FuseReader<T>& reader) const {
    const FuseLevel& level = t_.levels[task.level];
    const int64_t channels = t_.channels;
    const int64_t at = task.level * t_.images + image;
    const F* shift = static_cast<const F*>(p_.shift) + at * channels;
    const F* coefficients = static_cast<const F*>(p_.coefficients) + at * 4 * channels;
    const F* scale[kBranches];
    for (int b = 0; b < kBranches; ++b) {
      scale[b] = static_cast<const F*>(p_.scale) + (level.branch[b] * t_.images + image) * channels;
    }
    const int64_t row = level.out.first_row + image * level.out.pixels() +
                        static_cast<int64_t>(task.first) * level.out.width;
    T* out = static_cast<T*>(p_.out) + row * channels;
    for (int32_t y = task.first; y < task.last; ++y) {
      reader.start_row(level, image, y);
      for (int32_t x = 0; x < level.out.width; ++x, out += channels) {
        const F* u[kBranches];
        for (int b = 0; b < kBranches; ++b) u[b] = reader.value(b, x);
        constexpr int kSecond = kBranches > 1 ? 1 : 0, kThird = kBranches - 1;
        fuse_pixel<kBranches>(channels, u[0], u[kSecond], u[kThird], scale[0], scale[kSecond],
                              scale[kThird], shift, coefficients, out);
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
