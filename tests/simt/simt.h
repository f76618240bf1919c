// The host emulation of a CUDA device: what a kernel source sees when compiled with DYHEAD_SIMT.
//
// Every thread of a block is a fiber that runs until its next barrier, warp collective or spin; who
// continues then is drawn from a seeded generator. So an ordering that only a missing barrier
// allows does occur. Blocks of an ordinary launch run one after the other in random order, those of
// a cooperative launch side by side. Memory ordering weaker than program order is not modelled.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

#include <math.h>  // the math functions in the global namespace, as device code calls them

#include "cuda_names.h"

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace dyhead::simt {

using Where = std::source_location;

// A fault of the kernel: divergence, deadlock, misuse of memory. RuntimeError in Python.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  ~Error() override;
};

// Throws Error, adding the kernel and, inside one, the block and thread.
[[noreturn]] void fail(const std::string& message);

void set_seed(uint64_t seed);
// Blocks that a cooperative launch may have, as the device's occupancy would bound it.
void set_resident_blocks(int blocks);
int resident_blocks();

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  bool cooperative;
  unsigned cluster;  // neighbouring blocks along x that share a cluster
  const void* kernel;
  void (*run_thread)(const void* call);
  const void* call;
  Where where;
};

// Runs the whole grid before it returns. Impossible configurations return an error, as on a device.
cudaError_t launch(const Launch& launch);

void* static_shared(const void* key, const char* name, size_t bytes, size_t alignment);
void* dynamic_shared(size_t byte_offset, size_t bytes);
size_t dynamic_shared_bytes();

void check_aligned(const char* access, const void* p, size_t alignment);

void block_barrier(Where where);
// Lets others run where a thread retries what only another thread can make succeed.
void yield(Where where);
void wait_until(const unsigned* flag, unsigned value, Where where);

// One lane's part in a warp collective. `complete` runs once, when every lane of the mask that has
// not exited is there, with the payloads of those lanes (null for the others).
struct Collective {
  const char* name;
  unsigned mask;
  Where where;
  bool aligned;  // all 32 lanes must be at the same instruction
  void (*complete)(void* const (&payloads)[32]);
  void* payload;
};
void warp_collective(Collective& collective);
int lane_id();

// Lanes that do not take part deliver poison.
void shuffle(const char* name, unsigned mask, const void* in, void* out, size_t bytes,
             int source_lane, Where where);
unsigned ballot(const char* name, unsigned mask, bool predicate, Where where);
void warp_barrier(unsigned mask, Where where);

// A copy lands when its thread waits for it; until then the destination holds poison.
void cp_async(void* shared, const void* global, int bytes, int source_bytes, Where where);
void cp_async_commit();
void cp_async_wait_group(int pending);
void cp_async_wait_all();

void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed, Where where);
void mma_m16n8k16(float* acc, const uint32_t* a, const uint32_t* b, bool is_bfloat16, Where where);
void mma_m16n8k8_tf32(float* acc, const uint32_t* a, const uint32_t* b, Where where);
void mma_m8n8k4_f64(double* acc, double a, double b, Where where);

template <class T>
__forceinline__ T shuffle_value(const char* name, unsigned mask, T value, int source_lane,
                                Where where) {
  static_assert(std::is_trivially_copyable_v<T>);
  T result;
  shuffle(name, mask, &value, &result, sizeof(T), source_lane, where);
  return result;
}

// Counts an atomic access to `parts` neighbouring values of `bytes`, as counters.h describes.
void count_atomic(const void* p, size_t bytes, int parts);
#if defined(__SANITIZE_THREAD__)  // a counting build
#define DYHEAD_SIMT_COUNT_ATOMIC(p, bytes, parts) ::dyhead::simt::count_atomic(p, bytes, parts)
#define DYHEAD_SIMT_UNCOUNTED __attribute__((noinline, no_sanitize_thread))
#else
#define DYHEAD_SIMT_COUNT_ATOMIC(p, bytes, parts)
#define DYHEAD_SIMT_UNCOUNTED
#endif

template <size_t bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using Type [[gnu::may_alias]] = uint16_t;
};
template <>
struct WordOf<4> {
  using Type [[gnu::may_alias]] = uint32_t;
};
template <>
struct WordOf<8> {
  using Type [[gnu::may_alias]] = uint64_t;
};
template <>
struct WordOf<16> {
  using Type [[gnu::may_alias]] = unsigned __int128;
};

// V in the accesses of up to 16 bytes that a device would make: of a struct, the compiler might
// access each member by itself.
template <class V>
struct Wide {
  using Word = typename WordOf<(sizeof(V) < 16 ? sizeof(V) : 16)>::Type;
  Word words[sizeof(V) / sizeof(Word)];

  static __forceinline__ V load(const void* p) {
    Wide wide;
    for (size_t i = 0; i < std::size(wide.words); ++i) {
      wide.words[i] = static_cast<const Word*>(p)[i];
    }
    return __builtin_bit_cast(V, wide);
  }

  static __forceinline__ void store(void* p, const V& v) {
    const Wide wide = __builtin_bit_cast(Wide, v);
    for (size_t i = 0; i < std::size(wide.words); ++i) static_cast<Word*>(p)[i] = wide.words[i];
  }
};

// No scheduling point lies inside, so a plain read-modify-write is atomic.
template <class T, class Update>
DYHEAD_SIMT_UNCOUNTED T atomic_update(const char* name, T* p, Update update) {
  check_aligned(name, p, sizeof(T));
  const T old = *p;
  *p = update(old);
  return old;
}

}  // namespace dyhead::simt

// ---- barriers and warp collectives --------------------------------------------------------------

#define DYHEAD_SIMT_WHERE ::dyhead::simt::Where where = ::dyhead::simt::Where::current()

__forceinline__ void __syncthreads(DYHEAD_SIMT_WHERE) { dyhead::simt::block_barrier(where); }

inline void __syncwarp(unsigned mask = 0xffffffffu, DYHEAD_SIMT_WHERE) {
  dyhead::simt::warp_barrier(mask, where);
}

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = 32,
                              DYHEAD_SIMT_WHERE) {
  const int segment = dyhead::simt::lane_id() & ~(width - 1);
  return dyhead::simt::shuffle_value("__shfl_sync", mask, value, segment | (source & (width - 1)),
                                     where);
}

template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                 DYHEAD_SIMT_WHERE) {
  const int lane = dyhead::simt::lane_id();
  const int source = lane - static_cast<int>(delta);
  const bool inside = source >= (lane & ~(width - 1));
  return dyhead::simt::shuffle_value("__shfl_up_sync", mask, value, inside ? source : lane, where);
}

template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                   DYHEAD_SIMT_WHERE) {
  const int lane = dyhead::simt::lane_id();
  const int source = lane + static_cast<int>(delta);
  const bool inside = source < (lane & ~(width - 1)) + width;
  return dyhead::simt::shuffle_value("__shfl_down_sync", mask, value, inside ? source : lane,
                                     where);
}

template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                                  DYHEAD_SIMT_WHERE) {
  const int lane = dyhead::simt::lane_id();
  const int source = lane ^ lane_mask;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return dyhead::simt::shuffle_value("__shfl_xor_sync", mask, value, inside ? source : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, DYHEAD_SIMT_WHERE) {
  return dyhead::simt::ballot("__ballot_sync", mask, predicate != 0, where);
}

inline int __any_sync(unsigned mask, int predicate, DYHEAD_SIMT_WHERE) {
  return dyhead::simt::ballot("__any_sync", mask, predicate != 0, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate, DYHEAD_SIMT_WHERE) {
  return dyhead::simt::ballot("__all_sync", mask, predicate == 0, where) == 0;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- atomics: float, double, int, unsigned, unsigned long long
// -----------------------------------

namespace dyhead::simt {

inline float flush_subnormal(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

// atomicAdd, already counted. Floats are added in global memory, where devices take subnormal
// operands and results for zero (RED.FTZ).
template <class T>
T atomic_add(T* p, T value) {
  return atomic_update("atomicAdd", p, [&](T old) {
    if constexpr (std::is_same_v<T, int>) {
      return static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));  // wraps
    } else if constexpr (std::is_same_v<T, float>) {
      return flush_subnormal(flush_subnormal(old) + flush_subnormal(value));
    } else {
      return old + value;
    }
  });
}

}  // namespace dyhead::simt

template <class T>
__forceinline__ T atomicAdd(T* p, std::type_identity_t<T> value) {
  DYHEAD_SIMT_COUNT_ATOMIC(p, sizeof(T), 1);
  return dyhead::simt::atomic_add(p, value);
}

template <class T>
__forceinline__ T atomicMax(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "as on the device");
  DYHEAD_SIMT_COUNT_ATOMIC(p, sizeof(T), 1);
  return dyhead::simt::atomic_update("atomicMax", p, [&](T old) { return std::max(old, value); });
}

template <class T>
__forceinline__ T atomicMin(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "as on the device");
  DYHEAD_SIMT_COUNT_ATOMIC(p, sizeof(T), 1);
  return dyhead::simt::atomic_update("atomicMin", p, [&](T old) { return std::min(old, value); });
}

template <class T>
__forceinline__ T atomicOr(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "as on the device");
  DYHEAD_SIMT_COUNT_ATOMIC(p, sizeof(T), 1);
  return dyhead::simt::atomic_update("atomicOr", p, [&](T old) { return old | value; });
}

template <class T>
__forceinline__ T atomicExch(T* p, std::type_identity_t<T> value) {
  DYHEAD_SIMT_COUNT_ATOMIC(p, sizeof(T), 1);
  return dyhead::simt::atomic_update("atomicExch", p, [&](T) { return value; });
}

template <class T>
__forceinline__ T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value,
                            DYHEAD_SIMT_WHERE) {
  static_assert(std::is_integral_v<T>, "as on the device");
  DYHEAD_SIMT_COUNT_ATOMIC(p, sizeof(T), 1);
  const T old = dyhead::simt::atomic_update("atomicCAS", p,
                                            [&](T now) { return now == expected ? value : now; });
  if (old != expected) dyhead::simt::yield(where);
  return old;
}

// ---- arithmetic ---------------------------------------------------------------------------------

using std::max;
using std::min;

template <class T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __saturatef(float x) { return std::fmin(std::fmax(x, 0.0f), 1.0f); }

inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
