"""The task attention against plain PyTorch, layer by layer and compiled.

Bytes are what any implementation has to move: forward reads x and writes the result, backward reads
x and the incoming gradient and writes the gradient of x; so GB/s is the bandwidth it makes use of.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from benchmarks import timing
from dyhead_cuda import functional, library, reference

NAME = "dynamic_relu"
OURS = "dyhead_cuda"
COMPILED = "torch.compile"
FORWARD, BOTH = "forward", "forward+backward"
JUMP_BAND = 1e-4
TRANSFERS = {FORWARD: 2, BOTH: 5}
REDUCTION = 4

# Peers round every intermediate to float16 or bfloat16, which flips the maximum here and there.
PEER_TOLERANCES = {"float64": 1e-11, "float32": 2e-5, "float16": 0.1, "bfloat16": 0.1}

Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One input [N, C, H, W]."""

    name: str
    shape: tuple[int, int, int, int]


@dataclass(frozen=True)
class Implementation:
    """One way to compute it, in the memory format that it gets in its own code base."""

    name: str
    operator: Operator
    memory_format: torch.memory_format


LEVEL_SIZES = {"P3": (100, 168), "P4": (50, 84), "P5": (25, 42), "P6": (13, 21), "P7": (7, 11)}
CASES = [
    *(
        Case(f"{level}, batch {n}", (n, 256, *size))
        for n in (1, 2)
        for level, size in LEVEL_SIZES.items()
    ),
    Case("1000 RoIs", (1000, 256, 7, 7)),
]
QUICK_CASES = [Case("small level", (2, 32, 5, 7)), Case("9 RoIs", (9, 16, 3, 3))]


def affine_maps(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """a1 . x + b1 and a2 . x + b2 with one PyTorch call per layer, as in published detectors."""
    n, channels = x.shape[:2]
    pooled = F.adaptive_avg_pool2d(x, 1).view(n, channels)
    hidden = F.relu(F.linear(pooled, fc1_weight, fc1_bias))
    gate = F.relu6(F.linear(hidden, fc2_weight, fc2_bias) + 3) / 6
    a1, b1, a2, b2 = gate.view(n, 4 * channels, 1, 1).split(channels, dim=1)
    a1 = (a1 - 0.5) * 2 + 1
    a2 = (a2 - 0.5) * 2
    return x * a1 + (b1 - 0.5), x * a2 + (b2 - 0.5)


def layer_by_layer(*arguments: Tensor) -> Tensor:
    """Dynamic ReLU of x, fc1_weight, fc1_bias, fc2_weight and fc2_bias."""
    return torch.max(*affine_maps(*arguments))


def implementations(
    device: torch.device, quick: bool
) -> tuple[list[Implementation], dict[str, str]]:
    """What to compare, ours first, and what was left out and why.

    Args:
        device: where it is to run.
        quick: leave out what takes long to get ready.
    """
    nchw = torch.contiguous_format
    chosen = [
        Implementation(OURS, functional.dynamic_relu, torch.channels_last),
        Implementation(f"{OURS}, NCHW", functional.dynamic_relu, nchw),
        Implementation("layer by layer", layer_by_layer, nchw),
    ]
    problem = "--quick does not compile" if quick else _compiler_problem(device)
    if problem is None:
        chosen.append(Implementation(COMPILED, torch.compile(layer_by_layer), nchw))
    chosen.append(Implementation("reference", reference.dynamic_relu, nchw))
    return chosen, {} if problem is None else {COMPILED: problem}


def _compiler_problem(device: torch.device) -> str | None:
    try:
        torch.compile(_probe)(torch.ones(16, device=device))
    except Exception as error:  # whatever is missing: a compiler, Triton, a supported GPU
        line = (str(error).strip() or "no reason given").splitlines()[0]
        return f"torch.compile does not work here: {type(error).__name__}: {line}"
    return None


def _probe(x: Tensor) -> Tensor:
    return x.relu() + 1


def make_parameters(channels: int, device: torch.device, dtype: str) -> list[Tensor]:
    """Random fc1_weight, fc1_bias, fc2_weight and fc2_bias, of PyTorch's usual size."""
    hidden = max(1, channels // REDUCTION)
    shapes = [(hidden, channels), (hidden,), (4 * channels, hidden), (4 * channels,)]
    bounds = [channels**-0.5] * 2 + [hidden**-0.5] * 2
    return [
        torch.empty(shape, device=device).uniform_(-bound, bound).to(getattr(torch, dtype))
        for shape, bound in zip(shapes, bounds, strict=True)
    ]


@dataclass(frozen=True)
class Measurement:
    """Time and error of one implementation on one case."""

    case: str
    shape: tuple[int, int, int, int]
    dtype: str
    direction: str
    implementation: str
    memory_format: str
    bytes: int
    error: float  # relative L2, the largest of the result and all gradients
    timing: timing.Timing

    @property
    def gb_per_s(self) -> float:
        return self.bytes / self.timing.median / 1e9


class WrongResultError(Exception):
    """An implementation whose result is too far from the float64 reference to be worth timing."""


@dataclass(frozen=True)
class Problem:
    """A case with its data and, in float64, its results."""

    case: Case
    dtype: str
    x: Tensor
    grad_out: Tensor
    parameters: list[Tensor]
    expected: list[Tensor]  # the result, then the gradients of x and of the parameters

    @classmethod
    def random(cls, case: Case, dtype: str, device: torch.device) -> Problem:
        """Normal inputs of the case's shape, the same at every call."""
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        x, grad_out = (torch.randn(case.shape, device=device).to(kind) for _ in range(2))
        parameters = make_parameters(case.shape[1], device, dtype)
        # Where the two maps meet, the gradient jumps and rounding decides: keep away from there.
        first, second = affine_maps(*(t.double() for t in (x, *parameters)))
        x[(first - second).abs() < JUMP_BAND] = 1
        leaves = [t.double().requires_grad_() for t in (x, *parameters)]
        judge: Operator = reference.dynamic_relu
        out = judge(*leaves)
        gradients = torch.autograd.grad(out, leaves, grad_out.double())
        return cls(case, dtype, x, grad_out, parameters, [out.detach(), *gradients])

    def action(self, how: Implementation, direction: str) -> Callable[[], list[Tensor]]:
        """What to time: it returns the result, and for both directions the gradients too."""
        x = self.x.contiguous(memory_format=how.memory_format)
        if direction == FORWARD:

            def forward() -> list[Tensor]:
                with torch.no_grad():
                    return [how.operator(x, *self.parameters)]

            return forward

        leaves = [t.detach().requires_grad_() for t in (x, *self.parameters)]
        grad_out = self.grad_out.contiguous(memory_format=how.memory_format)

        def both() -> list[Tensor]:
            out = how.operator(*leaves)
            return [out, *torch.autograd.grad(out, leaves, grad_out)]

        return both

    def check(self, how: Implementation, results: Sequence[Tensor]) -> float:
        """The largest relative error of the results.

        Raises:
            WrongResultError: it is larger than allowed.
        """
        errors = [
            timing.relative_error(result, expected)
            for result, expected in zip(results, self.expected, strict=False)
        ]
        ours = how.operator is functional.dynamic_relu
        tolerance = (timing.TOLERANCES if ours else PEER_TOLERANCES)[self.dtype]
        for index, error in enumerate(errors):
            allowed = tolerance * (2 if index else 1)
            if not error <= allowed:
                what = "the result" if index == 0 else f"gradient {index - 1}"
                raise WrongResultError(
                    f"{how.name}, {self.case.name}, {self.dtype}: expected a relative error of "
                    f"{what} of at most {allowed:.0e}, got {error:.1e}"
                )
        return max(errors)


def measure_all(
    cases: Sequence[Case],
    dtypes: Sequence[str],
    compared: Sequence[Implementation],
    device: torch.device,
    effort: timing.Effort,
) -> list[Measurement]:
    """Checks, then times every implementation on every case in every direction.

    Raises:
        WrongResultError: an implementation is wrong.
    """
    measurements = []
    for dtype in dtypes:
        for direction, transfers in TRANSFERS.items():
            torch.compiler.reset()  # or the limit on recompilations would turn it off
            for case in cases:
                problem = Problem.random(case, dtype, device)
                for how in compared:
                    action = problem.action(how, direction)
                    error = problem.check(how, action())
                    measurements.append(
                        Measurement(
                            case.name,
                            case.shape,
                            dtype,
                            direction,
                            how.name,
                            str(how.memory_format).removeprefix("torch."),
                            transfers * problem.x.nbytes,
                            error,
                            timing.measure(action, device, effort),
                        )
                    )
    return measurements


def as_data(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """The measurements for JSON, with GB/s and the time relative to ours."""
    ours = _ours(measurements)
    rows = []
    for m in measurements:
        row = asdict(m)
        timings = {f"{key}_s" if key != "runs" else key: v for key, v in row.pop("timing").items()}
        ratio = m.timing.median / ours[_key(m)].timing.median
        rows.append({**row, **timings, "gb_per_s": m.gb_per_s, "times_ours": ratio})
    return rows


def _key(m: Measurement) -> tuple[str, str, str]:
    return m.dtype, m.direction, m.case


def _ours(measurements: Sequence[Measurement]) -> dict[tuple[str, str, str], Measurement]:
    return {_key(m): m for m in measurements if m.implementation == OURS}


def print_tables(console: Console, measurements: Sequence[Measurement]) -> None:
    """One table for each dtype and direction: our time and bandwidth, and the peers' times."""
    names = list(dict.fromkeys(m.implementation for m in measurements))
    ours = _ours(measurements)
    for dtype, direction in dict.fromkeys((m.dtype, m.direction) for m in measurements):
        table = Table(title=f"Dynamic ReLU, {direction}, {dtype}", title_justify="left")
        table.add_column("input\n[N, C, H, W]", no_wrap=True)
        table.add_column(f"{names[0]}\nms (half IQR)", justify="right")
        table.add_column("\nGB/s", justify="right")
        table.add_column("\nerror", justify="right")
        for name in names[1:]:
            table.add_column(f"{name}\nms (x ours)", justify="right")
        found = {(_key(m), m.implementation): m for m in measurements}
        for key, m in ours.items():
            if key[:2] != (dtype, direction):
                continue
            t = m.timing
            spread = (t.upper_quartile - t.lower_quartile) / 2 / t.median
            cells = [
                f"{m.case} {list(m.shape)}",
                f"{t.median * 1e3:.3f} ({spread:.0%})",
                f"{m.gb_per_s:.1f}",
                f"{m.error:.0e}",
            ]
            for name in names[1:]:
                peer = found[key, name].timing.median
                cells.append(f"{peer * 1e3:.3f} ({peer / t.median:.1f})")
            table.add_row(*map(escape, cells))
        console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0, or 1 if a result is wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__)
    timing.add_arguments(parser)
    arguments = parser.parse_args(argv)
    device = timing.chosen_device(arguments, parser)
    console = timing.console_for(arguments)
    facts = timing.environment(NAME, argv, device)
    console.print(escape(timing.format_environment(facts)))
    if not library.loaded(device.type):
        problem = library.reason(device.type)
        console.print(escape(f"{OURS} runs on the reference: no {device.type} library: {problem}"))
    compared, skipped = implementations(device, arguments.quick)
    for name, reason in skipped.items():
        console.print(escape(f"{name} left out: {reason}"))
    cases = QUICK_CASES if arguments.quick else CASES
    effort = timing.QUICK if arguments.quick else timing.usual_effort(device)
    dtypes = timing.chosen_dtypes(arguments, device)
    try:
        measurements = measure_all(cases, dtypes, compared, device, effort)
    except WrongResultError as error:
        console.print(f"[bold red]wrong result:[/] {escape(str(error))}")
        return 1
    print_tables(console, measurements)
    console.print("GB/s: bytes that have to move / median. Error: relative L2 against float64.")
    data = {**facts, "skipped": skipped, "results": as_data(measurements)}
    timing.write_json(data, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
