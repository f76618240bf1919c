// What the files of the emulation that know of clusters and bulk copies offer to each other.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "block.h"

namespace dyhead::simt {

// ---- cluster.cpp --------------------------------------------------------------------------------

// Where block `rank` of the cluster has these bytes of a shared array of the running thread's
// block. Fails if it is not there or has ended.
std::byte* in_peer(const char* what, const void* p, size_t bytes, unsigned rank, Where where);
// "'name' + 16" for an address in a shared array.
std::string place_of(const Block& block, const void* p);
// "'bars' + 8 of block (1, 0, 0)"
std::string place_in(const Block& block, const void* p);
void release_if_met(Cluster& cluster);

// ---- mbarrier.cpp -------------------------------------------------------------------------------

// What all threads of the block, or of the cluster, have written is now known to all of them.
void publish_barriers(Block& block, bool to_cluster);
// The barrier at p in a block of the running thread's cluster, for what the thread or a bulk copy
// that it issues does there. Fails if it may not use the barrier.
MBarrierState& find_mbarrier(const char* what, Block& block, const std::byte* p, bool by_copy,
                             Where where);
// Fails if bytes were copied that no phase expected, or expected and never copied.
void check_no_bytes(const Block& block);
void complete_bytes(Block& block, const std::byte* p, unsigned bytes, Where where);

// ---- bulk_copy.cpp ------------------------------------------------------------------------------

bool copies_under_way();
// Whether one of them should land now.
bool copy_lands();
void land_copy();
void forget_copies();
// Fails if a copy under way writes to these bytes of the block, or counts at a barrier there.
void check_no_copy(const char* what, const Block& block, const void* p, size_t bytes, Where where);
void check_no_copy_to(const Block& block);
// The contents of an array as the asynchronous proxy sees them.
std::byte* async_view(Block& block, const GuardedMemory& array);

// ---- wgmma_operand.cpp --------------------------------------------------------------------------

// The operand `name` of a product, where a matrix descriptor says. Fails if the asynchronous proxy
// has not seen all of it.
std::shared_ptr<const SharedOperand> read_shared(Block& block, const char* name,
                                                 uint64_t descriptor, int rows, bool is_bfloat16,
                                                 Where where);
// Fails, saying `changed` of the operand, if it is not what the first warp found.
void check_unchanged(const Block& block, const SharedOperand* operand, const std::string& call,
                     const char* changed);

// ---- wgmma.cpp ----------------------------------------------------------------------------------

void check_no_products(const Thread& thread);
void check_same_products(const Block& block);
void check_same_registers(const Block& block);

}  // namespace dyhead::simt
