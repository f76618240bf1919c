// Barriers in shared memory. The emulation keeps their state, and poison in their eight bytes, so
// that ordinary accesses to them show.
//
// The device knows only the parity of a phase: a thread that comes two phases late passes or waits
// by mistake. Here each thread is taken to wait for every phase of a barrier, in order, beginning
// with phase 0 or, by parity 1, with the one before it, which has ended. A wait that the device
// would end with another phase than that is a fault.
#include <algorithm>
#include <cstring>

#include "hopper.h"
#include "scheduler.h"

namespace dyhead::simt {
namespace {

constexpr int64_t kMaxBytes = (1 << 20) - 1;  // of the device's counter, in either direction
constexpr unsigned kMaxArrivals = (1 << 20) - 1;
constexpr size_t kBytes = 8;  // of a barrier

std::string at(const char* what, Where where) {
  return std::string(what) + " at " + to_string(where);
}

std::string describe(const MBarrierState& barrier) {
  std::string text = "in phase " + std::to_string(barrier.phase) + ", with " +
                     std::to_string(barrier.arrivals - barrier.pending) + " of " +
                     std::to_string(barrier.arrivals) + " arrivals";
  if (barrier.bytes > 0) text += " and " + std::to_string(barrier.bytes) + " bytes to come";
  if (barrier.bytes < 0) text += " and " + std::to_string(-barrier.bytes) + " bytes too many";
  return text;
}

void end_phase_if_met(MBarrierState& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
}

void arrive(const char* what, Block& block, const std::byte* p, unsigned bytes, Where where) {
  MBarrierState& barrier = find_mbarrier(what, block, p, /*by_copy=*/false, where);
  if (barrier.pending == 0) {
    fail(at(what, where) + ": one arrival more than the " + std::to_string(barrier.arrivals) +
         " of a phase, at " + place_in(block, p) + ", " + describe(barrier));
  }
  barrier.bytes += bytes;
  if (barrier.bytes > kMaxBytes) {
    fail(at(what, where) + ": " + std::to_string(barrier.bytes) + " bytes are expected at " +
         place_in(block, p) + ", more than the " + std::to_string(kMaxBytes) +
         " that a barrier can count");
  }
  if (--barrier.pending == 0 && barrier.bytes < 0) {
    fail(at(what, where) + ": the phase ends with fewer bytes expected than were copied: " +
         place_in(block, p) + ", " + describe(barrier));
  }
  end_phase_if_met(barrier);
}

class PhaseWait : public Waiting {
 public:
  PhaseWait(const Block& block, const std::byte* p, const MBarrierState& barrier, int64_t phase,
            Where where)
      : block_(block), p_(p), barrier_(barrier), phase_(phase), where_(where) {}

  std::string describe() const override {
    return "mbarrier_wait for phase " + std::to_string(phase_) + " of " + place_of(block_, p_) +
           ", which is " + simt::describe(barrier_) + ",";
  }

  // As a device asks: by parity.
  bool over() override {
    if (((barrier_.phase ^ phase_) & 1) == 0) return false;
    if (barrier_.phase != phase_ + 1) {
      fail("mbarrier_wait at " + to_string(where_) + ": " + place_in(block_, p_) +
           " went on to phase " + std::to_string(barrier_.phase) +
           " while a thread waited for phase " + std::to_string(phase_) +
           "; on a device its parity misleads the thread");
    }
    return true;
  }

 private:
  const Block& block_;
  const std::byte* p_;
  const MBarrierState& barrier_;
  int64_t phase_;
  Where where_;
};

}  // namespace

void publish_barriers(Block& block, bool to_cluster) {
  for (auto& [p, barrier] : block.mbarriers) {
    barrier.block_knows = true;
    if (to_cluster && barrier.fenced) barrier.cluster_knows = true;
  }
}

MBarrierState& find_mbarrier(const char* what, Block& block, const std::byte* p, bool by_copy,
                             Where where) {
  const auto found = block.mbarriers.find(p);
  if (found == block.mbarriers.end()) {
    fail(at(what, where) + ": no mbarrier_init has made " + place_in(block, p) + " a barrier");
  }
  MBarrierState& barrier = found->second;
  if (!std::all_of(p, p + kBytes, [](std::byte b) { return b == std::byte{kPoison}; })) {
    fail(at(what, where) + ": an ordinary store has overwritten the barrier " + place_in(block, p));
  }
  const bool remote = &block != current->block;
  const bool in_block = barrier.initialiser == current || barrier.block_knows;
  const bool known = remote ? barrier.cluster_knows : in_block && (barrier.fenced || !by_copy);
  if (!known) {
    fail(at(what, where) + ": nothing has made the mbarrier_init of " + place_in(block, p) +
         " visible: bulk copies and other blocks need fence_mbarrier_init, and all other threads "
         "__syncthreads or cluster_sync after it");
  }
  return barrier;
}

void complete_bytes(Block& block, const std::byte* p, unsigned bytes, Where where) {
  const auto found = block.mbarriers.find(p);
  MBarrierState& barrier = found->second;
  barrier.bytes -= bytes;
  if (barrier.bytes < -kMaxBytes || (barrier.pending == 0 && barrier.bytes < 0)) {
    fail(at("bulk_copy", where) + ": more bytes were copied than expected: " + place_in(block, p) +
         ", " + describe(barrier));
  }
  end_phase_if_met(barrier);
}

void check_no_bytes(const Block& block) {
  for (const auto& [p, barrier] : block.mbarriers) {
    if (barrier.bytes == 0) continue;
    fail(place_in(block, p) + ", which ended: the barrier is left " + describe(barrier) + " (" +
         (barrier.bytes > 0 ? "expected and never copied" : "copied and never expected") + ")");
  }
}

void mbarrier_init(void* barrier, unsigned arrivals, Where where) {
  Thread& thread = current_thread("mbarrier_init");
  Block& block = *thread.block;
  check_aligned("mbarrier_init", barrier, kBytes);
  const std::byte* p = in_peer("mbarrier_init", barrier, kBytes, block.rank, where);
  if (arrivals == 0 || arrivals > kMaxArrivals) {
    fail(at("mbarrier_init", where) + ": expected 1.." + std::to_string(kMaxArrivals) +
         " arrivals, got " + std::to_string(arrivals));
  }
  if (block.mbarriers.contains(p)) {
    fail(at("mbarrier_init", where) + ": " + place_in(block, p) + " is a barrier already");
  }
  check_no_copy("mbarrier_init", block, p, kBytes, where);
  std::memset(barrier, kPoison, kBytes);
  block.mbarriers.emplace(
      p, MBarrierState{
             .initialiser = &thread, .arrivals = arrivals, .pending = arrivals, .next_wait = {}});
}

void fence_mbarrier_init() {
  Thread& thread = current_thread("fence_mbarrier_init");
  for (auto& [p, barrier] : thread.block->mbarriers) {
    if (barrier.initialiser == &thread) barrier.fenced = true;
  }
}

void mbarrier_arrive(void* barrier, unsigned rank, Where where) {
  const std::byte* p = in_peer("mbarrier_arrive", barrier, kBytes, rank, where);
  arrive("mbarrier_arrive", *current->block->cluster->blocks[rank], p, 0, where);
  may_switch(where);
}

void mbarrier_arrive_expect(void* barrier, unsigned bytes, Where where) {
  Thread& thread = current_thread("mbarrier_arrive_expect");
  arrive("mbarrier_arrive_expect", *thread.block, static_cast<const std::byte*>(barrier), bytes,
         where);
  may_switch(where);
}

void mbarrier_wait(void* barrier, unsigned parity, Where where) {
  Thread& thread = current_thread("mbarrier_wait");
  Block& block = *thread.block;
  const auto* p = static_cast<const std::byte*>(barrier);
  MBarrierState& state = find_mbarrier("mbarrier_wait", block, p, /*by_copy=*/false, where);
  int64_t& next = state.next_wait.try_emplace(&thread, parity == 0 ? 0 : -1).first->second;
  if (parity > 1 || ((next ^ parity) & 1) != 0) {
    fail(at("mbarrier_wait", where) + ": parity " + std::to_string(parity) +
         ", but the next phase of " + place_in(block, p) + " for this thread is " +
         std::to_string(next) + "; the barrier is " + describe(state));
  }
  const int64_t phase = next++;
  if (state.phase > phase + 1) {
    fail(at("mbarrier_wait", where) + ": this thread comes for phase " + std::to_string(phase) +
         " of " + place_in(block, p) + ", which is already " + describe(state) +
         "; on a device its parity misleads the thread");
  }
  PhaseWait waiting(block, p, state, phase, where);
  if (waiting.over()) {
    may_switch(where);
  } else {
    poll_thread(waiting, where);
  }
}

}  // namespace dyhead::simt
