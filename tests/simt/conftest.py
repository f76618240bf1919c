"""Fixtures of the tests that run CUDA kernels compiled for the host."""

from __future__ import annotations

from typing import Any

import pytest

from .build import compiler, load_module
from .server import SANITIZED


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "spawns: builds kernels of its own and runs a subprocess")
    config.addinivalue_line("markers", "guards: accesses memory out of bounds, not for sanitizers")


@pytest.fixture(scope="session")
def simt() -> Any:
    """The module of host-compiled kernels; skips where there is no g++."""
    if compiler() is None:
        pytest.skip("g++ not found: it compiles the CUDA kernels for the host")
    return load_module()


# Sanitizers are slow, and look at addresses, which do not depend on the order.
ORDERS = 1 if SANITIZED else 3


@pytest.fixture(params=range(ORDERS))
def seed(simt: Any, request: pytest.FixtureRequest) -> int:
    """Runs the test under several orders of threads and blocks."""
    simt.set_seed(request.param)
    return int(request.param)
