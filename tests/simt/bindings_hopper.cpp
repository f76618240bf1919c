// The test kernels of hopper.cuh's functions.
#include "bindings.h"
#include "device_array.h"
#include "kernels/hopper.h"

namespace dyhead::simt {
namespace {

using namespace dyhead::simt_test;

DeviceArray<float>::Array pipeline(const py::array& a, const py::array& b, int cluster,
                                   PipelineFault fault) {
  const auto left = DeviceArray<uint16_t>::copy_of("a", a);
  const auto right = DeviceArray<uint8_t>::copy_of("b", b);
  const auto out = DeviceArray<float>::poisoned("out", {left.shape(0), 256});
  check_launch("launch_pipeline",
               launch_pipeline({.a = left.data(),
                                .b = reinterpret_cast<const std::byte*>(right.data()),
                                .out = out.data(),
                                .depth = static_cast<int>(left.shape(1)),
                                .blocks = static_cast<int>(left.shape(0) / 64),
                                .cluster = cluster,
                                .fault = fault},
                               nullptr));
  return out.to_numpy();
}

DeviceArray<float>::Array product(const py::array& left, const py::array& right,
                                  const py::array& sums, int offset, int shared_left, bool adds,
                                  bool is_bfloat16, ProductFault fault) {
  const auto registers = DeviceArray<uint32_t>::copy_of("left", left);
  const auto rows = DeviceArray<uint8_t>::copy_of("right", right);
  const auto before = DeviceArray<float>::copy_of("sums", sums);
  const auto out = DeviceArray<float>::poisoned("out", {before.shape(0), before.shape(1)});
  check_launch("launch_product",
               launch_product({.left = registers.data(),
                               .right = reinterpret_cast<const std::byte*>(rows.data()),
                               .sums = before.data(),
                               .out = out.data(),
                               .bytes = static_cast<int>(rows.shape(0)),
                               .offset = offset,
                               .shared_left = shared_left,
                               .n = static_cast<int>(before.shape(1)) * 2,
                               .adds = adds,
                               .is_bfloat16 = is_bfloat16,
                               .fault = fault},
                              nullptr));
  return out.to_numpy();
}

DeviceArray<float>::Array copy(const py::array& in, int cluster, CopyFault fault) {
  const auto input = DeviceArray<float>::copy_of("in", in);
  const auto out = DeviceArray<float>::poisoned("out", {input.shape(0), input.shape(1)});
  check_launch("launch_copy", launch_copy({.in = input.data(),
                                           .out = out.data(),
                                           .blocks = static_cast<int>(input.shape(0)),
                                           .cluster = cluster,
                                           .fault = fault},
                                          nullptr));
  return out.to_numpy();
}

DeviceArray<float>::Array meeting(const py::array& in, int cluster, bool cooperative,
                                  MeetingFault fault) {
  const auto input = DeviceArray<float>::copy_of("in", in);
  const auto out = DeviceArray<float>::poisoned("out", {input.shape(0), input.shape(1)});
  check_launch("launch_meeting", launch_meeting({.in = input.data(),
                                                 .out = out.data(),
                                                 .blocks = static_cast<int>(input.shape(0)),
                                                 .cluster = cluster,
                                                 .cooperative = cooperative,
                                                 .fault = fault},
                                                nullptr));
  return out.to_numpy();
}

DeviceArray<float>::Array registers(RegisterFault fault) {
  const auto out = DeviceArray<float>::poisoned("out", {384});
  check_launch("launch_registers", launch_registers({.out = out.data(), .fault = fault}, nullptr));
  return out.to_numpy();
}

void bind_faults(py::module_& m) {
  py::enum_<PipelineFault>(m, "PipelineFault")
      .value("none", PipelineFault::kNone)
      .value("no_full_wait", PipelineFault::kNoFullWait)
      .value("no_expect", PipelineFault::kNoExpect)
      .value("no_empty_wait", PipelineFault::kNoEmptyWait)
      .value("early_release", PipelineFault::kEarlyRelease)
      .value("one_releases", PipelineFault::kOneReleases)
      .value("constant_parity", PipelineFault::kConstantParity)
      .value("no_wgmma_fence", PipelineFault::kNoWgmmaFence)
      .value("left_unfenced", PipelineFault::kLeftUnfenced)
      .value("left_modified", PipelineFault::kLeftModified)
      .value("sums_early", PipelineFault::kSumsEarly)
      .value("sums_modified", PipelineFault::kSumsModified)
      .value("no_commit", PipelineFault::kNoCommit)
      .value("no_wait", PipelineFault::kNoWait)
      .value("no_init_fence", PipelineFault::kNoInitFence)
      .value("no_init_sync", PipelineFault::kNoInitSync)
      .value("no_last_sync", PipelineFault::kNoLastSync)
      .value("under_arrival", PipelineFault::kUnderArrival)
      .value("wrong_row", PipelineFault::kWrongRow)
      .value("wrong_swizzle", PipelineFault::kWrongSwizzle)
      .value("ordinary_store", PipelineFault::kOrdinaryStore)
      .value("fenced_store", PipelineFault::kFencedStore)
      .value("store_to_barrier", PipelineFault::kStoreToBarrier);
  py::enum_<ProductFault>(m, "ProductFault")
      .value("none", ProductFault::kNone)
      .value("other_operand", ProductFault::kOtherOperand)
      .value("missing_warp", ProductFault::kMissingWarp)
      .value("other_place", ProductFault::kOtherPlace)
      .value("other_adds", ProductFault::kOtherAdds)
      .value("no_proxy_fence", ProductFault::kNoProxyFence)
      .value("left_written", ProductFault::kLeftWritten);
  py::enum_<CopyFault>(m, "CopyFault")
      .value("none", CopyFault::kNone)
      .value("misaligned_target", CopyFault::kMisalignedTarget)
      .value("misaligned_source", CopyFault::kMisalignedSource)
      .value("misaligned_size", CopyFault::kMisalignedSize)
      .value("outside_shared", CopyFault::kOutsideShared)
      .value("outside_source", CopyFault::kOutsideSource)
      .value("no_blocks", CopyFault::kNoBlocks)
      .value("other_blocks", CopyFault::kOtherBlocks)
      .value("overlap", CopyFault::kOverlap)
      .value("over_barrier", CopyFault::kOverBarrier)
      .value("no_barrier", CopyFault::kNoBarrier)
      .value("source_written", CopyFault::kSourceWritten)
      .value("target_written", CopyFault::kTargetWritten)
      .value("no_proxy_fence", CopyFault::kNoProxyFence)
      .value("init_twice", CopyFault::kInitTwice)
      .value("over_arrival", CopyFault::kOverArrival)
      .value("expects_more", CopyFault::kExpectsMore)
      .value("expects_less", CopyFault::kExpectsLess)
      .value("not_awaited", CopyFault::kNotAwaited)
      .value("not_requested", CopyFault::kNotRequested)
      .value("peer_ended", CopyFault::kPeerEnded)
      .value("never_copied", CopyFault::kNeverCopied)
      .value("late_wait", CopyFault::kLateWait)
      .value("overtaken", CopyFault::kOvertaken);
  py::enum_<MeetingFault>(m, "MeetingFault")
      .value("none", MeetingFault::kNone)
      .value("no_barrier", MeetingFault::kNoBarrier)
      .value("other_count", MeetingFault::kOtherCount)
      .value("part_warps", MeetingFault::kPartWarps)
      .value("half_warp", MeetingFault::kHalfWarp)
      .value("barrier_zero", MeetingFault::kBarrierZero)
      .value("missing_warp", MeetingFault::kMissingWarp)
      .value("divergent_lanes", MeetingFault::kDivergentLanes)
      .value("divergent_cluster", MeetingFault::kDivergentCluster)
      .value("missing_in_cluster", MeetingFault::kMissingInCluster);
  py::enum_<RegisterFault>(m, "RegisterFault")
      .value("none", RegisterFault::kNone)
      .value("no_give", RegisterFault::kNoGive)
      .value("give_more", RegisterFault::kGiveMore)
      .value("take_less", RegisterFault::kTakeLess)
      .value("one_warp", RegisterFault::kOneWarp);
}

void bind(py::module_& module) {
  auto m = module.def_submodule("hopper", "Test kernels of csrc/cuda/tile/hopper.cuh.");
  bind_faults(m);
  m.def("pipeline", &pipeline, py::arg("a"), py::arg("b"), py::arg("cluster") = 1,
        py::arg("fault") = PipelineFault::kNone);
  m.def("product", &product, py::arg("left"), py::arg("right"), py::arg("sums"), py::kw_only(),
        py::arg("offset") = 0, py::arg("shared_left") = -1, py::arg("adds") = true,
        py::arg("is_bfloat16") = true, py::arg("fault") = ProductFault::kNone);
  m.def("copy", &copy, py::arg("rows"), py::arg("cluster") = 1,
        py::arg("fault") = CopyFault::kNone);
  m.def("meeting", &meeting, py::arg("rows"), py::arg("cluster") = 1, py::kw_only(),
        py::arg("cooperative") = false, py::arg("fault") = MeetingFault::kNone);
  m.def("registers", &registers, py::arg("fault") = RegisterFault::kNone);
  m.def("unit_offset", py::vectorize(&tile_offset),
        "Where a unit of 16 bytes of a row is in a tile of tile_gemm.cuh.");
}

const Bindings bindings(bind);

}  // namespace
}  // namespace dyhead::simt
