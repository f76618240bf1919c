"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

from itertools import product

import torch

from tests.fuzz.cases import DTYPES
from tests.fuzz.compiled import ENTRIES
from tests.fuzz.entries import make_call
from tests.sanitizers.build import ADDRESS_SANITIZER
from tests.sanitizers.check import failures_of, missed_by

SEED, CALLS = 15, 400
FORWARD_AND_BACKWARD = [
    f"{name}_{way}"
    for name in (
        "deform_conv",
        "offset_deform_conv",
        "fuse_branches",
        "dynamic_relu",
        "block_coefficients",
    )
    for way in ("fwd", "bwd")
]


def test_the_cpu_kernels_are_clean() -> None:
    """make sanitize makes more calls, and looks for races too."""
    assert missed_by(ADDRESS_SANITIZER) == []
    assert failures_of(ADDRESS_SANITIZER, SEED, CALLS) == []


def test_the_calls_reach_every_operator_in_every_type() -> None:
    made = [make_call(ENTRIES, SEED, index) for index in range(CALLS)]
    good = [call for call in made if not call.spoiled]
    operators = {(call.name.rpartition(".")[2], call.tensors()[0].dtype) for call in good}
    wanted = set(product(FORWARD_AND_BACKWARD, DTYPES))
    halves = (torch.float16, torch.bfloat16)  # the moments are never of these
    wanted -= set(product(("block_coefficients_fwd", "block_coefficients_bwd"), halves))
    assert wanted <= operators, f"not reached: {wanted - operators}"
