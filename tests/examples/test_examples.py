"""Every script in examples/ runs as its reader would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SECONDS = 120  # each takes a few; the machine may be busy


def test_there_are_examples() -> None:
    assert "quickstart.py" in {path.name for path in EXAMPLES}, (
        f"expected examples/quickstart.py and others in {ROOT / 'examples'}, "
        f"found {[path.name for path in EXAMPLES] or 'no scripts'}: run the tests in a checkout"
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,  # what it writes is not left in the checkout
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert result.stdout.strip(), "an example prints what it shows"
