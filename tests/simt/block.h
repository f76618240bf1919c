// The state of the blocks that run side by side: threads, warps and shared memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "counters.h"
#include "fiber.h"
#include "guarded_memory.h"
#include "hopper_state.h"
#include "simt.h"

namespace dyhead::simt {

struct Block;
struct Warp;
class Waiting;

enum class State { kReady, kBarrier, kCollective, kWait, kExited };

struct AsyncCopy {
  std::byte* destination;
  unsigned bytes;
  unsigned group;
  std::array<std::byte, 16> data;
  Where where;
};

struct Thread {
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned lane = 0;
  uint3 index{};

  State state = State::kReady;
  Where where;                       // of the call that it waits in
  Collective* collective = nullptr;  // kCollective
  Waiting* waiting = nullptr;        // kWait

  std::vector<AsyncCopy> copies;  // under way, oldest first
  unsigned committed_groups = 0;

  Fiber fiber;
};

struct Warp {
  std::array<Thread*, kLanes> lanes{};
  unsigned present = 0;     // lanes that exist and have not exited
  unsigned ready = 0;       // lanes that can run
  unsigned collective = 0;  // lanes that wait in a collective
  bool listed = false;      // in the scheduler's list of warps with ready lanes
  WarpTrace trace;
  WarpProducts products;
  WarpRegisters registers;
};

struct Block {
  // Joins the cluster.
  Block(const Launch& launch, uint3 index, Cluster& cluster);

  uint3 index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned running;  // threads that have not exited

  unsigned at_barrier = 0;
  Where barrier_where;
  LineCache l1;

  std::map<const void*, std::unique_ptr<GuardedMemory>> static_arrays;  // by declaration
  std::map<size_t, std::unique_ptr<GuardedMemory>> dynamic_arrays;      // by byte offset

  Cluster* cluster;
  unsigned rank;  // in the cluster
  std::array<NamedBarrier, kNamedBarriers> named_barriers;
  std::map<const std::byte*, MBarrierState> mbarriers;  // by address
  std::map<const GuardedMemory*, std::vector<std::byte>> async_views;
  std::vector<Warpgroup> warpgroups;
  unsigned free_registers = 0;  // that warps gave back

  // The shared array that contains these bytes, or null.
  const GuardedMemory* shared_array(const void* p, size_t bytes) const;
  bool is_shared(const void* p, size_t bytes) const { return shared_array(p, bytes) != nullptr; }
  Warpgroup* warpgroup_of(const Warp& warp);  // null where the block ends before its fourth warp
  // What each thread waits for, one line per place.
  std::string describe_waits() const;
  // Fails if the block leaves asynchronous work behind or has written outside its shared arrays.
  void check_end() const;
};

// The thread that runs now; null outside kernels.
extern Thread* current;

// Fails outside kernels.
Thread& current_thread(const char* caller);

std::string to_string(uint3 index);
std::string to_string(const Where& where);

}  // namespace dyhead::simt
