// Warp collectives: shuffles, votes, ldmatrix and mma.
#include <array>
#include <cstring>

#include "../../csrc/common/dtypes.h"
#include "scheduler.h"

namespace dyhead::simt {
namespace {

using Payloads = void* const (&)[kLanes];

struct Shuffle {
  const void* in;
  void* out;
  size_t bytes;
  int source_lane;
};

void complete_shuffle(Payloads payloads) {
  for (void* payload : payloads) {
    if (payload == nullptr) continue;
    const Shuffle& to = *static_cast<const Shuffle*>(payload);
    const auto* from = static_cast<const Shuffle*>(payloads[to.source_lane]);
    if (from == nullptr) {
      std::memset(to.out, kPoison, to.bytes);
    } else {
      std::memcpy(to.out, from->in, to.bytes);
    }
  }
}

struct Vote {
  bool predicate;
  unsigned ballot;
};

void complete_vote(Payloads payloads) {
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const auto* vote = static_cast<const Vote*>(payloads[lane]);
    if (vote != nullptr && vote->predicate) ballot |= 1u << lane;
  }
  for (void* payload : payloads) {
    if (payload != nullptr) static_cast<Vote*>(payload)->ballot = ballot;
  }
}

struct LoadMatrix {
  uint32_t* registers;
  const void* row;
  int matrices;
  bool transposed;
  uintptr_t site;
};

void complete_ldmatrix(Payloads payloads) {
  const auto* first = static_cast<const LoadMatrix*>(payloads[0]);
  if (counting) {
    std::array<const void*, kLanes> rows;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      rows[lane] = static_cast<const LoadMatrix*>(payloads[lane])->row;
    }
    count_ldmatrix(first->site, rows, first->matrices);
  }
  for (unsigned m = 0; m < static_cast<unsigned>(first->matrices); ++m) {
    uint16_t matrix[8][8];
    for (unsigned i = 0; i < 8; ++i) {
      const auto* load = static_cast<const LoadMatrix*>(payloads[8 * m + i]);
      std::memcpy(matrix[i], load->row, sizeof(matrix[i]));
    }
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      const auto* load = static_cast<const LoadMatrix*>(payloads[lane]);
      const unsigned g = lane / 4;
      const unsigned t = 2 * (lane % 4);
      const uint32_t low = load->transposed ? matrix[t][g] : matrix[g][t];
      const uint32_t high = load->transposed ? matrix[t + 1][g] : matrix[g][t + 1];
      load->registers[m] = low | high << 16;
    }
  }
}

struct Mma {
  float* acc;
  const uint32_t* a;
  const uint32_t* b;
};

// acc += a b with the accumulator's layout of all m16n8 shapes.
template <int kDepth>
void multiply_m16n8(Payloads payloads, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  float acc[16][8];
  const auto exchange = [&](auto&& move) {
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      float* own = static_cast<const Mma*>(payloads[lane])->acc;
      const unsigned g = lane / 4;
      const unsigned t = 2 * (lane % 4);
      move(own[0], acc[g][t]);
      move(own[1], acc[g][t + 1]);
      move(own[2], acc[g + 8][t]);
      move(own[3], acc[g + 8][t + 1]);
    }
  };
  exchange([](float& own, float& tile) { tile = own; });
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < 8; ++j) acc[i][j] += a[i][k] * b[k][j];
    }
  }
  exchange([](float& own, float& tile) { own = tile; });
}

template <class T>
void complete_m16n8k16(Payloads payloads) {
  float a[16][16];
  float b[16][8];
  const auto low = [](uint32_t pair) { return to_compute(T{static_cast<uint16_t>(pair)}); };
  const auto high = [](uint32_t pair) { return to_compute(T{static_cast<uint16_t>(pair >> 16)}); };
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const Mma& own = *static_cast<const Mma*>(payloads[lane]);
    const unsigned g = lane / 4;
    const unsigned t = 2 * (lane % 4);
    for (unsigned r = 0; r < 4; ++r) {
      const unsigned row = g + (r % 2) * 8;
      const unsigned column = t + (r / 2) * 8;
      a[row][column] = low(own.a[r]);
      a[row][column + 1] = high(own.a[r]);
    }
    for (unsigned r = 0; r < 2; ++r) {
      b[t + 8 * r][g] = low(own.b[r]);
      b[t + 8 * r + 1][g] = high(own.b[r]);
    }
  }
  multiply_m16n8(payloads, a, b);
}

void complete_m16n8k8_tf32(Payloads payloads) {
  float a[16][8];
  float b[8][8];
  // The tensor core does not see the lowest 13 mantissa bits.
  const auto value = [](uint32_t bits) { return __builtin_bit_cast(float, bits & ~0x1fffu); };
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const Mma& own = *static_cast<const Mma*>(payloads[lane]);
    const unsigned g = lane / 4;
    const unsigned t = lane % 4;
    for (unsigned r = 0; r < 4; ++r) a[g + (r % 2) * 8][t + (r / 2) * 4] = value(own.a[r]);
    for (unsigned r = 0; r < 2; ++r) b[t + 4 * r][g] = value(own.b[r]);
  }
  multiply_m16n8(payloads, a, b);
}

struct MmaF64 {
  double* acc;
  double a;
  double b;
};

void complete_m8n8k4_f64(Payloads payloads) {
  const auto lane_of = [&](unsigned lane) -> const MmaF64& {
    return *static_cast<const MmaF64*>(payloads[lane]);
  };
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const unsigned row = lane / 4;
    for (unsigned j = 0; j < 2; ++j) {
      const unsigned column = 2 * (lane % 4) + j;
      for (unsigned k = 0; k < 4; ++k) {
        lane_of(lane).acc[j] += lane_of(4 * row + k).a * lane_of(4 * column + k).b;
      }
    }
  }
}

// Once per warp instruction: all lanes take part.
void count_product(const char* name, uintptr_t site, uint64_t m, uint64_t n, uint64_t k) {
  if (counting && current_thread(name).lane == 0) count_mma(site, 2 * m * n * k);
}

void collect_mma(const char* name, void (*complete)(Payloads), float* acc, const uint32_t* a,
                 const uint32_t* b, Where where) {
  Mma payload{acc, a, b};
  collect(name, ~0u, true, complete, payload, where);
}

}  // namespace

void shuffle(const char* name, unsigned mask, const void* in, void* out, size_t bytes,
             int source_lane, Where where) {
  Shuffle payload{in, out, bytes, source_lane};
  if (counting) {
    const Thread& thread = current_thread(name);
    const unsigned lanes = mask & thread.warp->present;
    const bool first = (lanes & ((1u << thread.lane) - 1)) == 0;
    if (first) count_shuffle(DYHEAD_SIMT_SITE, bytes, lanes);
  }
  collect(name, mask, false, complete_shuffle, payload, where);
}

unsigned ballot(const char* name, unsigned mask, bool predicate, Where where) {
  Vote payload{predicate, 0};
  collect(name, mask, false, complete_vote, payload, where);
  return payload.ballot;
}

void warp_barrier(unsigned mask, Where where) {
  char nothing = 0;
  collect("__syncwarp", mask, false, [](Payloads) {}, nothing, where);
}

void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed, Where where) {
  const Thread& thread = current_thread("ldmatrix");
  // Lanes beyond the last matrix pass an address that is not used.
  if (thread.lane < 8 * static_cast<unsigned>(matrices)) {
    check_aligned("ldmatrix", row, 16);
    if (!thread.block->is_shared(row, 16)) {
      fail("ldmatrix at " + to_string(where) + ": the row is not inside one shared array");
    }
  }
  LoadMatrix payload{registers, row, matrices, transposed, DYHEAD_SIMT_SITE};
  collect("ldmatrix", ~0u, true, complete_ldmatrix, payload, where);
}

void mma_m16n8k16(float* acc, const uint32_t* a, const uint32_t* b, bool is_bfloat16, Where where) {
  count_product("mma_m16n8k16", DYHEAD_SIMT_SITE, 16, 8, 16);
  collect_mma("mma_m16n8k16",
              is_bfloat16 ? complete_m16n8k16<bfloat16> : complete_m16n8k16<float16>, acc, a, b,
              where);
}

void mma_m16n8k8_tf32(float* acc, const uint32_t* a, const uint32_t* b, Where where) {
  count_product("mma_m16n8k8_tf32", DYHEAD_SIMT_SITE, 16, 8, 8);
  collect_mma("mma_m16n8k8_tf32", complete_m16n8k8_tf32, acc, a, b, where);
}

void mma_m8n8k4_f64(double* acc, double a, double b, Where where) {
  count_product("mma_m8n8k4_f64", DYHEAD_SIMT_SITE, 8, 8, 4);
  MmaF64 payload{acc, a, b};
  collect("mma_m8n8k4_f64", ~0u, true, complete_m8n8k4_f64, payload, where);
}

}  // namespace dyhead::simt
