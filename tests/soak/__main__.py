"""``python -m tests.soak``: train for long, and see that memory stays flat."""

from __future__ import annotations

import argparse
import sys
import time

from dyhead_cuda import library
from tests.soak.training import grow, training_step


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="at least 10")
    arguments = parser.parse_args()
    if arguments.steps < 10:
        parser.error(f"expected at least 10 steps, got {arguments.steps}")
    library.require("cpu")
    start = time.monotonic()
    growth = grow(training_step(), arguments.steps)
    print(f"{arguments.steps} steps in {time.monotonic() - start:.0f} s: {growth}")
    return int(not growth.flat)


if __name__ == "__main__":
    sys.exit(main())
