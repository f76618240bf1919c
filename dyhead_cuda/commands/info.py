"""``python -m dyhead_cuda info``: what runs here and why, for people or as JSON."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dyhead_cuda import info


def run(arguments: argparse.Namespace) -> int:
    """Prints the facts; returns the exit status."""
    facts = info.gather()
    print(json.dumps(facts, indent=2) if arguments.json else format_text(facts))
    return 0


def format_text(facts: dict[str, Any]) -> str:
    """What :func:`dyhead_cuda.info.gather` found, for people to read."""
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
        code = f"runs {gpu['code']}" if gpu["code"] else gpu["problem"] or "no code is built for it"
        lines.append(
            f"GPU          {gpu['name']}, compute capability {gpu['capability']}, "
            f"{gpu['memory_gib']} GiB; {code}"
        )
    if not facts["gpus"]:
        lines.append("GPU          none")
    for name, state in facts["libraries"].items():
        lines += _library_lines(name, state, facts["built_against"])
    lines += ["", f"{'operator':<40} {'cpu':<5} {'cuda':<5} reference"]
    for operator, backends in facts["operators"].items():
        marks = ["yes" if backend in backends else "no" for backend in info.DISPATCH_KEYS]
        lines.append(f"{operator:<40} {marks[0]:<5} {marks[1]:<5} yes")
    if not facts["operators"]:
        lines.append("(none compiled: everything runs on the reference)")
    return "\n".join(lines)


def _library_lines(
    name: str, state: dict[str, Any], built_against: dict[str, Any] | None
) -> list[str]:
    """Whether a library is loaded, else why not, and how it was built."""
    title = f"{name + ' library':<12}"
    if state["loaded"]:
        lines = [f"{title} loaded from {state['path']}"]
    else:
        lines = [
            f"{title} not loaded: {state['reason']}",
            f"{'':<12} to fix it: {state['fix']}",
            *(f"{'':<14}| {line}" for line in state.get("log_tail", [])),
        ]
    if "compiler" in state:
        nvcc = f", nvcc {state['nvcc']}" if "nvcc" in state else ""
        torch = (built_against or {}).get("version", "unknown")
        tools = f"{state['compiler']}{nvcc}, torch {torch}"
        lines.append(f"{'':<12} built {state['time']} with {tools}")
    if "archs" in state:
        archs = ", ".join(f"sm_{arch}" for arch in state["archs"])
        lines.append(f"{'':<12} for {archs}, and PTX of compute_{state['archs'][-1]}")
    return lines
