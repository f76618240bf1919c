"""Types of command-line options."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """A type of options: an integer in a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            limits = f"of at least {least}" if most == 2**31 - 1 else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"expected an integer {limits}, got {text!r}")
        return value

    return parse


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """A type of options: a finite number in a range."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and math.isfinite(value)):
            limits = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")
        return value

    return parse
