"""The command line of the benchmarks: ``python -m benchmarks``, from a checkout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, or does with results what an action says; returns the exit status.

    Args:
        argv: the arguments; those of the process by default.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure speed and memory against what people run.",
    )
    try:
        from benchmarks import command

        actions = command.add_arguments(parser)
        study = actions.add_parser("study", help="what the head is worth: many trainings, a table")
        if argv[:1] == ["study"]:
            from benchmarks.study import command as study_command

            study_command.add_arguments(study)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("benchmarks", "dyhead_cuda"):
            raise
        parser.error(f"{error.name} is needed: run pip install 'dyhead_cuda[bench,detection]'")
    arguments = parser.parse_args(argv)
    arguments.command_line = argv
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
