"""Types of command-line options: from text to a value, or an error that says what was expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Literal

from dyhead_cuda.modules import ATTENTIONS


def integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """A type of options: an integer in a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            unbounded = maximum == 2**31 - 1
            limits = f"of at least {minimum}" if unbounded else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"expected an integer {limits}, got {text!r}")
        return value

    return parse


def number(minimum: float, maximum: float = math.inf) -> Callable[[str], float]:
    """A type of options: a finite number in a range."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (minimum <= value <= maximum and math.isfinite(value)):
            unbounded = maximum == math.inf
            limits = f"of at least {minimum:g}" if unbounded else f"from {minimum:g} to {maximum:g}"
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")
        return value

    return parse


def levels(text: str) -> tuple[int, int]:
    """A type of options: the first and last level of a pyramid, as "3-7"."""
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected two levels such as 3-7, got {text!r}")
    return int(first), int(last)


def image_size(text: str) -> tuple[int, int] | Literal["dynamic"]:
    """A type of options: height and width in pixels, as "800x1088", or "dynamic"."""
    if text == "dynamic":
        return "dynamic"
    height, cross, width = text.partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(
            f"expected a height and a width such as 800x1088, or dynamic, got {text!r}"
        )
    return int(height), int(width)


def attentions(text: str) -> tuple[str, ...]:
    """A type of options: attentions in their usual order, as "scale,task", or "none"."""
    names = () if text == "none" else tuple(text.split(","))
    if not set(names) <= set(ATTENTIONS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"expected some of {','.join(ATTENTIONS)} or none, got {text!r}"
        )
    return tuple(name for name in ATTENTIONS if name in names)


def point(text: str) -> tuple[float, float, str | None]:
    """A type of options: x, y and maybe the name of a level, as "120,80,P4"."""
    x, _, rest = text.partition(",")
    y, _, level = rest.partition(",")
    try:
        return float(x), float(y), level or None
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected X,Y or X,Y,LEVEL such as 120,80,P4, got {text!r}"
        ) from None


def blocks(text: str) -> list[int] | None:
    """A type of options: blocks counted from 1, as "1,3", given from 0; None for "all"."""
    if text == "all":
        return None
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected all or numbers from 1 as 1,3,6, got {text!r}")
    return [number - 1 for number in numbers]
