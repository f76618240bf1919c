"""The command line: ``python -m dyhead_cuda COMMAND``.

A command is a module with ``add_arguments(parser)`` and ``run(arguments) -> int``; the arguments
also hold the whole ``command_line``. Only the one asked for is imported, so that the
packages which one command needs do not hold up another.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from dyhead_cuda.version import __version__


class Command(NamedTuple):
    module: str
    extra: str | None  # what to install for it: pip install dyhead_cuda[extra]
    summary: str


def _detection(name: str, summary: str) -> Command:
    return Command(f"dyhead_cuda.commands.{name}", "detection", summary)


COMMANDS = {
    "info": Command(
        "dyhead_cuda.info",
        None,
        "what runs here and why: versions, libraries, processors, operators",
    ),
    "demo": Command(
        "dyhead_cuda.commands.demo",
        "demo",
        "run the head on a photograph, compare with the reference, and draw what it attends to",
    ),
    "train": _detection("train", "train a detector with a Dynamic Head, or go on with a run"),
    "eval": _detection("eval", "COCO average precision of a trained detector"),
    "predict": _detection("predict", "detect on pictures: a drawing and a JSON file of each"),
    "attend": _detection("attend", "draw what the head of a trained detector attends to"),
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
    for name, (path, extra, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == command:
            try:
                module = importlib.import_module(path)
            except ModuleNotFoundError as error:
                if extra is None or (error.name or "").partition(".")[0] == "dyhead_cuda":
                    raise
                parser.error(f"{name} needs {error.name}: run pip install 'dyhead_cuda[{extra}]'")
            module.add_arguments(subparser)
    arguments = parser.parse_args(argv)
    arguments.command_line = argv
    assert module is not None
    return int(module.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
