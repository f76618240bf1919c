// What a device would charge for a kernel's accesses, counted per place in its source.
//
// A counting build compiles the kernels with -fsanitize=thread, which calls a function before each
// access to memory that others may see; these functions are counters.cpp's own, libtsan is not
// linked. The k-th execution of a place by the lanes of a warp, since they last met at a barrier or
// a collective, is one warp instruction.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

// The place in a kernel that calls the function in which this stands.
#define DYHEAD_SIMT_SITE reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace dyhead::simt {

class GuardedMemory;
struct Block;
struct Launch;
struct Thread;
struct Warp;

enum class Access : uint8_t {
  kGlobalLoad,
  kGlobalStore,
  kAtomic,
  kAsyncRead,   // of an asynchronous or bulk copy, from global memory
  kAsyncWrite,  // of the same copy, to shared memory
  kSharedLoad,
  kSharedStore,
  kLdmatrix,
  kShuffle,
  kMma,
  kOperandRead,  // of the operand of wgmma in shared memory, once for the four warps
  kBarrier,
};

// One instruction of a warp: the address of each lane, or 0 where a lane accesses nothing.
struct WarpAccess {
  uintptr_t site;
  Access access;
  uint32_t bytes;  // per lane
  uint32_t lanes;
  const GuardedMemory* memory;
  std::array<uintptr_t, 32> addresses;
};

// What the lanes of a warp did since they last met.
struct WarpTrace {
  struct Site {
    std::array<uint32_t, 32> executed{};
    std::vector<uint32_t> instructions;  // the k-th one, in `accesses`
  };
  std::vector<WarpAccess> accesses;
  std::unordered_map<uint64_t, Site> sites;
};

// Lines of 128 bytes, least recently used first out, with the sectors of each that are valid.
class LineCache {
 public:
  // How many of the sectors (a bit each) of a line are missing; they are there afterwards.
  unsigned missing(uint64_t line, unsigned sectors, size_t capacity);

 private:
  struct Line {
    std::list<uint64_t>::iterator place;
    unsigned sectors;
  };
  std::list<uint64_t> order_;  // latest first
  std::unordered_map<uint64_t, Line> lines_;
};

struct CounterOptions {
  // Whether four neighbouring sums are one access, as on sm_90 and newer, or four.
  bool vector_atomics = true;
  // Of the L1 cache that a block has to itself.
  size_t l1_bytes = 64 * 1024;
  // How many blocks of a launch run, spread over its grid; 0 for all. Cooperative launches run
  // whole.
  size_t sampled_blocks = 0;
};

struct CountKey {
  uintptr_t kernel;
  uintptr_t site;
  Access access;
  uint32_t bytes;
  bool operator==(const CountKey&) const = default;
};

struct Count {
  uint64_t instructions = 0;  // of warps; of blocks for barriers
  uint64_t lanes = 0;         // that took part
  uint64_t sectors = 0;       // of 32 bytes, the union over the lanes of an instruction
  uint64_t lines = 0;         // of 128 bytes, likewise
  uint64_t l2_sectors = 0;    // that the L1 cache did not have
  uint64_t wavefronts = 0;    // clocks of the path to shared memory
  uint64_t ideal_wavefronts = 0;
  uint64_t flop = 0;
};

// What a kernel did to an array of global memory, in sectors.
struct ArrayCount {
  uint64_t bytes = 0;
  uint64_t loads = 0, stores = 0, atomics = 0;
  uint64_t l2_loads = 0;
  uint64_t distinct_read = 0, distinct_written = 0;  // per launch
};

struct KernelCount {
  uint64_t launches = 0;
  uint64_t blocks = 0, sampled_blocks = 0;  // of all launches; of them those that ran
  uint64_t threads = 0, shared_bytes = 0;   // of the last launch
  std::unordered_map<std::string, ArrayCount> arrays;
};

struct CountKeyHash {
  size_t operator()(const CountKey& key) const {
    uint64_t hash = key.site * 0x9e3779b97f4a7c15u ^ key.kernel;
    hash = (hash ^ hash >> 29) * 0xbf58476d1ce4e5b9u;
    return hash ^ (static_cast<uint64_t>(key.access) << 8) ^ key.bytes;
  }
};

// Fails unless the kernels were built for counting.
const std::unordered_map<CountKey, Count, CountKeyHash>& counts();
const std::unordered_map<uintptr_t, KernelCount>& kernel_counts();
void reset_counts(const CounterOptions& options);

// ---- called by the emulation --------------------------------------------------------------------

// Whether kernels that were built for counting are loaded. Else nothing below needs to be called.
extern bool counting;

// How many of a launch's blocks run.
size_t count_launch(const Launch& launch);
void count_launch_end();
// All lanes of the warp that still run are at one place.
void count_meeting(Warp& warp);
void count_barrier(uintptr_t site);
void count_async_copy(Thread& thread, uintptr_t site, const void* shared, const void* global,
                      size_t bytes, size_t source_bytes);
// rows: of the 8 * matrices lanes that pass one
void count_ldmatrix(uintptr_t site, const std::array<const void*, 32>& rows, int matrices);
void count_shuffle(uintptr_t site, size_t bytes, uint32_t lanes);
void count_mma(uintptr_t site, uint64_t flop);
// A bulk copy reads global memory once for all its blocks, and writes to each.
void count_bulk_read(Thread& thread, uintptr_t site, const void* global, size_t bytes);
void count_bulk_write(uintptr_t site, size_t bytes);
void count_operand_read(uintptr_t site, size_t bytes);

}  // namespace dyhead::simt
