// The emulator's own test kernels, and the conversions of common/dtypes.h.
#include "bindings.h"
#include "device_array.h"
#include "kernels/basics.h"
#include "kernels/gemm_tile.h"
#include "kernels/sort.h"
#include "kernels/storage.h"

namespace dyhead::simt {
namespace {

using namespace dyhead::simt_test;

DeviceArray<float>::Array reverse(const py::array& in, bool with_barrier) {
  const auto input = DeviceArray<float>::copy_of("in", in);
  const auto output = DeviceArray<float>::poisoned("out", {input.shape(0), input.shape(1)});
  check_launch("launch_reverse", launch_reverse({.in = input.data(),
                                                 .out = output.data(),
                                                 .blocks = static_cast<int>(input.shape(0)),
                                                 .with_barrier = with_barrier},
                                                nullptr));
  return output.to_numpy();
}

py::tuple warp(const py::array& in, int width) {
  const auto input = DeviceArray<float>::copy_of("in", in);
  const auto shuffled = DeviceArray<float>::poisoned("shuffled", {5, input.shape(0)});
  const auto votes = DeviceArray<unsigned>::poisoned("votes", {3, input.shape(0)});
  check_launch("launch_warp", launch_warp({.in = input.data(),
                                           .shuffled = shuffled.data(),
                                           .votes = votes.data(),
                                           .threads = static_cast<int>(input.shape(0)),
                                           .width = width},
                                          nullptr));
  return py::make_tuple(shuffled.to_numpy(), votes.to_numpy());
}

py::dict atomics(const py::array& in) {
  const auto input = DeviceArray<int>::copy_of("in", in);
  const auto float_sum = DeviceArray<float>::zeros("float_sum", {1});
  const auto double_sum = DeviceArray<double>::zeros("double_sum", {1});
  const auto extremes = DeviceArray<int>::zeros("extremes", {2});
  const auto sum = DeviceArray<unsigned long long>::zeros("sum", {1});
  const auto lock = DeviceArray<unsigned>::zeros("lock", {2});
  const auto vector_sum = DeviceArray<float>::zeros("vector_sum", {4});
  check_launch("launch_atomic", launch_atomic({.in = input.data(),
                                               .float_sum = float_sum.data(),
                                               .double_sum = double_sum.data(),
                                               .extremes = extremes.data(),
                                               .sum = sum.data(),
                                               .lock = lock.data(),
                                               .vector_sum = vector_sum.data(),
                                               .n = static_cast<int>(input.shape(0))},
                                              nullptr));
  py::dict result;
  result["float_sum"] = float_sum.to_numpy();
  result["double_sum"] = double_sum.to_numpy();
  result["extremes"] = extremes.to_numpy();
  result["sum"] = sum.to_numpy();
  result["lock"] = lock.to_numpy();
  result["vector_sum"] = vector_sum.to_numpy();
  return result;
}

DeviceArray<float>::Array handshake(const py::array& in, bool cooperative) {
  const auto input = DeviceArray<float>::copy_of("in", in);
  const auto output = DeviceArray<float>::poisoned("out", {input.shape(0)});
  const auto partial = DeviceArray<float>::poisoned("partial", {input.shape(0)});
  const auto arrived = DeviceArray<unsigned>::zeros("arrived", {1});
  check_launch("launch_handshake", launch_handshake({.in = input.data(),
                                                     .out = output.data(),
                                                     .partial = partial.data(),
                                                     .arrived = arrived.data(),
                                                     .blocks = static_cast<int>(input.shape(0)),
                                                     .cooperative = cooperative},
                                                    nullptr));
  return output.to_numpy();
}

DeviceArray<float>::Array async_copy(const py::array& in, int valid, bool with_wait) {
  const auto input = DeviceArray<float>::copy_of("in", in);
  const auto output = DeviceArray<float>::poisoned("out", {input.shape(0), input.shape(1)});
  check_launch(
      "launch_async_copy",
      launch_async_copy(
          {.in = input.data(), .out = output.data(), .valid = valid, .with_wait = with_wait},
          nullptr));
  return output.to_numpy();
}

DeviceArray<float>::Array fault(const py::array& in, Fault kind) {
  const auto input = DeviceArray<float>::copy_of("in", in);
  const auto output = DeviceArray<float>::poisoned("out", {64});
  const auto flag = DeviceArray<unsigned>::zeros("flag", {1});
  check_launch(
      "launch_fault",
      launch_fault({.in = input.data(), .out = output.data(), .flag = flag.data(), .fault = kind},
                   nullptr));
  return output.to_numpy();
}

template <class T>
DeviceArray<float>::Array gemm_tile(const py::array& a, const py::array& b) {
  const auto left = DeviceArray<T>::copy_of("a", a);
  const auto right = DeviceArray<T>::copy_of("b", b);
  const auto output = DeviceArray<float>::poisoned("c", {64, 64});
  check_launch("launch_gemm_tile",
               launch_gemm_tile(GemmTileParams<T>{.a = left.data(),
                                                  .b = right.data(),
                                                  .c = output.data(),
                                                  .depth = static_cast<int>(left.shape(1))},
                                nullptr));
  return output.to_numpy();
}

DeviceArray<uint32_t>::Array sort(const py::array& keys, uint32_t first, uint32_t range) {
  const auto input = DeviceArray<uint32_t>::copy_of("keys", keys);
  const auto output = DeviceArray<uint32_t>::poisoned("order", {input.shape(0)});
  check_launch("launch_sort", launch_sort({.keys = input.data(),
                                           .order = output.data(),
                                           .count = static_cast<int>(input.shape(0)),
                                           .first = first,
                                           .range = range},
                                          nullptr));
  return output.to_numpy();
}

DeviceArray<float>::Array tf32_tile(const py::array& a, const py::array& b) {
  const auto left = DeviceArray<float>::copy_of("a", a);
  const auto right = DeviceArray<float>::copy_of("b", b);
  const auto output = DeviceArray<float>::poisoned("c", {16, 8});
  check_launch("launch_tf32_tile", launch_tf32_tile({.a = left.data(),
                                                     .b = right.data(),
                                                     .c = output.data(),
                                                     .depth = static_cast<int>(left.shape(1))},
                                                    nullptr));
  return output.to_numpy();
}

DeviceArray<double>::Array f64_tile(const py::array& a, const py::array& b) {
  const auto left = DeviceArray<double>::copy_of("a", a);
  const auto right = DeviceArray<double>::copy_of("b", b);
  const auto output = DeviceArray<double>::poisoned("c", {8, 8});
  check_launch("launch_f64_tile", launch_f64_tile({.a = left.data(),
                                                   .b = right.data(),
                                                   .c = output.data(),
                                                   .depth = static_cast<int>(left.shape(1))},
                                                  nullptr));
  return output.to_numpy();
}

DeviceArray<unsigned>::Array transpose(const py::array& in) {
  const auto input = DeviceArray<uint16_t>::copy_of("in", in);
  const auto output = DeviceArray<unsigned>::poisoned("out", {input.shape(0), 8, 4});
  check_launch("launch_transpose", launch_transpose({.in = input.data(),
                                                     .out = output.data(),
                                                     .matrices = static_cast<int>(input.shape(0))},
                                                    nullptr));
  return output.to_numpy();
}

template <class T>
py::dict storage(const py::array& in) {
  const auto input = DeviceArray<T>::copy_of("in", in);
  const auto by_value = DeviceArray<T>::poisoned("by_value", {input.shape(0)});
  const auto by_pair = DeviceArray<T>::poisoned("by_pair", {input.shape(0)});
  const auto sum = DeviceArray<float>::zeros("sum", {1});
  const auto flag = DeviceArray<unsigned>::zeros("flag", {1});
  const auto seen = DeviceArray<unsigned>::poisoned("seen", {128});
  check_launch("launch_storage",
               launch_storage(StorageParams<T>{.in = input.data(),
                                               .by_value = by_value.data(),
                                               .by_pair = by_pair.data(),
                                               .sum = sum.data(),
                                               .flag = flag.data(),
                                               .seen = seen.data(),
                                               .n = static_cast<int>(input.shape(0))},
                              nullptr));
  py::dict result;
  result["by_value"] = by_value.to_numpy();
  result["by_pair"] = by_pair.to_numpy();
  result["sum"] = sum.to_numpy();
  result["seen"] = seen.to_numpy();
  return result;
}

void bind_faults(py::module_& module) {
  py::enum_<Fault>(module, "Fault")
      .value("none", Fault::kNone)
      .value("divergent_barrier", Fault::kDivergentBarrier)
      .value("barrier_after_collective", Fault::kBarrierAfterCollective)
      .value("divergent_collective", Fault::kDivergentCollective)
      .value("mask_mismatch", Fault::kMaskMismatch)
      .value("not_in_mask", Fault::kNotInMask)
      .value("never_signalled", Fault::kNeverSignalled)
      .value("spin_lock", Fault::kSpinLock)
      .value("partial_warp_mma", Fault::kPartialWarpMma)
      .value("uninitialised_shared", Fault::kUninitialisedShared)
      .value("shared_overrun", Fault::kSharedOverrun)
      .value("shared_underrun", Fault::kSharedUnderrun)
      .value("dynamic_overrun", Fault::kDynamicOverrun)
      .value("dynamic_overlap", Fault::kDynamicOverlap)
      .value("global_overrun", Fault::kGlobalOverrun)
      .value("global_overread", Fault::kGlobalOverread)
      .value("misaligned_vector", Fault::kMisalignedVector)
      .value("misaligned_copy", Fault::kMisalignedCopy)
      .value("copy_outside_shared", Fault::kCopyOutsideShared)
      .value("unwritten_output", Fault::kUnwrittenOutput)
      .value("forgotten_copy", Fault::kForgottenCopy);
  module.def("fault", &fault);
}

void bind(py::module_& module) {
  auto emulator = module.def_submodule("emulator", "Test kernels of the emulation itself.");
  emulator.def("reverse", &reverse);
  emulator.def("warp", &warp);
  emulator.def("atomics", &atomics);
  emulator.def("handshake", &handshake);
  emulator.def("async_copy", &async_copy);
  emulator.def("gemm_tile_bf16", &gemm_tile<bfloat16>);
  emulator.def("gemm_tile_fp16", &gemm_tile<float16>);
  emulator.def("sort", &sort);
  emulator.def("tf32_tile", &tf32_tile);
  emulator.def("f64_tile", &f64_tile);
  emulator.def("transpose", &transpose);
  emulator.def("storage_bf16", &storage<bfloat16>);
  emulator.def("storage_fp16", &storage<float16>);
  bind_faults(emulator);

  emulator.def("bfloat16_to_float",
               py::vectorize([](uint16_t bits) { return to_compute(bfloat16{bits}); }));
  emulator.def("float16_to_float",
               py::vectorize([](uint16_t bits) { return to_compute(float16{bits}); }));
  emulator.def("float_to_bfloat16",
               py::vectorize([](float x) { return from_compute<bfloat16>(x).bits; }));
  emulator.def("float_to_float16",
               py::vectorize([](float x) { return from_compute<float16>(x).bits; }));
}

const Bindings bindings(bind);

}  // namespace
}  // namespace dyhead::simt
