"""``python -m dyhead_cuda bench``: how fast, how large and how right, against what people run.

Every implementation gets the same random inputs and parameters and is compared with the reference
in float64 before it is timed; one that is wrong is reported and not timed.
"""

from __future__ import annotations

from dyhead_cuda.bench.command import add_arguments, run

__all__ = ["add_arguments", "run"]
