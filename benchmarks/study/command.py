"""``python -m benchmarks study``: trains what the study compares, and writes its tables."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

from benchmarks import machine, readme
from benchmarks.study import costs, plots, report, results, runner
from benchmarks.study.setup import QUICK, Setup, Trial
from benchmarks.study.variants import chosen
from dyhead_cuda.commands.common import fail
from dyhead_cuda.detection.training import parallel
from dyhead_cuda.detection.training.runs import RunError
from dyhead_cuda.detection.training.trainer import Interrupted, TrainingError


def run(arguments: argparse.Namespace) -> int:
    """Runs the study.

    Returns:
        0, also if the time was up; 1 if a training failed; 2 if files cannot be used; 130 if it
        was interrupted.
    """
    setup = QUICK if arguments.quick else Setup()
    try:
        # Fail early, before hours of training.
        arguments.results.mkdir(parents=True, exist_ok=True)
        if arguments.write:
            readme.replace_section(arguments.write.read_text(), readme.STUDY, "")
        if arguments.costs:
            _measure_costs(arguments, setup)
        elif not arguments.report:
            _train(arguments, setup)
        study = results.read(arguments.results, setup)
        drawn = plots.draw_all(study, arguments.results)
        base = (arguments.write or arguments.results / "file").resolve().parent
        text = report.section(study, arguments.results.resolve(), base, arguments.seeds)
        if arguments.write:
            readme.write_section(arguments.write, readme.STUDY, text)
    except (Interrupted, KeyboardInterrupt):
        return fail("stopped; run the same command again to go on", 130)
    except TrainingError as error:
        return fail(error, 1)
    except (RunError, OSError, ValueError, ImportError, readme.SectionError) as error:
        return fail(error)
    print(text)
    for path in drawn:
        print(f"wrote {path}")
    return 0


def _tell(line: str) -> None:
    print(line, flush=True)


def _measure_costs(arguments: argparse.Namespace, setup: Setup) -> None:
    device = parallel.choose_device(arguments.device)
    environment = machine.environment(arguments.command_line, device)
    found = costs.costs(setup, chosen(arguments.only), device, rounds=1 if arguments.quick else 10)
    results.write(arguments.results, results.COSTS, {"environment": environment, "variants": found})


def _train(arguments: argparse.Namespace, setup: Setup) -> None:
    study = results.read(arguments.results, setup)
    names = chosen(arguments.only)
    plan = _searches(study, names) if arguments.tune else _runs(study, names, arguments.seeds)
    device = parallel.choose_device(arguments.device)
    environment = machine.environment(arguments.command_line, device)
    facts = {
        "machine": machine.one_line(environment),
        "commit": environment["commit"],
        "date": environment["date"],
    }
    minutes = math.inf if arguments.minutes is None else arguments.minutes
    deadline = time.time() + 60 * minutes
    job = runner.Job(setup, arguments.folder, arguments.results, device.type, facts, deadline)
    done = runner.train_all(job, plan, arguments.jobs, _tell)
    if done < len(plan):
        _tell(
            f"stopped after {minutes:g} minutes, {len(plan) - done} trainings are not finished; "
            "run the same command again to go on"
        )


def _searches(study: results.Study, names: Sequence[str]) -> list[Trial]:
    """Those trainings of the search that are not finished."""
    return [t for t in study.setup.search(names) if t.lr not in study.searches[t.name]]


def _runs(study: results.Study, names: Sequence[str], seeds: int) -> list[Trial]:
    """Those runs that are not finished: all rows with the first seed, then with the next."""
    untuned = [name for name in names if study.rates[name] is None]
    if untuned:
        raise ValueError(
            f"expected the learning rates of all rows to be chosen, got none of "
            f"{', '.join(untuned)}; run with --tune first, or leave rows out with --only"
        )
    finished = {(name, run["seed"]) for name in names for run in study.runs[name]}
    return [
        study.setup.run(name, seed, rate)
        for seed in range(seeds)
        for name in names
        if (name, seed) not in finished and (rate := study.rates[name]) is not None
    ]
