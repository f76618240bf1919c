// The inner loops, compiled once per instruction set; tables of functions, chosen at run time.
#pragma once

#include <cstdint>

#include "../common/fuse_branches.h"
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

// What the gradients of the moments of rows y add to the gradient of y:
// share * (grad_mean + 2 (y - mean) grad_var) + up_weight * grad_up_mean.
template <class T>
struct MomentGrads {
  using F = compute_t<T>;
  const T* y;                                           // [rows, channels]
  const F *mean, *grad_mean, *grad_var, *grad_up_mean;  // [channels]
  const F* up_weights;                                  // [rows]
  F share;
};

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
  // Adds `bias` [channels], if any, to rows of sums, and writes them to `out` [rows, channels]. The
  // sums become what was written, after its rounding to T.
  void (*store)(F* sums, int64_t stride, int64_t rows, int64_t channels, const F* bias, T* out);
  // The same, without rounding.
  void (*store_compute)(F* sums, int64_t stride, int64_t rows, int64_t channels, const F* bias,
                        F* out);
  // Per channel of at least one row: the mean, the sum of the squared deviations from it, and that
  // of the deviations times the rows' weights. A mean may be much larger than the deviations, so
  // values are summed as differences from the first row.
  void (*moments)(const F* y, int64_t stride, int64_t rows, int64_t channels, const F* weights,
                  F* mean, F* squares, F* weighted);
  // dots[r][i] = sum_c grad[r * grad_stride + c] * source[pixel[i] * stride + c], and
  // grad_source[pixel[i] * stride + c] += weight[i] * grad[r * grad_stride + c]. One of them may be
  // null, and is then left out.
  void (*project_back)(const T* source, int64_t stride, int64_t channels, const Corners<F>* samples,
                       int64_t rows, const F* grad, int64_t grad_stride, F* grad_source,
                       F (*dots)[4]);
  // out[r * out_stride + c] = grad[r * channels + c] and what the moments add, if they are not
  // null: as `column_gemm` reads columns, 0 from `channels` to `out_stride`.
  void (*grad_rows)(const T* grad, const MomentGrads<T>* moments, int64_t rows, int64_t channels,
                    void* out, int64_t out_stride);
  // The same, always in columns of F.
  void (*grad_rows_compute)(const T* grad, const MomentGrads<T>* moments, int64_t rows,
                            int64_t channels, F* out, int64_t out_stride);
  // Only where pairs is 2: the same as `blend`, as `column_gemm` reads b for sums over the samples.
  // Value c of sample r lies in the panel of c, the panels `panel_stride` apart, beside that of r +
  // 1 if r is even; 0 for a sample that is not there.
  void (*blend_rows)(const T* source, int64_t stride, int64_t channels, const Corners<F>* samples,
                     int64_t rows, void* out, int64_t panel_stride);
  // Whether three products of `column_gemm` take less time than one of `gemm`.
  bool sums_parts;
};

template <class T>
const DeformKernels<T>& deform_kernels();

// A pixel of a level where its branches are fused: per channel
// z = shift + sum_b scale[b] * branch[b], and its dynamic ReLU.
template <class F>
struct FusedPixel {
  int64_t channels;
  const F* branch[kMaxBranches];
  const F* scale[kMaxBranches];
  const F* shift;
  const F* coefficients;  // [4, channels]
};

// Sums over pixels for the backward of fuse_branches, [channels] each.
enum FuseSum { kA1, kB1, kA2, kB2, kShift, kScale, kFuseSums = kScale + kMaxBranches };

template <class T>
struct FuseKernels {
  using F = compute_t<T>;
  // out = a_weight * a + b_weight * b
  void (*blend)(const T* a, const T* b, F a_weight, F b_weight, int64_t count, F* out);
  void (*blend_compute)(const F* a, const F* b, F a_weight, F b_weight, int64_t count, F* out);
  void (*widen)(const T* in, int64_t count, F* out);
  // Of a pixel with 1, 2 or 3 branches.
  void (*fuse[kMaxBranches])(const FusedPixel<F>& pixel, T* out);
  // Writes the gradient of its z, and adds to the sums [kFuseSums, channels].
  void (*differentiate[kMaxBranches])(const FusedPixel<F>& pixel, const T* grad_out, F* grad_z,
                                      F* sums);
  // out += weight * in
  void (*add_scaled)(const F* in, F weight, int64_t count, F* out);
  // out = factor * in
  void (*multiply)(const F* in, const F* factor, int64_t count, T* out);
};

template <class T>
const FuseKernels<T>& fuse_kernels();

// The instruction sets that the library has kernels for on this kind of processor, from narrow to
// wide; cpu_capability() is an index.
#if defined(__x86_64__)
enum Capability { kDefault, kAvx2, kAvx512, kAvx512Bf16, kAmx };
inline constexpr const char* kCapabilities[] = {"default", "avx2", "avx512", "avx512bf16", "amx"};
#elif defined(__aarch64__)
enum Capability { kNeon };
inline constexpr const char* kCapabilities[] = {"neon"};
#else
enum Capability { kDefault };
inline constexpr const char* kCapabilities[] = {"default"};
#endif

// The fastest of them that this CPU has, or the one that DYHEAD_CPU_CAPABILITY names.
// Raises where the CPU lacks the one named.
Capability cpu_capability();

// The tables of one type and instruction set.
template <class T>
struct Kernels {
  DeformKernels<T> deform;
  FuseKernels<T> fuse;
};

#define DYHEAD_DECLARE_KERNELS(set)          \
  extern const Kernels<double> f64_##set;    \
  extern const Kernels<float> f32_##set;     \
  extern const Kernels<bfloat16> bf16_##set; \
  extern const Kernels<float16> f16_##set;

DYHEAD_DECLARE_KERNELS(default)
DYHEAD_DECLARE_KERNELS(neon)
DYHEAD_DECLARE_KERNELS(avx2)
DYHEAD_DECLARE_KERNELS(avx512)
#undef DYHEAD_DECLARE_KERNELS
const DeformKernels<bfloat16>& bf16_avx512bf16();
const DeformKernels<bfloat16>& bf16_amx();

}  // namespace dyhead::cpu
