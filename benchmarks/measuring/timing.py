"""Seconds of one action: by events or graph replays on a GPU, by the clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

# More than the last-level cache of any supported GPU or CPU.
_FLUSH_BYTES = 256 * 2**20

WARM, COLD, GRAPH = "warm", "cold", "graph"
METHODS = {
    WARM: "run after run on the same data, as much of it cached as fits",
    COLD: "before each run a large buffer is overwritten, so that inputs come from memory",
    GRAPH: "replays of a CUDA graph, run after run: no work of the host in between",
}


@dataclass(frozen=True)
class Effort:
    """How long to measure one action.

    Attributes:
        seconds: keep measuring for as long as this,
        min_runs, max_runs: but no fewer and no more runs than these.
        warmup_seconds: run it unmeasured for as long as this before.
    """

    seconds: float
    min_runs: int
    max_runs: int
    warmup_seconds: float

    def given(self, first: float) -> tuple[Effort, list[float]]:
        """The effort after a first run of ``first`` seconds, and the times that count already.

        A slow one is warm after its first run; of a very slow one that run counts, too.
        """
        if first < self.seconds:
            return self, []
        slow = replace(self, warmup_seconds=0.0)
        if first < 5 * self.seconds:
            return slow, []
        return replace(slow, min_runs=2), [first]


QUICK = Effort(0.0, 2, 2, 0.0)


def usual_effort(device: torch.device) -> Effort:
    """Less time on a GPU, whose runs are short and steady."""
    if device.type == "cuda":
        return Effort(0.15, 10, 400, 0.05)
    return Effort(0.8, 3, 50, 0.2)


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: the median and the quartiles of ``runs`` runs."""

    median: float
    lower_quartile: float
    upper_quartile: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """From the times of at least two runs."""
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, lower, upper, len(seconds))


def measure(
    action: Callable[[], object],
    device: torch.device,
    effort: Effort,
    method: str,
    known: Sequence[float] = (),
) -> Timing:
    """Times ``action``, which has run at least once before.

    Args:
        action: what to time; its results are dropped at once.
        device: where its work is done.
        effort: for how long.
        method: one of ``METHODS``.
        known: seconds of runs that were timed before.

    Raises:
        RuntimeError: a CUDA graph of the action cannot be captured.
        ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {tuple(METHODS)}, got {method!r}")
    if method == GRAPH:
        action = _captured(action, device)
    _warm_up(action, device, effort)
    flush = None
    if method == COLD:
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    seconds = list(known)
    begin = time.perf_counter() - sum(known)
    while _unfinished(len(seconds), time.perf_counter() - begin, effort):
        if device.type == "cuda":
            seconds += _cuda_seconds(action, device, effort.min_runs, flush)
        else:
            if flush is not None:
                flush.fill_(len(seconds) % 100)
            start = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - start)
    return Timing.of(seconds)


def _unfinished(runs: int, seconds: float, effort: Effort) -> bool:
    return runs < effort.min_runs or (seconds < effort.seconds and runs < effort.max_runs)


def _warm_up(action: Callable[[], object], device: torch.device, effort: Effort) -> None:
    begin = time.perf_counter()
    while time.perf_counter() - begin < effort.warmup_seconds:
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _cuda_seconds(
    action: Callable[[], object], device: torch.device, runs: int, flush: torch.Tensor | None
) -> list[float]:
    events = []
    for run in range(runs):
        # The flush keeps the GPU busy while the host queues the launches, so that their overhead
        # is not measured.
        if flush is not None:
            flush.fill_(run % 100)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1000 for start, end in events]


def _captured(action: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Replays of the action's CUDA graph."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # let autograd and libraries initialise outside of the capture
            action()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = action()  # keep the memory that the graph writes to

    def replay() -> object:
        graph.replay()
        return kept

    return replay
