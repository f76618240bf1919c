"""A Python without the packages of the extras."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from tests.helpers.paths import ROOT

# Of the extras, by the names that they are imported by.
EXTRAS = (
    "PIL",
    "matplotlib",
    "pycocotools",
    "rich",
    "skimage",
    "sklearn",
    "tensorboard",
    "timm",
    "torchvision",
)


def run_without(packages: Sequence[str], script: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a Python in which ``packages`` are not found, as if they were not installed.

    Args:
        packages: by the names that they are imported by.
        script: what to run, from the root of the checkout.
    """
    hidden = f"""
import importlib.machinery
import sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hide = name.partition(".")[0] in {set(packages)!r}
        return None if hide else super().find_spec(name, path, target)

sys.meta_path = [
    Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path
]
"""
    return subprocess.run(
        [sys.executable, "-c", hidden + script], cwd=ROOT, capture_output=True, text=True
    )
