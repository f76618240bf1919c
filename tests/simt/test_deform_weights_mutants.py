"""Planted bugs in the weight gradient of deform_conv: its emulated tests must notice each."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from .build import Kernels, mutate

KERNEL = "csrc/cuda/deform_conv/deform_conv_bwd_weights.cuh"
SUM = "csrc/cuda/deform_conv/deform_conv_add_weights.cu"
TESTS = (
    "tests/simt/test_deform_weights.py",
    "-x",
    "-k",
    "test_slices_give and 30 or test_several_launches and bfloat16 or test_every_order",
)


class Bug(NamedTuple):
    file: str
    pattern: str
    replacement: str

    def kernels(self) -> Kernels:
        header = not self.file.endswith(".cu")
        kernel = "deform_conv_bwd_weights_bfloat16" if header else None
        return mutate(self.file, self.pattern, self.replacement, kernel=kernel)


BARRIER = "      __syncthreads();\n      const std::byte* a ="

BUGS = {
    "operands read before they are there": Bug(
        KERNEL, BARRIER, BARRIER.replace("__syncthreads", "__syncwarp")
    ),
    "samples located where others are read": Bug(
        KERNEL, "locate(predicted, cursor, freed)", "locate(predicted, cursor, steps_[buffer])"
    ),
    "another permutation of units stored than read": Bug(
        KERNEL,
        "depth_offset(sample % kDepth, thread % kUnits)",
        "unit_offset(sample % kDepth, thread % kUnits)",
    ),
    "channels beyond the last one written": Bug(
        SUM, "    if (channel + k >= slot.count) break;\n", ""
    ),
    "the last slice is not added": Bug(SUM, "i < slices; ++i", "i < (slices + 1) / 2; ++i"),
    "a launch forgets those before": Bug(SUM, "p.add ? value + sum[k]", "p.add ? sum[k]"),
}


@pytest.mark.spawns
@pytest.mark.usefixtures("simt")
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_noticed(bug: str) -> None:
    BUGS[bug].kernels().assert_noticed(*TESTS)


@pytest.mark.spawns
@pytest.mark.usefixtures("simt")
def test_harmless_change_passes() -> None:
    run = Bug(SUM, "#pragma unroll 4", "#pragma unroll 2").kernels().run_pytest(*TESTS)
    assert run.returncode == 0, run.stdout
    assert "passed" in run.stdout
