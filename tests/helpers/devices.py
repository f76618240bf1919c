"""Parameters of tests that run on the CPU and, where there is one, on a GPU.

``device`` is a fixture of conftest.py; the cases on "cuda" have the marker ``gpu``, and those small
enough for compute-sanitizer ``sanitize`` too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

import pytest

from dyhead_cuda import library

Device = Literal["cpu", "cuda"]

needs_cpu_library = pytest.mark.skipif(
    not library.loaded("cpu"), reason=f"the CPU library is not loaded: {library.reason('cpu')}"
)

_GPU = pytest.mark.gpu
_SANITIZED = (pytest.mark.gpu, pytest.mark.sanitize)

each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=_GPU)], indirect=True
)
each_device_sanitized = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=_SANITIZED)], indirect=True
)


def names_on_each_device(names: Iterable[str], sanitized: Collection[str]) -> pytest.MarkDecorator:
    """``name`` and ``device``: the ``sanitized`` names are small enough for compute-sanitizer."""
    names = list(names)
    missing = set(sanitized) - set(names)
    if missing:
        raise ValueError(f"expected sanitized names of {names}, got {sorted(missing)}")
    cases = [pytest.param(name, "cpu", id=f"{name}-cpu") for name in names]
    for name in names:
        marks = _SANITIZED if name in sanitized else _GPU
        cases.append(pytest.param(name, "cuda", marks=marks, id=f"{name}-cuda"))
    return pytest.mark.parametrize(("name", "device"), cases, indirect=["device"])
