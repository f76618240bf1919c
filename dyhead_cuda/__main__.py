"""The command line: ``python -m dyhead_cuda COMMAND``.

A command is a module with ``add_arguments(parser)`` and ``run(arguments) -> int``; the arguments
also hold the ``command_line`` after its name. Only the one asked for is imported, so that the
packages which one command needs do not hold up another.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from dyhead_cuda.version import __version__

COMMANDS = {
    "info": "what runs here and why: versions, libraries, processors, operators",
    "bench": "measure speed and memory against what people run, and what to do with the results",
    "demo": "run the head on a photograph, compare with the reference, and draw what it attends to",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status.

    Args:
        argv: the arguments; those of the process by default.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m dyhead_cuda")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = argv[0] if argv and argv[0] in COMMANDS else None
    module = None
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == command:
            try:
                module = importlib.import_module(f"dyhead_cuda.{name}")
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] == "dyhead_cuda":
                    raise
                parser.error(f"{name} needs {error.name}: run pip install 'dyhead_cuda[{name}]'")
            module.add_arguments(subparser)
    arguments = parser.parse_args(argv)
    arguments.command_line = argv[1:]
    assert module is not None
    return int(module.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
