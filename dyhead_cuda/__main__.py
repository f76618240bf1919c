"""The command line: ``python -m dyhead_cuda COMMAND``.

The options of all commands are in :mod:`dyhead_cuda.commands.arguments`. A command is a module with
``run(arguments) -> int``; only the one asked for is imported, so that the packages that one command
needs do not hold up another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dyhead_cuda.commands import arguments as options
from dyhead_cuda.commands.parsing import load, parse
from dyhead_cuda.version import __version__


class Command(NamedTuple):
    add_arguments: Callable[[argparse.ArgumentParser], None]
    extra: str | None  # what to install for it: pip install dyhead_cuda[extra]
    summary: str


# By name, which is also the module's in dyhead_cuda.commands.
COMMANDS = {
    "info": Command(
        options.info, None, "what runs here and why: versions, libraries, processors, operators"
    ),
    "check": Command(
        options.check,
        None,
        "whether the compiled kernels give the reference's numbers on this machine (2 minutes)",
    ),
    "demo": Command(
        options.demo,
        "demo",
        "run the head on a photograph, compare with the reference, and draw what it attends to",
    ),
    "train": Command(
        options.train, "detection", "train a detector with a Dynamic Head, or resume a run"
    ),
    "scenes": Command(
        options.scenes,
        "detection",
        "write composed scenes as images with COCO annotations, to look at and to train on",
    ),
    "eval": Command(options.evaluate, "detection", "COCO average precision of a trained detector"),
    "predict": Command(
        options.predict, "detection", "detect on pictures: a drawing and a JSON file of each"
    ),
    "attend": Command(
        options.attend, "detection", "draw what the head of a trained detector attends to"
    ),
    "export": Command(
        options.export,
        "detection",
        "write a trained detector as ONNX, torch.export or AOTInductor file, and verify it",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status.

    Args:
        argv: the arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m dyhead_cuda")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.summary, description=command.summary)
        subparser.set_defaults(parser=subparser)
        command.add_arguments(subparser)
    arguments = parse(parser, sys.argv[1:] if argv is None else argv)
    name = arguments.command
    module = load(f"dyhead_cuda.commands.{name}", COMMANDS[name].extra, arguments.parser)
    return int(module.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
