"""Signals that ask the process to end, remembered until it is convenient."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Request:
    """The signal that has come; ``number`` is 0 before."""

    number = 0


@contextmanager
def remembered() -> Iterator[Request]:
    """Remembers the first SIGINT or SIGTERM inside; a second one has its usual effect.

    In a thread other than the main one, where Python has no handlers, nothing changes.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def remember(number: int, _: FrameType | None) -> None:
        request.number = number
        restore()

    for number in before:
        signal.signal(number, remember)
    try:
        yield request
    finally:
        restore()
