"""Planted bugs in fuse_branches: its emulated tests must notice each of them."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from .build import Kernels, mutate

FORWARD = "csrc/cuda/fuse_branches/fuse_branches_fwd.cu"
BACKWARD = "csrc/cuda/fuse_branches/fuse_branches_bwd.cu"
DEVICE = "csrc/cuda/fuse_branches/fuse_branches.cuh"
ROWS = "csrc/cuda/tile/rows.cuh"
UPSAMPLE = "csrc/common/upsample.h"
TESTS = (
    "tests/simt/test_fuse_branches.py",
    "-x",
    "-k",
    "float32 and (test_tilings or test_cases) or small_gradients",
)


class Bug(NamedTuple):
    file: str
    pattern: str
    replacement: str
    kernel: str = "fuse_branches_bwd"  # to build, where the file is a header
    occurrence: int | None = None

    def kernels(self) -> Kernels:
        return mutate(
            self.file,
            self.pattern,
            self.replacement,
            occurrence=self.occurrence,
            kernel=None if self.file.endswith(".cu") else self.kernel,
        )


BARRIER = "__syncthreads();"
NO_LONGER_READ = "__syncthreads();  // the last patch's are no longer read"

BUGS = {
    "positions overwritten while they are read": Bug(
        DEVICE, NO_LONGER_READ, "", "fuse_branches_fwd"
    ),
    "positions read before they are there": Bug(
        DEVICE, f"    }}\n    {BARRIER}\n", "    }\n", "fuse_branches_fwd"
    ),
    "a pixel of a row left out": Bug(
        DEVICE, "column < patch.columns) f(", "column + 1 < patch.columns) f(", "fuse_branches_fwd"
    ),
    "a scale by the place of its branch": Bug(
        DEVICE, "level.branch[b].index * t.images", "b * t.images", "fuse_branches_fwd"
    ),
    "the blended rows exchanged": Bug(
        DEVICE, "(y.second) * width", "(y.first) * width", "fuse_branches_fwd"
    ),
    "a block's other patches left out": Bug(
        FORWARD, "i += level.patches.blocks", "i += level.patches.count"
    ),
    "sums of rows overwritten while they are read": Bug(
        ROWS, f"  }}\n  {BARRIER}\n}}", "  }\n}"
    ),
    "readers overwritten while they are read": Bug(BACKWARD, NO_LONGER_READ, ""),
    "readers read before they are there": Bug(BACKWARD, f"    }}\n    {BARRIER}\n", "    }\n"),
    "blocks' sums read before they are there": Bug(
        BACKWARD, f"  {BARRIER}\n  const auto total_of", "  const auto total_of"
    ),
    "blocks' sums overwritten while they are read": Bug(
        BACKWARD, "__syncthreads();  // the last image's sums are no longer read", ""
    ),
    "a warp's blocks left out": Bug(BACKWARD, "w < kFuseWarps;", "w < kFuseWarps - 1;"),
    "sums of the first image for all": Bug(
        BACKWARD, "(level.first_partial + image * level.patches.blocks) *", "level.first_partial *"
    ),
    "the shift without the second line": Bug(
        BACKWARD, "+ k[2 * t.channels] * total_of(kSumB2)", "+ 0 * k[2 * t.channels]"
    ),
    "g_z kept as float16": Bug(
        BACKWARD, "std::conditional_t<std::is_same_v<T, float16>, float, T>", "T"
    ),
    "the last reader left out": Bug(
        UPSAMPLE, "(static_cast<int64_t>(i + 1) * span + step - 1) / step",
        "static_cast<int64_t>(i + 1) * span / step",
    ),
    "a reader too early": Bug(
        UPSAMPLE, "(static_cast<int64_t>(i - 1) * span + step - 1) / step",
        "static_cast<int64_t>(i - 1) * span / step",
    ),
    "distances from the map's border": Bug(
        UPSAMPLE, "begin * step - static_cast<int64_t>(i) * span", "begin * step"
    ),
}  # fmt: skip


@pytest.mark.spawns
@pytest.mark.usefixtures("simt")
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_noticed(bug: str) -> None:
    BUGS[bug].kernels().assert_noticed(*TESTS)


@pytest.mark.spawns
@pytest.mark.usefixtures("simt")
def test_harmless_change_passes() -> None:
    run = Bug(BACKWARD, NO_LONGER_READ, f"{NO_LONGER_READ}\n    {BARRIER}").kernels()
    result = run.run_pytest(*TESTS)
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout
