// The launchers of pack_levels, called as the operator calls them.
#include <pybind11/stl.h>

#include <deque>
#include <vector>

#include "bindings.h"
#include "cuda/pack_levels/pack_levels.h"
#include "device_array.h"

namespace dyhead::simt {
namespace {

using namespace dyhead::cuda;

struct Level {
  int64_t first_row;
  int32_t height, width;
};

// Arrays are unsigned integers of the elements' size. They travel flat, behind `skew` elements that
// move them off their alignment.
template <class E>
py::array pack(int64_t images, int64_t channels, const std::vector<Level>& levels,
               const std::vector<py::array>& data, const std::vector<bool>& channels_last,
               py::ssize_t skew, int32_t max_blocks) {
  std::deque<DeviceArray<E>> memory;
  PackParams params{images, channels, sizeof(E), nullptr, {}};
  int64_t rows = 0;
  for (size_t l = 0; l < levels.size(); ++l) {
    memory.push_back(DeviceArray<E>::copy_of("level", data.at(l)));
    const MapShape map{levels[l].first_row, levels[l].height, levels[l].width};
    params.levels.push_back({map, memory.back().data() + skew, channels_last.at(l)});
    rows += images * map.pixels();
  }
  const auto out = DeviceArray<E>::poisoned("rows", {skew + rows * channels});
  params.rows = out.data() + skew;
  check_launch("launch_pack_levels",
               launch_pack_levels(params, pack_tables(params, max_blocks), nullptr));
  return out.to_numpy();
}

template <class E>
std::vector<py::array> unpack(int64_t images, int64_t channels, const std::vector<Level>& levels,
                              const py::array& data, py::ssize_t skew, int32_t max_blocks) {
  const auto rows = DeviceArray<E>::copy_of("rows", data);
  std::deque<DeviceArray<E>> memory;
  PackParams params{images, channels, sizeof(E), rows.data() + skew, {}};
  for (const Level& level : levels) {
    const MapShape map{level.first_row, level.height, level.width};
    memory.push_back(DeviceArray<E>::poisoned("level", {skew + images * map.pixels() * channels}));
    params.levels.push_back({map, memory.back().data() + skew, false});
  }
  check_launch("launch_unpack_levels",
               launch_unpack_levels(params, pack_tables(params, max_blocks), nullptr));
  std::vector<py::array> results;
  for (const DeviceArray<E>& array : memory) results.push_back(array.to_numpy());
  return results;
}

void bind(py::module_& module) {
  py::module_ m = module.def_submodule("pack_levels", "csrc/cuda/pack_levels/pack_levels.h");
  m.attr("levels_per_launch") = kPackLevels;
  py::class_<Level>(m, "Level")
      .def(py::init([](int64_t first_row, int32_t height, int32_t width) {
             return Level{first_row, height, width};
           }),
           py::arg("first_row"), py::arg("height"), py::arg("width"));
  m.def(
      "pack",
      [](int64_t element_bytes, int64_t images, int64_t channels, const std::vector<Level>& levels,
         const std::vector<py::array>& data, const std::vector<bool>& channels_last,
         py::ssize_t skew, int32_t max_blocks) {
        return dispatch_element(element_bytes, [&](auto e) {
          return pack<decltype(e)>(images, channels, levels, data, channels_last, skew, max_blocks);
        });
      },
      py::arg("element_bytes"), py::arg("images"), py::arg("channels"), py::arg("levels"),
      py::arg("data"), py::arg("channels_last"), py::kw_only(), py::arg("skew"),
      py::arg("max_blocks"));
  m.def(
      "unpack",
      [](int64_t element_bytes, int64_t images, int64_t channels, const std::vector<Level>& levels,
         const py::array& rows, py::ssize_t skew, int32_t max_blocks) {
        return dispatch_element(element_bytes, [&](auto e) {
          return unpack<decltype(e)>(images, channels, levels, rows, skew, max_blocks);
        });
      },
      py::arg("element_bytes"), py::arg("images"), py::arg("channels"), py::arg("levels"),
      py::arg("rows"), py::kw_only(), py::arg("skew"), py::arg("max_blocks"));
}

const Bindings bindings(bind);

}  // namespace
}  // namespace dyhead::simt
