"""The command line of the benchmarks: ``python -m benchmarks [ACTION]``, from a checkout.

The options of all actions are in :mod:`benchmarks.arguments`. An action is a module with
``run(arguments) -> int``; only the one asked for is imported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks import arguments as options
from benchmarks.readme import SectionError
from benchmarks.reports.results import ResultsError
from dyhead_cuda.commands.parsing import load, parse


class Action(NamedTuple):
    module: str  # in benchmarks
    extra: str | None  # what to install for it: pip install dyhead_cuda[extra]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    summary: str


MEASURE = Action(
    "measuring.measure",
    "bench",
    options.measure,
    "Measure speed and memory against what people run.",
)
ACTIONS = {
    "compare": Action(
        "reports.compare",
        None,
        options.compare,
        "two runs: exit status 1 if ours became slower",
    ),
    "report": Action("reports.report", "bench", options.report, "a Markdown table of results"),
    "plot": Action(
        "reports.plots", "bench", options.files, "the plots of results, beside the file"
    ),
    "targets": Action(
        "reports.targets",
        None,
        options.files,
        "which of the project's targets a GPU run reached",
    ),
    "runtimes": Action(
        "measuring.runtimes",
        "bench,detection",  # a runtime that is not installed is left out, and said so
        options.runtimes,
        "exported operators, heads and a detector in onnxruntime and OpenVINO",
    ),
    "threads": Action(
        "measuring.threads",
        "bench",
        options.threads,
        "how a block would scale to more threads than this CPU has, from the times of its tasks",
    ),
    "model": Action(
        "model.command",
        None,
        options.model,
        "what limits the CUDA kernels, from counts: needs no GPU",
    ),
    "study": Action(
        "study.command",
        "bench,detection",
        options.study,
        "what the head is worth: many trainings, a table",
    ),
    "first-weights": Action(
        "first_weights",
        "bench,detection",
        options.first_weights,
        "how much the first weights of many blocks blur, and what that costs a short training",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, or runs the action asked for.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        0; 1 if a result is wrong, ours did not run or a comparison found a regression; 2 if files
        cannot be used.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=MEASURE.summary)
    parser.set_defaults(action=MEASURE, parser=parser)
    MEASURE.add_arguments(parser)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", prog=parser.prog)
    for name, action in ACTIONS.items():
        subparser = actions.add_parser(name, help=action.summary, description=action.summary)
        subparser.set_defaults(action=action, parser=subparser)
        action.add_arguments(subparser)
    arguments = parse(parser, sys.argv[1:] if argv is None else argv)
    chosen: Action = arguments.action
    module = load(f"benchmarks.{chosen.module}", chosen.extra, arguments.parser)
    try:
        return int(module.run(arguments))
    except (ResultsError, SectionError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
