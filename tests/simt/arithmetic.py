"""The data types and tolerances that the tests of the kernels share."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.compare import TOLERANCE
from tests.helpers.not_finite import CALLS_AND_PLACES, NOT_FINITE

from .arrays import name_of

TF32_TOLERANCE = 1e-3  # relative L2 error of outputs; gradients have twice that

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=name_of)

# Both 16-bit types run the same code but for conversions: of NaN and both infinities each takes one
# at each place of a call, another one than its sibling does and than at the place before.
FIRST = {torch.float16: 0, torch.bfloat16: 1}
not_finite = pytest.mark.parametrize(
    ("call", "place", "value", "dtype"),
    [
        pytest.param(call, place, value, dtype, id=f"{call}-{place}-{value}-{name_of(dtype)}")
        for at, (call, place) in enumerate(CALLS_AND_PLACES)
        for index, value in enumerate(NOT_FINITE)
        for dtype in TOLERANCE
        if dtype not in FIRST or index == (FIRST[dtype] + at) % len(NOT_FINITE)
    ],
)
