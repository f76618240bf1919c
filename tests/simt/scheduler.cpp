// Launches, and who runs when.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <string_view>
#include <utility>

#include "hopper.h"
#include "scheduler.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace dyhead::simt {

Thread* current = nullptr;

namespace {

void suspend(Thread& thread, State state, Where where) {
  thread.state = state;
  thread.where = where;
  thread.fiber.suspend();
}

// Retries in one run of blocks after which a thread is taken to be stuck.
constexpr unsigned kMaxYields = 1'000'000;

uint64_t random_state = 0;
int cooperative_limit = 4;
const Launch* running_launch = nullptr;
std::exception_ptr thread_failure;
unsigned yields = 0;

std::vector<Warp*> ready_warps;
std::vector<Thread*> polled;  // that wait for what only asking finds out
Warp* favoured = nullptr;
unsigned favour = 0;          // eighths of the draws that go to the favoured warp
const Block* held = nullptr;  // a block that mostly waits while others can run

// One warp far ahead of the others and all warps side by side show different faults.
void redraw_favour() {
  constexpr unsigned kFavours[] = {0, 7, 8, 8};
  favour = kFavours[random_below(4)];
}

// So do one block far behind the others and all blocks side by side.
void redraw_held() {
  const bool hold = !ready_warps.empty() && random_below(4) != 0;
  held = hold ? ready_warps[random_below(ready_warps.size())]->lanes[0]->block : nullptr;
}

void make_ready(Warp& warp, unsigned lanes) {
  warp.ready |= lanes;
  if (warp.listed || warp.ready == 0) return;
  warp.listed = true;
  ready_warps.push_back(&warp);
}

void release_barrier(Block& block) {
  block.at_barrier = 0;
  if (counting) {
    for (Warp& warp : block.warps) count_meeting(warp);
  }
  for (Thread& thread : block.threads) {
    if (thread.state == State::kBarrier) make_ready(thread);
  }
  publish_barriers(block, /*to_cluster=*/false);
  redraw_favour();
  if (random_below(16) == 0) redraw_held();
}

// Runs the collective if all its lanes are there. Lanes other than the caller become ready.
void try_complete(Warp& warp, const Collective& collective, const Thread* caller) {
  const unsigned participants = collective.mask & warp.present;
  if ((participants & ~warp.collective) != 0) return;
  void* payloads[kLanes] = {};
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if ((participants >> lane & 1u) == 0) continue;
    const Collective& other = *warp.lanes[lane]->collective;
    // The other lane is still in a collective of fewer lanes and may come here afterwards.
    if (other.mask != collective.mask) return;
    payloads[lane] = other.payload;
  }
  if (counting && participants == warp.present) count_meeting(warp);
  collective.complete(payloads);
  warp.collective &= ~participants;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if ((participants >> lane & 1u) == 0) continue;
    Thread& thread = *warp.lanes[lane];
    thread.collective = nullptr;
    if (&thread != caller) make_ready(thread);
  }
}

std::string describe(const Collective& collective) {
  char mask[16];
  std::snprintf(mask, sizeof(mask), "0x%08x", collective.mask);
  return std::string(collective.name) + "(" + mask + ") at " + to_string(collective.where);
}

void check_convergence(const Thread& thread, const Collective& collective) {
  const Warp& warp = *thread.warp;
  const unsigned self = 1u << thread.lane;
  if ((collective.mask & self) == 0) {
    fail(describe(collective) + ": the calling lane " + std::to_string(thread.lane) +
         " is not in the mask");
  }
  if (collective.aligned && (collective.mask & warp.present) != ~0u) {
    fail(describe(collective) + ": needs all 32 lanes, but some have exited");
  }
  for (unsigned waiting = collective.mask & warp.collective; waiting != 0; waiting &= waiting - 1) {
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(waiting));
    const Collective& other = *warp.lanes[lane]->collective;
    if ((other.mask & self) == 0) continue;
    const bool alike = std::string_view(other.name) == collective.name &&
                       other.mask == collective.mask &&
                       (!collective.aligned || same(other.where, collective.where));
    if (!alike) {
      fail("divergent warp: lane " + std::to_string(thread.lane) + " calls " +
           describe(collective) + ", lane " + std::to_string(lane) + " waits in " +
           describe(other));
    }
    return;  // the lanes that wait already agree among themselves
  }
}

void leave(Thread& thread) {
  Block& block = *thread.block;
  Warp& warp = *thread.warp;
  thread.state = State::kExited;
  warp.present &= ~(1u << thread.lane);
  --block.running;
  check_no_products(thread);
  if (block.running == 0) check_no_copy_to(block);
  if (block.at_barrier != 0 && block.at_barrier == block.running) release_barrier(block);
  release_if_met(*block.cluster);
  for (unsigned waiting = warp.collective; waiting != 0; waiting &= waiting - 1) {
    const Thread& other = *warp.lanes[static_cast<unsigned>(__builtin_ctz(waiting))];
    if (other.state != State::kCollective || other.collective == nullptr) continue;
    if (other.collective->aligned) {
      fail(describe(*other.collective) + ": needs all 32 lanes, but lane " +
           std::to_string(thread.lane) + " has exited");
    }
    try_complete(warp, *other.collective, nullptr);
  }
}

void run_thread(void* opaque) {
  Thread& thread = *static_cast<Thread*>(opaque);
  try {
    running_launch->run_thread(running_launch->call);
    leave(thread);
  } catch (...) {
    thread_failure = std::current_exception();
  }
}

void resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  if (!thread.fiber.started()) thread.fiber.start(run_thread, &thread);
  thread.fiber.resume();
  current = nullptr;
  if (thread_failure) std::rethrow_exception(std::exchange(thread_failure, nullptr));
}

void poll() {
  for (size_t i = 0; i < polled.size();) {
    if (polled[i]->waiting->over()) {
      make_ready(*polled[i]);
      polled[i] = polled.back();
      polled.pop_back();
    } else {
      ++i;
    }
  }
}

// A counter in global memory.
class CounterWait : public Waiting {
 public:
  CounterWait(const unsigned* counter, unsigned value) : counter_(counter), value_(value) {}
  std::string describe() const override {
    return "wait_until(" + std::to_string(value_) + "), the counter being " +
           std::to_string(*counter_) + ",";
  }
  bool over() override { return static_cast<int>(*counter_ - value_) >= 0; }

 private:
  const unsigned* counter_;
  unsigned value_;
};

Warp& draw_warp() {
  constexpr int kTries = 8;
  Warp* warp = nullptr;
  for (int i = 0; i < kTries; ++i) {
    warp = ready_warps[random_below(ready_warps.size())];
    if (warp->lanes[0]->block != held) break;
  }
  return *warp;
}

Thread& draw_thread() {
  const bool stay = favoured != nullptr && favoured->listed && random_below(8) < favour;
  Warp& warp = stay ? *favoured : draw_warp();
  favoured = &warp;
  const unsigned rotation = random_below(kLanes);
  const unsigned rotated =
      rotation == 0 ? warp.ready : warp.ready >> rotation | warp.ready << (kLanes - rotation);
  const unsigned lane = (static_cast<unsigned>(__builtin_ctz(rotated)) + rotation) % kLanes;
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) {
    warp.listed = false;
    std::erase(ready_warps, &warp);
  }
  return *warp.lanes[lane];
}

[[noreturn]] void report_deadlock(const std::vector<std::unique_ptr<Block>>& blocks) {
  constexpr size_t kMaxBlocks = 4;
  std::string text = "deadlock: no thread can continue";
  const bool counters = std::any_of(polled.begin(), polled.end(), [](const Thread* thread) {
    return dynamic_cast<const CounterWait*>(thread->waiting) != nullptr;
  });
  if (counters && !running_launch->cooperative) {
    text += " (blocks of an ordinary launch cannot wait for each other: launch cooperatively)";
  }
  for (size_t i = 0; i < std::min(blocks.size(), kMaxBlocks); ++i) {
    text += "\n block " + to_string(blocks[i]->index) + ":" + blocks[i]->describe_waits();
  }
  if (blocks.size() > kMaxBlocks) {
    text += "\n and " + std::to_string(blocks.size() - kMaxBlocks) + " more blocks";
  }
  fail(text);
}

// Runs these blocks side by side to their end.
void run_blocks(const std::vector<std::unique_ptr<Block>>& blocks) {
  ready_warps.clear();
  polled.clear();
  forget_copies();
  favoured = nullptr;
  yields = 0;
  redraw_favour();
  for (const auto& block : blocks) {
    for (Warp& warp : block->warps) make_ready(warp, warp.ready);
  }
  redraw_held();
  const auto alive = [](const std::unique_ptr<Block>& block) { return block->running != 0; };
  for (;;) {
    if (!polled.empty() && (ready_warps.empty() || random_below(16) == 0)) poll();
    if (copies_under_way() && (ready_warps.empty() || copy_lands())) {
      land_copy();
      continue;
    }
    if (ready_warps.empty()) {
      if (std::none_of(blocks.begin(), blocks.end(), alive)) break;
      report_deadlock(blocks);
    }
    resume(draw_thread());
  }
  for (const auto& block : blocks) {
    block->check_end();
    if (!counting) continue;
    for (Warp& warp : block->warps) count_meeting(warp);
  }
}

// The blocks to run, in random order: all, or one out of each of `sampled` stretches of the grid.
std::vector<size_t> block_order(size_t blocks, size_t sampled) {
  std::vector<size_t> order(sampled);
  for (size_t i = 0; i < sampled; ++i) {
    const size_t first = i * blocks / sampled;
    const size_t length = (i + 1) * blocks / sampled - first;
    order[i] = length == 1 ? first : first + random_below(length);
  }
  for (size_t i = sampled; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  return order;
}

void run_grid(const Launch& launch, size_t sampled) {
  const size_t size = launch.cluster;
  const size_t count = size_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  for (size_t i : block_order(count / size, sampled / size)) {
    clusters.push_back(std::make_unique<Cluster>());
    Cluster& cluster = *clusters.back();
    for (size_t first = i * size; cluster.blocks.size() < size;) {
      const size_t at = first + cluster.blocks.size();
      const uint3 index = {static_cast<unsigned>(at % launch.grid.x),
                           static_cast<unsigned>(at / launch.grid.x % launch.grid.y),
                           static_cast<unsigned>(at / launch.grid.x / launch.grid.y)};
      blocks.push_back(std::make_unique<Block>(launch, index, cluster));
    }
    if (launch.cooperative) continue;
    run_blocks(blocks);
    blocks.clear();
    clusters.clear();
  }
  if (launch.cooperative) run_blocks(blocks);
  GuardedMemory::check_all_guards();
}

// The kernel's name where the dynamic linker knows it, else the launcher's.
std::string kernel_name(const Launch& launch) {
  Dl_info info{};
  if (dladdr(launch.kernel, &info) == 0 || info.dli_sname == nullptr ||
      info.dli_saddr != launch.kernel) {
    return "launched by " + std::string(launch.where.function_name());
  }
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : info.dli_sname;
  std::free(demangled);
  return name;
}

bool valid(const Launch& launch) {
  constexpr size_t kMaxThreads = 1024;
  constexpr unsigned kMaxGridYz = 65535;
  constexpr unsigned kMaxCluster = 8;  // that every device with clusters has
  const dim3& grid = launch.grid;
  const dim3& block = launch.block;
  const size_t threads = size_t{block.x} * block.y * block.z;
  return threads > 0 && threads <= kMaxThreads && block.z <= 64 && grid.x > 0 && grid.y > 0 &&
         grid.z > 0 && grid.x <= 0x7fffffffu && grid.y <= kMaxGridYz && grid.z <= kMaxGridYz &&
         launch.cluster > 0 && launch.cluster <= kMaxCluster && grid.x % launch.cluster == 0;
}

}  // namespace

// splitmix64, scaled to [0, bound)
unsigned random_below(size_t bound) {
  random_state += 0x9e3779b97f4a7c15u;
  uint64_t z = random_state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<unsigned>(((z ^ (z >> 31)) >> 32) * bound >> 32);
}

bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::string_view(a.file_name()) == b.file_name();
}

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  make_ready(*thread.warp, 1u << thread.lane);
}

void block_thread(Waiting& waiting, Where where) {
  Thread& thread = *current;
  thread.waiting = &waiting;
  suspend(thread, State::kWait, where);
}

void poll_thread(Waiting& waiting, Where where) {
  polled.push_back(current);
  block_thread(waiting, where);
}

void may_switch(Where where) {
  if (random_below(4) != 0) return;
  make_ready(*current);
  suspend(*current, State::kReady, where);
}

void let_others_run(unsigned turns, Where where) {
  for (; turns != 0; --turns) {
    favoured = nullptr;
    make_ready(*current);
    suspend(*current, State::kReady, where);
  }
}

Error::~Error() = default;

void fail(const std::string& message) {
  std::string text = message;
  if (running_launch != nullptr) {
    text += "\n in kernel " + kernel_name(*running_launch) + " (" +
            to_string(running_launch->where) + ")";
  }
  if (current != nullptr) {
    text += ", block " + to_string(current->block->index) + ", thread " + to_string(current->index);
  }
  throw Error(text);
}

Thread& current_thread(const char* caller) {
  if (current == nullptr) fail(std::string(caller) + " was called outside a kernel");
  return *current;
}

void set_seed(uint64_t seed) { random_state = seed; }

void set_resident_blocks(int blocks) { cooperative_limit = blocks; }

int resident_blocks() { return cooperative_limit; }

cudaError_t launch(const Launch& launch) {
  constexpr size_t kMaxSharedBytes = 227 * 1024;  // of an sm_90 block
  if (!valid(launch)) return cudaErrorInvalidConfiguration;
  if (launch.shared_bytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  if (launch.cooperative && launch.cluster > 1) {
    fail("launch: cooperative launches of clusters are not emulated; launch one or the other");
  }
  const size_t blocks = size_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  if (launch.cooperative && blocks > static_cast<size_t>(cooperative_limit)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  struct Scope {
    explicit Scope(const Launch& launch) { running_launch = &launch; }
    ~Scope() {
      running_launch = nullptr;
      current = nullptr;
    }
  } scope(launch);
  blockDim = launch.block;
  gridDim = launch.grid;
  run_grid(launch, counting ? count_launch(launch) : blocks);
  if (counting) count_launch_end();
  return cudaSuccess;
}

size_t dynamic_shared_bytes() {
  return running_launch == nullptr ? 0 : running_launch->shared_bytes;
}

void block_barrier(Where where) {
  Thread& thread = current_thread("__syncthreads");
  Block& block = *thread.block;
  if (block.at_barrier == 0) {
    block.barrier_where = where;
  } else if (!same(block.barrier_where, where)) {
    fail("divergent __syncthreads: this thread is at " + to_string(where) + ", " +
         std::to_string(block.at_barrier) + " of " + std::to_string(block.running) + " wait at " +
         to_string(block.barrier_where));
  }
  ++block.at_barrier;
  thread.state = State::kBarrier;
  if (counting && block.at_barrier == block.running) count_barrier(DYHEAD_SIMT_SITE);
  if (block.at_barrier == block.running) release_barrier(block);
  suspend(thread, thread.state, where);
}

void yield(Where where) {
  Thread& thread = current_thread("atomicCAS");
  if (++yields > kMaxYields) {
    fail("livelock: " + std::to_string(kMaxYields) + " retries, the last at " + to_string(where));
  }
  make_ready(thread);
  suspend(thread, State::kReady, where);
}

void wait_until(const unsigned* flag, unsigned value, Where where) {
  static_cast<void>(current_thread("wait_until"));
  check_aligned("wait_until", flag, sizeof(unsigned));
  CounterWait waiting(flag, value);
  poll_thread(waiting, where);
}

void warp_collective(Collective& collective) {
  Thread& thread = current_thread(collective.name);
  Warp& warp = *thread.warp;
  check_convergence(thread, collective);
  thread.collective = &collective;
  warp.collective |= 1u << thread.lane;
  try_complete(warp, collective, &thread);
  if (thread.collective != nullptr) {
    suspend(thread, State::kCollective, collective.where);
  } else {
    may_switch(collective.where);  // the last to arrive does not always run on first
  }
}

int lane_id() { return static_cast<int>(current_thread("a warp collective").lane); }

}  // namespace dyhead::simt
