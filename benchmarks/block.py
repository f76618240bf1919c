"""One published block and one deformable convolution against what people run today.

Every implementation gets the same parameters and inputs and is checked against the reference in
float64 before it is timed. Peak memory is measured in a process of its own: the most that was
resident during one run beyond what was resident before it, results included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import dyhead_cuda
from benchmarks import peers, timing
from dyhead_cuda import functional, library

NAME = "block"
OURS = "dyhead_cuda"
FORWARD, BOTH = "forward", "forward+backward"
LEVELS = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
QUICK_LEVELS = [(12, 10), (6, 5), (3, 3)]
SCALES = (1, 2, 3, 4)  # quarters of the pixels
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 5e-3, "float64": 1e-11}

Run = Callable[[], Sequence[Tensor]]


def make_block(channels: int, dtype: torch.dtype, device: torch.device) -> dyhead_cuda.DyHeadBlock:
    torch.manual_seed(0)
    block = dyhead_cuda.DyHeadBlock(channels, channels, num_groups=min(16, channels))
    return block.to(device, dtype)


def make_pyramid(
    sizes: Sequence[tuple[int, int]], channels: int, n: int, dtype: torch.dtype, device: Any
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    levels = [torch.randn(n, channels, *size, generator=generator) for size in sizes]
    return [x.to(device, dtype) for x in levels]


def block_runs(
    sizes: Sequence[tuple[int, int]], channels: int, n: int, dtype: torch.dtype, device: Any
) -> dict[str, tuple[Run, Run]]:
    """Forward, and forward with backward, of every implementation."""
    block = make_block(channels, dtype, device)
    features = make_pyramid(sizes, channels, n, dtype, device)
    inputs = [x.detach().requires_grad_() for x in features]
    cotangents = make_pyramid(sizes, channels, n, dtype, device)
    parameters = block.parameters_tuple()
    # torchvision has no bfloat16 kernel.
    others = {} if dtype == torch.bfloat16 else peers.blocks()
    runs: dict[str, tuple[Run, Run]] = {}
    for name, function in {OURS: functional.pyramid_block, **others}.items():

        def forward(function: Any = function) -> Sequence[Tensor]:
            with torch.no_grad():
                return function(features, parameters)

        def both(function: Any = function) -> Sequence[Tensor]:
            torch.autograd.backward(function(inputs, parameters), cotangents)
            return [x.grad for x in inputs if x.grad is not None]

        runs[name] = (forward, both)
    return runs


def conv_runs(
    size: tuple[int, int], channels: int, dtype: torch.dtype, device: Any
) -> dict[str, tuple[Run, Run]]:
    """The same for one modulated deformable convolution."""
    torch.manual_seed(2)
    x = torch.randn(1, channels, *size).to(device, dtype)
    offset = torch.randn(1, 18, *size).to(device, dtype)
    mask = torch.rand(1, 9, *size).to(device, dtype)
    weight = (torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5).to(device, dtype)
    cotangent = torch.randn(1, channels, *size).to(device, dtype)

    def ours(x: Tensor, offset: Tensor, mask: Tensor, w: Tensor, b: Any, stride: int) -> Tensor:
        return functional.modulated_deform_conv2d(x, offset, w, b, stride, 1, 1, mask)

    others = {} if dtype == torch.bfloat16 else peers.deform_convs()
    runs: dict[str, tuple[Run, Run]] = {}
    for name, function in {OURS: ours, **others}.items():
        leaves = [t.detach().requires_grad_() for t in (x, offset, mask, weight)]

        def forward(function: Any = function) -> Sequence[Tensor]:
            with torch.no_grad():
                return [function(x, offset, mask, weight, None, 1)]

        def both(function: Any = function, leaves: Any = leaves) -> Sequence[Tensor]:
            function(*leaves, None, 1).backward(cotangent)
            return [t.grad for t in leaves]

        runs[name] = (forward, both)
    return runs


def check(runs: dict[str, tuple[Run, Run]], expected: Sequence[Tensor], dtype: str) -> float:
    """The largest relative error of any implementation's forward; raises if one is wrong."""
    worst = 0.0
    for name, (forward, _) in runs.items():
        for out, reference in zip(forward(), expected, strict=True):
            error = timing.relative_error(out.cpu(), reference.detach().cpu())
            if not error <= TOLERANCE[dtype]:
                raise SystemExit(f"{name} is wrong: relative error {error:.1e} in {dtype}")
            worst = max(worst, error)
    return worst


def peak_memory(arguments: argparse.Namespace, implementation: str, which: str) -> float:
    """MiB beyond what was resident before the run, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.block", "--measure-memory", implementation, which]
    if arguments.quick:
        command.append("--quick")
    done = subprocess.run(command, cwd=timing.ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def measure_memory(implementation: str, which: str, quick: bool) -> None:
    """Prints the extra MiB of one run; a second thread samples what is resident."""
    sizes, channels = (QUICK_LEVELS, 32) if quick else (LEVELS, 256)
    small = block_runs(QUICK_LEVELS, channels, 1, torch.float32, torch.device("cpu"))
    index = 0 if which == FORWARD else 1
    small[implementation][index]()  # loads libraries and starts threads
    run = block_runs(sizes, channels, 1, torch.float32, torch.device("cpu"))[implementation][index]
    before = peak = _resident()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _resident())

    sampler = threading.Thread(target=sample)
    sampler.start()
    run()
    done.set()
    sampler.join()
    print(max(peak, _resident()) - before)


def measure_runs(
    runs: dict[str, tuple[Run, Run]], device: torch.device, effort: timing.Effort
) -> dict[str, dict[str, dict[str, float]]]:
    return {
        name: {
            which: vars(timing.measure(run, device, effort))
            for which, run in zip((FORWARD, BOTH), both, strict=True)
        }
        for name, both in runs.items()
    }


def table_of(title: str, measured: dict[str, Any], extra: dict[str, Any] | None = None) -> Table:
    table = Table(title=title)
    for column in ("", "implementation", "median", "quartiles", "dyhead_cuda is faster by"):
        table.add_column(column, justify="left" if column in ("", "implementation") else "right")
    if extra:
        table.add_column("peak memory", justify="right")
    for which in (FORWARD, BOTH):
        for name, times in measured.items():
            t = times[which]
            ratio = "" if name == OURS else f"{t['median'] / measured[OURS][which]['median']:.1f} x"
            row = [which, name, f"{t['median'] * 1e3:.1f} ms"]
            row += [f"{t['lower_quartile'] * 1e3:.1f} - {t['upper_quartile'] * 1e3:.1f}", ratio]
            if extra:
                row.append(f"{extra[name][which]:.0f} MiB")
            table.add_row(*row)
    return table


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    device = timing.chosen_device(arguments, parser)
    console = timing.console_for(arguments)
    effort = timing.QUICK if arguments.quick else timing.usual_effort(device)
    sizes, channels = (QUICK_LEVELS, 32) if arguments.quick else (LEVELS, 256)
    library.require(device.type)
    facts = timing.environment(NAME, argv, device)
    console.print(timing.format_environment(facts))
    results: dict[str, Any] = {"environment": facts, "cases": []}

    with dyhead_cuda.backend("reference"):
        block = make_block(channels, torch.float64, device)
        expected = block(make_pyramid(sizes, channels, 1, torch.float64, device))
    for dtype_name in timing.chosen_dtypes(arguments, device):
        dtype = getattr(torch, dtype_name)
        runs = block_runs(sizes, channels, 1, dtype, device)
        error = check(runs, expected, dtype_name) if dtype != torch.bfloat16 else None
        with console.status(f"block, {dtype_name}"):
            measured = measure_runs(runs, device, effort)
        memory = None
        if device.type == "cpu" and dtype_name == "float32":
            memory = {
                name: {which: peak_memory(arguments, name, which) for which in (FORWARD, BOTH)}
                for name in runs
            }
        results["cases"].append(
            {
                "case": "block",
                "dtype": dtype_name,
                "sizes": sizes,
                "channels": channels,
                "relative_error": error,
                "times": measured,
                "peak_memory_mib": memory,
            }
        )
        console.print(table_of(f"block, {channels} channels, {dtype_name}", measured, memory))
        conv = conv_runs(sizes[0], channels, dtype, device)
        with console.status(f"convolution, {dtype_name}"):
            measured = measure_runs(conv, device, effort)
        results["cases"].append(
            {"case": "conv", "dtype": dtype_name, "sizes": sizes[:1], "times": measured}
        )
        title = f"modulated deformable convolution, {channels} channels, {sizes[0]}, {dtype_name}"
        console.print(table_of(title, measured))

    scaling = Table(title="how time grows, float32, dyhead_cuda")
    for column in ("pixels of P3", "batch", FORWARD, "ns per pixel", BOTH, "ns per pixel"):
        scaling.add_column(column, justify="right")
    results["scaling"] = []
    for n, scale in [(1, s) for s in SCALES] + [(b, 1) for b in SCALES[1:]]:
        grown = scaled(sizes, scale)
        ours = {OURS: block_runs(grown, channels, n, torch.float32, device)[OURS]}
        times = measure_runs(ours, device, effort)[OURS]
        pixels = n * sum(h * w for h, w in grown)
        medians = [times[which]["median"] for which in (FORWARD, BOTH)]
        results["scaling"].append({"batch": n, "sizes": grown, "times": times})
        cells = [f"{grown[0][0]}x{grown[0][1]}", str(n)]
        for median in medians:
            cells += [f"{median * 1e3:.1f} ms", f"{median / pixels * 1e9:.0f}"]
        scaling.add_row(*cells)
    console.print(scaling)
    timing.write_json(results, arguments.json)
    return 0


def scaled(sizes: Sequence[tuple[int, int]], scale: int) -> list[tuple[int, int]]:
    """A pyramid of about scale / 4 of the pixels, halved level by level."""
    height, width = sizes[0][0], max(1, sizes[0][1] * scale // 4)
    grown = []
    for _ in sizes:
        grown.append((height, width))
        height, width = (height + 1) // 2, (width + 1) // 2
    return grown


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--measure-memory"]:
        measure_memory(argv[1], argv[2], "--quick" in argv)
        return 0
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__)
    timing.add_arguments(parser)
    return run(parser.parse_args(argv), parser, argv)


if __name__ == "__main__":
    sys.exit(main())
