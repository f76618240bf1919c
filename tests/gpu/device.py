"""What tests on a GPU share: its memory, what is launched on it, CUDA graphs of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

from tests.helpers.profiles import profile

# One process runs all of them, where several share the tests (pytest -n, --dist loadgroup).
heavy = pytest.mark.xdist_group("memory")


def need_memory(gibibytes: int) -> None:
    """Skip the test where less GPU memory is free. Those that need half of it are ``heavy``."""
    torch.cuda.empty_cache()  # of earlier tests in this process
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes << 30:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory, got {free >> 30}")


def need_two_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


def unaligned(t: Tensor) -> Tensor:
    """A contiguous copy one element behind what the allocator aligned, with a gradient."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return memory[1:].view(t.shape).copy_(t.detach()).requires_grad_()


def launched(step: Callable[[], object]) -> list[str]:
    """Everything that ``step`` puts on the GPU: kernels, copies and fills, by name."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with profile(activities=activities) as profiled:
        step()
        torch.cuda.synchronize()
    return [event.name for event in profiled.events() if event.device_type == DeviceType.CUDA]


def allocated(step: Callable[[], object]) -> tuple[int, int]:
    """Bytes that ``step`` takes at its peak, and those that its result still holds."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = step()
    torch.cuda.synchronize()
    peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del result
    return peak - before, held - before


@contextmanager
def no_host_synchronisation() -> Iterator[None]:
    """Anything of torch that waits for the GPU raises."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captured(step: Callable[[], Sequence[Tensor]]) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """A graph of ``step``, and what its replays write to. The step runs once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def on_a_busy_stream(
    late: Tensor, value: Tensor, step: Callable[[], Sequence[Tensor]]
) -> Sequence[Tensor]:
    """``step`` on a stream of its own, on which ``late`` gets its value only after some 25 ms."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(value)
        results = step()
    stream.synchronize()
    return results
