"""Parameters of tests that run on the CPU and, where there is one, on a GPU.

``device`` is a fixture of conftest.py; the cases on "cuda" have the marker ``gpu``.
"""

from __future__ import annotations

from typing import Literal

import pytest

from dyhead_cuda import library

Device = Literal["cpu", "cuda"]

needs_cpu_library = pytest.mark.skipif(
    not library.loaded("cpu"), reason=f"the CPU library is not loaded: {library.reason('cpu')}"
)

each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
