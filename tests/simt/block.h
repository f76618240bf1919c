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
#include "simt.h"

namespace dyhead::simt {

inline constexpr unsigned kLanes = 32;

struct Block;
struct Warp;

enum class State { kReady, kBarrier, kCollective, kSpin, kExited };

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
  const unsigned* flag = nullptr;    // kSpin: until *flag has reached `value`
  unsigned value = 0;

  std::vector<AsyncCopy> copies;  // under way, oldest first
  unsigned committed_groups = 0;

  Fiber fiber;

  bool flag_reached() const { return static_cast<int>(*flag - value) >= 0; }
};

struct Warp {
  std::array<Thread*, kLanes> lanes{};
  unsigned present = 0;     // lanes that exist and have not exited
  unsigned ready = 0;       // lanes that can run
  unsigned collective = 0;  // lanes that wait in a collective
  bool listed = false;      // in the scheduler's list of warps with ready lanes
  WarpTrace trace;
};

struct Block {
  Block(const Launch& launch, uint3 index);

  uint3 index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned running;  // threads that have not exited

  unsigned at_barrier = 0;
  Where barrier_where;
  LineCache l1;

  std::map<const void*, std::unique_ptr<GuardedMemory>> static_arrays;  // by declaration
  std::map<size_t, std::unique_ptr<GuardedMemory>> dynamic_arrays;      // by byte offset

  bool is_shared(const void* p, size_t bytes) const;
  // What each thread waits for, one line per place.
  std::string describe_waits() const;
  // Fails if the block leaves asynchronous copies behind or has written outside its shared arrays.
  void check_end() const;
};

// The thread that runs now; null outside kernels.
extern Thread* current;

// Fails outside kernels.
Thread& current_thread(const char* caller);

std::string to_string(uint3 index);
std::string to_string(const Where& where);

}  // namespace dyhead::simt
