// Stackful fibers: one per emulated thread, switched to and from a single scheduler.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace dyhead::simt {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  // Abandons a suspended fiber: its frames are dropped without running destructors.
  ~Fiber() { release_stack(); }

  // Called by the scheduler. The first resume() enters entry(argument); each returns when the fiber
  // suspends or entry returns.
  void start(void (*entry)(void*), void* argument);
  void resume();

  // Called inside the fiber.
  void suspend();

  bool started() const { return stack_ != nullptr; }

 private:
  [[noreturn]] static void enter();
  void release_stack();

  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  std::byte* stack_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  bool finished_ = false;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace dyhead::simt
