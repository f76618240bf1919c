"""An aarch64 machine in a folder: Debian's Python, torch, and how to run it.

Nothing is installed into the system: packages of the other architecture are unpacked, and found
there by qemu, which looks for every absolute path below the folder first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.paths import ROOT
from tests.helpers.pins import pins_without_torch

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
# No newer than torch's wheels need: they do not run on an ARMv8.0, a cortex-a72.
PROCESSOR = "neoverse-n1"
TOOLCHAIN = Path(__file__).parent / "toolchain.cmake"

DIRECTORY = ROOT / "build" / "aarch64"
SYSTEM = DIRECTORY / "system"
SITE = DIRECTORY / "site"
SYSTEM_PACKAGES = ("python3", "libstdc++6", "libgomp1")
# The last torch whose wheel for aarch64 is one for the CPU alone.
TORCH = ("torch==2.10.0", "torchvision==0.25.0")
# What these and the tests need. pip would ask for that of the processor which it runs on.
PACKAGES = (
    *("numpy", "pillow", "filelock", "typing-extensions", "sympy", "mpmath", "networkx"),
    *("jinja2", "MarkupSafe", "fsspec", "pytest", "pluggy", "iniconfig", "packaging", "pygments"),
    *("hypothesis", "sortedcontainers", "attrs"),
)


class Missing(Exception):
    """What this machine lacks, in one line."""


def check_tools() -> None:
    """Raises Missing, with the packages to install."""
    needed = {
        COMPILER: "g++-aarch64-linux-gnu",
        EMULATOR: "qemu-user",
        "apt-get": "apt",
        "dpkg-deb": "dpkg",
    }
    lacking = [package for tool, package in needed.items() if shutil.which(tool) is None]
    if lacking:
        raise Missing(f"not installed: run apt-get install {' '.join(lacking)} (on Debian)")


def unpack_system() -> None:
    """Unpack Debian's Python for aarch64 and all that it needs; apt's own state stays as it is."""
    done = SYSTEM / ".unpacked"
    if done.exists():
        return
    shutil.rmtree(SYSTEM, ignore_errors=True)
    state, archives = SYSTEM / "apt", SYSTEM / "archives"
    for folder in (state / "lists" / "partial", state / "cache", archives / "partial"):
        folder.mkdir(parents=True)
    (state / "status").touch()
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "1",
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "Dir::Cache::archives": archives,
    }
    apt = [
        "apt-get",
        "-q",
        *(word for key, value in options.items() for word in ("-o", f"{key}={value}")),
    ]
    subprocess.run([*apt, "update"], check=False)  # one source out of many may have no aarch64
    install = [*apt, "install", "--yes", "--download-only", "--no-install-recommends"]
    if subprocess.run([*install, *SYSTEM_PACKAGES], check=False).returncode != 0:
        raise Missing("apt-get finds no Python for arm64: its sources must be Debian's")
    for package in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", package, SYSTEM], check=True)
    for name in ("lib", "bin"):  # links that the installation of Debian makes, not a package
        if not (SYSTEM / name).exists():
            (SYSTEM / name).symlink_to(f"usr/{name}")
    done.touch()


def python() -> Path:
    return (SYSTEM / "usr" / "bin" / "python3").resolve()


def install_packages() -> None:
    """Put torch for aarch64, and what the tests need, into SITE."""
    wanted = "\n".join((*TORCH, *PACKAGES, python().name))
    done = SITE / ".installed"
    if done.exists() and done.read_text() == wanted:
        return
    shutil.rmtree(SITE, ignore_errors=True)
    version = python().name.removeprefix("python").replace(".", "")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:"]
    command += ["--target", str(SITE), "--implementation", "cp", "--python-version", version]
    for tag in (f"cp{version}", "abi3", "none"):
        command += ["--abi", tag]
    for tag in ("manylinux_2_28", "manylinux_2_17", "manylinux2014"):
        command += ["--platform", f"{tag}_aarch64"]
    command += ["-c", str(pins_without_torch(DIRECTORY)), *TORCH, *PACKAGES]
    if subprocess.run(command, check=False).returncode != 0:
        raise Missing("torch for aarch64 could not be installed: pip says why")
    done.write_text(wanted)


def build() -> None:
    """Compile the CPU library for aarch64, against the torch in SITE; a warning is an error."""
    environment = {
        "CMAKE_TOOLCHAIN_FILE": str(TOOLCHAIN),
        "CXX": COMPILER,
        "DYHEAD_CUDA": "off",
        "DYHEAD_REQUIRE": "cpu",
        "DYHEAD_WERROR": "on",
        "PYTHONPATH": str(SITE),  # whose files tell where torch is
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(DIRECTORY)]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start the emulated Python with these arguments; its output is one text."""
    environment = {
        "DYHEAD_LIBRARY_DIR": str(DIRECTORY / "dyhead_cuda" / "lib"),
        "PYTHONPATH": f"{ROOT}:{SITE}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "CI": "",  # these packages are not all of those that CI's tests need
    }
    command = [EMULATOR, "-cpu", PROCESSOR, "-L", str(SYSTEM), str(python()), *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
