// Storage types and their compute types, shared by the CPU and the CUDA kernels.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DYHEAD_HD __host__ __device__ __forceinline__
#else
#define DYHEAD_HD [[gnu::always_inline]] inline
#endif

namespace dyhead {

// 16-bit patterns, laid out as torch.bfloat16 and torch.float16; they have no arithmetic of their
// own.
struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

template <class T>
inline constexpr bool is_half_v = std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>;

// The type that arithmetic and statistics use for values stored as T.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

namespace detail {

DYHEAD_HD uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
DYHEAD_HD float bits_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }

}  // namespace detail

DYHEAD_HD float bfloat16_to_float(bfloat16 x) {
  return detail::bits_float(static_cast<uint32_t>(x.bits) << 16);
}

// Rounds to nearest, ties to even; overflows to infinity; NaN stays NaN.
DYHEAD_HD bfloat16 float_to_bfloat16(float x) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = detail::float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // Rounding could carry a NaN's mantissa away, so a NaN is truncated and made quiet instead.
  const uint32_t quiet_nan = (bits >> 16) | 0x0040u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? quiet_nan : rounded)};
#endif
}

DYHEAD_HD float float16_to_float(float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Denormals are multiples of 2^-24; an integer conversion keeps them exact even if the processor
  // flushes denormals to zero.
  const uint32_t denormal = detail::float_bits(static_cast<float>(magnitude) * 0x1p-24f);
  // Rebias the exponent from 15 to 127; infinity and NaN go from exponent 31 to 255.
  const uint32_t rebias = magnitude >= 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
  const uint32_t normal = (magnitude << 13) + rebias;
  return detail::bits_float(sign | (magnitude < 0x0400u ? denormal : normal));
#endif
}

// Rounds to nearest, ties to even; 65520 and above overflow to infinity; NaN stays NaN.
DYHEAD_HD float16 float_to_float16(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = detail::float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x03ffu);
  } else if (magnitude >= 0x47800000u) {  // 2^16 and infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: a denormal half, a multiple of 2^-24
    // 0.5 has a unit in the last place of 2^-24, so this addition does the rounding.
    half = detail::float_bits(detail::bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - ((127u - 15u) << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
#endif
}

DYHEAD_HD double to_compute(double x) { return x; }
DYHEAD_HD float to_compute(float x) { return x; }
DYHEAD_HD float to_compute(bfloat16 x) { return bfloat16_to_float(x); }
DYHEAD_HD float to_compute(float16 x) { return float16_to_float(x); }

template <class T>
DYHEAD_HD T from_compute(compute_t<T> x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return float_to_bfloat16(x);
  } else if constexpr (std::is_same_v<T, float16>) {
    return float_to_float16(x);
  } else {
    return x;
  }
}

}  // namespace dyhead
