"""Planted bugs in block_coefficients: its emulated tests must notice each of them."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from .build import Kernels, mutate

DEVICE = "csrc/cuda/block_coefficients/block_coefficients.cuh"
FORWARD = "csrc/cuda/block_coefficients/block_coefficients_fwd.cu"
BACKWARD = "csrc/cuda/block_coefficients/block_coefficients_bwd.cu"
ARITHMETIC = "csrc/common/block_coefficients.h"
TESTS = (
    "tests/simt/test_block_coefficients.py",
    "-x",
    "-k",
    "test_orders_of_threads or test_corners or test_cases",
)
BARRIER = "  __syncthreads();\n"


class Bug(NamedTuple):
    file: str
    pattern: str
    replacement: str
    kernel: str = "block_coefficients_bwd"

    def kernels(self) -> Kernels:
        header = not self.file.endswith(".cu")
        return mutate(
            self.file, self.pattern, self.replacement, kernel=self.kernel if header else None
        )


def without_barrier(file: str, after: str) -> Bug:
    return Bug(file, after + BARRIER, after)


BUGS = {
    "groups read before they are there": without_barrier(
        FORWARD, "  normalise(p, jobs, shared.norms);\n"
    ),
    "gates read before they are there": without_barrier(
        FORWARD, "  gate_logits(p, jobs, shared.norms);\n"
    ),
    "the mean of z read before it is there": without_barrier(
        FORWARD, "  combine(p, jobs, at, first_block, shared);\n"
    ),
    "the hidden layer read before it is there": Bug(
        FORWARD, BARRIER + "  F* coefficients", "  F* coefficients"
    ),
    "a slice leaves a row out": Bug(
        FORWARD, "min(first + kSliceRows,", "min(first + kSliceRows - 1,"
    ),
    "sums read before they are there": Bug(
        DEVICE, "  " + BARRIER + "    if (thread < lanes", "    if (thread < lanes"
    ),
    "sums overwritten while they are read": Bug(DEVICE, "  " + BARRIER + "  }\n}", "  }\n}"),
    "gradients of gates read before they are there": without_barrier(
        BACKWARD, "  differentiate_gates(p, jobs, at, partials, shared);\n"
    ),
    "the gradient of another normalisation": Bug(
        BACKWARD, "p.tables.norm[j] !=", "p.tables.norm[0] !="
    ),
    "an image left out": Bug(
        BACKWARD, "const int64_t branches = s.jobs * s.images;", "const int64_t branches = s.jobs;"
    ),
    "the slope beyond a corner": Bug(ARITHMETIC, "logit + F(3) < F(6)", "logit + F(3) <= F(6)"),
    "the gate's part forgotten": Bug(
        ARITHMETIC, "(share * grads.mean_z + pooled) * k.a", "share * grads.mean_z * k.a"
    ),
    "the spread of the means forgotten": Bug(
        ARITHMETIC, "from_mean + F(2) * (m - mean) * var", "from_mean"
    ),
}


@pytest.mark.spawns
@pytest.mark.usefixtures("simt")
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_noticed(bug: str) -> None:
    BUGS[bug].kernels().assert_noticed(*TESTS)


@pytest.mark.spawns
@pytest.mark.usefixtures("simt")
def test_harmless_change_passes() -> None:
    call = "  normalise(p, jobs, shared.norms);\n"
    run = Bug(FORWARD, call, call + BARRIER).kernels().run_pytest(*TESTS)
    assert run.returncode == 0, run.stdout
    assert "passed" in run.stdout
