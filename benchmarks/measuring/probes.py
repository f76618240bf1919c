"""Measures other than time: the memory that a run needs and the kernels that it launches."""

from __future__ import annotations

import ctypes
import ctypes.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
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
    if not _start_counting():
        return action(), None
    resident = _status_bytes("VmRSS")
    result = action()
    return result, max(0, _status_bytes("VmHWM") - resident)


def _start_counting() -> bool:
    """Returns freed memory to the system and resets the peak of the resident size."""
    try:
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)
        _CLEAR.write_text("5")
    except (OSError, AttributeError):  # not Linux with glibc, or no permission
        return False
    return True


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
