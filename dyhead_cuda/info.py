"""What runs here and why: versions, libraries, processors, and the backends of every operator."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from dyhead_cuda import archs, library
from dyhead_cuda.version import __version__

NAMESPACE = "dyhead::"
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def _libraries(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in library.NAMES:
        state: dict[str, Any] = {"loaded": library.loaded(name), "path": str(library.path(name))}
        if not state["loaded"]:
            state |= {"reason": library.reason(name), "fix": library.fix(name)}
        build = record.get(name, {})
        keys = ("time", "compiler", "nvcc", "archs", "flags", "log_tail")
        found[name] = state | {key: build[key] for key in keys if key in build}
    return found


def _gpus(built_for: Sequence[str]) -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        gpus.append(
            {
                "name": properties.name,
                "capability": "{}.{}".format(*capability),
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "code": archs.covering_code(built_for, capability),
                "problem": library.lacks_code_for(capability),
            }
        )
    return gpus


def _driver_cuda() -> str | None:
    """The newest CUDA version that the installed driver serves; None without a driver."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    version = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return f"{version // 1000}.{version % 1000 // 10}"


def _operators() -> dict[str, list[str]]:
    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith(NAMESPACE))
    return {
        name.removeprefix(NAMESPACE): [
            backend
            for backend, key in DISPATCH_KEYS.items()
            if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        ]
        for name in names
    }


def gather() -> dict[str, Any]:
    """Everything that ``python -m dyhead_cuda info`` tells, as plain data.

    Returns:
        A dictionary that json can write: ``versions``, ``libraries`` (per library whether it is
        loaded, else the ``reason`` and the ``fix``, and how it was built), ``built_against``,
        ``cpu``, ``gpus`` and ``operators`` (name to the backends with a compiled kernel; the
        reference covers all of them everywhere).
    """
    record = library.read_build_record()
    libraries = _libraries(record)
    return {
        "versions": {
            "dyhead_cuda": __version__,
            "torch": str(torch.__version__),
            "torch_cuda": torch.version.cuda,
            "driver_cuda": _driver_cuda(),
            "numpy": numpy.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "libraries": libraries,
        "built_against": record.get("torch"),
        "cpu": {
            "capability": library.cpu_capability(),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        },
        "gpus": _gpus(libraries["cuda"].get("archs", [])),
        "operators": _operators(),
    }
