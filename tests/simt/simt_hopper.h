// What csrc/cuda/tile/hopper.cuh calls in the emulation: clusters, barriers in shared memory, bulk
// copies and products of four warps. What each checks is said where it is defined.
#pragma once

#include <cstdint>

#include "simt.h"

namespace dyhead::simt {

// cluster.cpp
unsigned cluster_rank();
void cluster_barrier(Where where);
void named_barrier(int barrier, int threads, Where where);
void set_max_registers(int registers, bool take, Where where);

// mbarrier.cpp
void mbarrier_init(void* barrier, unsigned arrivals, Where where);
void fence_mbarrier_init();
void mbarrier_arrive(void* barrier, unsigned rank, Where where);
void mbarrier_arrive_expect(void* barrier, unsigned bytes, Where where);
void mbarrier_wait(void* barrier, unsigned parity, Where where);

// bulk_copy.cpp
void bulk_copy(void* shared, const void* global, unsigned bytes, void* barrier, unsigned blocks,
               Where where);
void fence_proxy_async();

// wgmma.cpp, wgmma_operand.cpp
// The offset of p in the block's window of shared memory, where dynamic shared memory begins at 0.
uint64_t shared_offset(const void* p);
void wgmma_fence(Where where);
void wgmma_commit(Where where);
void wgmma_wait(int pending, Where where);
// n: columns; acc has n / 2 sums and left four pairs of 16-bit values, of this lane.
void wgmma(float* acc, int n, const uint32_t* left, uint64_t right, bool adds, bool is_bfloat16,
           Where where);
// The same with the left operand in shared memory.
void wgmma(float* acc, int n, uint64_t left, uint64_t right, bool adds, bool is_bfloat16,
           Where where);

}  // namespace dyhead::simt
