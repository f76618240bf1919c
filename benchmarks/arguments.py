"""The options of every action; nothing here imports what an action needs beyond torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import readme
from benchmarks.cases.heads import CASES
from benchmarks.cases.precisions import PRECISIONS
from benchmarks.cases.problems import DIRECTIONS, FAMILIES
from benchmarks.cases.shapes import SHAPE_SETS
from benchmarks.measuring.timing import COLD, WARM
from benchmarks.model.devices import DEVICES as GPUS
from benchmarks.study.variants import SEEDS, VARIANTS
from dyhead_cuda.commands.options import integer, number
from dyhead_cuda.detection.names import DEVICES


def measure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a measurement."""
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=[], help="cases")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPE_SETS), default=[])
    parser.add_argument("--batch", nargs="+", type=integer(1), default=[])
    parser.add_argument("--blocks", nargs="+", type=integer(1), default=[], help="of whole heads")
    parser.add_argument("--dtype", nargs="+", choices=list(PRECISIONS), default=[])
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=[])
    parser.add_argument(
        "--peers", nargs="*", choices=FAMILIES, help="what to run beside ours; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two runs: does it work?")
    parser.add_argument("--graph", action="store_true", help="also replay CUDA graphs")
    parser.add_argument(
        "--cache",
        nargs="+",
        choices=[WARM, COLD],
        help="of the processor, before a run; default: warm, on a GPU both",
    )
    parser.add_argument(
        "--seconds",
        type=integer(1),
        help="start nothing after that long; it is reported as skipped",
    )
    parser.add_argument("--json", type=_target, metavar="FILE", help="write results; - for stdout")
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="draw them there")


def compare(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``compare``."""
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=number(0), default=0.05, help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="even if of different machines")


def report(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``report``."""
    files(parser)
    _add_write(parser, readme.BENCHMARKS)


def runtimes(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``runtimes``."""
    parser.add_argument("--shapes", choices=list(SHAPE_SETS), default="glip")
    parser.add_argument("--blocks", nargs="+", type=integer(1), default=[1, 6])
    parser.add_argument(
        "--rounds", type=integer(1), default=7, help="runs of each (default: %(default)s)"
    )
    _add_results(parser, "runtimes")
    _add_write(parser, f"{readme.RUNTIMES} NAME")  # of the results
    _add_report(parser)


def threads(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``threads``."""
    parser.add_argument("--shapes", choices=list(SHAPE_SETS), default="glip")
    _add_results(parser, "threads")
    _add_write(parser, readme.THREADS)
    _add_report(parser)


def files(parser: argparse.ArgumentParser) -> None:
    """Adds the files of actions that have no options: ``plot`` and ``targets``."""
    parser.add_argument("files", nargs="+", type=Path)


def model(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``model``."""
    parser.add_argument("--devices", nargs="+", choices=list(GPUS), default=list(GPUS))
    parser.add_argument("--shapes", choices=list(SHAPE_SETS), default="glip")
    parser.add_argument("--batch", nargs="+", type=integer(1), default=[1, 8])
    parser.add_argument(
        "--sampled",
        type=integer(1),
        default=16,
        help="blocks of each launch that are run and counted (default: %(default)s)",
    )
    _add_write(parser, readme.MODEL)


def study(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``study``."""
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/study"),
        help="of the trainings; those that were stopped go on (default: %(default)s)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("benchmarks/results/study"),
        help="folder of the results, one file for each training (default: %(default)s)",
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(VARIANTS), default=[], help="rows (default: all)"
    )
    parser.add_argument(
        "--seeds", type=integer(1), default=SEEDS, help="runs of each row (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=integer(1), default=1, help="trainings at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=number(0), help="stop after that long; the same command goes on"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    _add_write(parser, readme.STUDY)
    parser.add_argument("--quick", action="store_true", help="two steps each: to try the command")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--tune", action="store_true", help="choose the learning rate of each row, which is first"
    )
    instead.add_argument(
        "--costs", action="store_true", help="measure what the rows cost, in place of what was"
    )
    instead.add_argument(
        "--report", action="store_true", help="train nothing: tables and plots of what is there"
    )


def first_weights(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``first-weights``."""
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/first_weights"),
        help="of the trainings; those that were stopped go on (default: %(default)s)",
    )
    _add_results(parser, "first_weights")
    parser.add_argument(
        "--jobs", type=integer(1), default=1, help="trainings at a time (default: %(default)s)"
    )
    _add_write(parser, readme.FIRST_WEIGHTS)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--quick", action="store_true", help="two steps each: to try the command")
    _add_report(instead)


def _add_results(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--json",
        type=Path,
        default=Path(f"benchmarks/results/{name}/cpu.json"),
        help="results (default: %(default)s)",
    )


def _add_report(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--report", action="store_true", help="measure nothing: the tables of --json as they are"
    )


def _add_write(parser: argparse.ArgumentParser, section: str) -> None:
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help=f"write the tables between {' and '.join(readme.markers(section))} there",
    )


def _target(text: str) -> str:
    # Fail early, before measuring.
    if text != "-" and not Path(text).resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in an existing directory, got {text!r}")
    return text
