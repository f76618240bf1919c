"""What every microbenchmark shares: timing, errors, where it ran, and the files it writes."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dyhead_cuda import library

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("float32", "float16", "bfloat16", "float64")

# Relative L2 error of a result against the float64 reference; gradients are allowed twice that.
TOLERANCES = {"float64": 1e-12, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}

# More than the level-2 cache of any GPU: overwritten before each run, so that every run reads its
# input from memory, as in a network where other layers ran in between.
_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Effort:
    """How long to measure one action."""

    warmup_runs: int = 3
    least_runs: int = 7
    most_runs: int = 200
    seconds: float = 0.4


def usual_effort(device: torch.device) -> Effort:
    """Less time on a GPU, whose runs are short and steady."""
    return Effort(seconds=0.05 if device.type == "cuda" else 0.4)


QUICK = Effort(warmup_runs=1, least_runs=2, most_runs=2, seconds=0.0)


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: the median and the quartiles of ``runs`` runs."""

    median: float
    lower_quartile: float
    upper_quartile: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """From the time of each of at least two runs."""
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, lower, upper, len(seconds))


def measure(action: Callable[[], object], device: torch.device, effort: Effort) -> Timing:
    """Times ``action`` after warming up, by events on a GPU and by the clock on a CPU."""
    for _ in range(effort.warmup_runs):
        action()
    if device.type == "cuda":
        return Timing.of(_cuda_seconds(action, device, effort))
    seconds: list[float] = []
    while _unfinished(len(seconds), sum(seconds), effort):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds)


def _unfinished(runs: int, seconds: float, effort: Effort) -> bool:
    return runs < effort.least_runs or (seconds < effort.seconds and runs < effort.most_runs)


def _cuda_seconds(
    action: Callable[[], object], device: torch.device, effort: Effort
) -> list[float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    seconds: list[float] = []
    begin = time.perf_counter()
    while _unfinished(len(seconds), time.perf_counter() - begin, effort):
        batch = []
        # The flush keeps the GPU busy while the host gets ahead: launches are then not measured.
        for _ in range(max(effort.least_runs, 10)):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            batch.append((start, end))
        torch.cuda.synchronize(device)
        seconds += [start.elapsed_time(end) / 1000 for start, end in batch]
    return seconds


def relative_error(result: Tensor, expected: Tensor) -> float:
    """||result - expected|| / ||expected|| in float64."""
    difference = result.detach().double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that all benchmarks have."""
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU"
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        help="default: float32, on a GPU also bfloat16",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        type=_json_target,
        metavar="FILE",
        help="write JSON; without FILE to stdout",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes and two runs: does it work at all?"
    )


def _json_target(text: str) -> str:
    # Told now, not after the minutes that the measurements take.
    if text != "-" and not Path(text).resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in an existing directory, got {text!r}")
    return text


def chosen_device(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    """The device asked for, or the best one; ends the program if it is not there."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda needs a GPU, but torch {torch.__version__} sees none")
    return torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def chosen_dtypes(arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """Names of the dtypes to measure."""
    default = ["float32", "bfloat16"] if device.type == "cuda" else ["float32"]
    return list(arguments.dtype or default)


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def environment(name: str, argv: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Where and how the benchmark ``name`` runs, as data that json can write."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{platform.machine()} {library.cpu_capability()}"
    return {
        "benchmark": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device.type,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "library_loaded": library.loaded(device.type),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def format_environment(facts: dict[str, Any]) -> str:
    """One line for people: the device and the versions, then the command."""
    threads = "" if facts["device"] == "cuda" else f", {facts['threads']} threads"
    return (
        f"{facts['processor']}{threads}, torch {facts['torch']}, "
        f"commit {facts['commit'] or 'unknown'}, {facts['date']}\n$ {facts['command']}"
    )


def console_for(arguments: argparse.Namespace) -> Console:
    """Where tables go: to stderr if the JSON takes stdout. Wide enough for them off a terminal."""
    console = Console(stderr=arguments.json == "-", highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 140
    return console


def write_json(data: dict[str, Any], target: str | None) -> None:
    """Writes ``data`` to a file, to stdout for "-", nowhere for None."""
    if target is None:
        return
    text = json.dumps(data, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text)
