"""What backward operators do where not all gradients are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch


def choices(count: int) -> list[tuple[int, ...]]:
    """All of them; of many gradients each alone, all but one, the first three, and none."""
    if count <= 4:
        return list(product((0, 1), repeat=count))
    alone = [tuple(int(i == j) for j in range(count)) for i in range(count)]
    without = [tuple(1 - want for want in wanted) for wanted in alone]
    return [*alone, *without, (1, 1, 1, *[0] * (count - 3)), (0,) * count]


def assert_only_wanted(run: Callable[[Sequence[int]], Sequence[Any]], count: int) -> None:
    """What is wanted has the same bits as with all others; what is not is None."""
    every = run((1,) * count)
    assert len(every) == count
    for wanted in choices(count):
        found = run(wanted)
        for one, full, want in zip(found, every, wanted, strict=True):
            assert torch.equal(one, full) if want else one is None, wanted
