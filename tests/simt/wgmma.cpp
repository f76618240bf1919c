// Products of a warpgroup: wgmma.mma_async of the PTX ISA with the sums in registers, the right
// operand in shared memory and the left operand in either.
//
// Each warp computes its rows when it issues a product. What an unfinished product may still touch
// is held as on a device: the sums in the kernel's registers are poison until wgmma_wait() covers
// the last product on them, and sums, left and right operand must be unchanged then.
//
// Writes to registers between wgmma_fence() and a product show only where an earlier product has
// used these registers, since the emulation learns of them from products.
#include <algorithm>
#include <cstring>

#include "../../csrc/common/dtypes.h"
#include "hopper.h"
#include "scheduler.h"

#if defined(__SANITIZE_ADDRESS__)
// Registers are variables of the kernel whose scope may have ended.
#define DYHEAD_SIMT_ANY_MEMORY __attribute__((noinline, no_sanitize_address))
#else
#define DYHEAD_SIMT_ANY_MEMORY
#endif

namespace dyhead::simt {
namespace {

using Payloads = void* const (&)[kLanes];

constexpr unsigned kDepth = 16;
constexpr int kGroupRows = 64;  // of the left operand

template <class T>
DYHEAD_SIMT_ANY_MEMORY bool equal(const T* registers, const T* values, size_t count) {
  const auto* a = reinterpret_cast<const volatile uint32_t*>(registers);
  const auto* b = reinterpret_cast<const volatile uint32_t*>(values);
  for (size_t i = 0; i < count; ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

template <class T>
DYHEAD_SIMT_ANY_MEMORY void read(const T* registers, T* values, size_t count) {
  const auto* from = reinterpret_cast<const volatile uint32_t*>(registers);
  auto* to = reinterpret_cast<volatile uint32_t*>(values);
  for (size_t i = 0; i < count; ++i) to[i] = from[i];
}

std::string at(const char* what, Where where) {
  return std::string(what) + " at " + to_string(where);
}

// ---- issuing ------------------------------------------------------------------------------------

struct Wgmma {
  float* acc;
  const uint32_t* left;  // null where it is in shared memory
  uint64_t shared_left;
  int n;
  uint64_t right;
  bool adds;
  bool is_bfloat16;
  Where where;
  uintptr_t site;
};

SharedOperands read_operands(Block& block, const Wgmma& own) {
  SharedOperands operands;
  if (own.left == nullptr) {
    operands.left =
        read_shared(block, "left", own.shared_left, kGroupRows, own.is_bfloat16, own.where);
  }
  operands.right = read_shared(block, "right", own.right, own.n, own.is_bfloat16, own.where);
  return operands;
}

// This product's place in the warpgroup's order, and the operands that its warps share.
SharedOperands join_warpgroup(Block& block, const Warp& warp, const Wgmma& own) {
  const std::string call = at("wgmma", own.where);
  Warpgroup& group = *block.warpgroup_of(warp);
  const size_t in_group = static_cast<size_t>(&warp - block.warps.data()) % kGroupWarps;
  const size_t number = group.issued[in_group]++;
  if (number == group.first + group.issues.size()) {
    const SharedOperands operands = read_operands(block, own);
    group.issues.push_back({own.where, own.adds, own.is_bfloat16, operands});
    if (counting) {
      count_operand_read(own.site, operands.right->bytes.size());
      if (operands.left != nullptr) count_operand_read(own.site, operands.left->bytes.size());
    }
    return operands;
  }
  const ProductIssue issue = group.issues[number - group.first];
  const SharedOperand* left = issue.operands.left.get();
  const SharedOperand& right = *issue.operands.right;
  const bool same_left = (left != nullptr ? left->descriptor : 0) == own.shared_left;
  if (!same(issue.where, own.where) || right.descriptor != own.right || right.rows != own.n ||
      !same_left || issue.adds != own.adds || issue.is_bfloat16 != own.is_bfloat16) {
    fail(call + ": warp " + std::to_string(in_group) + " of the warpgroup issues another product " +
         "than the first warp that came, at " + to_string(issue.where) +
         (right.descriptor != own.right ? "; the right operands differ" : "") +
         (same_left ? "" : "; the left operands differ"));
  }
  constexpr const char* kChanged =
      " has changed since another warp of the warpgroup issued this product";
  check_unchanged(block, left, call + ": ", kChanged);
  check_unchanged(block, &right, call + ": ", kChanged);
  while (group.first < group.issued_by_all()) {
    group.issues.pop_front();
    ++group.first;
  }
  return issue.operands;
}

// Finds the sums in these registers, or adds them.
size_t find_sums(WarpProducts& products, Payloads payloads, size_t count, const std::string& call) {
  std::array<float*, kLanes> registers;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    registers[lane] = static_cast<const Wgmma*>(payloads[lane])->acc;
  }
  for (size_t i = 0; i < products.sums.size(); ++i) {
    Sums& sums = products.sums[i];
    if (sums.registers == registers && sums.count == count) return i;
    const bool apart =
        sums.registers[0] + sums.count <= registers[0] || registers[0] + count <= sums.registers[0];
    if (!apart && sums.under_way != 0) {
      fail(call + ": a product of another shape on some of these sums is under way");
    }
  }
  products.sums.push_back({.registers = registers, .count = count, .values = {}});
  Sums& sums = products.sums.back();
  sums.values.resize(kLanes * count);
  for (size_t lane = 0; lane < kLanes; ++lane) {
    read(registers[lane], &sums.values[lane * count], count);
  }
  return products.sums.size() - 1;
}

void check_sums(const Sums& sums, const std::string& call) {
  const std::vector<std::byte> poison(sums.count * sizeof(float), std::byte{kPoison});
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const float* expected = sums.under_way != 0 ? reinterpret_cast<const float*>(poison.data())
                                                : &sums.values[lane * sums.count];
    if (equal<float>(sums.registers[lane], expected, sums.count)) continue;
    fail(call + (sums.under_way != 0
                     ? ": its sums were written while an earlier product on them was under way"
                     : ": its sums were written after the last wgmma_fence"));
  }
}

LeftOperand& note_left(WarpProducts& products, const LeftOperand& left) {
  for (LeftOperand& known : products.left) {
    if (known.registers == left.registers) return known;
  }
  return products.left.emplace_back(left);
}

using LeftRows = float[16][kDepth];  // of a warp

void read_rows(LeftRows& a, const SharedOperand& left, size_t first) {
  const size_t count = static_cast<size_t>(left.rows);
  for (size_t row = 0; row < 16; ++row) {
    for (size_t k = 0; k < kDepth; ++k) a[row][k] = left.values[k * count + first + row];
  }
}

template <class T>
void read_rows(LeftRows& a, const LeftOperand& left) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const unsigned g = lane / 4;
    const unsigned t = lane % 4;
    for (unsigned r = 0; r < 4; ++r) {
      const uint32_t pair = left.values[lane][r];
      const unsigned row = g + r % 2 * 8;
      const unsigned column = 2 * t + r / 2 * 8;
      a[row][column] = to_compute(T{static_cast<uint16_t>(pair)});
      a[row][column + 1] = to_compute(T{static_cast<uint16_t>(pair >> 16)});
    }
  }
}

void multiply(Sums& sums, const LeftRows& a, const SharedOperand& right, bool adds) {
  const size_t n = 2 * sums.count;
  constexpr unsigned kTile = 8;
  for (size_t first = 0; first < n; first += kTile) {
    float acc[16][kTile];
    const auto exchange = [&](auto&& move) {
      for (unsigned lane = 0; lane < kLanes; ++lane) {
        float* own = &sums.values[lane * sums.count + first / kTile * 4];
        const unsigned g = lane / 4;
        const unsigned t = 2 * (lane % 4);
        move(own[0], acc[g][t]);
        move(own[1], acc[g][t + 1]);
        move(own[2], acc[g + 8][t]);
        move(own[3], acc[g + 8][t + 1]);
      }
    };
    exchange([&](float& own, float& tile) { tile = adds ? own : 0.0f; });
    for (unsigned i = 0; i < 16; ++i) {
      for (unsigned k = 0; k < kDepth; ++k) {
        const float* b = &right.values[k * n + first];
        for (unsigned j = 0; j < kTile; ++j) acc[i][j] += a[i][k] * b[j];
      }
    }
    exchange([](float& own, float& tile) { own = tile; });
  }
}

void issue(Payloads payloads) {
  const Wgmma& own = *static_cast<const Wgmma*>(payloads[0]);
  Thread& thread = *current;
  Block& block = *thread.block;
  Warp& warp = *thread.warp;
  WarpProducts& products = warp.products;
  const std::string call = at("wgmma", own.where);
  LeftOperand left;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const Wgmma& other = *static_cast<const Wgmma*>(payloads[lane]);
    if (other.right != own.right || other.shared_left != own.shared_left ||
        other.adds != own.adds) {
      fail(call + ": lanes 0 and " + std::to_string(lane) +
           " of a warp pass different descriptors or `adds`");
    }
    if (own.left == nullptr) continue;
    left.registers[lane] = other.left;
    read(other.left, left.values[lane].data(), left.values[lane].size());
  }
  if (!products.fenced) {
    fail(call + ": no wgmma_fence comes before the warp's first product");
  }
  const size_t index = find_sums(products, payloads, static_cast<size_t>(own.n) / 2, call);
  check_sums(products.sums[index], call);
  if (own.left != nullptr && note_left(products, left).values != left.values) {
    fail(call + ": its left operand was written after the last wgmma_fence");
  }
  const SharedOperands operands = join_warpgroup(block, warp, own);
  const Warpgroup& group = *block.warpgroup_of(warp);
  const size_t in_group = static_cast<size_t>(&warp - block.warps.data()) % kGroupWarps;
  Sums& sums = products.sums[index];
  LeftRows rows;
  if (own.left == nullptr) {
    read_rows(rows, *operands.left, 16 * in_group);
  } else if (own.is_bfloat16) {
    read_rows<bfloat16>(rows, left);
  } else {
    read_rows<float16>(rows, left);
  }
  multiply(sums, rows, *operands.right, own.adds);
  for (float* registers : sums.registers) {
    std::memset(registers, kPoison, sums.count * sizeof(float));
  }
  ++sums.under_way;
  products.under_way.push_back({.where = own.where,
                                .number = group.issued[in_group] - 1,
                                .group = products.committed,
                                .sums = index,
                                .left = left,
                                .operands = operands});
}

// ---- completion ---------------------------------------------------------------------------------

void complete(const Block& block, WarpProducts& products, Where where) {
  const Product& product = products.under_way.front();
  const std::string call =
      at("wgmma_wait", where) + ": of the product issued at " + to_string(product.where);
  constexpr const char* kWritten = " was written before this wait";
  check_unchanged(block, product.operands.left.get(), call + ", ", kWritten);
  check_unchanged(block, product.operands.right.get(), call + ", ", kWritten);
  for (size_t lane = 0; lane < kLanes && product.operands.left == nullptr; ++lane) {
    if (equal(product.left.registers[lane], product.left.values[lane].data(), 4)) continue;
    fail(call + ", the left operand was written before this wait");
  }
  Sums& sums = products.sums[product.sums];
  check_sums(sums, call);
  if (--sums.under_way == 0) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      std::memcpy(sums.registers[lane], &sums.values[lane * sums.count],
                  sums.count * sizeof(float));
    }
  }
  products.under_way.pop_front();
}

// Until the other warps of the warpgroup have issued a product: alone it does not end.
class ProductWait : public Waiting {
 public:
  ProductWait(const Warpgroup& group, size_t number) : group_(group), number_(number) {}
  std::string describe() const override {
    return "wgmma_wait for a product that not all four warps have issued";
  }
  bool over() override { return group_.issued_by_all() > number_; }

 private:
  const Warpgroup& group_;
  size_t number_;
};

struct WaitFor {
  int pending;
  Where where;
};

void complete_wait(Payloads payloads) {
  const auto& wait = *static_cast<const WaitFor*>(payloads[0]);
  WarpProducts& products = current->warp->products;
  const size_t pending = static_cast<size_t>(wait.pending);
  while (!products.under_way.empty() &&
         products.under_way.front().group + pending < products.committed) {
    complete(*current->block, products, wait.where);
  }
}

void complete_fence(Payloads) {
  WarpProducts& products = current->warp->products;
  products.fenced = true;
  for (Sums& sums : products.sums) {
    if (sums.under_way != 0) continue;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      read(sums.registers[lane], &sums.values[lane * sums.count], sums.count);
    }
  }
  for (LeftOperand& left : products.left) {
    for (size_t lane = 0; lane < kLanes; ++lane)
      read(left.registers[lane], left.values[lane].data(), 4);
  }
}

const Warpgroup& own_warpgroup(const char* name, Where where) {
  const Thread& thread = current_thread(name);
  const Warpgroup* group = thread.block->warpgroup_of(*thread.warp);
  if (group == nullptr) fail(at(name, where) + ": needs a warpgroup of four warps");
  return *group;
}

void issue_all(Wgmma payload) {
  static_cast<void>(own_warpgroup("wgmma", payload.where));
  const int n = payload.n;
  if (n < 8 || n > 256 || n % 8 != 0) {
    fail(at("wgmma", payload.where) + ": expected a multiple of 8 columns, 8..256, got " +
         std::to_string(n));
  }
  if (counting && current->lane == 0) {
    count_mma(payload.site, 2u * 16u * static_cast<unsigned>(n) * kDepth);
  }
  collect("wgmma", ~0u, true, issue, payload, payload.where);
}

}  // namespace

size_t Warpgroup::issued_by_all() const { return *std::min_element(issued.begin(), issued.end()); }

void wgmma_fence(Where where) {
  static_cast<void>(own_warpgroup("wgmma_fence", where));
  char nothing = 0;
  collect("wgmma_fence", ~0u, true, complete_fence, nothing, where);
}

void wgmma_commit(Where where) {
  static_cast<void>(own_warpgroup("wgmma_commit", where));
  char nothing = 0;
  collect(
      "wgmma_commit", ~0u, true, [](Payloads) { ++current->warp->products.committed; }, nothing,
      where);
}

void wgmma_wait(int pending, Where where) {
  const Warpgroup& group = own_warpgroup("wgmma_wait", where);
  const WarpProducts& products = current->warp->products;
  size_t last = 0;
  bool any = false;
  for (const Product& product : products.under_way) {
    if (product.group + static_cast<size_t>(pending) >= products.committed) break;
    last = product.number;
    any = true;
  }
  ProductWait waiting(group, last);
  if (any && !waiting.over()) poll_thread(waiting, where);
  // A warp far behind the others reads what they may have released.
  if (current->lane == 0 && random_below(4) == 0) let_others_run(random_below(256), where);
  WaitFor payload{pending, where};
  collect("wgmma_wait", ~0u, true, complete_wait, payload, where);
}

void wgmma(float* acc, int n, const uint32_t* left, uint64_t right, bool adds, bool is_bfloat16,
           Where where) {
  issue_all({acc, left, 0, n, right, adds, is_bfloat16, where, DYHEAD_SIMT_SITE});
}

void wgmma(float* acc, int n, uint64_t left, uint64_t right, bool adds, bool is_bfloat16,
           Where where) {
  issue_all({acc, nullptr, left, n, right, adds, is_bfloat16, where, DYHEAD_SIMT_SITE});
}

void check_no_products(const Thread& thread) {
  const WarpProducts& products = thread.warp->products;
  if (products.under_way.empty()) return;
  fail("a thread ended with products under way; the first was issued at " +
       to_string(products.under_way.front().where) + " and has no wgmma_wait");
}

void check_same_products(const Block& block) {
  for (const Warpgroup& group : block.warpgroups) {
    if (group.issues.empty()) continue;
    fail("block " + to_string(block.index) + " ended, but not all four warps of a warpgroup have " +
         "issued the product at " + to_string(group.issues.front().where));
  }
}

}  // namespace dyhead::simt
