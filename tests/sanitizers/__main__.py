"""``python -m tests.sanitizers``: the CPU kernels under each sanitizer, by calls of the fuzz."""

from __future__ import annotations

import argparse
import random
import sys

from tests.sanitizers.build import SANITIZERS
from tests.sanitizers.check import failures_of, missed_by


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitizers", description=__doc__)
    parser.add_argument("--calls", type=int, default=3000, help="of each instruction set")
    parser.add_argument("--seed", type=int, help="of all choices; drawn and printed without it")
    parser.add_argument("--only", choices=SANITIZERS, help="this sanitizer alone")
    arguments = parser.parse_args()
    seed = random.randrange(10**9) if arguments.seed is None else arguments.seed
    failed = 0
    for name, sanitizer in SANITIZERS.items():
        if arguments.only not in (None, name):
            continue
        print(f"{name}: building", flush=True)
        problems = missed_by(sanitizer)
        print(f"{name}: {arguments.calls} calls of each instruction set, seed {seed}", flush=True)
        problems += failures_of(sanitizer, seed, arguments.calls)
        failed += len(problems)
        print("\n".join(problems) or f"{name}: nothing found", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
