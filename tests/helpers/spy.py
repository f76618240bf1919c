"""Watching which operators run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Spy(TorchDispatchMode):
    """Counts calls of compiled operators, all together and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    @property
    def calls(self) -> int:
        return sum(self.by_name.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "dyhead":
            self.by_name[func._opname] += 1
        return func(*args, **(kwargs or {}))


def calls_of_operators(function: Callable[..., Any], *arguments: Any) -> Counter[str]:
    """How often each operator of the library runs in ``function(*arguments)``."""
    with Spy() as spy:
        function(*arguments)
    return spy.by_name
