"""Results of a benchmark run: rows of measurements, their JSON, and derived numbers.

The file is an object with ``schema`` (1), ``environment`` (:func:`machine.environment`),
``ceilings`` (:func:`machine.ceilings`, or null) and ``rows``: one for each implementation,
precision and direction of a case at one size, with the fields of :class:`Row`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.cases.precisions import PRECISIONS
from benchmarks.cases.problems import DIRECTIONS, OURS
from benchmarks.measuring.timing import COLD, GRAPH, METHODS, WARM, Timing

SCHEMA = 1
OK, WRONG, FAILED, SKIPPED = "ok", "wrong", "failed", "skipped"
STATUSES = (OK, WRONG, FAILED, SKIPPED)

# The time that represents a row: cold if it has it, since other layers evict the inputs.
PREFERRED = (COLD, WARM, GRAPH)

Key = tuple[str, str, int, int, int, str, str]


class ResultsError(Exception):
    """A file that is not what a benchmark run writes."""


@dataclass(frozen=True)
class Row:
    """One implementation of one case.

    Attributes:
        case, shapes, batch, blocks, channels, direction, precision, implementation: what it is.
        ran_in: the precision that it ran in, another one where it does not support the row's.
        status: "ok"; "wrong", "failed" or "skipped" with the reason in ``remark`` and no times.
        error: the largest relative L2 error against the float64 reference.
        checked: against which results, e.g. "small", "real".
        flops, bytes: what the case has to do at least (:class:`problems.Work`).
        times: seconds by method (:data:`timing.METHODS`).
        memory: bytes needed at the peak beyond inputs and parameters.
        launches: kernels that one run launches on a GPU.
    """

    case: str
    shapes: str
    batch: int
    blocks: int
    channels: int
    direction: str
    precision: str
    implementation: str
    ran_in: str
    status: str
    remark: str = ""
    error: float | None = None
    checked: list[str] = field(default_factory=list)
    flops: int = 0
    bytes: int = 0
    times: dict[str, Timing] = field(default_factory=dict)
    memory: int | None = None
    launches: int | None = None

    @property
    def key(self) -> Key:
        """Equal for the implementations of one case, size, direction and precision."""
        return (
            *(self.case, self.shapes, self.batch, self.blocks),
            *(self.channels, self.direction, self.precision),
        )

    @property
    def time(self) -> Timing | None:
        """The time that stands for the row."""
        return next((self.times[m] for m in PREFERRED if m in self.times), None)

    @property
    def tflop_per_s(self) -> float | None:
        return self.flops / self.time.median / 1e12 if self.time and self.flops else None

    @property
    def gb_per_s(self) -> float | None:
        return self.bytes / self.time.median / 1e9 if self.time else None


@dataclass
class Results:
    """A whole run."""

    environment: dict[str, Any]
    ceilings: dict[str, Any] | None = None
    rows: list[Row] = field(default_factory=list)

    def group(self, row: Row) -> dict[str, Row]:
        """All implementations of what ``row`` measures, by name."""
        return {r.implementation: r for r in self.rows if r.key == row.key}

    def groups(self) -> list[dict[str, Row]]:
        """All rows, those that belong together by implementation, in the order measured."""
        found: dict[Key, dict[str, Row]] = {}
        for row in self.rows:
            found.setdefault(row.key, {})[row.implementation] = row
        return list(found.values())

    @property
    def rates(self) -> dict[str, float]:
        """TFLOP/s that nothing can exceed, by precision; empty where they were not measured.

        On a CPU those of multiply-adds on registers, as ``torch.mm`` may be far from them.
        """
        if self.ceilings is None:
            return {}
        name = "fma_tflop_per_s" if self.environment["device"] == "cpu" else "product_tflop_per_s"
        found: dict[str, float] = self.ceilings.get(name, {})
        return found

    def roofline_seconds(self, row: Row) -> float | None:
        """The minimum time that the measured rates allow: the longer of products and bytes.

        Products count at the rate of the precision that the row ran in.
        """
        if self.ceilings is None or not self.rates:
            return None
        seconds = row.bytes / (self.ceilings["copy_gb_per_s"] * 1e9)
        if row.flops:
            rate = self.rates.get(row.ran_in)
            if rate is None:
                return None
            seconds = max(seconds, row.flops / (rate * 1e12))
        return seconds

    def of_roofline(self, row: Row) -> float | None:
        """Roofline time over measured time; 1 is perfect."""
        least = self.roofline_seconds(row)
        return least / row.time.median if least is not None and row.time else None

    def as_data(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "ceilings": self.ceilings,
            "rows": [asdict(row) for row in self.rows],
        }


def ratio(peer: Row | None, own: Row | None) -> float | None:
    """How many times longer ``peer`` takes than ``own``."""
    if peer is None or own is None or peer.time is None or own.time is None:
        return None
    return peer.time.median / own.time.median


def own_row(group: dict[str, Row]) -> Row | None:
    return group.get(OURS)


def write(results: Results, target: str) -> None:
    """Writes JSON to a file, or to stdout for "-"."""
    # One row per line keeps diffs small.
    data = results.as_data()
    rows = ",\n  ".join(json.dumps(row) for row in data.pop("rows"))
    head = json.dumps(data, indent=1).removesuffix("\n}")
    text = f'{head},\n "rows": [\n  {rows}\n ]\n}}\n'
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text)


def read(path: Path) -> Results:
    """Reads what :func:`write` wrote.

    Raises:
        ResultsError: no such file, or it does not keep to the schema, with the place.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"{path}: expected JSON written by python -m benchmarks --json: {error}"
        ) from None
    try:
        return from_data(data)
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}") from None


def from_data(data: Any) -> Results:
    """The inverse of :meth:`Results.as_data`, checking every field.

    Raises:
        ResultsError: it does not keep to the schema.
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        got = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ResultsError(f"expected an object with schema {SCHEMA}, got {got!r}; measure again")
    environment, ceilings = data.get("environment"), data.get("ceilings")
    if not isinstance(environment, dict):
        raise ResultsError("expected environment to be an object")
    missing = {"command", "date", "commit", "device", "processor", "versions"} - set(environment)
    if missing:
        raise ResultsError(f"environment lacks {sorted(missing)}")
    if ceilings is not None and set(ceilings) - {"fma_tflop_per_s"} != {
        "copy_gb_per_s",
        "product_tflop_per_s",
    }:
        raise ResultsError("expected ceilings to be null or rates of copies and products")
    rows = data.get("rows")
    if not isinstance(rows, list):
        raise ResultsError("expected rows to be a list")
    return Results(environment, ceilings, [_row(i, row) for i, row in enumerate(rows)])


_REQUIRED = {f.name for f in fields(Row) if f.default is MISSING and f.default_factory is MISSING}
_CHOICES: dict[str, Sequence[str]] = {
    "direction": DIRECTIONS,
    "precision": tuple(PRECISIONS),
    "ran_in": tuple(PRECISIONS),
    "status": STATUSES,
}


def _row(index: int, data: Any) -> Row:
    if not isinstance(data, dict):
        raise ResultsError(f"row {index}: expected an object, got {type(data).__name__}")
    names = {f.name for f in fields(Row)}
    if not set(data) <= names or not set(data) >= _REQUIRED:
        wrong = sorted(set(data) - names) + sorted(_REQUIRED - set(data))
        raise ResultsError(f"row {index}: unknown or missing fields {wrong}")
    for name, choices in _CHOICES.items():
        if data[name] not in choices:
            raise ResultsError(f"row {index}: expected {name} of {choices}, got {data[name]!r}")
    times = data.get("times", {})
    if not set(times) <= set(METHODS) or (data["status"] == OK) != bool(times):
        raise ResultsError(f"row {index}: expected times of an ok row alone, got {sorted(times)}")
    try:
        made = {method: Timing(**values) for method, values in times.items()}
    except TypeError as error:
        raise ResultsError(f"row {index}: {error}") from None
    for timing in made.values():
        if not 0 < timing.lower_quartile <= timing.median <= timing.upper_quartile:
            raise ResultsError(f"row {index}: quartiles out of order: {timing}")
    return Row(**{**data, "times": made})
