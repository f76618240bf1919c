"""Made-up results of the benchmarks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.cases.heads import RECOMPUTE
from benchmarks.cases.problems import BOTH, FORWARD, OURS
from benchmarks.measuring.timing import COLD, GRAPH, Timing
from benchmarks.reports import targets
from benchmarks.reports.results import Row


def environment(device: str = "cuda") -> dict[str, Any]:
    return {
        "command": "python -m benchmarks --some options",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789ab",
        "device": device,
        "processor": "a processor",
        "threads": 2,
        "versions": {"torch": "2.11.0"},
    }


CEILINGS = {"copy_gb_per_s": 4000.0, "product_tflop_per_s": {"bfloat16": 800.0, "float32": 50.0}}


def row(implementation: str = OURS, seconds: float = 0.01, **options: Any) -> Row:
    timing = Timing(seconds, seconds * 0.99, seconds * 1.01, 10)
    fields: dict[str, Any] = {
        "case": "head",
        "shapes": "glip",
        "batch": 8,
        "blocks": 6,
        "channels": 256,
        "direction": FORWARD,
        "precision": "bfloat16",
        "ran_in": "bfloat16",
        "status": "ok",
        "flops": 2 * 10**12,
        "bytes": 10**9,
        "times": {COLD: timing},
    }
    return Row(implementation=implementation, **{**fields, **options})


def fast_rows() -> list[Row]:
    """Results that reach every target."""

    def cell(
        direction: str, batch: int, precision: str, times: dict[str, float], memory: dict[str, int]
    ) -> list[Row]:
        rows = []
        for name, seconds in times.items():
            made = row(name, seconds, direction=direction, batch=batch, precision=precision)
            launches = 36 if direction == FORWARD and name == OURS else None
            rows.append(replace(made, ran_in=precision, memory=memory.get(name), launches=launches))
        return rows

    a, b = targets.LAYERS, targets.COMPILED
    forward = cell(FORWARD, 8, "bfloat16", {OURS: 0.005, a: 0.05, b: 0.03}, {OURS: 25, a: 100})
    single = cell(FORWARD, 1, "bfloat16", {OURS: 0.001, a: 0.1}, {})
    graph = {**single[0].times, GRAPH: Timing(0.0009, 0.0008, 0.001, 9)}
    single[0] = replace(single[0], times=graph)
    full = cell(FORWARD, 1, "float32", {OURS: 0.01, a: 0.04}, {})
    times = {OURS: 0.01, a: 0.08, b: 0.05, RECOMPUTE: 0.012}
    both = cell(BOTH, 8, "bfloat16", times, {OURS: 20, a: 60, RECOMPUTE: 10})
    full_both = cell(BOTH, 1, "float32", {OURS: 0.01, a: 0.04}, {})
    return [*forward, *single, *full, *both, *full_both]
