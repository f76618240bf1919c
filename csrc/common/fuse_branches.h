// The last step of a pyramid block, in one pass over pixels: the arguments of its kernels, shared
// by the CPU and the CUDA kernels.
//
//   z(p) = sum_b scale[b] up(y_b)(p) + shift,   out = max(a1 z + b1, a2 z + b2)
//
// where up is upsampling (upsample.h) from the branch's size to the level's, and the
// maximum is the dynamic ReLU (dynamic_relu.h). The scales contain the branches' normalisation,
// their gates and the 1 / count of their average; the shift contains all terms that depend on no
// pixel.
#pragma once

#include <cstdint>
#include <vector>

#include "deform_jobs.h"
#include "dynamic_relu.h"

namespace dyhead {

class Context;

inline constexpr int32_t kMaxBranches = 3;

struct FuseLevel {
  MapShape out;
  int32_t branches;              // 1 to kMaxBranches
  int32_t branch[kMaxBranches];  // indices of branch maps
  UpsampleMode mode;             // of branches that have another size
};

// The work of one call.
struct FuseTables {
  int64_t images, channels;
  DType dtype;                 // of y and out; all other tensors have its compute type
  std::vector<MapShape> maps;  // of the branches; each is used by one level
  std::vector<FuseLevel> levels;
  int64_t out_rows;
};

struct FuseBranchesFwdParams {
  const FuseTables* tables;
  const void* y;             // [S, C]
  const void* scale;         // [J, N, C]
  const void* shift;         // [L, N, C]
  const void* coefficients;  // [L, N, 4, C]: a1, b1, a2, b2
  void* out;                 // [R, C]
};

struct FuseBranchesBwdParams {
  const FuseTables* tables;
  const void* grad_out;  // [R, C]
  const void* y;         // as above, like the next three
  const void* scale;
  const void* shift;
  const void* coefficients;
  void* grad_y;             // [S, C]; null where not wanted, as all that follow
  void* grad_scale;         // [J, N, C]
  void* grad_shift;         // [L, N, C]
  void* grad_coefficients;  // [L, N, 4, C]
};

// The kernels of a library; see csrc/host/device.h.
void run_fuse_branches_fwd(const FuseBranchesFwdParams& params, Context& context);
void run_fuse_branches_bwd(const FuseBranchesBwdParams& params, Context& context);

// Channel c of coefficients [4, C].
template <class F>
DYHEAD_HD DynamicReluCoefficients<F> fuse_coefficients(const F* k, int64_t c, int64_t channels) {
  return {k[c], k[channels + c], k[2 * channels + c], k[3 * channels + c]};
}

}  // namespace dyhead
