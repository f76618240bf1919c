#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// swapcontext saves the signal mask by a system call; the registers that a call preserves are
// enough.
extern "C" void dyhead_simt_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.p2align 4
.type dyhead_simt_switch, @function
dyhead_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dyhead_simt_switch, .-dyhead_simt_switch
)");
#endif

namespace dyhead::simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024;  // virtual; only touched pages take memory

Fiber* entering = nullptr;
#if defined(__x86_64__)
void* scheduler_stack_pointer = nullptr;
#else
ucontext_t scheduler_context;
#endif

// Where the scheduler runs, as AddressSanitizer needs to know.
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;

std::vector<std::byte*>& free_stacks() {
  static std::vector<std::byte*> stacks;
  return stacks;
}

std::byte* take_stack() {
  if (!free_stacks().empty()) {
    std::byte* stack = free_stacks().back();
    free_stacks().pop_back();
    return stack;
  }
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  if (mprotect(memory, guard, PROT_NONE) != 0) throw std::bad_alloc();
  return static_cast<std::byte*>(memory) + guard;
}

void announce_switch([[maybe_unused]] void** save_fake_stack, [[maybe_unused]] const void* stack,
                     [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save_fake_stack, stack, bytes);
#endif
}

void announce_arrival([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** from_stack,
                      [[maybe_unused]] size_t* from_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, from_stack, from_bytes);
#endif
}

}  // namespace

void Fiber::start(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
  finished_ = false;
  fake_stack_ = nullptr;
  stack_ = take_stack();
#if defined(__x86_64__)
  // Six registers, the address that the switch returns to, and a null return address that ends
  // backtraces; the stack is then aligned as at any function's entry.
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, reinterpret_cast<void (*)()>(&Fiber::enter), 0);
#endif
}

void Fiber::resume() {
  entering = this;
  void* scheduler_fake_stack = nullptr;
  announce_switch(&scheduler_fake_stack, stack_, kStackBytes);
#if defined(__x86_64__)
  dyhead_simt_switch(&scheduler_stack_pointer, stack_pointer_);
#else
  swapcontext(&scheduler_context, &context_);
#endif
  announce_arrival(scheduler_fake_stack, nullptr, nullptr);
  if (finished_) release_stack();
}

void Fiber::suspend() {
  announce_switch(finished_ ? nullptr : &fake_stack_, scheduler_stack, scheduler_stack_bytes);
#if defined(__x86_64__)
  dyhead_simt_switch(&stack_pointer_, scheduler_stack_pointer);
#else
  swapcontext(&context_, &scheduler_context);
#endif
  announce_arrival(fake_stack_, &scheduler_stack, &scheduler_stack_bytes);
}

void Fiber::enter() {
  announce_arrival(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  Fiber* self = entering;
  self->entry_(self->argument_);
  self->finished_ = true;
  self->suspend();
  std::abort();  // a finished fiber is never resumed
}

void Fiber::release_stack() {
  if (stack_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
  // The frames left on it have poisoned redzones.
  ASAN_UNPOISON_MEMORY_REGION(stack_, kStackBytes);
#endif
  free_stacks().push_back(stack_);
  stack_ = nullptr;
}

}  // namespace dyhead::simt
