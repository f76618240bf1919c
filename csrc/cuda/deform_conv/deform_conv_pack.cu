#include <algorithm>
#include <limits>

#include "deform_conv_math.cuh"

namespace dyhead::cuda {
namespace {

constexpr int kPackThreads = 256;

template <class F>
DYHEAD_DEVICE F load_as(const void* p, int64_t i, DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<F>(static_cast<const double*>(p)[i]);
    case DType::kBFloat16:
      return static_cast<F>(to_compute(static_cast<const bfloat16*>(p)[i]));
    case DType::kFloat16:
      return static_cast<F>(to_compute(static_cast<const float16*>(p)[i]));
    default:
      return static_cast<F>(static_cast<const float*>(p)[i]);
  }
}

// Work items. An item is what a warp packs at a time: one column of a panel for one step of
// channels and all taps.
DYHEAD_HD int64_t pack_items(const DeformPackSet& set) {
  return static_cast<int64_t>(set.matrices) * set.shape.groups * set.panels.column_panels *
         set.panels.cols * set.panels.steps;
}

// The i-th step of a group, of up to max_channels channels; empty beyond the last one.
DYHEAD_DEVICE ChannelStep step_of_group(const DeformShape& s, int32_t group, int32_t i,
                                        int32_t max_channels) {
  const int32_t group_channels = static_cast<int32_t>(s.channels) / s.groups;
  const int32_t end = (group + 1) * group_channels;
  ChannelStep step{0, group * group_channels, 0};
  for (; i >= 0; --i) {
    step = step.last < end ? channel_step(s, group, step.last, max_channels)
                           : ChannelStep{end, end, 0};
  }
  return step;
}

// A warp packs one column for one step of the depth and all taps: consecutive values in memory or,
// for transposed panels, values as close as they can be.
template <class Op>
DYHEAD_DEVICE void pack_column(const DeformPackSet& set, const void* const* weights, int32_t item) {
  using T = typename Operand<Op>::Storage;
  using F = typename Operand<Op>::Compute;
  constexpr int kUnit = Operand<Op>::kUnit;
  const DeformShape& s = set.shape;
  const DeformPanels& panels = set.panels;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int32_t step = item % panels.steps;
  const int32_t column = item / panels.steps % panels.cols;
  const int32_t column_panel =
      item / panels.steps / panels.cols;  // counted over all groups and matrices
  const int32_t panel = column_panel % panels.column_panels;
  const int32_t group = column_panel / panels.column_panels % s.groups;
  const int32_t matrix = column_panel / panels.column_panels / s.groups;
  const int32_t group_channels = static_cast<int32_t>(s.channels) / s.groups;
  const int32_t group_outputs = static_cast<int32_t>(s.out_channels) / s.groups;
  const ChannelStep channels = set.transposed ? step_of_group(s, group, panel, panels.cols)
                                              : step_of_group(s, group, step, panels.depth);
  const int32_t column_channel =
      channels.first + InputStep<T>::channel(column / kUnit, column % kUnit);
  for (int i = lane; i < s.taps() * kUnits; i += kWarpSize) {
    const int tap = i / kUnits;
    const int unit = i % kUnits;
    F values[kUnit];
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      const int32_t depth = unit * kUnit + k;
      const int32_t place = set.for_wgmma ? wgmma_channel(depth) : depth;
      const int32_t channel = set.transposed ? column_channel : channels.first + place;
      const int32_t output =
          set.transposed ? step * panels.depth + depth : panel * panels.cols + column;
      const bool exists = output < group_outputs && channel < channels.last;
      const int64_t row = static_cast<int64_t>(group) * group_outputs + output;
      const int64_t at = (row * group_channels + channel - group * group_channels) * s.taps() + tap;
      values[k] = exists ? load_as<F>(weights[matrix], at, set.dtype) : F(0);
    }
    std::byte* to = static_cast<std::byte*>(set.packed) +
                    panels.index(s, set.first_matrix + matrix, group * panels.column_panels + panel,
                                 step, tap) *
                        panels.cols * kRowBytes;
    store_vec(reinterpret_cast<T*>(to + unit_offset(column, unit)), Operand<Op>::unit(values));
  }
}

template <class Op>
__global__ void __launch_bounds__(kPackThreads, 4)
    deform_pack_kernel(const __grid_constant__ DeformPackParams p) {
  using F = typename Operand<Op>::Compute;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kPackThreads;
  int64_t item = first / kWarpSize;  // of the set, as it goes on from one set to the next
  // Unrolled, each set is in places of the parameters that the compiler knows.
#pragma unroll
  for (int32_t i = 0; i < kMaxPackSets; ++i) {
    if (i == p.sets) break;
    const DeformPackSet& set = p.set[i];
    const int64_t items = pack_items(set);
    for (; item < items; item += threads / kWarpSize) {
      pack_column<Op>(set, p.weights + set.first_pointer, static_cast<int32_t>(item));
    }
    item -= items;
    const auto outputs = static_cast<int32_t>(set.shape.out_channels);
    const int32_t biases = set.packed_bias == nullptr ? 0 : set.matrices * outputs;
    for (int64_t b = first; b < biases; b += threads) {
      const auto at = static_cast<int32_t>(b);
      static_cast<F*>(set.packed_bias)[int64_t{set.first_matrix} * outputs + at] =
          load_as<F>(p.bias[set.first_pointer + at / outputs], at % outputs, set.dtype);
    }
    for (const DeformZeros& zeros : set.zeros) {
      for (int64_t w = first; w < zeros.count; w += threads) {
        static_cast<unsigned*>(zeros.words)[w] = 0;
      }
    }
  }
}

template <class Op>
cudaError_t launch_pack(const DeformPackParams& params, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 4096;
  constexpr int64_t kZerosPerThread = 8;
  int64_t items = 0, most_zeros = 0;
  for (int32_t i = 0; i < params.sets; ++i) {
    const DeformPackSet& set = params.set[i];
    if (pack_items(set) > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
    items += pack_items(set);
    for (const DeformZeros& zeros : set.zeros) most_zeros = std::max(most_zeros, zeros.count);
  }
  const int64_t work = std::max(items * kWarpSize, most_zeros / kZerosPerThread);
  const int64_t blocks = (work + kPackThreads - 1) / kPackThreads;
  return launch(deform_pack_kernel<Op>,
                {.grid = dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks)),
                 .block = dim3(kPackThreads),
                 .stream = stream},
                params);
}

}  // namespace

cudaError_t launch_deform_pack(const DeformPackParams& params, cudaStream_t stream) {
  return dispatch_math(params.math,
                       [&](auto op) { return launch_pack<decltype(op)>(params, stream); });
}

}  // namespace dyhead::cuda
