// What an operator's call gives to its kernels: nothing, on a CPU. csrc/cuda/context.h has more.
#pragma once

namespace dyhead {

class Context {};

}  // namespace dyhead
