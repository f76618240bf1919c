"""``python -m tests.aarch64``: build the CPU library for aarch64, and test it under qemu.

What it needs beyond Debian's cross compiler and qemu it puts into ``build/aarch64``: Debian's
Python for aarch64 and torch's wheel. Arguments are tests, and options of pytest.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.aarch64.machine import (
    Missing,
    build,
    check_tools,
    install_packages,
    start,
    unpack_system,
)
from tests.helpers.paths import ROOT

# What reaches every kernel of the CPU in every type, forward and backward. The emulation takes
# some fifteen times as long as a processor and starts no other program, so what tests registration
# alone, compilers or tables that are refused is left out.
TESTS = ("tests/ops", "tests/test_fused.py")
LEFT_OUT = ("test_flops.py", "test_names.py", "test_deform_tables.py")
OPTIONS = ("-q", "-p", "no:cacheprovider", "-k", "not cuda and not opcheck and not compile")
IS_NEON = (
    "from dyhead_cuda import library as l; l.require('cpu'); assert l.cpu_capability() == 'neon'"
)


def files(tests: list[str]) -> list[str]:
    """The files of tests, large ones first."""
    found = []
    for name in tests:
        path = ROOT / name
        inside = sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
        found += [file for file in inside if file.name not in LEFT_OUT]
    found.sort(key=lambda file: -file.stat().st_size)
    return [str(file.relative_to(ROOT)) for file in found]


def run(arguments: tuple[str, ...]) -> int:
    process = start(*arguments)
    output, _ = process.communicate()
    print(f"--- {' '.join(arguments)}\n{output}", flush=True)
    return process.returncode


def main(arguments: list[str]) -> int:
    try:
        check_tools()
        unpack_system()
        install_packages()
    except Missing as problem:
        print(f"make aarch64: {problem}", file=sys.stderr)
        return 1
    build()
    if status := run(("-c", IS_NEON)):
        return status
    options = [word for word in arguments if not Path(ROOT / word.split("::")[0]).exists()]
    tests = [word for word in arguments if word not in options] or files(list(TESTS))
    shares = os.cpu_count() or 1
    commands = [
        ("-m", "pytest", *OPTIONS, *options, *tests[i::shares])
        for i in range(min(shares, len(tests)))
    ]
    with ThreadPoolExecutor(shares) as pool:
        failed = [status for status in pool.map(run, commands) if status != 0]
    print(f"aarch64 under qemu: {'FAILED' if failed else 'passed'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
