"""A process of a training that loses another one, for test_dead_ranks.py.

``python -m tests.helpers.detection.lonely_ranks CASE FOLDER``, with torchrun's environment. It
makes FOLDER/RANK once it has begun.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from dyhead_cuda.detection.training.errors import RankError
from dyhead_cuda.detection.training.parallel import join
from tests.helpers.detection.trainees import recipe, run


def fail_in_one(record: dict[str, Any]) -> None:
    """A listener, which only the first process has."""
    if record["step"] == 3:
        raise OSError("the disk of rank 0 is full")


def main(case: str, folder: Path) -> int:
    """Trains until the end of another process, which is an error."""
    logging.basicConfig(format="%(message)s", level=logging.CRITICAL)
    ready = folder / os.environ["RANK"]
    try:
        if case == "deaf":
            # As where a library waits for a GPU: nothing is executed but this module's threads.
            with join("cpu"):
                ready.touch()
                time.sleep(100)
        ready.touch()
        listeners = {"failing": [fail_in_one]}.get(case, [])
        run(folder / "run", recipe(10**6, eval_every=None), listeners, seconds=0.01)
    except RankError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
