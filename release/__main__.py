"""``python -m release``: make what a release consists of, and try it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from release import trial, wheels


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m release", description=__doc__)
    parser.add_argument("--out", type=Path, default=wheels.ROOT / "dist", help="(default: dist)")
    parser.add_argument(
        "--kinds", nargs="*", choices=("cpu", "cuda"), default=("cpu", "cuda"), help="of wheels"
    )
    parser.add_argument(
        "--torches",
        nargs="*",
        default=(),
        metavar="VERSION",
        help="try the wheels in an environment with each of these torches alone, under build/",
    )
    arguments = parser.parse_args()
    try:
        print(wheels.sources(arguments.out).name, flush=True)
        made = []
        for kind in arguments.kinds:
            try:
                made.append(wheels.wheel(kind, arguments.out))
            except wheels.NotBuilt as problem:
                if kind in os.environ.get("DYHEAD_REQUIRE", "cpu").split(","):
                    raise
                print(f"no wheel with the library of {kind}: {problem}", flush=True)
            else:
                print(wheels.describe(made[-1]), flush=True)
        environments = wheels.ROOT / "build" / "trial"
        for line in trial.try_all(made, arguments.torches, environments):
            print(line, flush=True)
    except wheels.ReleaseError as problem:
        sys.exit(f"release: {problem}")


if __name__ == "__main__":
    main()
