"""From the work of kernels to lower bounds of their times, and what limits them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.model.devices import LAUNCH_SECONDS, REACHED, SCHEDULERS, Device
from benchmarks.model.work import KernelWork


@dataclass(frozen=True)
class KernelTime:
    """Lower bounds of one kernel in seconds, by what they come from.

    Attributes:
        tensor: the rate of tensor cores.
        path: the path to L1 cache and shared memory.
        issue: the instructions of main loops.
        l2: the L2 cache.
        reductions: atomic additions in the L2 cache.
        memory: device memory.
        launch: what launches take that do nothing.
    """

    tensor: float
    path: float
    issue: float
    l2: float
    reductions: float
    memory: float
    launch: float

    @property
    def limit(self) -> str:
        """What the bound comes from."""
        return max(vars(self), key=lambda name: getattr(self, name))

    @property
    def bound(self) -> float:
        return float(max(vars(self).values()))

    @property
    def expected(self) -> float:
        return max(self.bound / REACHED, self.launch)


def kernel_time(work: KernelWork, device: Device) -> KernelTime:
    """The bounds of a kernel on a device.

    What multiprocessors do by themselves takes as long as on the one that has most blocks.
    """
    share = work.blocks / work.launches / device.processors  # of a launch, for a multiprocessor
    busiest = -(-work.blocks // work.launches // device.processors)
    slowest = max(busiest, 1) / share / device.processors / device.clock
    tensor_share = device.wgmma_share if work.wgmma else device.mma_share
    return KernelTime(
        tensor=work.flop / (device.tensor_flop * tensor_share) * slowest,
        path=work.path_clocks * slowest,
        issue=work.issue_slots / SCHEDULERS * slowest,
        l2=work.l2_bytes / device.l2,
        reductions=work.reduced_bytes / device.reductions,
        memory=work.memory_bytes / device.memory,
        launch=work.launches * LAUNCH_SECONDS,
    )


@dataclass(frozen=True)
class StackTime:
    """A stack of blocks in one direction.

    Attributes:
        bound, expected: seconds.
        flop: of the convolutions, without what only fills tiles.
        roofline: the share of the data sheet's rate that the expected time amounts to.
        launches: of one block.
    """

    bound: float
    expected: float
    flop: float
    roofline: float
    launches: int


def stack_time(works: Sequence[KernelWork], flop: float, blocks: int, device: Device) -> StackTime:
    """The time of ``blocks`` blocks, each with this work and ``flop`` FLOP."""
    times = [kernel_time(work, device) for work in works]
    expected = blocks * sum(time.expected for time in times)
    return StackTime(
        bound=blocks * sum(time.bound for time in times),
        expected=expected,
        flop=blocks * flop,
        roofline=blocks * flop / expected / device.peak,
        launches=sum(work.launches for work in works),
    )
