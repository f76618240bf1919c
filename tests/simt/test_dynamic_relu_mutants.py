"""Planted bugs in the dynamic ReLU: its emulated tests must notice each of them."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from .build import Kernels, mutate

DEVICE = "csrc/cuda/dynamic_relu/dynamic_relu.cuh"
ROWS = "csrc/cuda/tile/rows.cuh"
FORWARD = "csrc/cuda/dynamic_relu/dynamic_relu_fwd.cu"
BACKWARD = "csrc/cuda/dynamic_relu/dynamic_relu_bwd.cu"
ARITHMETIC = "csrc/common/dynamic_relu.h"
TESTS = (
    "tests/simt/test_dynamic_relu.py",
    "-x",
    "-k",
    "float32 and (test_sizes and hsigmoid or test_images)",
)


class Bug(NamedTuple):
    file: str
    pattern: str
    replacement: str
    kernel: str = "dynamic_relu_fwd"

    def kernels(self) -> Kernels:
        header = not self.file.endswith(".cu")
        return mutate(
            self.file, self.pattern, self.replacement, kernel=self.kernel if header else None
        )


BARRIER = "  __syncthreads();\n"
WAIT = "wait_until(arrived, static_cast<unsigned>(blocks) + 1);"

BUGS = {
    "sums read before they are there": Bug(
        ROWS, BARRIER + "  for (int o = thread", "  for (int o = thread"
    ),
    "sums overwritten while they are read": Bug(ROWS, "  }\n" + BARRIER + "}", "  }\n}"),
    "no wait for the last block": Bug(DEVICE, f"  if (threadIdx.x == 0) {WAIT}\n", ""),
    "wait for all arrivals only": Bug(DEVICE, WAIT, WAIT.replace(" + 1", "")),
    "another block than the last goes on": Bug(
        DEVICE, "static_cast<unsigned>(blocks) - 1", "static_cast<unsigned>(blocks) / 2"
    ),
    "published before it is written": Bug(
        DEVICE,
        "void publish(unsigned* arrived) {\n  __syncthreads();",
        "void publish(unsigned* arrived) {",
    ),
    "stretches leave a pixel out": Bug(
        DEVICE, "? first + length : pixels", "? first + length - 1 : pixels"
    ),
    "wrong slope": Bug(
        ARITHMETIC, "k % 2 == 1 ? slope / F(2)", "k % 2 == 1 ? slope", "dynamic_relu_bwd"
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
    wait = f"  if (threadIdx.x == 0) {WAIT}\n"
    run = Bug(DEVICE, wait, wait + "  __syncthreads();\n").kernels().run_pytest(*TESTS)
    assert run.returncode == 0, run.stdout
    assert "passed" in run.stdout
