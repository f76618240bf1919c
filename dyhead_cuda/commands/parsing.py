"""How a command line becomes a command that runs; shared with ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from types import ModuleType

from dyhead_cuda.detection.lazy import is_own


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; an unknown one ends the process with the usage of the command it came after.

    Args:
        parser: whose commands set the default ``parser`` to their own one.
        argv: the command line.

    Returns:
        The arguments, with the whole command line as ``command_line``.
    """
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.command_line = list(argv)
    return arguments


def load(module: str, extra: str | None, parser: argparse.ArgumentParser) -> ModuleType:
    """The module of a command; where a package is missing, one line that says what to install.

    Args:
        module: its name.
        extra: of this project, with the packages that the command needs; None for none.
        parser: of the command; ends the process with status 2 and the line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if extra is None or is_own(error):
            raise
        parser.exit(
            2, f"{parser.prog} needs {error.name}: run pip install 'dyhead_cuda[{extra}]'\n"
        )
