// What compute capability 9.0 has beyond primitives.cuh: clusters of blocks, barriers in shared
// memory that count bytes, bulk copies to all blocks of a cluster, and products of four warps
// (wgmma). Each function has a host version for the emulation in tests/simt.
//
// The names and rules are those of the PTX ISA. Code that calls these functions is compiled for
// sm_90a only; kHasHopper says whether this is such a compilation.
#pragma once

#include "primitives.cuh"

#if defined(DYHEAD_SIMT)
#include "simt_hopper.h"
#endif

namespace dyhead::cuda {

#if defined(DYHEAD_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasHopper = true;
#else
inline constexpr bool kHasHopper = false;
#endif

inline constexpr int kWarpgroupThreads = 128;

#if defined(DYHEAD_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- clusters -----------------------------------------------------------------------------------

// The index of this block in its cluster.
DYHEAD_DEVICE unsigned cluster_rank() {
#if defined(DYHEAD_SIMT)
  return simt::cluster_rank();
#else
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

// All threads of all blocks of the cluster meet; what they wrote before is visible after it. A
// block must not end while others may still access its shared memory.
DYHEAD_DEVICE void cluster_sync(DYHEAD_WHERE_ONLY) {
#if defined(DYHEAD_SIMT)
  simt::cluster_barrier(where);
#else
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}

// ---- barriers -----------------------------------------------------------------------------------

// Meets the other threads that name the same barrier (1 to 15; 0 is that of __syncthreads), in all
// `threads` of them, whole warps.
DYHEAD_DEVICE void named_barrier_sync(int barrier, int threads DYHEAD_WHERE) {
#if defined(DYHEAD_SIMT)
  simt::named_barrier(barrier, threads, where);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
}

// A barrier in shared memory, which counts arrivals and bytes of bulk copies. Its phases are
// numbered from 0; one ends when all arrivals and all bytes that were expected in it have come.
struct alignas(8) MBarrier {
  uint64_t state;
};

// By one thread, before any other uses the barrier: `arrivals` end a phase.
DYHEAD_DEVICE void mbarrier_init(MBarrier* barrier, unsigned arrivals DYHEAD_WHERE) {
#if defined(DYHEAD_SIMT)
  simt::mbarrier_init(barrier, arrivals, where);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#endif
}

// Makes this thread's mbarrier_init visible to bulk copies and to other blocks of the cluster; a
// cluster_sync() must follow.
DYHEAD_DEVICE void fence_mbarrier_init() {
#if defined(DYHEAD_SIMT)
  simt::fence_mbarrier_init();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

DYHEAD_DEVICE void mbarrier_arrive(MBarrier* barrier DYHEAD_WHERE) {
#if defined(DYHEAD_SIMT)
  simt::mbarrier_arrive(barrier, simt::cluster_rank(), where);
#else
  asm volatile(
      "mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(detail::shared_address(barrier))
      : "memory");
#endif
}

// Arrives at the barrier that block `rank` of the cluster has at the same place. It publishes no
// ordinary writes to that block, which would cost a fence of the whole device: only reads of bulk
// copies' data, which are over, are before it.
DYHEAD_DEVICE void mbarrier_arrive_at(MBarrier* barrier, unsigned rank DYHEAD_WHERE) {
#if defined(DYHEAD_SIMT)
  simt::mbarrier_arrive(barrier, rank, where);
#else
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cta.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(detail::shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}

// Arrives, and lets the phase also wait for `bytes` of bulk copies.
DYHEAD_DEVICE void mbarrier_arrive_expect(MBarrier* barrier, unsigned bytes DYHEAD_WHERE) {
#if defined(DYHEAD_SIMT)
  simt::mbarrier_arrive_expect(barrier, bytes, where);
#else
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   detail::shared_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}

// Waits until the phase of this parity has ended: the current one or the one before it. What was
// written before the arrivals of that phase is then visible, and so are its bulk copies.
DYHEAD_DEVICE void mbarrier_wait(MBarrier* barrier, unsigned parity DYHEAD_WHERE) {
#if defined(DYHEAD_SIMT)
  simt::mbarrier_wait(barrier, parity, where);
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}" ::"r"(detail::shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// ---- bulk copies --------------------------------------------------------------------------------

// Starts a copy of `bytes` from global to shared memory, all multiples of 16, to the same place in
// each block of the cluster whose bit is set in `blocks`. There it counts at the barrier that lies
// at the same place as `barrier`. One thread calls it.
DYHEAD_DEVICE void bulk_copy(void* shared, const void* global, unsigned bytes, MBarrier* barrier,
                             unsigned blocks DYHEAD_WHERE) {
#if defined(DYHEAD_SIMT)
  simt::bulk_copy(shared, global, bytes, barrier, blocks, where);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(detail::shared_address(shared)),
      "l"(global), "r"(bytes), "r"(detail::shared_address(barrier)),
      "h"(static_cast<uint16_t>(blocks))
      : "memory");
#endif
}

// Orders this thread's ordinary accesses to shared memory before later ones of bulk copies and
// wgmma, which are of another kind (the asynchronous proxy).
DYHEAD_DEVICE void fence_proxy_async() {
#if defined(DYHEAD_SIMT)
  simt::fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- registers ----------------------------------------------------------------------------------

// By all warps of a warpgroup: gives registers back until each thread has kRegisters, or takes more
// of those that others gave back. kRegisters: a multiple of 8 in 24..256.
template <int kRegisters>
DYHEAD_DEVICE void give_registers(DYHEAD_WHERE_ONLY) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#if defined(DYHEAD_SIMT)
  simt::set_max_registers(kRegisters, /*take=*/false, where);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
DYHEAD_DEVICE void take_registers(DYHEAD_WHERE_ONLY) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#if defined(DYHEAD_SIMT)
  simt::set_max_registers(kRegisters, /*take=*/true, where);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// ---- products of a warpgroup --------------------------------------------------------------------

// Where wgmma finds an operand in shared memory: rows of 128 bytes along the depth, with their
// 16-byte units permuted as unit_offset() does (the 128-byte swizzle), eight rows every 1,024
// bytes. Row 0 is aligned to 1,024 bytes; `offset` bytes further the part of the depth begins.
DYHEAD_DEVICE uint64_t wgmma_operand(const void* rows, unsigned offset) {
#if defined(DYHEAD_SIMT)
  const uint64_t address = simt::shared_offset(rows) + offset;
#else
  const uint64_t address = detail::shared_address(rows) + offset;
#endif
  constexpr uint64_t kStride = 1024;   // between groups of eight rows
  constexpr uint64_t kSwizzle128 = 1;  // the kind of permutation
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | (kStride >> 4) << 32 | kSwizzle128 << 62;
}

// Orders this warp's accesses to registers before the products that follow. Needed before the first
// one, and after other instructions wrote sums or left operands.
DYHEAD_DEVICE void wgmma_fence(DYHEAD_WHERE_ONLY) {
#if defined(DYHEAD_SIMT)
  simt::wgmma_fence(where);
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Ends a group of products.
DYHEAD_DEVICE void wgmma_commit(DYHEAD_WHERE_ONLY) {
#if defined(DYHEAD_SIMT)
  simt::wgmma_commit(where);
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most kPending groups of this warp are under way. Before, nothing may touch their
// sums, left operands or shared memory.
template <int kPending>
DYHEAD_DEVICE void wgmma_wait(DYHEAD_WHERE_ONLY) {
#if defined(DYHEAD_SIMT)
  simt::wgmma_wait(kPending, where);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

#if !defined(DYHEAD_SIMT)
#define DYHEAD_SUMS4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define DYHEAD_SUMS16(i) \
  DYHEAD_SUMS4(i), DYHEAD_SUMS4(i + 4), DYHEAD_SUMS4(i + 8), DYHEAD_SUMS4(i + 12)
#define DYHEAD_SUMS64(i) \
  DYHEAD_SUMS16(i), DYHEAD_SUMS16(i + 16), DYHEAD_SUMS16(i + 32), DYHEAD_SUMS16(i + 48)
#define DYHEAD_SUMS72(i) DYHEAD_SUMS64(i), DYHEAD_SUMS4(i + 64), DYHEAD_SUMS4(i + 68)
#endif

// Waits for all products of this warp, whose sums may then be used. The compiler knows of no other
// reason to read them after the wait.
DYHEAD_DEVICE void wgmma_wait_all(float (&acc)[128] DYHEAD_WHERE) {
#if defined(DYHEAD_SIMT)
  static_cast<void>(acc);
  simt::wgmma_wait(0, where);
#else
  asm volatile("wgmma.wait_group.sync.aligned 0;" : DYHEAD_SUMS64(0), DYHEAD_SUMS64(64)::"memory");
#endif
}

DYHEAD_DEVICE void wgmma_wait_all(float (&acc)[72] DYHEAD_WHERE) {
#if defined(DYHEAD_SIMT)
  static_cast<void>(acc);
  simt::wgmma_wait(0, where);
#else
  asm volatile("wgmma.wait_group.sync.aligned 0;" : DYHEAD_SUMS72(0)::"memory");
#endif
}

// Starts acc[64, 256] = a[64, 16] b[256, 16]^T, added to acc if `adds`, for T = bfloat16 or float16
// with sums in float32. Warp w of the warpgroup has rows 16w to 16w + 15. With g = lane / 4 and t =
// lane % 4, `left` is (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), pairs along the depth,
// and acc[4n..4n+3] is (g, 8n + 2t), (g, 8n + 2t + 1), (g + 8, 8n + 2t), (g + 8, 8n + 2t + 1).
template <class T>
DYHEAD_DEVICE void wgmma_m64n256k16(float (&acc)[128], const uint32_t (&left)[4], uint64_t right,
                                    bool adds DYHEAD_WHERE) {
  static_assert(is_half_v<T>);
#if defined(DYHEAD_SIMT)
  simt::wgmma(acc, 256, left, right, adds, std::is_same_v<T, bfloat16>, where);
#else
#define DYHEAD_WGMMA(type)                                                                   \
  asm volatile(                                                                              \
      "{\n"                                                                                  \
      ".reg .pred adds;\n"                                                                   \
      "setp.ne.b32 adds, %133, 0;\n"                                                         \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                           \
      " "                                                                                    \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "                        \
      "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "               \
      "%28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "               \
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "               \
      "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "               \
      "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "               \
      "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "               \
      "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "   \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
      "%126, %127}, "                                                                        \
      "{%128, %129, %130, %131}, %132, adds, 1, 1, 0;\n"                                     \
      "}"                                                                                    \
      : DYHEAD_SUMS64(0), DYHEAD_SUMS64(64)                                                  \
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(int{adds}))
  if constexpr (std::is_same_v<T, bfloat16>) {
    DYHEAD_WGMMA("bf16");
  } else {
    DYHEAD_WGMMA("f16");
  }
#undef DYHEAD_WGMMA
#endif
}

// The same for 144 columns, with the left operand in shared memory: `left` names 64 rows as
// wgmma_operand() does.
template <class T>
DYHEAD_DEVICE void wgmma_m64n144k16(float (&acc)[72], uint64_t left, uint64_t right,
                                    bool adds DYHEAD_WHERE) {
  static_assert(is_half_v<T>);
#if defined(DYHEAD_SIMT)
  simt::wgmma(acc, 144, left, right, adds, std::is_same_v<T, bfloat16>, where);
#else
#define DYHEAD_WGMMA(type)                                                                \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred adds;\n"                                                                \
      "setp.ne.b32 adds, %74, 0;\n"                                                       \
      "wgmma.mma_async.sync.aligned.m64n144k16.f32." type "." type                        \
      " "                                                                                 \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "                     \
      "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "            \
      "%28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "            \
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "            \
      "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71}, " \
      "%72, %73, adds, 1, 1, 0, 0;\n"                                                     \
      "}"                                                                                 \
      : DYHEAD_SUMS72(0)                                                                  \
      : "l"(left), "l"(right), "r"(int{adds}))
  if constexpr (std::is_same_v<T, bfloat16>) {
    DYHEAD_WGMMA("bf16");
  } else {
    DYHEAD_WGMMA("f16");
  }
#undef DYHEAD_WGMMA
#endif
}

#if !defined(DYHEAD_SIMT)
#undef DYHEAD_SUMS72
#undef DYHEAD_SUMS64
#undef DYHEAD_SUMS16
#undef DYHEAD_SUMS4
#endif

#endif  // sm_90a

}  // namespace dyhead::cuda
