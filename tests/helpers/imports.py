"""Which modules a Python file imports, read from its source without running it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple


class Import(NamedTuple):
    """``name`` of module ``module``, or the module itself where ``name`` is empty."""

    line: int
    module: str
    name: str = ""


def imports_of(source: str, module: str, is_package: bool = False) -> list[Import]:
    """All imports of the source of ``module``, those in functions too, as absolute names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                kept = len(module.split(".")) - node.level + is_package
                origin = ".".join(part for part in (*module.split(".")[:kept], origin) if part)
            found += [Import(node.lineno, origin, alias.name) for alias in node.names]
    return found


def module_name(path: Path, root: Path) -> str:
    """The dotted name of a file below ``root``; a package's is that of its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
