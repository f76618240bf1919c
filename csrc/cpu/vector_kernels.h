// The inner loops, compiled once per instruction set; tables of functions, chosen at run time.
#pragma once

#include <cstdint>

#include "../common/sampling.h"

namespace dyhead::cpu {

// Rows that one task of a deformable convolution handles: a multiple of every tile's rows.
inline constexpr int kChunkRows = 144;

// c[rows, cols] += a[rows, k] b[k, cols]. A column is an F, or a bfloat16 where `pairs` is 2.
template <class F>
struct GemmKernel {
  int tile_rows;  // rows must be a multiple of it
  int tile_cols;  // cols must be a multiple of it; b is packed in panels of so many columns
  int pairs;      // neighbouring k that b interleaves: b[panel][k / pairs][tile_cols][pairs]
  // Element (r, k) of a is a[r * row_stride + k * k_stride], with k_stride = 1 where pairs is 2.
  void (*run)(const void* a, int64_t row_stride, int64_t k_stride, const void* b, F* c,
              int64_t c_stride, int64_t rows, int64_t cols, int64_t k);
};

// The corners of a sample that exist, and what the others contribute.
template <class T>
struct ExistingCorners {
  int count;  // 4, 2, 1 or none
  const T* from[4];
  compute_t<T> weight[4];
  compute_t<T> others;  // 0, or NaN
};

template <class T, class F>
DYHEAD_HD ExistingCorners<T> existing_corners(const Corners<F>& s, const T* source,
                                              int64_t stride) {
  ExistingCorners<T> existing{};
  for (int i = 0; i < 4; ++i) {
    if (s.pixel[i] < 0) {
      existing.others += s.weight[i] * F(0);
    } else {
      existing.from[existing.count] = source + s.pixel[i] * stride;
      existing.weight[existing.count++] = s.weight[i];
    }
  }
  return existing;
}

template <class T>
struct DeformKernels {
  using F = compute_t<T>;
  GemmKernel<F> gemm;         // columns of F
  GemmKernel<F> column_gemm;  // columns as `blend` writes them: those of `gemm`, or bfloat16
  // out[r, c] = sum_i weight[i] * source[pixel[i] * stride + c] for each of `rows` samples. The
  // value of a corner that does not exist is 0, here and in what follows.
  void (*blend)(const T* source, int64_t stride, int64_t channels, const Corners<F>* samples,
                int64_t rows, void* out, int64_t out_stride);
  // The same, always in columns of F.
  void (*blend_compute)(const T* source, int64_t stride, int64_t channels,
                        const Corners<F>* samples, int64_t rows, F* out, int64_t out_stride);
  // dots[r][i] = sum_c grad[r * grad_stride + c] * source[pixel[i] * stride + c], and
  // grad_source[pixel[i] * channels + c] += weight[i] * grad[r * grad_stride + c].
  void (*project_back)(const T* source, int64_t stride, int64_t channels, const Corners<F>* samples,
                       int64_t rows, const F* grad, int64_t grad_stride, F* grad_source,
                       F (*dots)[4]);
};

template <class T>
const DeformKernels<T>& deform_kernels();

// The instruction sets that the library has kernels for on this kind of processor, from narrow to
// wide; cpu_capability() is an index.
#if defined(__x86_64__)
enum Capability { kDefault, kAvx2, kAvx512, kAvx512Bf16 };
inline constexpr const char* kCapabilities[] = {"default", "avx2", "avx512", "avx512bf16"};
#elif defined(__aarch64__)
enum Capability { kNeon };
inline constexpr const char* kCapabilities[] = {"neon"};
#else
enum Capability { kDefault };
inline constexpr const char* kCapabilities[] = {"default"};
#endif

// The widest of them that this CPU has, or the narrower one that DYHEAD_CPU_CAPABILITY names.
// Raises where the CPU lacks the one named.
Capability cpu_capability();

#define DYHEAD_DECLARE_KERNELS(set)                \
  extern const DeformKernels<double> f64_##set;    \
  extern const DeformKernels<float> f32_##set;     \
  extern const DeformKernels<bfloat16> bf16_##set; \
  extern const DeformKernels<float16> f16_##set;

DYHEAD_DECLARE_KERNELS(default)
DYHEAD_DECLARE_KERNELS(neon)
DYHEAD_DECLARE_KERNELS(avx2)
DYHEAD_DECLARE_KERNELS(avx512)
#undef DYHEAD_DECLARE_KERNELS
const DeformKernels<bfloat16>& bf16_avx512bf16();

}  // namespace dyhead::cpu
