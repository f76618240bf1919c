#include "pack_levels.h"

#include "../context.h"
#include "../tile/primitives.cuh"

namespace dyhead::cuda {
namespace {

inline constexpr int64_t kPackImagesInFlight = 32768;  // the y dimension of a grid is at most 65535

// A tile in shared memory, stored by channel. A warp writes 32 pixels of one channel and reads 32
// channels of one pixel, or the reverse; one word of padding per channel avoids bank conflicts in
// both.
template <class E>
struct PackTile {
  static constexpr int kStride = kPackPixels + (sizeof(E) < 4 ? 4 / sizeof(E) : 1);
  static constexpr int kCount = kPackChannels * kStride;

  E* shared;

  DYHEAD_DEVICE E& at(int channel, int pixel) const { return shared[channel * kStride + pixel]; }
};

// Calls f(channel, pixel) for all elements of a tile; consecutive threads get consecutive pixels of
// one channel.
template <class F>
DYHEAD_DEVICE void for_each_along_pixels(int channels, int pixels, F&& f) {
  constexpr int kRows = kPackThreads / kPackPixels;
  const int pixel = static_cast<int>(threadIdx.x) % kPackPixels;
#pragma unroll
  for (int i = 0; i < kPackChannels / kRows; ++i) {
    const int channel = static_cast<int>(threadIdx.x) / kPackPixels + i * kRows;
    if (channel < channels && pixel < pixels) f(channel, pixel);
  }
}

// The same, but consecutive threads get consecutive channels of one pixel.
template <class F>
DYHEAD_DEVICE void for_each_along_channels(int channels, int pixels, F&& f) {
  constexpr int kRows = kPackThreads / kPackChannels;
  const int channel = static_cast<int>(threadIdx.x) % kPackChannels;
#pragma unroll
  for (int i = 0; i < kPackPixels / kRows; ++i) {
    const int pixel = static_cast<int>(threadIdx.x) / kPackChannels + i * kRows;
    if (channel < channels && pixel < pixels) f(channel, pixel);
  }
}

// Moves one tile of one image from [C, H W] to rows [H W, C] or back.
template <class E, bool kUnpack>
DYHEAD_DEVICE void transpose_tile(const PackTables& t, const PackDeviceLevel& level, int64_t image,
                                  int64_t index, const PackTile<E>& tile) {
  const int64_t pixels = level.map.pixels();
  const int64_t across = (t.channels + kPackChannels - 1) / kPackChannels;
  const int64_t first_pixel = index / across * kPackPixels;
  const int64_t first_channel = index % across * kPackChannels;
  const int tile_pixels = static_cast<int>(min(int64_t{kPackPixels}, pixels - first_pixel));
  const int tile_channels =
      static_cast<int>(min(int64_t{kPackChannels}, t.channels - first_channel));
  E* data =
      static_cast<E*>(level.data) + (image * t.channels + first_channel) * pixels + first_pixel;
  E* rows = static_cast<E*>(t.rows) +
            (level.map.first_row + image * pixels + first_pixel) * t.channels + first_channel;
  __syncthreads();  // the last tile is no longer read
  if constexpr (kUnpack) {
    for_each_along_channels(tile_channels, tile_pixels, [&](int channel, int pixel) {
      tile.at(channel, pixel) = __ldg(rows + pixel * t.channels + channel);
    });
  } else {
    for_each_along_pixels(tile_channels, tile_pixels, [&](int channel, int pixel) {
      tile.at(channel, pixel) = __ldg(data + channel * pixels + pixel);
    });
  }
  __syncthreads();
  if constexpr (kUnpack) {
    for_each_along_pixels(tile_channels, tile_pixels, [&](int channel, int pixel) {
      data[channel * pixels + pixel] = tile.at(channel, pixel);
    });
  } else {
    for_each_along_channels(tile_channels, tile_pixels, [&](int channel, int pixel) {
      rows[pixel * t.channels + channel] = tile.at(channel, pixel);
    });
  }
}

// Copies up to kPackCopyBytes of one image of a channels_last level.
template <class E>
DYHEAD_DEVICE void copy_stretch(const PackTables& t, const PackDeviceLevel& level, int64_t image,
                                int64_t index) {
  constexpr int64_t kElements = kPackCopyBytes / sizeof(E);
  constexpr int kVector = 16 / sizeof(E);
  const int64_t size = level.map.pixels() * t.channels;
  const int64_t first = index * kElements;
  const int64_t count = min(kElements, size - first);
  const E* from = static_cast<const E*>(level.data) + image * size + first;
  E* to = static_cast<E*>(t.rows) + level.map.first_row * t.channels + image * size + first;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to);
  const int64_t vectors = addresses % 16 == 0 ? count / kVector : 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < vectors; i += kPackThreads) {
    store_vec(to + i * kVector, load_vec_readonly<kVector>(from + i * kVector));
  }
  for (int64_t i = vectors * kVector + threadIdx.x; i < count; i += kPackThreads) {
    to[i] = __ldg(from + i);
  }
}

template <class E, bool kUnpack>
__global__ void __launch_bounds__(kPackThreads)
    pack_levels_kernel(const __grid_constant__ PackTables t) {
  DYHEAD_SHARED(E, shared, PackTile<E>::kCount);
  int l = 0;
  while (l + 1 < t.levels && t.level[l + 1].first_block <= static_cast<int>(blockIdx.x)) ++l;
  const PackDeviceLevel& level = t.level[l];
  for (int64_t image = blockIdx.y; image < t.images; image += gridDim.y) {
    for (int64_t i = static_cast<int>(blockIdx.x) - level.first_block; i < level.tiles;
         i += level.blocks) {
      if (level.channels_last) {
        copy_stretch<E>(t, level, image, i);
      } else {
        transpose_tile<E, kUnpack>(t, level, image, i, PackTile<E>{shared});
      }
    }
  }
}

template <bool kUnpack>
cudaError_t launch_all(const PackParams& params, const std::vector<PackTables>& tables,
                       cudaStream_t stream) {
  return dispatch_element(params.element_bytes, [&](auto element) {
    for (const PackTables& t : tables) {
      if (t.images == 0 || t.blocks == 0) continue;
      const LaunchConfig config{
          .grid = dim3(static_cast<unsigned>(t.blocks),
                       static_cast<unsigned>(std::min(t.images, kPackImagesInFlight))),
          .block = dim3(kPackThreads),
          .stream = stream};
      const cudaError_t error = launch(pack_levels_kernel<decltype(element), kUnpack>, config, t);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
}

}  // namespace

cudaError_t launch_pack_levels(const PackParams& params, const std::vector<PackTables>& tables,
                               cudaStream_t stream) {
  return launch_all<false>(params, tables, stream);
}

cudaError_t launch_unpack_levels(const PackParams& params, const std::vector<PackTables>& tables,
                                 cudaStream_t stream) {
  return launch_all<true>(params, tables, stream);
}

}  // namespace dyhead::cuda

namespace dyhead {

void run_pack_levels(const PackParams& params, Context& context) {
  context.check(cuda::launch_pack_levels(params, cuda::pack_tables(params), context.stream()));
}

void run_unpack_levels(const PackParams& params, Context& context) {
  context.check(cuda::launch_unpack_levels(params, cuda::pack_tables(params), context.stream()));
}

}  // namespace dyhead
