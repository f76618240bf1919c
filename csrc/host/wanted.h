// Which results a backward operator computes. Autograd knows which gradients nobody needs, of
// frozen weights for example.
#pragma once

#include <initializer_list>
#include <vector>

#include "maps.h"

namespace dyhead {

class Wanted {
 public:
  // `flags` has 1 for each result that is wanted and 0 for each that is not, in their order.
  Wanted(const IntList& flags, size_t results) : flags_(flags) {
    STD_TORCH_CHECK(flags.size() == results, "expected wanted to have a number for each of the ",
                    results, " gradients, got ", flags.size());
    for (const int64_t flag : flags) narrow("a number of wanted", flag, 0, 1);
  }

  bool operator[](size_t result) const { return flags_[result] != 0; }

  // The memory of a result, whose address goes to `data`. One that is not wanted is an empty tensor
  // [0] without an address; where `written` says that the kernels write it in any case, the address
  // of memory that lasts as long as this.
  Tensor allocate(size_t result, bool written, const Tensor& like,
                  std::initializer_list<int64_t> sizes, ScalarType type, void*& data) {
    const bool wanted = (*this)[result];
    data = nullptr;
    if (!wanted && !written) return torch::stable::new_empty(like, {0}, type);
    const Tensor memory = torch::stable::new_empty(like, sizes, type);
    data = memory.mutable_data_ptr();
    if (wanted) return memory;
    unwanted_.push_back(memory);
    return torch::stable::new_empty(like, {0}, type);
  }

 private:
  const IntList& flags_;
  std::vector<Tensor> unwanted_;
};

}  // namespace dyhead
