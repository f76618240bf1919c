"""What the vector units of a CPU multiply at most, measured by a small program of their own.

A library's matrix products do not tell: on some processors they stay far below, and what is
faster than they are would seem to pass 100 %.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("fma_peak.cpp")
FLAGS = ("-std=c++20", "-O2", "-march=native", "-ffp-contract=fast", "-pthread")
NO_SUCH_UNIT = 3  # exit status of the program: a type that no instruction multiplies


def rates(precisions: Sequence[str], threads: int, milliseconds: int) -> dict[str, float]:
    """TFLOP/s of fused multiply-adds on registers, by precision.

    Args:
        precisions: a type without instructions of its own has the rate of float32, in which it is
            computed.
        threads: that multiply at the same time.
        milliseconds: for each precision.

    Returns:
        Nothing where no C++ compiler compiles the program, which is said on stderr.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "fma_peak")
        try:
            subprocess.run([*compiler, *FLAGS, str(SOURCE), "-o", str(program)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no roofline: {error}; set CXX to a C++ compiler", file=sys.stderr)
            return {}

        def rate(precision: str) -> float:
            command = [str(program), precision, str(threads), str(milliseconds)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == NO_SUCH_UNIT and precision != "float32":
                return rate("float32")
            done.check_returncode()
            return float(done.stdout)

        return {precision: rate(precision) for precision in precisions}
