"""Watching which operators run."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Spy(TorchDispatchMode):
    """Counts calls of compiled operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += func.namespace == "dyhead"
        return func(*args, **(kwargs or {}))
