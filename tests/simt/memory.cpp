// Shared memory, asynchronous copies and access checks of the running thread.
#include <cstring>

#include "block.h"

namespace dyhead::simt {
namespace {

std::string plural(size_t bytes) { return std::to_string(bytes) + " bytes"; }

// Arrays are aligned to no more than the device would align them.
constexpr size_t kStaticAlignment = 16;

void land(Thread& thread, unsigned groups_done) {
  size_t landed = 0;
  for (const AsyncCopy& copy : thread.copies) {
    if (copy.group >= groups_done) break;
    std::memcpy(copy.destination, copy.data.data(), copy.bytes);
    ++landed;
  }
  thread.copies.erase(thread.copies.begin(),
                      thread.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

}  // namespace

void check_aligned(const char* access, const void* p, size_t alignment) {
  const size_t excess = reinterpret_cast<uintptr_t>(p) % alignment;
  if (excess == 0) return;
  fail(std::string(access) + ": address is " + plural(excess) +
       " past a multiple of the required " + std::to_string(alignment));
}

void* static_shared(const void* key, const char* name, size_t bytes, size_t alignment) {
  Block& block = *current_thread("DYHEAD_SHARED").block;
  std::unique_ptr<GuardedMemory>& array = block.static_arrays[key];
  if (array == nullptr) {
    array = std::make_unique<GuardedMemory>(name, bytes, std::max(alignment, kStaticAlignment));
  }
  return array->data();
}

void* dynamic_shared(size_t byte_offset, size_t bytes) {
  Block& block = *current_thread("dynamic_shared").block;
  if (byte_offset + bytes > dynamic_shared_bytes()) {
    fail("dynamic_shared: " + plural(bytes) + " at offset " + std::to_string(byte_offset) +
         " exceed the launch's " + plural(dynamic_shared_bytes()));
  }
  for (const auto& [offset, array] : block.dynamic_arrays) {
    if (offset == byte_offset && array->bytes() == bytes) return array->data();
    if (offset < byte_offset + bytes && byte_offset < offset + array->bytes()) {
      fail("dynamic_shared: " + plural(bytes) + " at offset " + std::to_string(byte_offset) +
           " overlap the array of " + plural(array->bytes()) + " at offset " +
           std::to_string(offset));
    }
  }
  const std::string name = "dynamic_shared at offset " + std::to_string(byte_offset);
  return block.dynamic_arrays
      .emplace(byte_offset, std::make_unique<GuardedMemory>(name, bytes, byte_offset))
      .first->second->data();
}

void cp_async(void* shared, const void* global, int bytes, int source_bytes, Where where) {
  Thread& thread = current_thread("cp_async");
  const size_t size = static_cast<size_t>(bytes);
  check_aligned("cp_async to shared memory", shared, size);
  check_aligned("cp_async from global memory", global, size);
  if (source_bytes < 0 || source_bytes > bytes) {
    fail("cp_async: source_bytes must be in 0.." + std::to_string(bytes) + ", got " +
         std::to_string(source_bytes));
  }
  if (!thread.block->is_shared(shared, size)) {
    fail("cp_async at " + to_string(where) + ": the destination's " + plural(size) +
         " are not inside one shared array");
  }
  AsyncCopy copy{.destination = static_cast<std::byte*>(shared),
                 .bytes = static_cast<unsigned>(bytes),
                 .group = thread.committed_groups,
                 .data = {},
                 .where = where};
  std::memcpy(copy.data.data(), global, static_cast<size_t>(source_bytes));
  if (counting) {
    count_async_copy(thread, DYHEAD_SIMT_SITE, shared, global, size,
                     static_cast<size_t>(source_bytes));
  }
  // The copy may land at any time from now on: what was there is lost at once.
  std::memset(shared, kPoison, size);
  thread.copies.push_back(copy);
}

void cp_async_commit() { ++current_thread("cp_async_commit").committed_groups; }

void cp_async_wait_group(int pending) {
  Thread& thread = current_thread("cp_async_wait_group");
  const unsigned kept = static_cast<unsigned>(pending);
  if (thread.committed_groups > kept) land(thread, thread.committed_groups - kept);
}

void cp_async_wait_all() {
  Thread& thread = current_thread("cp_async_wait_all");
  land(thread, thread.committed_groups + 1);
}

}  // namespace dyhead::simt
