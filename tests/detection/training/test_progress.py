"""How long a training takes is said once, where it is long."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dyhead_cuda.detection.training import progress


def told(seconds: list[float], steps: int, first: int = 1, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=40, force_terminal=terminal, color_system=None)
    with progress.shown(console, steps) as bar:
        listeners = [bar, progress.foretold(console, steps, "on cpu; fewer --steps shorten it")]
        for step, each in enumerate(seconds, first):
            loss = {"loss": 1.0, "images_per_second": 1.0}
            for listener in listeners:
                listener({"step": step, "seconds": each, **loss})
                listener({"step": step, "evaluated": 1, "to_evaluate": 9})
    said = console.file
    assert isinstance(said, io.StringIO)
    return said.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_long_run_says_so_once(terminal: bool) -> None:
    said = told([900, 81, 79, 500, 80, 80, 80], 1000, terminal=terminal)
    line = "the other 996 steps will take about 22 hours on cpu; fewer --steps shorten it\n"
    assert said.count("will take about") == said.count(line) == 1


@pytest.mark.parametrize(
    ("seconds", "steps", "expected"),
    [
        ([9, 9, 9], 10**6, None),  # too early
        ([100, 1, 1, 1], 1800, None),  # half an hour
        ([100, 1, 1, 1], 1805, "1801 steps will take about 30 minutes"),
        ([1, 10, 10, 10], 604, "600 steps will take about 100 minutes"),
        ([1, 10, 10, 10], 17284, "17280 steps will take about 2 days"),
        ([9, 9, 9, 9], 4, None),
    ],
)
def test_what_is_said(seconds: list[float], steps: int, expected: str | None) -> None:
    said = told(seconds, steps)
    assert (expected in said) if expected else ("will take" not in said)


def test_a_resumed_run_counts_what_is_left() -> None:
    assert "the other 100 steps" in told([60] * 4, 1000, first=897)
    assert "will take" not in told([60] * 4, 1000, first=980)
