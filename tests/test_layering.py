"""Imports go one way: each room of the package imports only from rooms below it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.imports import imports_of, module_name
from tests.helpers.paths import ROOT

PACKAGE = "dyhead_cuda"

# From top to bottom. A room may import itself, the rooms on lines below its own, and the neutral
# modules. Rooms on one line do not import each other.
ROOMS = (
    ("__main__",),  # python -m dyhead_cuda
    ("commands",),  # what it runs
    ("detection",),  # detectors, data, training, evaluation, pictures
    ("__init__",),  # the public names, as `from dyhead_cuda import DyHead` finds them
    ("compat", "inspect"),  # public code bases' models and checkpoints; what a head attends to
    ("modules",),  # the public modules
    ("unfused",),  # the head module by module, where inner modules must be called
    ("functional",),  # the public operators: checks, then a backend
    # the head on compiled operators; the same in ONNX nodes, and in plain PyTorch
    ("fused", "onnx", "reference"),
    ("ops",),  # the compiled operators
)
# What several rooms need. A neutral module imports neutral modules only.
NEUTRAL = (
    *("library", "backends", "archs", "sources", "version", "older_torch", "info"),  # what there is
    *("pyramid", "numerics", "checks", "recompute"),  # what is computed: types, formulas, checks
    "plain",  # whether a module is as its class made it
)
# Nothing in the package imports them.
OUTSIDE = ("benchmarks", "examples", "release", "tests")

FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def room_of(module: str, name: str = "") -> str:
    """The room of ``module`` inside the package, or of ``name`` that is imported from it."""
    _, _, inside = f"{module}.{name}".strip(".").partition(".")
    room = inside.split(".")[0]
    known = room in LEVELS or room in NEUTRAL
    # A name of the package itself that is no module of it comes from dyhead_cuda/__init__.py.
    return room if known or module != PACKAGE else "__init__"


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of ``source`` that its room does not allow."""
    room, found = room_of(module), []
    for line, origin, name in imports_of(source, module, is_package):
        top = origin.split(".")[0]
        if top in OUTSIDE:
            found.append(f"line {line}: the package imports {origin}")
        if top != PACKAGE:
            continue
        other = room_of(origin, name)
        if other == room or other in NEUTRAL:
            continue
        if room in NEUTRAL or LEVELS[other] <= LEVELS[room]:
            found.append(f"line {line}: {room} imports {other}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    module, is_package = module_name(path, ROOT), path.name == "__init__.py"
    room = room_of(module)
    assert room in LEVELS or room in NEUTRAL, f"give {room} a line in the table of rooms"
    assert violations(path.read_text(), module, is_package) == []


@pytest.mark.parametrize("room", [*LEVELS, *NEUTRAL])
def test_every_room_in_the_table_is_there(room: str) -> None:
    place = ROOT / PACKAGE / room
    assert place.is_dir() or place.with_suffix(".py").is_file()


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("fused", "from dyhead_cuda.reference.operators import x", "fused imports reference"),
        ("fused", "from dyhead_cuda import checks, reference", "fused imports reference"),
        ("fused", "def f():\n    import dyhead_cuda.reference", "fused imports reference"),
        ("ops.common", "from ..reference import x", "ops imports reference"),
        ("ops.common", "from .. import reference", "ops imports reference"),
        ("ops.common", "from dyhead_cuda import fused", "ops imports fused"),
        ("onnx.published", "from dyhead_cuda import reference", "onnx imports reference"),
        ("reference.unified", "import dyhead_cuda.fused", "reference imports fused"),
        ("functional", "from dyhead_cuda.modules import DyHead", "functional imports modules"),
        ("modules", "from dyhead_cuda import DyHead", "modules imports __init__"),
        ("compat.names", "from dyhead_cuda import inspect", "compat imports inspect"),
        ("inspect.record", "import dyhead_cuda.detection.data", "inspect imports detection"),
        ("detection.data", "from dyhead_cuda import commands", "detection imports commands"),
        ("checks", "from dyhead_cuda import functional", "checks imports functional"),
        ("library", "from dyhead_cuda import ops", "library imports ops"),
        ("modules", "import benchmarks.timing", "the package imports benchmarks.timing"),
        ("modules", "from examples import x", "the package imports examples"),
        ("modules", "from tests.helpers import x", "the package imports tests.helpers"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, expected: str) -> None:
    (found,) = violations(source, f"{PACKAGE}.{module}")
    assert found.endswith(expected)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fused", "from dyhead_cuda import checks, library, ops"),
        ("functional", "from dyhead_cuda import fused, reference"),
        ("reference.unified", "from .operators import x"),
        ("detection.data", "from dyhead_cuda import DyHead, inspect"),
        ("commands.demo", "import dyhead_cuda, tests_of_others, inspect"),
        ("recompute", "from dyhead_cuda.backends import backend"),
    ],
)
def test_a_right_import_is_allowed(module: str, source: str) -> None:
    assert violations(source, f"{PACKAGE}.{module}") == []
