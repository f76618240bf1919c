"""The file that a study leaves, and the numbers derived from it.

An object with ``schema`` (2), ``environment`` (:func:`benchmarks.machine.environment`),
``setup``, ``tables`` (the names of those that were run), and ``variants``: for each its label,
``parameters``, ``gflops`` of one image, ``step_ms``, ``prediction_ms`` and ``runs``, one for each
seed, with ``seed``, ``summary`` and ``per_class`` (fractions, null where undefined) and ``curve``
(pairs of step and AP).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyhead_cuda.detection.training.runs import read_json

SCHEMA = 2

Study = dict[str, Any]


def read(path: Path) -> Study:
    """The study in a file.

    Raises:
        dyhead_cuda.detection.training.runs.RunError: the file cannot be read.
        ValueError: it is of something else.
    """
    study = read_json(path)
    if study.get("schema") != SCHEMA or "variants" not in study:
        raise ValueError(
            f"expected a study of schema {SCHEMA} in {path}, got schema {study.get('schema')!r}; "
            "run the study again: finished runs are kept"
        )
    return study


def write(path: Path, study: Study) -> None:
    """Writes a study as JSON."""
    path.write_text(json.dumps({"schema": SCHEMA, **study}, indent=1) + "\n")


def values(study: Study, name: str, metric: str = "AP") -> list[float]:
    """A metric of all runs of a variant, by seed; nan where it is undefined."""
    runs = sorted(study["variants"][name]["runs"], key=lambda run: run["seed"])
    found = (run["summary"][metric] for run in runs)
    return [math.nan if value is None else value for value in found]


def mean_and_spread(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (nan of fewer than two numbers)."""
    spread = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
    return statistics.fmean(numbers), spread


def difference(study: Study, name: str, baseline: str) -> tuple[float, float]:
    """Mean and spread of the AP differences of runs with the same seed."""
    pairs = zip(values(study, name), values(study, baseline), strict=True)
    return mean_and_spread([ours - theirs for ours, theirs in pairs])
