// What counters.h counted, for Python.
#include <dlfcn.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "counters.h"

namespace dyhead::simt {
namespace {

namespace py = pybind11;

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

py::list read() {
  py::list records;
  for (const auto& [key, count] : counts()) {
    py::dict record;
    record["kernel"] = kernel_counts().at(key.kernel).name;
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
    record["kernel"] = kernel.name;
    record["launches"] = kernel.launches;
    record["blocks"] = kernel.blocks;
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
      [](bool vector_atomics, size_t l1_bytes) { reset_counts({vector_atomics, l1_bytes}); },
      py::kw_only(), py::arg("vector_atomics") = true, py::arg("l1_bytes") = 64 * 1024);
  m.def("read", &read, "Counts since the last reset, by kernel, place and kind of access.");
  m.def("kernels", &kernels, "Launches and arrays since the last reset, by kernel.");
}

const Bindings bindings(bind);

}  // namespace
}  // namespace dyhead::simt
