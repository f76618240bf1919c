"""What runs here and why: versions, libraries, processors, and the backends of every operator."""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from dyhead_cuda import library
from dyhead_cuda.version import __version__

NAMESPACE = "dyhead::"
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def covering_code(archs: Sequence[str], capability: tuple[int, int]) -> str | None:
    """Which of the compiled ``archs`` a GPU runs: "sm_80", "PTX of compute_120" or None for none.

    Machine code for X.Y runs on every X.Z with Z >= Y, that for an "a" target on X.Y alone; the
    last of ``archs`` is also there as PTX, which the driver compiles for any newer GPU (but not
    from an "a" target).
    """
    best: tuple[int, str] | None = None
    for arch in archs:
        number, specific = int(re.sub(r"\D", "", arch)), not arch.isdigit()
        major, minor = divmod(number, 10)
        exact = (major, minor) == capability
        if exact or (not specific and major == capability[0] and minor < capability[1]):
            # Of two that fit, the later one is closer; an "a" target counts before the plain one.
            best = max(best or (0, ""), (2 * number + specific, f"sm_{arch}"))
    if best is not None:
        return best[1]
    last = archs[-1] if archs else ""
    if last.isdigit() and divmod(int(last), 10) < capability:
        return f"PTX of compute_{last}"
    return None


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


def _gpus(archs: Sequence[str]) -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        gpus.append(
            {
                "name": properties.name,
                "capability": "{}.{}".format(*capability),
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "code": covering_code(archs, capability),
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


def format_text(facts: dict[str, Any]) -> str:
    """The result of :func:`gather` for people to read."""
    versions, cpu = facts["versions"], facts["cpu"]
    cuda = f"CUDA {versions['torch_cuda']}" if versions["torch_cuda"] else "without CUDA"
    driver = f", driver for CUDA {versions['driver_cuda']}" if versions["driver_cuda"] else ""
    lines = [
        f"dyhead_cuda  {versions['dyhead_cuda']}",
        f"torch        {versions['torch']} ({cuda}{driver})",
        f"python       {versions['python']}, numpy {versions['numpy']}, {versions['platform']}",
        f"CPU          {cpu['machine']}, {cpu['capability']}, {cpu['threads']} threads",
    ]
    for gpu in facts["gpus"]:
        code = f"runs {gpu['code']}" if gpu["code"] else "not in DYHEAD_CUDA_ARCHS of the build"
        lines.append(
            f"GPU          {gpu['name']}, compute capability {gpu['capability']}, "
            f"{gpu['memory_gib']} GiB; {code}"
        )
    if not facts["gpus"]:
        lines.append("GPU          none")
    against = (facts["built_against"] or {}).get("version", "unknown")
    for name, state in facts["libraries"].items():
        if state["loaded"]:
            lines.append(f"{name + ' library':<12} loaded from {state['path']}")
        else:
            lines.append(f"{name + ' library':<12} not loaded: {state['reason']}")
            lines.append(f"{'':<12} to fix it: {state['fix']}")
            lines += [f"{'':<14}| {line}" for line in state.get("log_tail", [])]
        if "compiler" in state:
            nvcc = f", nvcc {state['nvcc']}" if "nvcc" in state else ""
            tools = f"{state['compiler']}{nvcc}, torch {against}"
            lines.append(f"{'':<12} built {state['time']} with {tools}")
        if "archs" in state:
            archs = ", ".join(f"sm_{arch}" for arch in state["archs"])
            lines.append(f"{'':<12} for {archs}, and PTX of compute_{state['archs'][-1]}")
    lines += ["", f"{'operator':<40} {'cpu':<5} {'cuda':<5} reference"]
    for operator, backends in facts["operators"].items():
        marks = ["yes" if backend in backends else "no" for backend in DISPATCH_KEYS]
        lines.append(f"{operator:<40} {marks[0]:<5} {marks[1]:<5} yes")
    if not facts["operators"]:
        lines.append("(none compiled: everything runs on the reference)")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda info``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints the facts; returns the exit status."""
    facts = gather()
    print(json.dumps(facts, indent=2) if arguments.json else format_text(facts))
    return 0
