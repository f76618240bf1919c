"""The work of each kernel of a published block: counts of the emulation and of the machine code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.cases.shapes import ShapeSet
from benchmarks.model.devices import KB, Device
from tests.helpers import machine_code
from tests.simt import counting, traffic

SECTOR = 32
_SHARED = ("shared load", "shared store", "ldmatrix", "async write", "operand read")
_GLOBAL = ("global load", "global store", "atomic")


@dataclass(frozen=True)
class KernelWork:
    """What one kernel does in one step of a block, all of its launches together.

    Attributes:
        step: such as ``"convolutions fwd"``.
        kernel: its name with template arguments.
        launches: how many.
        blocks: of all launches.
        resident: blocks that a multiprocessor holds at once.
        flop: of products on tensor cores, also of rows and columns that only fill a tile.
        path_clocks: of the path to L1 cache and shared memory, added over all multiprocessors.
        issue_slots: instructions of warps; only of main loops that multiply, 0 for others.
        l2_bytes: that the L2 cache delivers or takes.
        reduced_bytes: of them, of atomic additions.
        memory_bytes: of arrays that do not stay in the L2 cache from one launch to the next.
        per_product: instructions of the main loop for each of its products; 0 without.
        wgmma: whether these are products of warpgroups.
    """

    step: str
    kernel: str
    launches: int
    blocks: int
    resident: int
    flop: float
    path_clocks: float
    issue_slots: float
    l2_bytes: float
    reduced_bytes: float
    memory_bytes: float
    per_product: float
    wgmma: bool = False


def count_block(
    device: Device, shapes: ShapeSet, images: int, sampled_blocks: int, stays_bytes: float
) -> list[KernelWork]:
    """The kernels of one block in bfloat16, forward and backward, in the order of their steps.

    Args:
        device: whose tiles are chosen.
        shapes: sizes of the levels, and channels.
        images: the batch.
        sampled_blocks: how many blocks of each launch are run and counted.
        stays_bytes: arrays of at most this size cost no traffic of memory.

    Raises:
        RuntimeError: the kernels could not be counted.
        KeyError: the CUDA library lacks a kernel, so it is not of these sources.
    """
    code = (
        f"traffic.run_block(simt, step, {list(shapes.levels)}, {shapes.channels}, {images}, "
        f"processors={device.processors}, shared_bytes={device.shared_bytes}, "
        f"wgmma={device.wgmma}, sampled=True)"
    )
    steps = traffic.count_steps(
        code, vector_atomics=device.vector_atomics, l1_bytes=64 * KB, sampled_blocks=sampled_blocks
    )
    codes = machine_code.machine_code(device.arch)
    names = {name: mangled for mangled, name in machine_code.short_names(list(codes)).items()}
    registers = machine_code.registers(device.arch)
    found = []
    for step, counts in steps.items():
        for kernel, launched in counts.kernels.items():
            mangled = names[kernel]
            records = [r for r in counts.records if r.kernel == kernel]
            found.append(
                _kernel_work(
                    step,
                    kernel,
                    launched,
                    records,
                    machine_code.main_loop(codes[mangled]),
                    device.resident_blocks(
                        launched["threads"], registers[mangled], launched["shared_bytes"]
                    ),
                    stays_bytes,
                )
            )
    return found


def _kernel_work(
    step: str,
    kernel: str,
    launched: dict[str, Any],
    records: Iterable[counting.Record],
    loop: machine_code.MainLoop | None,
    resident: int,
    stays_bytes: float,
) -> KernelWork:
    scale = launched["blocks"] / launched["sampled_blocks"]

    def of(number: str, *accesses: str) -> float:
        return scale * sum(getattr(r, number) for r in records if r.access in accesses)

    arrays = launched["arrays"].values()
    flop = of("flop", "mma")
    l2_sectors = (
        of("l2_sectors", "global load", "async read")
        + of("sectors", "global store")
        + of("sectors", "atomic")
    )
    # A sample cannot tell what its blocks share: no array is read or written more than once.
    memory = sum(
        min(scale * SECTOR * array[direction], array["bytes"])
        for array in arrays
        for direction in ("distinct_read", "distinct_written")
        if array["bytes"] > stays_bytes
    )
    return KernelWork(
        step=step,
        kernel=kernel,
        launches=launched["launches"],
        blocks=launched["blocks"],
        resident=resident,
        flop=flop,
        path_clocks=of("wavefronts", *_SHARED) + of("sectors", *_GLOBAL) * SECTOR / 128,
        issue_slots=0.0 if loop is None else flop / loop.flop * loop.instructions,
        l2_bytes=SECTOR * l2_sectors,
        reduced_bytes=SECTOR * of("sectors", "atomic"),
        memory_bytes=memory,
        per_product=0.0 if loop is None else loop.per_product,
        wgmma=loop is not None and loop.wgmma,
    )
