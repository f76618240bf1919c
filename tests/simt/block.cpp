#include "block.h"

#include <string_view>
#include <utility>

#include "hopper.h"
#include "scheduler.h"

namespace dyhead::simt {
namespace {

// "0-30, 32" for a rising list of thread numbers.
std::string ranges(const std::vector<unsigned>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
    if (last > i) text += "-" + std::to_string(numbers[last]);
    i = last + 1;
  }
  return text;
}

std::string wait_name(const Thread& thread) {
  switch (thread.state) {
    case State::kReady:
      return "ready";
    case State::kBarrier:
      return "__syncthreads";
    case State::kCollective:
      return thread.collective->name;
    case State::kWait:
      return thread.waiting->describe();
    case State::kExited:
      return "exited";
  }
  return "";
}

}  // namespace

Block::Block(const Launch& launch, uint3 block_index, Cluster& of)
    : index(block_index),
      threads(size_t{launch.block.x} * launch.block.y * launch.block.z),
      warps((threads.size() + kLanes - 1) / kLanes),
      running(static_cast<unsigned>(threads.size())),
      cluster(&of),
      rank(static_cast<unsigned>(of.blocks.size())),
      warpgroups(warps.size() / kGroupWarps) {
  of.blocks.push_back(this);
  for (unsigned i = 0; i < threads.size(); ++i) {
    Thread& thread = threads[i];
    thread.block = this;
    thread.warp = &warps[i / kLanes];
    thread.lane = i % kLanes;
    thread.index = {i % launch.block.x, i / launch.block.x % launch.block.y,
                    i / (launch.block.x * launch.block.y)};
    thread.warp->lanes[thread.lane] = &thread;
    thread.warp->present |= 1u << thread.lane;
  }
  // Without knowing what the kernel was compiled for: as many registers as a block can have.
  constexpr unsigned kRegisters = 65536;
  const unsigned most = kRegisters / (static_cast<unsigned>(warps.size()) * kLanes);
  for (Warp& warp : warps) {
    warp.ready = warp.present;
    warp.registers.per_thread = std::min(256u, most / 8 * 8);
  }
}

const GuardedMemory* Block::shared_array(const void* p, size_t bytes) const {
  for (const auto& [key, array] : static_arrays) {
    if (array->contains(p, bytes)) return array.get();
  }
  for (const auto& [offset, array] : dynamic_arrays) {
    if (array->contains(p, bytes)) return array.get();
  }
  return nullptr;
}

Warpgroup* Block::warpgroup_of(const Warp& warp) {
  const size_t number = static_cast<size_t>(&warp - warps.data()) / kGroupWarps;
  return number < warpgroups.size() ? &warpgroups[number] : nullptr;
}

std::string Block::describe_waits() const {
  std::map<std::pair<std::string, std::string>, std::vector<unsigned>> groups;
  for (unsigned i = 0; i < threads.size(); ++i) {
    const Thread& thread = threads[i];
    const bool waits = thread.state != State::kReady && thread.state != State::kExited;
    groups[{wait_name(thread), waits ? to_string(thread.where) : ""}].push_back(i);
  }
  std::string text;
  for (const auto& [wait, numbers] : groups) {
    text += "\n  threads " + ranges(numbers) + ": " + wait.first;
    if (!wait.second.empty()) text += " at " + wait.second;
  }
  return text;
}

void Block::check_end() const {
  for (const Thread& thread : threads) {
    if (thread.copies.empty()) continue;
    fail("block " + to_string(index) + ", thread " + to_string(thread.index) + " ended with " +
         std::to_string(thread.copies.size()) +
         " asynchronous copies that it never waited for; the first was issued at " +
         to_string(thread.copies.front().where));
  }
  check_same_products(*this);
  check_same_registers(*this);
  check_no_bytes(*this);
  for (const auto& [key, array] : static_arrays) array->check_guards();
  for (const auto& [offset, array] : dynamic_arrays) array->check_guards();
}

std::string to_string(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string to_string(const Where& where) {
  const std::string_view path = where.file_name();
  return std::string(path.substr(path.rfind('/') + 1)) + ":" + std::to_string(where.line());
}

}  // namespace dyhead::simt
