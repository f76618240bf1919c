// Device code that the forward and the backward kernels of block_coefficients share.
#pragma once

#include <cstdint>

#include "../context.h"
#include "../tile/primitives.cuh"
#include "block_coefficients.h"

namespace dyhead::cuda {

inline constexpr int kBlockCoefficientsWarps = kBlockCoefficientsThreads / kWarpSize;

// The jobs of the level that a block works on, in one image.
struct LevelJobs {
  int level, first, count;
  int64_t image;

  DYHEAD_DEVICE static LevelJobs of(const BlockCoefficientsShape& shape,
                                    const BlockCoefficientsTables& tables, int64_t at) {
    const int level = static_cast<int>(at / shape.images);
    return {level, tables.first[level], tables.first[level + 1] - tables.first[level],
            at % shape.images};
  }

  DYHEAD_DEVICE int job(const BlockCoefficientsTables& tables, int k) const {
    return tables.order[first + k];
  }
  // The index of job k and the image in a tensor [J, N, ...].
  DYHEAD_DEVICE int64_t place(const BlockCoefficientsShape& shape,
                              const BlockCoefficientsTables& tables, int k) const {
    return job(tables, k) * shape.images + image;
  }
};

// norms: the values that the forward saved for a job.
template <class F>
DYHEAD_DEVICE GroupMoments<F> group_moments(const BlockCoefficientsShape& s, const F* norms,
                                            int group) {
  return {norms[group], norms[s.groups + group]};
}

template <class F>
DYHEAD_DEVICE NormAffine<F> channel_affine(const BlockCoefficientsShape& s,
                                           const BlockCoefficientsParameters& parameters, int norm,
                                           const F* norms, int c) {
  return norm_affine(load_parameter<F>(parameters.norm_weight[norm], c),
                     load_parameter<F>(parameters.norm_bias[norm], c),
                     group_moments(s, norms, c / s.group_width()));
}

// Calls f with a pointer of the type in which a matrix is stored.
template <class Use>
DYHEAD_DEVICE void with_storage(const Parameter& matrix, Use&& use) {
  switch (matrix.dtype) {
    case DType::kFloat64:
      return use(static_cast<const double*>(matrix.data));
    case DType::kBFloat16:
      return use(static_cast<const bfloat16*>(matrix.data));
    case DType::kFloat16:
      return use(static_cast<const float16*>(matrix.data));
    default:
      return use(static_cast<const float*>(matrix.data));
  }
}

// Rows [first, last) of matrix [*, inputs] times x [inputs]. Calls emit(row, value) in one lane for
// each row. A warp works on several rows at a time to have more loads in flight.
template <class F, class Emit>
DYHEAD_DEVICE void multiply_rows(const Parameter& matrix, int inputs, const F* x, int first,
                                 int last, Emit&& emit) {
  constexpr int kRows = 4;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  with_storage(matrix, [&](const auto* weight) {
    for (int row = first + warp * kRows; row < last; row += kBlockCoefficientsWarps * kRows) {
      F sums[kRows] = {};
#pragma unroll 2
      for (int i = lane; i < inputs; i += kWarpSize) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (row + r >= last) break;
          const auto value = weight[static_cast<int64_t>(row + r) * inputs + i];
          sums[r] += static_cast<F>(to_compute(value)) * x[i];
        }
      }
      F own = F(0);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const F sum = warp_sum(sums[r]);
        if (lane == r) own = sum;
      }
      if (lane < kRows && row + lane < last) emit(row + lane, own);
    }
  });
}

// x [rows] times matrix [rows, columns]. Calls emit(column, value) in one thread for each column.
// `scratch` has one value per thread. Ends with a barrier.
template <class F, class Emit>
DYHEAD_DEVICE void multiply_columns(const Parameter& matrix, int rows, int columns, const F* x,
                                    F* scratch, Emit&& emit) {
  const int thread = static_cast<int>(threadIdx.x);
  int lanes = 1;  // consecutive threads that share a row; a power of two
  while (lanes * 2 <= columns && lanes < kBlockCoefficientsThreads) lanes *= 2;
  for (int first = 0; first < columns; first += lanes) {
    const int column = first + thread % lanes;
    F sum = F(0);
    if (column < columns) {
      with_storage(matrix, [&](const auto* weight) {
#pragma unroll 8
        for (int i = thread / lanes; i < rows; i += kBlockCoefficientsThreads / lanes) {
          const auto value = weight[static_cast<int64_t>(i) * columns + column];
          sum += static_cast<F>(to_compute(value)) * x[i];
        }
      });
    }
    scratch[thread] = sum;
    __syncthreads();
    if (thread < lanes && column < columns) {
      F total = F(0);
      for (int i = thread; i < kBlockCoefficientsThreads; i += lanes) total += scratch[i];
      emit(column, total);
    }
    __syncthreads();
  }
}

}  // namespace dyhead::cuda
