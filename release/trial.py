"""A wheel in an environment that has nothing but one torch: what pip does, and what then runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from release.wheels import ReleaseError

# Prints which libraries are loaded and the errors of a block, forward and backward.
PROBE = """
import json, torch, dyhead_cuda
from dyhead_cuda import library

torch.manual_seed(0)
head = dyhead_cuda.DyHead(32, 32, num_blocks=2)
features = [torch.randn(2, 32, size, size, requires_grad=True) for size in (16, 8, 4)]
found = {}
for backend in ("cpu", "reference"):
    with dyhead_cuda.backend(backend):
        outputs = head(features)
        loss = sum(level.square().mean() for level in outputs)
        found[backend] = [*outputs, *torch.autograd.grad(loss, [*features, *head.parameters()])]
pairs = zip(found["cpu"], found["reference"], strict=True)
errors = [float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs]
print(json.dumps({
    "torch": str(torch.__version__), "file": dyhead_cuda.__file__, "error": max(errors),
    "loaded": {name: library.reason(name) for name in library.NAMES},
}))
"""
LARGEST_ERROR = 1e-4


def _run(python: Path, *arguments: str) -> str:
    with TemporaryDirectory() as empty:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DYHEAD_"))}
        result = subprocess.run(
            [str(python), *arguments],
            cwd=empty,
            env=kept,
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode != 0:
        raise ReleaseError(f"{python} {' '.join(arguments)[:80]} failed:\n{result.stderr[-3000:]}")
    return result.stdout


def environment(directory: Path, torch: str) -> Path:
    """The Python of an environment with this torch alone; made unless it is there."""
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        _run(python, "-m", "pip", "install", "--quiet", f"torch=={torch}")
    return python


def try_wheel(wheel: Path, python: Path) -> str:
    """Install a wheel, run a head with it, uninstall it; returns a line for people.

    Raises:
        ReleaseError: pip replaced torch, the CPU library does not load, the CUDA library of a wheel
            that has one does not though torch's CUDA fits, or the numbers are wrong.
    """
    version = ("-c", "import torch; print(torch.__version__, torch.version.cuda)")
    before = _run(python, *version)
    _run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", str(wheel))
    _run(python, "-m", "pip", "install", "--quiet", str(wheel))  # what it depends on
    try:
        if _run(python, *version) != before:
            raise ReleaseError(f"pip replaced torch {before}for {wheel.name}")
        found = json.loads(_run(python, "-c", PROBE))
    finally:
        _run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "dyhead_cuda")
    return judge(wheel.name, found, before.split()[1])


def judge(name: str, found: dict[str, object], cuda: str) -> str:
    """A line about what PROBE found under a torch of this version of CUDA ("None": without)."""
    loaded = found["loaded"]
    assert isinstance(loaded, dict)
    needed = ["cpu", "cuda"] if f"+cu{cuda.split('.')[0]}-" in name else ["cpu"]
    for library in needed:
        if loaded[library]:
            raise ReleaseError(f"{name}, torch {found['torch']}: {library}: {loaded[library]}")
    if not float(str(found["error"])) < LARGEST_ERROR:
        raise ReleaseError(f"{name}, torch {found['torch']}: error {found['error']}")
    return (
        f"{name} under torch {found['torch']}: {' and '.join(needed)} loaded, "
        f"largest relative error {found['error']:.1e}"
    )


def try_all(wheels: Sequence[Path], torches: Sequence[str], directory: Path) -> list[str]:
    """Every wheel under every torch, in environments that are kept in ``directory``."""
    lines = []
    for torch in torches:
        python = environment(directory / f"torch-{torch}", torch)
        lines += [try_wheel(wheel.resolve(), python) for wheel in wheels]
    return lines
