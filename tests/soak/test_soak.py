"""Memory stays flat over 300 steps of training; make soak takes 10,000."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from tests.helpers.devices import needs_cpu_library
from tests.helpers.paths import ROOT
from tests.soak.training import BOUND, Growth


@needs_cpu_library
def test_memory_stays_flat() -> None:
    """In a process of its own, which other tests left nothing in."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--steps", "300"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "bytes per step" in run.stdout


LEAK = """
import torch
from tests.soak.training import grow
kept = []
growth = grow(lambda index: kept.append(torch.zeros(16384).fill_(index)), 300)
print(growth)
assert not growth.flat
assert 32768 < growth.slope < 131072
"""


def test_a_leak_is_found() -> None:
    """In a process of its own, whose heap has no large holes to fill."""
    run = subprocess.run(
        [sys.executable, "-c", LEAK], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_one_jump_is_no_leak() -> None:
    steps = np.arange(100)
    jump = Growth(steps, np.where(steps < 30, 0, 1 << 20).astype(float))
    assert jump.flat
    assert not Growth(steps, steps * 2 * BOUND / 99).flat
