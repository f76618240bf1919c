// Memory with a guard zone on either side, for shared arrays and for the arrays that kernels get.
#pragma once

#include <cstddef>
#include <string>

namespace dyhead::simt {

// The value of memory that nothing has written: NaN in every floating-point type.
inline constexpr unsigned char kPoison = 0xff;

// Poisoned bytes whose address is `alignment_offset` past a multiple of 1024. Under
// AddressSanitizer an access to a guard stops the program; otherwise check_guards() finds writes.
class GuardedMemory {
 public:
  GuardedMemory(std::string name, size_t bytes, size_t alignment_offset);
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  const std::string& name() const { return name_; }
  bool contains(const void* p, size_t bytes) const;
  // The live object that contains the byte at p, or null.
  static const GuardedMemory* find(const void* p);

  // Fails if a guard of this object was overwritten.
  void check_guards() const;
  static void check_all_guards();

 private:
  std::string name_;
  size_t bytes_;
  size_t front_bytes_;
  std::byte* allocation_;
  std::byte* data_;
};

}  // namespace dyhead::simt
