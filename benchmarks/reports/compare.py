"""Two runs of one machine: what became slower, larger or wrong."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from benchmarks.cases.problems import OURS
from benchmarks.reports.results import OK, SKIPPED, Results, ResultsError, Row, read

SAME = ("device", "processor", "threads")
MIN_MEMORY_GROWTH = 2**20  # bytes; smaller differences are noise of the allocator


@dataclass(frozen=True)
class Change:
    """One row in two runs.

    Attributes:
        before, after: the row; None for ``after`` where it was not measured again.
        ratio: time after over time before; None where one is missing.
        regression: why it is one, or "".
    """

    before: Row
    after: Row | None
    ratio: float | None
    regression: str = ""


def run(arguments: argparse.Namespace) -> int:
    """Prints how two runs differ; returns 1 if there is a regression."""
    before, after = read(arguments.before), read(arguments.after)
    if not arguments.force:
        same_machine(before, after)
    changes = compare(before, after, arguments.threshold)
    print(format_changes(changes))
    return int(any(change.regression for change in changes))


def same_machine(before: Results, after: Results) -> None:
    """Raises ResultsError where times of the two cannot be compared."""
    for name in SAME:
        a, b = (results.environment.get(name) for results in (before, after))
        if a != b:
            raise ResultsError(
                f"expected two runs of one machine, got {name} {a!r} and {b!r}; "
                "--force compares them anyway"
            )


def compare(before: Results, after: Results, threshold: float) -> list[Change]:
    """The changes of all rows that were measured in ``before``.

    A regression is a row of ours that is no longer right, or whose median grew by more than
    ``threshold`` (0.05 is 5 %) and beyond the quartiles of both runs, or whose memory grew by more
    than that. Peers are there to show how far the machine itself differed.
    """
    later = {(row.key, row.implementation): row for row in after.rows}
    return [
        _change(row, later.get((row.key, row.implementation)), threshold)
        for row in before.rows
        if row.status == OK
    ]


def _change(before: Row, after: Row | None, threshold: float) -> Change:
    if after is None or after.status == SKIPPED:
        return Change(before, None, None)
    own = before.implementation.startswith(OURS)
    if after.status != OK:
        return Change(before, after, None, f"{after.status}: {after.remark}" if own else "")
    method = next((m for m in before.times if m in after.times), None)
    if method is None:
        return Change(before, after, None)
    a, b = before.times[method], after.times[method]
    ratio = b.median / a.median
    reasons = []
    if ratio > 1 + threshold and b.lower_quartile > a.upper_quartile:
        reasons.append(f"{ratio - 1:.0%} slower")
    if before.memory is not None and after.memory is not None:
        growth = after.memory - before.memory
        if growth > max(threshold * before.memory, MIN_MEMORY_GROWTH):
            reasons.append(f"{growth / 2**20:.0f} MiB more memory")
    return Change(before, after, ratio, ", ".join(reasons) if own else "")


def format_changes(changes: list[Change]) -> str:
    """A line for each row of ours, and one with the median change of the peers."""
    lines = []
    peers = []
    for change in changes:
        row = change.before
        if not row.implementation.startswith(OURS):
            if change.ratio is not None:
                peers.append(change.ratio)
            continue
        what = f"{row.case}, {row.shapes}, batch {row.batch}, {row.precision}, {row.direction}"
        if row.blocks > 1:
            what += f", {row.blocks} blocks"
        if row.implementation != OURS:
            what += f" ({row.implementation})"
        verdict = f"REGRESSION: {change.regression}" if change.regression else ""
        if change.after is None:
            verdict = "not measured again"
        times = "" if change.ratio is None else f"x {change.ratio:.3f}"
        lines.append(f"{what:<72} {times:>8}  {verdict}".rstrip())
    if peers:
        middle = sorted(peers)[len(peers) // 2]
        lines.append(f"peers, which did not change: x {middle:.3f} in the middle of {len(peers)}")
    found = sum(bool(change.regression) for change in changes)
    lines.append(f"{found} regression{'' if found == 1 else 's'}")
    return "\n".join(lines)
