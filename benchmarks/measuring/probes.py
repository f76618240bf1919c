"""Measures other than time: the memory that a run needs and the kernels that it launches."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_PAGES, _LARGEST = 1 << 16, 1 << 25  # a few; what malloc comes to where large blocks are freed
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def with_peak_memory(action: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """Runs ``action``; returns its result and the peak of additional bytes.

    On a GPU what torch's allocator handed out; on a CPU what was resident, as Linux records it
    (None where that cannot be read). Results are included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = action()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if not hasattr(libc, "mallopt") or not os.access(_CLEAR, os.W_OK):  # not Linux with glibc
        return action(), None
    _return_blocks_from(libc, _PAGES)
    try:
        libc.malloc_trim(0)
        _CLEAR.write_text("5")
        resident = _status_bytes("VmRSS")
        result = action()
        return result, max(0, _status_bytes("VmHWM") - resident)
    finally:
        _return_blocks_from(libc, _LARGEST)


def _return_blocks_from(libc: ctypes.CDLL, size: int) -> None:
    """Lets malloc give blocks of that size or more back to the system as they are freed.

    By itself it comes to keep blocks of up to 32 MiB, and then a peak has what it kept as well.
    """
    libc.mallopt(_MMAP_THRESHOLD, size)
    libc.mallopt(_TRIM_THRESHOLD, 2 * size)


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def count_kernels(events: Iterable[Any]) -> int:
    """The number of kernels in a profiler's events: GPU events other than copies and fills."""
    on_gpu = (e for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not re.match(r"Memcpy|Memset", e.name) for e in on_gpu)


def launches(action: Callable[[], object], device: torch.device) -> int | None:
    """Kernels that one run launches; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        action()
        torch.cuda.synchronize(device)
    return count_kernels(profile.events())
