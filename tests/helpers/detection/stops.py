"""Listeners of a training that send signals to it."""

from __future__ import annotations

import os
import signal
from typing import Any

from dyhead_cuda.detection.training import trainer


def stop_at(step: int) -> trainer.Listener:
    """A listener that interrupts the process in that step."""

    def listen(record: dict[str, Any]) -> None:
        if record["step"] == step and "loss" in record:
            os.kill(os.getpid(), signal.SIGINT)

    return listen
