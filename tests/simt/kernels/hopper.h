// Small kernels for the functions of hopper.cuh, right and with one mistake each.
#pragma once

#include "cuda/tile/launch.cuh"

namespace dyhead::simt_test {

// A product whose right operand travels through two stages of shared memory, which a warp fills by
// bulk copies to all blocks of a cluster: the shape of the forward kernel.
enum class PipelineFault {
  kNone,
  kNoFullWait,      // products do not wait for their operand
  kNoExpect,        // the barrier is not told of the bytes
  kNoEmptyWait,     // copies do not wait until a stage is free
  kEarlyRelease,    // a warp releases a stage before its products have read it
  kOneReleases,     // one warp releases a stage for all four
  kConstantParity,  // a wait forgets that parities alternate
  kNoWgmmaFence,
  kLeftUnfenced,   // a left operand is written after the fence
  kLeftModified,   // or before the wait
  kSumsEarly,      // sums are read before the wait
  kSumsModified,   // or written
  kNoCommit,       // the wait covers nothing
  kNoWait,         // no wait at all
  kNoInitFence,    // barriers are not published to bulk copies
  kNoInitSync,     // or not to other threads
  kNoLastSync,     // blocks end while others still arrive at their barriers
  kUnderArrival,   // a barrier that waits for one arrival too many
  kWrongRow,       // an operand that begins at row 1
  kWrongSwizzle,   // or is said to be not swizzled
  kOrdinaryStore,  // a store that wgmma reads without a fence between the proxies
  kFencedStore,    // with it: no fault
  kStoreToBarrier,
};

struct PipelineParams {
  const uint16_t* a;   // [64 * blocks, depth] bfloat16
  const std::byte* b;  // [depth / 64, 256, 128]: chunks of rows of 128 bytes, swizzled
  float* out;          // [64 * blocks, 256]
  int depth;           // a multiple of 64
  int blocks;          // a multiple of `cluster`
  int cluster;
  PipelineFault fault;
};
cudaError_t launch_pipeline(const PipelineParams& params, cudaStream_t stream);

// One product of a warpgroup with operands as registers and bytes.
enum class ProductFault {
  kNone,
  kOtherOperand,  // of one warp
  kMissingWarp,   // issues nothing
  kOtherPlace,    // one warp issues it from another place in the kernel
  kOtherAdds,     // of one lane
  // With a left operand in shared memory:
  kNoProxyFence,
  kLeftWritten,  // before the wait
};

struct ProductParams {
  const uint32_t* left;    // [128, 4] registers of each thread
  const std::byte* right;  // [shared bytes]
  const float* sums;       // [128, n / 2]
  float* out;              // [128, n / 2]
  int bytes;               // of shared memory, a multiple of 16
  int offset;              // of the product's part of the depth
  int shared_left;         // where the left operand is in shared memory; -1: it is `left`
  int n;                   // other than 256 in the emulation only; 144 with a shared left operand
  bool adds;
  bool is_bfloat16;
  ProductFault fault;
};
cudaError_t launch_product(const ProductParams& params, cudaStream_t stream);

// Blocks of a cluster that copy rows of 64 floats to each other.
enum class CopyFault {
  kNone,
  kMisalignedTarget,
  kMisalignedSource,
  kMisalignedSize,
  kOutsideShared,
  kOutsideSource,
  kNoBlocks,
  kOtherBlocks,  // that the cluster does not have
  kOverlap,
  kOverBarrier,
  kNoBarrier,
  kSourceWritten,
  kTargetWritten,
  kNoProxyFence,  // ordinary stores to the target come before
  kInitTwice,
  kOverArrival,
  kExpectsMore,
  kExpectsLess,
  kNotAwaited,  // the block ends before the copy
  kNotRequested,
  kPeerEnded,
  kNeverCopied,  // bytes that a barrier expects, though nobody waits for them
  kLateWait,     // two phases late
  kOvertaken,    // a barrier goes on three phases while threads wait for the first
};

struct CopyParams {
  float* in;   // [blocks, 64]
  float* out;  // [blocks, 64]: the row of the next block of the cluster
  int blocks;
  int cluster;
  CopyFault fault;
};
cudaError_t launch_copy(const CopyParams& params, cudaStream_t stream);

// Threads that meet: warps 0 and 1 at one barrier, 2 and 3 at another, and all blocks of a cluster.
enum class MeetingFault {
  kNone,
  kNoBarrier,
  kOtherCount,
  kPartWarps,
  kHalfWarp,
  kBarrierZero,
  kMissingWarp,
  kDivergentLanes,
  kDivergentCluster,
  kMissingInCluster,
};

struct MeetingParams {
  const float* in;  // [blocks, 128]
  float* out;       // [blocks, 128]: each 64 reversed
  int blocks;
  int cluster;
  bool cooperative;
  MeetingFault fault;
};
cudaError_t launch_meeting(const MeetingParams& params, cudaStream_t stream);

// Warpgroups that hand registers to each other.
enum class RegisterFault { kNone, kNoGive, kGiveMore, kTakeLess, kOneWarp };

struct RegisterParams {
  float* out;  // [384]
  RegisterFault fault;
};
cudaError_t launch_registers(const RegisterParams& params, cudaStream_t stream);

// unit_offset() of tile_gemm.cuh.
int tile_offset(int row, int unit);

}  // namespace dyhead::simt_test
