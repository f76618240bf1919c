// pack_levels and unpack_levels on the CPU: one pass over each level, in blocks of pixels whose
// rows stay in the cache while a few channels at a time are moved.
#include "../common/pack_levels.h"

#include <algorithm>
#include <vector>

#include "context.h"
#include "parallel.h"
#include "transpose.h"

namespace dyhead::cpu {
namespace {

constexpr int64_t kPixels = 64;  // of a task

// Calls f(level, image, first pixel, pixels) for blocks that cover all levels.
template <class F>
void for_each_block(const PackParams& p, F&& f) {
  std::vector<int64_t> first_task{0};
  for (const PackLevel& level : p.levels) {
    first_task.push_back(first_task.back() + p.images * ceil_div(level.map.pixels(), kPixels));
  }
  parallel_for_each(first_task.back(), [&](int64_t task) {
    const auto after = std::upper_bound(first_task.begin(), first_task.end(), task);
    const int64_t l = after - first_task.begin() - 1;
    const PackLevel& level = p.levels[l];
    const int64_t blocks = ceil_div(level.map.pixels(), kPixels);
    const int64_t image = (task - first_task[l]) / blocks;
    const int64_t first = (task - first_task[l]) % blocks * kPixels;
    f(level, image, first, std::min(kPixels, level.map.pixels() - first));
  });
}

template <class E>
void pack(const PackParams& p) {
  for_each_block(p, [&](const PackLevel& level, int64_t image, int64_t first, int64_t count) {
    const int64_t pixels = level.map.pixels();
    const E* data = static_cast<const E*>(level.data) + image * pixels * p.channels;
    E* rows = static_cast<E*>(p.rows) + (level.map.first_row + image * pixels + first) * p.channels;
    if (level.channels_last) {
      std::copy_n(data + first * p.channels, count * p.channels, rows);
    } else {
      transpose(data + first, pixels, p.channels, count, rows, p.channels);
    }
  });
}

template <class E>
void unpack(const PackParams& p) {
  for_each_block(p, [&](const PackLevel& level, int64_t image, int64_t first, int64_t count) {
    const int64_t pixels = level.map.pixels();
    const E* rows =
        static_cast<const E*>(p.rows) + (level.map.first_row + image * pixels + first) * p.channels;
    E* data = static_cast<E*>(level.data) + image * pixels * p.channels;
    transpose(rows, p.channels, count, p.channels, data + first, pixels);
  });
}

}  // namespace
}  // namespace dyhead::cpu

namespace dyhead {

void run_pack_levels(const PackParams& params, Context&) {
  dispatch_element(params.element_bytes, [&](auto e) { cpu::pack<decltype(e)>(params); });
}

void run_unpack_levels(const PackParams& params, Context&) {
  dispatch_element(params.element_bytes, [&](auto e) { cpu::unpack<decltype(e)>(params); });
}

}  // namespace dyhead
