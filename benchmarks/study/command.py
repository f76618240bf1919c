"""``python -m benchmarks study``: trains what the study compares, and writes its tables."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import machine, readme
from benchmarks.study import plots, report, results, runner
from benchmarks.study.setup import QUICK, Setup
from benchmarks.study.variants import VARIANTS, variants_of
from dyhead_cuda.commands.common import fail
from dyhead_cuda.detection.training import parallel
from dyhead_cuda.detection.training.runs import RunError
from dyhead_cuda.detection.training.trainer import Interrupted, TrainingError


def run(arguments: argparse.Namespace) -> int:
    """Runs the study.

    Returns:
        0; 1 if a training failed; 2 if files cannot be used; 130 if it was interrupted.
    """
    target: Path = arguments.json or arguments.folder / "study.json"
    try:
        # Fail early, before hours of training.
        target.parent.mkdir(parents=True, exist_ok=True)
        if arguments.write:
            readme.replace_section(arguments.write.read_text(), readme.STUDY, "")
        if not arguments.report:
            results.write(target, _study(arguments))
        study = results.read(target)
        drawn = plots.draw_all(study, target.with_suffix(""))
        text = report.section(study, target, (arguments.write or target).resolve().parent)
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


def _study(arguments: argparse.Namespace) -> results.Study:
    device = parallel.choose_device(arguments.device)
    setup = QUICK if arguments.quick else Setup()
    names, seeds = variants_of(arguments.tables), range(arguments.seeds)
    environment = machine.environment(arguments.command_line, device)

    def tell(line: str) -> None:
        print(line, flush=True)

    runner.train_all(setup, names, seeds, arguments.folder, arguments.jobs, device.type, tell)
    tell("measuring what each detector costs")
    costs = runner.costs(setup, names, device, rounds=1 if arguments.quick else 10)
    runs = runner.read_runs(arguments.folder, names, seeds)
    variants = {
        name: {"label": VARIANTS[name].label, **costs[name], "runs": runs[name]} for name in names
    }
    return {
        "environment": environment,
        "setup": setup.to_dict(),
        "tables": arguments.tables,
        "variants": variants,
    }
