"""torch's profiler in every release that the package takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def profile(**options: Any) -> torch.profiler.profile:
    """The profiler, which keeps its events; newer releases want to be asked for that."""
    if "acc_events" in inspect.signature(torch.profiler.profile).parameters:
        options["acc_events"] = True
    return torch.profiler.profile(**options)
