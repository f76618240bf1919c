"""``python -m tests.fuzz``: random calls of everything public, each of which may fail alone."""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import time

from tests.fuzz.runner import Run, alone, fuzz, work


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--seed", type=int, help="of all choices; drawn and printed without it")
    parser.add_argument("--only", type=int, metavar="INDEX", help="make this call alone, here")
    parser.add_argument("--entries", default=Run.entries, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--unlimited", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return work(arguments)
    seed = random.randrange(10**9) if arguments.seed is None else arguments.seed
    if arguments.only is not None:
        entries = importlib.import_module(arguments.entries).ENTRIES
        return alone(entries, seed, arguments.only)
    print(f"{arguments.calls} calls, seed {seed}", flush=True)
    start, failures = time.monotonic(), 0
    for failure in fuzz(Run(seed, arguments.calls, arguments.first, arguments.entries)):
        failures += 1
        print(failure, flush=True)
    print(f"{failures or 'none'} failed, {time.monotonic() - start:.0f} s")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
