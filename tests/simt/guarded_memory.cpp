#include "guarded_memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <new>
#include <utility>

#include "simt.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dyhead::simt {
namespace {

constexpr size_t kAlignment = 1024;
constexpr size_t kGuardBytes = 1024;

// All objects by the address of their data.
std::map<uintptr_t, const GuardedMemory*>& live() {
  static std::map<uintptr_t, const GuardedMemory*> objects;
  return objects;
}

}  // namespace

GuardedMemory::GuardedMemory(std::string name, size_t bytes, size_t alignment_offset)
    : name_(std::move(name)),
      bytes_(bytes),
      front_bytes_(kGuardBytes + alignment_offset % kAlignment) {
  const size_t total = front_bytes_ + bytes_ + kGuardBytes;
  const size_t rounded = (total + kAlignment - 1) / kAlignment * kAlignment;
  allocation_ = static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded));
  if (allocation_ == nullptr) throw std::bad_alloc();
  std::memset(allocation_, kPoison, total);
  data_ = allocation_ + front_bytes_;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(allocation_, front_bytes_);
  ASAN_POISON_MEMORY_REGION(data_ + bytes_, rounded - front_bytes_ - bytes_);
#endif
  live().emplace(reinterpret_cast<uintptr_t>(data_), this);
}

GuardedMemory::~GuardedMemory() {
  live().erase(reinterpret_cast<uintptr_t>(data_));
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(allocation_, front_bytes_ + bytes_ + kGuardBytes);
#endif
  std::free(allocation_);
}

bool GuardedMemory::contains(const void* p, size_t bytes) const {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data_);
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  return address >= begin && address + bytes <= begin + bytes_;
}

const GuardedMemory* GuardedMemory::find(const void* p) {
  auto after = live().upper_bound(reinterpret_cast<uintptr_t>(p));
  if (after == live().begin()) return nullptr;
  const GuardedMemory* memory = std::prev(after)->second;
  return memory->contains(p, 1) ? memory : nullptr;
}

void GuardedMemory::check_guards() const {
#if !defined(__SANITIZE_ADDRESS__)
  const auto intact = [](const std::byte* begin, size_t bytes) {
    return std::all_of(begin, begin + bytes, [](std::byte b) { return b == std::byte{kPoison}; });
  };
  const bool below = !intact(allocation_, front_bytes_);
  const bool above = !intact(data_ + bytes_, kGuardBytes);
  if (below || above) {
    fail("write " + std::string(below ? "before the begin" : "past the end") + " of array '" +
         name_ + "' (" + std::to_string(bytes_) + " bytes)");
  }
#endif
}

void GuardedMemory::check_all_guards() {
  for (const auto& [address, memory] : live()) memory->check_guards();
}

}  // namespace dyhead::simt
