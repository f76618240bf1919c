"""Planted bugs in the tensor-core tile: the tests of the emulator must notice each of them."""

from __future__ import annotations

import pytest

from .build import mutate

TILE = "tests/simt/kernels/gemm_tile.cu"
TILE_TEST = "tests/simt/test_emulator.py::test_gemm_tile"

BUGS = {
    "no barrier before a stage is reused": ("    __syncthreads();\n", ""),
    "no wait": ("    cp_async_wait_group<kStages - 2>();\n", ""),
    "wait one group too few": (
        "cp_async_wait_group<kStages - 2>",
        "cp_async_wait_group<kStages - 1>",
    ),
    "copy into the stage in use": (
        "const int stage = chunk % kStages;",
        "const int stage = (chunk + 1) % kStages;",
    ),
    "row off by one": (
        "const int row = warp_row + 16 * i + lane % 16;",
        "const int row = warp_row + 16 * i + (lane + 1) % 16;",
    ),
}


@pytest.mark.spawns
@pytest.mark.usefixtures("simt")
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_noticed(bug: str) -> None:
    run = mutate(TILE, *BUGS[bug]).run_pytest(TILE_TEST)
    assert run.returncode == 1, run.stdout
    assert "failed" in run.stdout


@pytest.mark.spawns
@pytest.mark.usefixtures("simt")
def test_harmless_change_passes() -> None:
    change = mutate(TILE, "    __syncthreads();\n", "    __syncthreads();\n    __syncwarp();\n")
    run = change.run_pytest(TILE_TEST)
    assert run.returncode == 0, run.stdout


def test_pattern_must_match_once() -> None:
    with pytest.raises(ValueError, match="exactly one occurrence of 'no such text', found 0"):
        mutate(TILE, "no such text", "")
    with pytest.raises(ValueError, match="exactly one occurrence of 'ldmatrix', found"):
        mutate(TILE, "ldmatrix", "")
    with pytest.raises(ValueError, match="occurrence 99"):
        mutate(TILE, "ldmatrix", "", occurrence=99)
