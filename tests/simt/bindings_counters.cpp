// What counters.h counted, for Python.
#include <dlfcn.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "counters.h"
#include "device_array.h"
#include "kernels/accesses.h"

namespace dyhead::simt {
namespace {

using namespace dyhead::simt_test;

const char* name_of(Access access) {
  switch (access) {
    case Access::kGlobalLoad:
      return "global load";
    case Access::kGlobalStore:
      return "global store";
    case Access::kAtomic:
      return "atomic";
    case Access::kAsyncRead:
      return "async read";
    case Access::kAsyncWrite:
      return "async write";
    case Access::kSharedLoad:
      return "shared load";
    case Access::kSharedStore:
      return "shared store";
    case Access::kLdmatrix:
      return "ldmatrix";
    case Access::kShuffle:
      return "shuffle";
    case Access::kMma:
      return "mma";
    case Access::kOperandRead:
      return "operand read";
    case Access::kBarrier:
      return "barrier";
  }
  return "";
}

// The library that holds an address, and the offset in it.
py::tuple place_of(uintptr_t address) {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(address), &info) == 0) return py::make_tuple("", 0);
  return py::make_tuple(info.dli_fname, address - reinterpret_cast<uintptr_t>(info.dli_fbase));
}

DeviceArray<float>::Array run_accesses(Pattern pattern, int stride) {
  const auto input = DeviceArray<float>::zeros("in", {4096});
  const auto output = DeviceArray<float>::zeros("out", {4096});
  check_launch("launch_accesses",
               launch_accesses(
                   {.in = input.data(), .out = output.data(), .pattern = pattern, .stride = stride},
                   nullptr));
  return output.to_numpy();
}

void bind_patterns(py::module_& module) {
  py::enum_<Pattern>(module, "Pattern")
      .value("load4", Pattern::kLoad4)
      .value("load16", Pattern::kLoad16)
      .value("store4", Pattern::kStore4)
      .value("shared4", Pattern::kShared4)
      .value("shared8", Pattern::kShared8)
      .value("shared16", Pattern::kShared16)
      .value("shared_row", Pattern::kSharedRow)
      .value("broadcast", Pattern::kBroadcast)
      .value("ldmatrix", Pattern::kLdmatrix)
      .value("async_copy", Pattern::kAsync)
      .value("atomic4", Pattern::kAtomic4)
      .value("atomic16", Pattern::kAtomic16)
      .value("uneven", Pattern::kUneven)
      .value("twice", Pattern::kTwice)
      .value("mma", Pattern::kMma);
  module.def("run_accesses", &run_accesses, "The test kernel whose costs are known.");
}

py::list read() {
  py::list records;
  for (const auto& [key, count] : counts()) {
    py::dict record;
    record["kernel"] = place_of(key.kernel);
    record["place"] = place_of(key.site);
    record["access"] = name_of(key.access);
    record["bytes"] = key.bytes;
    record["instructions"] = count.instructions;
    record["lanes"] = count.lanes;
    record["sectors"] = count.sectors;
    record["lines"] = count.lines;
    record["l2_sectors"] = count.l2_sectors;
    record["wavefronts"] = count.wavefronts;
    record["ideal_wavefronts"] = count.ideal_wavefronts;
    record["flop"] = count.flop;
    records.append(record);
  }
  return records;
}

py::list kernels() {
  py::list records;
  for (const auto& [address, kernel] : kernel_counts()) {
    py::dict record;
    record["kernel"] = place_of(address);
    record["launches"] = kernel.launches;
    record["blocks"] = kernel.blocks;
    record["sampled_blocks"] = kernel.sampled_blocks;
    record["threads"] = kernel.threads;
    record["shared_bytes"] = kernel.shared_bytes;
    py::dict arrays;
    for (const auto& [name, array] : kernel.arrays) {
      py::dict entry;
      entry["bytes"] = array.bytes;
      entry["loads"] = array.loads;
      entry["stores"] = array.stores;
      entry["atomics"] = array.atomics;
      entry["l2_loads"] = array.l2_loads;
      entry["distinct_read"] = array.distinct_read;
      entry["distinct_written"] = array.distinct_written;
      arrays[name.c_str()] = entry;
    }
    record["arrays"] = arrays;
    records.append(record);
  }
  return records;
}

void bind(py::module_& module) {
  auto m =
      module.def_submodule("counters", "What a device would charge for the kernels' accesses.");
  m.def(
      "reset",
      [](bool vector_atomics, size_t l1_bytes, size_t sampled_blocks) {
        reset_counts({vector_atomics, l1_bytes, sampled_blocks});
      },
      py::kw_only(), py::arg("vector_atomics") = true, py::arg("l1_bytes") = 64 * 1024,
      py::arg("sampled_blocks") = 0);
  bind_patterns(m);
  m.def("read", &read, "Counts since the last reset, by kernel, place and kind of access.");
  m.def("kernels", &kernels, "Launches and arrays since the last reset, by kernel.");
}

const Bindings bindings(bind);

}  // namespace
}  // namespace dyhead::simt
