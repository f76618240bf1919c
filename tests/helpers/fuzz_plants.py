"""Calls that break the rule of tests/fuzz, each in one way, and some that keep it."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from tests.fuzz.cases import Call, Source


def crash(x: Any) -> Any:
    os.abort()


def hang(x: Any) -> Any:
    time.sleep(600)


def wrong(x: Any) -> Any:
    return x * (1 + 1e-3)


def changing(x: Any) -> Any:
    return x.add_(1) - 1


def missing(x: Any) -> Any:
    return x.no_such_name


def view(x: Any) -> Any:
    return x[:1]


def silent(x: Any) -> Any:
    raise ValueError


def right(x: Any) -> Any:
    return x * 1


FUNCTIONS = (right, crash, wrong, changing, missing, hang, view, silent, right)
SPOILED = (missing, silent)


def next_call(source: Source) -> Call:
    """Call i of a run is that of function i."""
    function = FUNCTIONS[source.index]
    judge = view if function is view else right
    x = torch.randn(3, 4, generator=source.torch)
    spoiled = "planted" if function in SPOILED else ""
    name = function.__name__
    return Call(name, function, [x], expected=judge, spoiled=spoiled, fixed=True)


ENTRIES = {"planted": next_call}
