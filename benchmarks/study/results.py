"""The files that a study leaves, and the numbers derived from them.

In a folder: ``runs/NAME-seed-N.json`` of each finished training, ``search/NAME-lr-RATE.json`` of
each that looked for a learning rate, and ``costs.json``. A training's file is an object with

- ``schema`` (3), ``setup`` (what :func:`~benchmarks.study.setup.fingerprint` makes of its
  settings), ``settings`` (of model, data and training), ``name``, ``seed``, ``lr``;
- ``machine``, ``commit``, ``date``;
- ``summary`` and ``per_class`` (fractions, null where undefined), ``agnostic_ap`` (AP without
  regard to classes), ``positives`` (for each level how many anchors the assigner trains, and of how
  many of them the highest logit is that of the right class), ``curve`` (pairs of step and AP);
- or, instead of the metrics, ``failed``: why it could not be finished.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.setup import RUNS, SEARCH, Setup, Trial, fingerprint
from benchmarks.study.variants import VARIANTS
from dyhead_cuda.detection.files import write_json
from dyhead_cuda.detection.training.runs import read_json

SCHEMA = 3
COSTS = "costs.json"

Record = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What is known of a setup.

    Attributes:
        setup: of all that is here.
        searches: by variant the results of its search, by learning rate.
        rates: by variant the learning rate that its search has found; None while it goes on.
        runs: by variant those of its runs, in the order of their seeds.
        costs: by variant its parameters, gflops of one image, step_ms and prediction_ms.
        machine: where the costs were measured, :func:`benchmarks.machine.environment`; None before.
        ignored: files of another setup.
    """

    setup: Setup
    searches: dict[str, dict[float, Record]]
    rates: dict[str, float | None]
    runs: dict[str, list[Record]]
    costs: dict[str, dict[str, float]]
    machine: dict[str, Any] | None
    ignored: list[str]


def read(folder: Path, setup: Setup) -> Study:
    """What a folder has of a setup; what it has of another one is only counted.

    Raises:
        dyhead_cuda.detection.training.runs.RunError: a file cannot be read.
        ValueError: a file is of something else.
    """
    ignored: list[str] = []
    searched = {(trial.name, trial.lr): trial for trial in setup.search(VARIANTS)}
    searches: dict[str, dict[float, Record]] = {name: {} for name in VARIANTS}
    for record in _matching(
        folder / SEARCH, setup, lambda it: searched.get((it["name"], it["lr"])), ignored
    ):
        searches[record["name"]][record["lr"]] = record
    rates = {name: _best(setup, found) for name, found in searches.items()}

    def planned(record: Record) -> Trial | None:
        rate = rates.get(record["name"])
        return None if rate is None else setup.run(record["name"], record["seed"], rate)

    runs: dict[str, list[Record]] = {name: [] for name in VARIANTS}
    for record in _matching(folder / RUNS, setup, planned, ignored):
        runs[record["name"]].append(record)
    for records in runs.values():
        records.sort(key=lambda record: int(record["seed"]))
    costs, machine = _costs(folder / COSTS, setup, ignored)
    return Study(setup, searches, rates, runs, costs, machine, ignored)


def _best(setup: Setup, found: dict[float, Record]) -> float | None:
    """The rate of the highest AP; of equals the lowest."""
    if any(rate not in found for rate in setup.rates):
        return None
    return max(sorted(setup.rates), key=lambda rate: _or(search_ap(found[rate]), -1.0))


def search_ap(record: Record) -> float | None:
    """The AP that one rate of a search came to; None where it failed."""
    ap: float | None = None if "failed" in record else record["summary"]["AP"]
    return ap


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _matching(
    folder: Path, setup: Setup, planned: Callable[[Record], Trial | None], ignored: list[str]
) -> list[Record]:
    """The files of the setup: those with the settings of the training that they were planned as."""
    found = []
    for path in sorted(folder.glob("*.json")):
        record = _read(path)
        trial = planned(record)
        if trial is not None and record["setup"] == fingerprint(setup.settings(trial)):
            found.append(record)
        else:
            ignored.append(f"{folder.name}/{path.name}")
    return found


def _costs(path: Path, setup: Setup, ignored: list[str]) -> tuple[dict[str, Any], Any]:
    if not path.exists():
        return {}, None
    content = _read(path)
    costs = {}
    for name, found in content["variants"].items():
        if name in VARIANTS and found["setup"] == fingerprint(cost_settings(setup, name)):
            costs[name] = found
        else:
            ignored.append(f"{name} in {path.name}")
    return costs, content["environment"]


def cost_settings(setup: Setup, name: str) -> dict[str, Any]:
    """All that determines what a variant costs."""
    settings = setup.settings(setup.run(name, 0, setup.rates[0]))
    return {"model": settings["model"], "batch_size": setup.batch_size}


def _read(path: Path) -> Record:
    record = read_json(path)
    if record.get("schema") != SCHEMA:
        raise ValueError(
            f"expected results of a study of schema {SCHEMA} in {path}, got schema "
            f"{record.get('schema')!r}; move the file away"
        )
    return record


def write(folder: Path, path: str, record: Record) -> None:
    """Writes results as ``folder/path``, a ".json"; a reader never sees half of them."""
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, {"schema": SCHEMA, **record}, "")


# What is shown of each run, as fractions: by name, from its file.
METRICS: dict[str, Callable[[Record], float | None]] = {
    **{
        name: lambda record, name=name: record["summary"][name]  # type: ignore[misc]
        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")
    },
    "agnostic AP": lambda record: record["agnostic_ap"],
    "class accuracy": lambda record: _share(record["positives"]),
}


def _share(positives: dict[str, dict[str, int]]) -> float | None:
    anchors = sum(level["anchors"] for level in positives.values())
    return sum(level["right"] for level in positives.values()) / anchors if anchors else None


def values(study: Study, name: str, metric: str = "AP") -> dict[int, float]:
    """A metric of all runs of a variant, by seed; nan where it is undefined."""
    return {record["seed"]: _or(METRICS[metric](record), math.nan) for record in study.runs[name]}


def mean_and_spread(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; nan of too few numbers, or if one is nan."""
    if not numbers or any(math.isnan(number) for number in numbers):
        return math.nan, math.nan
    spread = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
    return statistics.fmean(numbers), spread


def difference(study: Study, name: str, base: str, metric: str = "AP") -> tuple[float, float]:
    """Mean and spread of the differences of runs with the same seed."""
    ours, theirs = values(study, name, metric), values(study, base, metric)
    return mean_and_spread([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
