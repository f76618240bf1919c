"""What a training run left, and whether two runs are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyhead_cuda.detection.training import runs

TIMES = ("seconds", "images_per_second")


def curve(folder: Path) -> list[dict[str, Any]]:
    """All records of the log, without the times."""
    records = runs.RunFolder(folder).records()
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def weights(folder: Path, name: str = runs.LAST) -> dict[str, Tensor]:
    """Of the model, and where they are averaged those that the training goes on from, too."""
    checkpoint = runs.read_checkpoint(folder / name)
    kinds = [kind for kind in ("model", "unaveraged") if kind in checkpoint]
    return {f"{kind}.{name}": x for kind in kinds for name, x in checkpoint[kind].items()}


def assert_same_run(found: Path, expected: Path) -> None:
    assert curve(found) == curve(expected)
    for name in (runs.LAST, runs.BEST):
        a, b = weights(found, name), weights(expected, name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in b), name
