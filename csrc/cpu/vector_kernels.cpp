#include "vector_kernels.h"

#include <cstdlib>
#include <exception>
#include <iterator>
#include <string>
#include <string_view>

#include "../host/tensors.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace dyhead::cpu {
namespace {

#if defined(__x86_64__)
// Not all compilers know this one's name in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

// Whether the CPU has tiles of bfloat16, and the kernel lets this process use them: they are large,
// so it asks first (Documentation/arch/x86/xstate.rst of Linux).
bool may_use_tiles() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // of leaf 7's edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kBf16) == 0 || (d & kTiles) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Capability widest() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
  if (pairs && may_use_tiles()) return kAmx;
  if (pairs) return kAvx512Bf16;
  if (avx512) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return Capability{};
}

// Of what the CPU has, what to use unless told otherwise.
Capability fastest(Capability best) {
#if defined(__x86_64__)
  // A product of pairs takes Intel's as long as four of float32, which do twice as much.
  if (best == kAvx512Bf16 && __builtin_cpu_is("intel")) return kAvx512;
#endif
  return best;
}

Capability chosen() {
  const char* wanted = std::getenv("DYHEAD_CPU_CAPABILITY");
  const Capability best = widest();
  if (wanted == nullptr || *wanted == '\0') return fastest(best);
  std::string names;
  for (int i = 0; i < static_cast<int>(std::size(kCapabilities)); ++i) {
    names += (i == 0 ? "" : ", ") + std::string(kCapabilities[i]);
    if (kCapabilities[i] != std::string_view(wanted)) continue;
    STD_TORCH_CHECK(i <= best, "DYHEAD_CPU_CAPABILITY is ", wanted,
                    ", but this CPU and its system offer ", kCapabilities[best], " at most");
    return static_cast<Capability>(i);
  }
  STD_TORCH_CHECK(false, "expected DYHEAD_CPU_CAPABILITY to be one of ", names, ", got ", wanted);
}

}  // namespace

Capability cpu_capability() {
  static const Capability capability = chosen();
  return capability;
}

// The name of cpu_capability(), or why there is none.
extern "C" __attribute__((visibility("default"))) const char* dyhead_cpu_capability() {
  static const std::string answer = []() -> std::string {
    try {
      return kCapabilities[cpu_capability()];
    } catch (const std::exception& error) {
      return error.what();
    }
  }();
  return answer.c_str();
}

#if defined(__x86_64__)
#define DYHEAD_SELECT(type)   \
  switch (cpu_capability()) { \
    case kDefault:            \
      return type##_default;  \
    case kAvx2:               \
      return type##_avx2;     \
    default:                  \
      return type##_avx512;   \
  }
#elif defined(__aarch64__)
#define DYHEAD_SELECT(type) \
  cpu_capability();         \
  return type##_neon;
#else
#define DYHEAD_SELECT(type) \
  cpu_capability();         \
  return type##_default;
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
    if (cpu_capability() == Capability::kAmx) return bf16_amx();
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
