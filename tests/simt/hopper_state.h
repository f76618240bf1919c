// What blocks and warps keep for the functions of simt_hopper.h.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "simt.h"

namespace dyhead::simt {

inline constexpr unsigned kLanes = 32;
inline constexpr size_t kGroupWarps = 4;  // of a warpgroup
inline constexpr size_t kNamedBarriers = 16;

class GuardedMemory;
struct Block;
struct Thread;

// ---- clusters and barriers ----------------------------------------------------------------------

// Threads that wait at one barrier. They become ready together.
struct Meeting {
  std::vector<Thread*> waiting;
  Where where;
};

struct Cluster {
  std::vector<Block*> blocks;  // by rank
  Meeting meeting;

  unsigned running() const;  // threads that have not exited
};

struct NamedBarrier {
  Meeting meeting;
  int threads = 0;  // that this phase waits for
};

// A barrier in shared memory. Its eight bytes hold poison; the state is here.
struct MBarrierState {
  const Thread* initialiser;
  unsigned arrivals;  // that end a phase
  unsigned pending;   // of them those that this phase still waits for
  int64_t bytes = 0;  // expected in this phase and not yet copied; negative where they came first
  int64_t phase = 0;
  // Who may use it: its initialiser at once, the block after a barrier, other blocks after
  // fence_mbarrier_init() and a barrier of the cluster; bulk copies to the block need the fence
  // too.
  bool fenced = false;
  bool block_knows = false;
  bool cluster_knows = false;
  // The phase that each thread will wait for next. The device knows its parity only.
  std::map<const Thread*, int64_t> next_wait;
};

// ---- products -----------------------------------------------------------------------------------

// An operand in shared memory, as the first warp of the warpgroup that issues the product finds it.
struct SharedOperand {
  const char* name;
  uint64_t descriptor;
  int rows;
  const GuardedMemory* array;
  std::vector<std::byte> bytes;  // [rows, 32]
  std::vector<float> values;     // [16, rows]
};

struct SharedOperands {
  std::shared_ptr<const SharedOperand> left;  // null where it is in registers
  std::shared_ptr<const SharedOperand> right;
};

struct ProductIssue {
  Where where;
  bool adds;
  bool is_bfloat16;
  SharedOperands operands;
};

// The products that the four warps of a warpgroup issue: all must issue the same.
struct Warpgroup {
  std::deque<ProductIssue> issues;  // that not all warps have issued yet
  size_t first = 0;                 // the number of the first of them
  std::array<size_t, kGroupWarps> issued{};

  size_t issued_by_all() const;
};

// The sums of a product, of all lanes: poison in the kernel's registers while products are under
// way.
struct Sums {
  std::array<float*, kLanes> registers;
  size_t count;               // per lane
  std::vector<float> values;  // [lanes, count]; what the registers held when the emulation last saw
                              // them: after a product, or at a fence
  size_t under_way = 0;       // products
};

struct LeftOperand {
  std::array<const uint32_t*, kLanes> registers;
  std::array<std::array<uint32_t, 4>, kLanes> values;
};

struct Product {
  Where where;
  size_t number;     // in the warpgroup's order
  size_t group;      // of wgmma_commit
  size_t sums;       // index in WarpProducts
  LeftOperand left;  // unless it is in shared memory
  SharedOperands operands;
};

struct WarpProducts {
  std::deque<Product> under_way;  // oldest first
  std::vector<Sums> sums;
  std::vector<LeftOperand> left;  // as last seen at a fence or product
  size_t committed = 0;           // groups
  bool fenced = false;
};

// ---- registers ----------------------------------------------------------------------------------

struct WarpRegisters {
  unsigned per_thread = 0;
  unsigned wanted = 0;                             // that the block does not have yet
  std::vector<std::pair<unsigned, bool>> changes;  // to how many, and whether taken
};

}  // namespace dyhead::simt
