// Where a product of a warpgroup finds an operand in shared memory.
#include <cstring>

#include "../../csrc/common/dtypes.h"
#include "hopper.h"

namespace dyhead::simt {
namespace {

constexpr unsigned kDepth = 16;
constexpr unsigned kRowBytes = 128;
constexpr unsigned kGroupBytes = 1024;  // eight rows: the period of the permutation
constexpr unsigned kUnit = 16;

// The fields of the matrix descriptor, and what this emulation knows of their values.
struct Descriptor {
  explicit Descriptor(uint64_t bits)
      : start(field(bits, 0, 14) << 4),
        stride(field(bits, 32, 14) << 4),
        base_offset(field(bits, 49, 3)),
        swizzle(field(bits, 62, 2)),
        unused(field(bits, 14, 2) | field(bits, 30, 2) | field(bits, 46, 3) | field(bits, 52, 10)) {
  }

  static unsigned field(uint64_t bits, unsigned first, unsigned count) {
    return static_cast<unsigned>(bits >> first & ((uint64_t{1} << count) - 1));
  }

  unsigned start;   // address of the first row
  unsigned stride;  // between groups of eight rows
  unsigned base_offset;
  unsigned swizzle;
  unsigned unused;
  // Bits 16 to 29, the offset between neighbours along the depth, have no meaning for a swizzled
  // operand whose rows lie along the depth.
};

void check(const Descriptor& d, const std::string& call) {
  if (d.unused != 0) fail(call + ": bits of the descriptor that have no meaning are set");
  if (d.swizzle != 1) {
    fail(call + ": expected the 128-byte swizzle (1) in the descriptor, got " +
         std::to_string(d.swizzle));
  }
  if (d.base_offset != 0) {
    fail(call + ": expected base offset 0 in the descriptor, got " + std::to_string(d.base_offset));
  }
  if (d.start % kGroupBytes >= kRowBytes) {
    fail(call + ": row 0 is " + std::to_string(d.start / kRowBytes * kRowBytes % kGroupBytes) +
         " bytes past a multiple of 1024, to which the 128-byte swizzle is aligned");
  }
  if (d.start % kRowBytes + 2 * kUnit > kRowBytes) {
    fail(call + ": the 32 bytes of a row begin at byte " + std::to_string(d.start % kRowBytes) +
         " of 128 and end in the next row");
  }
  if (d.stride % kGroupBytes != 0) {
    fail(call + ": groups of eight rows are " + std::to_string(d.stride) +
         " bytes apart, which is no multiple of 1024");
  }
}

// Where the 16 bytes `unit` of a row are: the swizzle exchanges bits of the address.
unsigned unit_address(const Descriptor& d, unsigned row, unsigned unit) {
  const unsigned address = d.start + row / 8 * d.stride + row % 8 * kRowBytes + unit * kUnit;
  return address ^ (address >> 7 & 7u) << 4;
}

struct FoundArray {
  size_t offset = 0;
  const GuardedMemory* array = nullptr;
};

FoundArray array_at(const Block& block, unsigned address) {
  auto after = block.dynamic_arrays.upper_bound(address);
  if (after == block.dynamic_arrays.begin()) return {};
  --after;
  if (address + kUnit > after->first + after->second->bytes()) return {};
  return {after->first, after->second.get()};
}

template <class Visit>
void for_units(const Block& block, const SharedOperand& operand, const std::string& call,
               Visit&& visit) {
  const Descriptor d(operand.descriptor);
  check(d, call);
  FoundArray found;
  for (unsigned row = 0; row < static_cast<unsigned>(operand.rows); ++row) {
    for (unsigned unit = 0; unit < 2; ++unit) {
      const unsigned address = unit_address(d, row, unit);
      if (row == 0 && unit == 0) found = array_at(block, address);
      if (found.array == nullptr || address < found.offset ||
          address + kUnit > found.offset + found.array->bytes()) {
        fail(call + ": row " + std::to_string(row) + " of the " + operand.name +
             " operand is at offset " + std::to_string(address) +
             " of dynamic shared memory, outside the array " +
             (found.array == nullptr ? "that none has there" : "of row 0"));
      }
      visit(*found.array, address - found.offset, row, unit);
    }
  }
}

// What is there now. `of`: where.
std::vector<std::byte> bytes_of(const Block& block, const SharedOperand& operand,
                                const std::string& call, const GuardedMemory*& of) {
  std::vector<std::byte> bytes(static_cast<size_t>(operand.rows) * 2 * kUnit);
  for_units(block, operand, call,
            [&](const GuardedMemory& array, size_t offset, unsigned row, unsigned unit) {
              of = &array;
              std::memcpy(&bytes[(2 * row + unit) * kUnit], array.data() + offset, kUnit);
            });
  return bytes;
}

template <class T>
float value(const std::byte* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return to_compute(T{bits});
}

}  // namespace

void check_unchanged(const Block& block, const SharedOperand* operand, const std::string& call,
                     const char* changed) {
  if (operand == nullptr) return;
  const GuardedMemory* array = nullptr;
  if (bytes_of(block, *operand, call, array) == operand->bytes) return;
  fail(call + "the " + operand->name + " operand in " + place_in(block, array->data()) + changed);
}

std::shared_ptr<const SharedOperand> read_shared(Block& block, const char* name,
                                                 uint64_t descriptor, int rows, bool is_bfloat16,
                                                 Where where) {
  const std::string call = "wgmma at " + to_string(where);
  auto operand = std::make_shared<SharedOperand>(SharedOperand{name, descriptor, rows, {}, {}, {}});
  operand->bytes = bytes_of(block, *operand, call, operand->array);
  const std::byte* view = async_view(block, *operand->array);
  for_units(block, *operand, call,
            [&](const GuardedMemory& array, size_t offset, unsigned row, unsigned unit) {
              check_no_copy("wgmma", block, array.data() + offset, kUnit, where);
              const std::byte* found = &operand->bytes[(2 * row + unit) * kUnit];
              if (std::memcmp(view + offset, found, kUnit) == 0) return;
              fail(call + ": ordinary stores to " + place_in(block, array.data() + offset) +
                   " come before it without fence_proxy_async");
            });
  const size_t count = static_cast<size_t>(rows);
  operand->values.resize(kDepth * count);
  for (size_t j = 0; j < count; ++j) {
    for (size_t k = 0; k < kDepth; ++k) {
      const std::byte* p = &operand->bytes[(j * kDepth + k) * 2];
      operand->values[k * count + j] = is_bfloat16 ? value<bfloat16>(p) : value<float16>(p);
    }
  }
  return operand;
}

uint64_t shared_offset(const void* p) {
  const Block& block = *current_thread("shared_offset").block;
  for (const auto& [offset, array] : block.dynamic_arrays) {
    // One past the end is an address too.
    if (p >= array->data() && p <= array->data() + array->bytes()) {
      return offset + static_cast<size_t>(static_cast<const std::byte*>(p) - array->data());
    }
  }
  fail("shared_offset: expected an address in dynamic shared memory");
}

}  // namespace dyhead::simt
