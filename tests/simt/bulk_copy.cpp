// Bulk copies to the blocks of a cluster, and the asynchronous proxy: the path on which they write
// shared memory, and on which products of a warpgroup read it.
//
// A copy lands in each of its blocks at a random time, before which its destination is poison.
//
// Each shared array has a view: what the asynchronous proxy has seen of it. Copies write to it, and
// fence_proxy_async() brings it up to date; what is read on that path must be equal to it. That
// does not see a missing fence where another thread's fence happens to come after the store, or
// where the bytes did not change, nor ordinary loads that a copy overtakes.
#include <algorithm>
#include <cstring>

#include "hopper.h"
#include "scheduler.h"

namespace dyhead::simt {
namespace {

constexpr size_t kUnit = 16;  // bytes of which addresses and sizes are multiples
constexpr size_t kBarrierBytes = 8;

// One copy's way to one block.
struct Landing {
  Block* block;
  std::byte* to;
  const std::byte* barrier;
  const void* from;
  std::vector<std::byte> data;
  Where where;
};

std::vector<Landing> under_way;
unsigned pace = 1;  // one draw of so many lands a copy

bool overlap(const std::byte* a, size_t a_bytes, const std::byte* b, size_t b_bytes) {
  return a < b + b_bytes && b < a + a_bytes;
}

void check_source(const void* global, size_t bytes, const std::string& call) {
  const GuardedMemory* array = GuardedMemory::find(global);
  if (array == nullptr || !array->contains(global, bytes)) {
    fail(call + ": the source's " + std::to_string(bytes) + " bytes are not inside one array" +
         (array == nullptr ? "" : " (they begin in '" + array->name() + "')"));
  }
}

}  // namespace

bool copies_under_way() { return !under_way.empty(); }

bool copy_lands() { return random_below(pace) == 0; }

void forget_copies() { under_way.clear(); }

void land_copy() {
  const size_t chosen = random_below(under_way.size());
  std::swap(under_way[chosen], under_way.back());
  const Landing landing = std::move(under_way.back());
  under_way.pop_back();
  const std::string call = "bulk_copy at " + to_string(landing.where);
  if (std::memcmp(landing.data.data(), landing.from, landing.data.size()) != 0) {
    fail(call + ": the source was written while the copy to " +
         place_in(*landing.block, landing.to) + " was under way");
  }
  const bool untouched = std::all_of(landing.to, landing.to + landing.data.size(),
                                     [](std::byte b) { return b == std::byte{kPoison}; });
  if (!untouched) {
    fail(call + ": " + place_in(*landing.block, landing.to) +
         " was written while the copy to it was under way");
  }
  const GuardedMemory& array = *landing.block->shared_array(landing.to, landing.data.size());
  std::memcpy(landing.to, landing.data.data(), landing.data.size());
  std::memcpy(async_view(*landing.block, array) + (landing.to - array.data()), landing.data.data(),
              landing.data.size());
  complete_bytes(*landing.block, landing.barrier, static_cast<unsigned>(landing.data.size()),
                 landing.where);
}

void check_no_copy(const char* what, const Block& block, const void* p, size_t bytes, Where where) {
  for (const Landing& landing : under_way) {
    if (landing.block != &block) continue;
    const auto* begin = static_cast<const std::byte*>(p);
    if (overlap(landing.to, landing.data.size(), begin, bytes)) {
      fail(std::string(what) + " at " + to_string(where) + ": bytes of " + place_in(block, p) +
           " to which a bulk copy is under way, issued at " + to_string(landing.where));
    }
  }
}

void check_no_copy_to(const Block& block) {
  for (const Landing& landing : under_way) {
    if (landing.block == &block) {
      fail("block " + to_string(block.index) + " ended while a bulk copy to it was under way, " +
           "issued at " + to_string(landing.where));
    }
  }
}

std::byte* async_view(Block& block, const GuardedMemory& array) {
  std::vector<std::byte>& view = block.async_views[&array];
  // Until the first copy or fence it has seen nothing.
  if (view.empty()) view.assign(array.bytes(), std::byte{kPoison});
  return view.data();
}

void fence_proxy_async() {
  Block& block = *current_thread("fence_proxy_async").block;
  const auto update = [&](const GuardedMemory& array) {
    std::memcpy(async_view(block, array), array.data(), array.bytes());
  };
  for (const auto& [key, array] : block.static_arrays) update(*array);
  for (const auto& [offset, array] : block.dynamic_arrays) update(*array);
}

void bulk_copy(void* shared, const void* global, unsigned bytes, void* barrier, unsigned blocks,
               Where where) {
  Thread& thread = current_thread("bulk_copy");
  const Cluster& cluster = *thread.block->cluster;
  const std::string call = "bulk_copy at " + to_string(where);
  check_aligned("bulk_copy to shared memory", shared, kUnit);
  check_aligned("bulk_copy from global memory", global, kUnit);
  if (bytes == 0 || bytes % kUnit != 0) {
    fail(call + ": expected a multiple of 16 bytes, got " + std::to_string(bytes));
  }
  if (blocks == 0 || blocks >> cluster.blocks.size() != 0) {
    fail(call + ": expected a bit for some of the " + std::to_string(cluster.blocks.size()) +
         " blocks of the cluster, got " + std::to_string(blocks));
  }
  check_source(global, bytes, call);
  for (unsigned rank = 0; rank < cluster.blocks.size(); ++rank) {
    if ((blocks >> rank & 1u) == 0) continue;
    Block& block = *cluster.blocks[rank];
    std::byte* to = in_peer("bulk_copy", shared, bytes, rank, where);
    const std::byte* at = in_peer("bulk_copy", barrier, kBarrierBytes, rank, where);
    static_cast<void>(find_mbarrier("bulk_copy", block, at, /*by_copy=*/true, where));
    check_no_copy("bulk_copy", block, to, bytes, where);
    for (const auto& [p, state] : block.mbarriers) {
      if (overlap(to, bytes, p, kBarrierBytes)) {
        fail(call + ": it would overwrite the barrier " + place_in(block, p));
      }
    }
    const GuardedMemory& array = *block.shared_array(to, bytes);
    std::byte* view = async_view(block, array) + (to - array.data());
    if (std::memcmp(view, to, bytes) != 0) {
      fail(call + ": ordinary stores to " + place_in(block, to) +
           " come before it without fence_proxy_async");
    }
    std::memset(to, kPoison, bytes);
    std::memset(view, kPoison, bytes);
    const auto* from = static_cast<const std::byte*>(global);
    under_way.push_back({&block, to, at, global, {from, from + bytes}, where});
    if (counting) count_bulk_write(DYHEAD_SIMT_SITE, bytes);
  }
  if (counting) count_bulk_read(thread, DYHEAD_SIMT_SITE, global, bytes);
  // Some launches see copies that land at once, others copies that land last.
  constexpr unsigned kPaces[] = {1, 16, 256, 1u << 20};
  pace = kPaces[random_below(4)];
  may_switch(where);
}

}  // namespace dyhead::simt
