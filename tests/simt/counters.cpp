#include "counters.h"

#include <algorithm>
#include <bit>

#include "block.h"

namespace dyhead::simt {

bool counting = false;

namespace {

constexpr size_t kSectorBytes = 32;
constexpr size_t kLineBytes = 128;
constexpr size_t kBanks = 32;
constexpr size_t kWordBytes = 4;
constexpr size_t kStackBytes = 256 * 1024;  // of a fiber, at most
constexpr size_t kWidestAccess = 16;

CounterOptions options;
std::unordered_map<CountKey, Count, CountKeyHash> all_counts;
std::unordered_map<uintptr_t, KernelCount> all_kernels;
uintptr_t running_kernel = 0;

// The sectors of an array that the running launch has read and written.
struct Touched {
  std::vector<bool> read, written;
};
std::unordered_map<const GuardedMemory*, Touched> touched;

Count& count_of(uintptr_t site, Access access, uint32_t bytes) {
  return all_counts[{running_kernel, site, access, bytes}];
}

template <class Visit>
void for_lanes(const WarpAccess& a, Visit&& visit) {
  for (uint32_t lanes = a.lanes; lanes != 0; lanes &= lanes - 1) {
    const uintptr_t address = a.addresses[static_cast<size_t>(std::countr_zero(lanes))];
    if (address != 0) visit(address);
  }
}

// The rising numbers of the pieces of `size` bytes that an instruction touches.
std::vector<uint64_t> pieces(const WarpAccess& a, size_t size) {
  std::vector<uint64_t> found;
  for_lanes(a, [&](uintptr_t address) {
    for (uint64_t p = address / size; p <= (address + a.bytes - 1) / size; ++p) found.push_back(p);
  });
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

// Clocks of the banks for these addresses: each delivers one word a clock, to all who want it.
unsigned wavefronts_of(const uintptr_t* addresses, size_t count, size_t bytes) {
  std::array<std::vector<uint64_t>, kBanks> words;
  for (size_t i = 0; i < count; ++i) {
    if (addresses[i] == 0) continue;
    for (uint64_t w = addresses[i] / kWordBytes; w <= (addresses[i] + bytes - 1) / kWordBytes;
         ++w) {
      std::vector<uint64_t>& bank = words[w % kBanks];
      if (std::find(bank.begin(), bank.end(), w) == bank.end()) bank.push_back(w);
    }
  }
  size_t most = 0;
  for (const auto& bank : words) most = std::max(most, bank.size());
  return static_cast<unsigned>(most);
}

void add_shared(const WarpAccess& a) {
  Count& count = count_of(a.site, a.access, a.bytes);
  std::array<uintptr_t, kLanes> addresses{};
  for (size_t lane = 0; lane < kLanes; ++lane) {
    if (a.lanes >> lane & 1u) addresses[lane] = a.addresses[lane];
  }
  // Accesses of 8 bytes take two halves of a warp, those of 16 four quarters.
  const size_t together = a.bytes <= 4 ? kLanes : kLanes * 4 / a.bytes;
  for (size_t first = 0; first < kLanes; first += together) {
    count.wavefronts += wavefronts_of(&addresses[first], together, a.bytes);
  }
  ++count.instructions;
  count.lanes += static_cast<unsigned>(std::popcount(a.lanes));
  const size_t words = pieces(a, kWordBytes).size();
  count.ideal_wavefronts += (words + kBanks - 1) / kBanks;
}

void add_global(LineCache& cache, const WarpAccess& a) {
  const std::vector<uint64_t> sectors = pieces(a, kSectorBytes);
  Count& count = count_of(a.site, a.access, a.bytes);
  ++count.instructions;
  for_lanes(a, [&](uintptr_t) { ++count.lanes; });
  if (sectors.empty()) return;
  count.sectors += sectors.size();
  // Copies of 16 bytes pass the L1 cache by, as do stores and atomics.
  const bool cached =
      a.access == Access::kGlobalLoad || (a.access == Access::kAsyncRead && a.bytes < 16);
  uint64_t l2 = cached ? 0 : sectors.size();
  for (size_t i = 0; i < sectors.size();) {
    constexpr size_t kPerLine = kLineBytes / kSectorBytes;
    const uint64_t line = sectors[i] / kPerLine;
    unsigned bits = 0;
    for (; i < sectors.size() && sectors[i] / kPerLine == line; ++i) {
      bits |= 1u << sectors[i] % kPerLine;
    }
    ++count.lines;
    if (cached) l2 += cache.missing(line, bits, options.l1_bytes / kLineBytes);
  }
  count.l2_sectors += l2;

  ArrayCount& array = all_kernels[running_kernel].arrays[a.memory->name()];
  array.bytes = a.memory->bytes();
  Touched& of = touched[a.memory];
  const uint64_t first = reinterpret_cast<uintptr_t>(a.memory->data()) / kSectorBytes;
  const auto touch = [&](std::vector<bool>& set, uint64_t& distinct) {
    if (set.empty()) set.resize(a.memory->bytes() / kSectorBytes + 2);
    for (uint64_t sector : sectors) {
      // An access that starts outside the array is the guards' business.
      const uint64_t at = sector - first;
      if (at >= set.size() || set[at]) continue;
      set[at] = true;
      ++distinct;
    }
  };
  switch (a.access) {
    case Access::kGlobalStore:
      array.stores += sectors.size();
      touch(of.written, array.distinct_written);
      break;
    case Access::kAtomic:
      array.atomics += sectors.size();
      touch(of.read, array.distinct_read);
      touch(of.written, array.distinct_written);
      break;
    default:
      array.loads += sectors.size();
      array.l2_loads += l2;
      touch(of.read, array.distinct_read);
  }
}

// Rows of 128 bytes, which have no bank conflicts.
void add_rows(uintptr_t site, Access access, size_t bytes) {
  constexpr size_t kRow = kBanks * kWordBytes;
  Count& count = count_of(site, access, kRow);
  const uint64_t wavefronts = (bytes + kRow - 1) / kRow;
  ++count.instructions;
  count.wavefronts += wavefronts;
  count.ideal_wavefronts += wavefronts;
}

bool is_shared(Access access) {
  return access == Access::kSharedLoad || access == Access::kSharedStore;
}

// The device's compiler joins accesses of neighbouring words to wider ones where their alignment
// allows. So does this: accesses of all lanes, one right after the other in memory, between which
// there is none of the other direction.
class Joining {
 public:
  void add(const WarpAccess& a) {
    for (auto chain = open_.rbegin(); chain != open_.rend(); ++chain) {
      if (follows(*chain, a)) {
        chain->bytes += a.bytes;
        return;
      }
    }
    if (!open_.empty() && open_.front().access != a.access) close();
    if (open_.size() == kOpen) {
      cut(open_.front());
      open_.erase(open_.begin());
    }
    open_.push_back(a);
  }

  void close() {
    for (const WarpAccess& chain : open_) cut(chain);
    open_.clear();
  }

 private:
  static constexpr size_t kOpen = 16;

  static bool follows(const WarpAccess& chain, const WarpAccess& a) {
    if (chain.access != a.access || chain.lanes != a.lanes) return false;
    if (chain.bytes + a.bytes > kWidestAccess) return false;
    for (uint32_t lanes = a.lanes; lanes != 0; lanes &= lanes - 1) {
      const auto lane = static_cast<size_t>(std::countr_zero(lanes));
      if (a.addresses[lane] != chain.addresses[lane] + chain.bytes) return false;
    }
    return true;
  }

  // Counts a chain in the widest pieces that are aligned in each lane.
  static void cut(const WarpAccess& chain) {
    uintptr_t low_bits = 0;
    for_lanes(chain, [&](uintptr_t address) { low_bits |= address; });
    for (uint32_t at = 0; at < chain.bytes;) {
      uint32_t size = kWidestAccess;
      while (size > chain.bytes - at || (low_bits | at) % size != 0) size /= 2;
      WarpAccess piece = chain;
      piece.bytes = size;
      for (uintptr_t& address : piece.addresses) address += at;
      add_shared(piece);
      at += size;
    }
  }

  std::vector<WarpAccess> open_;
};

void record(Thread& thread, uintptr_t site, Access access, const void* p, size_t bytes,
            const GuardedMemory* memory) {
  WarpTrace& trace = thread.warp->trace;
  const uint64_t key = site << 8 ^ static_cast<uint64_t>(access) << 5 ^ bytes;
  WarpTrace::Site& at = trace.sites[key];
  const uint32_t k = at.executed[thread.lane]++;
  if (k == at.instructions.size()) {
    at.instructions.push_back(static_cast<uint32_t>(trace.accesses.size()));
    trace.accesses.push_back({site, access, static_cast<uint32_t>(bytes), 0, memory, {}});
  }
  WarpAccess& a = trace.accesses[at.instructions[k]];
  a.lanes |= 1u << thread.lane;
  a.addresses[thread.lane] = reinterpret_cast<uintptr_t>(p);
  if (a.memory == nullptr) a.memory = memory;
}

void access(uintptr_t site, const void* p, size_t bytes, bool write) {
  if (current == nullptr) return;
  const auto address = reinterpret_cast<uintptr_t>(p);
  const auto frame = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  if (address - frame < kStackBytes) return;  // a local variable
  Thread& thread = *current;
  if (thread.block->is_shared(p, 1)) {
    record(thread, site, write ? Access::kSharedStore : Access::kSharedLoad, p, bytes, nullptr);
  } else if (const GuardedMemory* memory = GuardedMemory::find(p)) {
    record(thread, site, write ? Access::kGlobalStore : Access::kGlobalLoad, p, bytes, memory);
  }
}

// A struct that the compiler copies as a whole. The device's has accesses of 16 bytes at most.
void range(uintptr_t site, const void* p, size_t bytes, bool write) {
  size_t size = kWidestAccess;
  while ((reinterpret_cast<uintptr_t>(p) | bytes) % size != 0) size /= 2;
  for (size_t at = 0; at < bytes; at += size) {
    access(site, static_cast<const std::byte*>(p) + at, size, write);
  }
}

}  // namespace

unsigned LineCache::missing(uint64_t line, unsigned sectors, size_t capacity) {
  if (capacity == 0) return static_cast<unsigned>(std::popcount(sectors));
  auto found = lines_.find(line);
  if (found == lines_.end()) {
    if (lines_.size() >= capacity) {
      lines_.erase(order_.back());
      order_.pop_back();
    }
    order_.push_front(line);
    found = lines_.emplace(line, Line{order_.begin(), 0}).first;
  } else {
    order_.splice(order_.begin(), order_, found->second.place);
  }
  const unsigned absent = sectors & ~found->second.sectors;
  found->second.sectors |= sectors;
  return static_cast<unsigned>(std::popcount(absent));
}

const std::unordered_map<CountKey, Count, CountKeyHash>& counts() {
  if (!counting) fail("counters: the kernels were not built for counting: use build.counted()");
  return all_counts;
}

const std::unordered_map<uintptr_t, KernelCount>& kernel_counts() {
  static_cast<void>(counts());
  return all_kernels;
}

void reset_counts(const CounterOptions& chosen) {
  options = chosen;
  all_counts.clear();
  all_kernels.clear();
}

size_t count_launch(const Launch& launch) {
  running_kernel = reinterpret_cast<uintptr_t>(launch.kernel);
  KernelCount& count = all_kernels[running_kernel];
  ++count.launches;
  const size_t blocks = size_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  const bool all = launch.cooperative || options.sampled_blocks == 0;
  // Whole clusters.
  const size_t rounded =
      (options.sampled_blocks + launch.cluster - 1) / launch.cluster * launch.cluster;
  const size_t sampled = all ? blocks : std::min(blocks, rounded);
  count.blocks += blocks;
  count.sampled_blocks += sampled;
  count.threads = size_t{launch.block.x} * launch.block.y * launch.block.z;
  count.shared_bytes = launch.shared_bytes;
  return sampled;
}

void count_launch_end() { touched.clear(); }

void count_meeting(Warp& warp) {
  WarpTrace& trace = warp.trace;
  Joining joining;
  for (const WarpAccess& a : trace.accesses) {
    if (is_shared(a.access)) {
      joining.add(a);
    } else if (a.access == Access::kAsyncWrite) {
      add_shared(a);
    } else {
      add_global(warp.lanes[0]->block->l1, a);
    }
  }
  joining.close();
  trace.accesses.clear();
  trace.sites.clear();
}

void count_barrier(uintptr_t site) { ++count_of(site, Access::kBarrier, 0).instructions; }

void count_async_copy(Thread& thread, uintptr_t site, const void* shared, const void* global,
                      size_t bytes, size_t source_bytes) {
  record(thread, site, Access::kAsyncRead, source_bytes == 0 ? nullptr : global, bytes,
         source_bytes == 0 ? nullptr : GuardedMemory::find(global));
  record(thread, site, Access::kAsyncWrite, shared, bytes, nullptr);
}

void count_ldmatrix(uintptr_t site, const std::array<const void*, 32>& rows, int matrices) {
  constexpr size_t kRows = 8;
  constexpr size_t kMatrixRowBytes = 16;
  Count& count = count_of(site, Access::kLdmatrix, kMatrixRowBytes);
  ++count.instructions;
  count.lanes += kLanes;
  for (size_t m = 0; m < static_cast<size_t>(matrices); ++m) {
    uintptr_t addresses[kRows];
    for (size_t i = 0; i < kRows; ++i) {
      addresses[i] = reinterpret_cast<uintptr_t>(rows[kRows * m + i]);
    }
    count.wavefronts += wavefronts_of(addresses, kRows, kMatrixRowBytes);
    ++count.ideal_wavefronts;
  }
}

void count_shuffle(uintptr_t site, size_t bytes, uint32_t lanes) {
  Count& count = count_of(site, Access::kShuffle, static_cast<uint32_t>(bytes));
  // The device shuffles words of 4 bytes.
  const uint64_t words = (bytes + kWordBytes - 1) / kWordBytes;
  count.instructions += words;
  count.wavefronts += words;
  count.ideal_wavefronts += words;
  count.lanes += static_cast<unsigned>(std::popcount(lanes));
}

void count_mma(uintptr_t site, uint64_t flop) {
  Count& count = count_of(site, Access::kMma, 0);
  ++count.instructions;
  count.lanes += kLanes;
  count.flop += flop;
}

void count_bulk_read(Thread& thread, uintptr_t site, const void* global, size_t bytes) {
  WarpAccess access{site, Access::kAsyncRead,          static_cast<uint32_t>(bytes),
                    1u,   GuardedMemory::find(global), {}};
  access.addresses[0] = reinterpret_cast<uintptr_t>(global);
  add_global(thread.block->l1, access);
}

void count_bulk_write(uintptr_t site, size_t bytes) { add_rows(site, Access::kAsyncWrite, bytes); }

void count_operand_read(uintptr_t site, size_t bytes) {
  add_rows(site, Access::kOperandRead, bytes);
}

void count_atomic(const void* p, size_t bytes, int parts) {
  if (current == nullptr) return;
  const uintptr_t site = DYHEAD_SIMT_SITE;
  const GuardedMemory* memory = GuardedMemory::find(p);
  if (memory == nullptr || current->block->is_shared(p, 1)) {
    access(site, p, bytes, true);
    return;
  }
  const auto* from = static_cast<const std::byte*>(p);
  const size_t size = options.vector_atomics ? bytes * static_cast<size_t>(parts) : bytes;
  for (size_t at = 0; at < bytes * static_cast<size_t>(parts); at += size) {
    record(*current, site, Access::kAtomic, from + at, size, memory);
  }
}

}  // namespace dyhead::simt

// ---- what -fsanitize=thread calls ---------------------------------------------------------------

#define DYHEAD_HOOKS(size)                                                                    \
  void __tsan_read##size(void* p) { dyhead::simt::access(DYHEAD_SIMT_SITE, p, size, false); } \
  void __tsan_write##size(void* p) { dyhead::simt::access(DYHEAD_SIMT_SITE, p, size, true); } \
  void __tsan_unaligned_read##size(void* p) {                                                 \
    dyhead::simt::range(DYHEAD_SIMT_SITE, p, size, false);                                    \
  }                                                                                           \
  void __tsan_unaligned_write##size(void* p) {                                                \
    dyhead::simt::range(DYHEAD_SIMT_SITE, p, size, true);                                     \
  }

extern "C" {

void __tsan_init() { dyhead::simt::counting = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
DYHEAD_HOOKS(1)
DYHEAD_HOOKS(2)
DYHEAD_HOOKS(4)
DYHEAD_HOOKS(8)
DYHEAD_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) {
  dyhead::simt::range(DYHEAD_SIMT_SITE, p, bytes, false);
}
void __tsan_write_range(void* p, size_t bytes) {
  dyhead::simt::range(DYHEAD_SIMT_SITE, p, bytes, true);
}
void __tsan_vptr_update(void*, void*) {}

}  // extern "C"
