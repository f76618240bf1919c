"""All that the fuzz calls, by name: each makes one random call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

from tests.fuzz.cases import Call, Source, spoil
from tests.fuzz.functions import FUNCTIONS
from tests.fuzz.operators import OPERATORS
from tests.fuzz.others import OTHERS

ENTRIES: dict[str, Callable[[Source], Call]] = {**FUNCTIONS, **OPERATORS, **OTHERS}
SPOILED = 0.45  # of all calls


def make_call(entries: Mapping[str, Callable[[Source], Call]], seed: int, index: int) -> Call:
    """Call number ``index`` of the run with a seed: the same in each run."""
    source = Source(seed, index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of sparse and nested tensors
        call = entries[source.choice(list(entries))](source)
        if not call.fixed and not call.spoiled and source.chance(SPOILED):
            spoil(call, source)
            call.gradients = False
    return call
