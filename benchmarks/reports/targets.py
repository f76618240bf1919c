"""The targets of the project for speed and memory, and whether results reach them.

(a) is the published block layer by layer on ``torchvision.ops.deform_conv2d``, in the same
precision where it supports it, else in its own best; (b) is the same under torch.compile. All are
for the levels of an 800x1344 image with 256 channels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.cases.heads import RECOMPUTE
from benchmarks.cases.problems import BOTH, FORWARD, OURS
from benchmarks.measuring.timing import GRAPH
from benchmarks.reports.results import OK, Results, Row, ratio, read

LAYERS, COMPILED = "torchvision", "torchvision, torch.compile"
REACHED, FIRST_STEP, MISSED, NOT_MEASURED = "reached", "first step", "missed", "not measured"

Group = dict[str, Row]
Measure = Callable[[Results, Group], "float | None"]


@dataclass(frozen=True)
class Target:
    """One number to reach.

    Attributes:
        stage: "forward" or "backward" of CUDA.
        title: for the table.
        limit: the number; ``at_least`` says from which side.
        measure: gets the number from all implementations of what is measured.
        peer: the implementation that ours is compared with, if any; a run that did not ask for it
            says nothing about the target.
        case, blocks, batch, precision, direction: what is measured; a batch of 0 stands for every
            batch that was measured, and the worst one counts.
        first_step: a limit that counts as a first step.
        form: of the number.
    """

    stage: str
    title: str
    limit: float
    at_least: bool
    measure: Measure
    case: str = "head"
    blocks: int = 6
    batch: int = 8
    precision: str = "bfloat16"
    direction: str = FORWARD
    peer: str = ""
    first_step: float | None = None
    form: str = ".1f"


@dataclass(frozen=True)
class Verdict:
    """What a run says about a target."""

    target: Target
    value: float | None
    verdict: str


def faster_than(peer: str) -> Measure:
    return lambda _, group: ratio(group.get(peer), group.get(OURS))


def memory_share(own: str = OURS) -> Measure:
    """Our memory over that of (a)."""

    def measure(_: Results, group: Group) -> float | None:
        a, b = group.get(own), group.get(LAYERS)
        if a is None or b is None or a.memory is None or not b.memory:
            return None
        return a.memory / b.memory

    return measure


def _of_roofline(results: Results, group: Group) -> float | None:
    row = group.get(OURS)
    return None if row is None else results.of_roofline(row)


def _graph_milliseconds(_: Results, group: Group) -> float | None:
    row = group.get(OURS)
    timing = row.times.get(GRAPH) if row else None
    return None if timing is None else timing.median * 1e3


def _launches_per_block(_: Results, group: Group) -> float | None:
    row = group.get(OURS)
    return None if row is None or row.launches is None else row.launches / row.blocks


TARGETS = (
    Target("forward", "times faster than (a)", 10, True, faster_than(LAYERS), peer=LAYERS),
    Target("forward", "times faster than (b)", 6, True, faster_than(COMPILED), peer=COMPILED),
    Target("forward", "of the roofline", 0.45, True, _of_roofline, first_step=0.25, form=".0%"),
    Target(
        *("forward", "ms with a CUDA graph", 1.0, False, _graph_milliseconds),
        batch=1,
        form=".2f",
    ),
    Target(
        *("forward", "times faster than (a)", 4, True, faster_than(LAYERS)),
        batch=0,
        precision="float32",
        peer=LAYERS,
    ),
    Target(
        *("forward", "of the memory of (a)", 1 / 4, False, memory_share()),
        peer=LAYERS,
        form=".2f",
    ),
    Target("forward", "kernels per block", 6, False, _launches_per_block, batch=0),
    Target(
        *("backward", "times faster than (a)", 8, True, faster_than(LAYERS)),
        direction=BOTH,
        peer=LAYERS,
    ),
    Target(
        *("backward", "times faster than (b)", 5, True, faster_than(COMPILED)),
        direction=BOTH,
        peer=COMPILED,
    ),
    Target(
        *("backward", "times faster than (a)", 4, True, faster_than(LAYERS)),
        batch=0,
        precision="float32",
        peer=LAYERS,
        direction=BOTH,
    ),
    Target(
        *("backward", "of the memory of (a)", 1 / 3, False, memory_share()),
        direction=BOTH,
        peer=LAYERS,
        form=".2f",
    ),
    Target(
        *("backward", "of the memory of (a), recompute=True", 1 / 6, False),
        memory_share(RECOMPUTE),
        direction=BOTH,
        peer=LAYERS,
        form=".2f",
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Prints what files say about every target; returns the exit status."""
    print(format_verdicts(judge([read(path) for path in arguments.files])))
    return 0


def judge(runs: Sequence[Results]) -> list[Verdict]:
    """A verdict on every target; only runs on CUDA count."""
    on_gpu = [run for run in runs if run.environment["device"] == "cuda"]
    return [_judge(target, on_gpu) for target in TARGETS]


def _judge(target: Target, runs: Sequence[Results]) -> Verdict:
    values = _values(target, runs)
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Verdict(target, None, NOT_MEASURED)
    worst = min(known) if target.at_least else max(known)

    def met(limit: float) -> bool:
        return worst >= limit if target.at_least else worst <= limit

    if met(target.limit):
        return Verdict(target, worst, REACHED)
    first = target.first_step is not None and met(target.first_step)
    return Verdict(target, worst, FIRST_STEP if first else MISSED)


def _values(target: Target, runs: Sequence[Results]) -> list[float | None]:
    """The number of each group that fits; None where it was not measured for the target's batch."""
    values = []
    for results in runs:
        for group in results.groups():
            asked = {OURS, target.peer or OURS} <= group.keys()
            if asked and _fits(target, next(iter(group.values()))):
                right = {name: row for name, row in group.items() if row.status == OK}
                value = target.measure(results, right)
                if value is not None or target.batch:
                    values.append(value)
    return values


def _fits(target: Target, row: Row) -> bool:
    wanted = (target.case, target.blocks, target.precision, target.direction, "glip", 256)
    found = (row.case, row.blocks, row.precision, row.direction, row.shapes, row.channels)
    return wanted == found and target.batch in (0, row.batch)


def format_verdicts(verdicts: list[Verdict]) -> str:
    """One line for each target."""
    lines = [f"{'target':<88} {'limit':>8} {'got':>8}  verdict"]
    for v in verdicts:
        t = v.target
        batch = f"batch {t.batch}" if t.batch else "any batch"
        what = f"{t.stage}: {t.blocks} blocks, {batch}, {t.precision}, {t.direction}: {t.title}"
        limit = f"{'>=' if t.at_least else '<='} {t.limit:{t.form}}"
        got = "" if v.value is None else format(v.value, t.form)
        lines.append(f"{what:<88} {limit:>8} {got:>8}  {v.verdict}")
    lines.append("(a) layer by layer on torchvision.ops.deform_conv2d, (b) under torch.compile")
    return "\n".join(lines)
