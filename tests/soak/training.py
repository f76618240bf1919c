"""Trains a small head for many steps, and fits a line through the memory that the process holds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import dyhead_cuda

WARM_UP = 0.2  # of the steps, before memory is looked at
# Bytes that memory may grow by, along the line, from the warm-up to the end: the allocator's pages
# come and go by less. It is 131 bytes per step of 10,000 steps, and 4 kB of 300, of which one
# makes some 200 kB of tensors.
BOUND = float(1 << 20)
PAGE = 4096

Step = Callable[[int], None]


@dataclass(frozen=True)
class Growth:
    """The memory of a process over its steps.

    Args:
        steps: at which it was read.
        resident: bytes at each, RSS.
    """

    steps: np.ndarray
    resident: np.ndarray

    @property
    def slope(self) -> float:
        """Bytes per step: the median of the slopes of all pairs, which no single jump moves."""
        first, second = np.triu_indices(len(self.steps), 1)
        rise = self.resident[second] - self.resident[first]
        return float(np.median(rise / (self.steps[second] - self.steps[first])))

    @property
    def bound(self) -> float:
        """Bytes per step that are allowed."""
        return BOUND / float(self.steps[-1] - self.steps[0])

    @property
    def flat(self) -> bool:
        return self.slope <= self.bound

    def __str__(self) -> str:
        mebibytes = self.resident / 2**20
        first, last, most = mebibytes[0], mebibytes[-1], mebibytes.max()
        return (
            f"{self.slope:+.1f} bytes per step (bound {self.bound:.0f}) after step "
            f"{self.steps[0]}: from {first:.1f} to {last:.1f} MiB, at most {most:.1f}"
        )


def resident_bytes() -> int:
    """What the process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def training_step(seed: int = 0) -> Step:
    """A step: other sizes each time out of a few, forward, backward, optimizer."""
    torch.manual_seed(seed)
    head = dyhead_cuda.DyHead(8, 16, num_blocks=2, num_groups=4)
    unified = dyhead_cuda.UnifiedDyHead(levels=3, channels=8, num_blocks=1)
    optimizer = torch.optim.AdamW([*head.parameters(), *unified.parameters()], lr=1e-3)

    def step(index: int) -> None:
        side = 8 + index % 5
        sides = [-(-side // 2**level) for level in range(3)]
        levels = [torch.randn(1, 8, side, side) for side in sides]
        loss = sum(x.square().mean() for x in head(levels)) + unified(levels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def grow(step: Step, steps: int, samples: int = 100) -> Growth:
    """Take ``steps`` steps; what memory did after the warm-up.

    Args:
        step: called with its index.
        steps: at least 10.
        samples: how often memory is read.
    """
    gc.collect()
    gc.freeze()  # what imports made: nothing to collect again and again
    first = int(steps * WARM_UP)
    every = max(1, (steps - first) // samples)
    seen: list[tuple[int, int]] = []
    for index in range(steps):
        step(index)
        if index >= first and (index - first) % every == 0:
            gc.collect()
            seen.append((index, resident_bytes()))
    at, resident = zip(*seen, strict=True)
    return Growth(np.array(at), np.array(resident, dtype=np.float64))
