"""The data types and tolerances that the tests of the kernels share."""

from __future__ import annotations

import pytest

from tests.helpers.compare import TOLERANCE

from .arrays import name_of

TF32_TOLERANCE = 1e-3  # relative L2 error of outputs; gradients have twice that

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=name_of)
