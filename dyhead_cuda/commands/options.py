"""Types of command-line options: from text to a value, or an error that says what was expected."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from dyhead_cuda.detection.names import SHIPPED
from dyhead_cuda.modules import ATTENTIONS

MIN_SCALE, MAX_SCALE = 0.05, 8  # of images
MAX_SIDE = 8192  # pixels, of images; what is computed from larger ones fits into no memory


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
            raise argparse.ArgumentTypeError(f"expected an integer {limits}, got {_cut(text)}")
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
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {_cut(text)}")
        return value

    return parse


def _cut(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def run_or_file(text: str) -> str | Path:
    """A type of options: a trained detector, as :func:`dyhead_cuda.detection.load_model` takes it.

    A folder that is called as the shipped detector is can be written as ./NAME.
    """
    return text if text == SHIPPED else Path(text)


def levels(text: str) -> tuple[int, int]:
    """A type of options: the first and last level of a pyramid, as "3-7"."""
    found = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected two levels such as 3-7, got {_cut(text)}")
    return int(found[1]), int(found[2])


def side_range(text: str) -> tuple[int, int]:
    """A type of options: a range of sides in pixels, as "480-800"."""
    found = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text)
    low, high = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= low <= high <= MAX_SIDE:
        raise argparse.ArgumentTypeError(
            f"expected two sides from 1 to {MAX_SIDE} such as 480-800, got {_cut(text)}"
        )
    return low, high


def scale_range(text: str) -> tuple[float, float]:
    """A type of options: a range of scales, as "0.1-2"."""
    low, _, high = text.partition("-")
    try:
        return _scale(low), _scale(high)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected two scales from {MIN_SCALE} to {MAX_SCALE} such as 0.1-2, got {_cut(text)}"
        ) from None


def scales(text: str) -> tuple[float, ...]:
    """A type of options: scales, as "0.8,1,1.25"."""
    try:
        return tuple(_scale(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected scales from {MIN_SCALE} to {MAX_SCALE} such as 0.8,1,1.25, got {_cut(text)}"
        ) from None


def _scale(text: str) -> float:
    value = float(text)
    if not MIN_SCALE <= value <= MAX_SCALE:  # NaN is refused, too
        raise ValueError
    return value


def image_size(text: str) -> tuple[int, int] | Literal["dynamic"]:
    """A type of options: height and width in pixels, as "800x1088", or "dynamic"."""
    if text == "dynamic":
        return "dynamic"
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text)
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(1 <= side <= MAX_SIDE for side in sides):
        raise argparse.ArgumentTypeError(
            "expected a height and a width such as 800x1088, or dynamic, with sides of at most "
            f"{MAX_SIDE}, got {_cut(text)}"
        )
    return sides


def attentions(text: str) -> tuple[str, ...]:
    """A type of options: attentions in their usual order, as "scale,task", or "none"."""
    names = () if text == "none" else tuple(text.split(","))
    if not set(names) <= set(ATTENTIONS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"expected some of {','.join(ATTENTIONS)} or none, got {_cut(text)}"
        )
    return tuple(name for name in ATTENTIONS if name in names)


def point(text: str) -> tuple[float, float, str | None]:
    """A type of options: x, y and maybe the name of a level, as "120,80,P4"."""
    x, _, rest = text.partition(",")
    y, _, level = rest.partition(",")
    try:
        place = float(x), float(y)
    except ValueError:
        place = math.nan, math.nan
    if not all(map(math.isfinite, place)):
        raise argparse.ArgumentTypeError(
            f"expected X,Y or X,Y,LEVEL such as 120,80,P4, got {_cut(text)}"
        )
    return *place, level or None


def blocks(text: str) -> list[int] | None:
    """A type of options: blocks counted from 1, as "1,3", given from 0; None for "all"."""
    if text == "all":
        return None
    named = re.fullmatch(r"\d{1,9}(,\d{1,9})*", text)
    numbers = [int(number) for number in text.split(",")] if named else [0]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(
            f"expected all or numbers from 1 as 1,3,6, got {_cut(text)}"
        )
    return [number - 1 for number in numbers]
