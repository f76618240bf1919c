// What the kernels need beyond plain CUDA C++: vector accesses, grid-wide handshakes, asynchronous
// copies and tensor-core instructions. Inline PTX is in this file and hopper.cuh only. Each
// function has a host version for the emulation in tests/simt, where DYHEAD_SIMT is defined.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../../common/dtypes.h"
#include "launch.cuh"

namespace dyhead::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

// ---- vector access ------------------------------------------------------------------------------

// N values of T, moved by one access of 2, 4, 8 or 16 bytes or by several of 16.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  static constexpr size_t kBytes = sizeof(T) * N;
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes % 16 == 0);
  using Word = std::conditional_t<
      kBytes == 2, uint16_t,
      std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>>;
  static constexpr int kWords = static_cast<int>(kBytes / sizeof(Word));

  T data[N];

  DYHEAD_DEVICE T& operator[](int i) { return data[i]; }
  DYHEAD_DEVICE const T& operator[](int i) const { return data[i]; }
};

// p must be aligned to min(16, sizeof(T) * N) bytes, here and in the functions below.
template <int N, class T>
DYHEAD_DEVICE Vec<T, N> load_vec(const T* p) {
#if defined(DYHEAD_SIMT)
  simt::check_aligned("load_vec", p, alignof(Vec<T, N>));
  return simt::Wide<Vec<T, N>>::load(p);
#else
  return *reinterpret_cast<const Vec<T, N>*>(p);
#endif
}

// Loads through the non-coherent (read-only) path: only for memory that nothing writes while the
// kernel runs.
template <int N, class T>
DYHEAD_DEVICE Vec<T, N> load_vec_readonly(const T* p) {
#if defined(DYHEAD_SIMT)
  return load_vec<N>(p);
#else
  using Word = typename Vec<T, N>::Word;
  Vec<T, N> v;
#pragma unroll
  for (int i = 0; i < Vec<T, N>::kWords; ++i) {
    reinterpret_cast<Word*>(&v)[i] = __ldg(reinterpret_cast<const Word*>(p) + i);
  }
  return v;
#endif
}

// An ordinary store, so that L2 keeps the line for the next launches. The rule for all stores: a
// streaming one (`st.cs`), which caches evict first, is only for what no launch of the next ones
// reads. Every large tensor of a block is read by the next launch or one soon after: what is
// convolved by the pass over pixels, that by the next block, gradients by the step before, and
// partial sums by the kernel that adds them. So there are no streaming stores.
template <int N, class T>
DYHEAD_DEVICE void store_vec(T* p, const Vec<T, N>& v) {
#if defined(DYHEAD_SIMT)
  simt::check_aligned("store_vec", p, alignof(Vec<T, N>));
  simt::Wide<Vec<T, N>>::store(p, v);
#else
  *reinterpret_cast<Vec<T, N>*>(p) = v;
#endif
}

// The same to global memory, as one instruction for 16 bytes: the compiler may divide the other
// into those of the values.
template <int N, class T>
DYHEAD_DEVICE void store_vec_global(T* p, const Vec<T, N>& v) {
#if defined(DYHEAD_SIMT)
  store_vec(p, v);
#else
  using Word = typename Vec<T, N>::Word;
#pragma unroll
  for (int i = 0; i < Vec<T, N>::kWords; ++i) {
    __stwb(reinterpret_cast<Word*>(p) + i, reinterpret_cast<const Word*>(&v)[i]);
  }
#endif
}

// The compiler forgets what it loaded, so that values which it could keep in registers are loaded
// again.
DYHEAD_DEVICE void reload_memory() {
#if !defined(DYHEAD_SIMT)
  asm volatile("" ::: "memory");
#endif
}

// ---- the compiler -------------------------------------------------------------------------------

// x, but the compiler cannot see how it came to be. So it keeps the value in one register, and does
// not spread the computation over many addresses, each with a part of it.
DYHEAD_DEVICE int opaque(int x) {
#if !defined(DYHEAD_SIMT)
  asm("" : "+r"(x));
#endif
  return x;
}

// ---- conversions --------------------------------------------------------------------------------

// Two floats, rounded to T and packed. `low` is the lower half, which comes first in memory.
template <class T>
DYHEAD_DEVICE uint32_t pack2(float low, float high) {
  static_assert(is_half_v<T>);
#if defined(DYHEAD_SIMT)
  return static_cast<uint32_t>(from_compute<T>(low).bits) |
         static_cast<uint32_t>(from_compute<T>(high).bits) << 16;
#else
  uint32_t packed;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
#endif
}

// The two values of a packed pair: .x the lower half.
template <class T>
DYHEAD_DEVICE float2 unpack2(uint32_t packed) {
  static_assert(is_half_v<T>);
  return make_float2(to_compute(T{static_cast<uint16_t>(packed & 0xffffu)}),
                     to_compute(T{static_cast<uint16_t>(packed >> 16)}));
}

// Rounds to TF32 (10 mantissa bits), to nearest, ties away from zero; mma itself would truncate.
DYHEAD_DEVICE uint32_t to_tf32(float x) {
#if defined(DYHEAD_SIMT)
  const uint32_t bits = dyhead::detail::float_bits(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

// ---- atomics and the grid handshake -------------------------------------------------------------

// Adds without returning the old value.
DYHEAD_DEVICE void red_add(float* p, float value) {
#if defined(DYHEAD_SIMT)
  atomicAdd(p, value);
#else
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p), "f"(value) : "memory");
#endif
}

// Adds to four neighbouring floats in global memory, p aligned to 16 bytes. Each float is atomic by
// itself.
DYHEAD_DEVICE void red_add_v4(float* p, float4 value) {
#if defined(DYHEAD_SIMT)
  simt::check_aligned("red_add_v4", p, 16);
  DYHEAD_SIMT_COUNT_ATOMIC(p, sizeof(float), 4);
  simt::atomic_add(p, value.x);
  simt::atomic_add(p + 1, value.y);
  simt::atomic_add(p + 2, value.z);
  simt::atomic_add(p + 3, value.w);
  return;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(value.x),
               "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
  return;
#endif
  red_add(p, value.x);
  red_add(p + 1, value.y);
  red_add(p + 2, value.z);
  red_add(p + 3, value.w);
}

// Adds and returns the old value. Across the grid, this thread's earlier writes are ordered before
// it and its later reads after it. Put __syncthreads() before it to publish the whole block's
// writes.
DYHEAD_DEVICE unsigned atomic_add_acq_rel(unsigned* p, unsigned value) {
#if defined(DYHEAD_SIMT)
  return atomicAdd(p, value);
#else
  unsigned old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(p), "r"(value)
               : "memory");
  return old;
#endif
}

DYHEAD_DEVICE unsigned load_acquire(const unsigned* p) {
#if defined(DYHEAD_SIMT)
  return *p;
#else
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
#endif
}

DYHEAD_DEVICE void store_release(unsigned* p, unsigned value) {
#if defined(DYHEAD_SIMT)
  *p = value;
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
#endif
}

// Spins (acquire) until the counter *flag has reached `value`. Counters only grow and may wrap: up
// to 2^31 - 1 past `value` counts as reached. Waiting for another block requires a cooperative
// launch.
DYHEAD_DEVICE void wait_until(const unsigned* flag, unsigned value DYHEAD_WHERE) {
#if defined(DYHEAD_SIMT)
  simt::wait_until(flag, value, where);
#else
  while (static_cast<int>(load_acquire(flag) - value) < 0) __nanosleep(20);
#endif
}

// ---- asynchronous copies ------------------------------------------------------------------------

#if !defined(DYHEAD_SIMT)
namespace detail {

DYHEAD_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace detail
#endif

// Starts a copy of kBytes from global to shared memory, both aligned to kBytes. The first
// `source_bytes` are read, the remaining ones become zero. After a wait the copy is visible to this
// thread; after a barrier that follows the wait, to others.
template <int kBytes>
DYHEAD_DEVICE void cp_async_zfill(void* shared, const void* global, int source_bytes DYHEAD_WHERE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if defined(DYHEAD_SIMT)
  simt::cp_async(shared, global, kBytes, source_bytes, where);
#else
  // Only 16-byte copies can bypass L1 (.cg).
  if constexpr (kBytes == 16) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(detail::shared_address(shared)),
        "l"(global), "r"(source_bytes)
        : "memory");
  } else {
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(detail::shared_address(shared)),
        "l"(global), "n"(kBytes), "r"(source_bytes)
        : "memory");
  }
#endif
}

template <int kBytes>
DYHEAD_DEVICE void cp_async(void* shared, const void* global DYHEAD_WHERE) {
#if defined(DYHEAD_SIMT)
  cp_async_zfill<kBytes>(shared, global, kBytes, where);
#else
  cp_async_zfill<kBytes>(shared, global, kBytes);
#endif
}

// Ends this thread's group of copies; an empty group counts too.
DYHEAD_DEVICE void cp_async_commit() {
#if defined(DYHEAD_SIMT)
  simt::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the kPending latest groups of this thread are in flight.
template <int kPending>
DYHEAD_DEVICE void cp_async_wait_group() {
#if defined(DYHEAD_SIMT)
  simt::cp_async_wait_group(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Waits for all copies of this thread, committed or not.
DYHEAD_DEVICE void cp_async_wait_all() {
#if defined(DYHEAD_SIMT)
  simt::cp_async_wait_all();
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// ---- tensor cores -------------------------------------------------------------------------------

// Warp collectives: all 32 lanes take part. Below, g = lane / 4 and t = lane % 4; of the two halves
// in a register, the lower one has the lower column (or k).

// Loads kMatrices (1, 2 or 4) matrices of 8x8 16-bit values from shared memory. Lane 8m + i passes
// the address of row i of matrix m (16 bytes, aligned). registers[m] = row g, columns 2t and 2t +
// 1.
template <int kMatrices>
DYHEAD_DEVICE void ldmatrix(uint32_t (&registers)[kMatrices], const void* row DYHEAD_WHERE) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
#if defined(DYHEAD_SIMT)
  simt::ldmatrix(registers, row, kMatrices, /*transposed=*/false, where);
#else
  const uint32_t address = detail::shared_address(row);
  if constexpr (kMatrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// The same with each matrix transposed: registers[m] = rows 2t and 2t + 1 of column g.
template <int kMatrices>
DYHEAD_DEVICE void ldmatrix_trans(uint32_t (&registers)[kMatrices], const void* row DYHEAD_WHERE) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
#if defined(DYHEAD_SIMT)
  simt::ldmatrix(registers, row, kMatrices, /*transposed=*/true, where);
#else
  const uint32_t address = detail::shared_address(row);
  if constexpr (kMatrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// acc[16, 8] += a[16, 16] b[16, 8] for T = bfloat16 or float16, accumulated in float32.
// a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); b: (2t, g), (2t + 8, g), pairs along k;
// acc: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class T>
DYHEAD_DEVICE void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4],
                                const uint32_t (&b)[2] DYHEAD_WHERE) {
  static_assert(is_half_v<T>);
#if defined(DYHEAD_SIMT)
  simt::mma_m16n8k16(acc, a, b, std::is_same_v<T, bfloat16>, where);
#else
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// acc[16, 8] += a[16, 8] b[8, 8] in TF32 (operands from to_tf32), accumulated in float32.
// a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b: (t, g), (t + 4, g); acc as above.
DYHEAD_DEVICE void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2] DYHEAD_WHERE) {
#if defined(DYHEAD_SIMT)
  simt::mma_m16n8k8_tf32(acc, a, b, where);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// acc[8, 8] += a[8, 4] b[4, 8] in float64. a: (g, t); b: (t, g); acc: (g, 2t), (g, 2t + 1).
DYHEAD_DEVICE void mma_m8n8k4_f64(double (&acc)[2], double a, double b DYHEAD_WHERE) {
#if defined(DYHEAD_SIMT)
  simt::mma_m8n8k4_f64(acc, a, b, where);
#else
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(acc[0]), "+d"(acc[1])
               : "d"(a), "d"(b));
#endif
}

// ---- the threads of a block ---------------------------------------------------------------------

// Code that only some threads of a block may run takes such a class: how those threads meet.
struct BlockThreads {
  DYHEAD_DEVICE static void sync() { __syncthreads(); }
};

// ---- warp reductions ----------------------------------------------------------------------------

// The sum over the 32 lanes, in every lane, in a fixed order.
template <class T>
DYHEAD_DEVICE T warp_sum(T value DYHEAD_WHERE) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
#if defined(DYHEAD_SIMT)
    value += __shfl_xor_sync(kFullMask, value, distance, kWarpSize, where);
#else
    value += __shfl_xor_sync(kFullMask, value, distance);
#endif
  }
  return value;
}

}  // namespace dyhead::cuda
