"""Results of a study that nobody trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.study import results
from benchmarks.study.setup import Setup, Trial, fingerprint
from benchmarks.study.variants import SEEDS

FACTS = {"machine": "a processor, 2 threads", "commit": "0123456789ab", "date": "2026-01-02"}
ENVIRONMENT = {"device": "cpu", "processor": "another", "threads": 4, "versions": {"torch": "2.9"}}


def record(setup: Setup, trial: Trial, ap: float) -> dict[str, Any]:
    """What a training leaves, with a given AP."""
    return {
        "setup": fingerprint(setup.settings(trial)),
        "name": trial.name,
        "seed": trial.seed,
        "lr": trial.lr,
        **FACTS,
        "summary": {"AP": ap, "AP50": ap, "AP75": ap, "APs": ap, "APm": ap / 2, "APl": None},
        "per_class": {"0": ap},
        "agnostic_ap": 2 * ap,
        "positives": {"P3": {"anchors": 30, "right": 12}, "P4": {"anchors": 10, "right": 8}},
        "curve": [[10, ap / 2], [20, ap]],
    }


def write_searches(folder: Path, setup: Setup, names: list[str]) -> None:
    """A search of each row, which finds the second rate."""
    for trial in setup.search(names):
        ap = 0.2 if trial.lr == setup.rates[1] else 0.1
        results.write(folder, f"{trial.path}.json", record(setup, trial, ap))


def write_runs(folder: Path, setup: Setup, names: list[str], seeds: int = SEEDS) -> None:
    """Runs whose AP tells rows and seeds apart."""
    write_searches(folder, setup, names)
    for index, name in enumerate(names):
        for seed in range(seeds):
            ap = 0.30 + 0.02 * index + 0.01 * (seed - 1) * (-1) ** index
            trial = setup.run(name, seed, setup.rates[1])
            results.write(folder, f"{trial.path}.json", record(setup, trial, ap))


def write_costs(folder: Path, setup: Setup, names: list[str]) -> None:
    """Costs that tell rows apart."""
    found = {
        name: {
            "setup": fingerprint(results.cost_settings(setup, name)),
            "parameters": 1_000_000 * index,
            "gflops": 0.5 * index,
            "step_ms": 100.0 + index,
            "prediction_ms": 40.0 + index,
        }
        for index, name in enumerate(names, 1)
    }
    results.write(folder, results.COSTS, {"environment": ENVIRONMENT, "variants": found})
