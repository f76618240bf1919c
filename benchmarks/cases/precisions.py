"""The precisions that are measured, and how far from the float64 reference a result may be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# tf32 is float32 whose products round their operands to TF32.
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

# Relative L2 error allowed to the outputs of one operator of ours, and to its gradients.
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "tf32": 1e-3, "float16": 1e-3, "bfloat16": 8e-3}
GRADIENT_TOLERANCE = {precision: 2 * error for precision, error in TOLERANCE.items()}

# Of a block or several: a rounded result moves samples of the next step and flips maxima, which
# is little of an output but makes gradients jump.
BLOCK_TOLERANCE = {precision: 4 * error for precision, error in TOLERANCE.items()}
BLOCK_GRADIENT_TOLERANCE = {
    "float64": 1e-10,
    "float32": 1e-4,
    "tf32": 0.15,
    "float16": 0.15,
    "bfloat16": 0.3,
}

# Others round every intermediate result, which moves samples and flips maxima; still, another
# function than the one they should compute is further away than this.
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
    # Reading the older switch raises where somebody has set the newer one; setting it sets both.
    before = [switch.fp32_precision == "tf32" for switch in (matmul, cudnn.conv)]
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
