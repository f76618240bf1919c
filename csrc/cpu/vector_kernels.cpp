#include "vector_kernels.h"

#include <cstdlib>
#include <string>

#include "../host/tensors.h"

namespace dyhead::cpu {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512bf16"};

Capability widest() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Capability::kAvx512Bf16;
  if (avx512) return Capability::kAvx512;
  if (avx2) return Capability::kAvx2;
#endif
  return Capability::kDefault;
}

Capability chosen() {
  const char* wanted = std::getenv("DYHEAD_CPU_CAPABILITY");
  const Capability best = widest();
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int i = 0; i < 4; ++i) {
    if (kNames[i] != std::string(wanted)) continue;
    STD_TORCH_CHECK(i <= static_cast<int>(best), "DYHEAD_CPU_CAPABILITY is ", wanted,
                    ", but this CPU offers ", kNames[static_cast<int>(best)], " at most");
    return static_cast<Capability>(i);
  }
  STD_TORCH_CHECK(false,
                  "expected DYHEAD_CPU_CAPABILITY to be default, avx2, avx512 or "
                  "avx512bf16, got ",
                  wanted);
}

}  // namespace

Capability cpu_capability() {
  static const Capability capability = chosen();
  return capability;
}

#if defined(__x86_64__)
#define DYHEAD_SELECT(type)    \
  switch (cpu_capability()) {  \
    case Capability::kDefault: \
      return type##_default;   \
    case Capability::kAvx2:    \
      return type##_avx2;      \
    default:                   \
      return type##_avx512;    \
  }
#else
#define DYHEAD_SELECT(type) return type##_default;
#endif

namespace {

template <class T>
const Kernels<T>& kernels();

template <>
const Kernels<double>& kernels<double>() {
  DYHEAD_SELECT(f64)
}

template <>
const Kernels<float>& kernels<float>() {
  DYHEAD_SELECT(f32)
}

template <>
const Kernels<float16>& kernels<float16>() {
  DYHEAD_SELECT(f16)
}

template <>
const Kernels<bfloat16>& kernels<bfloat16>() {
  DYHEAD_SELECT(bf16)
}

}  // namespace

template <class T>
const DeformKernels<T>& deform_kernels() {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (cpu_capability() == Capability::kAvx512Bf16) return bf16_avx512bf16();
  }
#endif
  return kernels<T>().deform;
}

template <class T>
const FuseKernels<T>& fuse_kernels() {
  return kernels<T>().fuse;
}

#define DYHEAD_INSTANTIATE(type)                          \
  template const DeformKernels<type>& deform_kernels<>(); \
  template const FuseKernels<type>& fuse_kernels<>();
DYHEAD_INSTANTIATE(double)
DYHEAD_INSTANTIATE(float)
DYHEAD_INSTANTIATE(float16)
DYHEAD_INSTANTIATE(bfloat16)
#undef DYHEAD_INSTANTIATE

}  // namespace dyhead::cpu
