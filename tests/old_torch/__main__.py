"""``python -m tests.old_torch 2.4.1 2.9.1``: build for older torch releases, and test that.

Each release gets an environment in ``.venv-torch-<version>``, and its CPU library in
``build/old-torch/<version>``, beside what is built for the pinned torch. A release that cannot be
installed is told and left out; it is an error if none can.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.paths import ROOT
from tests.helpers.pins import pins_without_torch

# Forward, backward, gradcheck and opcheck of the operators; modules, state dicts and published
# blocks in their place; autocast, torch.func, recomputation, tracing, torch.compile of blocks and
# operators; what says that it needs a newer torch. Left out: ONNX and torch.export, whose tests use
# names of newer releases; detectors and commands.
TESTS = (
    *("tests/ops", "tests/reference", "tests/compat", "tests/test_modules.py"),
    *("tests/test_state_dicts.py", "tests/test_unified.py", "tests/test_fused.py"),
    *("tests/test_autocast.py", "tests/test_transforms.py", "tests/test_vmap.py"),
    *("tests/test_recompute.py", "tests/test_jit_trace.py", "tests/test_older_torch.py"),
)
# What the tests need beside torch; torchvision's own version goes with torch's.
PACKAGES = ("numpy", "pytest", "pytest-xdist", "hypothesis", "cmake", "ninja", "setuptools")


# By the beginning of a version, what is beyond that release of torch: the compiler of 2.4 cannot
# read a property of a class, which only this test asks of it; 2.9 exports no checkpoint strictly.
LEFT_OUT = {
    "2.4.": ("tests/compat/test_accelerate.py::test_torch_compile_traces_the_parameter_lookup",),
    "2.9.": ("tests/test_recompute.py::test_export[True]",),
}


def torchvision(torch: str) -> str:
    """The release of torchvision that belongs to one of torch: 0.19 to 2.4, and so on."""
    minor = int(torch.split(".")[1])
    return f"torchvision==0.{minor + 15}.*"


def install(torch: str) -> Path | None:
    """The Python of the environment with this torch; None, and a message, if there is none."""
    directory = ROOT / f".venv-torch-{torch}"
    python = directory / "bin" / "python"
    done = directory / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
        pip = [str(python), "-m", "pip", "install"]
        pinned = [*pip, "-c", str(pins_without_torch(directory)), *PACKAGES]
        for command in ([*pip, f"torch=={torch}", torchvision(torch)], pinned):
            if subprocess.run(command, check=False).returncode != 0:
                print(f"WARNING: torch {torch} could not be installed into {directory}", flush=True)
                return None
        done.touch()
    return python


def test(torch: str, python: Path, options: list[str]) -> int:
    """Build the CPU library with this Python and run the tests; the exit status."""
    built = ROOT / "build" / "old-torch" / torch
    environment = os.environ | {"DYHEAD_CUDA": "off", "DYHEAD_REQUIRE": "cpu"}
    command = [str(python), "setup.py", "--quiet", "build_ext", "--build-lib", str(built)]
    if status := subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        return status
    environment |= {
        "DYHEAD_LIBRARY_DIR": str(built / "dyhead_cuda" / "lib"),
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "1",
        "CI": "",  # these packages are not all of those that CI's tests need
    }
    pytest = [str(python), "-m", "pytest", "-n", "auto", "--dist", "worksteal", "-q"]
    for begin, tests in LEFT_OUT.items():
        if torch.startswith(begin):
            pytest += [word for name in tests for word in ("--deselect", name)]
    return subprocess.run(
        [*pytest, *TESTS, *options], cwd=ROOT, env=environment, check=False
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.old_torch", description=__doc__)
    parser.add_argument("torches", nargs="+", metavar="VERSION", help="such as 2.4.1")
    arguments, options = parser.parse_known_args()
    results = {}
    for torch in arguments.torches:
        python = install(torch)
        if python is not None:
            results[torch] = test(torch, python, options)
    for torch, status in results.items():
        print(f"torch {torch}: {'passed' if status == 0 else f'FAILED ({status})'}")
    if not results:
        print("none of these torches could be installed", file=sys.stderr)
    return int(not results or any(results.values()))


if __name__ == "__main__":
    sys.exit(main())
