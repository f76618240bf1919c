// The kernel of deform_conv_bwd_input.cuh for compute capability 9.0, in bfloat16 and float16: the
// product is one of warpgroups, all else is the same.
//
// Both operands lie in shared memory as wgmma reads them: the gradients of the outputs, and behind
// each other the panels of nine taps, which so are one operand of 288 rows. A chunk's products are
// still under way while the next panels are awaited.
#pragma once

#include "../tile/wgmma_tile.cuh"
#include "deform_conv_bwd_input.cuh"

namespace dyhead::cuda {

#if defined(DYHEAD_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// As InputProduct. A product has half of the columns: wgmma takes up to 256.
template <class T>
class WgmmaInputProduct : public WgmmaTile<2, kMaxTapsAtOnce * InputStep<T>::kChannels / 2> {
 public:
  DYHEAD_DEVICE explicit WgmmaInputProduct(int /*taps*/) {}

  // What ordinary stores and cp.async wrote, wgmma reads on another path.
  DYHEAD_DEVICE static void landed() { fence_proxy_async(); }

  template <class Load>
  DYHEAD_DEVICE void multiply(const std::byte* rows, const std::byte* panels, int chunk,
                              Load&& load_next) {
    const std::byte* own_rows = rows + tile_thread() / kWarpgroupThreads * kGroupBytes;
    wgmma_fence();
#pragma unroll
    for (unsigned part = 0; part < kSteps; ++part) {
      const uint64_t left = wgmma_operand(own_rows, 32 * part);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        wgmma_m64n144k16<T>(this->acc[half], left,
                            wgmma_operand(panels + half * kHalfBytes, 32 * part),
                            chunk > 0 || part > 0);
      }
    }
    wgmma_commit();
    // The products of the chunk before have read the other slot.
    wgmma_wait<1>();
    __syncthreads();
    load_next();
  }

  DYHEAD_DEVICE void finish() {
    wgmma_wait_all(this->acc[0]);
    wgmma_wait_all(this->acc[1]);
  }

 private:
  static constexpr int kGroupBytes = kMaxInputRows / 2 * kRowBytes;  // rows of a warpgroup
  static constexpr int kHalfBytes = kMaxTapsAtOnce * InputStep<T>::kChannels / 2 * kRowBytes;
};

#endif  // sm_90a

template <class T>
__global__ void __launch_bounds__(kTileThreads, 1)
    deform_bwd_input_wgmma_kernel([[maybe_unused]] const __grid_constant__ DeformBwdInputParams p) {
#if defined(DYHEAD_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  InputTile<T, kMaxInputRows, true, WgmmaInputProduct<T>>(p).run();
#elif defined(__CUDA_ARCH__)
  __trap();  // the host launches it on compute capability 9.0 only
#endif
}

template <class Op>
DeformBwdInputKernel DeformBwdInputWgmmaKernels<Op>::choose() {
  return deform_bwd_input_wgmma_kernel<Op>;
}

}  // namespace dyhead::cuda
