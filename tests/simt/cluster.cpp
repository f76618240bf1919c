// Clusters of blocks, named barriers, and registers that warps hand to each other.
#include <algorithm>
#include <set>
#include <utility>

#include "hopper.h"
#include "scheduler.h"

namespace dyhead::simt {
namespace {

class MeetingWait : public Waiting {
 public:
  explicit MeetingWait(std::string text) : text_(std::move(text)) {}
  std::string describe() const override { return text_; }

 private:
  std::string text_;
};

void count_meetings(const std::vector<Thread*>& threads) {
  std::set<Warp*> warps;
  for (Thread* thread : threads) warps.insert(thread->warp);
  for (Warp* warp : warps) count_meeting(*warp);
}

// Lets all that wait run on.
void release(Meeting& meeting) {
  if (counting) count_meetings(meeting.waiting);
  for (Thread* thread : std::exchange(meeting.waiting, {})) make_ready(*thread);
}

// Until the block has what the warp wants.
class RegisterWait : public Waiting {
 public:
  RegisterWait(Block& block, WarpRegisters& warp) : block_(block), warp_(warp) {}
  std::string describe() const override {
    return "take_registers<" + std::to_string(warp_.per_thread) + ">, for which the warp lacks " +
           std::to_string(warp_.wanted - block_.free_registers) + " registers,";
  }
  bool over() override {
    if (warp_.wanted > block_.free_registers) return false;
    block_.free_registers -= std::exchange(warp_.wanted, 0);
    return true;
  }

 private:
  Block& block_;
  WarpRegisters& warp_;
};

struct RegisterChange {
  unsigned registers;
  bool take;
  Where where;
};

void change_registers(void* const (&payloads)[kLanes]) {
  const auto& change = *static_cast<const RegisterChange*>(payloads[0]);
  const char* name = change.take ? "take_registers" : "give_registers";
  WarpRegisters& own = current->warp->registers;
  const bool wrong =
      change.take ? change.registers < own.per_thread : change.registers > own.per_thread;
  if (wrong) {
    fail(std::string(name) + "<" + std::to_string(change.registers) + "> at " +
         to_string(change.where) + ": the warp has " + std::to_string(own.per_thread) +
         " per thread, which is " + (change.take ? "more" : "less"));
  }
  own.changes.emplace_back(change.registers, change.take);
  if (change.take) {
    own.wanted = kLanes * (change.registers - own.per_thread);
  } else {
    current->block->free_registers += kLanes * (own.per_thread - change.registers);
  }
  own.per_thread = change.registers;
}

}  // namespace

unsigned Cluster::running() const {
  unsigned sum = 0;
  for (const Block* block : blocks) sum += block->running;
  return sum;
}

std::string place_of(const Block& block, const void* p) {
  const GuardedMemory* array = block.shared_array(p, 1);
  if (array == nullptr) return "an address outside shared memory";
  return "'" + array->name() + "' + " +
         std::to_string(static_cast<const std::byte*>(p) - array->data());
}

std::string place_in(const Block& block, const void* p) {
  return place_of(block, p) + " of block " + to_string(block.index);
}

std::byte* in_peer(const char* what, const void* p, size_t bytes, unsigned rank, Where where) {
  Block& own = *current_thread(what).block;
  const std::string call = std::string(what) + " at " + to_string(where);
  const GuardedMemory* array = own.shared_array(p, bytes);
  if (array == nullptr) {
    fail(call + ": the " + std::to_string(bytes) + " bytes are not inside one shared array");
  }
  if (rank >= own.cluster->blocks.size()) {
    fail(call + ": expected a block 0.." + std::to_string(own.cluster->blocks.size() - 1) +
         " of the cluster, got " + std::to_string(rank));
  }
  Block& peer = *own.cluster->blocks[rank];
  if (peer.running == 0) {
    fail(call + ": block " + std::to_string(rank) + " of the cluster has ended");
  }
  const GuardedMemory* there = nullptr;
  for (const auto& [key, candidate] : own.static_arrays) {
    if (candidate.get() != array) continue;
    if (const auto found = peer.static_arrays.find(key); found != peer.static_arrays.end()) {
      there = found->second.get();
    }
  }
  for (const auto& [offset, candidate] : own.dynamic_arrays) {
    if (candidate.get() != array) continue;
    const auto found = peer.dynamic_arrays.find(offset);
    if (found != peer.dynamic_arrays.end() && found->second->bytes() == array->bytes()) {
      there = found->second.get();
    }
  }
  if (there == nullptr) {
    fail(call + ": block " + std::to_string(rank) + " of the cluster has not requested '" +
         array->name() + "'");
  }
  return there->data() + (static_cast<const std::byte*>(p) - array->data());
}

unsigned cluster_rank() { return current_thread("cluster_rank").block->rank; }

void release_if_met(Cluster& cluster) {
  Meeting& meeting = cluster.meeting;
  if (meeting.waiting.empty() || meeting.waiting.size() != cluster.running()) return;
  for (Block* block : cluster.blocks) publish_barriers(*block, true);
  release(meeting);
}

void cluster_barrier(Where where) {
  Thread& thread = current_thread("cluster_sync");
  Cluster& cluster = *thread.block->cluster;
  Meeting& meeting = cluster.meeting;
  if (meeting.waiting.empty()) {
    meeting.where = where;
  } else if (!same(meeting.where, where)) {
    fail("divergent cluster_sync: this thread is at " + to_string(where) + ", " +
         std::to_string(meeting.waiting.size()) + " of " + std::to_string(cluster.running()) +
         " wait at " + to_string(meeting.where));
  }
  meeting.waiting.push_back(&thread);
  if (counting && meeting.waiting.size() == cluster.running()) {
    for (size_t i = 0; i < cluster.blocks.size(); ++i) count_barrier(DYHEAD_SIMT_SITE);
  }
  MeetingWait waiting("cluster_sync");
  release_if_met(cluster);
  block_thread(waiting, where);
}

void named_barrier(int barrier, int threads, Where where) {
  Thread& thread = current_thread("named_barrier_sync");
  Block& block = *thread.block;
  const std::string call =
      "named_barrier_sync(" + std::to_string(barrier) + ", " + std::to_string(threads) + ")";
  const std::string at = call + " at " + to_string(where);
  if (barrier < 1 || barrier >= static_cast<int>(kNamedBarriers)) {
    fail(at + ": expected a barrier 1..15");
  }
  if (threads <= 0 || threads % static_cast<int>(kLanes) != 0 ||
      static_cast<size_t>(threads) > block.warps.size() * kLanes) {
    fail(at + ": expected the threads of whole warps, at most the block's " +
         std::to_string(block.threads.size()));
  }
  NamedBarrier& of = block.named_barriers[static_cast<size_t>(barrier)];
  Meeting& meeting = of.meeting;
  if (meeting.waiting.empty()) of.threads = threads;
  if (of.threads != threads) {
    fail(at + ": others wait there for " + std::to_string(of.threads) + " threads, at " +
         to_string(meeting.where));
  }
  for (const Thread* other : meeting.waiting) {
    if (other->warp == thread.warp && !same(other->where, where)) {
      fail("divergent warp: lane " + std::to_string(thread.lane) + " calls " + at + ", lane " +
           std::to_string(other->lane) + " waits there at " + to_string(other->where));
    }
  }
  meeting.where = where;
  meeting.waiting.push_back(&thread);
  if (meeting.waiting.size() == static_cast<size_t>(threads)) {
    std::map<const Warp*, unsigned> lanes;
    for (const Thread* other : meeting.waiting) ++lanes[other->warp];
    for (const auto& [warp, count] : lanes) {
      if (count == kLanes) continue;
      fail(at + ": only " + std::to_string(count) + " lanes of warp " +
           std::to_string(warp - block.warps.data()) + " are there; it counts whole warps");
    }
    // For the others of the block, which do not meet here, this is generous.
    publish_barriers(block, false);
    if (counting) count_barrier(DYHEAD_SIMT_SITE);
    release(meeting);
  }
  MeetingWait waiting(call);
  block_thread(waiting, where);
}

void set_max_registers(int registers, bool take, Where where) {
  Thread& thread = current_thread("set_max_registers");
  Block& block = *thread.block;
  const char* name = take ? "take_registers" : "give_registers";
  if (block.warpgroup_of(*thread.warp) == nullptr) {
    fail(std::string(name) + " at " + to_string(where) + ": needs a warpgroup of four warps");
  }
  RegisterChange change{static_cast<unsigned>(registers), take, where};
  collect(name, ~0u, true, change_registers, change, where);
  if (!take) return;
  RegisterWait waiting(block, thread.warp->registers);
  if (!waiting.over()) poll_thread(waiting, where);
}

void check_same_registers(const Block& block) {
  for (size_t first = 0; first + kGroupWarps <= block.warps.size(); first += kGroupWarps) {
    const WarpRegisters& own = block.warps[first].registers;
    for (size_t i = 1; i < kGroupWarps; ++i) {
      if (block.warps[first + i].registers.changes == own.changes) continue;
      fail("block " + to_string(block.index) + ": warps " + std::to_string(first) + " and " +
           std::to_string(first + i) + " of a warpgroup called give_registers or take_registers " +
           "differently; all four warps must make the same calls");
    }
  }
}

}  // namespace dyhead::simt
