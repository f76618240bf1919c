#include "hopper.h"

#include "cuda/tile/hopper.cuh"
#include "cuda/tile/tile_gemm.cuh"

namespace dyhead::simt_test {

using namespace dyhead::cuda;

inline constexpr int kStages = 2;
inline constexpr int kColumns = 256;
inline constexpr int kChunk = 64;  // of the depth: rows of 128 bytes
inline constexpr int kStageBytes = kColumns * kChunk * 2;
inline constexpr int kSteps = kChunk / 16;

// Defined where the compilation has hopper.cuh's functions.
template <class Params>
__device__ void run(const Params& params);

#if defined(DYHEAD_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- pipeline -----------------------------------------------------------------------------------

struct Pipeline {
  std::byte* stages;
  MBarrier* full;   // by stage: its bytes have come
  MBarrier* empty;  // by stage: all blocks of the cluster have read it
};

DYHEAD_DEVICE void fill_stages(const PipelineParams& p, const Pipeline& pipeline) {
  const unsigned cluster = static_cast<unsigned>(p.cluster);
  const unsigned part = kStageBytes / cluster;
  for (int chunk = 0; chunk < p.depth / kChunk; ++chunk) {
    const int stage = chunk % kStages;
    const unsigned use = static_cast<unsigned>(chunk / kStages);
    if (p.fault != PipelineFault::kNoEmptyWait) {
      mbarrier_wait(&pipeline.empty[stage], (use & 1u) ^ 1u);
    }
    if (p.fault == PipelineFault::kNoExpect) {
      mbarrier_arrive(&pipeline.full[stage]);
    } else {
      mbarrier_arrive_expect(&pipeline.full[stage], kStageBytes);
    }
    const unsigned first = part * cluster_rank();
    bulk_copy(pipeline.stages + stage * kStageBytes + first,
              p.b + size_t{kStageBytes} * static_cast<size_t>(chunk) + first, part,
              &pipeline.full[stage], (1u << cluster) - 1u);
  }
}

DYHEAD_DEVICE void release_stage(const PipelineParams& p, MBarrier* empty) {
  if (threadIdx.x % kWarpSize != 0) return;
  if (p.fault == PipelineFault::kOneReleases && threadIdx.x != 0) return;
  for (int rank = 0; rank < p.cluster; ++rank) {
    mbarrier_arrive_at(empty, static_cast<unsigned>(rank));
  }
}

DYHEAD_DEVICE void multiply(const PipelineParams& p, const Pipeline& pipeline) {
  const unsigned warp = threadIdx.x / kWarpSize;
  const unsigned g = threadIdx.x % kWarpSize / 4;
  const unsigned t = threadIdx.x % 4;
  const size_t row = size_t{blockIdx.x} * 64 + warp * 16 + g;
  const size_t depth = static_cast<size_t>(p.depth);
  const bool fault_here = threadIdx.x == 37;
  uint32_t left[kSteps][4];
  float sums[kColumns / 2];
  for (int chunk = 0; chunk < p.depth / kChunk; ++chunk) {
    const int stage = chunk % kStages;
    const unsigned use = static_cast<unsigned>(chunk / kStages);
    const auto load_left = [&] {
      for (int step = 0; step < kSteps; ++step) {
        for (unsigned i = 0; i < 4; ++i) {
          const size_t k = static_cast<size_t>(chunk * kChunk + step * 16) + 2 * t + i / 2 * 8;
          const Vec<uint16_t, 2> pair = load_vec<2>(p.a + (row + i % 2 * 8) * depth + k);
          left[step][i] = uint32_t{pair[0]} | uint32_t{pair[1]} << 16;
        }
      }
    };
    load_left();
    std::byte* right = pipeline.stages + stage * kStageBytes;
    if (p.fault != PipelineFault::kNoFullWait) {
      const bool constant = p.fault == PipelineFault::kConstantParity;
      mbarrier_wait(&pipeline.full[stage], constant ? 0u : use & 1u);
    }
    const bool stores =
        p.fault == PipelineFault::kOrdinaryStore || p.fault == PipelineFault::kFencedStore;
    if (stores) {
      if (threadIdx.x == 5) right[77] = std::byte{0};
      if (p.fault == PipelineFault::kFencedStore) fence_proxy_async();
      named_barrier_sync(1, kWarpgroupThreads);
    }
    if (p.fault != PipelineFault::kNoWgmmaFence) wgmma_fence();
    if (p.fault == PipelineFault::kLeftUnfenced && chunk == 1 && fault_here) left[1][2] ^= 1u;
    for (int step = 0; step < kSteps; ++step) {
      uint64_t operand = wgmma_operand(right, static_cast<unsigned>(step) * 32);
      if (p.fault == PipelineFault::kWrongRow) operand += 128 >> 4;
      if (p.fault == PipelineFault::kWrongSwizzle) operand &= ~(uint64_t{3} << 62);
      wgmma_m64n256k16<bfloat16>(sums, left[step], operand, chunk + step > 0);
    }
    if (p.fault != PipelineFault::kNoCommit) wgmma_commit();
    if (p.fault == PipelineFault::kEarlyRelease && warp == 2) {
      release_stage(p, &pipeline.empty[stage]);
    }
    if (p.fault == PipelineFault::kLeftModified && fault_here) left[1][2] ^= 1u;
    if (p.fault == PipelineFault::kSumsModified && fault_here) sums[3] = 0.0f;
    if (p.fault == PipelineFault::kSumsEarly) {
      const size_t at = row * kColumns + 2 * t;
      if (chunk == 0) p.out[at] = sums[0];
    }
    if (p.fault != PipelineFault::kNoWait) wgmma_wait<0>();
    if (p.fault != PipelineFault::kEarlyRelease || warp != 2) {
      release_stage(p, &pipeline.empty[stage]);
    }
  }
  for (unsigned i = 0; i < kColumns / 2; ++i) {
    const bool early = p.fault == PipelineFault::kSumsEarly && i == 0;
    if (early) continue;
    p.out[(row + i % 4 / 2 * 8) * kColumns + i / 4 * 8 + 2 * t + i % 2] = sums[i];
  }
}

template <>
__device__ void run(const PipelineParams& p) {
  DYHEAD_SHARED(MBarrier, barriers, 2 * kStages);
  const Pipeline pipeline{dynamic_shared<std::byte>(0, kStages * kStageBytes), barriers,
                          barriers + kStages};
  const bool produces = threadIdx.x == kWarpgroupThreads;
  if (produces) {
    const unsigned releases = p.fault == PipelineFault::kOneReleases ? 1 : 4;
    const unsigned more = p.fault == PipelineFault::kUnderArrival ? 1 : 0;
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&pipeline.full[stage], 1);
      mbarrier_init(&pipeline.empty[stage], releases * static_cast<unsigned>(p.cluster) + more);
    }
    if (p.fault != PipelineFault::kNoInitFence) fence_mbarrier_init();
  }
  if (p.fault != PipelineFault::kNoInitSync) cluster_sync();
  if (p.fault == PipelineFault::kStoreToBarrier && threadIdx.x == 3) barriers[1].state = 0;
  if (produces) fill_stages(p, pipeline);
  if (threadIdx.x < kWarpgroupThreads) multiply(p, pipeline);
  if (p.fault != PipelineFault::kNoLastSync) cluster_sync();
}

// ---- one product --------------------------------------------------------------------------------

template <class T>
DYHEAD_DEVICE void product(const ProductParams& p) {
  const size_t bytes = static_cast<size_t>(p.bytes);
  std::byte* rows = dynamic_shared<std::byte>(0, bytes);
  for (size_t i = threadIdx.x; i < bytes; i += blockDim.x) rows[i] = p.right[i];
  fence_proxy_async();
  __syncthreads();
  uint32_t left[4];
  float sums[kColumns / 2];
  const size_t thread = threadIdx.x;
  const size_t count = static_cast<size_t>(p.n / 2);
  for (size_t i = 0; i < 4; ++i) left[i] = p.left[4 * thread + i];
  for (size_t i = 0; i < count; ++i) sums[i] = p.sums[count * thread + i];
  bool adds = p.adds;
  if (p.fault == ProductFault::kOtherAdds && thread == 9) adds = !adds;
  const unsigned further = p.fault == ProductFault::kOtherOperand && thread / 32 == 2 ? 32 : 0;
  const uint64_t right = wgmma_operand(rows, static_cast<unsigned>(p.offset) + further);
  if (p.fault != ProductFault::kMissingWarp || thread / 32 != 1) {
    wgmma_fence();
    if (p.fault == ProductFault::kOtherPlace && thread / 32 == 3) {
      wgmma_m64n256k16<T>(sums, left, right, adds);
    } else if (p.n == kColumns) {
      wgmma_m64n256k16<T>(sums, left, right, adds);
    }
#if defined(DYHEAD_SIMT)
    if (p.n != kColumns) {
      simt::wgmma(sums, p.n, left, right, adds, std::is_same_v<T, bfloat16>,
                  std::source_location::current());
    }
#endif
    wgmma_commit();
    wgmma_wait<0>();
  }
  for (size_t i = 0; i < count; ++i) p.out[count * thread + i] = sums[i];
}

// The same with both operands in shared memory.
template <class T>
DYHEAD_DEVICE void shared_product(const ProductParams& p) {
  const size_t bytes = static_cast<size_t>(p.bytes);
  std::byte* rows = dynamic_shared<std::byte>(0, bytes);
  for (size_t i = threadIdx.x; i < bytes; i += blockDim.x) rows[i] = p.right[i];
  if (p.fault != ProductFault::kNoProxyFence) fence_proxy_async();
  __syncthreads();
  constexpr size_t kCount = 144 / 2;
  float sums[kCount];
  const size_t thread = threadIdx.x;
  for (size_t i = 0; i < kCount; ++i) sums[i] = p.sums[kCount * thread + i];
  const bool other = p.fault == ProductFault::kOtherOperand && thread / 32 == 2;
  wgmma_fence();
  const auto left = static_cast<unsigned>(p.shared_left) + (other ? 32 : 0);
  wgmma_m64n144k16<T>(sums, wgmma_operand(rows, left),
                      wgmma_operand(rows, static_cast<unsigned>(p.offset)), p.adds);
  wgmma_commit();
  if (p.fault == ProductFault::kLeftWritten && thread == 5) {
    auto* written = reinterpret_cast<unsigned char*>(rows + p.shared_left);
    *written = static_cast<unsigned char>(*written ^ 1u);
  }
  wgmma_wait_all(sums);
  for (size_t i = 0; i < kCount; ++i) p.out[kCount * thread + i] = sums[i];
}

template <>
__device__ void run(const ProductParams& p) {
  if (p.shared_left >= 0) {
    return p.is_bfloat16 ? shared_product<bfloat16>(p) : shared_product<float16>(p);
  }
  if (p.is_bfloat16) {
    product<bfloat16>(p);
  } else {
    product<float16>(p);
  }
}

// ---- copies -------------------------------------------------------------------------------------

inline constexpr unsigned kRowBytes = 64 * sizeof(float);

// The call of the thread that copies, with what is wrong in it.
DYHEAD_DEVICE void copy_row(const CopyParams& p, float* row, MBarrier* barrier, MBarrier* other) {
  float* from = p.in + size_t{blockIdx.x} * 64;
  const unsigned cluster = static_cast<unsigned>(p.cluster);
  const unsigned next = 1u << (cluster_rank() + cluster - 1) % cluster;
  if (p.fault == CopyFault::kNotRequested && cluster_rank() != 0) return;
  switch (p.fault) {
    case CopyFault::kMisalignedTarget:
      return bulk_copy(row + 1, from, kRowBytes / 2, barrier, next);
    case CopyFault::kMisalignedSource:
      return bulk_copy(row, from + 1, kRowBytes / 2, barrier, next);
    case CopyFault::kMisalignedSize:
      return bulk_copy(row, from, kRowBytes - 4, barrier, next);
    case CopyFault::kOutsideShared:
      return bulk_copy(row + 4, from, kRowBytes, barrier, next);
    case CopyFault::kOutsideSource:
      return bulk_copy(row, p.in + 64 * (p.blocks - 1) + 4, kRowBytes, barrier, next);
    case CopyFault::kNoBlocks:
      return bulk_copy(row, from, kRowBytes, barrier, 0);
    case CopyFault::kOtherBlocks:
      return bulk_copy(row, from, kRowBytes, barrier, next | 1u << cluster);
    case CopyFault::kOverlap:
      bulk_copy(row, from, kRowBytes, barrier, next);
      return bulk_copy(row + 4, from, 16, barrier, next);
    case CopyFault::kOverBarrier:
      return bulk_copy(other, from, 16, barrier, next);
    case CopyFault::kNoBarrier:
      return bulk_copy(row, from, kRowBytes, other + 1, next);
    case CopyFault::kExpectsMore:
      return bulk_copy(row, from, kRowBytes - 16, barrier, next);
    case CopyFault::kExpectsLess:
      bulk_copy(row, from, kRowBytes - 16, barrier, next);
      return bulk_copy(row + 60, from + 60, 16, barrier, next);
    default:
      bulk_copy(row, from, kRowBytes, barrier, next);
  }
  if (p.fault == CopyFault::kSourceWritten) from[3] = 0.0f;
}

template <>
__device__ void run(const CopyParams& p) {
  DYHEAD_SHARED(MBarrier, barriers, 4);
  float* row = nullptr;
  const unsigned rank = cluster_rank();
  if (p.fault != CopyFault::kNotRequested || rank == 0) row = dynamic_shared<float>(0, 64);
  const unsigned i = threadIdx.x;
  if (i == 0) {
    mbarrier_init(&barriers[0], 1);
    mbarrier_init(&barriers[2], 1);
    if (p.fault == CopyFault::kInitTwice) mbarrier_init(&barriers[0], 1);
    fence_mbarrier_init();
  }
  if (p.fault == CopyFault::kNoProxyFence) row[i] = 0.0f;
  cluster_sync();
  if (p.fault == CopyFault::kPeerEnded && rank != 0) return;
  if (i == 0) {
    unsigned bytes = kRowBytes;
    if (p.fault == CopyFault::kExpectsLess) bytes -= 16;
    mbarrier_arrive_expect(&barriers[0], bytes);
    copy_row(p, row, &barriers[0], &barriers[2]);
    if (p.fault == CopyFault::kOverArrival) mbarrier_arrive(&barriers[0]);
  }
  const bool overtaken = p.fault == CopyFault::kOvertaken;
  const bool late = p.fault == CopyFault::kLateWait;
  if ((late || overtaken) && i == 0) {
    for (int phase = 0; phase < (late ? 2 : 3); ++phase) mbarrier_arrive(&barriers[2]);
  }
  if (p.fault == CopyFault::kNeverCopied && i == 0) mbarrier_arrive_expect(&barriers[2], 16);
  if (!overtaken) __syncthreads();
  if (p.fault == CopyFault::kTargetWritten && i == 1) row[8] = 1.0f;
  if (late || (overtaken && i != 0)) mbarrier_wait(&barriers[2], 0);
  if (p.fault == CopyFault::kNotAwaited) return;
  mbarrier_wait(&barriers[0], 0);
  p.out[size_t{blockIdx.x} * 64 + i] = row[i];
  cluster_sync();
}

// ---- meetings -----------------------------------------------------------------------------------

template <>
__device__ void run(const MeetingParams& p) {
  DYHEAD_SHARED(float, values, 128);
  const unsigned i = threadIdx.x;
  const unsigned warp = i / kWarpSize;
  const size_t at = size_t{blockIdx.x} * 128 + i;
  values[i] = p.in[at];
  const bool named = p.fault != MeetingFault::kNoBarrier;
  const int half = static_cast<int>(i / 64);
  switch (p.fault) {
    case MeetingFault::kOtherCount:
      named_barrier_sync(1, warp == 0 ? 64 : 96);
      break;
    case MeetingFault::kPartWarps:
      named_barrier_sync(1, 48);
      break;
    case MeetingFault::kHalfWarp:
      if (i % kWarpSize < 16) named_barrier_sync(1, 64);
      break;
    case MeetingFault::kBarrierZero:
      named_barrier_sync(0, 64);
      break;
    case MeetingFault::kMissingWarp:
      if (warp != 3) named_barrier_sync(1 + half, 64);
      break;
    case MeetingFault::kDivergentLanes:
      if (i % 2 == 0) {
        named_barrier_sync(1 + half, 64);
      } else {
        named_barrier_sync(1 + half, 64);
      }
      break;
    default:
      if (named) named_barrier_sync(1 + half, 64);
  }
  p.out[at] = values[i ^ 63u];
  if (p.fault == MeetingFault::kDivergentCluster && warp == 1) {
    cluster_sync();
  } else if (p.fault != MeetingFault::kMissingInCluster || cluster_rank() == 0) {
    cluster_sync();
  } else {
    __syncthreads();
    named_barrier_sync(3, 128);
    if (i < 32) named_barrier_sync(4, 64);
  }
}

// ---- registers ----------------------------------------------------------------------------------

template <>
__device__ void run(const RegisterParams& p) {
  const unsigned group = threadIdx.x / kWarpgroupThreads;
  if (group == 0) {
    if (p.fault == RegisterFault::kGiveMore) {
      give_registers<232>();
    } else if (p.fault == RegisterFault::kOneWarp) {
      if (threadIdx.x < kWarpSize) give_registers<40>();
    } else if (p.fault != RegisterFault::kNoGive) {
      give_registers<40>();
    }
  } else if (p.fault == RegisterFault::kTakeLess) {
    take_registers<160>();
  } else if (p.fault != RegisterFault::kOneWarp) {
    take_registers<232>();
  }
  p.out[threadIdx.x] = static_cast<float>(threadIdx.x);
}

#endif

__global__ void __launch_bounds__(160) pipeline_kernel([[maybe_unused]] PipelineParams p) {
  if constexpr (kHasHopper) run(p);
}

__global__ void __launch_bounds__(128) product_kernel([[maybe_unused]] ProductParams p) {
  if constexpr (kHasHopper) run(p);
}

__global__ void __launch_bounds__(64) copy_kernel([[maybe_unused]] CopyParams p) {
  if constexpr (kHasHopper) run(p);
}

__global__ void __launch_bounds__(128) meeting_kernel([[maybe_unused]] MeetingParams p) {
  if constexpr (kHasHopper) run(p);
}

// setmaxnreg needs to know the registers at the start.
__global__ void __launch_bounds__(384, 1) register_kernel([[maybe_unused]] RegisterParams p) {
  if constexpr (kHasHopper) run(p);
}

cudaError_t launch_pipeline(const PipelineParams& params, cudaStream_t stream) {
  return launch(pipeline_kernel,
                {.grid = dim3(static_cast<unsigned>(params.blocks)),
                 .block = dim3(kWarpgroupThreads + kWarpSize),
                 .shared_bytes = kStages * kStageBytes,
                 .stream = stream,
                 .cluster = static_cast<unsigned>(params.cluster)},
                params);
}

cudaError_t launch_product(const ProductParams& params, cudaStream_t stream) {
  return launch(product_kernel,
                {.grid = dim3(1),
                 .block = dim3(kWarpgroupThreads),
                 .shared_bytes = static_cast<size_t>(params.bytes),
                 .stream = stream},
                params);
}

cudaError_t launch_copy(const CopyParams& params, cudaStream_t stream) {
  return launch(copy_kernel,
                {.grid = dim3(static_cast<unsigned>(params.blocks)),
                 .block = dim3(64),
                 .shared_bytes = 64 * sizeof(float),
                 .stream = stream,
                 .cluster = static_cast<unsigned>(params.cluster)},
                params);
}

cudaError_t launch_meeting(const MeetingParams& params, cudaStream_t stream) {
  return launch(meeting_kernel,
                {.grid = dim3(static_cast<unsigned>(params.blocks)),
                 .block = dim3(128),
                 .stream = stream,
                 .cooperative = params.cooperative,
                 .cluster = static_cast<unsigned>(params.cluster)},
                params);
}

cudaError_t launch_registers(const RegisterParams& params, cudaStream_t stream) {
  return launch(register_kernel, {.grid = dim3(1), .block = dim3(384), .stream = stream}, params);
}

int tile_offset(int row, int unit) { return unit_offset(row, unit); }

}  // namespace dyhead::simt_test
