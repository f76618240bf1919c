"""What is computed before a launch: the division between shared memory and L1."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

KB = 1024
# Threads, registers, shared memory and blocks of a multiprocessor of sm_90, and of sm_86.
SM_90 = (2048, 65536, 228 * KB, 32)
SM_86 = (1536, 65536, 100 * KB, 16)


def percent(
    simt: Any, block: tuple[int, int, int], device: tuple[int, ...], reserved: int = KB
) -> int:
    """For a block's threads, the registers of each, and its shared memory."""
    share = simt.launch.ProcessorShare
    return int(simt.launch.carveout_percent(share(*block), share(*device), reserved))


@pytest.mark.parametrize(
    ("block", "device", "expected"),
    [
        # One block for its registers: 161 of 228 KB. Two: 222 KB.
        ((384, 168, 160 * KB), SM_90, 71),
        ((256, 128, 110 * KB), SM_90, 98),
        # The shared memory itself allows one only.
        ((256, 128, 130 * KB), SM_90, 58),
        # Small shared memory: eight blocks of threads, 32 blocks at most, five for the registers.
        ((256, 32, 2 * KB), SM_90, 11),
        ((32, 16, KB), SM_90, 29),
        ((128, 95, 9 * KB), SM_90, 22),
        # Without any, L1 gets nearly everything; and never more than everything.
        ((256, 32, 0), SM_90, 4),
        ((256, 128, 99 * KB), SM_86, 100),
        ((256, 64, 12 * KB), SM_86, 52),
    ],
    ids=str,
)
def test_carveout_of_known_blocks(
    simt: Any, block: tuple[int, int, int], device: tuple[int, ...], expected: int
) -> None:
    assert percent(simt, block, device) == expected


@given(
    threads=st.integers(1, 32).map(lambda warps: 32 * warps),
    registers=st.integers(1, 64).map(lambda eights: 8 * eights),
    shared_bytes=st.integers(0, 227 * KB),
)
def test_carveout_holds_all_resident_blocks(
    simt: Any, threads: int, registers: int, shared_bytes: int
) -> None:
    """It never lowers the number of blocks that fit, and is no larger than it must be."""
    most = max(1, min(32, 2048 // threads, 65536 // (registers * threads)))
    resident = max(1, min(most, 228 * KB // (shared_bytes + KB)))
    bytes_used = resident * (shared_bytes + KB)
    found = percent(simt, (threads, registers, shared_bytes), SM_90)
    assert 0 <= found <= 100
    assert found * 228 * KB >= 100 * bytes_used
    assert (found - 1) * 228 * KB < 100 * bytes_used
