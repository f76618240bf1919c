"""Public names that are imported at their first use.

So a package's light modules, such as :mod:`dyhead_cuda.detection.names`, can be imported where
torchvision and the other packages of the extra "detection" are not installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

EXTRA = "detection"


def attribute_of(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose public names live in its submodules (PEP 562).

    Args:
        package: ``__name__`` of the package.
        names: by submodule of the package, the public names that it has.

    Returns:
        A function from a name to the object, which raises AttributeError for another name and
        ModuleNotFoundError, with the extra to install, where a package is missing.
    """

    homes = {name: submodule for submodule, found in names.items() for name in found}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f"{package}.{homes[name]}")
        except ModuleNotFoundError as error:
            if is_own(error):
                raise
            raise ModuleNotFoundError(
                f"{package}.{name} needs {error.name}: run pip install 'dyhead_cuda[{EXTRA}]'",
                name=error.name,
            ) from error
        return getattr(module, name)

    return get


def is_own(error: ModuleNotFoundError) -> bool:
    """Whether the module that was not found is one of this project, not of an extra."""
    return (error.name or "").partition(".")[0] in ("benchmarks", "dyhead_cuda")
