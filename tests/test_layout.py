"""The tests' own order: what tests share is in helpers/, never in a test module."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.imports import Import, imports_of, module_name
from tests.helpers.paths import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))


def of_test_modules(imports: list[Import]) -> list[str]:
    """Those imports that take something from a test module, or a test module itself."""
    found = []
    for line, module, name in imports:
        parts = [*module.split("."), name]
        if parts[0] == "tests" and any(part.startswith("test_") for part in parts):
            found.append(f"line {line}: {module} {name}".rstrip())
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_imported_from_a_test_module(path: Path) -> None:
    imports = imports_of(path.read_text(), module_name(path, ROOT), path.name == "__init__.py")
    assert of_test_modules(imports) == [], "move what is shared to tests/helpers/"


@pytest.mark.parametrize(
    "source",
    [
        "import tests.ops.test_pack_levels",
        "from tests import test_modules",
        "from tests.test_modules import randomise",
        "from .test_modules import randomise",
        "from ..test_modules import randomise",
        "from . import test_modules",
        "def f():\n    from tests.ops import test_pack_levels as t",
    ],
)
def test_an_import_from_a_test_module_is_found(source: str) -> None:
    assert len(of_test_modules(imports_of(source, "tests.ops.test_a"))) == 1


def test_other_imports_are_none() -> None:
    source = "import pytest\nfrom test_of_others import x\nfrom tests.helpers.compare import leaf"
    assert of_test_modules(imports_of(source, "tests.test_a")) == []
