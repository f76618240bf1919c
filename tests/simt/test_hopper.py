"""What the emulation knows of compute capability 9.0, and the misuse that it must report."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from .arrays import HalfName, from_bits, to_bits
from .layouts import LEFT_64X16, right_addresses, sums_64xn
from .server import SANITIZED

# Some mistakes show in some orders only.
ORDERS = 2 if SANITIZED else 12
DEPTH = 320  # five chunks of 64, in two stages


def normal(*shape: int, seed: int = 7) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative_error(actual: NDArray[Any], expected: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def product_of(
    a: NDArray[np.uint16], b: NDArray[np.uint16], dtype: HalfName
) -> NDArray[np.float64]:
    return from_bits(a, dtype).astype(np.float64) @ from_bits(b, dtype).astype(np.float64).T


def packed(b: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Rows as wgmma reads them: [depth / 64, rows * 128] bytes."""
    rows, depth = b.shape
    chunks = np.zeros((depth // 64, rows * 64), np.uint16)
    chunks[:, right_addresses(rows) // 2] = b.reshape(rows, -1, 64).transpose(1, 0, 2)
    return chunks.view(np.uint8)


def reports(simt: Any, call: Callable[[], Any], orders: int = ORDERS) -> list[str]:
    """What the emulation says in some orders of threads; "" where it sees nothing wrong."""
    found = []
    for seed in range(orders):
        simt.set_seed(seed)
        try:
            call()
            found.append("")
        except RuntimeError as error:
            found.append(str(error))
    return found


def assert_reported(simt: Any, call: Callable[[], Any], patterns: str | tuple[str, ...]) -> None:
    """Each order is reported by one of the patterns, each of which occurs."""
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    found = reports(simt, call)
    for report in found:
        assert any(re.search(pattern, report) for pattern in patterns), report
    if not SANITIZED:
        for pattern in patterns:
            assert any(re.search(pattern, report) for report in found), (pattern, found)


# ---- layouts ---------------------------------------------------------------------------------


def test_rows_of_the_library_are_those_of_cute(simt: Any) -> None:
    """unit_offset(), by which kernels and packing place units of 16 bytes."""
    row, unit = np.arange(256)[:, None], np.arange(8)
    np.testing.assert_array_equal(simt.hopper.unit_offset(row, unit), right_addresses(256)[:, ::8])


def one_product(
    simt: Any, n: int, dtype: HalfName, step: int = 0, adds: bool = True, first: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A product whose operands lie as CuTe says, and what it should be."""
    a, b = to_bits(normal(64, 16), dtype), to_bits(normal(n, 64), dtype)
    sums = normal(64, n)
    left = a.T.ravel()[LEFT_64X16.table()].view(np.uint32)
    right = np.full(first + n * 128, 0x55, np.uint8)
    right[first:] = packed(b).ravel()
    places = sums_64xn(n).table()
    out = simt.hopper.product(
        left,
        right,
        sums.T.ravel()[places],
        offset=first + 32 * step,
        adds=adds,
        is_bfloat16=dtype == "bfloat16",
    )
    actual = np.empty(64 * n)
    actual[places] = out
    expected = product_of(a, b[:, 16 * step : 16 * step + 16], dtype) + (sums if adds else 0)
    return actual.reshape(n, 64).T, expected


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("step", range(4))
def test_registers_and_addresses_are_those_of_cute(simt: Any, dtype: HalfName, step: int) -> None:
    assert relative_error(*one_product(simt, 256, dtype, step)) < 1e-6


@pytest.mark.parametrize("n", [8, 24, 128, 248])
def test_other_numbers_of_columns(simt: Any, n: int) -> None:
    assert relative_error(*one_product(simt, n, "bfloat16", 1)) < 1e-6


def test_sums_are_replaced_or_added_to(simt: Any) -> None:
    assert relative_error(*one_product(simt, 256, "bfloat16", adds=False)) < 1e-6


def test_operand_behind_another(simt: Any) -> None:
    assert relative_error(*one_product(simt, 64, "bfloat16", 2, first=3 * 1024)) < 1e-6


def shared_product(
    simt: Any, dtype: HalfName, step: int = 0, adds: bool = True, fault: str = "none"
) -> float:
    """The relative error of a product with 144 columns and both operands in shared memory."""
    a, b, sums = to_bits(normal(64, 64), dtype), to_bits(normal(144, 64), dtype), normal(64, 144)
    rows = np.concatenate([packed(b).ravel(), packed(a).ravel()])
    places = sums_64xn(144).table()
    out = simt.hopper.product(
        np.zeros((128, 4), np.uint32),
        rows,
        sums.T.ravel()[places],
        offset=32 * step,
        shared_left=b.size * 2 + 32 * step,
        adds=adds,
        is_bfloat16=dtype == "bfloat16",
        fault=simt.hopper.ProductFault.__members__[fault],
    )
    actual = np.empty(64 * 144)
    actual[places] = out
    depth = slice(16 * step, 16 * step + 16)
    expected = product_of(a[:, depth], b[:, depth], dtype) + (sums if adds else 0)
    return relative_error(actual.reshape(144, 64).T, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("step", range(4))
def test_left_operand_in_shared_memory(simt: Any, dtype: HalfName, step: int) -> None:
    assert shared_product(simt, dtype, step) < 1e-6
    assert shared_product(simt, dtype, step, adds=False) < 1e-6


SHARED_PRODUCT = {
    "other_operand": r"issues another product than the first warp.*; the left operands differ",
    "no_proxy_fence": r"ordinary stores to 'dynamic_shared.* without fence_proxy_async",
    "left_written": r"the left operand in 'dynamic_shared.* (was written before this wait|"
    r"has changed since another warp of the warpgroup issued this product)",
}


@pytest.mark.parametrize("fault", SHARED_PRODUCT)
def test_faults_of_a_left_operand_in_shared_memory(simt: Any, fault: str) -> None:
    assert_reported(
        simt, lambda: shared_product(simt, "bfloat16", fault=fault), SHARED_PRODUCT[fault]
    )


def test_sums_are_those_of_mma(simt: Any) -> None:
    """In the order of the depth, rounded to float32 each time: as mma_m16n8k16 adds here."""
    a, b = to_bits(normal(64, 64), "bfloat16"), to_bits(normal(256, 64), "bfloat16")
    out = simt.hopper.pipeline(a, packed(b))
    tile = simt.emulator.gemm_tile_bf16(np.ascontiguousarray(a), np.ascontiguousarray(b[:64]))
    np.testing.assert_array_equal(out[:, :64], tile)


# ---- a pipeline ------------------------------------------------------------------------------


def pipeline(simt: Any, fault: str = "none", cluster: int = 2, blocks: int = 0) -> float:
    """The relative error of the product that bulk copies feed."""
    a = to_bits(normal(64 * (blocks or cluster), DEPTH), "bfloat16")
    b = to_bits(normal(256, DEPTH, seed=8), "bfloat16")
    kind = simt.hopper.PipelineFault.__members__[fault]
    out = simt.hopper.pipeline(a, packed(b), cluster, kind)
    return relative_error(out, product_of(a, b, "bfloat16"))


@pytest.mark.parametrize(("cluster", "blocks"), [(1, 2), (2, 4), (4, 4)])
def test_pipeline(simt: Any, cluster: int, blocks: int) -> None:
    for seed in range(ORDERS):
        simt.set_seed(seed)
        assert pipeline(simt, cluster=cluster, blocks=blocks) < 1e-6


UNDER_WAY = r"wgmma at .*'dynamic_shared at offset 0'.*to which a bulk copy is under way"
CHANGED = r"wgmma_wait at .*the right operand in 'dynamic_shared.* was written before this wait"
PIPELINE: dict[str, str | tuple[str, ...]] = {
    "no_expect": (UNDER_WAY, r"mbarrier_arrive at .*fewer bytes expected than were copied"),
    "no_empty_wait": r"mbarrier_arrive_expect at .*one arrival more than the 1 of a phase",
    "constant_parity": r"mbarrier_wait at .*: parity 0, but the next phase of 'barriers' \+ 0 of "
    r"block \(\d, 0, 0\) for this thread is 1",
    "no_wgmma_fence": r"no wgmma_fence comes before the warp's first product",
    "left_unfenced": r"its left operand was written after the last wgmma_fence",
    "left_modified": r"wgmma_wait at .*the left operand was written before this wait",
    "sums_modified": r"its sums were written while an earlier product on them was under way",
    "no_commit": r"ended with products under way; .*has no wgmma_wait",
    "no_wait": r"ended with products under way; .*has no wgmma_wait",
    "no_init_fence": r"bulk_copy at .*nothing has made the mbarrier_init .*need fence_mbarrier",
    "no_last_sync": r"mbarrier_arrive at .*block \d of the cluster has ended",
    "under_arrival": r"deadlock[^$]*threads 128: mbarrier_wait for phase 0 of 'barriers' \+ 16, "
    r"which is in phase 0, with 8 of 9 arrivals, at hopper\.cu:\d+",
    "wrong_row": r"row 0 is 128 bytes past a multiple of 1024",
    "wrong_swizzle": r"expected the 128-byte swizzle \(1\) in the descriptor, got 0",
    "ordinary_store": r"wgmma at .*ordinary stores to 'dynamic_shared at offset 0' \+ 64 .*without "
    r"fence_proxy_async",
    "store_to_barrier": r"an ordinary store has overwritten the barrier 'barriers' \+ 8",
}


@pytest.mark.parametrize("fault", PIPELINE)
def test_faults_of_a_pipeline(simt: Any, fault: str) -> None:
    assert_reported(simt, lambda: pipeline(simt, fault), PIPELINE[fault])
    assert pipeline(simt) < 1e-6  # the next launch is whole


def test_products_that_do_not_wait_for_their_operand(simt: Any) -> None:
    found = reports(simt, lambda: pipeline(simt, "no_full_wait"))
    assert all(found)
    assert any(re.search(UNDER_WAY, report) for report in found)


def test_use_of_barriers_before_others_know_them(simt: Any) -> None:
    found = reports(simt, lambda: pipeline(simt, "no_init_sync"))
    assert all(re.search("no mbarrier_init|nothing has made|has not requested", r) for r in found)


@pytest.mark.skipif(SANITIZED, reason="needs many orders, which take long under sanitizers")
@pytest.mark.parametrize(("fault", "least"), [("early_release", 4), ("one_releases", 16)])
def test_release_of_what_is_still_read(simt: Any, fault: str, least: int) -> None:
    """By one warp for itself, or for all: the copy that overwrites comes in some orders only."""
    found = reports(simt, lambda: pipeline(simt, fault), orders=32)
    assert sum(bool(report) for report in found) >= least
    assert all(re.search(CHANGED, report) for report in found if report)


def test_sums_read_before_the_wait_are_poison(simt: Any) -> None:
    assert np.isnan(pipeline(simt, "sums_early"))


def test_fenced_store_is_read(simt: Any) -> None:
    assert 1e-4 < pipeline(simt, "fenced_store") < 0.1


# ---- products --------------------------------------------------------------------------------

PRODUCT = {
    "other_operand": r"issues another product than the first warp that came.*operands differ",
    "missing_warp": r"deadlock[^$]*wgmma_wait for a product that not all four warps have issued",
    "other_place": r"issues another product than the first warp that came, at hopper\.cu:\d+\n",
    "other_adds": r"lanes 0 and 9 of a warp pass different descriptors or `adds`",
}


def zero_product(simt: Any, fault: str = "none", options: Mapping[str, int] = {}) -> Any:
    """With `n` columns, from `bytes` of shared memory, `offset` bytes into them."""
    kind = simt.hopper.ProductFault.__members__[fault]
    n = options.get("n", 256)
    left, sums = np.zeros((128, 4), np.uint32), np.ones((128, n // 2), np.float32)
    rows = np.zeros(options.get("bytes", n * 128), np.uint8)
    return simt.hopper.product(left, rows, sums, offset=options.get("offset", 0), fault=kind)


@pytest.mark.parametrize("fault", PRODUCT)
def test_faults_of_a_product(simt: Any, fault: str) -> None:
    assert_reported(simt, lambda: zero_product(simt, fault), PRODUCT[fault])
    np.testing.assert_array_equal(zero_product(simt), 1)


@pytest.mark.parametrize(
    ("options", "report"),
    [
        ({"offset": 256}, "row 0 is 256 bytes past a multiple of 1024"),
        ({"offset": 112}, "begin at byte 112 of 128 and end in the next row"),
        ({"bytes": 31 * 1024}, "row 248 of the right operand is at offset 31744.*outside"),
        ({"n": 12}, "expected a multiple of 8 columns, 8..256, got 12"),
    ],
)
def test_operands_that_cannot_be(simt: Any, options: dict[str, int], report: str) -> None:
    with pytest.raises(RuntimeError, match=report):
        zero_product(simt, options=options)


# ---- bulk copies -----------------------------------------------------------------------------

ROWS = normal(4, 64)


def copied(simt: Any, fault: str = "none", cluster: int = 2) -> Any:
    return simt.hopper.copy(ROWS, cluster, simt.hopper.CopyFault.__members__[fault])


@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_rows_travel_between_blocks(simt: Any, cluster: int) -> None:
    expected = np.roll(ROWS.reshape(-1, cluster, 64), -1, axis=1).reshape(4, 64)
    for seed in range(ORDERS):
        simt.set_seed(seed)
        np.testing.assert_array_equal(copied(simt, cluster=cluster), expected)


UNFENCED = r"bulk_copy at .*ordinary stores to .*come before it without fence_proxy_async"
COPIES = {
    "misaligned_target": r"to shared memory: address is 4 bytes past a multiple of the required 16",
    "misaligned_source": r"from global memory: address is 4 bytes past a multiple of the required",
    "misaligned_size": r"expected a multiple of 16 bytes, got 252",
    "outside_shared": r"the 256 bytes are not inside one shared array",
    "outside_source": r"the source's 256 bytes are not inside one array \(they begin in 'in'\)",
    "no_blocks": r"expected a bit for some of the 2 blocks of the cluster, got 0",
    "other_blocks": r"expected a bit for some of the 2 blocks of the cluster, got [56]",
    "over_barrier": r"it would overwrite the barrier 'barriers' \+ 16",
    "no_barrier": r"no mbarrier_init has made 'barriers' \+ 24 of block .* a barrier",
    "source_written": r"the source was written while the copy to .*was under way",
    "no_proxy_fence": UNFENCED,
    "init_twice": r"mbarrier_init at .*'barriers' \+ 0 of block .* is a barrier already",
    "over_arrival": r"mbarrier_arrive at .*one arrival more than the 1 of a phase",
    "expects_more": r"deadlock[^$]*with 1 of 1 arrivals and 16 bytes to come",
    "not_requested": r"has not requested 'dynamic_shared at offset 0'",
    "never_copied": r"and 16 bytes to come \(expected and never copied\)",
    "late_wait": r"comes for phase 0 of 'barriers' \+ 16 .*already in phase 2.*parity misleads",
}
# Those whose order of threads decides what is seen, or whether; the first is seen in some order.
ENDED = "ended while a bulk copy to it was under way"
RACES = {
    "target_written": ("was written while the copy to it was under way", UNFENCED, "^$"),
    "overlap": (
        r"bytes of 'dynamic_shared at offset 0' \+ 16 of .* to which a bulk copy is under way",
        "fewer bytes expected than were copied",
    ),
    "expects_less": (
        "more bytes were copied than expected",
        "fewer bytes expected than were copied",
        ENDED,
        "copied and never expected",
    ),
    "peer_ended": (ENDED, "of the cluster has ended", "deadlock"),
    "not_awaited": (ENDED, "of the cluster has ended", "^$"),
    "overtaken": (
        r"'barriers' \+ 16 .* went on to phase 3 while a thread waited for phase 0",
        r"comes for phase 0 of 'barriers' \+ 16 .*already in phase [23].*parity misleads",
        "^$",
    ),
}


@pytest.mark.parametrize("fault", COPIES)
def test_faults_of_copies(simt: Any, fault: str) -> None:
    assert_reported(simt, lambda: copied(simt, fault), COPIES[fault])
    copied(simt)


@pytest.mark.parametrize("fault", RACES)
def test_races_of_copies(simt: Any, fault: str) -> None:
    found = reports(simt, lambda: copied(simt, fault), orders=2 if SANITIZED else 32)
    for report in found:
        assert any(re.search(pattern, report) for pattern in RACES[fault]), report
    if not SANITIZED:
        assert any(re.search(RACES[fault][0], report) for report in found), found


# ---- barriers --------------------------------------------------------------------------------


def met(simt: Any, fault: str = "none", cluster: int = 2, **options: Any) -> Any:
    kind = simt.hopper.MeetingFault.__members__[fault]
    return simt.hopper.meeting(normal(4, 128), cluster, fault=kind, **options)


def test_named_barriers(simt: Any) -> None:
    expected = normal(4, 2, 64)[:, :, ::-1].reshape(4, 128)
    for seed in range(ORDERS):
        simt.set_seed(seed)
        np.testing.assert_array_equal(met(simt), expected)
        assert np.isnan(met(simt, "no_barrier")).any()


MEETINGS = {
    "other_count": r"named_barrier_sync\(1, \d+\) at .*: others wait there for \d+ threads",
    "part_warps": r"named_barrier_sync\(1, 48\) at .*: expected the threads of whole warps",
    "half_warp": r"only 16 lanes of warp \d are there; it counts whole warps",
    "barrier_zero": r"named_barrier_sync\(0, 64\) at .*: expected a barrier 1\.\.15",
    "missing_warp": r"deadlock[^$]*threads 64-95: named_barrier_sync\(2, 64\) at hopper\.cu",
    "divergent_lanes": r"divergent warp: lane \d+ calls named_barrier_sync\(\d, 64\) at",
    "divergent_cluster": r"divergent cluster_sync: this thread is at hopper\.cu:\d+, \d+ of 256",
    "missing_in_cluster": r"deadlock[^$]*threads 0-127: cluster_sync at hopper\.cu:\d+\n block",
}


@pytest.mark.parametrize("fault", MEETINGS)
def test_faults_of_meetings(simt: Any, fault: str) -> None:
    assert_reported(simt, lambda: met(simt, fault), MEETINGS[fault])


@pytest.mark.parametrize("cluster", [0, 3, 16])
def test_clusters_that_cannot_be(simt: Any, cluster: int) -> None:
    with pytest.raises(RuntimeError, match="CUDA error 9"):
        met(simt, cluster=cluster)


def test_cooperative_clusters_are_refused(simt: Any) -> None:
    with pytest.raises(RuntimeError, match="cooperative launches of clusters are not emulated"):
        met(simt, cooperative=True)


# ---- registers -------------------------------------------------------------------------------

REGISTERS = {
    "no_give": r"deadlock[^$]*threads 128-383: take_registers<232>, for which the warp lacks 2048 ",
    "give_more": r"give_registers<232> at .*: the warp has 168 per thread, which is less",
    "take_less": r"take_registers<160> at .*: the warp has 168 per thread, which is more",
    "one_warp": r"warps 0 and 1 of a warpgroup called give_registers or take_registers different",
}


def test_warpgroups_hand_registers_over(simt: Any) -> None:
    for seed in range(ORDERS):
        simt.set_seed(seed)
        np.testing.assert_array_equal(simt.hopper.registers(), np.arange(384))


@pytest.mark.parametrize("fault", REGISTERS)
def test_faults_of_registers(simt: Any, fault: str) -> None:
    kind = simt.hopper.RegisterFault.__members__[fault]
    assert_reported(simt, lambda: simt.hopper.registers(kind), REGISTERS[fault])
