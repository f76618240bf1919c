"""The machine that is measured: what it is, and the rates that nothing on it can exceed."""

from __future__ import annotations

import contextlib
import datetime
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.precisions import PRECISIONS, products
from benchmarks.measuring import fma
from benchmarks.measuring.timing import WARM, Effort, measure
from dyhead_cuda import library
from dyhead_cuda.version import __version__

_SOURCES = Path(__file__).resolve().parents[1]
_SMI_FIELDS = {
    "driver": "driver_version",
    "sm_clock": "clocks.sm",
    "memory_clock": "clocks.mem",
    "largest_sm_clock": "clocks.max.sm",
    "power_limit": "power.limit",
}


def environment(command: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Where and how something is measured, as data that json can write.

    Args:
        command: the arguments of ``python -m benchmarks``.
        device: what is measured.
    """
    facts: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks", *command]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "library_loaded": library.loaded(device.type),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {
            "dyhead_cuda": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            **_peer_versions(),
        },
    }
    if device.type == "cuda":
        facts["versions"]["cuda"] = torch.version.cuda
        facts["versions"]["cudnn"] = torch.backends.cudnn.version()
        facts |= _nvidia_smi(device)
    elif clock := _cpu_field("cpu MHz"):
        facts["clock"] = f"{clock} MHz"
    return facts


def one_line(facts: dict[str, Any]) -> str:
    """The machine, for people."""
    threads = "" if facts["device"] == "cuda" else f", {facts['threads']} threads"
    return f"{facts['processor']}{threads}, torch {facts['versions']['torch']}"


def _cpu() -> str:
    return f"{_cpu_field('model name') or platform.machine()}, {library.cpu_capability()}"


def _cpu_field(name: str) -> str | None:
    """What Linux says of the first processor."""
    try:
        found = re.search(rf"^{name}\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    if not (_SOURCES / ".git").exists():
        return None
    try:
        done = subprocess.run(command, cwd=_SOURCES, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _peer_versions() -> dict[str, str]:
    versions = {}
    for name in ("torchvision", "mmcv"):
        with contextlib.suppress(ImportError):
            versions[name] = str(__import__(name).__version__)
    return versions


def _nvidia_smi(device: torch.device) -> dict[str, str]:
    """Driver and clocks, where nvidia-smi tells them; it is asked, nothing is set."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    query = f"--query-gpu={','.join(_SMI_FIELDS.values())}"
    command = [program, query, "--format=csv,noheader", f"--id=GPU-{uuid.removeprefix('GPU-')}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(_SMI_FIELDS, values, strict=False))


def copy_rate(device: torch.device, effort: Effort, quick: bool = False) -> float:
    """GB/s of a large copy, bytes read plus bytes written."""
    size = 2**22 if quick else 2**31 if device.type == "cuda" else 2**28
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source), device, effort)
    return 2 * size / seconds / 1e9


def product_rate(
    precision: str, device: torch.device, effort: Effort, quick: bool = False
) -> float:
    """TFLOP/s of large matrix products on random data, the better of two shapes."""
    large = 128 if quick else 8192 if device.type == "cuda" else 2048
    best = 0.0
    for rows, inner, columns in ((large, large, large), (8 * large, 9 * large // 8, large // 8)):
        a = torch.randn(rows, inner, device=device).to(PRECISIONS[precision])
        b = torch.randn(inner, columns, device=device).to(PRECISIONS[precision])
        out = torch.mm(a, b)
        with products(precision):
            seconds = _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, effort)
        best = max(best, 2 * rows * inner * columns / seconds / 1e12)
    return best


def _best(action: Any, device: torch.device, effort: Effort) -> float:
    action()
    return measure(action, device, effort, WARM).lower_quartile


def ceilings(
    precisions: Sequence[str], device: torch.device, effort: Effort, quick: bool = False
) -> dict[str, Any]:
    """Rates measured here and now, of which the roofline is made.

    What :func:`copy_rate` and :func:`product_rate` say, and on a CPU "fma_tflop_per_s", what
    :func:`benchmarks.measuring.fma.rates` says.
    """
    found: dict[str, Any] = {
        "copy_gb_per_s": copy_rate(device, effort, quick),
        "product_tflop_per_s": {
            precision: product_rate(precision, device, effort, quick) for precision in precisions
        },
    }
    if device.type == "cpu":
        threads = torch.get_num_threads()
        found["fma_tflop_per_s"] = fma.rates(precisions, threads, 50 if quick else 1000)
    return found
