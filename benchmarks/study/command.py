"""``python -m benchmarks study``: trains what the study compares, and writes its tables."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import machine, readme
from benchmarks.study import plots, report, results, runner
from benchmarks.study.plan import QUICK, TABLES, Plan, variants_of
from dyhead_cuda.commands.common import fail
from dyhead_cuda.commands.options import integer
from dyhead_cuda.detection.training import parallel
from dyhead_cuda.detection.training.parallel import DEVICES
from dyhead_cuda.detection.training.runs import RunError
from dyhead_cuda.detection.training.trainer import Interrupted, TrainingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.set_defaults(run=run)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/study"),
        help="of the runs; finished ones are kept, others resumed (default: %(default)s)",
    )
    parser.add_argument(
        "--tables", nargs="+", choices=TABLES, default=list(TABLES), help="default: all"
    )
    parser.add_argument("--seeds", type=integer(1), default=3, help="runs of each (default: 3)")
    parser.add_argument(
        "--jobs", type=integer(1), default=1, help="runs at a time (default: %(default)s)"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument(
        "--json", type=Path, help="results, with plots beside it (default: FOLDER/study.json)"
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help=f"write the tables between {' and '.join(readme.markers(report.SECTION))} there",
    )
    parser.add_argument("--quick", action="store_true", help="two steps each: to try the command")
    parser.add_argument(
        "--report", action="store_true", help="train nothing: tables and plots of --json as it is"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the study.

    Returns:
        0; 1 if a training failed; 2 if files cannot be used; 130 if it was interrupted.
    """
    target: Path = arguments.json or arguments.folder / "study.json"
    try:
        # Told now, not after hours of training.
        target.parent.mkdir(parents=True, exist_ok=True)
        if arguments.write:
            readme.replace_section(arguments.write.read_text(), report.SECTION, "")
        if not arguments.report:
            results.write(target, _study(arguments))
        study = results.read(target)
        drawn = plots.draw_all(study, target.with_suffix(""))
        text = report.section(study, target, (arguments.write or target).resolve().parent)
        if arguments.write:
            readme.write_section(arguments.write, report.SECTION, text)
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
    plan = QUICK if arguments.quick else Plan()
    names, seeds = variants_of(arguments.tables), range(arguments.seeds)
    environment = machine.environment(arguments.command_line, device)

    def tell(line: str) -> None:
        print(line, flush=True)

    runner.train_all(plan, names, seeds, arguments.folder, arguments.jobs, device.type, tell)
    tell("measuring what each detector costs")
    costs = runner.costs(plan, names, device, rounds=1 if arguments.quick else 10)
    runs = runner.read_runs(arguments.folder, names, seeds)
    variants = {
        name: {"label": runner.VARIANTS[name].label, **costs[name], "runs": runs[name]}
        for name in names
    }
    return {
        "environment": environment,
        "plan": plan.to_dict(),
        "tables": arguments.tables,
        "variants": variants,
    }
