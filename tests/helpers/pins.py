"""constraints.txt for environments that have another torch."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.paths import ROOT


def pins_without_torch(directory: Path) -> Path:
    """A file in ``directory`` with the pins of all but torch and torchvision."""
    lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    file = directory / "constraints.txt"
    file.write_text("".join(line for line in lines if not line.startswith("torch")))
    return file
