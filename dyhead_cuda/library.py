"""Loads the native libraries and keeps the reason where one did not load.

``libdyhead_cpu.so`` holds the operator schemas and the CPU kernels, ``libdyhead_cuda.so`` the CUDA
kernels. Built for torch 2.10 or newer they speak its stable ABI and serve all of these; built for
an older torch they serve its minor version alone. They are loaded once, when this module is
imported (so in one thread, under Python's import lock); importing never raises.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dyhead_cuda import archs
from dyhead_cuda.older_torch import minor
from dyhead_cuda.sources import digest
from dyhead_cuda.version import MINIMUM_TORCH

logger = logging.getLogger("dyhead_cuda")

_PACKAGE = Path(__file__).resolve().parent
# Elsewhere for libraries that were built for a sanitizer (docs/reliability/README.md).
DIRECTORY = Path(os.environ.get("DYHEAD_LIBRARY_DIR") or _PACKAGE / "lib")
NAMES = ("cpu", "cuda")

_ROOT = _PACKAGE.parent  # of a checkout; of an installed package it has no csrc/

_REBUILD = (
    "run make build, or pip install --no-build-isolation --force-reinstall --no-deps ., in the "
    "source tree"
)
_BUILD_HERE = (
    "run make build here; or, if the package is installed too, start Python in another folder, as "
    "it imports the sources where it finds them"
)


class _Unavailable(Exception):
    """Why a library cannot be used, and what to do about it."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.fix = fix


@dataclass(frozen=True)
class _State:
    loaded: bool
    reason: str = ""
    fix: str = ""


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"expected a library out of {NAMES}, got {name!r}")


def path(name: str) -> Path:
    """The file of the library ``name`` ("cpu" or "cuda"), whether or not it exists."""
    _check_name(name)
    return DIRECTORY / f"libdyhead_{name}.so"


def read_build_record(directory: Path = DIRECTORY) -> dict[str, Any]:
    """What the build wrote about itself; empty if there is no (readable) ``build.json``.

    Keys: ``torch`` (version and CUDA version built against) and, for each library, ``built``, then
    ``sources`` (their digest), ``interface`` of torch ("stable" or "classic") and the ``torch``
    that it needs (at least that version, or exactly that), ``compiler``, ``flags``, ``time`` (UTC),
    for CUDA ``nvcc`` and ``archs``; or ``reason`` and ``log_tail``.
    """
    try:
        record = json.loads((directory / "build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _major(version: str) -> str:
    return version.split(".")[0]


def _check_interface(build: dict[str, Any]) -> None:
    """Raises _Unavailable where a library was built for another torch."""
    if "torch" not in build:
        return
    needed, found = build["torch"], minor(torch.__version__)
    if build.get("interface") == "classic":
        if found != minor(needed):
            reason = f"it was built for torch {needed} alone, found {torch.__version__}"
            raise _Unavailable(reason, _REBUILD)
    elif found < minor(needed):
        reason = f"it was built for torch {needed} or newer, found {torch.__version__}"
        raise _Unavailable(reason, f"{_REBUILD}; or update torch")


def _check(name: str, record: dict[str, Any]) -> None:
    """Raises _Unavailable for every reason that can be told without opening the file."""
    if minor(torch.__version__) < MINIMUM_TORCH:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        raise _Unavailable(
            f"it needs torch >= {minimum}, found {torch.__version__}", "update torch"
        )
    if name == "cuda" and torch.version.cuda is None:
        raise _Unavailable(
            f"torch {torch.__version__} is a build without CUDA", "install a CUDA build of torch"
        )
    build = record.get(name, {})
    if build.get("built") is False:
        raise _Unavailable(
            f"it was not built: {build.get('reason', 'no reason recorded')}",
            f"remedy that and {_REBUILD}",
        )
    csrc = _ROOT / "csrc"
    if not path(name).is_file():
        fix = _BUILD_HERE if csrc.is_dir() else _REBUILD
        raise _Unavailable(f"{path(name)} does not exist", fix)
    _check_interface(build)
    # In a checkout the sources may have changed since the build.
    if csrc.is_dir() and build.get("sources") != digest(_ROOT, name):
        raise _Unavailable(f"it was not built from {csrc} as it is now", _REBUILD)
    built_for = (record.get("torch") or {}).get("cuda")
    if name == "cuda" and built_for and _major(built_for) != _major(str(torch.version.cuda)):
        raise _Unavailable(
            f"it was built for CUDA {built_for}, but torch {torch.__version__} uses CUDA "
            f"{torch.version.cuda}",
            f"install a torch for CUDA {_major(built_for)}, or {_REBUILD}",
        )


def _load(name: str, record: dict[str, Any]) -> _State:
    try:
        _check(name, record)
        torch.ops.load_library(path(name))
    except _Unavailable as problem:
        return _State(False, str(problem), problem.fix)
    except (OSError, RuntimeError) as error:
        # torch wraps the loader's message, which names what is missing, in one that does not.
        text = " ".join(str(error.__cause__ or error).split())
        return _State(False, f"it does not load under torch {torch.__version__}: {text}", _REBUILD)
    return _State(True)


def _load_all() -> dict[str, _State]:
    record = read_build_record()
    states = {"cpu": _load("cpu", record)}
    if states["cpu"].loaded:
        states["cuda"] = _load("cuda", record)
    else:
        needs = "it needs the CPU library, which holds the operator schemas"
        states["cuda"] = _State(False, needs, states["cpu"].fix)
        message = _message("cpu", states["cpu"])
        logger.warning("%s. Until then everything runs on the reference", message)
    return states


def _message(name: str, state: _State) -> str:
    return f"dyhead_cuda's {name} library is not available: {state.reason}. To fix it: {state.fix}"


def _state(name: str) -> _State:
    _check_name(name)
    return _STATES[name]


def loaded(name: str) -> bool:
    """Whether the library ``name`` ("cpu" or "cuda") is loaded and its operators can be called."""
    return _state(name).loaded


def reason(name: str) -> str:
    """Why the library ``name`` is not loaded; "" if it is."""
    return _state(name).reason


def fix(name: str) -> str:
    """What to do to get the library ``name`` loaded; "" if it is."""
    return _state(name).fix


def require(name: str) -> None:
    """Raises RuntimeError, with the reason and the fix, unless the library ``name`` is loaded."""
    state = _state(name)
    if not state.loaded:
        raise RuntimeError(_message(name, state))


def lacks_code_for(capability: tuple[int, int]) -> str:
    """Why the CUDA library cannot run on a GPU, and what to do; "" if it can.

    Args:
        capability: compute capability of the GPU, major and minor.
    """
    built_for = read_build_record().get("cuda", {}).get("archs")
    # Without a record nothing can be told, and CUDA itself will say what is wrong.
    if built_for is None or archs.covering_code(built_for, capability) is not None:
        return ""
    found, minimum = (".".join(map(str, c)) for c in (capability, archs.MINIMUM))
    if capability < archs.MINIMUM:
        return f"the kernels need compute capability {minimum} or newer, this GPU has {found}"
    target = archs.target_of(capability)
    return (
        f"the CUDA library was built for {', '.join(built_for)}, and none of it runs on a GPU of "
        f"compute capability {found}. To fix it: set DYHEAD_CUDA_ARCHS={target} and {_REBUILD}"
    )


def _tables(name: str) -> str:
    """The tables that a library reads; "none" if it does not tell."""
    describe = getattr(ctypes.CDLL(str(path(name))), "dyhead_tables", None)
    if describe is None:
        return "none"
    describe.restype = ctypes.c_char_p
    return str(describe().decode())


def expect_tables(tables: str) -> None:
    """Stops using every library that reads other integer tables than ``tables`` describes.

    Args:
        tables: the records, their fields in order, and the read rules; see
            :mod:`dyhead_cuda.ops.jobs`, which writes the tables.
    """
    for name, state in _STATES.items():
        if not state.loaded:
            continue
        found = _tables(name)
        if found != tables:
            reason = f"it reads the tables ({found}), where this package writes ({tables})"
            _STATES[name] = _State(False, reason, _REBUILD)
            logger.warning("%s. It is not used", _message(name, _STATES[name]))


def cpu_capability() -> str:
    """The vector instructions that the CPU kernels use here, or without them those of torch.

    On x86-64 amx, avx512bf16, avx512, avx2 or default, on aarch64 neon; what is wrong with
    ``DYHEAD_CPU_CAPABILITY`` where it names none of them.
    """
    if not loaded("cpu"):
        return torch.backends.cpu.get_cpu_capability().lower()
    describe = ctypes.CDLL(str(path("cpu"))).dyhead_cpu_capability
    describe.restype = ctypes.c_char_p
    return str(describe().decode()).splitlines()[0]


_STATES = _load_all()
