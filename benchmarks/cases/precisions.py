"""The precisions that are measured, and how far from the float64 reference a result may be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dyhead_cuda.numerics import TOLERANCES as TOLERANCE

# tf32: float32 tensors whose matrix products round their operands to TF32.
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

GRADIENT_TOLERANCE = {precision: 2 * error for precision, error in TOLERANCE.items()}

# The same for blocks and heads. A rounded result moves the samples of the next step and flips
# maxima: outputs hardly change, but gradients jump.
BLOCK_TOLERANCE = {precision: 4 * error for precision, error in TOLERANCE.items()}
BLOCK_GRADIENT_TOLERANCE = {
    "float64": 1e-10,
    "float32": 1e-4,
    "tf32": 0.15,
    "float16": 0.15,
    "bfloat16": 0.3,
}

# The same for peers, which round every intermediate result. A peer that computed another function
# would be further away.
PEER_TOLERANCE = {
    "float64": 1e-11,
    "float32": 1e-4,
    "tf32": 0.01,
    "float16": 0.03,
    "bfloat16": 0.05,
}
PEER_GRADIENT_FACTOR = 8


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Whether float32 products on a GPU may use TF32 in this block: only for "tf32"."""
    backends: Any = torch.backends
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    # Reading the older switch raises when the newer one was set; writing it sets both.
    before = [switch.fp32_precision == "tf32" for switch in (matmul, cudnn.conv)]
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
