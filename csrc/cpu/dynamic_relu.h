// The CPU kernels of dynamic_relu, forward and backward.
#pragma once

#include "../common/dynamic_relu.h"

namespace dyhead::cpu {

// Rows that one task sums or maps: fixed, so that sums do not depend on the number of threads.
inline constexpr int64_t kDynamicReluRows = 256;

void run_dynamic_relu_fwd(const DynamicReluFwdParams& params);
void run_dynamic_relu_bwd(const DynamicReluBwdParams& params);

}  // namespace dyhead::cpu
