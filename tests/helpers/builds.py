"""What tests of the build and of its packages share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dyhead_cuda import library

CI = os.environ.get("CI") == "true"

# In CI a library that is missing fails the test.
built_cpu_library = pytest.mark.skipif(
    not library.loaded("cpu") and not CI, reason=f"CPU library: {library.reason('cpu')}"
)


def run(command: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **options,
    )


def python_in(source: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(source)}
    return run([sys.executable, *arguments], cwd=source, env=environment)
