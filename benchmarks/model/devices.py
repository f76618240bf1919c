"""What GPUs can do, and the other assumptions of the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

KB, MB, TB = 1 << 10, 1 << 20, 1e12

# Of every path, how much kernels reach that overlap well: the expected time is the bound over this.
REACHED = 0.8
# A launch takes that long even if it does nothing, also in a CUDA graph.
LAUNCH_SECONDS = 3e-6
# Of the L1 cache and shared memory, bytes of a clock and multiprocessor; instructions of a clock.
PATH_BYTES, SCHEDULERS = 128, 4
# An array of less than this share of the L2 cache is still there for the next launch.
STAYS_IN_L2 = 0.5


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        arch: for which the library is disassembled.
        processors: multiprocessors.
        clock: Hz, under load.
        tensor_flop: of a clock and multiprocessor, dense bfloat16, by the data sheet.
        mma_share: of that rate, what ``mma.sync`` reaches at most.
        wgmma_share: what the products of warpgroups reach at most.
        peak: FLOP/s of the data sheet: 100 % of the roofline.
        memory: bytes/s, what large copies reach.
        l2: bytes/s, reads and writes of the L2 cache.
        reductions: bytes/s of atomic additions in the L2 cache, in sectors.
        l2_bytes: of the L2 cache.
        shared_bytes: that a block may have.
        combined_bytes: of L1 cache and shared memory of a multiprocessor.
        vector_atomics: whether four neighbouring sums are one access.
        wgmma: whether the forward takes the kernel with products of warpgroups.
    """

    name: str
    arch: str
    processors: int
    clock: float
    tensor_flop: int
    mma_share: float
    wgmma_share: float
    peak: float
    memory: float
    l2: float
    reductions: float
    l2_bytes: int
    shared_bytes: int
    combined_bytes: int
    vector_atomics: bool
    wgmma: bool = False

    def resident_blocks(self, threads: int, registers: int, shared_bytes: int) -> int:
        """How many blocks of a kernel a multiprocessor holds at once, at least one."""
        per_warp = (registers + 7) // 8 * 8 * 32  # registers are given out in eights
        by_registers = 65536 // max(per_warp * (threads // 32), 1)
        # 1 KB of every block is the system's.
        by_memory = (self.combined_bytes - 28 * KB) // (shared_bytes + KB)
        return max(1, min(by_registers, by_memory, 2048 // threads, 32))


_H100 = Device(
    name="H100 SXM",
    arch="90a",
    processors=132,
    clock=1.70e9,
    tensor_flop=4096,
    mma_share=0.62,
    wgmma_share=0.95,
    peak=989 * TB,
    memory=3.0 * TB,
    l2=5.5 * TB,
    reductions=3.0 * TB,
    l2_bytes=50 * MB,
    shared_bytes=227 * KB,
    combined_bytes=256 * KB,
    vector_atomics=True,
)

DEVICES = {
    "h100": _H100,
    "h100-wgmma": replace(_H100, name="H100 SXM with wgmma", wgmma=True),
    "h200": replace(_H100, name="H200", memory=4.3 * TB),
    "a100": Device(
        name="A100 SXM, 80 GB",
        arch="80",
        processors=108,
        clock=1.41e9,
        tensor_flop=2048,
        mma_share=0.95,
        wgmma_share=0.0,
        peak=312 * TB,
        memory=1.8 * TB,
        l2=4.0 * TB,
        reductions=1.5 * TB,
        l2_bytes=40 * MB,
        shared_bytes=163 * KB,
        combined_bytes=192 * KB,
        vector_atomics=False,
    ),
}
