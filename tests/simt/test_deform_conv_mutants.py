"""Planted bugs in deform_conv: its emulated tests must notice each of them."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from .build import Kernels, mutate

FORWARD = "csrc/cuda/deform_conv/deform_conv_fwd.cuh"
INPUT = "csrc/cuda/deform_conv/deform_conv_bwd_input.cuh"
GATHER = "csrc/cuda/deform_conv/deform_conv_bwd_gather.cu"
SHARED = "csrc/cuda/deform_conv/deform_conv.cuh"
TILE = "csrc/cuda/tile/tile_gemm.cuh"
SUMS = "csrc/cuda/deform_conv/deform_sums.cuh"
TESTS = "tests/simt/test_deform_conv.py"


class Bug(NamedTuple):
    file: str
    pattern: str
    replacement: str
    kernel: str = "deform_conv_fwd_float32"
    tests: str = "test_convolutions and vectors and float32"

    def kernels(self) -> Kernels:
        header = not self.file.endswith(".cu")
        return mutate(
            self.file, self.pattern, self.replacement, kernel=self.kernel if header else None
        )


ALL_JOBS = "test_jobs and all and float32"
BACKWARD = "deform_conv_bwd_input_float32"

BUGS = {
    "corners read before they are there": Bug(
        FORWARD,
        "    // Now the corners are there, and nobody reads the buffers of the stretch before.\n"
        "    __syncthreads();\n",
        "",
    ),
    "operands read before they are there": Bug(
        FORWARD,
        "      // Both operands of this step are there, and nobody reads those of the one before.\n"
        "      __syncthreads();\n",
        "",
    ),
    "weights not waited for": Bug(FORWARD, "      cp_async_wait_all();\n", ""),
    "the buffer that is being read is written": Bug(FORWARD, "buffer ^= 1;", "buffer ^= 0;"),
    "taps beyond nine read the first panels": Bug(
        FORWARD,
        "(table_.shape.taps() - taps) * kPanel",
        "0 * kPanel",
        tests="test_convolutions and large and float32",
    ),
    "pixels beyond the map count in the moments": Bug(
        FORWARD, "valid[row] = at.index < 0 ? F(0) : F(1);", "valid[row] = F(1);", tests=ALL_JOBS
    ),
    "moments of a tile not weighted by its pixels": Bug(
        FORWARD,
        "const F share = added / (count + added);",
        "const F share = F(1) / (count / added + F(2));",
        tests="test_jobs and chunks and float32",
    ),
    "a patch's row is taken for its column": Bug(
        SHARED,
        "% patches_x * kPatchWidth + row % kPatchWidth",
        "% patches_x * kPatchWidth + row / kPatchWidth",
        tests="test_convolutions and middle and float32",
    ),
    "a unit stored where another is read": Bug(
        TILE,
        "((unit ^ (row & 7)) << 4)",
        "((unit ^ (row & 3)) << 4)",
    ),
    "lanes swap the wrong pairs": Bug(
        FORWARD,
        "exchange(words[1], words[3], 2, lane & 2);",
        "exchange(words[1], words[2], 2, lane & 2);",
        "deform_conv_fwd_float16",
        "test_convolutions and vectors and float16",
    ),
    "columns used before they are there": Bug(
        INPUT, "      __syncthreads();\n      consume(", "      consume(", BACKWARD
    ),
    "dots of another corner": Bug(
        INPUT, "2 * (lane & 1) + (lane >> 1)", "(lane & 1) + 2 * (lane >> 1)", BACKWARD
    ),
    "a panel too early": Bug(
        INPUT,
        "cp_async_wait_group<kBwdStages - 2>",
        "cp_async_wait_group<kBwdStages - 1>",
        BACKWARD,
    ),
    "integer sums lose a digit": Bug(
        SUMS,
        "return sum / scale;",
        "return sum / scale * F(1.001);",
        "deform_conv_bwd_gather",
        "test_deterministic and float32",
    ),
    "predictions of the flat rule gathered by the plain one": Bug(
        GATHER,
        "if (rule == ReadRule::kFlat) {",
        "if (rule == ReadRule::kNone) {",
        tests="test_jobs_backward and all and float32",
    ),
    "the gate of one tile left out": Bug(
        GATHER,
        "i < tiles.per_image; i += kGatherThreads",
        "i + 1 < tiles.per_image; i += kGatherThreads",
        tests="test_jobs_backward and all and float32",
    ),
}


@pytest.mark.spawns
@pytest.mark.usefixtures("simt")
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_noticed(bug: str) -> None:
    BUGS[bug].kernels().assert_noticed(TESTS, "-k", BUGS[bug].tests)
