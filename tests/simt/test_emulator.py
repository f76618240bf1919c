"""The host emulation itself: what kernels may rely on, and the faults that it must report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from .arrays import HalfName, from_bits, to_bits

HALVES: list[HalfName] = ["bfloat16", "float16"]


def normal(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def relative_error(actual: NDArray[Any], expected: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


# ---- barriers, collectives, atomics --------------------------------------------------


@pytest.mark.usefixtures("seed")
def test_barrier_publishes_shared_memory(simt: Any) -> None:
    x = normal(5, 128)
    np.testing.assert_array_equal(simt.emulator.reverse(x, True), x[:, ::-1])


@pytest.mark.usefixtures("seed")
def test_missing_barrier_shows_as_poison(simt: Any) -> None:
    x = normal(5, 128)
    out = simt.emulator.reverse(x, False)
    early = np.isnan(out)
    assert early.any(axis=1).all()
    np.testing.assert_array_equal(out[~early], x[:, ::-1][~early])


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("width", [32, 16, 8])
def test_shuffles(simt: Any, width: int) -> None:
    x = normal(96)
    shuffled, _ = simt.emulator.warp(x, width)
    segments = x.reshape(-1, width)
    lane = np.arange(width)
    up = segments[:, np.maximum(lane - 1, 0)]
    down = segments[:, np.where(lane + 2 < width, lane + 2, lane)]
    np.testing.assert_array_equal(shuffled[0], np.repeat(segments[:, 5], width))
    np.testing.assert_array_equal(shuffled[1], up.ravel())
    np.testing.assert_array_equal(shuffled[2], down.ravel())
    np.testing.assert_array_equal(shuffled[3], segments[:, lane ^ 4].ravel())
    sums = np.repeat(x.reshape(-1, 32).sum(axis=1, dtype=np.float64), 32)
    np.testing.assert_allclose(shuffled[4], sums, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("seed")
def test_votes(simt: Any) -> None:
    x = normal(96)
    x[32:64] = np.abs(x[32:64]) + 1
    x[64:] = -np.abs(x[64:])
    _, votes = simt.emulator.warp(x, 32)
    positive = x.reshape(-1, 32) > 0
    ballots = (positive * (np.uint64(1) << np.arange(32, dtype=np.uint64))).sum(axis=1)
    np.testing.assert_array_equal(votes[0].reshape(-1, 32), np.tile(ballots[:, None], 32))
    np.testing.assert_array_equal(votes[1].reshape(-1, 32)[:, 0], [1, 1, 0])
    np.testing.assert_array_equal(votes[2].reshape(-1, 32)[:, 0], [0, 1, 0])


def test_shuffle_from_absent_lanes_is_poison(simt: Any) -> None:
    shuffled, votes = simt.emulator.warp(normal(40), 32)
    # The second warp has lanes 0 to 7: lanes 6 and 7 read past its end.
    assert not np.isnan(shuffled[0]).any()
    np.testing.assert_array_equal(np.isnan(shuffled[2, 32:]), [False] * 6 + [True] * 2)
    assert votes[0, 32:].max() < 2**8


@pytest.mark.usefixtures("seed")
def test_atomics(simt: Any) -> None:
    x = np.random.default_rng(3).integers(0, 1000, 1000).astype(np.int32)
    x[17] = -4
    out = simt.emulator.atomics(x)
    total = int(x.sum())
    assert out["float_sum"] == total
    assert out["double_sum"] == total
    assert out["sum"] == total
    assert out["extremes"].tolist() == [-4, x.max()]
    np.testing.assert_array_equal(out["vector_sum"], total * np.arange(1, 5))
    assert out["lock"].tolist() == [0, 1000]


# ---- grids ---------------------------------------------------------------------------


@pytest.mark.usefixtures("seed")
def test_cooperative_blocks_wait_for_each_other(simt: Any) -> None:
    x = normal(4, 128)
    out = simt.emulator.handshake(x, True)
    np.testing.assert_allclose(out, np.full(4, x.sum(dtype=np.float64)), rtol=1e-5)


def test_ordinary_blocks_cannot_wait_for_each_other(simt: Any) -> None:
    with pytest.raises(RuntimeError, match=r"deadlock.*launch cooperatively"):
        simt.emulator.handshake(normal(4, 128), False)


def test_cooperative_grid_is_bounded(simt: Any) -> None:
    with pytest.raises(RuntimeError, match="720"):
        simt.emulator.handshake(normal(5, 128), True)
    simt.set_resident_blocks(5)
    try:
        simt.emulator.handshake(normal(5, 128), True)
    finally:
        simt.set_resident_blocks(4)


def test_impossible_launches_return_an_error(simt: Any) -> None:
    with pytest.raises(RuntimeError, match="CUDA error 9"):
        simt.emulator.warp(normal(1056), 32)


# ---- asynchronous copies -------------------------------------------------------------


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("valid", [4, 3, 0])
def test_async_copy_lands_at_its_wait(simt: Any, valid: int) -> None:
    x = normal(128, 4)
    expected = np.where(np.arange(4) < valid, x, 0)
    np.testing.assert_array_equal(simt.emulator.async_copy(x, valid, True), expected)


@pytest.mark.usefixtures("seed")
def test_async_copy_without_wait_leaves_poison(simt: Any) -> None:
    x = normal(128, 4)
    assert np.isnan(simt.emulator.async_copy(x, 4, False)).any()


# ---- tensor cores --------------------------------------------------------------------


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("depth", [32, 288])
def test_gemm_tile(simt: Any, dtype: HalfName, depth: int) -> None:
    a, b = to_bits(normal(2, 64, depth), dtype)
    tile = {"bfloat16": simt.emulator.gemm_tile_bf16, "float16": simt.emulator.gemm_tile_fp16}
    expected = from_bits(a, dtype).astype(np.float64) @ from_bits(b, dtype).astype(np.float64).T
    assert relative_error(tile[dtype](a, b), expected) < 1e-6


@pytest.mark.usefixtures("seed")
def test_tf32_tile(simt: Any) -> None:
    a, b = normal(16, 64), np.ascontiguousarray(normal(64, 8))
    expected = a.astype(np.float64) @ b.astype(np.float64)
    error = relative_error(simt.emulator.tf32_tile(a, b), expected)
    assert 1e-5 < error < 1e-3  # rounded operands: neither exact nor worse than TF32
    coarse_a, coarse_b = (np.round(x * 64) / 64 for x in (a, b))  # fit into TF32
    expected = coarse_a.astype(np.float64) @ coarse_b.astype(np.float64)
    assert relative_error(simt.emulator.tf32_tile(coarse_a, coarse_b), expected) < 1e-6


@pytest.mark.usefixtures("seed")
def test_f64_tile(simt: Any) -> None:
    a, b = normal(8, 32).astype(np.float64), normal(32, 8).astype(np.float64)
    assert relative_error(simt.emulator.f64_tile(a, b), a @ b) < 1e-14


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix_transposes(simt: Any, matrices: int) -> None:
    x = np.arange(matrices * 64, dtype=np.uint16).reshape(matrices, 8, 8)
    pairs = simt.emulator.transpose(x)
    np.testing.assert_array_equal(pairs.view(np.uint16), x.transpose(0, 2, 1))


# ---- storage and flags ---------------------------------------------------------------


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("dtype", HALVES)
def test_storage_conversions_and_flags(simt: Any, dtype: HalfName) -> None:
    bits = to_bits(normal(512), dtype)
    values = from_bits(bits, dtype)
    storage = {"bfloat16": simt.emulator.storage_bf16, "float16": simt.emulator.storage_fp16}
    out = storage[dtype](bits)
    np.testing.assert_array_equal(out["by_value"], to_bits(3 * values, dtype))
    np.testing.assert_array_equal(out["by_pair"], to_bits(3 * values, dtype))
    np.testing.assert_allclose(out["sum"], values.sum(dtype=np.float64), rtol=1e-4)
    np.testing.assert_array_equal(out["seen"], np.full(128, 512))


# ---- faults --------------------------------------------------------------------------

REPORTED = {
    "divergent_barrier": r"divergent __syncthreads: this thread is at basics\.cu:\d+",
    "barrier_after_collective": r"deadlock[^$]*threads 7, 39: __syncthreads at basics\.cu:\d+",
    "divergent_collective": r"divergent warp: .*(__any_sync.*__shfl_sync|__shfl_sync.*__any_sync)",
    "mask_mismatch": r"divergent warp: .*0x0000ffff",
    "not_in_mask": r"lane \d+ is not in the mask",
    "never_signalled": r"deadlock[^$]*threads 0: wait_until\(1\), the counter being 0",
    "spin_lock": r"livelock",
    "partial_warp_mma": r"mma_m8n8k4_f64.*needs all 32 lanes",
    "dynamic_overlap": r"overlap the array of 256 bytes at offset 0",
    "misaligned_vector": r"load_vec: address is 4 bytes past a multiple of the required 8",
    "misaligned_copy": r"cp_async to shared memory: address is 4 bytes past",
    "copy_outside_shared": r"not inside one shared array",
    "forgotten_copy": r"thread \(5, 0, 0\) ended with 1 asynchronous copies",
}
GUARDED = {
    "shared_overrun": r"write past the end of array 'values'",
    "shared_underrun": r"write before the begin of array 'values'",
    "dynamic_overrun": r"write past the end of array 'dynamic_shared at offset 0'",
    "global_overrun": r"write past the end of array 'out'",
}


def run_fault(simt: Any, name: str) -> NDArray[np.float32]:
    fault = simt.emulator.Fault.__members__[name]
    out: NDArray[np.float32] = simt.emulator.fault(normal(64), fault)
    return out


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("name", REPORTED)
def test_faults_are_reported(simt: Any, name: str) -> None:
    with pytest.raises(RuntimeError, match=REPORTED[name]) as error:
        run_fault(simt, name)
    assert "in kernel dyhead::simt_test::fault_kernel" in str(error.value)
    np.testing.assert_array_equal(run_fault(simt, "none"), normal(64))  # the next launch is whole


@pytest.mark.guards
@pytest.mark.parametrize("name", GUARDED)
def test_writes_out_of_bounds_are_reported(simt: Any, name: str) -> None:
    with pytest.raises(RuntimeError, match=GUARDED[name]):
        run_fault(simt, name)


@pytest.mark.guards
def test_reads_out_of_bounds_are_poison(simt: Any) -> None:
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(run_fault(simt, "global_overread"))), 63)


def test_uninitialised_shared_memory_is_poison(simt: Any) -> None:
    assert np.isnan(run_fault(simt, "uninitialised_shared")).all()


def test_unwritten_outputs_show(simt: Any) -> None:
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(run_fault(simt, "unwritten_output"))), 63)


def test_same_seed_same_order(simt: Any) -> None:
    def orders() -> list[str]:
        simt.set_seed(11)
        messages = []
        for _ in range(4):
            with pytest.raises(RuntimeError) as error:
                run_fault(simt, "divergent_collective")
            messages.append(str(error.value))
        return messages

    first = orders()
    assert len(set(first)) > 1
    assert orders() == first


def test_arrays_of_another_dtype_are_refused(simt: Any) -> None:
    with pytest.raises(ValueError, match="in: expected dtype float32, got float64"):
        simt.emulator.reverse(normal(1, 128).astype(np.float64), True)
