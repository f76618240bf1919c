#include "block.h"

#include <string_view>
#include <utility>

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
    case State::kSpin:
      return "wait_until(" + std::to_string(thread.value) + "), the counter being " +
             std::to_string(*thread.flag) + ",";
    case State::kExited:
      return "exited";
  }
  return "";
}

}  // namespace

Block::Block(const Launch& launch, uint3 block_index)
    : index(block_index),
      threads(size_t{launch.block.x} * launch.block.y * launch.block.z),
      warps((threads.size() + kLanes - 1) / kLanes),
      running(static_cast<unsigned>(threads.size())) {
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
  for (Warp& warp : warps) warp.ready = warp.present;
}

bool Block::is_shared(const void* p, size_t bytes) const {
  for (const auto& [key, array] : static_arrays) {
    if (array->contains(p, bytes)) return true;
  }
  for (const auto& [offset, array] : dynamic_arrays) {
    if (array->contains(p, bytes)) return true;
  }
  return false;
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
