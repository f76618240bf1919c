// Small kernels that each show one behaviour of the emulation.
#pragma once

#include "cuda/tile/launch.cuh"

namespace dyhead::simt_test {

inline constexpr int kBlockThreads = 128;

struct ReverseParams {
  const float* in;  // [blocks, 128]
  float* out;       // [blocks, 128], each row reversed through shared memory
  int blocks;
  bool with_barrier;
};
cudaError_t launch_reverse(const ReverseParams& params, cudaStream_t stream);

struct WarpParams {
  const float* in;  // [threads]
  float* shuffled;  // [5, threads]: broadcast of lane 5, up 1, down 2, xor 4, sum over the warp
  unsigned* votes;  // [3, threads]: ballot, any, all of in > 0
  int threads;
  int width;  // of the first four shuffles
};
cudaError_t launch_warp(const WarpParams& params, cudaStream_t stream);

struct AtomicParams {
  const int* in;            // [n]
  float* float_sum;         // [1] sum of in
  double* double_sum;       // [1]
  int* extremes;            // [2] min, max
  unsigned long long* sum;  // [1] sum of in as unsigned long long
  unsigned* lock;           // [2] lock, plain counter that it protects
  float* vector_sum;        // [4] sums of in, 2 in, 3 in, 4 in
  int n;
};
cudaError_t launch_atomic(const AtomicParams& params, cudaStream_t stream);

struct HandshakeParams {
  const float* in;    // [blocks, 128]
  float* out;         // [blocks] the sum of all of `in`, from every block
  float* partial;     // [blocks]
  unsigned* arrived;  // [1] zero
  int blocks;
  bool cooperative;
};
cudaError_t launch_handshake(const HandshakeParams& params, cudaStream_t stream);

struct AsyncCopyParams {
  const float* in;  // [128, 4]
  float* out;       // [128, 4] the first `valid` floats of each row, then zeros
  int valid;
  bool with_wait;
};
cudaError_t launch_async_copy(const AsyncCopyParams& params, cudaStream_t stream);

enum class Fault {
  kNone,
  kDivergentBarrier,
  kBarrierAfterCollective,
  kDivergentCollective,
  kMaskMismatch,
  kNotInMask,
  kNeverSignalled,
  kSpinLock,
  kPartialWarpMma,
  kUninitialisedShared,
  kSharedOverrun,
  kSharedUnderrun,
  kDynamicOverrun,
  kDynamicOverlap,
  kGlobalOverrun,
  kGlobalOverread,
  kMisalignedVector,
  kMisalignedCopy,
  kCopyOutsideShared,
  kUnwrittenOutput,
  kForgottenCopy,
};

struct FaultParams {
  const float* in;  // [64]
  float* out;       // [64]
  unsigned* flag;   // [1]
  Fault fault;
};
cudaError_t launch_fault(const FaultParams& params, cudaStream_t stream);

}  // namespace dyhead::simt_test
